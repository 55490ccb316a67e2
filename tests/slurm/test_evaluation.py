"""Evaluation on a real SLURM: two nodes, the loss of one, an array; figures as of one process."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from factories import phantom_evaluation
from slurm.lab import SlurmLab

from segvol_pl.config import EvaluateConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.evaluation.run import evaluate
from segvol_pl.evaluation.summary import Summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SIZE = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", f"--chdir={ROOT}", "--job-name=lab"]


@pytest.fixture(scope="module")
def config(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    return phantom_evaluation(phantom_shards, tmp_path_factory.mktemp("evaluations") / "alone")


@pytest.fixture(scope="module")
def alone(config: EvaluateConfig) -> list[dict[str, Any]]:
    """The figures of one process."""
    return figures(evaluate(config))


def figures(summary: Summary | None) -> list[dict[str, Any]]:
    assert summary is not None
    return [{**asdict(row), "seconds": 0, "memory_mb": 0} for row in summary.rows]


def submit(lab: SlurmLab, config: EvaluateConfig, *sizes: str) -> str:
    out = Path(config.out)
    file = out.with_suffix(".yaml")
    file.write_text(to_yaml(config))
    places = [f"--output={out}-job.log", f"--export=ALL,LOGS={out.parent}"]
    return lab.sbatch(*SIZE, *sizes, *places, script=ROOT / "slurm/evaluate.sbatch", arguments=[str(file)])


def results(config: EvaluateConfig) -> list[Path]:
    return sorted(Path(config.out, "cases").glob("*.json"))


def test_two_nodes_and_the_loss_of_one(
    lab: SlurmLab, config: EvaluateConfig, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    ours = replace(config, out=str(tmp_path / "nodes"))
    job = submit(lab, ours, "--nodes=2")
    deadline = time.monotonic() + 120
    while not results(ours):
        assert time.monotonic() < deadline, f"no case: {lab.state(job)}\n{lab.log(job)}"
        time.sleep(0.01)
    lab.fail("n2")
    before = {path: path.stat().st_mtime_ns for path in results(ours)}
    assert before and not Path(ours.out, "report.html").exists(), "the node was lost before the end"
    lab.heal("n2")
    lab.wait(job, {"COMPLETED"}, timeout=240)
    assert lab.record(job)["Restarts"] == "1"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    said = (tmp_path / f"lab-{job}-0.log").read_text()
    assert "all: mean" in said and "cases are already done" in said
    assert figures(evaluate(ours)) == alone


def test_an_array_is_put_together_by_one_more_job(
    lab: SlurmLab, config: EvaluateConfig, alone: list[dict[str, Any]], tmp_path: Path
) -> None:
    ours = replace(config, out=str(tmp_path / "array"))
    array = submit(lab, ours, "--nodes=1", "--array=3-5%2")
    joining = submit(lab, ours, "--nodes=1", f"--dependency=afterany:{array}")
    lab.wait(joining, {"COMPLETED"}, timeout=240)
    assert len(results(ours)) == 6 and Path(ours.out, "report.html").exists()
    assert figures(evaluate(ours)) == alone
