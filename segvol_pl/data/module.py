"""The DataModule: joins the stream with the trainer. The only file here that knows the trainer's rank."""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import signal
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from segvol_pl.config import ConfigError, DataConfig, RunConfig, Tail
from segvol_pl.data.corpus import Corpus, held_out_corpus, open_folders, training_corpus
from segvol_pl.data.health import Health
from segvol_pl.data.parcel import as_it_is
from segvol_pl.data.pipe import PipeStream
from segvol_pl.data.stream import Batch, Draw, Plan, Stream, World

log = logging.getLogger(__name__)


class VolumeModule(pl.LightningDataModule):
    """Streams the samples of the configured corpus for one task.

    `seen` is the position in the data: samples seen so far over all ranks, the whole state of the stream; `drawn` the
    same with the batch that is being trained on.
    `health` counts what this rank found damaged in training.
    """

    def __init__(self, data: DataConfig, run: RunConfig, draw: Draw, val_draw: Draw, labelled: bool) -> None:
        super().__init__()
        self.data, self.run = data, run
        self.draw, self.val_draw = draw, val_draw
        folders = open_folders(data)
        self.train_corpus = training_corpus(folders, data, labelled)
        self.val_corpus = held_out_corpus(folders, data.val_split, labelled)
        self.categories = sorted({name for folder in folders for name in folder.index.categories})
        self._warn_of_leaks()
        self.health, self.val_health = Health(self.train_corpus), Health(self.val_corpus)
        self.plan = self._train_plan()
        self.seen = self.drawn = 0

    def _warn_of_leaks(self) -> None:
        trained, held_out = (
            {record.content for record in corpus.records if record.content}
            for corpus in (self.train_corpus, self.val_corpus)
        )
        both = len(trained & held_out)
        if both and self.data.split != self.data.val_split:
            log.warning("%d of %d held-out volumes are trained on too: run segvol-pl overlap", both, len(held_out))

    def _train_plan(self) -> Plan:
        samples, batch = self.train_corpus.num_samples, self.data.global_batch
        if samples < batch and self.data.tail is Tail.drop:
            need = math.ceil(self.data.samples_per_volume * batch / max(samples, 1))
            raise ConfigError(
                f"data.samples_per_volume: an epoch of {samples} samples is less than data.global_batch="
                f"{batch}: set data.samples_per_volume={need} or more"
            )
        if batch % self.run.accumulate:
            raise ConfigError(f"run.accumulate: {self.run.accumulate} does not divide data.global_batch={batch}")
        plan = Plan(samples, batch, self.run.accumulate, self.data.seed, self.data.tail)
        if plan.usable < samples:
            log.info(
                "each epoch leaves out %d of %d samples: the last incomplete batch", samples - plan.usable, samples
            )
        if plan.usable > samples:
            log.info("each epoch repeats %d of %d samples to complete its last batch", plan.usable - samples, samples)
        return plan

    def _world(self) -> World:
        if self.trainer is None:
            return World()
        ranks = self.trainer.world_size
        if (self.data.global_batch // self.run.accumulate) % ranks:
            raise ConfigError(
                f"data.global_batch: {self.data.global_batch} cannot be shared by {ranks} ranks x run.accumulate"
            )
        return World(self.trainer.global_rank, ranks)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches from `seen` on, without end. Raises ConfigError where ranks do not divide the batch."""
        return self._loader(self._stream(self.train_corpus, self.draw, self.plan, self.seen), self.data.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same `run.val_batches` batches every time."""
        wanted = self.run.val_batches * self.data.global_batch
        samples = len(self.val_corpus.records)
        micro = self.data.global_batch // self.run.accumulate
        plan = Plan(samples * math.ceil(wanted / samples), micro, seed=self.data.seed)
        return self._loader(self._stream(self.val_corpus, self.val_draw, plan), min(self.data.workers, 1))

    def _stream(self, corpus: Corpus, draw: Draw, plan: Plan, seen: int = 0) -> Stream:
        if any(part.store.piped for part in corpus.parts):
            return PipeStream(corpus, draw, plan, self._world(), seen, self.data.pipe_buffer)
        return Stream(corpus, draw, plan, self._world(), seen)

    def _loader(self, stream: Stream, workers: int) -> DataLoader[Batch]:
        return DataLoader(
            stream,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=workers,
            prefetch_factor=self.data.prefetch if workers else None,
            worker_init_fn=_leave_signals,
            multiprocessing_context=self.data.start_method.value if workers else None,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        # Here the batch is still in main memory: looking at it on a GPU would stop the step.
        damaged_BA2 = batch.pop("damaged_BA2")
        drawn = int(batch.pop("seen"))
        validating = self.trainer is not None and not self.trainer.training
        if not validating:
            self.drawn = drawn
        (self.val_health if validating else self.health).note(damaged_BA2.numpy())
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


@atexit.register
def _end_workers() -> None:
    """At the process's end, before multiprocessing asks them by SIGTERM, which they ignore, and waits for ever."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def _leave_signals(worker: int) -> None:
    # SLURM signals every process of a step; the training process decides what follows.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
