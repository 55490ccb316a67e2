"""Boxes of voxels, as in the published model: their maximum belongs to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[int, int, int, int, int, int]
"""`d0 h0 w0 d1 h1 w1`: voxel indices, inclusive maximum."""


def box_of(mask_DHW: np.ndarray) -> Box:
    """Return the bounding box of a mask. Raises ValueError for an empty mask."""
    box = box_or_none(mask_DHW)
    if box is None:
        raise ValueError("an empty mask has no box")
    return box


def box_or_none(mask_DHW: np.ndarray) -> Box | None:
    """Return the bounding box of a mask; None for an empty mask."""
    deep = np.flatnonzero(mask_DHW.reshape(len(mask_DHW), -1).any(axis=1))
    if deep.size == 0:
        return None
    d0, d1 = int(deep[0]), int(deep[-1])
    plane_HW = np.any(mask_DHW[d0 : d1 + 1], axis=0)
    high, wide = np.flatnonzero(plane_HW.any(axis=1)), np.flatnonzero(plane_HW.any(axis=0))
    return d0, int(high[0]), int(wide[0]), d1, int(high[-1]), int(wide[-1])


def middle_slice(mask_DHW: np.ndarray) -> int:
    """Return the middle one of the slices that a mask has voxels in. Raises ValueError for an empty mask."""
    slices_D = np.flatnonzero(mask_DHW.any(axis=(1, 2)))
    if not len(slices_D):
        raise ValueError("an empty mask has no slice")
    return int(slices_D[len(slices_D) // 2])


def slice_box(mask_DHW: np.ndarray, at: int) -> Box:
    """Return a box as deep as a mask, with the mask's extent on slice `at`, as boxes drawn on one slice are.

    Raises ValueError for a mask that is empty there.
    """
    d0, _, _, d1, _, _ = box_of(mask_DHW)
    _, h0, w0, _, h1, w1 = box_of(mask_DHW[at : at + 1])
    return d0, h0, w0, d1, h1, w1


def box_slices(box: Box) -> tuple[slice, slice, slice]:
    """Return the slices of an array (D,H,W) that a box covers."""
    return slice(box[0], box[3] + 1), slice(box[1], box[4] + 1), slice(box[2], box[5] + 1)


def whole_box(shape: Sequence[int]) -> Box:
    """The box of all voxels of a volume."""
    d, h, w = shape
    return 0, 0, 0, d - 1, h - 1, w - 1


def point_boxes(points_N3: np.ndarray) -> list[Box]:
    """The boxes of single voxels (d, h, w)."""
    return [(d, h, w, d, h, w) for d, h, w in points_N3.tolist()]


def union_box(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of these, of which there is at least one."""
    d0, h0, w0 = (min(box[axis] for box in boxes) for axis in range(3))
    d1, h1, w1 = (max(box[axis] for box in boxes) for axis in range(3, 6))
    return d0, h0, w0, d1, h1, w1
