"""What is watched while a run goes: the position in the data, and the rate."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

log = logging.getLogger(__name__)


class StreamPosition(pl.Callback):
    """Tells the DataModule how many samples have been used, so that checkpoints hold the position in the data."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        trainer.datamodule.seen = int(batch["seen"])  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning counts micro-batches to tell where a step ends; this run may have another number of them a step.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for part in ("total", "current"):
            progress[part] = dict.fromkeys(progress[part], done)


class DataHealth(pl.Callback):
    """Every `every` steps (each step of a single rank): damaged samples over all ranks, logged and held to the bound.

    Logs `data/damaged` (samples of the corpus, counted by each rank that met them) and `data/replaced` (draws). All
    ranks ask together, so that all of them end together. Raises ShardError beyond `bound`.
    """

    def __init__(self, every: int, bound: float) -> None:
        self.every, self.bound = every, bound

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        due = trainer.global_step % self.every == 0 and (index + 1) % trainer.accumulate_grad_batches == 0
        if due or trainer.world_size == 1:
            self._ask(trainer, module, due)

    def _ask(self, trainer: pl.Trainer, module: pl.LightningModule, due: bool) -> None:
        health = trainer.datamodule.health  # type: ignore[attr-defined]
        counts = torch.tensor([len(health.rows), health.replaced], dtype=torch.float64, device=module.device)
        damaged, replaced = (int(count) for count in trainer.strategy.reduce(counts, reduce_op="sum"))
        if due:
            for logger in trainer.loggers:
                logger.log_metrics({"data/damaged": damaged, "data/replaced": replaced}, step=trainer.global_step)
        health.check(damaged, self.bound)


class Throughput(pl.Callback):
    """Every `every` steps: volumes/s over all ranks, share of time that the step waited for data, peak memory.

    Logs `rate/volumes_per_s`, `rate/data_wait` (0 to 1) and `rate/memory_gib`, and writes one progress line.
    """

    def __init__(self, every: int, global_batch: int) -> None:
        self.every, self.global_batch = every, global_batch
        self._restart()

    def _restart(self) -> None:
        self.since = self.ended = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.ended = time.perf_counter()
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        self.steps += 1
        if trainer.global_step % self.every == 0:
            self._report(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Validation is not training time: the rate starts anew behind it.
        self._restart()

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        elapsed = self.ended - self.since
        volumes = self.steps * self.global_batch / elapsed
        metrics = {
            "rate/volumes_per_s": volumes,
            "rate/data_wait": self.waited / elapsed,
            "rate/memory_gib": peak_memory(),
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        loss = float(trainer.callback_metrics.get("train/loss", torch.nan))
        left = (trainer.max_steps - trainer.global_step) * elapsed / self.steps
        line = "step %d/%d  loss %.4f  %.1f volumes/s  data wait %.0f %%  %.1f GiB  %.0f s left"
        rates = (volumes, 100 * metrics["rate/data_wait"], metrics["rate/memory_gib"], left)
        if trainer.is_global_zero:
            log.info(line, trainer.global_step, trainer.max_steps, loss, *rates)
        self._restart()


def peak_memory() -> float:
    """GiB: the most that torch held on the GPU, or what this process holds now on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class ValidationLine(pl.Callback):
    """One line per validation."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            log.info("step %d  validation loss %.4f", trainer.global_step, float(trainer.callback_metrics["val/loss"]))
