"""The lab itself: the multi-node jobs, requeues and power cuts that the tests of training rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from lab import LabError, SlurmLab, available

pytestmark = pytest.mark.slow

ONCE = 'echo "run ${SLURM_RESTART_COUNT:-0}"; if [ -z "${SLURM_RESTART_COUNT:-}" ]; then'
"""What follows, up to `fi`, only the first run of the job does."""
KILLED = """
import os, signal, sys
from pathlib import Path
from lab import SlurmLab
with SlurmLab(Path(sys.argv[1])) as lab:
    lab.wait_log(lab.sbatch(script="echo up; sleep 600"), "up")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[SlurmLab]:
    if reason := available():
        pytest.skip(reason)
    with SlurmLab(tmp_path / "lab") as lab:
        yield lab


def processes_of(folder: Path) -> list[str]:
    """Names of the living that were started with the lab in `folder`: daemons, and jobs by their environment."""
    mark, found = f"SLURM_CONF={folder}/".encode(), []
    for process in psutil.process_iter(["name"]):
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:  # it has just ended
            continue
        found += [process.info["name"]] if mark in environment else []
    return found


def gone(folder: Path) -> bool:
    """The kernel kills what is in a namespace soon after its first process, not at once."""
    deadline = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(folder)


def test_a_job_runs_on_two_nodes_with_their_own_names(lab: SlurmLab) -> None:
    job = lab.sbatch("--nodes=2", script='echo "$WORD $1"; srun hostname', arguments=["b"], env={"WORD": "a"})
    assert lab.wait(job) == "COMPLETED"
    assert sorted(lab.log(job).splitlines()) == ["a b", "n1", "n2"]


def test_a_job_requeues_itself(lab: SlurmLab) -> None:
    script = f'{ONCE} scontrol requeue "$SLURM_JOB_ID"; sleep 600; fi'
    job = lab.sbatch("--open-mode=append", script=script)
    assert lab.wait(job) == "COMPLETED"
    assert [line for line in lab.log(job).splitlines() if line.startswith("run")] == ["run 0", "run 1"]
    assert lab.record(job)["Restarts"] == "1"


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["batch host", "other node"])
def test_a_job_whose_node_loses_power_runs_again(lab: SlurmLab, node: str) -> None:
    script = f'{ONCE} srun bash -c "hostname; sleep 600"; fi; srun hostname'
    job = lab.sbatch("--nodes=2", "--open-mode=append", script=script)
    lab.wait_log(job, "n1\n")
    lab.wait_log(job, "n2\n")
    lab.fail(node)
    assert lab.wait(job, {"PENDING"}) == "PENDING"
    lab.heal(node)
    assert lab.wait(job) == "COMPLETED"
    said = [line for line in lab.log(job).splitlines() if line.startswith(("run", "n"))]
    assert [said[0], *sorted(said[1:3]), said[3], *sorted(said[4:])] == ["run 0", "n1", "n2", "run 1", "n1", "n2"]
    assert lab.record(job)["Restarts"] == "1"


def test_a_signal_reaches_the_batch_shell_or_the_tasks(lab: SlurmLab) -> None:
    trap = "trap 'echo {} got it; exit 0' USR1; echo {} waits; while true; do sleep 0.1; done"
    batch = lab.sbatch(script=trap.replace("{}", "batch"))
    tasks = lab.sbatch("--nodes=2", "--ntasks=2", script=f'srun bash -c "{trap.replace("{}", "task")}"')
    lab.wait_log(batch, "batch waits\n")
    lab.wait_log(tasks, "task waits\ntask waits\n")
    lab.scancel(batch, signal="USR1", batch=True)
    lab.scancel(tasks, signal="USR1")
    assert [lab.wait(batch), lab.wait(tasks)] == ["COMPLETED", "COMPLETED"]
    assert lab.log(batch).count("batch got it\n") == 1 and lab.log(tasks).count("task got it\n") == 2


def test_an_unmet_wait_shows_the_job_and_the_daemons(lab: SlurmLab) -> None:
    job = lab.sbatch(script="echo a bad day; exit 3")
    with pytest.raises(LabError, match=r"FAILED.*a bad day") as failure:
        lab.wait(job, {"COMPLETED"})
    assert "---- controller.log" in str(failure.value) and f"Launching batch job {job}" in str(failure.value)
    with pytest.raises(LabError, match="Invalid job id"):
        lab.state("999")
    lab.scancel(sleeper := lab.sbatch(script="sleep 600"))
    assert lab.wait(sleeper) == "CANCELLED"


def test_nothing_outlives_the_block_or_the_test_run(lab: SlurmLab, tmp_path: Path) -> None:
    assert {"munged", "slurmctld", "slurmd"} <= set(processes_of(lab.folder))
    with pytest.raises(KeyboardInterrupt), SlurmLab(tmp_path / "left") as left:
        left.wait_log(left.sbatch(script="echo up; sleep 600"), "up")
        assert "sleep" in processes_of(left.folder)
        raise KeyboardInterrupt
    assert gone(left.folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment, timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert gone(tmp_path / "killed")
    assert lab.wait(lab.sbatch(script="true")) == "COMPLETED"
