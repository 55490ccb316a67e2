"""When and how a run saves checkpoints: complete, in one form for every strategy, atomically, in the background.

1. Between two steps all ranks gather the state; rank 0 copies it to main memory, and training continues.
2. A thread writes the copy. The next save waits for it, and so does the end of the run.

With `run.checkpoint_format=sharded`, every rank copies and writes its own part, see `sharded`; a checkpoint then is a
folder of the same name.

    checkpoints/last.ckpt      every `run.checkpoint_every` steps and `run.checkpoint_minutes` minutes, at a signal, and
                               at the end; a run resumes from it
    checkpoints/best.ckpt      after the validation of the lowest loss; with `run.early_stop`, of the highest Dice
    checkpoints/step-N.ckpt    every `run.save_every` steps, the newest `run.keep_last` of them; and for good those of
                               `run.keep_steps`
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection

from segvol_pl.atomic import atomic_path, no_room, put, remove
from segvol_pl.config import RunConfig
from segvol_pl.errors import NonFiniteError
from segvol_pl.model.released import is_finite
from segvol_pl.model.sharded import open_sharded
from segvol_pl.training.early_stop import DICE


class HostCopies:
    """Copies of a checkpoint's tensors in main memory. GPU tensors are copied to pinned memory, which is reused.

    Copying to pageable memory is several times slower, and pinning memory at every save takes longer still.
    """

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        """Pinned buffers, one per GPU tensor, in the order of the checkpoint."""

    def of(self, checkpoint: Any) -> Any:
        """Copy a checkpoint, or a part of it. The copies are complete on return, and valid until the next call."""
        place = itertools.count()

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type == "cpu":
                return tensor.detach().clone()
            return self._held(next(place), tensor).copy_(tensor.detach(), non_blocking=True)

        copies = apply_to_collection(checkpoint, torch.Tensor, copied)
        if self.held:
            torch.cuda.synchronize()
        return copies

    def _held(self, place: int, like: torch.Tensor) -> torch.Tensor:
        fits = place < len(self.held) and (self.held[place].shape, self.held[place].dtype) == (like.shape, like.dtype)
        if not fits:
            # The state has changed: the buffers that follow do not fit either.
            self.held[place:] = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True)]
        return self.held[place]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically: a kill or a full disk while saving leaves the previous checkpoint intact.

    A thread writes one checkpoint after the other, from copies taken when saving was requested.

    Args:
        sharded: whether every rank writes its part; `save_checkpoint` is then called on all ranks.
        timeout: how long ranks that write wait for each other.
    """

    def __init__(self, sharded: bool = False, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__()
        self.sharded, self.timeout = sharded, timeout
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future[None]] = []
        self.copies = HostCopies()
        self.writing: tuple[str, float] | None = None
        """The file that the thread is writing, and when it began (`time.monotonic`); the watchdog looks at it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy the state, and write it in the background. Raises what writing an earlier one raised."""
        # Two copies at once would need the memory of both.
        self.wait()
        if self.sharded:
            # Importing torch's distributed checkpoint takes a while, and other runs do not need it.
            from segvol_pl.training.sharded import sharded_save

            save = sharded_save(checkpoint, self.timeout, self.copies.of)
            self._write_later(
                Path(path), lambda: save.write(Path(path), lambda: check_finite(save.locals(), Path(path)))
            )
            return
        copy = self.copies.of(checkpoint)
        self._write_later(Path(path), lambda: self._write(copy, Path(path)))

    def _write_later(self, path: Path, write: Callable[[], None]) -> None:
        def watched() -> None:
            self.writing = path.name, time.monotonic()
            try:
                write()
            finally:
                self.writing = None

        self.afterwards(watched)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint completely, to the CPU if it is sharded. Raises CheckpointError if that cannot be read."""
        if Path(path).is_dir():
            return open_sharded(Path(path)).complete()
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        check_finite(checkpoint, path)
        # A folder cannot be replaced by a file in one step.
        target = path.with_name(f"new-{path.name}") if path.is_dir() else path
        with atomic_path(target) as part:
            # Given a path, torch writes without holding the GIL; Lightning would first serialise to memory.
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:
                # torch reports neither the path nor the cause of a full disk.
                needed = bytes_of(checkpoint)
                raise no_room(path, needed) if shutil.disk_usage(path.parent).free < needed else error from error
            with part.open("rb") as file:
                os.fsync(file.fileno())  # after a power failure the name must not exist without the content
        if target != path:
            put(target, path)

    def afterwards(self, work: Callable[[], None]) -> None:
        """Call `work` in the background, after all earlier saves."""
        self.pending.append(self.thread.submit(work))

    def check(self) -> None:
        """Raise what background writing has raised so far."""
        done = [future for future in self.pending if future.done()]
        self.pending = [future for future in self.pending if future not in done]
        for future in done:
            future.result()

    def wait(self) -> None:
        """Wait until everything is written. Raises what writing raised."""
        wait(self.pending)
        self.check()

    def teardown(self) -> None:
        self.wait()


def bytes_of(checkpoint: dict[str, Any]) -> int:
    """Size of its tensors in bytes."""
    return sum(tensor.nbytes for _, tensor in _tensors(checkpoint))


def check_finite(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise NonFiniteError if a weight or moment is not finite: such a checkpoint must not replace a good one."""
    for name, tensor in _tensors(checkpoint):
        if not is_finite(tensor):
            raise NonFiniteError(f"{path}: not saved, because {name} is not finite; the previous one is unchanged")


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, part in entries:
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def remove_parts(folder: Path) -> None:
    """Remove what killed runs left over, each of which may be as large as a checkpoint."""
    replaced = (path for path in folder.glob("before-*.ckpt") if folder.joinpath(path.name[len("before-") :]).exists())
    for part in (*folder.glob(".*.ckpt.*.part"), *replaced, *folder.glob("new-*.ckpt")):
        remove(part)


def save_together(strategy: Strategy, checkpoint: dict[str, Any], path: Any) -> None:
    """Save on rank 0 alone, or on all ranks if checkpoints are sharded."""
    io = strategy.checkpoint_io
    if strategy.is_global_zero or (isinstance(io, AtomicCheckpointIO) and io.sharded):
        io.save_checkpoint(checkpoint, path)


def writer(trainer: pl.Trainer) -> AtomicCheckpointIO:
    """The trainer's AtomicCheckpointIO."""
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, AtomicCheckpointIO)
    return io


class Checkpoints(pl.Callback):
    """Save checkpoints between two steps, after the metrics of the previous step are logged.

    branched: whether this start continues from another run's checkpoint, whose best loss does not count here.
    """

    def __init__(self, folder: Path, run: RunConfig, branched: bool = False) -> None:
        self.folder, self.run, self.branched = folder, run, branched
        self.best = math.inf
        """The lowest validation loss so far; with `run.early_stop` the lowest 1 - Dice."""
        self.saved = -1
        self.again = False
        """Whether to keep the checkpoint of the step that this start resumes from."""
        self.written = time.monotonic()
        """Time when `last` was saved, or when training began."""
        self.wanted = False
        """Whether all ranks have agreed (`Preemption`) to save before the next step."""
        self.kept: list[int] = []
        """Steps of the existing step-N.ckpt that will be removed, oldest first."""

    @property
    def last(self) -> Path:
        """The checkpoint that a run resumes from."""
        return self.folder / "last.ckpt"

    def overdue(self) -> bool:
        """Whether the last checkpoint is older than `run.checkpoint_minutes`, by this rank's clock."""
        minutes = self.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.written >= 60 * minutes

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved, self.written = trainer.global_step, time.monotonic()
        # Checkpoints of later steps were found damaged, or belong to another run.
        found = sorted(map(_step, self.folder.glob("step-*.ckpt")))
        self.kept = [step for step in found if step <= self.saved and step not in self.run.keep_steps]
        if trainer.is_global_zero:
            remove_parts(self.folder)
        # A kill may have come after last.ckpt of this step, and before the one to keep.
        self.again = self.saved in self.run.keep_steps and not self.branched

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        step = trainer.global_step
        writer(trainer).check()
        if index % trainer.accumulate_grad_batches:
            return
        if step == self.saved:
            if self.again:
                trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
            self.again = False
            return
        self.saved = step
        if self.wanted or step % self.run.checkpoint_every == 0:
            trainer.save_checkpoint(self.last)
            self.wanted, self.written = False, time.monotonic()
        for_good = step in self.run.keep_steps
        if for_good or (self.run.save_every and step % self.run.save_every == 0):
            trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
            self.kept += [] if for_good else [step]
            if trainer.is_global_zero:
                writer(trainer).afterwards(self._remove_oldest)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        if self.run.early_stop:
            loss = 1 - float(trainer.callback_metrics[DICE])
        if trainer.state.fn == TrainerFn.FITTING and loss < self.best:
            self.best = loss
            trainer.save_checkpoint(self.folder / "best.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Not after fit: its teardown moves the weights to main memory, from which NCCL cannot gather.
        trainer.save_checkpoint(self.last)

    def _remove_oldest(self) -> None:
        while len(self.kept) > self.run.keep_last:
            remove(self.folder / f"step-{self.kept.pop(0)}.ckpt")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "by_dice": self.run.early_stop > 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Losses and Dice are not compared with each other.
        comparable = state_dict.get("by_dice", False) == (self.run.early_stop > 0)
        self.best = state_dict["best"] if comparable and not self.branched else math.inf


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
