"""Where metrics are logged: always metrics.csv, and wandb, TensorBoard and MLflow as configured.

A wandb run keeps its id when the job is requeued, belongs to its grid's group, and holds configuration, commit, all
metrics, pictures and the path of the checkpoint. An offline run is equally complete: upload it later by
`wandb sync RUN/wandb/offline-run-*`.
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
from segvol_pl.training.trackers import Tracker, trackers

log = logging.getLogger(__name__)


class MetricsFile(Logger):
    """Append metrics to `metrics.csv`, one row per step and metric, so that they survive a kill and a resume.

    `after` is the step that the run resumes from: rows of later steps, which will be repeated, are dropped. A new run
    (0) keeps none.
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
        """Empty: a run folder holds one run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `write_manifest` writes the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        before, size = len(self.unwritten), self.path.stat().st_size if self.path.exists() else 0
        self.unwritten += [[step, name, value] for name, value in metrics.items() if name != "epoch"]
        try:
            with self.path.open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows(self.unwritten)
        except OSError as error:  # a full disk must not end the run
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            if not before:
                log.warning("%s: %s: metrics are kept in memory until they can be written", self.path, error.strerror)
        else:
            self.unwritten = []


class WandbRun(WandbLogger, Tracker):
    """A wandb run whose failures never end training: they are logged once, and metrics.csv continues.

    If wandb cannot be reached or refuses the key, the run is written offline, complete, for `wandb sync`. If nothing
    can be written, wandb is given up.
    """

    def __init__(self, out: Path, **settings: Any) -> None:
        super().__init__(save_dir=out, **settings)
        self.out = out
        # Lightning passes it; newer versions of wandb warn about it.
        self._wandb_init.pop("anonymous", None)
        self.given_up = False

    @property
    def experiment(self) -> Any:
        """The wandb run, started at the first access; a disabled one if it cannot start."""
        import wandb

        for mode in ("as it is", "offline", "disabled"):
            try:
                if mode != "as it is":
                    self._wandb_init["mode"] = mode
                with _masked_arguments():
                    made = super().experiment
            except Exception as error:  # whatever fails in a remote service, training continues
                self._give_up(error, mode)
            else:
                if mode == "disabled":
                    # wandb keeps it as its global run, which the process's next training would get.
                    wandb.run = None
                return made
        raise AssertionError("a disabled run needs neither disk nor network")

    def _give_up(self, error: Exception, mode: str) -> None:
        then = "the run is written offline, for `wandb sync`" if mode == "as it is" else "training continues without it"
        if not self.given_up:
            log.warning("wandb: %s: %s", " ".join(str(error).split()) or type(error).__name__, then)
        self.given_up = mode != "as it is"
        if self.given_up:
            self._leave()

    def _leave(self) -> None:
        """Stop the service that failed: the process's next run starts its own."""
        import wandb

        with contextlib.suppress(Exception):
            wandb.teardown()

    def attempt(self, act: Callable[[], object]) -> None:
        """Call `act`, which uses wandb. A failure is logged and has no other effect."""
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
    def picture(self, key: str, image_HW: np.ndarray, masks: Mapping[str, np.ndarray], step: int) -> None:
        """Log a grey image in [0, 1] with masks over it, by name. image_HW: float; masks: bool (H,W)."""

        def act() -> None:
            # wandb takes a class label for each voxel: 1 where the mask is.
            overlays = {
                name: {"mask_data": mask_HW.astype(np.uint8), "class_labels": {1: name}}
                for name, mask_HW in masks.items()
            }
            grey = (255 * np.clip(image_HW, 0, 1)).astype(np.uint8)
            self.log_image(key, [grey], step, masks=[overlays])

        self.attempt(act)

    @rank_zero_only
    def end(self, checkpoint: Path, preempted: bool) -> None:
        """Log the path of the checkpoint and end the wandb run; a preempted one will be continued."""

        def act() -> None:
            run = self.experiment
            if checkpoint.exists() and not preempted:
                run.log_artifact(self._reference(checkpoint, run.id), aliases=["last"])
            if preempted:
                run.mark_preempting()
            run.finish(exit_code=1 if preempted else 0)

        self.attempt(act)

    def _reference(self, checkpoint: Path, id: str) -> Any:
        """A wandb artifact that refers to the checkpoint without uploading it."""
        import wandb

        model = wandb.Artifact(f"model-{id}", type="model", metadata={"bytes": checkpoint.stat().st_size})
        model.add_reference(checkpoint.resolve().as_uri(), checksum=False)
        return model


@contextlib.contextmanager
def _masked_arguments() -> Iterator[None]:
    """Mask credentials in `sys.argv`, which wandb records when a run starts."""
    given = sys.argv
    sys.argv = [masked(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def loggers(out: Path, track: TrackConfig, after: int) -> list[Logger]:
    """metrics.csv, wandb unless it is disabled or not installed (without a key an offline run), and other trackers.

    Raises ConfigError if a configured tracker cannot be used on this machine.
    """
    made: list[Logger] = [MetricsFile(out / "metrics.csv", after)]
    if track.wandb is not Wandb.disabled and wandb_is_there():
        made.append(wandb_logger(out, track, new=after == 0))
    return [*made, *trackers(out, track, after + 1 if after else None)]


def wandb_is_there() -> bool:
    """Whether wandb is installed; if not, rank 0 logs it."""
    there = find_spec("wandb") is not None
    if not there:
        rank_zero_only(log.warning)("wandb is not installed: the run continues without it: pip install wandb")
    return there


def wandb_logger(out: Path, track: TrackConfig, new: bool) -> WandbRun:
    """Start the wandb run of a run folder or, unless `new`, continue it. `track.wandb` must not be disabled."""
    # wandb reads this once, at its first call; its summary repeats metrics.csv.
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = track.wandb is Wandb.offline or (track.wandb is Wandb.auto and not has_key())
    run = WandbRun(
        out,
        project=track.project,
        name=track.name or out.name,
        group=track.group,
        mode="offline" if offline else "online",
        id=_wandb_id(out, new),
        resume="allow",
        # Not wandb's global run: a broken one would also be used by the process's next training.
        reinit="create_new",
    )
    run.log_hyperparams({"manifest": manifest(), "places": read_places(out)})
    return run


@rank_zero_only
def _wandb_id(out: Path, new: bool) -> str:
    """The wandb run's id, stored in the run folder, so that a resumed run continues the same wandb run."""
    path = out / "wandb_id"
    if new or not path.exists():
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


def finish(made: list[Logger], preempted: bool = False) -> None:
    """End the run at every tracker, so that the process's next run gets its own. A preempted one will be continued."""
    for logger in made:
        if isinstance(logger, Tracker):
            logger.end(logger.out / "checkpoints" / "last.ckpt", preempted)


def has_key() -> bool:
    """Whether wandb has a key, from its own file or from WANDB_API_KEY, and takes it."""
    import wandb

    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:  # malformed or refused
        log.warning("wandb: %s: this run is written offline", " ".join(str(error).split()))
        return False
