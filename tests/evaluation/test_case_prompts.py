"""Prompts drawn from the truth: what each source gives."""

from __future__ import annotations

import numpy as np
import pytest

from segvol_pl.config import CasesConfig, DrawConfig, EvaluateConfig, Mode, Slice
from segvol_pl.errors import ConfigError, SampleError
from segvol_pl.evaluation.prompts import Setting, deepest_voxel, sample_prompt, settings, split_components
from segvol_pl.imaging.box import box_of

SHAPE, SPACING, SEEDS = (20, 40, 36), (3.0, 1.0, 1.0), [0, 1, 2]


def cone() -> np.ndarray:
    """Thin at the bottom, widest at slice 9 of 4 to 12."""
    mask_DHW = np.zeros(SHAPE, bool)
    for d, reach in zip(range(4, 13), (1, 2, 3, 4, 5, 6, 5, 3, 1), strict=True):
        mask_DHW[d, 20 - reach : 21 + reach, 15 - reach : 16 + reach] = True
    return mask_DHW


def ring() -> np.ndarray:
    """Its centroid lies outside of it."""
    h, w = np.indices(SHAPE[1:])
    distance = np.hypot(h - 20, w - 17)
    return np.broadcast_to((distance > 6) & (distance < 13), SHAPE).copy()


def test_settings_are_all_ways_of_asking() -> None:
    drawn = DrawConfig(boxes=["exact", "slice"], points=["random1", "centre", "random5"])
    modes = [Mode.zoom, Mode.resize]
    config = EvaluateConfig(
        "m", CasesConfig(shards="s"), "o", modes=modes, prompts=["text", "box+text", "box+points"], draw=drawn
    )
    found = [str(setting) for setting in settings(config)]
    assert len(found) == len(set(found)) == 2 * (1 + 2 + 2 * 3)
    assert found[:2] == ["zoom text", "zoom box(exact)+text"] and "resize box(slice)+points(centre)" in found


def test_a_prompt_has_the_parts_of_its_setting() -> None:
    mask_DHW = cone()
    prompt = sample_prompt(
        Setting("zoom", "points+text", points="random5"), "liver", mask_DHW, SPACING, DrawConfig(), SEEDS
    )
    assert prompt.text == "liver" and prompt.box is None and prompt.points_N3 is not None
    np.testing.assert_array_equal(prompt.labels_N, [1] * 5 + [0] * 2)
    np.testing.assert_array_equal(mask_DHW[tuple(prompt.points_N3.T)], [True] * 5 + [False] * 2)
    boxed = sample_prompt(Setting("zoom", "box", box="exact"), "liver", mask_DHW, SPACING, DrawConfig(), SEEDS)
    assert boxed.text is None and boxed.box == box_of(mask_DHW)
    alone = sample_prompt(Setting("zoom", "text"), "liver", np.zeros(SHAPE, bool), SPACING, DrawConfig(), SEEDS)
    assert (alone.text, alone.box, alone.points_N3) == ("liver", None, None)


def test_a_jittered_box_is_near_the_exact_one_and_drawn_by_the_seeds() -> None:
    setting, exact = Setting("zoom", "box", box="jittered"), box_of(cone())
    boxes = [sample_prompt(setting, "", cone(), SPACING, DrawConfig(jitter=0.2), [seed]).box for seed in range(20)]
    reach = [0.2 * (high - low + 1) + 0.5 for low, high in zip(exact[:3], exact[3:], strict=True)] * 2
    assert len(set(boxes)) > 10
    assert all(
        abs(one - other) <= most for box in boxes if box for one, other, most in zip(box, exact, reach, strict=True)
    )
    assert boxes[0] == sample_prompt(setting, "", cone(), SPACING, DrawConfig(jitter=0.2), [0]).box


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (DrawConfig(), (4, 14, 9, 12, 26, 21)),  # the widest slice, as deep as the structure
        (DrawConfig(slice=Slice.middle), (4, 15, 10, 12, 25, 20)),
        (DrawConfig(depth=12.0), (7, 14, 9, 11, 26, 21)),  # 12 mm of 3 mm slices around slice 9
        (DrawConfig(depth=500.0), (0, 14, 9, 19, 26, 21)),
    ],
)
def test_a_slices_box(config: DrawConfig, expected: tuple[int, ...]) -> None:
    assert sample_prompt(Setting("zoom", "box", box="slice"), "", cone(), SPACING, config, SEEDS).box == expected


def test_a_depth_in_mm_needs_a_spacing() -> None:
    setting = Setting("zoom", "box", box="slice")
    with pytest.raises(SampleError, match=r"draw\.depth"):
        sample_prompt(setting, "", cone(), None, DrawConfig(depth=10.0), SEEDS)
    assert sample_prompt(setting, "", cone(), None, DrawConfig(), SEEDS).box is not None


def test_the_centre_is_inside_and_deepest() -> None:
    assert deepest_voxel(cone(), SPACING)[1:].tolist() == [20, 15]
    d, h, w = deepest_voxel(ring(), SPACING)
    assert ring()[d, h, w] and 8 <= np.hypot(h - 20, w - 17) <= 11
    prompt = sample_prompt(Setting("zoom", "points", points="centre"), "", ring(), SPACING, DrawConfig(), SEEDS)
    assert prompt.points_N3 is not None and prompt.points_N3.tolist() == [[d, h, w]] and prompt.labels_N == [1]


def scattered() -> np.ndarray:
    mask_DHW = np.zeros(SHAPE, bool)
    mask_DHW[2:6, 2:6, 2:6] = True
    mask_DHW[6, 6, 6] = True  # touches the first by a corner
    mask_DHW[10:16, 20:26, 20:26] = True
    mask_DHW[18, 38, 30:33] = True
    return mask_DHW


def test_a_scattered_target_is_split_into_components() -> None:
    setting, config = Setting("zoom", "box", box="exact"), DrawConfig(components=True)
    parts = split_components(scattered(), setting, config)
    assert [int(part.sum()) for part in parts] == [6**3, 4**3 + 1]
    assert len(split_components(scattered(), setting, DrawConfig(components=True, component_voxels=1))) == 3
    assert len(split_components(scattered(), setting, DrawConfig(components=True, component_voxels=1000))) == 1
    whole = [
        split_components(scattered(), Setting("zoom", "text"), config),
        split_components(scattered(), setting, DrawConfig()),
    ]
    assert [[int(part.sum()) for part in parts] for parts in whole] == [[6**3 + 4**3 + 4]] * 2


@pytest.mark.parametrize("name", ["random", "random0", "randomx", "middle", "5"])
def test_unknown_points_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"draw\.points"):
        DrawConfig(points=[name])
