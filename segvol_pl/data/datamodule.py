"""The DataModule: connects the stream with the trainer. Only this file reads the trainer's rank."""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import math
import multiprocessing
import signal
from collections.abc import Collection, Iterable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig, LastBatch, RunConfig, StartMethod
from segvol_pl.data.ahead import Ahead, Begin, SideStream
from segvol_pl.data.batch import Batch, unpacked
from segvol_pl.data.collate import identity_collate
from segvol_pl.data.corpus import (
    Corpus,
    Folder,
    category_names,
    held_out_corpus,
    open_folders,
    source_names,
    training_corpus,
)
from segvol_pl.data.damage_tally import DamageTally
from segvol_pl.data.frames import decode_alone
from segvol_pl.data.loader_stacks import answer_with_stacks
from segvol_pl.data.locality import Locality
from segvol_pl.data.pipe import PipeStream
from segvol_pl.data.sample_table import EMPTY
from segvol_pl.data.stream import BatchPlan, Draw, Stream, World
from segvol_pl.errors import ConfigError

log = logging.getLogger(__name__)

STATE_VERSION = 1
"""Version of the stream's state in a checkpoint."""


class VolumeModule(pl.LightningDataModule):
    """Streams the samples of the configured corpus for one task.

    `seen` is the position in the data and the complete state of the stream: samples seen so far over all ranks. `drawn`
    also counts the batch that is being trained on. `health` counts the damaged samples found in training.

    Args:
        data, run: the run's configuration.
        draw, val_draw: make a sample to train on, and one to validate with.
        labelled: whether only labelled samples are used.
        folders: the opened folders of `data`, if they are open already.
    """

    def __init__(
        self,
        data: DataConfig,
        run: RunConfig,
        draw: Draw,
        val_draw: Draw,
        labelled: bool,
        folders: Sequence[Folder] | None = None,
    ) -> None:
        super().__init__()
        self.data, self.run = data, run
        self.draw, self.val_draw = draw, val_draw
        folders = open_folders(data) if folders is None else folders
        self.train_corpus = training_corpus(folders, data, labelled)
        self.val_corpus = held_out_corpus(folders, data.val_split, labelled)
        self.categories = category_names(folders)
        self.synonyms: dict[str, str] = {}
        """Synonym -> category, of a supervised run."""
        self._warn_of_leaks()
        self.health, self.val_health = DamageTally(self.train_corpus), DamageTally(self.val_corpus)
        self.plan = self._train_plan()
        self.seen = self.drawn = 0
        self.rows: list[int] = []
        """Rows in the corpus of the batch that is being trained on."""
        self.val_rows: list[int] = []
        """Rows in the held-out corpus of the batch that is being validated."""

    def _warn_of_leaks(self) -> None:
        if self.data.split == self.data.val_split:
            return
        trained, held_out = (
            np.concatenate([part.records.fingerprints("content") for part in corpus.parts])
            for corpus in (self.train_corpus, self.val_corpus)
        )
        held_out = np.unique(held_out[held_out != EMPTY])
        both = int(np.isin(held_out, trained).sum())
        if both:
            log.warning("%d of %d held-out volumes are also trained on: run segvol-pl overlap", both, len(held_out))

    def _train_plan(self) -> BatchPlan:
        samples, batch = self.train_corpus.num_samples, self.data.global_batch
        if samples < batch and self.data.last_batch is LastBatch.drop:
            need = math.ceil(self.data.samples_per_volume * batch / max(samples, 1))
            raise ConfigError(
                f"data.samples_per_volume: an epoch of {samples} samples is smaller than data.global_batch="
                f"{batch}: set data.samples_per_volume={need} or more"
            )
        if batch % self.run.accumulate:
            raise ConfigError(f"run.accumulate: {self.run.accumulate} does not divide data.global_batch={batch}")
        shares, nodes = self.data.locality, self.run.nodes
        if samples < shares:
            raise ConfigError(f"data.locality: an epoch of {samples} samples cannot be divided into {shares} shares")
        if shares % nodes and nodes % shares:
            log.warning(
                "data.locality=%d: some of the %d nodes read parts of several shares and find less in their cache: set "
                "it to %d, or to a multiple or divisor of that",
                *(shares, nodes, nodes),
            )
        locality = Locality(shares, self.data.locality_epochs)
        plan = BatchPlan(samples, batch, self.run.accumulate, self.data.seed, self.data.last_batch, locality)
        if plan.usable < samples:
            log.info(
                "each epoch leaves out %d of %d samples: the last incomplete batch", samples - plan.usable, samples
            )
        if plan.usable > samples:
            log.info("each epoch repeats %d of %d samples to complete its last batch", plan.usable - samples, samples)
        return plan

    def _world(self) -> World:
        return World() if self.trainer is None else self.place(self.trainer.global_rank, self.trainer.world_size)

    def place(self, rank: int, ranks: int) -> World:
        """The place of a rank among `ranks`. Raises ConfigError if they cannot share a batch."""
        if (self.data.global_batch // self.run.accumulate) % ranks:
            raise ConfigError(
                f"data.global_batch: {self.data.global_batch} cannot be shared by {ranks} ranks x run.accumulate"
            )
        return World(rank, ranks)

    def train_dataloader(self) -> Iterable[Batch]:
        """Micro-batches from `seen` on, without end. Raises ConfigError if ranks do not divide the batch."""
        return self._loader(self.train_stream(self._world()), self.data.workers)

    def train_stream(self, world: World) -> Stream:
        """The stream of a rank's loader from `seen` on."""
        return self._stream(self.train_corpus, self.draw, self.plan, world, self.seen)

    def val_dataloader(self) -> Iterable[Batch]:
        """The same `run.val_batches` batches every time."""
        # To start its process for every validation would take longer than most of its batches.
        return self._loader(self.val_stream(self._world()), min(self.data.workers, 1), lasting=True)

    def val_stream(self, world: World) -> Stream:
        """The stream of a rank's validation loader."""
        # Complete global batches, however many micro-batches each has.
        wanted = self.run.val_batches * self.data.global_batch
        samples = self.val_corpus.num_volumes
        plan = BatchPlan(samples * math.ceil(wanted / samples), self.plan.micro_batch, seed=self.data.seed)
        return self._stream(self.val_corpus, self.val_draw, plan, world)

    def _stream(self, corpus: Corpus, draw: Draw, plan: BatchPlan, world: World, seen: int = 0) -> Stream:
        if any(part.store.piped for part in corpus.parts):
            return PipeStream(corpus, draw, plan, world, seen, self.data.pipe_buffer)
        return Stream(corpus, draw, plan, world, seen)

    def _loader(self, stream: Stream, workers: int, lasting: bool = False) -> Iterable[Batch]:
        # Before a fork: a process that inherits Blosc2's threads crashes when they end.
        decode_alone()
        begin = self._copying()
        loader = DataLoader(
            stream,
            batch_size=None,
            collate_fn=identity_collate,
            num_workers=workers,
            prefetch_factor=self.data.prefetch if workers else None,
            worker_init_fn=_begin_worker,
            multiprocessing_context=self._context() if workers else None,
            persistent_workers=lasting and workers > 0,
            pin_memory=begin is not None,
        )
        return loader if begin is None else Ahead(loader, begin)

    @property
    def _device(self) -> torch.device:
        """Where the step computes."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _copying(self) -> Begin | None:
        """What copies batches ahead of the step; None if the step computes in main memory."""
        return SideStream(self._device) if self._device.type == "cuda" else None

    def _context(self) -> BaseContext:
        """How loader processes are started."""
        automatic = StartMethod.forkserver if self._device.type == "cuda" else StartMethod.fork
        method = automatic if self.data.start_method is StartMethod.auto else self.data.start_method
        if method is StartMethod.forkserver:
            start_fork_server()
        return multiprocessing.get_context(method.value)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # The batch is still in main memory here; reading it on a GPU would make the step wait.
        damaged_BA2, rows_B = batch.pop("damaged_BA2"), batch.pop("row_B")
        drawn = int(batch.pop("seen"))
        validating = self.trainer is not None and not self.trainer.training
        if validating:
            self.val_rows = rows_B.tolist()
        else:
            self.drawn, self.rows = drawn, rows_B.tolist()
        (self.val_health if validating else self.health).note(damaged_BA2.numpy())
        return batch

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return unpacked(batch)

    def batch_keys(self) -> list[str]:
        """Keys of the samples of the batch that is being trained on."""
        return [self.train_corpus.located(row)[1].key for row in self.rows]

    def source_names(self, reserved: Collection[str] = ()) -> list[str]:
        """The names in metrics of the folders to train on, in their order, see `corpus.source_names`."""
        return source_names([part.store.folder for part in self.train_corpus.parts], reserved)

    @functools.cached_property
    def val_sources(self) -> list[int]:
        """For each part of the held-out corpus the number of its folder. A folder without held-out samples has none."""
        stores = [part.store for part in self.train_corpus.parts]
        return [next(at for at, store in enumerate(stores) if store is part.store) for part in self.val_corpus.parts]

    def batch_sources(self) -> list[int]:
        """The number of each volume's folder, for the batch that is being validated."""
        return [self.val_sources[self.val_corpus.place_of(row)[0]] for row in self.val_rows]

    @functools.cached_property
    def samples(self) -> dict[str, dict[str, Any]]:
        """Number and digest of the training samples and of the held-out ones, in their order."""
        return {"train": corpus_summary(self.train_corpus), "held_out": corpus_summary(self.val_corpus)}

    def differs(self, state: dict[str, Any]) -> str:
        """How the training samples differ from those when `state` was saved; empty if they are the same.

        Other held-out samples are only a warning: training does not depend on them.
        """
        if state.get("version") != STATE_VERSION:
            return f"its checkpoint holds version {state.get('version')} of the stream's state, not {STATE_VERSION}"
        before, now = state["samples"], self.samples
        if before["held_out"] != now["held_out"]:
            log.warning("the held-out samples are not those of the run's start: val/ metrics cannot be compared")
        if before["train"] == now["train"]:
            return ""
        then, given = before["train"]["samples"], now["train"]["samples"]
        return f"{then} samples then, {given} now" if then != given else f"other {given} samples, or in another order"

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "seen": self.seen,
            "samples": self.samples,
            "damaged": self.health.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]
        self.health.load_state_dict(state_dict["damaged"])


def corpus_summary(corpus: Corpus) -> dict[str, Any]:
    """Number of samples, and a sha256 over their content, order and weights.

    Paths and the division into shards are left out, because they may change.
    """
    digest = hashlib.sha256()
    for part in corpus.parts:
        times = str(part.times).encode()
        for row in part.records.texts("key", "content", "facts_sha256"):
            digest.update(b"%s %s %s %s\n" % (times, *row))
    return {"samples": corpus.num_volumes, "sha256": digest.hexdigest()}


def start_fork_server() -> None:
    """Start the process that loader processes are forked from, unless it runs: it imports what they need, once."""
    # This file: loader processes get functions of it, and would each import it, and Lightning with it.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    # Otherwise it starts with the server, after SIGTERM is unblocked.
    resource_tracker.ensure_running()
    # SLURM signals every process of a step. Block the signals in the server too: they would end it, and its children
    # would seem to have ended. This process receives what came in the meantime.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def _end_workers() -> None:
    """Kill loader processes at exit. multiprocessing would send SIGTERM, which they ignore, and wait for ever."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def _begin_worker(worker: int) -> None:
    decode_alone()
    answer_with_stacks()
    # SLURM signals every process of a step; the training process decides what to do.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
