"""From Hounsfield units to what the model sees: one set of transforms for packing, training and inference.

1. `intensity_of` measures the whole CT once; `normalise` maps HU to [0, 1] by it.
2. `body_box` crops the air away.
3. `resize_image` / `resize_label` make the overview; `window_around` and `crop` make native-resolution windows.
4. `flip` and `sample_intensity` augment, drawing from the sample's own rng.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F


class Sliceable(Protocol):
    """A numpy array, or an encoded one that decodes only the slice asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(D,H,W)."""

    @property
    def dtype(self) -> Any:
        """As numpy names it."""

    def __getitem__(self, key: Any) -> np.ndarray: ...


NO_SHIFT = -0.0
"""Added, it leaves every number as it is; 0.0 would turn -0.0 into 0.0."""


def resize_tensor(image_BCDHW: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Area average along axes that shrink, linear along axes that grow; voxel extents (not centres) coincide."""
    target = tuple(int(size) for size in shape)
    shrunk = tuple(min(old, new) for old, new in zip(image_BCDHW.shape[2:], target, strict=True))
    if shrunk != tuple(image_BCDHW.shape[2:]):
        image_BCDHW = F.interpolate(image_BCDHW, size=shrunk, mode="area")
    if target != shrunk:
        image_BCDHW = F.interpolate(image_BCDHW, size=target, mode="trilinear", align_corners=False)
    return image_BCDHW


def resize_image(array_DHW: Sliceable, shape: Sequence[int]) -> np.ndarray:
    """Float32 array of `shape`, see `resize_tensor`. Only a few slices of a large volume are held at a time."""
    deep = min(array_DHW.shape[0], int(shape[0]))
    smaller = [min(old, int(new)) for old, new in zip(array_DHW.shape[1:], shape[1:], strict=True)]
    slabs = [resize_tensor(_tensor(array_DHW[slab]), (1, *smaller)) for slab in _slabs(array_DHW.shape[0], deep)]
    return resize_tensor(torch.cat(slabs, dim=2), shape)[0, 0].numpy()


def _tensor(array_DHW: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array_DHW, dtype=np.float32))[None, None]


def _slabs(source: int, target: int) -> list[slice]:
    """For each of `target` cells, no more than there are, the source cells that area averaging takes together."""
    return [slice(cell * source // target, -((cell + 1) * source // -target)) for cell in range(target)]


def nearest_index(source: int, target: int) -> np.ndarray:
    """For each of `target` cells the source cell under its centre ('nearest-exact')."""
    index = np.floor((np.arange(target) + 0.5) * (source / target)).astype(np.int64)
    return np.minimum(index, source - 1)


def resize_label(array_DHW: Sliceable, shape: Sequence[int]) -> np.ndarray:
    """Same dtype, nearest neighbour: no label or region id is ever invented."""
    indices = [nearest_index(old, new) for old, new in zip(array_DHW.shape, shape, strict=True)]
    return np.ascontiguousarray(array_DHW[np.ix_(*indices)])


def window_around(centre: Sequence[int], window: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int]:
    """Start of a window that holds `centre` and lies inside the volume; 0 along axes shorter than the window."""
    starts = [
        int(np.clip(middle - size // 2, 0, max(extent - size, 0)))
        for middle, size, extent in zip(centre, window, shape, strict=True)
    ]
    return starts[0], starts[1], starts[2]


def crop(array_DHW: Sliceable, start: Sequence[int], window: Sequence[int], fill: int = 0) -> np.ndarray:
    """The window at `start`, padded at the far end with `fill` where the volume is shorter."""
    slices = tuple(
        slice(first, min(first + size, extent))
        for first, size, extent in zip(start, window, array_DHW.shape, strict=True)
    )
    part = np.asarray(array_DHW[slices])
    missing = [(0, size - have) for size, have in zip(window, part.shape, strict=True)]
    return np.pad(part, missing, constant_values=fill) if any(after for _, after in missing) else part


def flip(arrays: dict[str, np.ndarray], probability: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All arrays flipped alike along each of their last three axes with `probability`."""
    axes = tuple(axis - 3 for axis in range(3) if rng.random() < probability)
    return {name: np.flip(array, axes) for name, array in arrays.items()} if axes else arrays


def sample_intensity(probability: float, rng: np.random.Generator) -> tuple[float, float]:
    """A scale of up to +-10 %, a shift of up to +-0.1, each with `probability`, else 1 and `NO_SHIFT` (published)."""
    scaled, shifted = rng.random(2) < probability
    scale, shift = rng.uniform(-0.1, 0.1, size=2)
    return 1 + float(scale) if scaled else 1.0, float(shift) if shifted else NO_SHIFT
