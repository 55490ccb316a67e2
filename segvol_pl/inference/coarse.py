"""Logits on a volume's grid, worked out only where they are looked at: a large CT never has them all in memory.

1. `Coarse` holds what zooming out gave, at the model's input shape: a few MB, whatever the volume.
2. `logits(box)` brings the part inside a box to the volume's grid, slice by slice.
3. `mask(threshold)` enlarges only the surroundings of what exceeds the threshold at the input shape: interpolation
   gives nothing above its highest neighbour.
4. `Certain` is a mask that is already known, in the same place.

Letters: D H W voxels; B and C are one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.transforms import resize_tensor

Logits = TypeVar("Logits", np.ndarray, torch.Tensor)

SURE = 10.0
"""Logit of a voxel that is known to belong to a mask; its negative where it is known not to."""


def logit(probability: float) -> float:
    """The logit of a probability between 0 and 1."""
    return math.log(probability / (1 - probability))


def binary(logits_DHW: Logits, threshold: float) -> Logits:
    """Bool mask of the voxels whose probability exceeds `threshold`; of a tensor on its device."""
    return logits_DHW > logit(threshold)


class Ground(Protocol):
    """What zooming in starts from, and what stays outside of its windows."""

    shape: tuple[int, ...]

    def logits(self, box: Box) -> np.ndarray:
        """Float32, the part of the volume inside the box (inclusive)."""

    def mask(self, threshold: float) -> np.ndarray:
        """Bool (D,H,W), on the volume's grid. threshold: a probability."""


@dataclass(frozen=True, eq=False)
class _Taps:
    """One axis: for each voxel of the volume the two voxels before it is interpolated from, and the second's share."""

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray

    def within(self, low: int, high: int) -> slice:
        """The voxels of the volume that look at any of `low` to `high`."""
        near = np.flatnonzero((self.second >= low) & (self.first <= high))
        return slice(int(near[0]), int(near[-1]) + 1) if near.size else slice(0, 0)

    def part(self, voxels: slice) -> _Taps:
        return _Taps(self.first[voxels], self.second[voxels], self.share[voxels])

    def mix(self, array: np.ndarray, axis: int) -> np.ndarray:
        first = array.take(self.first, axis)
        share = self.share.reshape([-1 if at == axis else 1 for at in range(array.ndim)])
        between: np.ndarray = first + (array.take(self.second, axis) - first) * share
        return between


def _linear(old: int, new: int) -> _Taps:
    """Voxel extents coincide, half-pixel centres, as `F.interpolate` without align_corners. Only for axes that grow."""
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    first = np.floor(place).astype(np.int64)
    return _Taps(first, np.minimum(first + 1, old - 1), (place - first).astype(np.float32))


def _nearest(old: int, new: int) -> _Taps:
    """torch's own nearest neighbour, which takes the voxel under a cell's first corner, not its centre.

    Its rounding in float32 is part of it: a whole number of voxels may fall to the voxel before.
    """
    source = torch.arange(old, dtype=torch.float32)[None, None]
    index = F.interpolate(source, size=new, mode="nearest")[0, 0].long().numpy()
    return _Taps(index, index, np.zeros(new, np.float32))


def enlarge(array_DHW: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """By the published nearest neighbour, see `_nearest`."""
    taps = [_nearest(old, new) for old, new in zip(array_DHW.shape, shape, strict=True)]
    taken_DHW: np.ndarray = array_DHW[np.ix_(*(axis.first for axis in taps))]
    return taken_DHW


class Coarse:
    """The logits of zooming out. low_DHW: float32 at the model's input shape; `shape`: that of the volume.

    Axes along which the volume is shorter than the input are averaged, the others interpolated linearly; with `nearest`
    all go by the published nearest neighbour.
    """

    def __init__(self, low_DHW: np.ndarray, shape: Sequence[int], nearest: bool) -> None:
        self.shape = tuple(int(size) for size in shape)
        if not nearest:
            smaller = [min(old, new) for old, new in zip(low_DHW.shape, self.shape, strict=True)]
            low_DHW = resize_tensor(torch.from_numpy(low_DHW)[None, None], smaller)[0, 0].numpy()
        self._low_DHW = low_DHW
        taps = _nearest if nearest else _linear
        self._taps = [taps(old, new) for old, new in zip(low_DHW.shape, self.shape, strict=True)]

    def logits(self, box: Box) -> np.ndarray:
        """Float32, the part of the volume inside the box."""
        part = box_slices(box)
        logits_DHW = np.empty([voxels.stop - voxels.start for voxels in part], np.float32)
        for place, plane_HW in enumerate(self._planes(part)):
            logits_DHW[place] = plane_HW
        return logits_DHW

    def mask(self, threshold: float) -> np.ndarray:
        """Bool (D,H,W), on the volume's grid."""
        mask_DHW = np.zeros(self.shape, bool)
        above_DHW = binary(self._low_DHW, threshold)
        if not above_DHW.any():
            return mask_DHW
        box = box_of(above_DHW)
        d, h, w = (axis.within(low, high) for axis, low, high in zip(self._taps, box[:3], box[3:], strict=True))
        for place, plane_HW in enumerate(self._planes((d, h, w)), start=d.start):
            mask_DHW[place, h, w] = binary(plane_HW, threshold)
        return mask_DHW

    def _planes(self, part: tuple[slice, slice, slice]) -> Iterator[np.ndarray]:
        """The volume's slices of `part`, one after the other."""
        deep, high, wide = (axis.part(voxels) for axis, voxels in zip(self._taps, part, strict=True))
        if not len(deep.first):
            return
        start = int(deep.first[0])
        low_DHW = wide.mix(high.mix(self._low_DHW[start : int(deep.second[-1]) + 1], 1), 2)
        for first, second, share in zip(deep.first - start, deep.second - start, deep.share, strict=True):
            plane_HW = low_DHW[second] - low_DHW[first]
            plane_HW *= share
            plane_HW += low_DHW[first]
            yield plane_HW


class Certain:
    """A mask that is already known. mask_DHW: bool, on the volume's grid."""

    def __init__(self, mask_DHW: np.ndarray) -> None:
        self.shape, self._mask_DHW = mask_DHW.shape, mask_DHW

    def logits(self, box: Box) -> np.ndarray:
        """Float32, SURE inside the mask and its negative outside, for the part inside the box."""
        return np.where(self._mask_DHW[box_slices(box)], np.float32(SURE), np.float32(-SURE))

    def mask(self, threshold: float) -> np.ndarray:
        """The mask itself, whatever the threshold."""
        return self._mask_DHW
