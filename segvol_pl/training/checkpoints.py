"""When a run saves, and where: whole, in one form for every strategy, under another name first, while training goes on.

1. Between two steps all ranks gather the state; rank 0 copies it to main memory, and training goes on.
2. A thread writes the copy. The next save waits for it, and so does whatever ends the run.

    checkpoints/last.ckpt      every `run.checkpoint_every` steps and `run.checkpoint_minutes` minutes, at a signal, and
                               at the end: what a run goes on from
    checkpoints/best.ckpt      after the validation of the lowest loss
    checkpoints/step-N.ckpt    every `run.save_every` steps, the newest `run.keep_last` of them
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection

from segvol_pl.atomic import atomic_path, no_room
from segvol_pl.config import RunConfig
from segvol_pl.errors import NonFiniteError
from segvol_pl.model.released import is_finite


class HostCopies:
    """Copies of a checkpoint's tensors in main memory. Those of a GPU's lie in pinned memory that is kept for the next.

    Pageable memory is copied to at a fraction of the rate, and pinning it anew each time takes longer than that.
    """

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        """What a GPU's tensors are copied to, in the checkpoint's order."""

    def of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The copies, there when it returns, and whole until it is called again."""
        place = itertools.count()

        def copied(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.device.type == "cpu":
                return tensor.detach().clone()
            return self._held(next(place), tensor).copy_(tensor.detach(), non_blocking=True)

        copies: dict[str, Any] = apply_to_collection(checkpoint, torch.Tensor, copied)
        if self.held:
            torch.cuda.synchronize()
        return copies

    def _held(self, place: int, like: torch.Tensor) -> torch.Tensor:
        fits = place < len(self.held) and (self.held[place].shape, self.held[place].dtype) == (like.shape, like.dtype)
        if not fits:
            # Another state than the one before: what follows differs too.
            self.held[place:] = [torch.empty(like.shape, dtype=like.dtype, pin_memory=True)]
        return self.held[place]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to another name, then renames: a kill or a full disk while saving leaves the previous checkpoint whole.

    Writes in a thread, one checkpoint after the other, from a copy taken when it is told to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: list[Future[None]] = []
        self.copies = HostCopies()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Returns when the state is copied. Raises what writing an earlier one raised."""
        # Two copies at once would need the memory of both.
        self.wait()
        copy = self.copies.of(checkpoint)
        self.afterwards(lambda: self._write(copy, Path(path)))

    @staticmethod
    def _write(checkpoint: dict[str, Any], path: Path) -> None:
        check_finite(checkpoint, path)
        with atomic_path(path) as part:
            # Given a name, torch writes without the interpreter's lock; Lightning would first write to memory.
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:
                # Of a full disk torch says neither the path nor the cause.
                needed = bytes_of(checkpoint)
                raise no_room(path, needed) if shutil.disk_usage(path.parent).free < needed else error from error
            with part.open("rb") as file:
                os.fsync(file.fileno())  # the name must not be there before the content, should the power fail

    def afterwards(self, work: Callable[[], None]) -> None:
        """Does `work` when all that was saved so far lies on the disk."""
        self.pending.append(self.thread.submit(work))

    def check(self) -> None:
        """Raises what writing raised, as soon as that is known."""
        done = [future for future in self.pending if future.done()]
        self.pending = [future for future in self.pending if future not in done]
        for future in done:
            future.result()

    def wait(self) -> None:
        """Until all that was saved lies on the disk. Raises what writing raised."""
        wait(self.pending)
        self.check()

    def teardown(self) -> None:
        self.wait()


def bytes_of(checkpoint: dict[str, Any]) -> int:
    """Of its tensors."""
    return sum(tensor.nbytes for _, tensor in _tensors(checkpoint))


def check_finite(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises NonFiniteError where a weight or a moment is not: such a checkpoint never replaces a good one."""
    for name, tensor in _tensors(checkpoint):
        if not is_finite(tensor):
            raise NonFiniteError(f"{path}: not saved, as {name} is not finite; the checkpoint before is as it was")


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, Mapping | list | tuple):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, part in entries:
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def remove_parts(folder: Path) -> None:
    """What runs that were killed had half written: with every kill one more whole checkpoint's bytes would be lost."""
    for part in folder.glob(".*.ckpt.*.part"):
        part.unlink()


def writer(trainer: pl.Trainer) -> AtomicCheckpointIO:
    """The trainer's writer of checkpoints."""
    io = trainer.strategy.checkpoint_io
    assert isinstance(io, AtomicCheckpointIO)
    return io


class Checkpoints(pl.Callback):
    """Saves between two steps, when the metrics of the step before are logged."""

    def __init__(self, folder: Path, run: RunConfig) -> None:
        self.folder, self.run = folder, run
        self.best = math.inf
        self.saved = -1
        self.written = time.monotonic()
        """When `last` was, or the run began."""
        self.wanted = False
        """Whether all ranks have agreed to save before the next step, whichever it is."""
        self.kept: list[int] = []
        """Steps of the checkpoints that are kept beside."""

    @property
    def last(self) -> Path:
        """The checkpoint that a run goes on from."""
        return self.folder / "last.ckpt"

    def overdue(self) -> bool:
        """Whether by this rank's clock the last checkpoint is older than `run.checkpoint_minutes`."""
        minutes = self.run.checkpoint_minutes
        return minutes > 0 and time.monotonic() - self.written >= 60 * minutes

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved, self.written = trainer.global_step, time.monotonic()
        # Those of steps that this run has yet to do were found damaged, or are another run's.
        self.kept = [step for step in sorted(map(_step, self.folder.glob("step-*.ckpt"))) if step <= self.saved]
        if trainer.is_global_zero:
            remove_parts(self.folder)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        step = trainer.global_step
        writer(trainer).check()
        if index % trainer.accumulate_grad_batches or step == self.saved:
            return
        self.saved = step
        if self.wanted or step % self.run.checkpoint_every == 0:
            trainer.save_checkpoint(self.last)
            self.wanted, self.written = False, time.monotonic()
        if self.run.save_every and step % self.run.save_every == 0:
            trainer.save_checkpoint(self.folder / f"step-{step}.ckpt")
            self.kept.append(step)
            if trainer.is_global_zero:
                writer(trainer).afterwards(self._leave_newest)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", math.inf))
        if trainer.state.fn == TrainerFn.FITTING and loss < self.best:
            self.best = loss
            trainer.save_checkpoint(self.folder / "best.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Not after fit: its teardown brings the weights to main memory, from where NCCL gathers nothing.
        trainer.save_checkpoint(self.last)

    def _leave_newest(self) -> None:
        while len(self.kept) > self.run.keep_last:
            (self.folder / f"step-{self.kept.pop(0)}.ckpt").unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
