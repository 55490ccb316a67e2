"""Resizing, cropping and augmenting volumes: one set of transforms for packing, training and inference.

1. `resize_image` and `resize_label` make the overview of a volume.
2. `window_around` and `grid_starts` place windows at native resolution; `crop` makes them, in the steps
   `window_slices` and `padded`.
3. `flip` and `sample_intensity` augment; they draw from the sample's own rng.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F


class Sliceable(Protocol):
    """A numpy array, or an encoded array that decodes only the requested slice."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,H,W)."""

    @property
    def dtype(self) -> Any:
        """As numpy names it."""

    def __getitem__(self, key: Any) -> np.ndarray: ...


NO_SHIFT = -0.0
"""Adding it changes no number at all; adding 0.0 would turn -0.0 into 0.0."""


def resize_tensor(image_BCDHW: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Resize (B,C,D,H,W) to (D,H,W) `shape`: area average along axes that shrink, linear along axes that grow.

    The extents of old and new grid coincide, not the centres of their corner voxels.
    """
    target = tuple(int(size) for size in shape)
    shrunk = tuple(min(old, new) for old, new in zip(image_BCDHW.shape[2:], target, strict=True))
    if shrunk != tuple(image_BCDHW.shape[2:]):
        image_BCDHW = F.interpolate(image_BCDHW, size=shrunk, mode="area")
    if target != shrunk:
        image_BCDHW = F.interpolate(image_BCDHW, size=target, mode="trilinear", align_corners=False)
    return image_BCDHW


def resize_image(array_DHW: Sliceable, shape: Sequence[int]) -> np.ndarray:
    """Resize to float32 of `shape`, see `resize_tensor`. Only a few slices of a large volume are in memory at once."""
    deep = min(array_DHW.shape[0], int(shape[0]))
    smaller = [min(old, int(new)) for old, new in zip(array_DHW.shape[1:], shape[1:], strict=True)]
    slabs = [resize_tensor(_tensor(array_DHW[slab]), (1, *smaller)) for slab in _slabs(array_DHW.shape[0], deep)]
    return resize_tensor(torch.cat(slabs, dim=2), shape)[0, 0].numpy()


def _tensor(array_DHW: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array_DHW, dtype=np.float32))[None, None]


def _slabs(source: int, target: int) -> list[slice]:
    """For each of `target` <= `source` cells, return the source cells whose area average it is."""
    return [slice(cell * source // target, -((cell + 1) * source // -target)) for cell in range(target)]


def nearest_index(source: int, target: int) -> np.ndarray:
    """Return for each of `target` cells the source cell under its centre ('nearest-exact')."""
    index = np.floor((np.arange(target) + 0.5) * (source / target)).astype(np.int64)
    places: np.ndarray = np.minimum(index, source - 1)
    return places


def resize_label(array_DHW: Sliceable, shape: Sequence[int]) -> np.ndarray:
    """Resize labels or region ids to `shape` by nearest neighbour; the dtype is kept."""
    indices = [nearest_index(old, new) for old, new in zip(array_DHW.shape, shape, strict=True)]
    return np.ascontiguousarray(array_DHW[np.ix_(*indices)])


def window_around(centre: Sequence[int], window: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the start of a window around `centre`, inside the volume; 0 along axes shorter than the window.

    Args:
        centre: Voxel (d, h, w).
        window: Size of the window.
        shape: Shape of the volume.
    """
    starts = [
        int(np.clip(middle - size // 2, 0, max(extent - size, 0)))
        for middle, size, extent in zip(centre, window, shape, strict=True)
    ]
    return starts[0], starts[1], starts[2]


def grid_starts(low: int, extent: int, size: int, overlap: float) -> list[int]:
    """First voxels, along one axis, of windows of `size` over the `extent` voxels from `low` on."""
    if extent <= size:
        return [low]
    step = max(int(size * (1 - overlap)), 1)
    count = math.ceil((extent - size) / step) + 1
    return [low + min(index * step, extent - size) for index in range(count)]


def crop(array_DHW: Sliceable, start: Sequence[int], window: Sequence[int], fill: int = 0) -> np.ndarray:
    """Return the window at `start`. Where the volume is shorter, it is padded with `fill` at the far end."""
    return padded(np.asarray(array_DHW[window_slices(start, window, array_DHW.shape)]), window, fill)


def window_slices(start: Sequence[int], window: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the part of a volume of this shape that is in the window at `start`."""
    return tuple(
        slice(first, min(first + size, extent)) for first, size, extent in zip(start, window, shape, strict=True)
    )


def padded(part_DHW: np.ndarray, window: Sequence[int], fill: int = 0) -> np.ndarray:
    """Return the part of a window, padded with `fill` at the far end to the window's size."""
    missing = [(0, size - have) for size, have in zip(window, part_DHW.shape, strict=True)]
    return np.pad(part_DHW, missing, constant_values=fill) if any(after for _, after in missing) else part_DHW


def flip(arrays: dict[str, np.ndarray], probability: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Flip all arrays in the same way, along each of their last three axes with `probability`."""
    axes = tuple(axis - 3 for axis in range(3) if rng.random() < probability)
    if not axes:
        return arrays
    # Copies: all that is computed from a flipped view takes longer, some of it several times.
    return {name: np.ascontiguousarray(np.flip(array, axes)) for name, array in arrays.items()}


def sample_intensity(probability: float, rng: np.random.Generator) -> tuple[float, float]:
    """Draw scale and shift as published: up to +-10 % and +-0.1, each with `probability`, else 1 and `NO_SHIFT`."""
    scaled, shifted = rng.random(2) < probability
    scale, shift = rng.uniform(-0.1, 0.1, size=2)
    return 1 + float(scale) if scaled else 1.0, float(shift) if shifted else NO_SHIFT
