"""Masks of a label map, each kept as the box around it: most structures fill a small part of a sample.

What is outside a mask's box is neither stored nor read again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segvol_pl.imaging.box import Box, box_or_none, box_slices, enlarged

FEW_VALUES = 4
"""Up to this many values are found faster by comparing than by a look-up for every voxel."""
MARGIN = 0.25
"""Share of its extent by which a box is enlarged on each side in search of voxels beyond it."""


@dataclass(frozen=True, eq=False)
class BoxedMask:
    """A mask in an array of `shape`. box: None if the mask is empty. inside_DHW: bool, the voxels of the box."""

    shape: tuple[int, ...]
    box: Box | None
    inside_DHW: np.ndarray

    @classmethod
    def of(cls, mask_DHW: np.ndarray) -> BoxedMask:
        """Make one of a bool mask (D,H,W)."""
        box = box_or_none(mask_DHW)
        if box is None:
            return cls.empty(mask_DHW.shape)
        return cls(mask_DHW.shape, box, mask_DHW[box_slices(box)].copy())

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> BoxedMask:
        """Make an empty one."""
        return cls(shape, None, np.zeros((0, 0, 0), bool))

    def complete(self) -> np.ndarray:
        """Return the mask as a bool array of `shape`."""
        mask_DHW = np.zeros(self.shape, bool)
        if self.box is not None:
            mask_DHW[box_slices(self.box)] = self.inside_DHW
        return mask_DHW

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw voxels of the mask with replacement, int64 (N,3). Raises ValueError if it is empty."""
        if self.box is None:
            raise ValueError("points cannot be drawn from an empty mask")
        drawn_N = rng.choice(np.flatnonzero(self.inside_DHW), size=count)
        drawn_N3: np.ndarray = _unravelled(drawn_N, self.inside_DHW.shape) + self.box[:3]
        return drawn_N3

    def draw_outside(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw voxels outside the mask with replacement, int64 (N,3); none if it covers everything."""
        if count == 0 or (self.inside_DHW.shape == self.shape and self.inside_DHW.all()):
            return np.zeros((0, 3), np.int64)
        # Most voxels are outside a mask, so rejection is far cheaper than listing all of them.
        drawn_N3 = _unravelled(rng.integers(math.prod(self.shape), size=8 * count), self.shape)
        outside_N3: np.ndarray = drawn_N3[~self.covers(drawn_N3)]
        if len(outside_N3) >= count:
            return outside_N3[:count]
        return _unravelled(rng.choice(np.flatnonzero(~self.complete()), size=count), self.shape)

    def covers(self, voxels_N3: np.ndarray) -> np.ndarray:
        """Whether voxels lie in the mask, bool (N,)."""
        if self.box is None:
            return np.zeros(len(voxels_N3), bool)
        local_N3 = voxels_N3 - self.box[:3]
        inside_N: np.ndarray = ((local_N3 >= 0) & (local_N3 < self.inside_DHW.shape)).all(axis=1)
        inside_N[inside_N] = self.inside_DHW[tuple(local_N3[inside_N].T)]
        return inside_N


def _unravelled(flat_N: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Indices along each axis, (N,3), of flat indices."""
    return np.stack(np.unravel_index(flat_N, shape), axis=1)


class LabelMap:
    """A label map or region map (D,H,W), uint8 or uint16, from which masks are cut."""

    def __init__(self, label_DHW: np.ndarray) -> None:
        self.label_DHW = np.ascontiguousarray(label_DHW)
        self.shape = self.label_DHW.shape
        # New memory for every mask would take longer than the comparison.
        self._mask_DHW = np.empty(self.shape, bool)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """Number of voxels of each value, see `counts_of`."""
        return counts_of(self.label_DHW)

    def holds(self, values: Sequence[int]) -> bool:
        """Whether any voxel has one of the values."""
        return any(value < len(self.counts) and self.counts[value] for value in values)

    def mask(self, values: Sequence[int]) -> BoxedMask:
        """Cut the mask of a set of values."""
        return BoxedMask.of(_cut(self.label_DHW, values, self._mask_DHW))

    def mask_near(self, values: Sequence[int], box: Box) -> BoxedMask:
        """Cut the mask of values whose voxels lie mostly in the box: equal to `mask`, and usually faster."""
        near = enlarged(box, MARGIN, self.shape)
        part = box_slices(near)
        found = BoxedMask.of(_cut(self.label_DHW[part], values, self._mask_DHW[part]))
        if found.inside_DHW.sum() < self.counts[list(values)].sum():
            return self.mask(values)
        if found.box is None:
            return BoxedMask.empty(self.shape)
        d0, h0, w0, d1, h1, w1 = (at + low for at, low in zip(found.box, near[:3] * 2, strict=True))
        return BoxedMask(self.shape, (d0, h0, w0, d1, h1, w1), found.inside_DHW)


def counts_of(label_DHW: np.ndarray) -> np.ndarray:
    """Number of voxels of each value, int64, up to the largest value. Twice as fast as `np.bincount`."""
    flat = label_DHW.reshape(-1)
    if flat.dtype == np.uint16:  # which torch does not count
        flat = flat.view(np.int16) if flat.max() <= np.iinfo(np.int16).max else flat.astype(np.int32)
    counts: np.ndarray = torch.bincount(torch.from_numpy(flat)).numpy()
    return counts


def _cut(label_DHW: np.ndarray, values: Sequence[int], out_DHW: np.ndarray) -> np.ndarray:
    """Write to `out_DHW` where a label map has one of the values."""
    if 0 < len(values) <= FEW_VALUES:
        np.equal(label_DHW, values[0], out=out_DHW)
        for value in values[1:]:
            out_DHW |= label_DHW == value
        return out_DHW
    table = np.zeros(int(np.iinfo(label_DHW.dtype).max) + 1, bool)
    table[list(values)] = True
    # With "clip" numpy writes to `out` directly; the table has every value.
    return table.take(label_DHW, out=out_DHW, mode="clip")
