"""The DataModule: joins the stream with the trainer. The only file here that knows the trainer's rank."""

from __future__ import annotations

import logging
import math
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from segvol_pl.config import ConfigError, DataConfig, RunConfig
from segvol_pl.data.shards import Index, SampleRecord, read_index
from segvol_pl.data.stream import Batch, Draw, Plan, Stream, World

log = logging.getLogger(__name__)


class VolumeModule(pl.LightningDataModule):
    """Streams the samples of `index` in `folder` for one task.

    `seen` is the position in the data: samples seen so far over all ranks, the whole state of the stream.
    """

    def __init__(self, data: DataConfig, run: RunConfig, draw: Draw, val_draw: Draw, labelled: bool) -> None:
        super().__init__()
        self.data, self.run = data, run
        self.draw, self.val_draw = draw, val_draw
        self.folder = data.shards
        self.index = read_index(self.folder)
        self.train_records = self._select(self.index, data.split, labelled)
        self.val_records = self._select(self.index, data.val_split, labelled)
        self.plan = self._train_plan()
        self.seen = 0

    def _select(self, index: Index, split: str, labelled: bool) -> list[SampleRecord]:
        """The records of a split, only labelled ones where the task needs labels."""
        records = [record for record in index.samples if split in ("all", record.split)]
        chosen = [record for record in records if record.labelled or not labelled]
        if not chosen:
            kind = "labelled samples" if labelled else "samples"
            raise ConfigError(f"data.split: {self.folder} holds no {kind} in {split!r} (it has {index.splits})")
        return chosen

    def _train_plan(self) -> Plan:
        positions = len(self.train_records) * self.data.samples_per_volume
        if positions < self.data.global_batch:
            need = math.ceil(self.data.global_batch / len(self.train_records))
            raise ConfigError(
                f"data.samples_per_volume: an epoch of {positions} samples is less than data.global_batch="
                f"{self.data.global_batch}: set data.samples_per_volume={need} or more"
            )
        if self.data.global_batch % self.run.accumulate:
            raise ConfigError(
                f"run.accumulate: {self.run.accumulate} does not divide data.global_batch={self.data.global_batch}"
            )
        plan = Plan(positions, self.data.global_batch, self.run.accumulate, self.data.seed)
        if plan.usable < positions:
            log.info(
                "each epoch leaves out %d of %d samples: the last incomplete batch", positions - plan.usable, positions
            )
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
        stream = Stream(self.folder, self.train_records, self.draw, self.plan, self._world(), self.seen)
        return self._loader(stream, self.data.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The same `run.val_batches` batches every time."""
        wanted = self.run.val_batches * self.data.global_batch
        repeats = math.ceil(wanted / len(self.val_records))
        micro = self.data.global_batch // self.run.accumulate
        plan = Plan(len(self.val_records) * repeats, micro, seed=self.data.seed)
        stream = Stream(self.folder, self.val_records, self.val_draw, plan, self._world())
        return self._loader(stream, min(self.data.workers, 1))

    def _loader(self, stream: Stream, workers: int) -> DataLoader[Batch]:
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.data.prefetch if workers else None,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]
