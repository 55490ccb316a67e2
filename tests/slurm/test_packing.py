"""Packing as an array on a real SLURM of two nodes, one of which fails in between: the bytes of one process."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
from ct_files import write_case
from slurm.lab import SlurmLab

from segvol_pl.config import PackConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.packing.pack import pack
from segvol_pl.packing.stage import STAGING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
CASES, TASKS, BROKEN = 64, 4, "case05"
SIZE = ["--cpus-per-task=4", "--mem=2G", f"--chdir={ROOT}", "--job-name=pack"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PackConfig:
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "cases.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "image", "label"])
        for name in (f"case{number:02d}" for number in range(CASES)):
            rows.writerow([name, *(path.name for path in write_case(folder, name, int(name[4:])))])
    (folder / f"{BROKEN}_ct.nii.gz").write_bytes(b"")
    (folder / "categories.yaml").write_text("liver: [1]\nlung: [2]\n")
    return PackConfig(
        cases=str(folder / "cases.csv"),
        categories=str(folder / "categories.yaml"),
        out=str(folder / "alone"),
        overview_shape=[32, 128, 128],
        samples_per_shard=8,
        workers=1,
    )


def staged(out: Path, task: int) -> list[Path]:
    """What the task of the array has finished: the cases are dealt out in turn."""
    return [path for path in (out / STAGING).glob("*.tar") if int(path.name[4:6]) % TASKS == task]


def test_an_array_that_loses_a_node_packs_the_bytes_of_one_process(
    lab: SlurmLab, config: PackConfig, tmp_path: Path
) -> None:
    out, file = tmp_path / "shards", tmp_path / "pack.yaml"
    file.write_text(to_yaml(config))
    call = {"script": ROOT / "slurm/pack.sbatch", "arguments": [str(file), f"out={out}"]}
    array = lab.sbatch(*SIZE, f"--array=1-{TASKS}%2", f"--output={tmp_path}/task-%a.log", **call)

    deadline = time.monotonic() + 120
    share = CASES // TASKS
    while not (
        lost := [
            task
            for task in range(TASKS)
            if lab.record(f"{array}_{task + 1}").get("NodeList") == "n2" and 0 < len(staged(out, task)) < share - 1
        ]
    ):
        assert time.monotonic() < deadline, lab.log(f"{array}_1")
        time.sleep(0.02)
    lab.fail("n2")
    kept = {path: path.stat().st_mtime_ns for path in staged(out, lost[0])}
    assert 0 < len(kept) < share - 1, "the node was lost while its task packed"
    lab.heal("n2")
    for task in range(TASKS):
        lab.wait(f"{array}_{task + 1}", {"COMPLETED"}, timeout=240)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "what was staged is not packed again"
    assert lab.record(f"{array}_{lost[0] + 1}")["Restarts"] == "1"
    said = "".join((tmp_path / f"task-{task}.log").read_text() for task in range(1, TASKS + 1))
    assert BROKEN in said and f"part {int(BROKEN[4:]) % TASKS}/{TASKS}: {share - 1} of {share} cases staged" in said

    joining = lab.sbatch(*SIZE, f"--output={tmp_path}/join.log", **call)
    lab.wait(joining, {"COMPLETED"}, timeout=120)
    pack(config)
    files = sorted(path.name for path in Path(config.out).iterdir() if path.name != "pack_report.json")
    assert len(files) > CASES // 8 and sorted(path.name for path in out.iterdir() if path.name in files) == files
    for name in files:
        assert (out / name).read_bytes() == (Path(config.out) / name).read_bytes(), name
