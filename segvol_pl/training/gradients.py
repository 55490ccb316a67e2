"""The norm of each step's gradients: logged, and steps whose norm is not finite are skipped.

1. A loss that is not finite makes every gradient NaN (`module.poisoned`), so that all ranks see it in the norm.
2. The task passes the norm's finiteness to the optimizer, which then leaves weights and moments unchanged, without
   synchronising with the GPU. DeepSpeed skips such a step itself.
3. `FiniteSteps` reads the norm when a later step begins, names rank and samples, and ends the run beyond the limit.

A skipped step counts: the schedule and the position in the data advance.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segvol_pl.errors import NonFiniteError
from segvol_pl.training.module import Task
from segvol_pl.training.ranks import gathered

log = logging.getLogger(__name__)

LISTED = 8
"""Largest number of samples that a message names."""


def step_norm(trainer: pl.Trainer, module: pl.LightningModule) -> Tensor:
    """Norm of the last step's gradients over all ranks, before clipping, () float32 on the device."""
    deepspeeds = getattr(trainer.strategy.model, "get_global_grad_norm", None)
    if deepspeeds is not None:  # DeepSpeed holds the gradients
        return torch.as_tensor(deepspeeds(), dtype=torch.float32)
    assert isinstance(module, Task) and module.step_norm is not None
    return module.step_norm


class GradientNorm(pl.Callback):
    """Log `train/grad_norm`, before clipping, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step % self.every or (index + 1) % trainer.accumulate_grad_batches:
            return
        for logger in trainer.loggers:
            logger.log_metrics({"train/grad_norm": float(step_norm(trainer, module))}, step=trainer.global_step)


@dataclass(frozen=True)
class Flags:
    """Results of one step: () bool tensors in main memory, valid once `done` has happened."""

    step: int
    bad_step: Tensor
    bad_loss: Tensor
    """Whether a loss of this rank was not finite."""
    keys: list[str]
    """The samples that this rank trained on."""
    done: torch.cuda.Event | None


class FiniteSteps(pl.Callback):
    """Count and report skipped steps. Raises NonFiniteError after more than `allowed` of them in a row.

    Logs `train/skipped_steps`, the number since the run's first start, when it grows.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.skipped = self.in_a_row = 0
        self.pending: deque[Flags] = deque()
        self.bad_loss = torch.tensor(False)
        self.keys: list[str] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        bad = ~outputs["loss"].isfinite()
        self.bad_loss = bad if not self.keys else self.bad_loss | bad
        self.keys = self.keys + trainer.datamodule.batch_keys()  # type: ignore[attr-defined]
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        bad_step, done = (~step_norm(trainer, module).isfinite()).to("cpu", non_blocking=True), None
        bad_loss = self.bad_loss.to("cpu", non_blocking=True)
        if module.device.type == "cuda":
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(module.device))
        self.pending.append(Flags(trainer.global_step, bad_step, bad_loss, self.keys, done))
        self.keys = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        # The GPU is then busy with the step in between, so that reading these flags does not stall it.
        ahead = 1 if module.device.type == "cuda" else 0
        while len(self.pending) > ahead:
            self._look(trainer, self.pending.popleft())

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        while self.pending:
            self._look(trainer, self.pending.popleft())

    def _look(self, trainer: pl.Trainer, flags: Flags) -> None:
        if flags.done is not None:
            flags.done.synchronize()
        if not flags.bad_step:
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        reports = gathered((bool(flags.bad_loss), flags.keys), trainer.world_size)
        what = f"step {flags.step}: {describe(reports)}"
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": self.skipped}, step=flags.step)
        if self.in_a_row > self.allowed:
            raise NonFiniteError(
                f"{what}: more than run.max_bad_steps={self.allowed} such steps in a row; checkpoints are unchanged. "
                "Look at these samples, or try a lower optim.lr, run.precision=fp32 or run.max_bad_steps=3"
            )
        if trainer.is_global_zero:
            log.warning("%s: skipped; %d so far", what, self.skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def describe(reports: list[tuple[bool, list[str]]]) -> str:
    """Say what was not finite, where, and for which samples. reports: (loss is not finite, samples) of each rank."""
    ranks = [rank for rank, (bad_loss, _) in enumerate(reports) if bad_loss]
    keys = [key for rank, (_, keys) in enumerate(reports) for key in keys if rank in ranks or not ranks]
    more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
    samples = f"samples {', '.join(keys[:LISTED])}{more}"
    if not ranks:
        return f"the gradients are not finite, though every loss is ({samples})"
    return f"the loss is not finite on rank {', '.join(map(str, ranks))} ({samples})"
