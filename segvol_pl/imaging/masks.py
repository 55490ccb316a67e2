"""Masks of a label map, each kept as the box around it: most structures fill a small part of a sample.

What is outside a mask's box is neither stored nor read again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segvol_pl.imaging.box import Box, box_or_none, box_slices

FEW_VALUES = 4
"""Up to this many values are found faster by comparing than by a look-up for every voxel."""


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
    """A label map or region map (D,H,W), uint8 or uint16, from which masks are cut.

    One pass finds the count and the box of every value. Masks are then cut inside their boxes alone.
    """

    def __init__(self, label_DHW: np.ndarray) -> None:
        self.label_DHW = np.ascontiguousarray(label_DHW)
        self.shape = self.label_DHW.shape

    @functools.cached_property
    def _extents(self) -> Extents:
        return Extents.of(self.label_DHW)

    @property
    def counts(self) -> np.ndarray:
        """Number of voxels of each value, int64, up to the largest value."""
        return self._extents.counts_V

    def holds(self, values: Sequence[int]) -> bool:
        """Whether any voxel has one of the values."""
        return bool(self._held(values))

    def _held(self, values: Sequence[int]) -> list[int]:
        return [value for value in values if value < len(self.counts) and self.counts[value]]

    def mask(self, values: Sequence[int]) -> BoxedMask:
        """Cut the mask of a set of values."""
        held = self._held(values)
        if not held:
            return BoxedMask.empty(self.shape)
        low_3 = self._extents.low_3V[:, held].min(axis=1)
        high_3 = self._extents.high_3V[:, held].max(axis=1)
        d0, h0, w0, d1, h1, w1 = (int(at) for at in (*low_3, *high_3))
        box = (d0, h0, w0, d1, h1, w1)
        return BoxedMask(self.shape, box, self._cut(held, box))

    def _cut(self, held: Sequence[int], box: Box) -> np.ndarray:
        """Whether each voxel of a box has one of the values."""
        label_DHW = self.label_DHW[box_slices(box)]
        if len(held) > FEW_VALUES:
            table_V = np.zeros(len(self.counts), bool)
            table_V[held] = True
            return table_V.take(label_DHW)
        inside_DHW: np.ndarray = label_DHW == held[0]
        for value in held[1:]:
            inside_DHW |= label_DHW == value
        return inside_DHW

    def mostly_in(self, box: Box, share: float) -> list[int]:
        """List the values, 0 left out, of which more than this share of the voxels lies in a box."""
        low_3V = np.maximum(self._extents.low_3V, np.array(box[:3])[:, None])
        high_3V = np.minimum(self._extents.high_3V, np.array(box[3:])[:, None])
        room_V = np.maximum(high_3V - low_3V + 1, 0).prod(axis=0)
        least_V = share * self.counts
        # Most values have too little room in the box to be counted there.
        return [
            value
            for value in np.flatnonzero(room_V > least_V).tolist()
            if value and np.count_nonzero(self._cut([value], (*low_3V[:, value], *high_3V[:, value]))) > least_V[value]
        ]


@dataclass(frozen=True, eq=False)
class Extents:
    """Counts and boxes of the values of a label map, up to the largest value V - 1.

    counts_V: int64. low_3V, high_3V: int64, first and last index along each axis; of a value without a voxel, the first
    is above the last.
    """

    counts_V: np.ndarray
    low_3V: np.ndarray
    high_3V: np.ndarray

    @classmethod
    def of(cls, label_DHW: np.ndarray) -> Extents:
        """Find those of a contiguous label map, from its runs: equal neighbours in a row."""
        _, height, width = label_DHW.shape
        starts_DHW = np.ones(label_DHW.shape, bool)
        np.not_equal(label_DHW[:, :, 1:], label_DHW[:, :, :-1], out=starts_DHW[:, :, 1:])
        starts_N = np.flatnonzero(starts_DHW)
        lengths_N = np.diff(starts_N, append=label_DHW.size)
        values_N = label_DHW.reshape(-1)[starts_N].astype(np.intp)
        rows_N = starts_N // width
        d_N = rows_N // height
        h_N = rows_N - d_N * height
        w_N = starts_N - rows_N * width
        counts_V = np.bincount(values_N, lengths_N).astype(np.int64)
        low_3V = np.full((3, len(counts_V)), max(label_DHW.shape))
        high_3V = np.full((3, len(counts_V)), -1)
        ends_N = w_N + lengths_N - 1
        for axis, (first_N, last_N) in enumerate([(d_N, d_N), (h_N, h_N), (w_N, ends_N)]):
            np.minimum.at(low_3V[axis], values_N, first_N)
            np.maximum.at(high_3V[axis], values_N, last_N)
        return cls(counts_V, low_3V, high_3V)
