"""What zooming in starts from: logits on the volume's grid, computed only for the voxels that are read.

1. `CoarseLogits` holds the zoom-out's logits at the model's input shape: a few MB, however large the volume.
2. `logits(box)` interpolates the part inside a box to the volume's grid, slice by slice.
3. `mask(threshold)` interpolates only around what exceeds the threshold at the input shape: no interpolated value
   exceeds its highest neighbour.
4. `KnownMask` takes its place when a mask is refined.

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
from segvol_pl.imaging.transforms import crop, resize_image, resize_tensor

Logits = TypeVar("Logits", np.ndarray, torch.Tensor)

SURE = 10.0
"""Logit of a voxel inside a known mask; its negative outside."""


def logit(probability: float) -> float:
    """The logit of a probability between 0 and 1."""
    return math.log(probability / (1 - probability))


def binary(logits_DHW: Logits, threshold: float) -> Logits:
    """Bool mask of the voxels whose probability exceeds `threshold`; a tensor's mask is on its device."""
    return logits_DHW > logit(threshold)


class BaseLogits(Protocol):
    """What zooming in starts from, and the result outside its windows."""

    shape: tuple[int, ...]

    def logits(self, box: Box) -> np.ndarray:
        """Float32 logits of the part of the volume inside the box (inclusive)."""

    def mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W) on the volume's grid. threshold: a probability."""

    def probabilities(self, start: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Float32 probabilities of `shape` over the window of `extent` voxels at `start`; 0 outside the volume."""


@dataclass(frozen=True, eq=False)
class _Taps:
    """Interpolation along one axis: for each voxel of the volume two coarse voxels, and the weight of the second."""

    first: np.ndarray
    second: np.ndarray
    share: np.ndarray

    def within(self, low: int, high: int) -> slice:
        """The voxels of the volume that are interpolated from any of `low` to `high`."""
        near = np.flatnonzero((self.second >= low) & (self.first <= high))
        return slice(int(near[0]), int(near[-1]) + 1) if near.size else slice(0, 0)

    def part(self, voxels: slice) -> _Taps:
        return _Taps(self.first[voxels], self.second[voxels], self.share[voxels])

    def mix(self, array: np.ndarray, axis: int) -> np.ndarray:
        first = array.take(self.first, axis)
        share = self.share.reshape([-1 if at == axis else 1 for at in range(array.ndim)])
        between: np.ndarray = first + (array.take(self.second, axis) - first) * share
        return between


def _linear_taps(old: int, new: int) -> _Taps:
    """Linear interpolation as by `F.interpolate` without align_corners. Only for axes that grow."""
    return _taps_at((np.arange(new) + 0.5) * (old / new) - 0.5, old)


def _taps_at(place: np.ndarray, old: int) -> _Taps:
    """Linear interpolation at places of an axis of `old` voxels, constant beyond the middles of the outer ones."""
    place = np.clip(place, 0, old - 1)
    first = np.floor(place).astype(np.int64)
    return _Taps(first, np.minimum(first + 1, old - 1), (place - first).astype(np.float32))


def _nearest_taps(old: int, new: int) -> _Taps:
    """torch's nearest neighbour, as published: the voxel under a cell's first corner, not its centre.

    torch computes the index, because its rounding in float32 counts: a corner between two voxels may fall to the first.
    """
    source = torch.arange(old, dtype=torch.float32)[None, None]
    index = F.interpolate(source, size=new, mode="nearest")[0, 0].long().numpy()
    return _Taps(index, index, np.zeros(new, np.float32))


def enlarge(array_DHW: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array on a grid of `shape`, by the published nearest neighbour, see `_nearest_taps`."""
    taps = [_nearest_taps(old, new) for old, new in zip(array_DHW.shape, shape, strict=True)]
    taken_DHW: np.ndarray = array_DHW[np.ix_(*(axis.first for axis in taps))]
    return taken_DHW


class CoarseLogits:
    """The zoom-out's logits.

    Args:
        low_DHW: float32, at the model's input shape.
        shape: voxels (d, h, w) of the volume.
        nearest: interpolate by the published nearest neighbour. Otherwise axes along which the volume is shorter than
            the input are averaged, and the others interpolated linearly.
    """

    def __init__(self, low_DHW: np.ndarray, shape: Sequence[int], nearest: bool) -> None:
        self.shape = tuple(int(size) for size in shape)
        if not nearest:
            smaller = [min(old, new) for old, new in zip(low_DHW.shape, self.shape, strict=True)]
            low_DHW = resize_tensor(torch.from_numpy(low_DHW)[None, None], smaller)[0, 0].numpy()
        self._low_DHW = low_DHW
        taps = _nearest_taps if nearest else _linear_taps
        self._taps = [taps(old, new) for old, new in zip(low_DHW.shape, self.shape, strict=True)]

    def logits(self, box: Box) -> np.ndarray:
        """Float32 logits of the part of the volume inside the box (inclusive)."""
        part = box_slices(box)
        logits_DHW = np.empty([voxels.stop - voxels.start for voxels in part], np.float32)
        for place, plane_HW in enumerate(self._planes(part)):
            logits_DHW[place] = plane_HW
        return logits_DHW

    def mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W) on the volume's grid. threshold: a probability."""
        mask_DHW = np.zeros(self.shape, bool)
        above_DHW = binary(self._low_DHW, threshold)
        if not above_DHW.any():
            return mask_DHW
        box = box_of(above_DHW)
        d, h, w = (axis.within(low, high) for axis, low, high in zip(self._taps, box[:3], box[3:], strict=True))
        for place, plane_HW in enumerate(self._planes((d, h, w)), start=d.start):
            mask_DHW[place, h, w] = binary(plane_HW, threshold)
        return mask_DHW

    def probabilities(self, start: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Float32 probabilities of `shape` over the window of `extent` voxels at `start`; 0 outside the volume."""
        sampled_DHW, inside_DHW = self._low_DHW, np.ones((1, 1, 1), bool)
        axes = zip(start, extent, shape, self._low_DHW.shape, self.shape, strict=True)
        for axis, (first, size, count, old, full) in enumerate(axes):
            place = first + (np.arange(count) + 0.5) * (size / count)
            sampled_DHW = _taps_at(place * (old / full) - 0.5, old).mix(sampled_DHW, axis)
            within = (place > 0) & (place < full)
            inside_DHW = inside_DHW & within.reshape([-1 if at == axis else 1 for at in range(3)])
        likely_DHW: np.ndarray = np.where(inside_DHW, 1 / (1 + np.exp(-sampled_DHW)), 0).astype(np.float32)
        return likely_DHW

    def _planes(self, part: tuple[slice, slice, slice]) -> Iterator[np.ndarray]:
        """Float32 logits of `part`, slice by slice."""
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


class KnownMask:
    """A mask found before, as logits. mask_DHW: bool, on the volume's grid."""

    def __init__(self, mask_DHW: np.ndarray) -> None:
        self.shape, self._mask_DHW = mask_DHW.shape, mask_DHW

    def logits(self, box: Box) -> np.ndarray:
        """Float32 logits of the part inside the box (inclusive): SURE inside the mask, its negative outside."""
        return np.where(self._mask_DHW[box_slices(box)], np.float32(SURE), np.float32(-SURE))

    def mask(self, threshold: float) -> np.ndarray:
        """The mask, at every threshold."""
        return self._mask_DHW

    def probabilities(self, start: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        """Float32 shares of `shape` that are inside the mask, over the window of `extent` voxels at `start`."""
        return resize_image(crop(self._mask_DHW, start, extent), shape)
