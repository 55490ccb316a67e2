"""Records a run's starts, progress and end in its journal, and logs the goodput.

Everything is measured by the host's clock, between hooks: nothing here waits for a GPU or for other ranks.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from segvol_pl import goodput
from segvol_pl.credentials import masked
from segvol_pl.errors import SIGNALLED, STATUSES, Cause, cause_of, status_of
from segvol_pl.goodput import Tally
from segvol_pl.journal import Journal, Mark, Saved
from segvol_pl.training.averages import AveragedValidation
from segvol_pl.training.checkpoints import writer
from segvol_pl.training.peers import Silent, connection_broke

SPACING, LEAST = 1 / 200, 1.0
"""Least time between two progress lines: a share of the start's age so far, and seconds. A long start writes few."""


class Recorder(pl.Callback):
    """Write the journal of this start every `every` steps, and log `goodput/...` after validations and at the end.

    Metrics of all starts so far: `goodput/kept`, `queue`, `start_up`, `validation`, `saving`, `lost` and `hang`, shares
    of the wall time `goodput/hours`.
    """

    def __init__(self, journal: Journal, every: int) -> None:
        self.journal, self.every = journal, every
        self.step = 0
        self.spent = {"validation": 0.0, "saving": 0.0}
        """Seconds in the phases that are complete."""
        self.phase: tuple[str, float] | None = None
        """The phase that runs now, and since when."""
        self.begun = self.written = time.time()
        self.stepped = False
        self.tally: Tally | None = None
        self.joined = False
        """Whether this rank has met the others: only then its failure belongs to the run in this folder."""

    # ---- what the time is spent on ----

    def mark(self, ago: float = 0.0) -> Mark:
        """How far this start had come `ago` seconds before now. What runs since then counts up to that moment."""
        at, spent = time.time(), dict(self.spent)
        if self.phase is not None:
            name, since = self.phase
            spent[name] += max(0.0, at - ago - since)
        return Mark(at, self.step, **spent)

    def _enter(self, phase: str | None) -> str | None:
        """Begin another phase, None for training; return the one that ends here."""
        now = time.time()
        before, since = self.phase or (None, now)
        if before is not None:
            self.spent[before] += now - since
        self.phase = None if phase is None else (phase, now)
        return before

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Count the block as saving."""
        before = self._enter("saving")
        try:
            yield
        finally:
            self._enter(before)

    # ---- progress ----

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.journal.rank, self.joined = trainer.global_rank, True

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        self.step = trainer.global_step
        if not self.stepped:
            self.stepped = True
            self.journal.mark("first", self.mark())
        elif self.step % self.every == 0:
            now = time.time()
            if now - self.written >= max(LEAST, SPACING * (now - self.begun)):
                self.written = now
                self.journal.mark("progress", self.mark())

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._enter("validation")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._enter(None)
        if trainer.state.fn == TrainerFn.FITTING:
            self._log(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            if self.tally is None:
                self.tally = Tally(self.journal.attempts)
            metrics = goodput.metrics(self.tally.parts(self.mark()))
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def saved(self, path: Path, taken: Mark) -> Callable[[Future[None]], None]:
        """What to call with the result of writing a checkpoint whose content was taken at `taken`."""

        def written(result: Future[None]) -> None:
            if not result.cancelled() and result.exception() is None:
                spent = {"validation": taken.validation, "saving": taken.saving}
                self.journal.mark("saved", Saved(time.time(), taken.step, **spent, file=path.name, taken=taken.at))

        return written

    # ---- the end ----

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record the error that ends the block."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise

    def done(self, why: str = "") -> None:
        """Record that the run is done. why: before its last step."""
        self.journal.end(Cause.done, self.mark(), why)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        # Here and not only in `watched`: what Lightning tears down before may wait for other ranks. A connection breaks
        # when another rank fails, which `peers` explains.
        if not connection_broke(exception):
            self.failed(exception)

    def failed(self, error: BaseException) -> None:
        """Record the error that ends this rank."""
        if (self.joined or self.journal.rank == 0) and not isinstance(error, Silent):
            self.journal.end(cause_of(error), self.mark(), one_line(error), status_of(error))

    def hung(self, why: str, waited: float) -> None:
        """Record that this rank ends after `waited` seconds without progress."""
        self.journal.end(Cause.hang, self.mark(waited), why, STATUSES[Cause.hang], waited)


def one_line(error: BaseException) -> str:
    """A signal's name, or the kind of an error and its message; the last line of a loader process's traceback."""
    if isinstance(error, SystemExit) and cause_of(error) is Cause.preempted:
        return signal.Signals(status_of(error) - SIGNALLED).name
    text = str(error).strip()
    last = text.splitlines()[-1] if text.startswith("Caught ") else text
    return masked(f"{type(error).__name__}: {' '.join(last.split())}")


class RecordingTrainer(pl.Trainer):
    """A trainer that counts the time for which training waits for a save, and records when it is on the disk."""

    def __init__(self, recorder: Recorder, **settings: Any) -> None:
        super().__init__(**settings)
        self.recorder = recorder

    def save_checkpoint(self, filepath: Any, *arguments: Any, **named: Any) -> None:
        """Save; returns when the content is copied, see `checkpoints`."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AveragedValidation):
                callback.put_back(self)
        with self.recorder.saving():
            super().save_checkpoint(filepath, *arguments, **named)
        taken = self.recorder.mark()
        if self.is_global_zero:
            for writing in writer(self).pending[-1:]:
                writing.add_done_callback(self.recorder.saved(Path(filepath), taken))
