"""Trackers besides wandb that need no account: event files for TensorBoard, and MLflow.

1. What fails in a tracker is logged in one line and never ends a run.
2. Metrics that an MLflow server cannot take wait in memory, and are sent when it answers again. A later start of the
   run sends what an earlier one could not, from metrics.csv. A server that does not answer is asked ever less often,
   so that it costs a run about a hundredth of its time.
3. A run that is continued is the same run there: MLflow's id lies in the run folder.

Letters: H W pixels, C colours.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from segvol_pl.atomic import write_text
from segvol_pl.config import LOCAL, TrackConfig
from segvol_pl.config.loader import flat
from segvol_pl.credentials import masked
from segvol_pl.errors import ConfigError
from segvol_pl.run_folder import manifest, read_places, read_rows, set_aside

log = logging.getLogger(__name__)

EVENTS, STORE, RECORD = "tensorboard", "mlflow", "mlflow.json"
"""In the run folder: the folder of event files, MLflow's local store, and where its run is."""
FLUSH_SECONDS = 30
AT_ONCE, PARAMETERS_AT_ONCE, LONGEST_PARAMETER = 1000, 100, 500
"""MLflow's limits: metrics and parameters of one request, and characters of a parameter."""
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 960.0
"""Seconds until a server that did not answer is asked again: at first, and at most, each twice the one before."""
MLFLOW_SETTINGS = {
    # By default it waits 2 minutes for an answer, 7 times: for so long a run would stand still.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Its store without a database, which mlflow-skinny lacks the packages for.
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
TINT_C = (0.9, 0.1, 0.1)


class Tracker(ABC):
    """What a logger of ours can do besides logging metrics."""

    out: Path
    """The run folder."""

    @abstractmethod
    def picture(self, key: str, image_HW: np.ndarray, masks: Mapping[str, np.ndarray], step: int) -> None:
        """Log a grey image in [0, 1] with masks over it, by name. image_HW: float; masks: bool (H,W)."""

    @abstractmethod
    def end(self, checkpoint: Path, preempted: bool) -> None:
        """Log the path of the checkpoint and end the run; a preempted one will be continued."""


def tinted(image_HW: np.ndarray, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """The image once for each mask, side by side, red where the mask is: uint8 (H,W*masks,C)."""
    grey_HWC = np.repeat(np.clip(image_HW, 0, 1)[..., None], 3, axis=-1)
    red_HWC = 0.5 * grey_HWC + 0.5 * np.array(TINT_C)
    planes = [np.where(mask_HW[..., None], red_HWC, grey_HWC) for mask_HW in masks.values()]
    pixels_HWC: np.ndarray = np.rint(255 * np.concatenate(planes, axis=1)).astype(np.uint8)
    return pixels_HWC


def trackers(out: Path, track: TrackConfig, repeats_from: int | None) -> list[EventFiles | MlflowRun]:
    """The configured ones.

    Args:
        out: the run folder.
        track: which.
        repeats_from: the first step that a continued run logs; None begins a new one.

    Raises:
        ConfigError: the package of one is missing, or MLflow does not know the kind of address.
    """
    made: list[EventFiles | MlflowRun] = []
    if track.tensorboard:
        _require("track.tensorboard", "tensorboard")
        made.append(EventFiles(out, repeats_from))
    if track.mlflow is not None:
        _require("track.mlflow", "mlflow")
        made.append(MlflowRun(out, track, new=repeats_from is None))
    return made


def _require(key: str, package: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{key}: needs {package}, which is not installed: pip install 'segvol_pl[{package}]'")


class EventFiles(TensorBoardLogger, Tracker):
    """TensorBoard's event files, in the folder `tensorboard` of the run folder.

    A resumed run writes a file of its own, which takes back the steps that it repeats. A new run moves the files of
    the one before to `tensorboard/earlier-N`.
    """

    def __init__(self, out: Path, repeats_from: int | None) -> None:
        folder = out / EVENTS
        how: dict[str, Any] = {"flush_secs": FLUSH_SECONDS, "purge_step": repeats_from}
        super().__init__(folder, name="", version="", default_hp_metric=False, **how)
        self.out, self.given_up = out, False
        if repeats_from is None:
            self._set_aside(folder)

    @rank_zero_only
    def _set_aside(self, folder: Path) -> None:
        set_aside(sorted(folder.glob("events.out.tfevents.*")), folder)

    def attempt(self, act: Callable[[], object]) -> None:
        """Call `act`, which writes. The first failure is logged, and nothing more is written."""
        if self.given_up:
            return
        try:
            act()
        except Exception as error:
            self.given_up = True
            log.warning("tensorboard: %s: the run continues without it", " ".join(str(error).split()))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda: super(EventFiles, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        text = "\n".join(f"    {key}: {value}" for key, value in _flat(params).items())
        self.attempt(lambda: self.experiment.add_text("configuration", text))

    @rank_zero_only
    def picture(self, key: str, image_HW: np.ndarray, masks: Mapping[str, np.ndarray], step: int) -> None:
        """Log the image once for each mask, side by side."""
        self.pixels(f"{key} ({', '.join(masks)})", tinted(image_HW, masks), step)

    def pixels(self, key: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Log a picture, uint8."""
        self.attempt(lambda: self.experiment.add_image(key, pixels_HWC, step, dataformats="HWC"))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Lightning calls it after validation too, which precedes training: the file stays open until `end`."""
        self.attempt(lambda: self.experiment.flush())

    @rank_zero_only
    def end(self, checkpoint: Path, preempted: bool) -> None:
        """Close the file."""
        self.attempt(lambda: self.experiment.close())


class MlflowRun(Logger, Tracker):
    """A run at MLflow. Lightning's own logger would end training when the server does not answer.

    Args:
        out: the run folder. Metrics of an earlier start are read from its metrics.csv.
        track: `track.mlflow` is not null.
        new: whether a run begins that is not to continue the one in the folder.

    Raises:
        ConfigError: MLflow does not know the kind of address, or needs a package for it.
    """

    def __init__(self, out: Path, track: TrackConfig, new: bool) -> None:
        super().__init__()
        self.out, self.track, self.place = out, track, masked(str(track.mlflow))
        self.run_id: str | None = None
        self.unsent: list[tuple[int, str, float]] = []
        self.parameters: dict[str, Any] = {}
        self.begun = self.failing = False
        self.unsent_from: int | None = None
        self.pause, self.not_before = FIRST_PAUSE, 0.0
        self._open(new)

    @rank_zero_only
    def _open(self, new: bool) -> None:
        for name, value in MLFLOW_SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient

            local = (self.out / STORE).resolve().as_uri()
            self.client = MlflowClient(local if self.track.mlflow == LOCAL else self.track.mlflow)
        except Exception as error:
            raise ConfigError(f"track.mlflow: {self.place}: {_line(error)}") from error
        record = {} if new else _record(self.out)
        ours = record.get("place") == self.place
        self.run_id = record["run"] if ours else None
        self.continued = ours
        self.unsent_from = record["unsent_from"] if ours else 0
        rows = self.out / "metrics.csv"
        if not new and self.unsent_from is not None and rows.exists():
            self.unsent = [row for row in read_rows(rows) if row[0] >= self.unsent_from]

    @property
    def name(self) -> str:
        """Lightning's name of the logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """The run's id; empty before the first request."""
        return self.run_id or ""

    # ---- what is logged ----

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.unsent += [(step or 0, name, float(value)) for name, value in metrics.items() if name != "epoch"]
        self.attempt(self._send)
        self._note()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        # A run that is continued has them, and MLflow does not let them change.
        self.parameters = {} if self.continued else _flat(params)
        self.attempt(self._send)

    @rank_zero_only
    def picture(self, key: str, image_HW: np.ndarray, masks: Mapping[str, np.ndarray], step: int) -> None:
        """Log the image once for each mask, side by side."""
        self.pixels(f"{key} ({', '.join(masks)})", tinted(image_HW, masks), step)

    def pixels(self, key: str, pixels_HWC: np.ndarray, step: int) -> None:
        """Log a picture, uint8."""

        def act() -> None:
            self.client.log_image(self._send(), pixels_HWC, key=_permitted(key), step=step)

        self.attempt(act)

    def files(self, paths: Sequence[Path]) -> None:
        """Log files."""

        def act() -> None:
            run = self._send()
            for path in paths:
                self.client.log_artifact(run, str(path))

        self.attempt(act)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Mark the run as failed. The other ends are set by `end`: Lightning calls this after validation too."""
        if status == "failed":
            self._terminate("FAILED")

    @rank_zero_only
    def end(self, checkpoint: Path, preempted: bool) -> None:
        """Send what is left, with the path of the checkpoint, and end the run at MLflow."""

        def act() -> None:
            run = self._send()
            if checkpoint.exists():
                self.client.set_tag(run, "checkpoint", str(checkpoint.resolve()))

        self.attempt(act, at_once=True)
        self._note()
        # A preempted run will be continued.
        self._terminate("SCHEDULED" if preempted else "FINISHED")
        if self.unsent:
            told = "a start that continues this run sends them"
            log.warning("mlflow: %s: %d values were not sent: %s", self.place, len(self.unsent), told)

    def _terminate(self, status: str) -> None:
        def act() -> None:
            run = self._send()
            if status == "SCHEDULED":
                self.client.update_run(run, status=status)
            else:
                self.client.set_terminated(run, status)

        self.attempt(act)

    # ---- the server ----

    def attempt(self, act: Callable[[], object], at_once: bool = False) -> None:
        """Call `act`, which asks the server, unless that has just failed. `at_once`: even then."""
        if not at_once and time.monotonic() < self.not_before:
            return
        try:
            act()
        except Exception as error:
            self._failed(error)
            return
        if self.failing:
            log.warning("mlflow: %s: takes the run's metrics again", self.place)
            self.failing, self.pause = False, FIRST_PAUSE

    def _failed(self, error: Exception) -> None:
        self.not_before = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        if not self.failing:
            self.failing = True
            waits = "what is logged waits, and is sent once it answers"
            log.warning("mlflow: %s: %s: %s", self.place, _line(error), waits)

    def _note(self) -> None:
        """Write down from where on metrics are missing at MLflow, for a later start, if this one should be killed."""
        since = min((step for step, _, _ in self.unsent), default=None)
        if self.run_id is not None and (since is None) != (self.unsent_from is None):
            before, self.unsent_from = self.unsent_from, since
            try:
                self._write_record()
            except OSError:  # a full disk must not end the run: it is tried again with the next metrics
                self.unsent_from = before

    def _send(self) -> str:
        """Send what waits, to a run that is begun now if it is not; return the run's id."""
        from mlflow.entities import Metric, Param

        run = self.run_id or self._create()
        if not self.begun:
            self.client.update_run(run, status="RUNNING")
            self.begun = True
        while self.parameters:
            batch = list(self.parameters.items())[:PARAMETERS_AT_ONCE]
            some = [Param(_permitted(key), str(value)[:LONGEST_PARAMETER]) for key, value in batch]
            self.client.log_batch(run, params=some)
            for key, _ in batch:
                del self.parameters[key]
        while self.unsent:
            now = int(1000 * time.time())
            metrics = [Metric(_permitted(name), value, now, step) for step, name, value in self.unsent[:AT_ONCE]]
            self.client.log_batch(run, metrics=metrics)
            del self.unsent[:AT_ONCE]
        return run

    def _create(self) -> str:
        experiment = self.client.get_experiment_by_name(self.track.project)
        id = experiment.experiment_id if experiment else self.client.create_experiment(self.track.project)
        tags = {f"grid.{axis}": label for axis, label in read_places(self.out).items()}
        tags |= {"commit": manifest()["commit"], "folder": str(self.out.resolve())}
        tags |= {"group": self.track.group} if self.track.group else {}
        run = str(self.client.create_run(id, tags=tags, run_name=self.track.name or self.out.name).info.run_id)
        self.run_id, self.begun = run, True
        self._write_record()
        return run

    def _write_record(self) -> None:
        record = {"place": self.place, "run": self.run_id, "unsent_from": self.unsent_from}
        write_text(self.out / RECORD, json.dumps(record) + "\n")


def _record(out: Path) -> dict[str, Any]:
    """Where the folder's run is at MLflow; empty if it is nowhere."""
    path = out / RECORD
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _flat(params: Any) -> dict[str, Any]:
    """The configuration by dotted keys, as on the command line, from what Lightning gives its loggers."""
    given = dict(params or {})
    return flat(given["config"]) if isinstance(given.get("config"), dict) else flat(given)


def _permitted(name: str) -> str:
    """The name as MLflow takes it: `val/dice.box_text.liver` for `val/dice/box+text/liver`.

    Only the first slash stays: in a store of files, a metric cannot be called as the folder of another one.
    """
    group, slash, rest = name.partition("/")
    return re.sub(r"[^\w. -]", "_", group) + slash + re.sub(r"[^\w. -]", "_", rest.replace("/", "."))


def _line(error: Exception) -> str:
    """What was wrong. Of a long text the beginning and the end, where requests that fail have the reason."""
    text = masked(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-150:]}"
