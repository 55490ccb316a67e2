"""Callbacks that follow a run: position in the data, damaged samples, throughput, profile, validation loss."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import psutil
import torch

from segvol_pl.atomic import atomic_path
from segvol_pl.config import PretrainConfig, RunConfig, TrainConfig
from segvol_pl.device import uses_bf16
from segvol_pl.planning import flops
from segvol_pl.planning.devices import accelerator
from segvol_pl.training.module import Task
from segvol_pl.training.ranks import gathered

log = logging.getLogger(__name__)


class StreamPosition(pl.Callback):
    """Advance the DataModule's position in the data after each batch, so that checkpoints hold it."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        trainer.datamodule.seen = trainer.datamodule.drawn  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning derives the end of a step from its count of micro-batches, whose number per step may have changed.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        done = checkpoint["global_step"] * trainer.accumulate_grad_batches
        for part in ("total", "current"):
            progress[part] = dict.fromkeys(progress[part], done)


class DataHealth(pl.Callback):
    """Log damaged samples every `every` steps, and end the run if they exceed `bound`, a share of the corpus.

    Metrics: `data/damaged`, damaged samples that any rank has met since the run's first start, and `data/replaced`,
    how often one was replaced since this start. All ranks check together, so that all end together; a single rank
    checks at every step. Raises ShardError.
    """

    def __init__(self, every: int, bound: float) -> None:
        self.every, self.bound = every, bound

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        due = trainer.global_step % self.every == 0 and (index + 1) % trainer.accumulate_grad_batches == 0
        if due or trainer.world_size == 1:
            self._check(trainer, module, due)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, due: bool) -> None:
        health = trainer.datamodule.health  # type: ignore[attr-defined]
        unreported, replaced = len(health.unreported), health.replaced
        # A single rank has no other to ask, so that checking at every step does not synchronise with the GPU.
        if trainer.world_size > 1:
            counts = torch.tensor([unreported, replaced], dtype=torch.float64, device=module.device)
            unreported, replaced = (int(count) for count in trainer.strategy.reduce(counts, reduce_op="sum"))
        if unreported:
            for found in gathered(health.take_unreported(), trainer.world_size):
                health.merge(found)
        if due:
            metrics: dict[str, float] = {"data/damaged": len(health.damaged), "data/replaced": replaced}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        health.check(self.bound)


@dataclass(frozen=True)
class Load:
    """The work of one training step."""

    volumes: int
    """Volumes of a step, over all ranks."""
    pairs: int = 0
    """(volume, category) pairs of one volume; 0 in pre-training."""
    operations: int = 0
    """Floating-point operations per volume, see `flops`; 0 if unknown."""
    peak: float = 0.0
    """Peak operations per second of one device; 0 if unknown."""

    @classmethod
    def of(cls, config: PretrainConfig | TrainConfig, device: torch.device) -> Load:
        """The load of a run. Operations are 0 (unknown) if parts are frozen."""
        operations, pairs = flops.total(flops.volume_work(config)).total, 0
        if isinstance(config, TrainConfig):
            pairs = config.prompts.categories_per_volume
            # What a frozen part saves depends on its place in the model.
            operations = 0 if config.freeze or config.adapted else operations
        return cls(config.data.global_batch, pairs, operations, peak_rate(config.run, device))


def peak_rate(run: RunConfig, device: torch.device) -> float:
    """Peak operations per second: `run.peak_tflops`, or that of a known accelerator in bf16; 0 if unknown."""
    if run.peak_tflops or device.type != "cuda" or not uses_bf16(device, run.precision):
        return run.peak_tflops * 1e12
    known = accelerator(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known else 0.0


class Clock:
    """Times between marks. On a GPU measured by CUDA events, without synchronising until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[Any] = []

    def mark(self) -> None:
        """Record the current time; on a GPU the time at which its stream gets here."""
        if self.device.type != "cuda":
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.moments.append(event)

    def seconds(self) -> list[float]:
        """Seconds between successive marks; waits for the last one."""
        if self.device.type != "cuda":
            return [after - before for before, after in pairwise(self.moments)]
        if self.moments:
            self.moments[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self.moments)]


@dataclass(frozen=True)
class Interval:
    """What this rank measured over the steps since it last logged: means, seconds a step."""

    step: float
    waited: float
    """Of it, waiting for data."""


class Throughput(pl.Callback):
    """Log throughput and memory every `every` steps, and write one progress line.

    Metrics under `rate/`: volumes_per_s and pairs_per_s ((volume, category) pairs) over all ranks; data_wait, the share
    of time spent waiting for data (0 to 1); step_p50_s and step_p95_s; tflops, achieved by one device; mfu, its share
    of the peak; memory_gib. Unknown ones, see `Load`, are left out.

    Waiting for data is the time between the end of a step and the arrival of the next batch. On a GPU it is measured on
    the GPU: what the host waits while the GPU still computes costs nothing.
    """

    def __init__(self, every: int, load: Load) -> None:
        self.every, self.load = every, load
        self.last = Interval(0.0, 0.0)
        self.restart(torch.device("cpu"))

    def restart(self, device: torch.device) -> None:
        """Begin to measure."""
        self.since = time.perf_counter()
        self.clock, self.arrivals = Clock(device), Clock(device)
        """Ends of steps; by turns the end of a micro-batch and the arrival of the next."""
        self.clock.mark()
        self.arrivals.mark()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.restart(module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.arrivals.mark()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.arrivals.mark()
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        self.clock.mark()
        if trainer.global_step % self.every == 0:
            self._report(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Validation is not training time.
        self.restart(module.device)

    def _report(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seconds = self.clock.seconds()
        elapsed = time.perf_counter() - self.since
        waited = sum(self.arrivals.seconds()[::2])
        self.last = Interval(elapsed / len(seconds), waited / len(seconds))
        metrics = self.rates(seconds, elapsed, waited, trainer.world_size)
        for logger in trainer.loggers:
            logger.log_metrics({f"rate/{name}": value for name, value in metrics.items()}, step=trainer.global_step)
        if trainer.is_global_zero:
            assert isinstance(module, Task)
            loss = module.means.latest["loss"]
            left = (trainer.max_steps - trainer.global_step) * elapsed / len(seconds)
            head = f"step {trainer.global_step}/{trainer.max_steps}  loss {loss:.4f}"
            log.info("%s  %s  %.0f s left", head, progress(metrics), left)
        self.restart(module.device)

    def rates(self, seconds: list[float], elapsed: float, waited: float, ranks: int) -> dict[str, float]:
        """Compute the metrics of the last steps.

        Args:
            seconds: duration of each step, s.
            elapsed: duration of all of them, including waiting for data, s.
            waited: of it, waiting for data, s.
            ranks: number of ranks.
        """
        volumes = len(seconds) * self.load.volumes / elapsed
        achieved = volumes * self.load.operations / ranks
        low, high = (float(np.percentile(seconds, share)) for share in (50, 95))
        found = {
            "volumes_per_s": volumes,
            "pairs_per_s": volumes * self.load.pairs,
            "data_wait": waited / elapsed,
            "step_p50_s": low,
            "step_p95_s": high,
            "tflops": achieved / 1e12,
            "mfu": achieved / self.load.peak if self.load.peak else 0.0,
            "memory_gib": peak_memory(self.clock.device),
        }
        unknown = {"pairs_per_s": self.load.pairs, "tflops": achieved, "mfu": found["mfu"]}
        return {name: value for name, value in found.items() if unknown.get(name, 1)}


def progress(rates: dict[str, float]) -> str:
    """Format the rates for the progress line."""
    parts = [f"{rates['volumes_per_s']:.1f} volumes/s", f"data wait {100 * rates['data_wait']:.0f} %"]
    if "mfu" in rates:
        parts.append(f"MFU {100 * rates['mfu']:.1f} %")
    return "  ".join([*parts, f"{rates['memory_gib']:.1f} GiB"])


class Profile(pl.Callback):
    """Profile `steps` steps after a warm-up with torch's profiler, into the Chrome trace `folder`/profile.json."""

    WARM_UP = 5

    def __init__(self, steps: int, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.profiler: torch.profiler.profile | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            when = torch.profiler.schedule(wait=self.WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
            self.profiler = torch.profiler.profile(schedule=when, on_trace_ready=self._write)
            self.profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.profiler is not None:
            self.profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        with atomic_path(self.folder / "profile.json") as part:
            profiler.export_chrome_trace(str(part))
        log.info("profile: %s", self.folder / "profile.json")


def peak_memory(device: torch.device) -> float:
    """Peak memory of torch on the GPU, or the current resident memory of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class ValidationLine(pl.Callback):
    """Write one log line per validation. averaged: whether it uses the averaged weights (`optim.ema`)."""

    def __init__(self, averaged: bool = False) -> None:
        self.averaged = averaged

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            of = " of the averaged weights" if self.averaged else ""
            log.info(
                "step %d  validation loss %.4f%s", trainer.global_step, float(trainer.callback_metrics["val/loss"]), of
            )
