"""Which part of the cases an array task computes: the scripts themselves run, with the variables that SLURM sets."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["pack.sbatch", "evaluate.sbatch", "predict.sbatch"]


@pytest.fixture
def srun(tmp_path: Path) -> Path:
    """A folder with an `srun` that prints its arguments."""
    program = tmp_path / "srun"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return tmp_path


def submit(
    srun: Path, script: str, tasks: list[int], task: int | None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """The script as SLURM runs it for `task` of an array of `tasks`; None: as a job without an array."""
    job = {"SLURM_JOB_NAME": "lab", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1"}
    if task is not None:
        numbers = {"ID": task, "MIN": min(tasks), "MAX": max(tasks), "COUNT": len(tasks)}
        job |= {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}
    path = f"{srun}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "slurm" / script), "a.yaml", "out=b"]
    environment = {"PATH": path, **job, **settings}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def part_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    place = arguments.index("a.yaml")
    assert arguments[place + 1] == "out=b"
    return " ".join(arguments[place + 2 :])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_array_that_follows_on_is_all_parts(srun: Path, script: str) -> None:
    assert [part_of(submit(srun, script, [0, 1, 2], task)) for task in range(3)] == [
        "part=0/3",
        "part=1/3",
        "part=2/3",
    ]
    assert [part_of(submit(srun, script, [3, 4], task)) for task in (3, 4)] == ["part=0/2", "part=1/2"]
    assert part_of(submit(srun, script, [0], 0)) == "part=0/1"
    assert part_of(submit(srun, script, [], None)) == ""
    assert part_of(submit(srun, script, [], None, PARTS="64")) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_some_tasks_again_are_the_parts_that_they_were(srun: Path, script: str) -> None:
    assert [part_of(submit(srun, script, [3, 7], task, PARTS="64")) for task in (3, 7)] == [
        "part=3/64",
        "part=7/64",
    ]
    assert part_of(submit(srun, script, [63], 63, PARTS="64")) == "part=63/64"
    assert part_of(submit(srun, script, [3, 4, 5], 4, PARTS="8")) == "part=4/8"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("tasks", "settings", "reason"),
    [
        ([3, 7], {}, "its 2 tasks do not show the number of parts: put PARTS=N before sbatch"),
        ([0, 2, 4], {}, "its 3 tasks do not show"),
        ([5], {}, "its 1 tasks do not show"),
        ([3, 64], {"PARTS": "64"}, "task 64 is outside PARTS=64 (0 to 63)"),
        ([3], {"PARTS": "many"}, "PARTS=many is not a number of parts"),
        ([0], {"PARTS": "0"}, "PARTS=0 is not a number of parts"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(
    srun: Path, script: str, tasks: list[int], settings: dict[str, str], reason: str
) -> None:
    done = submit(srun, script, tasks, tasks[0], **settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--array: {reason}" in done.stderr and len(done.stderr.splitlines()) == 1
