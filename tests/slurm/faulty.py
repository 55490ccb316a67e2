"""Strategies as a user's own, under which the last rank fails after a given step of the run: for jobs of the lab."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy

from segvol_pl.config import RunConfig
from segvol_pl.training.callbacks import StreamPosition

FAILS = 25


def hangs(run: RunConfig) -> DDPStrategy:
    """In every start, so that two starts in a row fail at the same step."""
    return _failing(lambda: time.sleep(1000))


def lacks_memory(run: RunConfig) -> DDPStrategy:
    def fail() -> None:
        raise MemoryError("tried to allocate 3 GB")

    return _failing(fail)


def _failing(fail: Callable[[], None]) -> DDPStrategy:
    end = StreamPosition.on_train_batch_end

    def ended(self: StreamPosition, trainer: pl.Trainer, *rest: Any) -> None:
        end(self, trainer, *rest)
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step > FAILS:
            fail()

    StreamPosition.on_train_batch_end = ended  # type: ignore[method-assign,assignment]
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=600))
