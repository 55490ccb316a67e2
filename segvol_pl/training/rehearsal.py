"""Rehearses the start of a run of many ranks in one process, without GPUs and without a network: `run.rehearse=512`.

1. Task and data are prepared as by the run itself; the weights are on torch's meta device, without values.
2. The checks of a start follow: run folder, resuming, room for checkpoints, shared memory, open files, batch.
3. torch's fake process group takes the place of the other ranks: the strategy makes its groups and splits the weights
   as on the first rank and as on the last one.
4. The stream's own code gives each rank its samples of an epoch, each of which must come once. The first batches of
   the first and the last rank are read.

A check that fails raises what the start would raise. Nothing is left in the run folder.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from segvol_pl.config import LastBatch, PretrainConfig, RunConfig, Strategy, TrainConfig
from segvol_pl.data.corpus import Corpus
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.stream import BatchPlan, Stream, World
from segvol_pl.errors import ConfigError, StartUpError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.training import startup, strategies
from segvol_pl.training.module import Task
from segvol_pl.training.out_of_memory import check_snapshots
from segvol_pl.training.resume import start_of
from segvol_pl.training.run import prepared
from segvol_pl.training.sharded import local_of

Config = PretrainConfig | TrainConfig

NAMED = 2
"""Samples of a first batch that are named."""
AHEAD = 8
"""Micro-batches of each loader process that are compared with the rank's positions."""


@dataclass(frozen=True)
class Job:
    """A rehearsed run: its configuration, prepared task and data."""

    config: Config
    task: Task
    module: VolumeModule

    @property
    def ranks(self) -> int:
        """Ranks over all nodes."""
        return self.config.run.devices * self.config.run.nodes

    @property
    def ends(self) -> list[int]:
        """The first and the last rank, which have the largest and the smallest shares of the weights."""
        return sorted({0, self.ranks - 1})


def lines(config: Config) -> Iterator[str]:
    """Rehearse, and describe each check that has passed. Raises what the start of the run would raise."""
    began = time.monotonic()
    config = spread(config)
    run = config.run
    yield f"rehearsal of {run.nodes} x {run.devices} ranks, strategy {run.custom_strategy or _strategy(run)}"
    with warnings.catch_warnings():
        # The rehearsal needs the names and shapes of starting weights, not their values.
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
        job = Job(config, *prepared(config, "meta"))
    with FolderLock(Path(run.out)):
        for name, fact in _checks(job):
            yield f"  {name:<16}{fact}"
    yield f"  {'not rehearsed':<16}network, GPUs and their memory (segvol-pl plan), other nodes, the steps themselves"
    yield f"would start (rehearsed in {time.monotonic() - began:.0f} s)"


def spread(config: Config) -> Config:
    """The configuration with as many nodes as `run.rehearse` needs. Raises ConfigError if they do not fit."""
    run = config.run
    nodes, rest = divmod(run.rehearse, run.devices)
    if rest:
        raise ConfigError(f"run.rehearse: {run.rehearse} ranks are no multiple of run.devices={run.devices}")
    if run.nodes not in (1, nodes):
        raise ConfigError(
            f"run.rehearse: {run.rehearse} ranks are not run.nodes={run.nodes} x run.devices={run.devices}"
        )
    return replace(config, run=replace(run, nodes=nodes, rehearse=0))


def _checks(job: Job) -> Iterator[tuple[str, str]]:
    run, module = job.config.run, job.module
    if run.accelerator == "cpu":
        check_snapshots(run, torch.device("cpu"))
    start = start_of(job.config, module)
    yield "run folder", f"resumes from step {start.step} of {start.checkpoint}" if start.checkpoint else "a new run"
    yield (
        "data",
        (
            f"{module.train_corpus.num_volumes} volumes to train on, {module.val_corpus.num_volumes} held out, "
            f"{sum(len(part.records.per_shard()) for part in module.train_corpus.parts)} shards"
        ),
    )
    yield "checkpoints", startup.check_room(job.config, sum(parameter.numel() for parameter in job.task.parameters()))
    yield "shared memory", startup.check_shared_memory(job.config)
    if job.ranks > 1:
        yield "open files", startup.check_open_files(job.ranks)
        yield "weights", _split(job)
    places = [module.place(rank, job.ranks) for rank in range(job.ranks)]
    yield (
        "batch",
        (
            f"{job.config.data.global_batch} = {job.ranks} ranks x {module.plan.micro_batch // job.ranks} at once x "
            f"run.accumulate={run.accumulate}"
        ),
    )
    stream = module.train_stream(places[0])
    if type(stream) is not Stream:
        yield "samples", "not rehearsed: a pipe: source is read in its own order"
        return
    yield from _samples(job, stream)
    for rank in job.ends:
        yield f"rank {rank} reads", _first_batch(module.train_stream(places[rank]), module.train_corpus)
    if run.val_batches:
        yield "and validates", _first_batch(module.val_stream(places[-1]), module.val_corpus)


# ---- groups and weights ----


class Elsewhere(LightningEnvironment):
    """The place of a rank of a job that is not running."""

    def __init__(self, rank: int, devices: int) -> None:
        super().__init__()
        self.node, self.local = divmod(rank, devices)

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning must start no processes."""
        return True

    def local_rank(self) -> int:
        """Rank within its node."""
        return self.local

    def node_rank(self) -> int:
        """Number of its node."""
        return self.node


@contextmanager
def in_place_of(rank: int, config: Config) -> Iterator[pl.Trainer]:
    """A trainer on this rank, in a world of fake ranks: their messages are lost, and what they would send is empty."""
    run = config.run
    # The machine that rehearses needs none of the job's GPUs. An unknown name is refused.
    placed = replace(run, accelerator="cpu" if run.accelerator in strategies.ACCELERATORS else run.accelerator)
    before = rank_zero_only.rank  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=run.devices * run.nodes)
    try:
        yield pl.Trainer(
            **strategies.trainer_placement(placed),
            precision=strategies.trainer_precision(placed),
            plugins=[Elsewhere(rank, run.devices)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    finally:
        dist.destroy_process_group()
        rank_zero_only.rank = before  # type: ignore[attr-defined]


def _split(job: Job) -> str:
    run = job.config.run
    count = sum(parameter.numel() for parameter in job.task.parameters())
    if run.custom_strategy or run.strategy in strategies.STAGES:
        return f"{count / 1e6:.1f} M; how {run.custom_strategy or _strategy(run)} splits them is not rehearsed"
    shares = []
    for rank in job.ends:
        with in_place_of(rank, job.config) as trainer:
            shares.append(_held(trainer, copy.deepcopy(job.task)))
    if run.strategy is not Strategy.fsdp:
        return f"{count / 1e6:.1f} M on each rank, in one group of {job.ranks}"
    held = " and ".join(f"{share / 1e6:.2f} M on rank {rank}" for rank, share in zip(job.ends, shares, strict=True))
    return f"all of {count / 1e6:.1f} M are split: {held}"


def _strategy(run: RunConfig) -> str:
    """The name of the strategy that the run takes."""
    alone = run.devices * run.nodes == 1
    return Strategy.ddp.value if run.strategy is Strategy.auto and not alone else run.strategy.value


def _held(trainer: pl.Trainer, task: Task) -> int:
    """Make the groups of the trainer's rank, and give it its weights; returns how many it holds."""
    strategy: Any = trainer.strategy
    strategy.connect(task)
    strategy.setup_environment()
    if isinstance(strategy, strategies.Replicated):
        # To compare weights that have no values is impossible.
        strategy._ddp_kwargs["init_sync"] = False
        strategy._setup_model(task)
    else:
        task.sharding = strategy.sharding
        task.configure_model()
        if complete := [name for name, weight in task.named_parameters() if not isinstance(weight, DTensor)]:
            raise StartUpError(f"run.strategy: {strategy.run.strategy.value} would not split {complete[0]}")
    return sum(local_of(parameter).numel() for parameter in task.parameters())


# ---- samples ----


def _samples(job: Job, stream: Stream) -> Iterator[tuple[str, str]]:
    plan, config = stream.plan, job.config
    dealt = deal(plan, job.ranks, max(1, config.data.workers))
    rows = stream.rows(0)
    places, shares, _ = plan.locality.located(dealt, plan.global_batch, len(rows))
    check_rows(plan, rows, rows[places])
    left = plan.num_samples - plan.usable
    rest = f"{abs(left)} {'left out' if left > 0 else 'repeated'}" if left else "no remainder"
    steps = plan.usable // plan.global_batch
    epochs = f"{config.optim.max_steps} steps are {config.optim.max_steps / steps:.1f} epochs"
    yield "epoch", f"{plan.usable} samples in {steps} steps, each taken by one rank ({rest}); {epochs}"
    if plan.locality.shares > 1:
        nodes = shares.reshape(config.run.nodes, -1)
        most = max(len(np.unique(node)) for node in nodes)
        yield "shares", f"a node reads {most} of {plan.locality.shares}"


def deal(plan: BatchPlan, ranks: int, workers: int) -> np.ndarray:
    """Positions of an epoch by rank: int64 (ranks, micro-batches, local batch).

    Raises StartUpError if a position is dealt to no rank or to several, or if loader processes would take others.
    """
    dealt = np.stack([plan.epoch_positions(World(rank, ranks)) for rank in range(ranks)])
    times = np.bincount(dealt.ravel(), minlength=plan.usable)
    if len(times) != plan.usable or (times != 1).any():
        wrong = int(np.flatnonzero(times != 1)[0]) if len(times) == plan.usable else len(times) - 1
        raise StartUpError(f"position {wrong} of an epoch of {plan.usable} is dealt to {times[wrong]} of {ranks} ranks")
    for rank in {0, ranks - 1}:
        for worker in range(workers):
            ahead = plan.positions(World(rank, ranks, worker, workers), 0)
            for number, (epoch, _, positions) in zip(range(worker, AHEAD * workers, workers), ahead, strict=False):
                if epoch == 0 and not np.array_equal(positions, dealt[rank, number]):
                    raise StartUpError(f"loader process {worker} of rank {rank} would take other samples than its rank")
    return dealt


def check_rows(plan: BatchPlan, rows: np.ndarray, taken: np.ndarray) -> None:
    """Compare the rows that the ranks take in an epoch with those that it deals.

    Args:
        plan: decides whether a remainder is left out or completed.
        rows: int32 (num_samples,), the epoch's order.
        taken: rows of all ranks.

    Raises:
        StartUpError: a sample is taken too often, or not at all.
    """
    wanted, found = np.bincount(rows), np.bincount(taken.ravel(), minlength=rows.max() + 1)
    wrong = found < wanted if plan.last_batch is LastBatch.repeat else found > wanted
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise StartUpError(f"sample {row} is taken {found[row]} times in an epoch that has it {wanted[row]} times")


def _first_batch(stream: Stream, corpus: Corpus) -> str:
    began = time.monotonic()
    batch = next(iter(stream))
    seconds = time.monotonic() - began
    keys = [corpus.located(int(row))[1].key for row in batch["row_B"]]
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    size = sum(values.nbytes for values in batch.values()) / 2**20
    replaced = int((batch["damaged_BA2"][..., 0] >= 0).sum())
    damaged = f", {replaced} damaged samples replaced" if replaced else ""
    return f"{', '.join(keys[:NAMED])}{more}: {size:.1f} MiB in {seconds:.1f} s{damaged}"
