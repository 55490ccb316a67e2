"""`benchmarks/gpu.py`: all of it with `--small`, stages that fail or take too long, and the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
STAGES = {"env", "parity", "syncs", "steps", "runs", "micro", "pack", "zoom", "loader", "profile", "compiled"}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/ can be imported from."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def figures(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]


def value(found: list[dict[str, Any]], stage: str, name: str, **settings: Any) -> Any:
    """The one figure of that name whose settings hold these."""
    # The newest, as in the tables: a first one may have warmed up.
    *_, one = [
        one
        for one in found
        if (one["stage"], one["name"]) == (stage, name) and settings.items() <= one["settings"].items()
    ]
    return one["value"]


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), str(out), *arguments]
    # Without a GPU on any machine: what they state is a CPU's.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_stage_gives_its_figures(tmp_path: Path) -> None:
    done = run(tmp_path, "--small", "--budget", "1100")
    found = figures(tmp_path)
    assert done.returncode == 0, [one for one in found if one["name"] == "failed"] or done.stderr
    assert {one["stage"] for one in found} == STAGES
    assert all(set(one) == {"stage", "name", "value", "unit", "card", "settings", "date"} for one in found)
    assert value(found, "syncs", "synchronizations") == "needs a GPU"
    assert value(found, "env", "products", dtype="float32") > 0
    assert value(found, "parity", "gradients", precision="fp32", device="cpu", prompts_at_once=6) < 1e-5
    assert value(found, "parity", "gradients", precision="bf16", device="cpu", prompts_at_once=6) < 0.05
    assert value(found, "steps", "volumes/s", step="SimMIM, 2 volumes") > 0
    for step, prompts in (("2 volumes x 8 prompts", 8), ("1 volume x 24 prompts", 24)):
        for at_once in (6, prompts):
            assert value(found, "steps", "volumes/s", step=step, prompts_at_once=at_once) > 0
    for strategy in ("auto", "fsdp", "zero2"):
        assert value(found, "runs", "losses, fp32", strategy=strategy) < 1e-5
        assert value(found, "runs", "last.ckpt, resumed", strategy=strategy) == 5
    assert value(found, "compiled", "compiled again") == 0
    assert value(found, "loader", "volumes/s", command="train", workers=2) > 0
    assert value(found, "zoom", "windows", prompts=1) > 0
    assert "Self CPU" in (tmp_path / "profile.txt").read_text()
    assert (tmp_path / "trace-supervised.json.gz").stat().st_size > 1000
    assert "step 2 volumes x 8 prompts, prompts_at_once 6" in done.stdout


@pytest.mark.slow
def test_shards_made_elsewhere_are_taken(tmp_path: Path) -> None:
    assert run(tmp_path / "shards", "--pack", "--small").returncode == 0
    done = run(tmp_path / "out", "--small", "--stages", "pack,loader", "--shards", str(tmp_path / "shards"))
    assert done.returncode == 0 and str(tmp_path / "shards") in value(figures(tmp_path / "out"), "pack", "seconds")


@pytest.mark.slow
def test_a_budget_that_is_spent_leaves_stages_out_and_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, "--small", "--stages", "env", "--budget", "1").returncode == 0
    assert [(one["name"], one["value"]) for one in figures(tmp_path)] == [("not begun", "the budget of 1 s is spent")]


def test_a_stage_that_fails_or_takes_too_long_is_a_line_and_leaves_nothing_running(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu
    import gpu_stages

    def fails(bench: Any) -> None:
        raise ValueError("no such thing")

    def hangs(bench: Any) -> None:
        subprocess.run(["sleep", "600"])

    def counts(bench: Any) -> None:
        with bench.part(which="bad"):
            raise RuntimeError("this part only")
        bench.note("answer", 42)

    monkeypatch.setattr(gpu_stages, "STAGES", {"fails": fails, "hangs": hangs, "counts": counts})
    bench = gpu_stages.bench_of(tmp_path, tmp_path, True, None, None, "cpu", "a card")
    problems = [gpu.run_stage(bench.at(stage), limit=3) for stage in ("fails", "hangs", "counts")]
    assert problems == ["ValueError: no such thing", "ended after 3 s", ""]
    found = figures(tmp_path)
    assert [(one["name"], one["value"], one["settings"]) for one in found] == [
        ("failed", "RuntimeError: this part only", {"which": "bad"}),
        ("answer", 42, {}),
    ]
    running = subprocess.run(["pgrep", "-f", "^sleep 600$"], capture_output=True, text=True).stdout
    assert not running


def test_tables_show_each_stage_as_it_ran_last(tmp_path: Path, scripts: None) -> None:
    from gpu_figures import Figure, append, read, tables

    for name, number, settings in (
        ("failed", "out of memory", {}),
        ("clock", 3.0, {}),
        ("ms", 12.34567, {"step": "SimMIM"}),
        ("MFU", 41.0, {"step": "SimMIM"}),
        ("ms", 99.0, {"step": "other"}),
        ("clock", 4.0, {}),
    ):
        unit = {"ms": "ms", "MFU": "%", "clock": "s"}.get(name, "")
        append(tmp_path, Figure("steps", name, number, unit, "a card", settings))
    assert tables(read(tmp_path)).splitlines() == [
        "Card: a card.",
        "",
        "### steps",
        "",
        "| settings | ms | MFU, % |",
        "|---|---:|---:|",
        "| step SimMIM | 12.35 | 41 |",
        "| step other | 99 |  |",
        "",
        "- clock: 4 s",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--stages", "env,nothing"], "'nothing' is none of env"), (["--shards", "nowhere"], "holds no tiny/index.json")],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
