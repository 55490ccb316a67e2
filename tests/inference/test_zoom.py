"""Geometry of zoom-out-zoom-in, with an oracle in the model's place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import Oracle, save_untrained
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.config import COMBINATIONS, Convention, ZoomConfig
from segvol_pl.imaging.box import Box, box_of, box_slices, whole_box
from segvol_pl.imaging.prompts import INSIDE, PADDING, Prompt, sample_points
from segvol_pl.imaging.transforms import resize_label, resize_tensor
from segvol_pl.inference.coarse import CoarseLogits, KnownMask, binary, enlarge
from segvol_pl.inference.gpu_memory import free_bytes
from segvol_pl.inference.published_zoom import published_region, published_windows
from segvol_pl.inference.token_cache import TokenStore
from segvol_pl.inference.window_prompts import clip_box, reflect, scale_box, scale_prompt
from segvol_pl.inference.windows import Window, region_of, widened_box, windows_around, windows_over
from segvol_pl.inference.zoom import Zoomer, zoom
from segvol_pl.inference.zoom_result import ZoomIn
from segvol_pl.model.checkpoint import load_model

WINDOW = (8, 16, 16)
CONFIG = ZoomConfig()
PUBLISHED = ZoomConfig(interpolation=Convention.published, grid=Convention.published, reflection=Convention.published)


def bright_box(shape: tuple[int, ...], box: Box) -> np.ndarray:
    image_DHW = np.zeros(shape, np.float32)
    image_DHW[box_slices(box)] = 1.0
    return image_DHW


def windows_of(box: Box, shape: tuple[int, ...], config: ZoomConfig) -> list[Window]:
    """The windows that a zoomer lays over a region."""
    if config.grid is Convention.published:
        return published_windows(box, WINDOW, config.overlap)
    return windows_over(box, WINDOW, shape, config.overlap)


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
    if kind != "box+text":
        np.testing.assert_array_equal(binary(result.final_DHW, 0.5)[covered], truth_DHW[covered])
    if kind == "box+text" and result.windows == 1:
        np.testing.assert_array_equal(binary(result.final_DHW, 0.5), truth_DHW)
    overlap = (binary(result.final_DHW, 0.5) & truth_DHW).sum() * 2
    assert overlap / (binary(result.final_DHW, 0.5).sum() + truth_DHW.sum()) > 0.8


def test_zoom_in_sees_what_the_overview_blurs() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 30, 30, 13, 36, 37))
    image_DHW[12, 33, 33] = 0.0  # a hole of one voxel, lost in the overview
    truth_DHW = image_DHW > 0.5
    result = zoom(Oracle(WINDOW), image_DHW, Prompt(text="cyst"), CONFIG, rng())
    assert (binary(result.coarse_DHW, 0.5) != truth_DHW).any()
    np.testing.assert_array_equal(binary(result.final_DHW, 0.5), truth_DHW)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_window_gets_the_combination_that_the_user_gave(combination: str) -> None:
    """Training knows no other combination than these six: zooming in must not make one that it does not know."""
    image_DHW = bright_box((24, 64, 64), (10, 28, 28, 13, 36, 37))
    parts = combination.split("+")
    prompt = Prompt(
        text="liver" if "text" in parts else None,
        box=(8, 25, 25, 15, 40, 41) if "box" in parts else None,
        points_N3=np.array([[12, 30, 30], [0, 0, 0]]) if "points" in parts else None,
        labels_N=np.array([1, 0]) if "points" in parts else None,
    )
    model = Oracle(WINDOW)
    assert zoom(model, image_DHW, prompt, CONFIG, rng()).windows > 1
    for seen in model.seen[1:]:
        given = {"text": seen.text, "box": seen.box, "points": seen.points_N3}
        assert {part for part, value in given.items() if value is not None} == set(parts)


def test_windows_get_the_coarse_mask_only_if_the_model_takes_masks() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 28, 28, 13, 36, 37))
    plain, taking = Oracle(WINDOW), Oracle(WINDOW)
    taking.config.mask_prompt, taking.config.mask_shape = True, (4, 8, 8)
    result = zoom(taking, image_DHW, Prompt(text="cyst"), CONFIG, rng())
    zoom(plain, image_DHW, Prompt(text="cyst"), CONFIG, rng())
    assert all(seen.mask_DHW is None for seen in [*plain.seen, taking.seen[0]])
    windows = [seen.mask_DHW for seen in taking.seen[1:]]
    assert len(windows) == result.windows and all(mask_DHW.shape == (4, 8, 8) for mask_DHW in windows)
    assert max(mask_DHW.max() for mask_DHW in windows) > 0.9 > 0.1 > min(mask_DHW.min() for mask_DHW in windows)


def test_a_coarse_mask_in_a_window_is_the_interpolated_one() -> None:
    low_DHW = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    shape, extent = (12, 30, 20), (8, 12, 10)
    logits_DHW = CoarseLogits(low_DHW, shape, nearest=False).logits(whole_box(shape))
    found_DHW = CoarseLogits(low_DHW, shape, nearest=False).probabilities((2, 7, 13), extent, extent)
    # The window reaches beyond the volume's end along w.
    inside_DHW = logits_DHW[2:10, 7:19, 13:20]
    np.testing.assert_allclose(found_DHW[..., :7], 1 / (1 + np.exp(-inside_DHW)), atol=1e-5)
    assert (found_DHW[..., 7:] == 0).all()


def test_refining_shows_the_previous_mask_to_a_model_that_takes_masks() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 28, 28, 13, 36, 37))
    model = Oracle(WINDOW)
    model.config.mask_prompt, model.config.mask_shape = True, WINDOW
    previous_DHW = np.roll(image_DHW > 0.5, 2, axis=1)
    zoomer = Zoomer(model, image_DHW, replace(CONFIG, mix=1.0))
    result = zoomer.refine(Prompt(text="cyst"), previous_DHW, rng())
    shown = sum(seen.mask_DHW.sum() for seen in model.seen)
    assert len(model.seen) == result.windows and shown >= previous_DHW.sum()
    np.testing.assert_array_equal(np.unique(result.patch_DHW), [-5, 5])  # a known mask is not mixed in


def test_coarse_logits_are_mixed_with_those_of_the_windows() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 28, 28, 13, 36, 37))
    alone, mixed = (
        zoom(Oracle(WINDOW), image_DHW, Prompt(text="cyst"), replace(CONFIG, mix=mix), rng()) for mix in (0.0, 0.5)
    )
    inside = box_slices(mixed.roi)
    expected_DHW = (alone.final_DHW[inside] + 0.5 * alone.coarse_DHW[inside]) / 1.5
    np.testing.assert_allclose(mixed.final_DHW[inside], expected_DHW, atol=1e-5)


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


def test_the_region_is_within_reach_of_the_coarse_mask_and_of_what_the_user_said() -> None:
    # The overview has a voxel for 2 x 2 x 1 of the volume's.
    mask_DHW = np.zeros((16, 32, 16), bool)
    mask_DHW[6:8, 10:14, 5] = True
    assert region_of(mask_DHW, Prompt(text="x"), WINDOW, reach=0) == (6, 10, 5, 7, 13, 5)
    assert region_of(mask_DHW, Prompt(text="x"), WINDOW, reach=1.5) == (3, 7, 3, 10, 16, 7)
    assert region_of(mask_DHW, Prompt(box=(7, 9, 2, 12, 12, 4)), WINDOW, reach=0) == (6, 9, 2, 12, 13, 5)
    points = Prompt(points_N3=np.array([[1, 11, 5], [9, 30, 9]]), labels_N=np.array([INSIDE, 0]))
    assert region_of(mask_DHW, points, WINDOW, reach=0) == (1, 10, 5, 7, 13, 5)
    assert region_of(mask_DHW, Prompt(text="x"), WINDOW, reach=100) == (0, 0, 0, 15, 31, 15)


@given(volumes_with_box(), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.sampled_from(Convention))
@settings(max_examples=150, deadline=None)
def test_windows_cover_the_region_and_stay_inside_it(
    case: tuple[tuple[int, ...], Box], overlap: float, rule: Convention
) -> None:
    shape, box = case
    mask_DHW = bright_box(shape, box) > 0
    asked = published_region(mask_DHW, WINDOW) if rule is Convention.published else widened_box(mask_DHW, WINDOW, 1.0)
    grid = windows_of(asked, shape, ZoomConfig(overlap=overlap, grid=rule))
    covered_DHW = np.zeros(shape, bool)
    for window in grid:
        covered_DHW[window.slices(WINDOW, window.bound, (0, 0, 0))] = True
    assert covered_DHW[box_slices(asked)].all() and covered_DHW[mask_DHW].all()
    assert rule is Convention.consistent or box_of(covered_DHW) == asked
    assert len(set(grid)) == len(grid)


@given(volumes_with_box(), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
@settings(max_examples=150, deadline=None)
def test_windows_lie_on_one_grid_and_are_as_few_as_cover_the_box(
    case: tuple[tuple[int, ...], Box], overlap: float
) -> None:
    shape, box = case
    config = ZoomConfig(overlap=overlap)
    d, h, w = shape
    every = windows_of((0, 0, 0, d - 1, h - 1, w - 1), shape, config)
    chosen = windows_of(box, shape, config)
    assert set(chosen) <= set(every)
    for axis, size in enumerate(WINDOW):
        starts = sorted({window.start[axis] for window in chosen})
        if len(starts) > 1:  # without the first or the last of them the box would stick out
            assert box[axis] < starts[1] and box[axis + 3] >= starts[-2] + size


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
    assert local.box is None


def test_a_window_that_gets_no_points_keeps_the_rest_of_the_prompt() -> None:
    points = {"points_N3": np.array([[1, 1, 1]]), "labels_N": np.array([1])}
    coarse_DHW = np.ones((8, 8, 8), bool)
    assert reflect(Prompt(**points), coarse_DHW, (4, 4, 4), points=0, rng=rng()) is None
    local = reflect(Prompt(text="liver", **points), coarse_DHW, (4, 4, 4), points=0, rng=rng())
    assert local is not None and local.text == "liver" and local.points_N3 is None and local.labels_N is None
    kept = reflect(Prompt(**points), coarse_DHW, (0, 0, 0), points=0, rng=rng())
    assert kept is not None and kept.points_N3 is not None and kept.points_N3.tolist() == [[1, 1, 1]]


def test_marks_outside_a_window_lie_on_its_edge() -> None:
    prompt = Prompt(landmarks={"toys:ends": np.array([[1, 2, 3], [30, 9, 9]])})
    coarse_DHW = np.ones((8, 8, 8), bool)
    local = reflect(prompt, coarse_DHW, (4, 4, 4), points=3, rng=rng())
    assert local is not None and local.box is None and local.points_N3 is None
    assert local.landmarks["toys:ends"].tolist() == [[0, 0, 0], [7, 5, 5]]
    shrunk = scale_prompt(prompt, (32, 16, 16), (8, 8, 8))
    assert shrunk.landmarks["toys:ends"].tolist() == [[0, 1, 1], [7, 4, 4]]
    assert reflect(prompt, np.zeros((8, 8, 8), bool), (4, 4, 4), points=3, rng=rng()) is None


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
    assert 2 <= result.windows < len(windows_of(result.roi, image_DHW.shape, CONFIG))
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
    window_gb = 4 * np.prod(WINDOW) / 1e9
    small = Zoomer(bounded, image_DHW, ZoomConfig(cache_gb=3.5 * window_gb))
    large = Zoomer(free, image_DHW, CONFIG)
    for _ in range(2):
        few, many = small.zoom(Prompt(text="liver"), rng()), large.zoom(Prompt(text="liver"), rng())
        np.testing.assert_array_equal(few.final_DHW, many.final_DHW)
    assert few.windows > 3 and len(small.tokens) == 3
    assert free.encoded == 1 + many.windows and bounded.encoded == 1 + 2 * few.windows


def test_the_same_seed_draws_the_same_points() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    prompt = Prompt(text="liver", points_N3=np.array([[10, 20, 20]]), labels_N=np.array([1]))
    models = [Oracle(WINDOW), Oracle(WINDOW)]
    for model in models:
        zoom(model, image_DHW, prompt, CONFIG, rng(7))
    for one, other in zip(models[0].seen, models[1].seen, strict=True):
        np.testing.assert_array_equal(one.points_N3, other.points_N3)


def boxed(*box: int) -> Prompt:
    return Prompt(box=tuple(box))  # type: ignore[arg-type]


def test_prompts_answered_together_are_answered_as_alone() -> None:
    image_DHW = bright_box((40, 60, 60), (3, 8, 8, 17, 30, 30)) + bright_box((40, 60, 60), (20, 40, 40, 33, 55, 50))
    prompts = [Prompt(text="all"), boxed(3, 8, 8, 17, 30, 30), boxed(19, 39, 39, 34, 56, 51), boxed(0, 0, 0, 1, 1, 1)]
    points = Prompt(points_N3=np.array([[25, 45, 45]]), labels_N=np.array([1]))
    alone, together = Oracle(WINDOW), Oracle(WINDOW)
    zoomer, other = (Zoomer(model, image_DHW, ZoomConfig(decode_batch=3)) for model in (alone, together))
    answers = list(other.zoom_all([other.request(prompt, rng(5)) for prompt in [*prompts, points]]))
    for prompt, got in zip([*prompts, points], answers, strict=True):
        want = zoomer.zoom(prompt, rng(5))
        assert (got.roi, got.windows) == (want.roi, want.windows)
        np.testing.assert_allclose(got.final_DHW, want.final_DHW, rtol=1e-6)
    assert together.encoded == alone.encoded < 1 + sum(answer.windows for answer in answers)


@pytest.mark.parametrize(("decode_batch", "order"), [(1, [0, 1, 2, 3]), (16, [0, 1, 2, 3]), (4, [3, 1, 0, 2])])
def test_in_float32_neither_how_many_prompts_are_decoded_at_once_nor_their_order_moves_a_logit(
    decode_batch: int, order: list[int], tmp_path: Path
) -> None:
    model = load_model(save_untrained(tmp_path / "tiny.ckpt", ["liver", "spleen"]))
    image_DHW = np.random.default_rng(0).random((20, 70, 60), np.float32)
    points = Prompt(points_N3=np.array([[10, 30, 30]]), labels_N=np.array([1]))
    prompts = [Prompt(text="liver"), Prompt(text="spleen"), boxed(2, 5, 6, 15, 50, 40), points]
    usual, other = (Zoomer(model, image_DHW, ZoomConfig(decode_batch=size)) for size in (4, decode_batch))
    wanted = list(usual.zoom_all([usual.request(prompt, rng(5)) for prompt in prompts]))
    answers = other.zoom_all([other.request(prompts[place], rng(5)) for place in order])
    for place, got in zip(order, answers, strict=True):
        assert (got.roi, got.windows) == (wanted[place].roi, wanted[place].windows)
        np.testing.assert_allclose(got.final_DHW, wanted[place].final_DHW, rtol=0, atol=1e-5)


def test_without_room_for_tokens_prompts_answered_together_still_encode_a_window_once() -> None:
    image_DHW = bright_box((40, 60, 60), (3, 8, 8, 17, 30, 30))
    model = Oracle(WINDOW)
    zoomer = Zoomer(model, image_DHW, ZoomConfig(cache_gb=0))
    first, second = zoomer.zoom_all([zoomer.request(Prompt(text=name), rng()) for name in ("liver", "tumour")])
    assert first.windows == second.windows > 1 and model.encoded == 1 + first.windows and len(zoomer.tokens) == 0


def test_a_result_s_masks_are_those_of_its_logits() -> None:
    image_DHW = bright_box((24, 64, 64), (10, 30, 30, 13, 36, 37))
    result = zoom(Oracle(WINDOW), image_DHW, Prompt(text="cyst"), CONFIG, rng())
    np.testing.assert_array_equal(result.mask(0.5), binary(result.final_DHW, 0.5))
    np.testing.assert_array_equal(result.coarse_mask(0.5), binary(result.coarse_DHW, 0.5))
    nothing = zoom(Oracle(WINDOW), np.zeros((24, 64, 64), np.float32), Prompt(text="cyst"), CONFIG, rng())
    assert not nothing.mask(0.5).any() and not nothing.coarse_mask(0.5).any()


def test_progress_counts_windows() -> None:
    told: list[tuple[int, int]] = []
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    zoomer = Zoomer(Oracle(WINDOW), image_DHW, CONFIG, progress=lambda done, wanted: told.append((done, wanted)))
    windows = zoomer.zoom(Prompt(text="liver"), rng()).windows
    assert told[-1] == (windows, windows) and [done for done, _ in told] == sorted(done for done, _ in told)


@given(volumes_with_box(), st.sampled_from(Convention), st.integers(0, 2**30))
@settings(max_examples=60, deadline=None)
def test_windows_are_averaged_voxel_by_voxel_and_the_rest_is_coarse(
    case: tuple[tuple[int, ...], Box], rule: Convention, seed: int
) -> None:
    shape, roi = case
    draw, ground = rng(seed), CoarseLogits(rng(seed).normal(size=WINDOW).astype(np.float32), shape, nearest=True)
    grid = windows_of(roi, shape, ZoomConfig(overlap=0.5, grid=rule))
    looked = [(window, Prompt(text="x")) for window in grid if draw.random() < 0.7]
    region = [high - low + 1 for low, high in zip(roi[:3], roi[3:], strict=True)]
    plan = ZoomIn(ground, roi, looked, WINDOW, torch.zeros(region))
    total_DHW, count_DHW = np.zeros(region, np.float32), np.zeros(region, np.float32)
    for window, _ in looked:
        logits_DHW, place = draw.normal(size=WINDOW).astype(np.float32), window.slices(WINDOW, roi, roi[:3])
        plan.add(window, torch.from_numpy(logits_DHW))
        total_DHW[place] += logits_DHW[window.slices(WINDOW, roi, window.start)]
        count_DHW[place] += 1
    want_DHW = np.where(count_DHW > 0, total_DHW / np.maximum(count_DHW, 1), ground.logits(roi))
    result = plan.result()
    np.testing.assert_array_equal(result.patch_DHW.numpy(), want_DHW)
    mask_DHW, logits_N = result.found(0.5)
    np.testing.assert_array_equal(mask_DHW, want_DHW > 0)
    np.testing.assert_array_equal(logits_N, want_DHW[want_DHW > 0])


# ---- by device ----


def test_zero_takes_the_batches_that_suit_the_device_and_stated_ones_stay() -> None:
    assert ZoomConfig().batches("cuda") == (8, 16) and ZoomConfig().batches("cpu") == (2, 4)
    assert ZoomConfig(batch=3).batches("cuda") == (3, 16) and ZoomConfig(decode_batch=5).batches("cpu") == (2, 5)


def test_the_room_on_a_gpu_is_what_is_free_and_what_torch_keeps_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert free_bytes(torch.device("cuda", 1)) == 25 and free_bytes(torch.device("cpu")) == np.inf


def test_regions_without_room_beside_the_model_are_summed_in_main_memory_which_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    zoomer = Zoomer(Oracle(WINDOW), np.zeros((20, 30, 30), np.float32), CONFIG)
    zoomer.device = torch.device("cuda", 1)
    monkeypatch.setattr("segvol_pl.inference.zoom.free_bytes", lambda device: 10 * 4 * 5 * 6)  # twice 5 bytes a voxel
    with caplog.at_level("INFO"):
        assert zoomer._device_for((4, 5, 6)) == torch.device("cuda", 1) and not caplog.messages
        assert zoomer._device_for((4, 5, 7)) == zoomer._device_for((9, 9, 9)) == torch.device("cpu")
    (line,) = caplog.messages
    assert "4 x 5 x 7 voxels" in line and "summed in main memory" in line


# ---- background points ----


def points(*rows: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """Points of a prompt, from rows of d h w label."""
    table_N4 = np.array(rows)
    return {"points_N3": table_N4[:, :3], "labels_N": table_N4[:, 3]}


def holding(seen: list[Prompt], label: int) -> list[Prompt]:
    return [prompt for prompt in seen if prompt.labels_N is not None and label in prompt.labels_N]


@pytest.mark.parametrize("kind", ["points", "points+text", "box+points"])
def test_background_points_reach_every_window_that_holds_them(kind: str) -> None:
    image_DHW = bright_box((24, 64, 64), (10, 28, 28, 13, 36, 37))
    model, outside = Oracle(WINDOW), np.array([11, 34, 35])
    prompt = Prompt(
        text="liver" if "text" in kind else None,
        box=(10, 28, 28, 13, 36, 37) if "box" in kind else None,
        **points((11, 30, 30, 1), (*outside.tolist(), 0)),
    )
    zoomer = Zoomer(model, image_DHW, CONFIG)
    result = zoomer.zoom(prompt, rng())
    assert result.roi is not None
    windows = windows_of(result.roi, image_DHW.shape, CONFIG)
    near = [
        window for window in windows if ((outside >= window.start) & (outside < np.add(window.start, WINDOW))).all()
    ]
    shown = holding(model.seen[1:], 0)
    assert len(shown) == len(near) > 0
    for window, local in zip(sorted(near, key=lambda one: one.start), shown, strict=True):
        assert local.points_N3 is not None and local.labels_N is not None
        assert (outside - window.start).tolist() in local.points_N3[local.labels_N == 0].tolist()


def test_points_are_drawn_far_from_background_points() -> None:
    coarse_DHW = bright_box(WINDOW, (2, 3, 1, 5, 6, 14)) > 0
    local = reflect(Prompt(text="liver", **points((3, 4, 13, 0), (3, 4, 2, 1))), coarse_DHW, (0, 0, 0), 40, rng())
    assert local is not None and local.points_N3 is not None and local.labels_N is not None
    drawn_N3 = local.points_N3[2:]
    assert len(drawn_N3) == 40 and coarse_DHW[tuple(drawn_N3.T)].all() and (local.labels_N[2:] == INSIDE).all()
    assert drawn_N3[:, 2].max() <= 8 and drawn_N3[:, 2].min() == 1
    single_DHW = bright_box(WINDOW, (3, 4, 13, 3, 4, 13)) > 0
    alone = reflect(Prompt(text="liver", **points((3, 4, 13, 0))), single_DHW, (0, 0, 0), 2, rng())
    assert alone is not None and alone.labels_N is not None and alone.labels_N.tolist() == [0, 1, 1]


def test_a_prompt_without_background_points_is_reflected_as_before() -> None:
    coarse_DHW = np.random.default_rng(1).random(WINDOW) > 0.5
    prompt = Prompt(text="liver", **points((3, 4, 13, 1), (90, 90, 90, 0)))
    local = reflect(prompt, coarse_DHW, (0, 0, 0), 5, rng(3))
    drawn_N3, _ = sample_points(coarse_DHW, rng(3), 5, 0)
    assert local is not None and local.points_N3 is not None
    np.testing.assert_array_equal(local.points_N3[1:], drawn_N3)


@pytest.mark.parametrize("label", [0, 1])
def test_a_window_beyond_the_box_is_decoded_if_a_point_lies_there(label: int) -> None:
    """A box drawn on one slice is often smaller than the structure; so is what a user corrects outside of it."""
    coarse_DHW = bright_box(WINDOW, (2, 3, 4, 5, 6, 7)) > 0
    prompt = Prompt(box=(0, 0, 0, 3, 9, 9), **points((6, 12, 12, label)))
    local = reflect(prompt, coarse_DHW, (4, 10, 10), 2, rng())
    assert local is not None and local.box is None and local.points_N3 is not None and local.labels_N is not None
    assert local.points_N3[0].tolist() == [2, 2, 2] and local.labels_N.tolist() == [label, 1, 1]
    assert reflect(replace(prompt, points_N3=prompt.points_N3 + 40), coarse_DHW, (4, 10, 10), 2, rng()) is None


def test_a_click_changes_the_mask_around_it_and_nowhere_else() -> None:
    """For a model that takes masks; it sees no points but the user's."""
    first, second = (4, 4, 4, 9, 14, 14), (30, 44, 44, 37, 57, 57)
    image_DHW = bright_box((40, 60, 60), first) + bright_box((40, 60, 60), second)
    model = Oracle(WINDOW)
    model.config.mask_prompt, model.config.mask_shape = True, WINDOW
    previous_DHW = bright_box(image_DHW.shape, (4, 4, 4, 9, 14, 9)) > 0
    previous_DHW[33:37, 50:55, 20:30] = True
    click = Prompt(text="cyst", **points((6, 9, 13, 1)))
    result = Zoomer(model, image_DHW, CONFIG).refine(click, previous_DHW, rng())
    (seen,) = model.seen
    assert result.windows == model.encoded == 1 and seen.mask_DHW is not None and seen.text == "cyst"
    assert seen.points_N3 is not None and len(seen.points_N3) == 1
    expected_DHW = bright_box(image_DHW.shape, first) > 0
    everywhere = Zoomer(model, image_DHW, CONFIG).refine(click, previous_DHW, rng(), everywhere=True)
    assert everywhere.windows > 1 and not everywhere.mask(0.5)[33:37, 50:55, 20:30].any()
    expected_DHW[33:37, 50:55, 20:30] = True
    np.testing.assert_array_equal(result.mask(0.5), expected_DHW)


def test_a_click_beyond_the_mask_may_change_all_of_its_window() -> None:
    whole = (4, 4, 4, 9, 14, 40)
    image_DHW, model = bright_box((24, 60, 60), whole), Oracle(WINDOW)
    model.config.mask_prompt, model.config.mask_shape = True, WINDOW
    previous_DHW = bright_box(image_DHW.shape, (4, 4, 4, 9, 14, 27)) > 0
    clicks = Prompt(text="cyst", **points((6, 9, 33, 1), (6, 9, 36, 1)))
    result = Zoomer(model, image_DHW, CONFIG).refine(clicks, previous_DHW, rng())
    np.testing.assert_array_equal(result.mask(0.5), image_DHW > 0.5)
    assert result.windows == 1, "both clicks lie in the middle of one window"


@given(st.lists(st.tuples(*(st.integers(0, size - 1) for size in (20, 50, 9))), min_size=1, max_size=9))
def test_every_click_lies_in_the_middle_of_a_window_or_as_near_as_the_volume_allows(
    clicks: list[tuple[int, int, int]],
) -> None:
    shape = (20, 50, 9)
    windows = windows_around(np.array(clicks), WINDOW, shape)
    assert len(set(windows)) == len(windows) <= len(clicks)
    for click in clicks:
        around = [
            all(
                abs(at - (start + size // 2)) <= size / 4 or start in (0, max(extent - size, 0))
                for at, start, size, extent in zip(click, window.start, WINDOW, shape, strict=True)
            )
            and clip_box((*click, *click), window.start, WINDOW) is not None
            for window in windows
        ]
        assert any(around)


def test_published_windows_know_no_background_points() -> None:
    model, image_DHW = Oracle(WINDOW), bright_box((16, 32, 32), (0, 0, 0, 11, 23, 23))
    zoom(model, image_DHW, Prompt(text="liver", **points((4, 4, 4, 1), (9, 9, 9, 0))), PUBLISHED, rng())
    assert holding(model.seen[:1], 0) and not holding(model.seen[1:], 0)


# ---- refining ----


def test_refining_looks_where_the_previous_mask_and_the_points_lie_and_nowhere_else() -> None:
    first, second = (4, 4, 4, 9, 14, 14), (30, 44, 44, 37, 57, 57)
    image_DHW = bright_box((40, 60, 60), first) + bright_box((40, 60, 60), second)
    model = Oracle(WINDOW)
    zoomer = Zoomer(model, image_DHW, CONFIG)
    half_DHW = bright_box(image_DHW.shape, (4, 4, 4, 9, 14, 9)) > 0
    result = zoomer.refine(boxed(*first), half_DHW, rng())
    np.testing.assert_array_equal(result.mask(0.5), bright_box(image_DHW.shape, first) > 0)
    assert model.encoded == result.windows  # no zoom-out
    click = Prompt(points_N3=np.array([[5, 6, 12], [39, 0, 0]]), labels_N=np.array([1, 0]))
    result = zoomer.refine(click, half_DHW, rng())
    found_DHW = result.mask(0.5)
    assert found_DHW[5, 6, 12] and not found_DHW[5, 6, 13:].any() and not found_DHW[box_slices(second)].any()


def test_refining_by_text_gives_the_windows_the_box_of_the_previous_mask() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    model = Oracle(WINDOW)
    previous_DHW = bright_box(image_DHW.shape, (7, 10, 10, 12, 15, 15)) > 0
    result = Zoomer(model, image_DHW, CONFIG).refine(Prompt(text="liver"), previous_DHW, rng())
    np.testing.assert_array_equal(result.mask(0.5), previous_DHW)  # the oracle obeys the box
    np.testing.assert_array_equal(result.coarse_mask(0.5), previous_DHW)


# ---- logits on the volume's grid ----


@given(volumes_with_box(), st.integers(0, 99), st.sampled_from([0.02, 0.5, 0.9]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_coarse_logits_are_those_of_the_whole_volume(
    case: tuple[tuple[int, ...], Box], seed: int, threshold: float, nearest: bool
) -> None:
    shape, box = case
    low_DHW = rng(seed).normal(-1, 2, WINDOW).astype(np.float32)
    low = torch.from_numpy(low_DHW)[None, None]
    want_DHW = enlarge(low_DHW, shape) if nearest else resize_tensor(low, shape)[0, 0].numpy()
    coarse = CoarseLogits(low_DHW, shape, nearest)
    np.testing.assert_allclose(coarse.logits(box), want_DHW[box_slices(box)], atol=1e-4)
    # Rounding may decide about a voxel that lies at the threshold.
    clear_DHW = np.abs(want_DHW - np.log(threshold / (1 - threshold))) > 1e-4
    np.testing.assert_array_equal(coarse.mask(threshold)[clear_DHW], binary(want_DHW, threshold)[clear_DHW])


def test_a_certain_mask_is_its_own_logits() -> None:
    mask_DHW = bright_box(WINDOW, (1, 2, 3, 4, 5, 6)) > 0
    known = KnownMask(mask_DHW)
    np.testing.assert_array_equal(binary(known.logits((0, 0, 0, 7, 15, 15)), 0.99), mask_DHW)
    np.testing.assert_array_equal(known.logits((1, 2, 3, 2, 2, 4)) > 0, np.ones((2, 1, 2), bool))


# ---- tokens ----


def test_tokens_move_to_main_memory_and_then_go() -> None:
    cpu, one = torch.device("cpu"), torch.zeros(1, 4, 8)
    store = TokenStore(limit=3 * one.nbytes, device_limit=2 * one.nbytes)
    for key in "abc":
        store.put(key, one + ord(key))
    assert len(store) == 3 and store.device_bytes == 2 * one.nbytes
    got = store.get("a", cpu)  # the oldest waits in main memory, and comes back
    assert got is not None and float(got[0, 0, 0]) == ord("a")
    store.put("d", one)
    assert store.get("b", cpu) is None and store.bytes == 3 * one.nbytes
    assert all(store.get(key, cpu) is not None for key in "acd")


def test_a_store_without_room_keeps_nothing() -> None:
    store = TokenStore(limit=0, device_limit=10)
    store.put("a", torch.zeros(1, 4, 8))
    assert len(store) == 0 and store.get("a", torch.device("cpu")) is None


def test_tokens_are_kept_in_bf16_under_autocast() -> None:
    image_DHW = bright_box((24, 40, 40), (6, 8, 8, 17, 30, 30))
    zoomer = Zoomer(Oracle(WINDOW), image_DHW, CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        result = zoomer.zoom(Prompt(text="liver"), rng())
    assert zoomer.encode_overview().dtype == torch.bfloat16
    assert zoomer.tokens.bytes == 2 * np.prod(WINDOW) * result.windows


# ---- as the released weights were validated ----


@pytest.mark.parametrize("kind", ["text", "box+text", "points+text"])
def test_the_published_rules_find_the_truth_too(kind: str) -> None:
    """A bright box whose faces lie on the overview's grid: nearest neighbours lose nothing of it."""
    image_DHW = bright_box((24, 48, 48), (6, 9, 9, 17, 35, 35))
    box = (6, 9, 9, 17, 35, 35)
    points = {"points_N3": np.array([[10, 20, 20]]), "labels_N": np.array([1])} if "points" in kind else {}
    prompt = Prompt(text="liver", box=box if "box" in kind else None, **points)
    result = zoom(Oracle(WINDOW), image_DHW, prompt, PUBLISHED, rng())
    np.testing.assert_array_equal(binary(result.final_DHW, 0.5), image_DHW > 0.5)
    assert result.roi is not None and result.windows == len(windows_of(result.roi, image_DHW.shape, PUBLISHED))


def test_the_published_region_is_cut_off_at_the_border() -> None:
    mask_DHW = bright_box((20, 40, 40), (0, 0, 30, 1, 3, 39)) > 0
    assert published_region(mask_DHW, WINDOW) == (0, 0, 27, 4, 9, 39)


def test_a_published_window_sees_its_region_alone_and_stands_in_its_middle() -> None:
    image_DHW = np.ones((20, 40, 40), np.float32)
    (window,) = windows_of((0, 0, 27, 4, 9, 39), image_DHW.shape, PUBLISHED)
    assert window.start == (-1, -3, 26)
    seen_DHW = window.cut(image_DHW, WINDOW)
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
