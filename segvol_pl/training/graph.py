"""A step's loss and gradients as one CUDA graph: a host that is slow to launch kernels makes one launch per step.

1. The first step with a batch of its shapes runs without recording. The second is recorded, forward and backward pass.
2. From then on each batch is copied into the memory of the recorded one, and the graph is replayed on the current
   weights.
3. `_Handed` passes the computed gradients to autograd, which treats them as those of any loss.

A batch of other shapes, or weights at other addresses, run without recording, and are recorded when they come twice in
a row. All that a step keeps for its backward pass stays in memory until `release`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segvol_pl.data.batch import HOST, Batch
from segvol_pl.errors import ConfigError
from segvol_pl.training.grouped_loss import scaled

Losses = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""batch -> the loss to minimise, (), and its parts by name."""
Like = tuple[Any, ...]
"""Shapes of a batch and addresses of the weights: a recording is valid while these are equal."""


@dataclass(frozen=True)
class Found:
    """Losses and gradients of a step."""

    names: list[str]
    losses_N: Tensor
    """The loss and its parts, float32."""
    gradients: list[Tensor | None]
    """One for each trained weight."""


Record = Callable[[Callable[[], Found]], tuple[Found, Callable[[], Any]]]
"""work -> its result, and a function that repeats the work into the same memory."""


def recorded(work: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
    """Record as a CUDA graph. Raises ConfigError if something in `work` waits for the GPU, as custom parts may."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads continue: they pin the next batches, and write checkpoints.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConfigError(
            f"run.compile: the step cannot be recorded as one CUDA graph ({str(error).splitlines()[0]}): set "
            "run.strategy=ddp, under which its parts are compiled and nothing is recorded"
        ) from error
    return found, graph.replay


@dataclass(frozen=True)
class Recording:
    """A recorded step."""

    like: Like
    batch: Batch
    """Its input."""
    found: Found
    """Its output."""
    again: Callable[[], Any]

    def of(self, batch: Batch) -> Found:
        """Replay the step with another batch."""
        for name, value in self.batch.items():
            value.copy_(batch[name], non_blocking=True)
        self.again()
        return self.found


class StepGraph:
    """`losses` of a module, together with the gradients of its weights. Called like `losses`."""

    def __init__(self, module: nn.Module, losses: Losses, record: Record = recorded) -> None:
        self.module, self.losses, self.record = module, losses, record
        self.before: Like | None = None
        """Of the previous step."""
        self.recording: Recording | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss and its parts; parts are detached."""
        given = {name: value for name, value in batch.items() if name not in HOST}
        like = self._like(given)
        if like == self.before and (self.recording is None or self.recording.like != like):
            self.recording = self._recording(given, like)
        self.before = like
        recording = self.recording
        found = recording.of(given) if recording is not None and recording.like == like else self._found(given)
        loss, parts_N = _Handed.apply(found.losses_N, found.gradients, *self._weights())  # type: ignore[no-untyped-call]
        return loss, dict(zip(found.names, parts_N.unbind(), strict=True))

    def release(self) -> None:
        """Free the memory of the recorded step. The next step is recorded again."""
        self.recording = None

    def _weights(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _like(self, batch: Batch) -> Like:
        shapes = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        held = (*self.module.parameters(), *self.module.buffers())
        return shapes, tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in held)

    def _recording(self, batch: Batch, like: Like) -> Recording:
        self.recording = None
        own = {name: value.clone() for name, value in batch.items()}
        found, again = self.record(lambda: self._found(own))
        return Recording(like, own, found, again)

    def _found(self, batch: Batch) -> Found:
        with aliased(self.module), torch.enable_grad():
            loss, parts = self.losses(batch)
            weights = self._weights()
        # Autocast is for the forward pass alone.
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        losses_N = torch.stack([loss.detach().float(), *(part.detach().float() for part in parts.values())])
        return Found(list(parts), losses_N, list(gradients))


@contextlib.contextmanager
def aliased(module: nn.Module) -> Iterator[None]:
    """Replace the trained weights, for a while, by other tensors that share their memory.

    Autograd moves a weight's gradient to the stream on which the weight was first used, not to that of a recording.
    """
    held = [
        (part, name, weight)
        for part in module.modules()
        for name, weight in part._parameters.items()
        if weight is not None and weight.requires_grad
    ]
    own = {weight: nn.Parameter(weight.detach()) for _, _, weight in held}
    try:
        for part, name, weight in held:
            part._parameters[name] = own[weight]
        yield
    finally:
        for part, name, weight in held:
            part._parameters[name] = weight


class _Handed(torch.autograd.Function):
    """Losses whose gradients are already known."""

    @staticmethod
    def forward(
        ctx: Any, losses_N: Tensor, gradients: Sequence[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*gradients)
        # The next step overwrites these.
        copied_N = losses_N.clone()
        loss, parts_N = copied_N[0].clone(), copied_N[1:]
        ctx.mark_non_differentiable(parts_N)
        return loss, parts_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        return None, None, *scaled(ctx.saved_tensors, grad_loss)
