"""Collate samples into a batch that goes from a loader process to the training process in one piece.

torch sends a file descriptor for every tensor, which costs half a millisecond each. A `SharedBatch` holds all arrays of
a batch in one buffer of shared memory: samples are stacked directly into it, and one descriptor is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

ALIGNMENT = 64
"""Bytes: every array begins at a multiple, for vector instructions."""

Arrays = dict[str, np.ndarray]

Layout = list[tuple[str, str, tuple[int, ...], int]]
"""Name, numpy dtype, shape and first byte of each array."""


class SharedBatch(dict[str, Tensor]):
    """A batch, by name; its tensors are views of `buffer`, uint8. Unpickled, it is a plain dict of such views."""

    def __init__(self, buffer: Tensor, layout: Layout) -> None:
        super().__init__(opened(buffer, layout))
        self.buffer, self.layout = buffer, layout

    def __reduce__(self) -> Any:
        return opened, (self.buffer, self.layout)


def opened(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The arrays in the buffer, by name."""
    return {name: torch.from_numpy(view) for name, view in _views(buffer, layout).items()}


def stacked(samples: Sequence[Arrays], names: dict[str, str], common: Arrays) -> dict[str, Tensor]:
    """Stack the samples' arrays along a new first axis.

    Args:
        samples: an array that only some samples hold is stacked over those.
        names: name of a sample's array -> its name in the batch.
        common: arrays that belong to the batch, not to one sample; they are copied.

    Returns:
        In a loader process a `SharedBatch`, else a plain dict.
    """
    held = {name: [sample[name] for sample in samples if name in sample] for name in names}
    shapes = {names[name]: (arrays[0].dtype, (len(arrays), *arrays[0].shape)) for name, arrays in held.items()}
    layout, size = _laid_out({**shapes, **{name: (array.dtype, array.shape) for name, array in common.items()}})
    buffer = _buffer(size)
    views = _views(buffer, layout)
    for name, arrays in held.items():
        np.stack(arrays, out=views[names[name]])
    for name, array in common.items():
        views[name][...] = array
    # Elsewhere nothing is transferred, and every library can copy a plain dict.
    return opened(buffer, layout) if get_worker_info() is None else SharedBatch(buffer, layout)


def identity_collate(batch: Any) -> Any:
    """The `collate_fn` of a DataLoader whose items are batches already; torch's own would take them apart."""
    return batch


def _buffer(size: int) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As in torch's own collation: `share_memory_` would copy.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def _laid_out(shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> tuple[Layout, int]:
    """Where each array lies, and the size of the buffer in bytes."""
    layout, size = [], 0
    for name, (dtype, shape) in shapes.items():
        layout.append((name, dtype.str, shape, size))
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return layout, size


def _views(buffer: Tensor, layout: Layout) -> dict[str, np.ndarray]:
    return {name: np.ndarray(shape, dtype, buffer.numpy().data, offset) for name, dtype, shape, offset in layout}
