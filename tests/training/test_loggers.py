"""wandb: what an offline run holds, read back from its file; and that nothing of wandb's ends a run."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import wandb
from factories import wandb_config
from ranks import Ranks
from wandb_files import history, records

from segvol_pl.config import TrackConfig, Wandb
from segvol_pl.config.loader import plain, to_yaml
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.loggers import MetricsFile, WandbRun, loggers
from segvol_pl.training.run import train
from segvol_pl.training.validation import dice


def logged(out: Path, key: str) -> dict[int, float]:
    return {row["trainer/global_step"]: row[key] for row in history(out) if key in row}


def settings(out: Path) -> dict[str, Any]:
    """The run's configuration, by its first-level keys."""
    kept: dict[str, Any] = {}
    for record in records(out):
        kind = record.WhichOneof("record_type")
        for item in (*record.run.config.update, *record.config.update) if kind in ("run", "config") else ():
            kept[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return kept


# ---- what a run holds ----


def test_an_offline_run_holds_all_that_there_is_to_know(phantom_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "grid.json").write_text(json.dumps({"state": "running", "places": {"size": "s", "seed": "0"}}))
    config = wandb_config(phantom_shards, out)
    checkpoint = train(config)

    (run,) = [record.run for record in records(out) if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_group, run.display_name, run.run_id) == ("ladder", "run", (out / "wandb_id").read_text())
    kept = settings(out)
    assert kept["config"] == plain(config) and kept["places"] == {"size": "s", "seed": "0"}
    assert kept["manifest"].items() <= json.loads((out / "manifest.json").read_text()).items()
    assert kept["manifest"]["commit"]

    losses = ["loss", "supervised", "pseudo", "dice_loss/text", "dice_loss/box+text", "lr", "grad_norm"]
    rates = ["rate/volumes_per_s", "rate/data_wait", "data/damaged", "data/replaced"]
    for key in (*(f"train/{name}" for name in losses), *rates):
        assert list(logged(out, key)) == [1, 2, 3, 4], key
    # Every number of metrics.csv is at wandb, the same.
    file = out / "metrics.csv"
    names = {line.split(",")[1] for line in file.read_text().splitlines()[1:]}
    assert {"val/dice/text", "val/dice/box+text", "data/volumes", "data/held_out"} <= names
    for name in names:
        assert logged(out, name) == pytest.approx(dict(read_metrics(file, name))), name

    pictures = [row for row in history(out) if any(key.startswith("val/masks/") for key in row)]
    assert len(pictures) == 3  # before the first step, and every second one
    images = list(out.glob("wandb/offline-run-*/files/media/images/val/masks/*.png"))
    masks = list(out.glob("wandb/offline-run-*/files/media/images/mask/**/*.png"))
    assert len(images) == 3 and len(masks) == 9  # truth, text, box+text
    artifacts = [r.artifact for r in records(out) if r.WhichOneof("record_type") == "artifact"]
    artifacts += [r.request.log_artifact.artifact for r in records(out) if r.request.HasField("log_artifact")]
    (artifact,) = [each for each in artifacts if each.type == "model"]
    assert [entry.ref for entry in artifact.manifest.contents] == [checkpoint.resolve().as_uri()]


def test_validation_dice_is_that_of_each_category_and_prompt(phantom_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(wandb_config(phantom_shards, out))
    file = out / "metrics.csv"
    names = {line.split(",")[1] for line in file.read_text().splitlines() if ",val/dice/" in line}
    for prompt in ("text", "box+text"):
        apart = [name for name in names if name.startswith(f"val/dice/{prompt}/")]
        assert len(apart) >= 2
        last = [read_metrics(file, name)[-1][1] for name in apart]
        step, mean = read_metrics(file, f"val/dice/{prompt}")[-1]
        assert step == 4 and mean == pytest.approx(np.mean(last)) and all(0 <= value <= 1 for value in last)


def test_dice_of_masks() -> None:
    truth = torch.zeros(1, 2, 2, 2, 2, dtype=torch.bool)
    truth[0, 0, 0] = True
    masks = torch.zeros(1, 2, 3, 2, 2, 2, dtype=torch.bool)
    masks[0, 0, 0, 0] = True  # equal
    masks[0, 0, 1, 1] = True  # beside it
    masks[0, 0, 2] = True  # twice as large
    np.testing.assert_allclose(dice(masks, truth)[0], [[1, 0, 2 / 3], [0, 0, 0]], rtol=1e-6)


@pytest.mark.slow
def test_two_ranks_count_the_same_dice_and_gradient_norm_as_one(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    for name, number in (("one", 1), ("two", 2)):
        config = wandb_config(phantom_shards, tmp_path / name, steps=2)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(replace(config, track=TrackConfig(wandb=Wandb.disabled))))
        ranks[number]("train", str(tmp_path / f"{name}.yaml"))
    one, two = (tmp_path / name / "metrics.csv" for name in ("one", "two"))
    norms = [dict(read_metrics(path, "train/grad_norm")) for path in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and list(norms[0]) == [1, 2]
    for prompt in ("text", "box+text"):
        first, second = (dict(read_metrics(path, f"val/dice/{prompt}")) for path in (one, two))
        assert first[0] == pytest.approx(second[0], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_at_wandb(phantom_shards: Path, tmp_path: Path) -> None:
    """Stopped by a signal, as before a time limit: the second start writes a file of its own under the same id."""
    out = tmp_path / "run"
    config = wandb_config(phantom_shards, out, steps=400)
    config = replace(config, run=replace(config.run, val_every=0, val_batches=1, checkpoint_every=1000))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "run.yaml")]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.csv").exists() or len(read_metrics(out / "metrics.csv", "train/loss")) < 20:
        assert running.poll() is None
    running.send_signal(signal.SIGUSR1)
    _, errors = running.communicate(timeout=120)
    assert "saved step" in errors
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = list(out.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1
    steps = logged(out, "train/loss")
    assert sorted(steps) == list(range(1, 401))
    assert steps == pytest.approx(dict(read_metrics(out / "metrics.csv", "train/loss")))


# ---- nothing of wandb's ends a run ----


@pytest.mark.slow
@pytest.mark.parametrize("key", ["0" * 40, "short"], ids=["no network", "a key of a wrong form"])
def test_without_network_or_key_the_run_is_written_offline(phantom_shards: Path, tmp_path: Path, key: str) -> None:
    out = tmp_path / "run"
    config = replace(wandb_config(phantom_shards, out), track=TrackConfig())
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    # Nothing listens on port 9 of this machine.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "3",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if " wandb: " in line]
    assert len(warned) == 1 and "written offline" in warned[0], done.stderr
    assert list(logged(out, "train/loss")) == [1, 2, 3, 4]


def test_the_death_of_wandbs_process_is_survived(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in mid-run, as by a full memory or disk: training goes on to the same losses."""
    first = train(replace(wandb_config(phantom_shards, tmp_path / "whole"), track=TrackConfig(wandb=Wandb.disabled)))
    plain_log = WandbRun.log_metrics

    def killing(self: WandbRun, metrics: dict[str, float], step: int | None = None) -> None:
        if step == 2 and "train/loss" in metrics:
            for child in psutil.Process().children(recursive=True):
                if "wandb-core" in " ".join(child.cmdline()) or "wandb" in child.name():
                    child.kill()
        plain_log(self, metrics, step)

    monkeypatch.setattr(WandbRun, "log_metrics", killing)
    with caplog.at_level(logging.WARNING, logger="segvol_pl"):
        train(wandb_config(phantom_shards, tmp_path / "killed"))
    losses = [read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    said = [record.message for record in caplog.records if record.message.startswith("wandb:")]
    assert len(said) == 1 and "training continues without it" in said[0]
    assert first.exists()
    # The next run of the same process is tracked again.
    monkeypatch.setattr(WandbRun, "log_metrics", plain_log)
    train(wandb_config(phantom_shards, tmp_path / "next"))
    assert list(logged(tmp_path / "next", "train/loss")) == [1, 2, 3, 4]


def test_a_folder_that_cannot_be_written_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file where wandb wants its folder. It may find another place, or be given up; training is not touched."""
    (tmp_path / "wandb").write_text("in the way")
    made = loggers(tmp_path, TrackConfig(wandb=Wandb.offline), after=0)
    for logger in made:
        logger.log_metrics({"train/loss": 0.5}, step=1)
    (run,) = [logger for logger in made if isinstance(logger, WandbRun)]
    run.end(tmp_path / "last.ckpt", preempted=False)
    assert read_metrics(tmp_path / "metrics.csv", "train/loss") == [(1, 0.5)]
    assert wandb.run is None, "the process's next run would be handed this one"


def test_a_run_that_begins_anew_keeps_no_row_of_the_one_that_was_killed(tmp_path: Path) -> None:
    for after, kept in ((2, [(0, 3.5), (2, 1.5)]), (0, [])):
        (tmp_path / "metrics.csv").write_text("step,metric,value\n0,val/loss,3.5\n2,val/loss,1.5\n4,val/loss,1.0\n")
        loggers(tmp_path, TrackConfig(wandb=Wandb.disabled), after)
        assert read_metrics(tmp_path / "metrics.csv", "val/loss") == kept


def test_metrics_of_a_full_disk_wait_and_are_written_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path, after=0)
    metrics.log_metrics({"train/loss": 1.0}, step=1)
    path.rename(tmp_path / "kept.csv")
    path.symlink_to("/dev/full")
    for step in (2, 3):
        metrics.log_metrics({"train/loss": float(step)}, step=step)
    said = [record.message for record in caplog.records if "metrics are kept in memory" in record.message]
    assert len(said) == 1 and "No space left on device" in said[0]
    path.unlink()
    (tmp_path / "kept.csv").rename(path)
    metrics.log_metrics({"train/loss": 4.0}, step=4)
    assert read_metrics(path, "train/loss") == [(step, float(step)) for step in range(1, 5)]
