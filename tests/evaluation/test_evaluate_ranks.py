"""Evaluation by several processes, killed and restarted: each case once, the same figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from factories import phantom_evaluation, save_untrained

from segvol_pl.config import EvaluateConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.run import evaluate
from segvol_pl.evaluation.summary import Summary

MEASURED = ("seconds", "memory_mb")


@pytest.fixture(scope="module")
def config(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    return phantom_evaluation(phantom_shards, tmp_path_factory.mktemp("ranks") / "whole")


@pytest.fixture(scope="module")
def whole(config: EvaluateConfig) -> Summary:
    """By one process in one go."""
    summary = evaluate(config)
    assert summary is not None
    return summary


def started(config: EvaluateConfig, rank: int, ranks: int) -> subprocess.Popen[str]:
    """A rank as torchrun starts it."""
    file = Path(config.out).with_suffix(".yaml")
    file.write_text(to_yaml(config))
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "segvol_pl", "evaluate", str(file)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(out: str | Path) -> list[Path]:
    return sorted(Path(out, "cases").glob("*.json"))


def figures(summary: Summary) -> list[dict[str, Any]]:
    """The rows without what was measured."""
    return [{name: value for name, value in asdict(row).items() if name not in MEASURED} for row in summary.rows]


def test_two_ranks_share_the_cases_and_find_the_same(config: EvaluateConfig, whole: Summary, tmp_path: Path) -> None:
    ours = replace(config, out=str(tmp_path / "shared"))
    ranks = [started(ours, rank, 2) for rank in (0, 1)]
    said = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "all: mean" in said[0][0] and said[1][0] == ""
    assert said[0][1].count("case ") == 3, "rank 0 has half of the cases"
    joined = evaluate(ours)
    assert joined is not None and figures(joined) == figures(whole)
    one, other = (json.loads(Path(each.out, "summary.json").read_text()) for each in (config, ours))
    assert [{**cell, **dict.fromkeys(MEASURED)} for cell in one["categories"]] == [
        {**cell, **dict.fromkeys(MEASURED)} for cell in other["categories"]
    ]


def test_a_killed_rank_is_missed_and_another_world_goes_on(
    config: EvaluateConfig, whole: Summary, tmp_path: Path
) -> None:
    ours = replace(config, out=str(tmp_path / "killed"), rank_timeout=1.0)
    victim = started(ours, 1, 2)
    deadline = time.monotonic() + 120
    while not results(ours.out):
        assert time.monotonic() < deadline and victim.poll() is None, victim.communicate()
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    before = {path: path.stat().st_mtime_ns for path in results(ours.out)}
    assert 1 <= len(before) < 3, "killed in the middle"
    first = started(ours, 0, 2)
    _, complaint = first.communicate(timeout=240)
    assert first.returncode == 1 and "rank_timeout: " in complaint.splitlines()[-1]
    assert not Path(ours.out, "rows.csv").exists() and len(results(ours.out)) == 3 + len(before)
    summary = evaluate(ours)
    assert summary is not None and figures(summary) == figures(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was done is not done again"
    assert not list(Path(ours.out).rglob("*.part"))


def test_slices_are_put_together_by_a_run_without_one(config: EvaluateConfig, whole: Summary, tmp_path: Path) -> None:
    ours = replace(config, out=str(tmp_path / "sliced"))
    for number in (2, 0):  # the second is left to the run that joins
        assert evaluate(replace(ours, part=f"{number}/3")) is None
    assert len(results(ours.out)) == 4 and not Path(ours.out, "report.html").exists()
    summary = evaluate(ours)
    assert summary is not None and figures(summary) == figures(whole)
    assert Path(ours.out, "report.html").exists()


def test_results_of_other_settings_are_refused(config: EvaluateConfig, whole: Summary, tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="other seed, tolerance:"):
        evaluate(replace(config, seed=5, tolerance=1.0))
    other = save_untrained(tmp_path / "other.ckpt", [*config.categories, "pancreas"])
    with pytest.raises(EvaluateError, match="other model"):
        evaluate(replace(config, checkpoint=str(other)))
    with pytest.raises(EvaluateError, match=r"^resume:"):
        evaluate(replace(config, resume=False, part="0/2"))
    assert len(results(config.out)) == 6
