"""A strategy, a kind of prompt, ways to draw, a figure and a source of the user's own, no file changed: see `toys`."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from boxes import evaluated, write_boxes
from ct_files import write_case
from factories import evaluate_config, train_config

from segvol_pl.config import DrawConfig, Mode, Precision
from segvol_pl.config.loader import custom_function, load, to_yaml
from segvol_pl.errors import ConfigError, PromptError
from segvol_pl.evaluation.run import evaluate
from segvol_pl.imaging.prompts import Prompt, sample_landmarks
from segvol_pl.inference.predictor import Predictor
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import train

EXTREMES = "toys:extremes"


def test_a_strategy_and_a_source_of_ones_own_train_alike(phantom_shards: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "whole", steps=3)
    train(config)
    own = replace(config.run, custom_strategy="toys:single", out=str(tmp_path / "own"))
    data = replace(config.data, shards=f"cupboard://{phantom_shards}")
    toys.Single.steps = 0
    train(replace(config, run=own, data=data))
    whole, found = (read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("whole", "own"))
    assert found == whole and len(found) == toys.Single.steps == 3


def test_a_kind_of_prompt_of_ones_own_is_trained_evaluated_and_predicted(phantom_shards: Path, tmp_path: Path) -> None:
    combinations = ["text", EXTREMES, f"{EXTREMES}+text"]
    config = train_config(phantom_shards, tmp_path / "run", steps=3)
    prompts = replace(config.prompts, combinations=combinations)
    checkpoint = train(replace(config, model=replace(config.model, landmarks=[f"6*{EXTREMES}"]), prompts=prompts))
    for name in combinations:
        assert len(read_metrics(tmp_path / "run/metrics.csv", f"train/dice_loss/{name}")) == 3
    out, wanted = tmp_path / "out", {"modes": list(Mode), "prompts": combinations, "categories": ["liver"]}
    summary = evaluate(evaluate_config(phantom_shards, out, str(checkpoint), "all", device="cpu", **wanted))
    assert summary is not None
    assert {(row.mode, row.prompt) for row in summary.rows} == set(product((mode.value for mode in Mode), combinations))
    image, _ = write_case(tmp_path, "organs")
    session = Predictor.from_checkpoint(checkpoint, device="cpu", precision=Precision.fp32).open(image)
    landmarks = {EXTREMES: toys.extremes(session.volume.array_DHW > 0, np.random.default_rng(0))}
    assert session.segment(Prompt(landmarks=landmarks)).array_DHW.shape == session.volume.array_DHW.shape
    with pytest.raises(PromptError, match="lies outside the CT"):
        session.segment(Prompt(landmarks={EXTREMES: landmarks[EXTREMES] + 100}))
    with pytest.raises(ConfigError, match=r"model\.landmarks: toys:extremes has 5 landmarks, not 6"):
        session.segment(Prompt(landmarks={EXTREMES: landmarks[EXTREMES][:5]}))
    with pytest.raises(ConfigError, match=r"no landmarks toys:other; its model\.landmarks: toys:extremes"):
        session.segment(Prompt(landmarks={"toys:other": landmarks[EXTREMES]}))


def test_an_error_in_a_loader_process_is_one_line_and_ends_the_run(phantom_shards: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "run", steps=3)
    (tmp_path / "config.yaml").write_text(to_yaml(replace(config, data=replace(config.data, workers=1))))
    wrong = ["model.landmarks=[5*toys:extremes]", "prompts.combinations=[text,toys:extremes]"]
    command = [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "config.yaml"), *wrong]
    search = os.pathsep.join([str(Path(toys.__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True, timeout=100
    )
    said = done.stderr.splitlines()[-1]
    assert said == "segvol-pl train: error: model.landmarks: toys:extremes has 6 landmarks, not 5"
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_function_that_marks_other_than_voxels_is_named(phantom_shards: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "run", steps=3)
    with pytest.raises(ConfigError, match=r"model\.landmarks: toys:f: toys has no 'f'"):
        train(replace(config, model=replace(config.model, landmarks=["6*toys:f"])))
    with pytest.raises(ConfigError, match=r"toys:flat returned an array of shape \[3\], not rows of d h w"):
        sample_landmarks("toys:flat", np.ones((2, 2, 2), bool), np.random.default_rng(0))


def test_prompts_and_figures_of_ones_own_stand_in_rows_summary_and_report(tmp_path: Path) -> None:
    shards, out = write_boxes(tmp_path), tmp_path / "out"
    draw = DrawConfig(boxes=["exact", "toys:half"], points=["toys:first"])
    config = evaluate_config(shards, out, prompts=["box+text", "points"], draw=draw, metrics=["toys:jaccard"])
    summary = evaluated(config)
    with (out / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["box"], row["points"]) for row in rows} == {("exact", ""), ("toys:half", ""), ("", "toys:first")}
    for row in rows:
        assert float(row["jaccard"]) == pytest.approx(float(row["dice"]) / (2 - float(row["dice"])), abs=1e-5)
    overall = json.loads((out / "summary.json").read_text())["overall"]
    half, exact = (next(one for one in overall if one["box"] == name) for name in ("toys:half", "exact"))
    assert half["custom"]["jaccard"] < exact["custom"]["jaccard"] == pytest.approx(1.0)
    assert "<th>jaccard</th>" in (out / "report.html").read_text() and summary.custom == ["jaccard"]
    again = evaluated(config)
    assert again.rows == summary.rows


@pytest.mark.parametrize(
    "change",
    [{"draw": DrawConfig(boxes=["toys:f"])}, {"draw": DrawConfig(points=["toys:f"])}, {"prompts": ["toys:f+text"]}],
)
def test_a_drawing_that_does_not_exist_is_named_before_any_case(tmp_path: Path, change: dict[str, Any]) -> None:
    shards, out = write_boxes(tmp_path), tmp_path / "out"
    with pytest.raises(ConfigError, match="toys has no 'f'"):
        evaluated(evaluate_config(shards, out, **change))
    assert not out.exists()


@pytest.mark.parametrize("column", ["dice", "seconds", "case"])
def test_a_figure_named_as_a_column_is_refused_before_any_case(tmp_path: Path, column: str) -> None:
    """It would stand in rows.csv and at wandb in place of that column."""
    shards, out = write_boxes(tmp_path), tmp_path / "out"
    expected = f"metrics: toys:{column}: rows.csv already has a column '{column}': rename the function"
    with pytest.raises(ConfigError, match=expected):
        evaluated(evaluate_config(shards, out, metrics=["toys:jaccard", f"toys:{column}"]))
    assert not out.exists()


def test_what_does_not_exist_is_named() -> None:
    for name, message in (
        ("nowhere:f", "metrics: nowhere:f: No module named 'nowhere': install"),
        ("toys:f", "metrics: toys:f: toys has no 'f'"),
        ("toys:INSIDE", "metrics: toys:INSIDE is no function"),
    ):
        with pytest.raises(ConfigError, match=message):
            custom_function(name, "metrics")


@pytest.mark.parametrize(
    ("command", "pair", "message"),
    [
        ("evaluate", "metrics=[hausdorff]", "'hausdorff' is not a function as package.module:function"),
        ("evaluate", "metrics=[a:f,b:f]", "gives two functions of one name"),
        ("evaluate", "draw.boxes=[exakt]", "'exakt' is none of exact, jittered, slice nor a function"),
        ("train", "run.custom_strategy=mine", "'mine' is not a function"),
        (
            "train",
            "model.landmarks=[toys:extremes]",
            "'toys:extremes' is no N*package.module:function, nor one of: line",
        ),
        ("train", "model.landmarks=[0*toys:extremes]", "is no N*package.module:function"),
        ("train", "model.landmarks=[2*toys:extremes,6*toys:extremes]", "names a function twice"),
        (
            "train",
            "prompts.combinations=[toys:extremes+text]",
            "'toys:extremes' is not among model.landmarks: add N*toys",
        ),
        ("train", "prompts.combinations=[line+text]", "'line' is not among model.landmarks: add line"),
        ("train", "model.landmarks=[line,line]", "names a function twice"),
        ("evaluate", "prompts=[line+line]", "'line+line' is none of points+text"),
        ("evaluate", "prompts=[text+text]", "'text+text' is none of points+text"),
        ("evaluate", "prompts=[scribble+text]", "'scribble+text' is none of points+text"),
    ],
)
def test_a_name_that_is_no_function_is_refused_at_once(command: str, pair: str, message: str) -> None:
    needed = {
        "evaluate": ["checkpoint=c", "data.shards=s", "out=o"],
        "train": ["data.shards=s", "run.out=o", "optim.max_steps=1"],
    }
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(command, [*needed[command], pair])
