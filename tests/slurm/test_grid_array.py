"""A grid as two arrays on a real SLURM of two nodes, one of which fails in between: the results of the runs at home.

The first array has the trunks. The branches, which start from their checkpoints, are the second one and wait for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from factories import TINY_KEYS
from slurm.lab import SlurmLab

from segvol_pl.run_folder import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS, SHORT = 200, 20
DECAY = SHORT // 5
"""Steps of a branch: the last fifth of its length."""
MODEL = "\n".join(f"  - {each}" for each in TINY_KEYS)
GRID = f"""\
command: train
files: [{ROOT}/configs/tiny/train.yaml]
set:
{MODEL}
  - data.global_batch=2
  - optim.schedule=wsd
  - optim.warmup_steps=5
  - run.log_every=1
  - run.checkpoint_every=10
  - run.cpu_threads=1
  - run.val_batches=1
  - track.wandb=disabled
axes:
  model.hidden_size: [16, 32]
lengths: [{SHORT}, {STEPS}]
"""
TRUNKS, BRANCHES = "--array=0-1", "--array=2-3"
SIZE = ["--cpus-per-task=1", f"--chdir={ROOT}", "--job-name=grid"]


def at_home(grid: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "segvol_pl", "grid", str(grid), *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.csv"
    return dict(read_metrics(path, "train/loss")) if path.exists() else {}


def node_of(run: Path) -> str:
    path = run / "grid.json"
    return str(json.loads(path.read_text())["host"]) if path.exists() else ""


def test_an_array_survives_a_node_and_gives_the_results_of_the_runs_at_home(
    lab: SlurmLab, phantom_shards: Path, tmp_path: Path
) -> None:
    grid, shards = tmp_path / "tiny.yaml", f"data.shards={phantom_shards}"
    grid.write_text(GRID)
    here = tmp_path / "array"
    places = [f"--output={tmp_path}/grid-%a.log", f"--export=ALL,LOGS={tmp_path}"]
    arguments = [str(grid), shards, f"out={here}"]

    def submit(*options: str) -> str:
        return lab.sbatch(*options, *SIZE, *places, script=ROOT / "slurm/grid.sbatch", arguments=arguments)

    job = submit(TRUNKS)
    waiting = submit(BRANCHES, f"--dependency=afterok:{job}")

    deadline = time.monotonic() + 120
    names = [f"hidden-size-{size}_length-{STEPS}_seed-0" for size in (16, 32)]
    while not (
        lost := [
            name for name in names if node_of(here / name) == "n2" and 30 < max(losses(here / name), default=0) < STEPS
        ]
    ):
        assert time.monotonic() < deadline, lab.log(f"{job}_0")
        time.sleep(0.05)
    lab.fail("n2")
    assert max(losses(here / lost[0])) < STEPS, "the node was lost in mid-training"
    lab.heal("n2")
    for task in range(2):
        lab.wait(f"{job}_{task}", {"COMPLETED"}, timeout=200)
    assert lab.record(f"{job}_{names.index(lost[0])}")["Restarts"] == "1"

    for task in (2, 3):
        lab.wait(f"{waiting}_{task}", {"COMPLETED"}, timeout=120)

    at_home(grid, shards, f"out={tmp_path / 'home'}", "run=all")
    for name in names:
        short = name.replace(f"length-{STEPS}", f"length-{SHORT}")
        for run, steps in ((name, STEPS), (short, DECAY)):
            array, home = losses(here / run), losses(tmp_path / "home" / run)
            assert array == home and len(home) == steps

    listed = at_home(grid, shards, f"out={here}")
    assert listed.count(f"finished  {STEPS}/{STEPS}") == 2 and listed.count(f"finished  {SHORT}/{SHORT}") == 2
    assert "none of them is trained on" in listed
