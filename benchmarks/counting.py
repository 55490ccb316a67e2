"""Kernels that a step launches and bytes that they move, by part of the model, counted without computing anything.

1. The step runs on fake tensors: shapes and types alone, so that the full model with any batch takes seconds.
2. Every operation that reaches a device counts: its launches, and the bytes of its inputs and results. Views, and
   tensors that nobody fills, cost nothing. An expanded tensor is read once.
3. Forward, an operation belongs to the part that calls it; backward, to the part whose gradient it is.

A GPU is imitated on whatever machine this runs: its forms are taken, and norms are float32 under autocast, as there.
What runs between operations is not seen, nor that caches may spare a part of the bytes.
"""

from __future__ import annotations

import bisect
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segvol_pl import kernels
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.model.mask_decoder import TwoWayTransformer, Upscaling
from segvol_pl.model.segvol import Trilinear
from segvol_pl.training import pretrain, segment
from segvol_pl.training.module import Task

FREE = {
    "detach",
    "alias",
    "_unsafe_view",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "device",
}
"""Operations that launch nothing."""
LAUNCHES = 3
"""Of one of our own fused operations, at most."""
GIGA = 1e9
ENCODER, TRANSFORMER, FINE, FINEST, LOSSES, OTHER = PARTS = (
    "encoder",
    "decoder transformer",
    "fine",
    "finest",
    "losses",
    "other",
)


@dataclass
class Counts:
    """Kernels, and bytes moved, by part and name of the operation."""

    kernels: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)

    def of(self, part: str) -> tuple[int, int]:
        """Kernels and bytes of a part."""
        kernels, moved = (
            sum(count for (where, _), count in counter.items() if where == part)
            for counter in (self.kernels, self.moved)
        )
        return kernels, moved


class _OnGPU(TorchFunctionMode):
    """CUDA's autocast computes norms in float32; the CPU's does not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.layer_norm and torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, Tensor) else arg for arg in args]
        return function(*args, **(kwargs or {}))


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.inside = [OTHER]
        self.boundaries: list[tuple[int, str]] = [(0, OTHER)]
        self.latest = OTHER
        self.finest = 0
        """Elements from which on a tensor of the upscaling is one of its finest."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.inside.append(name)
        self._mark()
        try:
            yield
        finally:
            self.inside.pop()
            self._mark()

    def _mark(self) -> None:
        # Nodes of the backward graph are numbered as they are made.
        self.boundaries.append((torch._C._autograd._get_sequence_nr(), self.inside[-1]))

    def _where(self) -> str:
        if torch._C._current_graph_task_id() == -1:
            return self.inside[-1]
        node = torch._C._current_autograd_node()
        if node is not None and not node.name().endswith("AccumulateGrad"):
            place = bisect.bisect_right(self.boundaries, node._sequence_nr(), key=lambda boundary: boundary[0]) - 1
            self.latest = self.boundaries[place][1]
        return self.latest

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if function.is_view or name in FREE:
            return result
        read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values()
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if read or written:
            self._count(function, name, [*read, *written])
        return result

    def _count(self, function: Any, name: str, tensors: list[Tensor]) -> None:
        where = self._where()
        if where == FINE and max(x.numel() for x in tensors) >= self.finest:
            where = FINEST
        moved = sum(_bytes(x) for x in tensors)
        self.counts.kernels[where, name] += LAUNCHES if function.namespace == "segvol" else 1
        self.counts.moved[where, name] += moved


def _bytes(x: Tensor) -> int:
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else 1
    return elements * x.element_size()


def _labelled(counting: _Counting, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with counting.part(name):
            return work(*args, **kwargs)

    return labelled


PLACES: tuple[tuple[Any, str, str], ...] = (
    (ImageEncoder, "patches", ENCODER),
    (ImageEncoder, "encode_patches", ENCODER),
    (TwoWayTransformer, "project_image", TRANSFORMER),
    (TwoWayTransformer, "forward", TRANSFORMER),
    (Upscaling, "forward", FINE),
    (Trilinear, "forward", LOSSES),
    (segment, "mask_losses", LOSSES),
    (segment, "low_mask_losses", LOSSES),
    (pretrain, "simmim_loss", LOSSES),
)
"""Classes or modules, and which of their functions belongs to what part."""


def counted(make: Callable[[], Task], batch: Callable[[], dict[str, Tensor]], together: int) -> Counts:
    """Forward and backward of one micro-batch in bf16 autocast. `together`: prompts in all that a group decodes.

    Task and batch are made within, so that they are fake.
    """
    counting = _Counting()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "INTERPRETED", True))
        stack.enter_context(FakeTensorMode())
        task, volumes = make(), batch()
        model = task.config.model  # type: ignore[attr-defined]
        grid = model.grid
        # Halfway between the fine features of all prompts of a group, and the finest.
        counting.finest = 4 * together * grid[0] * grid[1] * grid[2] * model.hidden_size
        for owner, name, part in PLACES:
            if hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, _labelled(counting, part, getattr(owner, name))))
        stack.enter_context(counting)
        with _OnGPU(), torch.autocast("cpu", torch.bfloat16):
            loss = task.losses(volumes)[0] if isinstance(task, segment.SegVolTask) else task.loss(volumes)  # type: ignore[operator]
        loss.backward()
    return counting.counts
