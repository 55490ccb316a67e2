"""Where zoom-in windows lie: the region of interest around a coarse mask, and the windows that cover it.

1. `region_of` grows the coarse mask's box and includes what the user's box and points reach.
2. `windows_over` covers that region with as few windows of the volume's grid as possible.
3. `Window` cuts arrays.

Boxes are inclusive, voxels are (d, h, w). The published rules are in `published_zoom`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from segvol_pl.imaging.box import Box, box_of, point_boxes, union_box, whole_box
from segvol_pl.imaging.prompts import INSIDE, Prompt
from segvol_pl.imaging.transforms import Sliceable, grid_starts, window_around
from segvol_pl.inference.window_prompts import clip_box, points_inside

Start = tuple[int, int, int]
"""First voxel (d, h, w) of a window."""


@dataclass(frozen=True)
class Window:
    """A zoom-in window: its first voxel, negative where it is padded in front, and the box outside which it is zero."""

    start: Start
    bound: Box

    def slices(self, window_shape: Sequence[int], box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
        """The part of the window inside the box, in voxels counted from `origin`."""
        return tuple(
            slice(max(first, low) - base, min(first + size, high + 1) - base)
            for first, size, low, high, base in zip(self.start, window_shape, box[:3], box[3:], origin, strict=True)
        )

    def box(self, window_shape: Sequence[int]) -> Box:
        """All of its voxels; beyond the volume where it is padded."""
        d, h, w = self.start
        depth, height, width = window_shape
        return d, h, w, d + depth - 1, h + height - 1, w + width - 1

    def cut(self, array_DHW: Sliceable, window_shape: Sequence[int]) -> np.ndarray:
        """The window of a volume, zero outside the bound. It may be a view: do not write into it."""
        inside_DHW = array_DHW[self.slices(window_shape, self.bound, (0, 0, 0))]
        if inside_DHW.shape == tuple(window_shape):
            return inside_DHW
        window_DHW = np.zeros(tuple(window_shape), array_DHW.dtype)
        window_DHW[self.slices(window_shape, self.bound, self.start)] = inside_DHW
        return window_DHW


def region_of(mask_DHW: np.ndarray, prompt: Prompt, window_shape: Sequence[int], reach: float) -> Box:
    """The region of interest: all that zooming in may change. Windows see more than that.

    It holds the coarse mask's box, widened, and what the user's box and points inside the structure reach.

    Args:
        mask_DHW: bool, the coarse mask; not empty.
        prompt: in the volume's voxels.
        window_shape: the model's input, voxels (d, h, w).
        reach: voxels of the overview by which the coarse mask's box is widened.
    """
    boxes = [widened_box(mask_DHW, window_shape, reach)]
    if prompt.box is not None and (inside := clip_box(prompt.box, (0, 0, 0), mask_DHW.shape)) is not None:
        boxes.append(inside)
    points_N3, labels_N = points_inside(prompt, (0, 0, 0), mask_DHW.shape)
    boxes += point_boxes(points_N3[labels_N == INSIDE])
    return union_box(boxes)


def widened_box(mask_DHW: np.ndarray, window_shape: Sequence[int], reach: float) -> Box:
    """The mask's box, widened by `reach` overview voxels, inside the volume. Raises ValueError for an empty mask."""
    box, shape = box_of(mask_DHW), mask_DHW.shape
    margin = [math.ceil(reach * extent / size) for extent, size in zip(shape, window_shape, strict=True)]
    d0, h0, w0 = (max(low - more, 0) for low, more in zip(box[:3], margin, strict=True))
    d1, h1, w1 = (min(high + more, size - 1) for high, more, size in zip(box[3:], margin, shape, strict=True))
    return d0, h0, w0, d1, h1, w1


def windows_over(box: Box, window_shape: Sequence[int], shape: Sequence[int], overlap: float) -> list[Window]:
    """The fewest windows that cover the box; neighbours overlap by at least the share `overlap`.

    They belong to one grid over the volume of `shape`, so that prompts share windows. The last window of the grid ends
    where the volume ends, as in MONAI's sliding window.
    """
    axes = [
        _covering(grid_starts(0, extent, size, overlap), size, low, high)
        for low, high, size, extent in zip(box[:3], box[3:], window_shape, shape, strict=True)
    ]
    return [Window((d, h, w), whole_box(shape)) for d, h, w in product(*axes)]


def windows_around(points_N3: np.ndarray, window_shape: Sequence[int], shape: Sequence[int]) -> list[Window]:
    """Windows with the points in their middle, as far as the volume allows.

    A point in the middle half of an earlier point's window gets none of its own.

    Args:
        points_N3: voxels of the volume, in the order in which they were given.
        window_shape: the model's input, voxels (d, h, w).
        shape: voxels (d, h, w) of the volume.
    """
    starts: list[Start] = []
    for point_3 in points_N3.tolist():
        shifts = [np.abs(np.add(start, np.floor_divide(window_shape, 2)) - point_3) for start in starts]
        if not any((shift_3 <= np.divide(window_shape, 4)).all() for shift_3 in shifts):
            starts.append(window_around(point_3, window_shape, shape))
    return [Window(start, whole_box(shape)) for start in dict.fromkeys(starts)]


def _covering(starts: list[int], size: int, low: int, high: int) -> list[int]:
    """The fewest neighbouring windows that hold `low` to `high`; if one is enough, the one nearest to its middle."""
    first = max(place for place, start in enumerate(starts) if start <= low)
    last = min((place for place, start in enumerate(starts) if start + size > high), default=len(starts) - 1)
    if last > first:
        return starts[first : last + 1]
    return [min(starts[last : first + 1], key=lambda start: abs(2 * start + size - low - high))]
