"""The line prompt: the two ends of a structure's longest diameter in one axial slice, as RECIST measures a lesion.

1. `recist_line` draws it from a mask, for training and evaluation.
2. Only the first and the last voxel of each row can be an end; of these, only the corners of their convex hull. The
   extents along some directions bound each slice's diameter, so that few slices are looked at.

Letters: D H W voxels; N points of one slice; 2 ends; 3 is d h w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import cdist

from segvol_pl.imaging.box import box_of, box_slices
from segvol_pl.imaging.prompts import ordered_line

DIRECTIONS = 8
"""Directions along which the slices are measured: their greatest extent is within 2 % of the diameter."""

ROUNDING = 1e-9
"""Relative error of a length: lengths that differ by less are equal."""

JITTER = 0.05
"""Greatest shift of each end along h and along w, as a fraction of the line's length: two readers differ by as much."""


def recist_line(mask_DHW: np.ndarray, rng: np.random.Generator, spacing: Sequence[float] | None = None) -> np.ndarray:
    """Draw the ends of the longest diameter in an axial slice, each shifted by up to JITTER of the length.

    Args:
        mask_DHW: Bool, not empty. Of one voxel, both ends are that voxel.
        rng: Draws the shifts: four numbers, whatever the mask.
        spacing: mm along d, h, w: the diameter is the longest in mm. None: in voxels, which is right where h and w have
            the same spacing.

    Returns:
        int64 (2,3), rows of d h w in one slice and inside the array, in the order of
        `prompts.ordered_line`.

    Raises:
        ValueError: The mask is empty.
    """
    steps_2 = np.ones(2) if spacing is None else np.asarray(spacing, float)[1:]
    line_23 = longest_line(mask_DHW, steps_2)
    ends_22 = line_23[:, 1:]
    reach_2 = JITTER * float(np.linalg.norm((ends_22[1] - ends_22[0]) * steps_2)) / steps_2
    moved_22 = np.rint(ends_22 + rng.uniform(-1, 1, (2, 2)) * reach_2).astype(np.int64)
    line_23[:, 1:] = np.clip(moved_22, 0, np.subtract(mask_DHW.shape[1:], 1))
    return ordered_line(line_23)


def longest_line(mask_DHW: np.ndarray, steps_2: np.ndarray) -> np.ndarray:
    """Find the two voxels of one axial slice that are farthest apart; of several slices the first.

    Args:
        mask_DHW: Bool, not empty.
        steps_2: The lengths of a voxel along h and w.

    Returns:
        int64 (2,3), rows of d h w.

    Raises:
        ValueError: The mask is empty.
    """
    box = box_of(mask_DHW)
    first_DH, last_DH, has_DH = _row_ends(mask_DHW[box_slices(box)])
    extent_D = _greatest_extents(first_DH, last_DH, has_DH, steps_2)
    best, found = float(extent_D.max()), (len(extent_D), np.zeros((2, 2), np.int64))
    near_enough = best * math.cos(math.pi / (2 * DIRECTIONS)) * (1 - ROUNDING)
    for depth in np.flatnonzero(extent_D >= near_enough).tolist():
        rows_N = np.flatnonzero(has_DH[depth])
        ends = [np.stack([rows_N, ends_DH[depth, rows_N]], axis=1) for ends_DH in (first_DH, last_DH)]
        length, ends_22 = _farthest(np.concatenate(ends), steps_2)
        if found[0] == len(extent_D) or length > best * (1 + ROUNDING):
            best, found = length, (depth, ends_22)
    depth, ends_22 = found
    line_23: np.ndarray = np.concatenate([np.full((2, 1), depth), ends_22], axis=1) + np.array(box[:3])
    return line_23


def _row_ends(mask_DHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and last voxel of each row, int64 (D,H), and which rows have one, bool (D,H)."""
    last = mask_DHW.shape[2] - 1
    has_DH: np.ndarray = np.any(mask_DHW, axis=2)
    return mask_DHW.argmax(axis=2), last - mask_DHW[:, :, ::-1].argmax(axis=2), has_DH


def _greatest_extents(first_DH: np.ndarray, last_DH: np.ndarray, has_DH: np.ndarray, steps_2: np.ndarray) -> np.ndarray:
    """The greatest extent (D,) of each slice along any of DIRECTIONS directions; -1 for an empty slice."""
    rows_H = np.arange(has_DH.shape[1]) * steps_2[0]
    greatest_D: np.ndarray = np.full(len(has_DH), -1.0)
    for angle in np.arange(DIRECTIONS) * (math.pi / DIRECTIONS):
        along_H, across = rows_H * math.cos(angle), steps_2[1] * math.sin(angle)  # across >= 0: the last voxel leads
        high_D = np.where(has_DH, along_H + last_DH * across, -np.inf).max(axis=1)
        low_D = np.where(has_DH, along_H + first_DH * across, np.inf).min(axis=1)
        np.maximum(greatest_D, high_D - low_D, out=greatest_D)
    return greatest_D


def _farthest(points_N2: np.ndarray, steps_2: np.ndarray) -> tuple[float, np.ndarray]:
    """Length between the two points that are farthest apart, and these points (2,2)."""
    corners_N2 = _corners(points_N2)
    placed_N2 = corners_N2 * steps_2
    apart_NN = cdist(placed_N2, placed_N2)
    one, other = np.unravel_index(int(apart_NN.argmax()), apart_NN.shape)
    return float(apart_NN[one, other]), corners_N2[[one, other]]


def _corners(points_N2: np.ndarray) -> np.ndarray:
    """The corners of the convex hull; of points on one line its two ends."""
    try:
        corners_N: np.ndarray = ConvexHull(points_N2).vertices
    except (QhullError, ValueError):  # too few, or all on one line, where the first and the last are farthest apart
        corners_N = np.lexsort(points_N2.T)[[0, -1]]
    corners_N2: np.ndarray = points_N2[corners_N]
    return corners_N2
