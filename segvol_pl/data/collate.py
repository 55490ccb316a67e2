"""A batch that travels from a loader process to the training process as one piece.

torch sends every tensor by a file descriptor of its own, which costs half a millisecond each. A `SharedBatch` holds the
arrays of a batch in one buffer of shared memory: samples are stacked straight into it, and one descriptor is sent.
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
"""Bytes: every array begins at a multiple, as vector instructions like it."""

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
    """The arrays that lie in the buffer."""
    return {name: torch.from_numpy(view) for name, view in _views(buffer, layout).items()}


def stacked(samples: Sequence[Arrays], names: dict[str, str], common: Arrays) -> dict[str, Tensor]:
    """The samples' arrays stacked along a new first axis, and what is `common` to all as it is.

    `names` gives each of the samples' arrays its name in the batch; one that some samples alone hold is stacked over
    those. In a loader process the batch is a `SharedBatch`.
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
    # Elsewhere nothing travels, and a plain dict is what every library knows to copy.
    return opened(buffer, layout) if get_worker_info() is None else SharedBatch(buffer, layout)


def identity_collate(batch: Any) -> Any:
    """The `collate_fn` of a DataLoader whose batches are shared batches: torch's own would take them apart."""
    return batch


def _buffer(size: int) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(size, dtype=torch.uint8)
    # As torch's own collation does: `share_memory_` would copy.
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))


def _laid_out(shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> tuple[Layout, int]:
    """Where each array lies, and the bytes of all."""
    layout, size = [], 0
    for name, (dtype, shape) in shapes.items():
        layout.append((name, dtype.str, shape, size))
        size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return layout, size


def _views(buffer: Tensor, layout: Layout) -> dict[str, np.ndarray]:
    return {name: np.ndarray(shape, dtype, buffer.numpy().data, offset) for name, dtype, shape, offset in layout}
