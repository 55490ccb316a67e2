"""The whole path through the command line: the demo, as the README's first command runs it."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import DEMO_FILES

from segvol_pl import demo
from segvol_pl.config import DemoConfig, Precision
from segvol_pl.config.loader import load
from segvol_pl.device import resolve_device
from segvol_pl.errors import ConfigError
from segvol_pl.training.strategies import run_device, trainer_precision

README = Path(__file__).parents[1] / "README.md"
SPREAD = 0.05
"""By which the README's figures may differ on another CPU, for prompts with text and without sliding windows."""
WIDE_SPREAD = 0.2
"""The same for other prompts and for sliding windows: what a point means is learned late, and seeds differ as much."""
GAIN = 0.04
"""By which zooming in raises the mean Dice of every prompt, at least."""


def _demo(out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "segvol_pl", "demo", f"out={out}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _stated() -> dict[str, dict[str, float]]:
    """Prompt -> column -> mean Dice, from the README's table."""
    section = README.read_text(encoding="utf-8").split("### Phantoms")[1].split("###")[0]
    rows = re.findall(r"^\| ([a-z+]+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|", section, re.MULTILINE)
    return {prompt: dict(zip(demo.WAYS, map(float, dice), strict=True)) for prompt, *dice in rows}


def _figures(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    summary = json.loads((out / "evaluation" / "summary.json").read_text())
    return json.loads((out / "demo.json").read_text()), summary


def test_a_short_demo_goes_the_whole_way_and_again(tmp_path: Path) -> None:
    # An untrained model finds something everywhere, so small CTs: each prompt decodes every window.
    steps = ("volumes=8", "scale=0.4", "pretrain_steps=2", "train_steps=2")
    said = _demo(tmp_path, *steps)
    assert [part for part in DEMO_FILES if not (tmp_path / part).exists()] == []
    (line,) = [line for line in said.splitlines() if line.startswith("Try the model: ")]
    command, ct, checkpoint = shlex.split(line.removeprefix("Try the model: segvol-pl "))
    assert command == "view" and Path(ct).is_file() and Path(checkpoint.removeprefix("checkpoint=")).is_file()
    assert "Report:" in said and "small: sliding" in said
    with (tmp_path / "evaluation" / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["prompt"] for row in rows} == {"text", "points", "points+text", "box", "box+text"}
    assert {row["mode"] for row in rows} == {"zoom", "sliding"}
    figures, summary = _figures(tmp_path)
    stated = {each["prompt"]: each["dice"] for each in summary["overall"] if each["mode"] == "zoom"}
    assert {prompt: ways["zoom-in"] for prompt, ways in figures["dice"].items()} == pytest.approx(stated)
    trained = (tmp_path / "train" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    _demo(tmp_path, *steps)
    assert (tmp_path / "train" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained


@pytest.mark.parametrize(
    ("asked", "there", "taken"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_each_part_computes_where_it_is_asked_to_and_in_float32(
    asked: str, there: bool, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    config = DemoConfig(out=str(tmp_path), device=asked)
    for command in ("pretrain", "train"):
        run = load(command, demo.training(command, config, tmp_path)).run
        assert (run_device(run).type, trainer_precision(run)) == (taken, "32-true")
    evaluation = load("evaluate", demo.evaluation(config, tmp_path))
    assert (resolve_device(evaluation.device).type, evaluation.precision) == (taken, Precision.fp32)


def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^device: .*device=cpu$"):
        demo.run(load("demo", ["device=cuda", f"out={tmp_path}"]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"device.*cuda:1"):
        load("demo", ["device=cuda:1"])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_learns(tmp_path: Path) -> None:
    """Held-out phantoms: what the README states, with room for another CPU's rounding."""
    _demo(tmp_path, "device=cpu")
    figures, _ = _figures(tmp_path)
    dice, small = figures["dice"], figures["dice_small"]
    for prompt, ways in _stated().items():
        for way, stated in ways.items():
            spread = SPREAD if "text" in prompt and way != "sliding" else WIDE_SPREAD
            assert dice[prompt][way] == pytest.approx(stated, abs=spread), (prompt, way)
    for prompt, ways in dice.items():
        assert ways["zoom-in"] > max(ways["zoom-out"] + GAIN, ways["sliding"])
        assert small[prompt]["zoom-in"] > small[prompt]["zoom-out"]
    assert dice["box+text"]["zoom-in"] > dice["points"]["zoom-in"]
    assert figures["pretrain_val_loss_last"] <= 0.7 * figures["pretrain_val_loss_first"]
