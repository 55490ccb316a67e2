"""The exponential average of the trained weights (`optim.ema`): kept by the optimizer, used by validation.

1. After each step of AdamW a hook moves the averages towards the weights. They begin as the weights after the first
   step.
2. They are part of the optimizer's state, next to its moments: a strategy splits, saves and loads them as it does
   those.
3. `AveragedValidation` exchanges them with the weights while a validation runs.

Neither torch's `AveragedModel` nor Lightning's `WeightAveraging` serves here: both copy the module, which FSDP2
refuses, keep a complete average on every rank, and know nothing of the optimizer's copy of the weights under ZeRO.

A step that is skipped because of NaN counts as a step with unchanged weights; under DeepSpeed it does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from segvol_pl.model.checkpoint import EMA, EMA_NAMES
from segvol_pl.training.parameter_groups import parameter_groups


def keep_averages(optimizer: Optimizer, decay: float) -> None:
    """Let the optimizer average its weights after each step. decay: share of an average that a step keeps."""
    optimizer.register_step_post_hook(functools.partial(_follow, decay))


@torch.no_grad()
def _follow(decay: float, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    begun = list(_pairs(optimizer))
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        state = optimizer.state.get(weight)
        # A weight that has had no gradient so far has no state: it has not moved.
        if state and EMA not in state:
            state[EMA] = weight.detach().clone()
    if begun:
        weights, averages = zip(*begun, strict=True)
        torch._foreach_lerp_(averages, weights, 1 - decay)


def _pairs(optimizer: Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Each weight that has an average, and the average: what this rank holds of them."""
    for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
        state = optimizer.state.get(weight, {})
        if EMA in state:
            yield held(weight), held(state[EMA])


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard of a DTensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def exchange(optimizer: Optimizer) -> None:
    """Exchange the values of weights and averages. Called twice, it changes nothing."""
    for weight, average in _pairs(optimizer):
        before = weight.clone()
        weight.copy_(average)
        average.copy_(before)


class AveragedValidation(pl.Callback):
    """Validate the averaged weights, and note in checkpoints which weight each average belongs to."""

    def __init__(self) -> None:
        self.validating = False
        """Whether the averages are in the place of the weights."""

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Before the first step there are no averages.
        if trainer.state.fn == TrainerFn.FITTING:
            for optimizer in trainer.optimizers:
                module.sharding.use_averages(optimizer)  # type: ignore[operator, union-attr]
            self.validating = True

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.put_back(trainer)

    def put_back(self, trainer: pl.Trainer) -> None:
        """Put the weights back; a signal may end the run in the middle of a validation."""
        if self.validating:
            for optimizer in trainer.optimizers:
                trainer.lightning_module.sharding.use_weights(optimizer)  # type: ignore[operator, union-attr]
            self.validating = False

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        groups = parameter_groups(module, module.optim)  # type: ignore[arg-type]
        checkpoint[EMA_NAMES] = [names[parameter] for group in groups for parameter in group["params"]]
