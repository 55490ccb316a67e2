"""Finds the slow ranks of a run: the others wait for them in every step, so all ranks seem equally slow.

1. Each rank measures what no other rank influences: the forward time of its encoder blocks, within which no rank waits
   for another, and its wait for data. Blocks are measured on the GPU by CUDA events, without synchronising.
2. At every log interval the ranks sum one small table over the CPU, in which each fills its own row.
3. From it each rank's own step time is estimated, see `own_seconds`. A rank slower than `LEAST` of the median rate for
   several intervals in a row is named once, with its host and the cause, and again only after it had recovered.

Under zero3 DeepSpeed gathers weights within blocks: there only the waits for data are compared.
"""

from __future__ import annotations

import logging
import socket
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from segvol_pl.config import RunConfig, Strategy
from segvol_pl.model.image_encoder import Block
from segvol_pl.training.callbacks import Clock, Throughput
from segvol_pl.training.ranks import gathered, host_group

log = logging.getLogger(__name__)

LEAST = 0.8
"""Share of the median rate below which a rank is slow."""
LEAST_FACTOR = 1e-3
STEPS = 50
"""Steps of an interval, the newest, whose blocks are measured."""


@dataclass(frozen=True)
class Measured:
    """One rank over an interval, seconds a step."""

    forward: float
    """Of the encoder blocks, from the median block; 1 on all ranks if it is not compared."""
    waited: float
    """Waiting for data."""
    step: float
    """The complete step, which takes equally long on all ranks."""


@dataclass(frozen=True)
class Compared:
    """The ranks of an interval, in order."""

    own: list[float]
    """Seconds a step would take at this rank's own speed, see `own_seconds`."""
    forward: list[float]
    waited: list[float]
    step: float

    @classmethod
    def of(cls, ranks: Sequence[Measured]) -> Compared:
        """Compare ranks; all must have taken a step."""
        forward, waited = [rank.forward for rank in ranks], [rank.waited for rank in ranks]
        return cls(own_seconds(ranks), forward, waited, statistics.median(rank.step for rank in ranks))

    def rates(self) -> list[float]:
        """The rate of each rank, as a share of the median rate."""
        # Of an even number the faster of the two in the middle: of two ranks it is the other one.
        median = statistics.median_low(self.own)
        return [median / own for own in self.own]

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        wait = max(self.waited) - statistics.median_low(self.waited)
        return {
            "rate/slowest_rank": self.own.index(max(self.own)),
            "rate/step_spread": 1 / min(self.rates()),
            "rate/wait_spread": wait / self.step,
        }

    def cause(self, rank: int) -> str:
        """Say whether a rank is slow by its data or by its computing."""
        wait, forward = statistics.median_low(self.waited), statistics.median_low(self.forward)
        more = self.waited[rank] - wait
        if more >= (self.own[rank] - statistics.median_low(self.own)) / 2:
            return f"by data: it waits {1e3 * self.waited[rank]:.0f} ms a step, the median rank {1e3 * wait:.0f}"
        blocks = f"{1e3 * self.forward[rank]:.0f} ms a step, on the median rank {1e3 * forward:.0f}"
        return f"by computing: its encoder blocks take {blocks}"


def own_seconds(ranks: Sequence[Measured]) -> list[float]:
    """Estimate the seconds of a step that had to wait for no other rank.

    The forward time of the blocks is a part of a rank's computing, the same part on all ranks: own = factor x forward +
    wait for data. The slowest rank waits for no other, so that for it this is the measured step; for all others it is
    less.
    """
    factor = min((rank.step - rank.waited) / rank.forward for rank in ranks)
    # Not 0, though a GPU's wait may round to more than the host's step.
    return [max(factor, LEAST_FACTOR) * rank.forward + rank.waited for rank in ranks]


class Slow:
    """Counts for each rank how long it has been slow, or not; `intervals` in a row change what it counts as."""

    def __init__(self, intervals: int) -> None:
        self.intervals = intervals
        self.named: set[int] = set()
        self.against: dict[int, int] = {}
        """Rank -> intervals in a row that contradict what it counts as."""

    def note(self, rates: Sequence[float]) -> tuple[list[int], list[int]]:
        """Note the rates of an interval, as shares of the median; return the ranks now slow, and those recovered."""
        changed = []
        for rank, rate in enumerate(rates):
            differs = (rate < LEAST) != (rank in self.named)
            self.against[rank] = self.against.get(rank, 0) + 1 if differs else 0
            if self.against[rank] >= self.intervals:
                self.against[rank] = 0
                changed.append(rank)
        self.named ^= set(changed)
        return [rank for rank in changed if rank in self.named], [rank for rank in changed if rank not in self.named]


class Stragglers(pl.Callback):
    """Compare the ranks whenever `throughput` has logged. A single process, or 0 intervals: nothing is done.

    Metrics under `rate/`: slowest_rank; step_spread, the slowest rank's own step time over the median; wait_spread, the
    longest wait for data minus the median, as a share of a step.
    """

    def __init__(self, throughput: Throughput, run: RunConfig) -> None:
        self.throughput, self.every = throughput, run.log_every
        self.slow = Slow(run.straggler_intervals)
        self.in_blocks = run.strategy is not Strategy.zero3
        self.handles: list[RemovableHandle] = []
        self.steps: deque[Clock] = deque(maxlen=STEPS)
        self.current: Clock | None = None
        """Marks of the current step's blocks, begun and ended by turns; None outside of a training step."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size == 1 or not self.slow.intervals:
            return
        if not self.in_blocks:
            log.info("zero3 gathers weights within blocks: of the ranks only the waits for data are compared")
            return
        for block in (part for part in module.modules() if isinstance(part, Block)):
            # Within the hooks of FSDP2, which wait for the weights: they come first, and last.
            self.handles.append(block.register_forward_pre_hook(self._mark))
            self.handles.append(block.register_forward_hook(self._mark, prepend=True))

    def _mark(self, *_: Any) -> None:
        if self.current is not None:
            self.current.mark()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.handles and not index % trainer.accumulate_grad_batches:
            self.current = Clock(module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        if self.current is not None:
            self.steps.append(self.current)
            self.current = None
        if trainer.global_step % self.every == 0 and trainer.world_size > 1 and self.slow.intervals:
            self._compare(trainer)
            # Waiting for the others here is not waiting for data.
            self.throughput.restart(module.device)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # As Throughput, which begins a new interval.
        self.steps.clear()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _measured(self) -> Measured:
        last, forward = self.throughput.last, 1.0
        if self.in_blocks:
            blocks = [seconds for step in self.steps for seconds in step.seconds()[::2]]
            # All blocks do the same work. The median leaves out those during which another process had the core.
            forward = statistics.median(blocks) * len(blocks) / len(self.steps)
        return Measured(forward, last.waited, last.step)

    def _compare(self, trainer: pl.Trainer) -> None:
        own = self._measured()
        self.steps.clear()
        table_R3 = torch.zeros(trainer.world_size, 3, dtype=torch.float64)
        table_R3[trainer.global_rank] = torch.tensor([own.forward, own.waited, own.step])
        dist.all_reduce(table_R3, group=host_group())
        compared = Compared.of([Measured(*row) for row in table_R3.tolist()])
        for logger in trainer.loggers:
            logger.log_metrics(compared.metrics(), step=trainer.global_step)
        # All ranks see the same table, and come to the same result.
        slow, recovered = self.slow.note(compared.rates())
        if slow or recovered:
            hosts = gathered(socket.gethostname(), trainer.world_size)
            if trainer.is_global_zero:
                self._name(trainer.global_step, compared, slow, recovered, hosts)

    def _name(self, step: int, compared: Compared, slow: list[int], recovered: list[int], hosts: list[str]) -> None:
        rates = compared.rates()
        for rank in slow:
            log.warning(
                "step %d: rank %d on %s is slow, for %d log intervals now: its own rate is %.2f of the median, %s",
                *(step, rank, hosts[rank], self.slow.intervals, rates[rank], compared.cause(rank)),
            )
        for rank in recovered:
            recovery = "step %d: rank %d on %s is no longer slow: its own rate is %.2f of the median"
            log.info(recovery, step, rank, hosts[rank], rates[rank])
