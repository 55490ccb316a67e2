"""Scores against libraries and by hand, and their spread over cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_surface_dice
from scipy import ndimage

from segvol_pl.evaluation.metrics import (
    Scores,
    Stats,
    dice,
    hausdorff95,
    macro_interval,
    score,
    surface_dice,
    surface_voxel_dice,
    volume_error,
)
from segvol_pl.evaluation.surfels import surfel_areas

SPACINGS = ((1.0, 1.0, 1.0), (2.5, 1.0, 0.7))


def blob(seed: int, level: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(12, 18, 15))
    return ndimage.gaussian_filter(noise, 2) > level


def test_dice() -> None:
    one, other = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    one[0], other[:, 0] = True, True
    assert dice(one, other) == pytest.approx(2 * 4 / (12 + 8))
    assert dice(one, np.zeros_like(one)) == 0.0 and dice(one, one) == 1.0
    with pytest.raises(ValueError, match="undefined"):
        dice(np.zeros_like(one), np.zeros_like(one))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([0.4, 1.0, 1.5, 2.0, 3.7]), st.sampled_from(SPACINGS))
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*")
def test_both_forms_of_the_surface_dice_are_monais(
    seed: int, tolerance: float, spacing: tuple[float, float, float]
) -> None:
    predicted_DHW, truth_DHW = blob(seed, 0.0), blob(seed + 1, 0.02)
    tensors = [torch.from_numpy(mask_DHW)[None, None] for mask_DHW in (predicted_DHW, truth_DHW)]
    for ours, subvoxels in ((surface_dice, True), (surface_voxel_dice, False)):
        expected = compute_surface_dice(
            *tensors, [tolerance], include_background=True, spacing=list(spacing), use_subvoxels=subvoxels
        )
        assert ours(predicted_DHW, truth_DHW, spacing, tolerance) == pytest.approx(expected.item(), abs=1e-6)


def test_surface_dice_and_hd95_are_the_published_ones(challenge: Path) -> None:
    """80 pairs: identical, shifted, grown, shrunk, single voxels, masks at the border, noise."""
    file = np.load(challenge / "surface_dice.npz")
    count = int(np.prod(file["shape"]))
    truths, masks = (
        np.unpackbits(file[name])[:count].reshape(file["shape"]).astype(bool) for name in ("truth", "mask")
    )
    for pair, (truth_DHW, mask_DHW) in enumerate(zip(truths, masks, strict=True)):
        spacing = file["spacing"][pair]
        found = [surface_dice(mask_DHW, truth_DHW, spacing, tolerance) for tolerance in file["tolerance"]]
        np.testing.assert_allclose(found, file["nsd"][pair], rtol=0, atol=1e-6)
        assert hausdorff95(mask_DHW, truth_DHW, spacing) == pytest.approx(file["hd95"][pair], abs=1e-6)
        told = score(mask_DHW, truth_DHW, spacing, 2.0)
        assert told.surface_dice == pytest.approx(found[1]) and told.dice == pytest.approx(file["dice"][pair])


def test_surfels_of_one_voxel_and_of_a_plane() -> None:
    """A voxel's surface is an octahedron between the middles of its faces; that of a slab's face is the face itself."""
    table_C = surfel_areas((1.0, 1.0, 1.0))
    assert table_C[0] == table_C[255] == 0 and 8 * table_C[1] == pytest.approx(3**0.5)
    assert [surfel_areas((3.0, 2.0, 0.5))[code] for code in (0x0F, 0x33, 0x55)] == pytest.approx([1.0, 1.5, 6.0])


def test_single_voxels_two_millimetres_apart() -> None:
    one_DHW, other_DHW = np.zeros((2, 9, 9, 9), bool)
    one_DHW[4, 4, 4] = other_DHW[4, 4, 6] = True
    spacing = (3.0, 2.0, 1.0)
    assert surface_dice(one_DHW, other_DHW, spacing, 1.0) == 0.5 and surface_dice(one_DHW, other_DHW, spacing, 2) == 1
    assert hausdorff95(one_DHW, other_DHW, spacing) == 2.0


def test_a_mask_at_the_border_has_its_surface_there() -> None:
    whole_DHW = np.ones((4, 5, 6), bool)
    inner_DHW = np.pad(whole_DHW, 3)
    smaller_DHW = np.pad(whole_DHW[1:], ((1, 0), (0, 0), (0, 0)))
    for tolerance in (0.5, 1.0, 2.0):
        at_border = surface_dice(smaller_DHW, whole_DHW, (1, 1, 1), tolerance)
        assert at_border == surface_dice(np.pad(smaller_DHW, 3), inner_DHW, (1, 1, 1), tolerance)


def test_a_surface_moved_by_the_tolerance_is_within_it() -> None:
    truth_DHW = np.zeros((20, 20, 20), bool)
    truth_DHW[5:12, 5:12, 5:12] = True
    moved_DHW = np.roll(truth_DHW, 1, axis=0)
    for measure in (surface_dice, surface_voxel_dice):
        assert measure(moved_DHW, truth_DHW, (3.0, 1.0, 1.0), 3.0) == 1.0
        assert measure(moved_DHW, truth_DHW, (3.0, 1.0, 1.0), 2.9) < 1.0
        assert measure(np.zeros_like(truth_DHW), truth_DHW, (1, 1, 1), 2.0) == 0.0
    assert hausdorff95(moved_DHW, truth_DHW, (3.0, 1.0, 1.0)) == 3.0


def test_surfaces_of_nothing() -> None:
    nothing_DHW, truth_DHW = np.zeros((5, 5, 5), bool), np.ones((5, 5, 5), bool)
    assert hausdorff95(nothing_DHW, truth_DHW, (1, 1, 1)) == hausdorff95(truth_DHW, nothing_DHW, (1, 1, 1)) == np.inf
    for measure in (lambda a, b: surface_dice(a, b, (1, 1, 1), 2.0), lambda a, b: hausdorff95(a, b, (1, 1, 1))):
        with pytest.raises(ValueError, match="empty"):
            measure(nothing_DHW, nothing_DHW)
        with pytest.raises(ValueError, match="shapes"):
            measure(truth_DHW, truth_DHW[1:])


def test_scores_that_do_not_exist_are_none() -> None:
    truth_DHW = blob(0, 0.05)
    nothing_DHW = np.zeros_like(truth_DHW)
    assert score(truth_DHW, nothing_DHW, (1, 1, 1), 2.0) == Scores(None, None, None, None)
    assert score(truth_DHW, truth_DHW, None, 2.0) == Scores(1.0, None, None, 0.0)
    assert score(truth_DHW, truth_DHW, (1, 1, 1), 2.0) == Scores(1.0, 1.0, 0.0, 0.0)
    assert score(nothing_DHW, truth_DHW, (1, 1, 1), 2.0) == Scores(0.0, 0.0, None, -1.0)
    twice_DHW = np.zeros_like(truth_DHW)
    twice_DHW.reshape(-1)[: 2 * truth_DHW.sum()] = True
    assert volume_error(twice_DHW, truth_DHW) == 1.0


def test_spread() -> None:
    spread = Stats.of([0.2, 0.4, 0.9], [0])
    assert spread is not None and spread.n == 3
    figures = (spread.mean, spread.q1, spread.median, spread.q3)
    assert figures == pytest.approx((0.5, 0.3, 0.4, 0.65))
    assert spread == Stats.of([0.2, 0.4, 0.9], [0]) and Stats.of([], [0]) is None
    alone = Stats.of([0.7], [0])
    assert alone is not None and alone.mean == 0.7 and alone.mean_interval is None and alone.median_interval is None


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for number in range(100):
        spread = Stats.of(rng.normal(0.5, 0.1, 40).tolist(), [number])
        assert spread is not None and spread.mean_interval is not None
        covered += spread.mean_interval[0] <= 0.5 <= spread.mean_interval[1]
    assert 86 <= covered <= 100


def test_the_overall_interval_keeps_a_cases_rows_together() -> None:
    """Two categories that rise and fall together are not twice as much evidence as one."""
    values_N = np.random.default_rng(0).normal(0.5, 0.1, 60)
    one, same = macro_interval(values_N[:, None], [1]), macro_interval(np.stack([values_N, values_N], axis=1), [1])
    assert one is not None and one == pytest.approx(same)
    holed_NK = np.stack([values_N, values_N], axis=1)
    holed_NK[:55, 1] = np.nan
    assert macro_interval(holed_NK, [1]) is not None and macro_interval(values_N[:1, None], [1]) is None
