"""Scores of a mask, and their statistics over cases.

1. `dice`, `surface_dice`, `hausdorff95` and `volume_error` compare a mask with the truth; `score` computes all four.
2. `Stats` summarises one figure over many cases: mean, quartiles, and bootstrap intervals over the cases.

All scores are undefined for an empty truth: they are None, and such cases are counted separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from segvol_pl.evaluation.surfels import SurfaceDistances
from segvol_pl.imaging.box import box_of, box_slices

RESAMPLES = 2000
"""Number of bootstrap samples for an interval."""
COVERED = (2.5, 97.5)
"""Percentiles at the ends of a 95 % interval."""
ROUNDING = 1e-9
"""Relative tolerance for rounding: distances of voxels equal to the tolerance count as within it."""
HAUSDORFF_PERCENT = 95.0
"""Percentile of the robust Hausdorff distance."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """Scores of one mask; None if the truth is empty, or as stated."""

    dice: float | None
    surface_dice: float | None
    """Normalised surface distance. None also if the spacing is unknown."""
    hd95: float | None
    """In mm. None also if the spacing is unknown, or if nothing was predicted."""
    volume_error: float | None
    """(predicted - true) / true volume."""


def score(
    predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float] | None, tolerance: float
) -> Scores:
    """Compute all scores of a mask.

    Args:
        predicted_DHW: bool.
        truth_DHW: bool.
        spacing: mm along d, h, w; None if unknown.
        tolerance: Of the surface Dice, in mm.
    """
    if not truth_DHW.any():
        return Scores(None, None, None, None)
    overlap, volume = dice(predicted_DHW, truth_DHW), volume_error(predicted_DHW, truth_DHW)
    if spacing is None:
        return Scores(overlap, None, None, volume)
    distances = SurfaceDistances.between(predicted_DHW, truth_DHW, spacing)
    hd95 = distances.percentile(HAUSDORFF_PERCENT)
    return Scores(overlap, distances.share_within(tolerance), hd95 if np.isfinite(hd95) else None, volume)


def dice(predicted_DHW: np.ndarray, truth_DHW: np.ndarray) -> float:
    """Return 2 |A and B| / (|A| + |B|) of two bool masks. Raises ValueError if both are empty: it is undefined."""
    total = int(np.count_nonzero(predicted_DHW)) + int(np.count_nonzero(truth_DHW))
    if total == 0:
        raise ValueError("Dice of two empty masks is undefined")
    return 2 * int(np.count_nonzero(predicted_DHW & truth_DHW)) / total


def volume_error(predicted_DHW: np.ndarray, truth_DHW: np.ndarray) -> float:
    """Return (predicted - true) / true voxels: -1 if nothing was predicted, 0 at the right volume, no upper bound."""
    true = int(np.count_nonzero(truth_DHW))
    return (int(np.count_nonzero(predicted_DHW)) - true) / true


def surface_dice(predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """Return the share of both masks' surfaces, by area, that lies within `tolerance` mm of the other surface.

    The published normalised surface distance (NSD): equal to DeepMind's `compute_surface_dice_at_tolerance`, see
    `evaluation.surfels`. `surface_voxel_dice` counts voxels instead.

    Args:
        predicted_DHW: bool.
        truth_DHW: bool.
        spacing: mm along d, h, w.
        tolerance: mm.

    Returns:
        A share from 0 to 1; 0 if one mask is empty.

    Raises:
        ValueError: Both masks are empty, or their shapes differ.
    """
    return SurfaceDistances.between(predicted_DHW, truth_DHW, spacing, tolerance).share_within(tolerance)


def hausdorff95(predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float]) -> float:
    """Return the robust Hausdorff distance in mm: 95 % of each surface, by area, lie within it of the other surface.

    Equal to DeepMind's `compute_robust_hausdorff` at 95 %.

    Args:
        predicted_DHW: bool.
        truth_DHW: bool.
        spacing: mm along d, h, w.

    Returns:
        The distance; infinite if one mask is empty.

    Raises:
        ValueError: Both masks are empty, or their shapes differ.
    """
    return SurfaceDistances.between(predicted_DHW, truth_DHW, spacing).percentile(HAUSDORFF_PERCENT)


def surface_voxel_dice(
    predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float], tolerance: float = 2.0
) -> float:
    """Return the share of both masks' surface voxels that lie within `tolerance` mm of the other surface.

    Equal to the default of MONAI's `compute_surface_dice` up to rounding. It is not the published measure: it counts
    voxels, however large their surface is, and measures from their middles.

    Args:
        predicted_DHW: bool.
        truth_DHW: bool.
        spacing: mm along d, h, w.
        tolerance: mm.

    Returns:
        A share from 0 to 1; 0 if one mask is empty.

    Raises:
        ValueError: Both masks are empty.
    """
    union_DHW = predicted_DHW | truth_DHW
    if not union_DHW.any():
        raise ValueError("surface Dice of two empty masks is undefined")
    within = box_slices(box_of(union_DHW))
    one_N3, other_N3 = (_surface(mask_DHW[within], spacing) for mask_DHW in (predicted_DHW, truth_DHW))
    if not (len(one_N3) and len(other_N3)):
        return 0.0
    near = _near(one_N3, other_N3, tolerance) + _near(other_N3, one_N3, tolerance)
    return near / (len(one_N3) + len(other_N3))


def _surface(mask_DHW: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Positions in mm of the voxels that have a neighbour (of 6) outside the mask, N x 3."""
    surface_N3: np.ndarray = np.argwhere(mask_DHW & ~ndimage.binary_erosion(mask_DHW)) * np.asarray(spacing)
    return surface_N3


def _near(from_N3: np.ndarray, to_N3: np.ndarray, tolerance: float) -> int:
    distance_N, _ = cKDTree(to_N3).query(from_N3, distance_upper_bound=tolerance * (1 + ROUNDING))
    return int(np.count_nonzero(np.isfinite(distance_N)))


@dataclass(frozen=True)
class Stats:
    """One figure over `n` cases. The intervals (95 %, percentile bootstrap over the cases) are None for one case."""

    n: int
    mean: float
    q1: float
    median: float
    q3: float
    mean_interval: Interval | None
    median_interval: Interval | None

    @classmethod
    def of(cls, values: Sequence[float], seed: Sequence[int]) -> Stats | None:
        """Summarise the values; None if there are none. The result depends on their order and on the seed alone."""
        if len(values) == 0:
            return None
        array_N = np.asarray(values, np.float64)
        q1, median, q3 = (float(value) for value in np.percentile(array_N, (25, 50, 75)))
        means, medians = _intervals(array_N, seed) if len(values) > 1 else (None, None)
        return cls(len(values), float(array_N.mean()), q1, median, q3, means, medians)


def _intervals(array_N: np.ndarray, seed: Sequence[int]) -> tuple[Interval, Interval]:
    """Intervals of mean and median, from the same samples."""
    # scipy.stats.bootstrap takes 2 to 5 times as long for up to 20 cases.
    drawn = np.random.default_rng(list(seed)).integers(len(array_N), size=(RESAMPLES, len(array_N)))
    resampled = array_N[drawn]
    return interval(resampled.mean(axis=1)), interval(np.median(resampled, axis=1))


def interval(resampled_R: np.ndarray) -> Interval:
    """Return the 95 % percentile interval of a figure's bootstrap samples."""
    low, high = np.percentile(resampled_R, COVERED)
    return float(low), float(high)


def macro_interval(table_NK: np.ndarray, seed: Sequence[int]) -> Interval | None:
    """Return the bootstrap interval of a mean over categories of means over cases. Cases are resampled.

    The values of one case stay together, as they are not independent. A category without a value in a sample is left
    out of that sample.

    Args:
        table_NK: N cases, K categories; NaN if the case does not have the category.
        seed: Of the bootstrap.

    Returns:
        The 95 % interval; None for one case.
    """
    if len(table_NK) < 2:
        return None
    rng = np.random.default_rng(list(seed))
    known_NK = np.isfinite(table_NK)
    filled_NK = np.where(known_NK, table_NK, 0.0)
    # A sample is stored as the number of times it contains each case, so that sums are matrix products.
    times_RN = rng.multinomial(len(table_NK), np.full(len(table_NK), 1 / len(table_NK)), size=RESAMPLES)
    counts_RK = times_RN @ known_NK
    means_RK = np.divide(times_RN @ filled_NK, counts_RK, out=np.zeros(counts_RK.shape), where=counts_RK > 0)
    return interval(means_RK.sum(axis=1) / np.maximum((counts_RK > 0).sum(axis=1), 1))
