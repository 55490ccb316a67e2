"""TensorBoard and MLflow: what a run holds, read back from their own files; and that nothing of theirs ends a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import wandb_config
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segvol_pl.config import TrackConfig, TrainConfig, Wandb
from segvol_pl.errors import ConfigError
from segvol_pl.run_folder import read_metrics, read_rows
from segvol_pl.training import trackers
from segvol_pl.training.loggers import MetricsFile, finish, loggers
from segvol_pl.training.run import train
from segvol_pl.training.trackers import EventFiles, MlflowRun, tinted

BOTH = TrackConfig(wandb=Wandb.disabled, mlflow="local", tensorboard=True, group="ladder")
MLFLOW = replace(BOTH, tensorboard=False)


def tracked(shards: Path, out: Path, steps: int = 4, track: TrackConfig = BOTH) -> TrainConfig:
    return replace(wandb_config(shards, out, steps), track=track)


def events(out: Path) -> EventAccumulator:
    found = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    found.Reload()
    return found


def client(out: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return MlflowClient((out / "mlflow").as_uri())


def the_run(store: MlflowClient, project: str = "segvol_pl") -> Run:
    experiment = store.get_experiment_by_name(project)
    (run,) = store.search_runs([experiment.experiment_id])
    return run


def logged(store: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    """By the name that MLflow permits."""
    name = key.replace("+", "_").replace("/", ".").replace(".", "/", 1)
    history = store.get_metric_history(run.info.run_id, name)
    return sorted((each.step, each.value) for each in history)


# ---- what a run holds ----


def test_a_run_is_whole_at_both_and_goes_on_as_the_same(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a run"
    checkpoint = train(tracked(phantom_shards, out, 2))
    train(tracked(phantom_shards, out, 4))
    rows = read_rows(out / "metrics.csv")
    names = {name for _, name, _ in rows}
    assert {"train/loss", "val/dice/text", "val/dice/box+text", "rate/volumes_per_s"} <= names

    store = client(out, monkeypatch)
    run, scalars = the_run(store), events(out)
    assert set(scalars.Tags()["scalars"]) - {"epoch"} == names
    for name in names:
        expected = sorted(read_metrics(out / "metrics.csv", name))
        assert sorted((each.step, each.value) for each in scalars.Scalars(name)) == [
            (step, pytest.approx(value)) for step, value in expected
        ], name
        assert logged(store, run, name) == expected, name

    assert (run.info.status, run.info.run_name) == ("FINISHED", "a run")
    assert run.data.tags["group"] == "ladder" and run.data.tags["checkpoint"] == str(checkpoint.resolve())
    assert run.data.params["optim.lr"] == "0.001" and run.data.params["model.hidden_size"]
    (text,) = scalars.Tensors("configuration/text_summary")[-1:]
    assert b"optim.max_steps: 4" in text.tensor_proto.string_val[0]
    (key,) = set(scalars.Tags()["images"])
    assert key.startswith("val/masks/") and key.endswith("(truth, text, box+text)")
    assert [each.step for each in scalars.Images(key)] == [0, 2, 4]
    assert len([each for each in store.list_artifacts(run.info.run_id, "images") if each.path.endswith(".png")]) == 3


def test_a_new_run_in_the_folder_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (1.0, 2.0):
        made = loggers(tmp_path, BOTH, after=0)
        for logger in made:
            logger.log_metrics({"train/loss": value}, step=1)
        finish(made)
    (scalar,) = EventAccumulator(str(next((tmp_path / "tensorboard").glob("events*")))).Reload().Scalars("train/loss")
    assert scalar.value == 2.0
    assert len(list((tmp_path / "tensorboard/earlier-1").iterdir())) == 1
    store = client(tmp_path, monkeypatch)
    assert len(store.search_runs([store.get_experiment_by_name("segvol_pl").experiment_id])) == 2


def test_a_resumed_run_takes_the_steps_back_that_it_repeats(tmp_path: Path) -> None:
    first = EventFiles(tmp_path, None)
    for step in range(1, 7):
        first.log_metrics({"train/loss": float(step)}, step)
    first.end(tmp_path / "last.ckpt", preempted=True)
    second = EventFiles(tmp_path, 4)
    second.log_metrics({"train/loss": 40.0}, 4)
    second.finalize("success")
    found = [(each.step, each.value) for each in events(tmp_path).Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_the_masks_of_a_picture_lie_side_by_side_in_red() -> None:
    image = np.array([[0.0, 1.0]])
    found = tinted(image, {"truth": np.array([[True, False]]), "text": np.array([[False, True]])})
    assert found.tolist() == [[[115, 13, 13], [255, 255, 255], [0, 0, 0], [242, 140, 140]]]


# ---- nothing of theirs ends a run ----


def server(down: str) -> TrackConfig:
    return replace(MLFLOW, mlflow=down)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith(("mlflow", "tensorboard"))]


def test_a_server_that_is_down_costs_two_lines(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing listens on port 9 of this machine."""
    train(tracked(phantom_shards, tmp_path, 2, server("http://me:secret@127.0.0.1:9")))
    first, last = said(caplog)
    assert "Connection refused" in first and "sent once it answers" in first
    assert "values were not sent" in last and "secret" not in first + last
    assert len(read_metrics(tmp_path / "metrics.csv", "train/loss")) == 2
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.parametrize("killed", [False, True], ids=["later", "by the next start"])
def test_what_a_server_could_not_take_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, killed: bool
) -> None:
    """The store is away for two steps; the same, if the run is killed before it comes back."""
    monkeypatch.setattr(trackers, "FIRST_PAUSE", 0.0)
    metrics, run = MetricsFile(tmp_path / "metrics.csv", 0), MlflowRun(tmp_path, MLFLOW, new=True)

    def step(number: int) -> None:
        for logger in (metrics, run):
            logger.log_metrics({"train/loss": float(number)}, number)

    step(1)
    (tmp_path / "mlflow").rename(tmp_path / "away")
    (tmp_path / "mlflow").write_text("in the way")
    step(2)
    step(3)
    (tmp_path / "mlflow").unlink()
    (tmp_path / "away").rename(tmp_path / "mlflow")
    assert json.loads((tmp_path / "mlflow.json").read_text())["unsent_from"] == 2
    if killed:
        metrics, run = MetricsFile(tmp_path / "metrics.csv", 2), MlflowRun(tmp_path, MLFLOW, new=False)
        step(3)
    step(4)
    store = client(tmp_path, monkeypatch)
    assert logged(store, the_run(store), "train/loss") == [(number, float(number)) for number in range(1, 5)]
    assert json.loads((tmp_path / "mlflow.json").read_text())["unsent_from"] is None
    assert len(said(caplog)) == (1 if killed else 2)
    assert killed or "takes the run's metrics again" in said(caplog)[1]


def test_another_store_gets_all_that_the_run_has_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.csv").write_text("step,metric,value\n0,val/loss,3.5\n2,val/loss,1.5\n4,val/loss,1.0\n")
    made = loggers(tmp_path, MLFLOW, after=2)
    made[1].log_metrics({"val/loss": 0.5}, step=3)
    store = client(tmp_path, monkeypatch)
    assert logged(store, the_run(store), "val/loss") == [(0, 3.5), (2, 1.5), (3, 0.5)]


def test_event_files_that_cannot_be_written_are_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    made = EventFiles(tmp_path, 2)
    for step in (2, 3):
        made.log_metrics({"train/loss": 1.0}, step)
    made.end(tmp_path / "last.ckpt", preempted=False)
    (line,) = said(caplog)
    assert "the run continues without it" in line


@pytest.mark.parametrize(
    ("key", "track"),
    [("mlflow", MLFLOW), ("tensorboard", replace(BOTH, mlflow=None))],
)
def test_a_package_that_is_missing_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, track: TrackConfig
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"track\.{key}: needs {key}.*pip install 'segvol_pl\[{key}\]'"):
        loggers(tmp_path, track, after=0)


@pytest.mark.parametrize(("place", "problem"), [("host", "neither local nor an address"), ("http", "neither local")])
def test_an_address_has_a_scheme(place: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"track\.mlflow: '{place}' is {problem}"):
        TrackConfig(mlflow=place)


def test_an_unknown_kind_of_store_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"track\.mlflow: pigeon://post"):
        MlflowRun(tmp_path, server("pigeon://post"), new=True)
