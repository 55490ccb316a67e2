"""What a mask is worth, and what many figures come to.

1. `dice`, `surface_dice` and `volume_error` hold a mask against the truth; `score` takes all three.
2. `Stats` puts one figure of many cases together: mean, quartiles, and bootstrap intervals over the cases.

An empty truth has no Dice, no surface and no volume to err by: its scores are None, and it is counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from segvol_pl.imaging.box import box_of, box_slices

RESAMPLES = 2000
"""Bootstrap samples of an interval."""
COVERED = (2.5, 97.5)
"""Percentiles that a 95 % interval spans."""
ROUNDING = 1e-9
"""Relative: distances that equal the tolerance are within it, whatever float64 makes of them."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """One mask against its truth; None where the truth is empty, or as stated."""

    dice: float | None
    surface_dice: float | None
    """Normalised surface distance. None also where the spacing is unknown."""
    volume_error: float | None
    """(predicted - true) / true volume."""


def score(
    predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float] | None, tolerance: float
) -> Scores:
    """All scores of a bool mask. spacing: mm along d, h, w; tolerance: mm."""
    if not truth_DHW.any():
        return Scores(None, None, None)
    return Scores(
        dice(predicted_DHW, truth_DHW),
        None if spacing is None else surface_dice(predicted_DHW, truth_DHW, spacing, tolerance),
        volume_error(predicted_DHW, truth_DHW),
    )


def dice(predicted_DHW: np.ndarray, truth_DHW: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool masks. Raises ValueError where both are empty: it is undefined."""
    total = int(np.count_nonzero(predicted_DHW)) + int(np.count_nonzero(truth_DHW))
    if total == 0:
        raise ValueError("Dice of two empty masks is undefined")
    return 2 * int(np.count_nonzero(predicted_DHW & truth_DHW)) / total


def volume_error(predicted_DHW: np.ndarray, truth_DHW: np.ndarray) -> float:
    """(predicted - true) / true voxels: -1 where nothing was found, 0 at the right volume, without upper bound."""
    true = int(np.count_nonzero(truth_DHW))
    return (int(np.count_nonzero(predicted_DHW)) - true) / true


def surface_dice(predicted_DHW: np.ndarray, truth_DHW: np.ndarray, spacing: Sequence[float], tolerance: float) -> float:
    """Share of both masks' surface voxels that lie within `tolerance` mm of the other's surface.

    MONAI's `compute_surface_dice` to rounding; asking a tree for near neighbours is several times faster than its
    distance maps of every voxel. 0 where one mask is empty. Raises ValueError where both are.
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
        """Of the values; None where there are none. The same values in the same order and seed give the same."""
        if len(values) == 0:
            return None
        array_N = np.asarray(values, np.float64)
        q1, median, q3 = (float(value) for value in np.percentile(array_N, (25, 50, 75)))
        means, medians = _intervals(array_N, seed) if len(values) > 1 else (None, None)
        return cls(len(values), float(array_N.mean()), q1, median, q3, means, medians)


def _intervals(array_N: np.ndarray, seed: Sequence[int]) -> tuple[Interval, Interval]:
    """Of mean and median."""
    drawn = np.random.default_rng(list(seed)).integers(len(array_N), size=(RESAMPLES, len(array_N)))
    resampled = array_N[drawn]
    return interval(resampled.mean(axis=1)), interval(np.median(resampled, axis=1))


def interval(resampled_R: np.ndarray) -> Interval:
    """The 95 % that a bootstrapped figure spans."""
    low, high = np.percentile(resampled_R, COVERED)
    return float(low), float(high)


def macro_interval(table_NK: np.ndarray, seed: Sequence[int]) -> Interval | None:
    """Of the mean over K categories of their means over N cases (NaN: not in the case), cases being resampled.

    Rows of one case stay together, as they are not independent. A category that a resample lacks is left out of it.
    None for one case.
    """
    if len(table_NK) < 2:
        return None
    rng = np.random.default_rng(list(seed))
    known_NK = np.isfinite(table_NK)
    filled_NK = np.where(known_NK, table_NK, 0.0)
    # A resample is how often it holds each case, so that sums are matrix products.
    times_RN = rng.multinomial(len(table_NK), np.full(len(table_NK), 1 / len(table_NK)), size=RESAMPLES)
    counts_RK = times_RN @ known_NK
    means_RK = np.divide(times_RN @ filled_NK, counts_RK, out=np.zeros(counts_RK.shape), where=counts_RK > 0)
    return interval(means_RK.sum(axis=1) / np.maximum((counts_RK > 0).sum(axis=1), 1))
