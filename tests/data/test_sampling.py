"""What a training sample of a volume shows and asks: windows, categories, combinations, simulated coarse masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import tiny_model

from segvol_pl.config import Balance, DataConfig, PromptConfig
from segvol_pl.data import sampling
from segvol_pl.data.coarse_masks import simulated_coarse
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.schema import Facts
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_slices
from segvol_pl.data.store import Store
from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.transforms import grid_starts

MODEL = tiny_model()
WINDOWS = DataConfig(overview_fraction=0.0, flip=0.0)
PROMPTS = PromptConfig(categories_per_volume=3, pseudo_per_volume=0)


@pytest.fixture(scope="module")
def volume(phantom_shards: Path) -> tuple[Facts, sampling.Read]:
    store = Store(phantom_shards)
    corpus = Corpus([Part(store, read_index(store).samples.labelled())])
    _, record = corpus.located(0)
    facts = read_facts(store, record)
    return facts, lambda wanted: read_slices(store, record, facts, wanted)


def draw(volume: tuple[Facts, sampling.Read], seed: int, **changes: Any) -> sampling.Arrays:
    facts, read = volume
    settings = {"model": MODEL, "data": WINDOWS, "prompts": PROMPTS, **changes}
    rows = {name: row for row, name in enumerate(sorted(facts.categories))}
    return sampling.sample_segmentation(facts, read, np.random.default_rng(seed), row_of=rows, **settings)


def test_windows_on_the_grid_hold_a_voxel_of_their_category(volume: tuple[Facts, sampling.Read]) -> None:
    facts, read = volume
    size, data = MODEL.input_shape, replace(WINDOWS, grid_fraction=1.0)
    axes = [grid_starts(0, extent, length, 0.5) for extent, length in zip(facts.shape, size, strict=True)]
    hu_DHW = read({sampling.Member.CT: sampling.ALL})[sampling.Member.CT]
    grid = {
        hu_DHW[d : d + size[0], h : h + size[1], w : w + size[2]].tobytes()
        for d in axes[0]
        for h in axes[1]
        for w in axes[2]
    }
    for seed in range(20):
        crop = sampling.sample_crop(facts, read, MODEL, data, np.random.default_rng(seed))
        assert crop.image_DHW.tobytes() in grid and crop.category is not None
        assert np.isin(crop.label_DHW, facts.categories[crop.category].values).any()


def test_combinations_are_drawn_for_each_category_without_repetition(volume: tuple[Facts, sampling.Read]) -> None:
    prompts = replace(PROMPTS, per_category=2)
    drawn_S3C = np.stack([draw(volume, seed, prompts=prompts)["combination_KC"] for seed in range(60)])
    assert drawn_S3C.shape == (60, 3, 2) and (drawn_S3C[..., 0] != drawn_S3C[..., 1]).all()
    counts = np.bincount(drawn_S3C.ravel(), minlength=6)
    assert len(counts) == 6 and counts.min() > 30  # 60 are expected of each


def test_absent_categories_are_prompted_by_text_to_find_nothing(volume: tuple[Facts, sampling.Read]) -> None:
    prompts = replace(PROMPTS, per_category=2, absent_fraction=0.5)
    text, absent, shown = PROMPTS.combinations.index("text"), 0, 0
    for seed in range(30):
        sample = draw(volume, seed, prompts=prompts)
        for place in range(3):
            empty = not (sample["bits_JDHW"][0] >> place & 1).any()
            absent, shown = absent + empty, shown + (not empty)
            assert sample["valid_K"][place]
            if empty:
                assert (sample["combination_KC"][place] == text).all()
    assert absent > 10 and shown > 30


@pytest.mark.parametrize("shows", [True, False])
def test_categories_that_the_whole_volume_lacks_are_prompted_to_find_nothing(
    volume: tuple[Facts, sampling.Read], shows: bool
) -> None:
    """Those alone that its data set labels; also in a volume that shows nothing."""
    facts, read = volume
    held = sorted(facts.categories)
    prompts = replace(PROMPTS, per_category=2, absent=0.5)
    facts = facts if shows else replace(facts, categories={})
    rows = {name: row for row, name in enumerate([*held, "uterus"])}
    text, lacking = PROMPTS.combinations.index("text"), 0
    for seed in range(20):
        names = {"phantoms": [*facts.categories, "uterus"], "others": ["prostate"]}
        settings = {"model": MODEL, "data": WINDOWS, "prompts": prompts, "row_of": rows, "labelled_by": names}
        sample = sampling.sample_segmentation(facts, read, np.random.default_rng(seed), **settings)
        for place in range(3):
            if not (sample["bits_JDHW"][0] >> place & 1).any() and sample["valid_K"][place]:
                lacking += 1
                assert sample["category_K"][place] == rows["uterus"]
                assert (sample["combination_KC"][place] == text).all()
            else:
                assert shows == sample["valid_K"][place]
    assert 15 < lacking < 45
    same, before = (draw(volume, 1, prompts=replace(prompts, absent=share)) for share in (0.5, 0.0))
    assert all(np.array_equal(same[name], before[name]) for name in before), "without names there is nothing to draw"


@pytest.mark.parametrize("overview", [0.0, 1.0])
def test_rare_categories_are_drawn_more_often_if_balanced(volume: tuple[Facts, sampling.Read], overview: float) -> None:
    """By the chances that the numbers of volumes give, in windows and in overviews."""
    rare, names = "liver", sorted(volume[0].categories)
    others = [name for name in names if name != rare]
    weights = sampling.category_weights({rare: 1, **dict.fromkeys(others, 16)}, Balance.sqrt)
    assert weights is not None and weights[rare] == 4 * weights[others[0]] == 1.0
    assert sampling.category_weights({rare: 1}, Balance.none) is None
    assert sampling.category_weights({rare: 4}, Balance.inverse) == {rare: 0.25}
    data, rows = replace(WINDOWS, overview_fraction=overview), {name: row for row, name in enumerate(names)}
    one = replace(PROMPTS, categories_per_volume=1)
    found = {
        given is None: sum(
            int(draw(volume, seed, data=data, prompts=one, weights=given)["category_K"][0]) == rows[rare]
            for seed in range(60)
        )
        for given in (None, weights)
    }
    # Of n categories one is four times as likely as each other one: 4 / (n + 3) instead of 1 / n, or more where a crop
    # shows only some of them.
    assert found[False] > max(2 * found[True], 0.6 * 60 * 4 / (len(names) + 3))


def test_a_share_of_the_boxes_is_that_of_the_middle_slice(volume: tuple[Facts, sampling.Read]) -> None:
    narrower = kept = 0
    for seed in range(40):
        sample = draw(volume, seed, prompts=replace(PROMPTS, slice_boxes=0.5, box_jitter=0.0))
        masks_KDHW = [np.asarray(sample["bits_JDHW"][0] >> place & 1, bool) for place in range(3)]
        for mask_DHW, box_6 in zip(masks_KDHW, sample["boxes_K6"].tolist(), strict=True):
            slices_D = np.flatnonzero(mask_DHW.any(axis=(1, 2)))
            middle = slices_D[len(slices_D) // 2]
            _, h0, w0, _, h1, w1 = box_of(mask_DHW[middle : middle + 1])
            drawn = [slices_D[0], h0, w0, slices_D[-1], h1, w1]
            assert box_6 in (drawn, list(box_of(mask_DHW)))
            narrower, kept = narrower + (box_6 != list(box_of(mask_DHW))), kept + (box_6 != drawn)
    assert narrower > 10 and kept > 10


def test_coarse_masks_come_with_a_share_of_the_categories_in_windows_only(volume: tuple[Facts, sampling.Read]) -> None:
    model, prompts = replace(MODEL, mask_prompt=True), replace(PROMPTS, mask_fraction=0.6)
    windows = [draw(volume, seed, model=model, prompts=prompts) for seed in range(60)]
    share = np.mean([sample["has_coarse_K"].mean() for sample in windows])
    assert 0.45 < share < 0.75
    for sample in windows:
        assert sample["coarse_KDHW"].shape == (3, *model.mask_shape)
        assert not sample["coarse_KDHW"][~sample["has_coarse_K"]].any()
    overviews = {"model": model, "prompts": prompts, "data": DataConfig(overview_fraction=1.0)}
    assert not any(draw(volume, seed, **overviews)["has_coarse_K"].any() for seed in range(9))


def test_a_sample_is_the_same_with_and_without_a_mask(volume: tuple[Facts, sampling.Read]) -> None:
    """Settings that are off draw no numbers: runs without them see the samples that they saw before these existed."""
    plain = draw(volume, 1)
    other = draw(
        volume,
        1,
        data=replace(WINDOWS, grid_fraction=0.0),
        prompts=replace(PROMPTS, mask_fraction=0.0, slice_boxes=0.0),
    )
    assert plain.keys() == other.keys() and all((plain[name] == other[name]).all() for name in plain)


def test_a_simulated_coarse_mask_is_near_the_truth_but_not_it() -> None:
    truth_DHW = np.zeros((16, 32, 32), bool)
    truth_DHW[4:12, 8:24, 10:22] = True
    drawn = [simulated_coarse(truth_DHW, (2, 2, 2), (16, 16, 16), np.random.default_rng(seed)) for seed in range(200)]
    small_DHW = truth_DHW[:, ::2, ::2]
    dice = [2 * ((d > 0.5) & small_DHW).sum() / ((d > 0.5).sum() + small_DHW.sum()) for d in drawn]
    assert all(d.min() >= 0 and d.max() <= 1 and d.dtype == np.float32 and d.shape == (16, 16, 16) for d in drawn)
    assert 0.5 < np.mean(dice) < 0.9 and np.std(dice) > 0.05 and max(dice) < 1


def test_an_empty_window_may_get_a_false_coarse_mask() -> None:
    empty_DHW = np.zeros((16, 32, 32), bool)
    found = [simulated_coarse(empty_DHW, (4, 3, 3), (16, 16, 16), np.random.default_rng(n)).max() for n in range(100)]
    assert min(found) < 0.1 and 3 < np.sum(np.array(found) > 0.5) < 60


def test_a_category_is_asked_for_by_any_of_its_names(volume: tuple[Facts, sampling.Read]) -> None:
    """Each name comes up, those of others never, and all but the name is the same as without synonyms."""
    names = sorted(volume[0].categories)
    liver, lung, rows = names.index("liver"), names.index("lung left"), len(names)
    others = {"liver": [rows, rows + 2], "lung left": [rows + 1]}
    settings = {
        "data": replace(WINDOWS, overview_fraction=1.0),
        "prompts": replace(PROMPTS, categories_per_volume=len(names), per_category=2, corrections=1),
    }
    own = [*range(rows), liver, lung, liver]
    drawn: list[int] = []
    for seed in range(40):
        plain, asked = (draw(volume, seed, **settings, synonym_rows=given) for given in (None, others))
        assert plain.keys() == asked.keys()
        assert all(plain[name].tobytes() == asked[name].tobytes() for name in plain if name != "category_K")
        assert [own[row] for row in asked["category_K"]] == plain["category_K"].tolist()
        drawn += asked["category_K"].tolist()
    counts = np.bincount(drawn, minlength=rows + 3)
    assert counts[[liver, rows, rows + 2]].min() > counts[[liver, rows, rows + 2]].sum() / 6  # a third is expected
    assert counts[[lung, rows + 1]].min() > counts[[lung, rows + 1]].sum() / 4
    first, second = draw(volume, 1, synonym_rows={}), draw(volume, 1)
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
