"""Geometry of zoom-out-zoom-in, with an oracle in the model's place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle

from segvol_pl.config import Rule, ZoomConfig
from segvol_pl.data.prompts import PADDING, Prompt, box_of
from segvol_pl.data.sample import Box
from segvol_pl.data.transforms import box_slices, resize_label
from segvol_pl.zoom import (
    Zoomer,
    binary,
    clip_box,
    cut_off_region,
    enlarge,
    reflect,
    region_of_interest,
    scale_box,
    scale_prompt,
    tiles,
    zoom,
)

WINDOW = (8, 16, 16)
CONFIG = ZoomConfig()


def bright_box(shape: tuple[int, ...], box: Box) -> np.ndarray:
    image_DHW = np.zeros(shape, np.float32)
    image_DHW[box_slices(box)] = 1.0
    return image_DHW


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def volumes_with_box(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.integers(3, 40)) for _ in range(3))
    spans = [sorted((draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1)))) for size in shape]
    lows, highs = zip(*spans, strict=True)
    return shape, (*lows, *highs)


@pytest.mark.parametrize("shape", [(5, 11, 9), (8, 16, 16), (8, 30, 12), (21, 40, 33), (40, 16, 70)])
@pytest.mark.parametrize("kind", ["text", "box+text", "points+text"])
def test_final_mask_is_the_truth(shape: tuple[int, ...], kind: str) -> None:
    box = tuple(size // 3 for size in shape) + tuple(size // 3 + max(size // 4, 2) for size in shape)
    image_DHW = bright_box(shape, box)
    truth_DHW = image_DHW > 0.5
    middle_N3 = np.array([[(low + high) // 2 for low, high in zip(box[:3], box[3:], strict=True)]])
    prompt = Prompt(
        text="liver",
        box=box if "box" in kind else None,
        points_N3=middle_N3 if "points" in kind else None,
        labels_N=np.array([1]) if "points" in kind else None,
    )
    result = zoom(Oracle(WINDOW), image_DHW, prompt, CONFIG, rng())
    assert result.roi is not None and result.windows >= 1
    assert result.final_DHW.dtype == np.float32 and result.final_DHW.shape == shape
    covered = box_slices(result.roi)
    if kind == "text":
        np.testing.assert_array_equal(binary(result.final_DHW, 0.5)[covered], truth_DHW[covered])
    if kind == "box+text" and result.windows == 1:
        np.testing.assert_array_equal(binary(result.final_DHW, 0.5), truth_DHW)
    if "points" in kind:  # the windows' box is the coarse mask's, and the oracle obeys it
        told = box_slices(box_of(binary(result.coarse_DHW, 0.5)))
        np.testing.assert_array_equal(binary(result.final_DHW, 0.5)[told], truth_DHW[told])
    overlap = (binary(result.final_DHW, 0.5) & truth_DHW).sum() * 2
    assert overlap / (binary(result.final_DHW, 0.5).sum() + truth_DHW.sum()) > 0.8


def test_zoom_in_sees_what_the_overview_blurs() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 30, 30, 13, 36, 37))
    image_DHW[12, 33, 33] = 0.0  # a hole of one voxel, lost in the overview
    truth_DHW = image_DHW > 0.5
    result = zoom(Oracle(WINDOW), image_DHW, Prompt(text="cyst"), CONFIG, rng())
    assert (binary(result.coarse_DHW, 0.5) != truth_DHW).any()
    np.testing.assert_array_equal(binary(result.final_DHW, 0.5), truth_DHW)


def test_empty_coarse_mask_is_returned_as_it_is() -> None:
    result = zoom(Oracle(WINDOW), np.zeros((20, 30, 30), np.float32), Prompt(text="liver"), CONFIG, rng())
    assert result.roi is None and result.windows == 0
    assert result.final_DHW is result.coarse_DHW
    assert not binary(result.final_DHW, 0.5).any()


def test_outside_the_region_the_coarse_logits_stay() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 30, 30, 13, 36, 37))
    result = zoom(Oracle(WINDOW), image_DHW, Prompt(text="cyst"), CONFIG, rng())
    outside_DHW = np.ones(image_DHW.shape, bool)
    outside_DHW[box_slices(result.roi)] = False
    np.testing.assert_array_equal(result.final_DHW[outside_DHW], result.coarse_DHW[outside_DHW])


class Numbering(Oracle):
    """Finds everything in the overview, then says 1, 2, ... in each window."""

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        super().__init__(input_shape)
        self.asked = 0

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        self.asked += 1
        return torch.full_like(image_DHW, 5.0 if self.asked == 1 else self.asked - 1)


def test_overlapping_windows_are_averaged() -> None:
    result = zoom(Numbering(WINDOW), np.ones((8, 16, 28), np.float32), Prompt(text="body"), CONFIG, rng())
    assert result.windows == 3 and result.roi == (0, 0, 0, 7, 15, 27)
    # Windows start at 0, 8 and 12.
    np.testing.assert_array_equal(
        result.final_DHW[3, 5], np.float32([1] * 8 + [1.5] * 4 + [2] * 4 + [2.5] * 8 + [3] * 4)
    )


@given(volumes_with_box())
@settings(max_examples=150, deadline=None)
def test_region_holds_the_mask_and_at_least_one_window(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    roi = region_of_interest(bright_box(shape, box) > 0, WINDOW)
    for axis in range(3):
        low, high = roi[axis], roi[axis + 3]
        assert 0 <= low <= box[axis] and box[axis + 3] <= high < shape[axis]
        wanted = max(box[axis + 3] - box[axis] + 1, min(WINDOW[axis], shape[axis]))
        assert high - low + 1 == wanted


@given(volumes_with_box(), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.sampled_from(Rule))
@settings(max_examples=150, deadline=None)
def test_windows_cover_the_region_and_stay_inside_it(
    case: tuple[tuple[int, ...], Box], overlap: float, rule: Rule
) -> None:
    shape, box = case
    region = cut_off_region if rule is Rule.published else region_of_interest
    roi = region(bright_box(shape, box) > 0, WINDOW)
    grid = tiles(roi, WINDOW, shape, ZoomConfig(overlap=overlap, grid=rule))
    covered_DHW = np.zeros(shape, bool)
    for tile in grid:
        covered_DHW[tile.slices(WINDOW, (0, 0, 0))] = True
    assert box_of(covered_DHW) == roi and covered_DHW[box_slices(roi)].all()
    assert len(set(grid)) == len(grid)


@given(volumes_with_box())
@settings(max_examples=200, deadline=None)
def test_scaled_box_is_the_box_of_the_resized_label(case: tuple[tuple[int, ...], Box]) -> None:
    shape, box = case
    small_DHW = resize_label(bright_box(shape, box).astype(np.uint8), WINDOW)
    scaled = scale_box(box, shape, WINDOW)
    assert all(0 <= low <= high < size for low, high, size in zip(scaled[:3], scaled[3:], WINDOW, strict=True))
    if small_DHW.any():
        assert scaled == box_of(small_DHW)


def test_scaled_points_stay_in_the_volume_and_keep_their_labels() -> None:
    shape = (37, 91, 20)
    corners_N3 = np.array([[0, 0, 0], [36, 90, 19], [18, 45, 10]])
    scaled = scale_prompt(Prompt(points_N3=corners_N3, labels_N=np.array([1, 0, 1])), shape, WINDOW)
    assert scaled.points_N3 is not None and scaled.labels_N is not None
    np.testing.assert_array_equal(scaled.points_N3, [[0, 0, 0], [7, 15, 15], [4, 8, 8]])
    np.testing.assert_array_equal(scaled.labels_N, [1, 0, 1])


def test_clip_box() -> None:
    assert clip_box((0, 5, 5, 30, 20, 9), (4, 4, 4), WINDOW) == (0, 1, 1, 7, 15, 5)
    assert clip_box((0, 0, 0, 3, 3, 3), (4, 0, 0), WINDOW) is None


def test_box_prompt_reflects_the_part_of_the_users_box_inside_the_window() -> None:
    coarse_DHW = bright_box(WINDOW, (2, 3, 4, 5, 6, 7)) > 0
    local = reflect(Prompt(text="liver", box=(0, 10, 10, 60, 22, 90)), coarse_DHW, (4, 8, 8), 5, rng())
    assert local is not None and local.box == (0, 2, 2, 7, 14, 15) and local.text == "liver"
    assert reflect(Prompt(box=(0, 0, 0, 3, 9, 9)), coarse_DHW, (4, 8, 8), 5, rng()) is None


def test_points_prompt_keeps_the_points_inside_and_draws_more_from_the_coarse_mask() -> None:
    coarse_DHW = bright_box(WINDOW, (2, 3, 4, 5, 6, 7)) > 0
    points_N3 = np.array([[5, 9, 9], [0, 0, 0], [11, 23, 23]])
    prompt = Prompt(points_N3=points_N3, labels_N=np.array([1, 1, 0]))
    local = reflect(prompt, coarse_DHW, (4, 8, 8), 5, rng())
    assert local is not None and local.points_N3 is not None and local.labels_N is not None
    np.testing.assert_array_equal(local.points_N3[:2], [[1, 1, 1], [7, 15, 15]])
    np.testing.assert_array_equal(local.labels_N, [1, 0, 1, 1, 1, 1, 1])
    assert coarse_DHW[tuple(local.points_N3[2:].T)].all()
    assert local.box == (2, 3, 4, 5, 6, 7)


def test_text_prompt_gets_no_spatial_prompt() -> None:
    local = reflect(Prompt(text="liver"), np.ones(WINDOW, bool), (0, 0, 0), 5, rng())
    assert local is not None and local.box is None and local.points_N3 is None and local.text == "liver"


def test_a_window_without_coarse_mask_is_skipped_unless_the_user_points_into_it() -> None:
    empty_DHW = np.zeros(WINDOW, bool)
    inside = Prompt(points_N3=np.array([[5, 9, 9]]), labels_N=np.array([1]))
    outside = Prompt(points_N3=np.array([[5, 9, 9]]), labels_N=np.array([0]))
    assert reflect(Prompt(text="liver"), empty_DHW, (4, 8, 8), 5, rng()) is None
    assert reflect(Prompt(box=(0, 0, 0, 30, 30, 30)), empty_DHW, (4, 8, 8), 5, rng()) is None
    assert reflect(outside, empty_DHW, (4, 8, 8), 5, rng()) is None
    kept = reflect(inside, empty_DHW, (4, 8, 8), 5, rng())
    assert kept is not None and kept.points_N3 is not None
    np.testing.assert_array_equal(kept.points_N3, [[1, 1, 1]])


def test_windows_without_coarse_mask_are_not_decoded() -> None:
    """Two bright corners far apart: the region is the whole volume, most windows hold neither."""
    image_DHW = bright_box((32, 64, 64), (0, 0, 0, 7, 15, 15)) + bright_box((32, 64, 64), (24, 48, 48, 31, 63, 63))
    result = zoom(Oracle(WINDOW), image_DHW, Prompt(text="kidneys"), CONFIG, rng())
    assert result.roi is not None
    assert 2 <= result.windows < len(tiles(result.roi, WINDOW, image_DHW.shape, CONFIG))
    np.testing.assert_array_equal(binary(result.final_DHW, 0.5), image_DHW > 0.5)


def test_prompts_on_one_volume_share_the_encoding() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    model = Oracle(WINDOW)
    zoomer = Zoomer(model, image_DHW, CONFIG)
    first = zoomer.zoom(Prompt(text="liver"), rng())
    encoded = model.encoded
    assert encoded == 1 + first.windows
    zoomer.zoom(Prompt(text="liver", box=(6, 8, 8, 17, 30, 30)), rng())
    zoomer.zoom(Prompt(box=(6, 8, 8, 17, 30, 30)), rng())
    assert model.encoded == encoded


def test_the_cache_of_windows_is_bounded() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    bounded, free = Oracle(WINDOW), Oracle(WINDOW)
    small = Zoomer(bounded, image_DHW, CONFIG, cached=3)
    large = Zoomer(free, image_DHW, CONFIG)
    for _ in range(2):
        few, many = small.zoom(Prompt(text="liver"), rng()), large.zoom(Prompt(text="liver"), rng())
        np.testing.assert_array_equal(few.final_DHW, many.final_DHW)
    assert few.windows > 3 and len(small._windows) == 3
    assert free.encoded == 1 + many.windows and bounded.encoded == 1 + 2 * few.windows


def test_the_same_seed_draws_the_same_points() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    prompt = Prompt(text="liver", points_N3=np.array([[10, 20, 20]]), labels_N=np.array([1]))
    models = [Oracle(WINDOW), Oracle(WINDOW)]
    for model in models:
        zoom(model, image_DHW, prompt, CONFIG, rng(7))
    for one, other in zip(models[0].seen, models[1].seen, strict=True):
        np.testing.assert_array_equal(one.points_N3, other.points_N3)


# ---- as the released weights were validated ----

PUBLISHED = ZoomConfig(interpolation=Rule.published, grid=Rule.published, reflection=Rule.published)


@pytest.mark.parametrize("kind", ["text", "box+text", "points+text"])
def test_the_published_rules_find_the_truth_too(kind: str) -> None:
    """A bright box whose faces lie on the overview's grid: nearest neighbours lose nothing of it."""
    image_DHW = bright_box((24, 48, 48), (6, 9, 9, 17, 35, 35))
    box = (6, 9, 9, 17, 35, 35)
    points = {"points_N3": np.array([[10, 20, 20]]), "labels_N": np.array([1])} if "points" in kind else {}
    prompt = Prompt(text="liver", box=box if "box" in kind else None, **points)
    result = zoom(Oracle(WINDOW), image_DHW, prompt, PUBLISHED, rng())
    np.testing.assert_array_equal(binary(result.final_DHW, 0.5), image_DHW > 0.5)
    assert result.roi is not None and result.windows == len(tiles(result.roi, WINDOW, image_DHW.shape, PUBLISHED))


def test_the_published_region_is_cut_off_at_the_border() -> None:
    mask_DHW = bright_box((20, 40, 40), (0, 0, 30, 1, 3, 39)) > 0
    assert region_of_interest(mask_DHW, WINDOW) == (0, 0, 24, 7, 15, 39)
    assert cut_off_region(mask_DHW, WINDOW) == (0, 0, 27, 4, 9, 39)


def test_a_published_window_sees_its_region_alone_and_stands_in_its_middle() -> None:
    image_DHW = np.ones((20, 40, 40), np.float32)
    (tile,) = tiles((0, 0, 27, 4, 9, 39), WINDOW, image_DHW.shape, PUBLISHED)
    assert tile.start == (-1, -3, 26)
    seen_DHW = tile.cut(image_DHW, WINDOW)
    assert seen_DHW.shape == WINDOW and box_of(seen_DHW > 0) == (1, 3, 1, 5, 12, 13)


def test_enlarging_rounds_as_torch_does() -> None:
    """61 x 64 / 122 is 32; in float32 it falls just below."""
    assert enlarge(np.arange(64)[None, None], (1, 1, 122))[0, 0, 61] == 31


def test_published_windows_get_the_coarse_box_and_points_of_the_enlarged_prompt() -> None:
    model = Oracle(WINDOW)
    image_DHW = bright_box((16, 32, 32), (0, 0, 0, 11, 23, 23))
    zoom(model, image_DHW, Prompt(box=(2, 2, 2, 9, 20, 20)), PUBLISHED, rng())
    coarse, *inside = [prompt.box for prompt in model.seen]
    assert coarse == (1, 1, 1, 4, 9, 9)
    assert inside[0] == (0, 0, 0, 7, 15, 15) and inside[-1] == (0, 0, 0, 7, 15, 15)
    model = Oracle(WINDOW)
    points = {"points_N3": np.array([[4, 4, 4]]), "labels_N": np.array([1])}
    zoom(model, image_DHW, Prompt(text="liver", **points), PUBLISHED, rng())
    windows = model.seen[1:]
    assert {tuple(label) for prompt in windows if (label := prompt.labels_N) is not None} == {(1,) * 5, (PADDING,)}
    assert all(prompt.box is not None for prompt in windows)
