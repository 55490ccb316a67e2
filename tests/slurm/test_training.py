"""Training on a real SLURM: two nodes, signals, requeues, the loss of a node; losses as in an unbroken run.

What another start would not help is not queued again, and the job says why.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from factories import train_config
from slurm.faulty import FAILS
from slurm.lab import SlurmLab

from segvol_pl.config import TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import NOT_FINITE, Cause
from segvol_pl.goodput import parts
from segvol_pl.journal import read
from segvol_pl.run_folder import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
NODES = 3
"""A job has two of them; the third is there for the job that loses one."""
STEPS = 240
SIZE = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", f"--chdir={ROOT}"]

Losses = dict[int, float]


@pytest.fixture(scope="module")
def config(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = train_config(phantom_shards, tmp_path_factory.mktemp("runs") / "whole", steps=STEPS)
    run = replace(config.run, val_every=0, val_batches=1, checkpoint_every=20)
    return replace(config, run=run, data=replace(config.data, workers=1, samples_per_volume=5))


@pytest.fixture(scope="module")
def whole(lab: SlurmLab, config: TrainConfig) -> Losses:
    """The losses of an unbroken job on two nodes."""
    out = Path(config.run.out)
    job = _submit(lab, config, out)
    lab.wait(job, {"COMPLETED"}, timeout=300)
    assert "2 ranks on n1, n2" in (out.parent / f"lab-{job}-0.log").read_text()
    return _losses(out)


def _submit(lab: SlurmLab, config: TrainConfig, out: Path, *sizes: str) -> str:
    file = out.with_suffix(".yaml")
    file.write_text(to_yaml(replace(config, run=replace(config.run, out=str(out)))))
    places = [f"--output={out}-job.log", "--job-name=lab", f"--export=ALL,LOGS={out.parent}"]
    return lab.sbatch(*SIZE, *sizes, *places, script=ROOT / "slurm/train.sbatch", arguments=[str(file)])


def _losses(out: Path) -> Losses:
    path = out / "metrics.csv"
    return dict(read_metrics(path, "train/loss")) if path.exists() else {}


def _await_step(lab: SlurmLab, job: str, out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while max(_losses(out), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step}: {lab.state(job)}\n{lab.log(job)}"
        time.sleep(0.05)


def test_two_nodes_train_like_one_process(lab: SlurmLab, config: TrainConfig, whole: Losses, tmp_path: Path) -> None:
    file = tmp_path / "alone.yaml"
    file.write_text(to_yaml(replace(config, run=replace(config.run, out=str(tmp_path / "alone")))))
    subprocess.run([sys.executable, "-m", "segvol_pl", "train", str(file)], check=True, capture_output=True)
    alone = _losses(tmp_path / "alone")
    assert len(whole) == STEPS
    np.testing.assert_allclose(
        [whole[step] for step in range(1, 21)], [alone[step] for step in range(1, 21)], rtol=1e-5
    )


def test_signalled_jobs_are_queued_again_and_go_on_exactly(
    lab: SlurmLab, config: TrainConfig, whole: Losses, tmp_path: Path
) -> None:
    """SIGUSR1, as before a time limit, then SIGTERM: each time saved, queued again, gone on by itself."""
    out = tmp_path / "signalled"
    job = _submit(lab, config, out)
    for number, (name, step) in enumerate((("USR1", 30), ("TERM", 100)), start=1):
        _await_step(lab, job, out, step)
        lab.scancel(job, signal=name)
        lab.wait_log(job, f"restart {number} on n[1-2]")
    lab.wait(job, {"COMPLETED"}, timeout=300)
    assert lab.record(job)["Restarts"] == "2"
    assert _losses(out) == whole


def test_the_loss_of_a_node_costs_a_checkpoints_interval_at_most(
    lab: SlurmLab, config: TrainConfig, whole: Losses, tmp_path: Path
) -> None:
    out = tmp_path / "lost"
    job = _submit(lab, config, out)
    _await_step(lab, job, out, 50)
    lab.fail("n2")
    before = max(_losses(out))
    # Not healed before the job is done: SLURM still owes n2 the end of the first start's step, sends it again a minute
    # later, and would end the second start's step there, which has the same name.
    try:
        lab.wait(job, {"COMPLETED"}, timeout=300)
    finally:
        lab.heal("n2")
    assert "restart 1 on n[1,3]" in lab.log(job)
    assert lab.record(job)["Restarts"] == "1"
    assert _losses(out) == whole
    assert before < STEPS, "the node was lost in mid-training"
    lost, again = read(out)
    assert lost.kept == again.start.step and again.end is not None and again.end.cause is Cause.done
    assert parts([lost, again], running=False).lost > 0


def test_a_second_job_in_the_same_folder_is_refused(
    lab: SlurmLab, config: TrainConfig, whole: Losses, tmp_path: Path
) -> None:
    """It names the first one, which goes on as if nothing had been."""
    out = tmp_path / "run"
    first = _submit(lab, config, out)
    _await_step(lab, first, out, 5)
    # The nodes have one GPU each, which the first one has.
    second = _submit(lab, config, out, "--gpus-per-node=0")
    lab.wait(second, {"FAILED"}, timeout=300)
    said = (tmp_path / f"lab-{second}-0.log").read_text()
    assert f"{out} is being written by" in said and f"SLURM job {first}" in said
    lab.wait(first, {"COMPLETED"}, timeout=300)
    assert _losses(out) == whole


def test_a_run_that_is_not_finite_is_not_queued_again(lab: SlurmLab, config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = _submit(lab, replace(config, optim=replace(config.optim, lr=1e30, warmup_steps=0)), out)
    lab.wait(job, {"FAILED"}, timeout=300)
    assert lab.record(job)["Restarts"] == "0" and f"Exited with exit code {NOT_FINITE}" in lab.log(job)
    assert "not finite" in (tmp_path / f"lab-{job}-0.log").read_text()
    assert _last_line(lab, job, out).startswith("non finite after step ")


def _last_line(lab: SlurmLab, job: str, out: Path) -> str:
    """The last line of the job's log, which is that of rank 0's log too, and gives a reason not to queue it again."""
    (said, same) = (text.splitlines()[-1] for text in (lab.log(job), (out.parent / f"lab-{job}-0.log").read_text()))
    assert said == same and ": not queued again: " in said
    return said


def test_a_job_that_hangs_is_queued_again_and_at_the_same_step_not_twice(
    lab: SlurmLab, config: TrainConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = replace(config.run, hang_timeout=10.0, custom_strategy="tests.slurm.faulty:hangs")
    job = _submit(lab, replace(config, run=run), out)
    lab.wait(job, {"FAILED"}, timeout=240)
    assert lab.record(job)["Restarts"] == "1"
    first, second = read(out)
    assert first.end is not None and second.end is not None and first.kept == second.start.step == 20
    assert (first.end.cause, first.end.step) == (second.end.cause, second.end.step) == (Cause.hang, FAILS)
    assert first.start.job_started is not None and second.start.queued_since is not None
    reason = f"the start before failed at step {FAILS} too"
    assert _last_line(lab, job, out) == f"hang after step {FAILS} ({second.end.why}): not queued again: {reason}"
    assert f"hang after step {FAILS} ({first.end.why}): queued again" in lab.log(job)
    spent = parts([first, second], running=False)
    assert spent.hang > 2 * run.hang_timeout and spent.queue > 0 and spent.kept > 0


def test_a_job_without_memory_is_not_queued_again(lab: SlurmLab, config: TrainConfig, tmp_path: Path) -> None:
    """Of one rank of two: the other one is killed, or sees only a broken connection."""
    out = tmp_path / "run"
    run = replace(config.run, custom_strategy="tests.slurm.faulty:lacks_memory")
    job = _submit(lab, replace(config, run=run), out)
    lab.wait(job, {"FAILED"}, timeout=300)
    assert lab.record(job)["Restarts"] == "0"
    said = _last_line(lab, job, out)
    assert said.startswith(f"out of memory after step {FAILS}") and "tried to allocate 3 GB" in said
