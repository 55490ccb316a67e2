"""Where metrics go: metrics.csv always, wandb as configured; and the manifest of a run.

A run at wandb keeps its id over requeues, belongs to its grid's group, and holds configuration, commit, every metric,
pictures and where the checkpoint lies. Offline it is as complete: `wandb sync RUN/wandb/offline-run-*` sends it later.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from segvol_pl.atomic import atomic_path, write_text
from segvol_pl.config import TrackConfig, Wandb
from segvol_pl.credentials import masked
from segvol_pl.run_folder import HEADER, manifest, read_places

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """`metrics.csv`: one row per step and metric, appended, so that it survives a kill and a resume.

    `after` is the step that the run goes on from: later rows, of steps that will be done again, are dropped. A run that
    begins anew validates its first weights again, so that it keeps none.
    """

    def __init__(self, path: Path, after: int) -> None:
        super().__init__()
        self.path = path
        self.unwritten: list[list[Any]] = []
        self._start(after)

    @rank_zero_only
    def _start(self, after: int) -> None:
        rows: list[list[str]] = []
        if after and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as stream:
                rows = [
                    row for row in csv.reader(stream) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= after
                ]
        with atomic_path(self.path) as part, part.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([HEADER, *rows])

    @property
    def name(self) -> str:
        """Lightning's name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """None: a run folder holds one run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is written by `write_manifest`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        before, size = len(self.unwritten), self.path.stat().st_size if self.path.exists() else 0
        self.unwritten += [[step, name, value] for name, value in metrics.items() if name != "epoch"]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(self.unwritten)
        except OSError as error:  # a full disk: what counts is that the run lives until it can save
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            if not before:
                log.warning("%s: %s: metrics wait in memory until they can be written", self.path, error.strerror)
        else:
            self.unwritten = []


class WandbRun(WandbLogger):
    """A run at wandb that never ends training: what fails is said once, and metrics.csv goes on.

    Where wandb cannot be reached or the key is refused the run is written offline, whole, for `wandb sync`. Where
    nothing can be written, it is given up.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # Lightning passes it, newer versions of wandb warn of it.
        self._wandb_init.pop("anonymous", None)
        self.given_up = False

    @property
    def experiment(self) -> Any:
        """The wandb run, begun at the first call; one that takes everything and keeps nothing where it cannot begin."""
        import wandb

        for mode in ("as it is", "offline", "disabled"):
            try:
                if mode != "as it is":
                    self._wandb_init["mode"] = mode
                with _masked_arguments():
                    made = super().experiment
            except Exception as error:  # a client of a service: whatever fails, training does not
                self._give_up(error, mode)
            else:
                if mode == "disabled":
                    # wandb holds it as its global run, which the process's next training would be handed.
                    wandb.run = None
                return made
        raise AssertionError("a disabled run needs neither disk nor network")

    def _give_up(self, error: Exception, mode: str) -> None:
        then = "the run is written offline, for `wandb sync`" if mode == "as it is" else "training goes on without it"
        if not self.given_up:
            log.warning("wandb: %s: %s", " ".join(str(error).split()) or type(error).__name__, then)
        self.given_up = mode != "as it is"
        if self.given_up:
            self._leave()

    def _leave(self) -> None:
        """The service that failed is left alone: the process's next run begins with a service of its own."""
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()

    def attempt(self, act: Callable[[], object]) -> None:
        """Does what speaks to wandb; where it fails, that is said and nothing else happens."""
        if self.given_up:
            return
        try:
            act()
        except Exception as error:
            self._give_up(error, "in mid-run")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda: super(WandbRun, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda: super(WandbRun, self).log_hyperparams(params))

    @rank_zero_only
    def picture(self, key: str, image_HW: np.ndarray, masks: Mapping[str, np.ndarray]) -> None:
        """A grey image in [0, 1] with masks over it, by name."""

        def act() -> None:
            # wandb takes a class label for each voxel: 1 where the mask is.
            overlays = {
                name: {"mask_data": mask_HW.astype(np.uint8), "class_labels": {1: name}}
                for name, mask_HW in masks.items()
            }
            grey = (255 * np.clip(image_HW, 0, 1)).astype(np.uint8)
            self.log_image(key, [grey], masks=[overlays])

        self.attempt(act)

    @rank_zero_only
    def end(self, checkpoint: Path, preempted: bool) -> None:
        """Names the checkpoint, by reference, and ends the run at wandb; a preempted one will go on."""

        def act() -> None:
            run = self.experiment
            if checkpoint.exists() and not preempted:
                run.log_artifact(self._reference(checkpoint, run.id), aliases=["last"])
            if preempted:
                run.mark_preempting()
            run.finish(exit_code=1 if preempted else 0)

        self.attempt(act)

    def _reference(self, checkpoint: Path, id: str) -> Any:
        """Where the checkpoint lies, its bytes left there."""
        import wandb

        model = wandb.Artifact(f"model-{id}", type="model", metadata={"bytes": checkpoint.stat().st_size})
        model.add_reference(checkpoint.resolve().as_uri(), checksum=False)
        return model


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """The command line as wandb may keep it: it reads `sys.argv` when a run begins."""
    given = sys.argv
    sys.argv = [masked(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def loggers(out: Path, track: TrackConfig, after: int) -> list[Logger]:
    """metrics.csv, and wandb unless it is disabled or missing. Without a key it writes offline runs to sync later."""
    made: list[Logger] = [MetricsFile(out / "metrics.csv", after)]
    if track.wandb is not Wandb.disabled and wandb_is_there():
        made.append(wandb_logger(out, track, new=after == 0))
    return made


def wandb_is_there() -> bool:
    """Whether wandb is installed; where it is not, rank 0 says so."""
    there = find_spec("wandb") is not None
    if not there:
        rank_zero_only(log.warning)("wandb is not installed: the run goes on without it: pip install wandb")
    return there


def wandb_logger(out: Path, track: TrackConfig, new: bool) -> WandbRun:
    """The wandb run of a run folder, begun or, unless `new`, continued; `track.wandb` is not disabled."""
    # wandb reads this once, at its first call; its summary repeats metrics.csv.
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = track.wandb is Wandb.offline or (track.wandb is Wandb.auto and not _has_key())
    run = WandbRun(
        project=track.project,
        name=track.name or out.name,
        group=track.group,
        save_dir=out,
        mode="offline" if offline else "online",
        id=_wandb_id(out, new),
        resume="allow",
        # Beside wandb's global run: one that broke would be handed to the process's next training too.
        reinit="create_new",
    )
    run.log_hyperparams({"manifest": manifest(), "places": read_places(out)})
    return run


@rank_zero_only
def _wandb_id(out: Path, new: bool) -> str:
    """The run's id at wandb, kept in the run folder: a run that goes on is continued there, not begun anew."""
    path = out / "wandb_id"
    if new or not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def finish(made: list[Logger], preempted: bool = False) -> None:
    """Ends the wandb run: one process may do several runs, and each is its own. A preempted one will go on."""
    for logger in made:
        if isinstance(logger, WandbRun):
            logger.end(Path(str(logger.save_dir)) / "checkpoints" / "last.ckpt", preempted)


def _has_key() -> bool:
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:  # of a wrong form, or refused
        log.warning("wandb: %s: this run is written offline", " ".join(str(error).split()))
        return False
