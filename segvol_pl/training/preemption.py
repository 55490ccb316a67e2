"""Preemption: a signal sets a flag; all ranks agree between two steps, save a checkpoint and requeue the job.

1. SIGUSR1 (sent by SLURM before the time limit, see `--signal`) and SIGTERM only set a flag.
2. Between two steps, and between two validation batches, the ranks exchange over the CPU whether any of them was
   signalled; rank 0 adds whether a checkpoint is due by its clock. A signal cuts a validation short.
3. If any was signalled, all ranks save the checkpoint together, rank 0 requeues the job in SLURM, and all end. Before
   the first step there is nothing to save.

A further signal while saving has no effect. The next start of the same command resumes from the checkpoint.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from segvol_pl.errors import SIGNALLED
from segvol_pl.slurm_job import queue_again
from segvol_pl.training import loggers
from segvol_pl.training.checkpoints import Checkpoints, writer
from segvol_pl.training.ranks import host_group
from segvol_pl.training.recorder import Recorder

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignal:
    """Record the first signal received within its block. The handler does nothing else."""

    def __init__(self) -> None:
        self.received = 0
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Replace the current handlers of the signals."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


class Preemption(pl.Callback):
    """Save and end the run between two steps once any rank was signalled. Marks in `checkpoints` that a save is due.

    Exits with 128 + the signal's number. In a SLURM job, if `requeue` is set, the job is requeued.
    """

    def __init__(self, stop: StopSignal, checkpoints: Checkpoints, requeue: bool, recorder: Recorder) -> None:
        self.stop, self.checkpoints, self.requeue, self.recorder = stop, checkpoints, requeue, recorder

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Lightning has just installed its own handler of SIGTERM, which communicates with other ranks in mid-step.
        self.stop.install()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int, loader: int = 0
    ) -> None:
        # SLURM's notice may be shorter than a validation.
        if number := self._agree(trainer):
            self._end(trainer, number)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stop.install()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        # Not at the step's end: its metrics are logged only after that.
        number = 0 if index % trainer.accumulate_grad_batches else self._agree(trainer)
        if number:
            self._end(trainer, number)

    def _agree(self, trainer: pl.Trainer) -> int:
        """The signal that any rank received, or 0. Sets `checkpoints.wanted` if rank 0 finds a checkpoint due."""
        due = trainer.is_global_zero and self.checkpoints.overdue()
        flags = torch.tensor([self.stop.received, int(due)])
        if trainer.world_size > 1:
            # Over NCCL the host would wait for the GPU in every step.
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=host_group())
        self.checkpoints.wanted = bool(flags[1])
        return int(flags[0])

    def _end(self, trainer: pl.Trainer, number: int) -> None:
        name, step = signal.Signals(number).name, trainer.global_step
        begun = trainer.state.fn == TrainerFn.FITTING
        if begun:
            trainer.save_checkpoint(self.checkpoints.last)
            with self.recorder.saving():
                writer(trainer).wait()
        # Before the job is queued again: SLURM then ends this process.
        self.recorder.failed(SystemExit(SIGNALLED + number))
        if trainer.is_global_zero:
            loggers.finish(trainer.loggers, preempted=True)
            again = self.requeue and queue_again()
            after = "requeued" if again else "run the same command to resume"
            saved = f"saved step {step} to {self.checkpoints.last}" if begun else "nothing to save yet"
            log.info("%s: %s, %s", name, saved, after)
        trainer.strategy.barrier()
        raise SystemExit(SIGNALLED + number)
