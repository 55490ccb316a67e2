"""A batch comes out on the device as the loader drew it, bit for bit; and what is copied ahead keeps its own place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.config import DataConfig, PromptConfig, SegVolConfig, TrainConfig
from segvol_pl.data import sampling
from segvol_pl.data.ahead import Ahead
from segvol_pl.data.batch import Batch, masks_of, packed, shade_of, shaded, unpacked
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_array, read_facts, read_slices
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream, collate
from segvol_pl.imaging import transforms
from segvol_pl.imaging.intensity import Intensity, normalise
from segvol_pl.imaging.masks import BoxedMask
from segvol_pl.planning.plan import sample_bytes

OVERVIEW = [8, 16, 16]
"""The shape that the fixture's overviews were packed with."""
MODEL = tiny_model(input_shape=OVERVIEW)
RESIZED = tiny_model(input_shape=[12, 24, 8])


def plain_image(hu_DHW: np.ndarray, intensity: Intensity, scale: float | None, shift: float | None) -> np.ndarray:
    """As numpy makes it: only what was drawn is applied."""
    image_DHW = normalise(hu_DHW, intensity)
    if scale is not None:
        image_DHW = image_DHW * np.float32(scale)
    return image_DHW if shift is None else image_DHW + np.float32(shift)


@given(
    st.floats(-2000, 500),
    st.floats(0.001, 40_000),
    st.none() | st.floats(0.9, 1.1),
    st.none() | st.floats(-0.1, 0.1),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_the_image_made_of_hu_is_numpys_to_the_bit(
    low: float, span: float, scale: float | None, shift: float | None, seed: int
) -> None:
    intensity = Intensity(0.0, low, low + span, -32768, 32767)
    hu_DHW = np.random.default_rng(seed).integers(-32768, 32768, (3, 5, 7)).astype(np.int16)
    hu_DHW.reshape(-1)[:4] = np.clip([low, low + 1, low + span, low + span - 1], -32768, 32767)
    shade = shade_of(intensity, 1.0 if scale is None else scale, transforms.NO_SHIFT if shift is None else shift)
    image = shaded(torch.from_numpy(hu_DHW)[None, None], torch.from_numpy(shade)[None])[0, 0].numpy()
    expected = plain_image(hu_DHW, intensity, scale, shift)
    assert image.dtype == expected.dtype == np.float32 and image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 48])
def test_masks_come_back_from_their_bits(count: int) -> None:
    rng = np.random.default_rng(count)
    volumes = [[np.flip(rng.random((3, 5, 7)) < share, k % 3) for k in range(count)] for share in (0.0, 0.3, 1.0)]
    bits_BJDHW = np.stack([packed([BoxedMask.of(mask) for mask in masks]) for masks in volumes])
    assert bits_BJDHW.shape == (3, -(-count // 8), 3, 5, 7) and bits_BJDHW.dtype == np.uint8
    masks_BKDHW = masks_of(torch.from_numpy(bits_BJDHW), count)
    assert masks_BKDHW.dtype == torch.bool and masks_BKDHW.is_contiguous()
    assert np.array_equal(masks_BKDHW.numpy(), np.stack([np.stack(masks) for masks in volumes]))


@pytest.mark.parametrize("model", [MODEL, RESIZED], ids=["as packed", "overviews resized"])
@pytest.mark.parametrize("intensity", [0.0, 0.5, 1.0])
def test_batches_hold_what_was_drawn(
    phantom_shards: Path, monkeypatch: pytest.MonkeyPatch, model: SegVolConfig, intensity: float
) -> None:
    """Windows and overviews, flips, and every augmentation of the intensity; two volumes at once."""
    shown: list[np.ndarray] = []
    masks: list[np.ndarray] = []

    def kept(view: sampling.Crop) -> Arrays:
        scale, shift = (None if view.scale == 1 else view.scale), (None if view.shift == 0 else view.shift)
        if view.intensity is None:
            image_DHW = view.image_DHW * np.float32(view.scale) if scale is not None else view.image_DHW
            shown.append(image_DHW if shift is None else image_DHW + np.float32(shift))
        else:
            shown.append(plain_image(view.image_DHW, view.intensity, scale, shift))
        return image_of(view)

    def packing(several: list[BoxedMask]) -> np.ndarray:
        masks.append(np.stack([mask.complete() for mask in several]))
        return packed(several)

    image_of = sampling.image_of
    monkeypatch.setattr(sampling, "image_of", kept)
    monkeypatch.setattr(sampling, "packed", packing)
    data, prompts = DataConfig(intensity=intensity, flip=0.5), PromptConfig(categories_per_volume=2)
    forms = set()
    for batch in islice(iter(_stream(phantom_shards, model, data, prompts)), 12):
        forms.add((("hu_BCDHW" in batch), ("image_BCDHW" in batch)))
        seen = unpacked(batch)
        expected = np.stack(shown)[:, None]
        assert (
            seen["image_BCDHW"].dtype == torch.float32 and seen["image_BCDHW"].numpy().tobytes() == expected.tobytes()
        )
        assert np.array_equal(seen["masks_BKDHW"].numpy(), np.stack(masks[::2]))
        assert np.array_equal(seen["pseudo_masks_BKDHW"].numpy(), np.stack(masks[1::2]))
        assert not {"hu_BCDHW", "shade_B4", "bits_BJDHW", "pseudo_bits_BJDHW", "place_B"} & set(seen)
        assert all(torch.equal(again, seen[name]) for name, again in unpacked(seen).items())
        shown.clear()
        masks.clear()
    assert forms == ({(True, False)} if model is MODEL else {(True, False), (False, True), (True, True)})


def _stream(folder: Path, model: SegVolConfig, data: DataConfig, prompts: PromptConfig) -> Stream:
    index = read_index(Store(folder))
    rows = {name: row for row, name in enumerate(sorted(index.categories))}
    records = index.samples.labelled()

    def draw(facts: sampling.Facts, read: sampling.Read, rng: np.random.Generator) -> Arrays:
        return sampling.sample_segmentation(facts, read, rng, model=model, data=data, prompts=prompts, row_of=rows)

    return Stream(Corpus([Part(Store(folder), records, 6)]), draw, BatchPlan(6 * len(records), 2, seed=5))


def test_the_planner_states_the_bytes_that_travel(phantom_shards: Path) -> None:
    """Of the voxels; points and boxes are small beside them at full size."""
    prompts = PromptConfig(categories_per_volume=9, pseudo_per_volume=6)
    batch = next(iter(_stream(phantom_shards, MODEL, DataConfig(shards="unused"), prompts)))
    voxels = [value for value in batch.values() if value.shape[-3:] == tuple(OVERVIEW)]
    planned = sample_bytes(TrainConfig(model=MODEL, prompts=prompts))
    assert sum(value.nbytes for value in voxels) == 2 * planned == 2 * (2 + 2 + 1) * 8 * 16 * 16


def test_a_simmim_batch_holds_its_image(phantom_shards: Path) -> None:
    record = read_index(Store(phantom_shards)).samples[0]
    store = Store(phantom_shards)
    facts = read_facts(store, record)
    sample = sampling.sample_simmim(
        facts,
        lambda wanted: read_slices(store, record, facts, wanted),
        np.random.default_rng(0),
        model=MODEL,
        data=DataConfig(flip=0.0, intensity=0.0, overview_fraction=1.0),
        mask_ratio=0.5,
    )
    batch = unpacked(collate([sample, sample], 2))
    hu_DHW = read_array(store, record, facts, sampling.Member.OVERVIEW)[:]
    assert batch["mask_BT"].sum(1).tolist() == [4, 4]
    for image_CDHW in batch["image_BCDHW"]:
        assert image_CDHW.numpy().tobytes() == normalise(hu_DHW, facts.intensity).tobytes()


# ---- ahead ----


def test_a_copy_begins_before_the_batch_in_front_is_given() -> None:
    said: list[str] = []

    def loader() -> Iterator[Batch]:
        for number in range(4):
            yield {"seen": torch.tensor(number)}

    def begin(batch: Batch) -> Callable[[], Batch]:
        number = int(batch["seen"])
        said.append(f"begin {number}")

        def arrived() -> Batch:
            said.append(f"arrived {number}")
            return batch

        return arrived

    given = []
    for batch in Ahead(list(loader()), begin):
        given.append(int(batch["seen"]))
        said.append(f"step {given[-1]}")
    assert given == [0, 1, 2, 3]
    for number, after in pairwise(given):
        assert said.index(f"begin {after}") < said.index(f"arrived {number}") < said.index(f"step {number}")
    assert said.index("step 1") < said.index("begin 3"), "one batch ahead, no more"
    assert list(Ahead([], begin)) == []
