"""Memory that runs out in training ends in one line: what was requested, what was planned, which key to change."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import train_config
from ranks import Ranks

from segvol_pl.config import Recompute, RunConfig, Strategy, TrainConfig, loader
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import FAILED, MISUSED, OUT_OF_MEMORY, ran_out_of_memory
from segvol_pl.planning import memory
from segvol_pl.training import out_of_memory
from segvol_pl.training.out_of_memory import changes, check_snapshots, describe, free_memory, kernel_kills

ROOM = 80 * 2.0**30
GPU = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 3.00 MiB is "
    "free. Including non-PyTorch memory, this process has 79.14 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch, and 7.50 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory "
    "is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
LIMITED = """
import psutil, resource, torch
from segvol_pl.training.segment import SegVolTask
step = SegVolTask.training_step
def hungry(self, batch, index):
    if index == 2:
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, resource.RLIM_INFINITY))
        self.held = torch.empty(2**30, dtype=torch.uint8)
    return step(self, batch, index)
SegVolTask.training_step = hungry
"""
"""At the third step the process may take 256 MiB more, and wants 1 GiB."""
KILLING = """
import multiprocessing, pathlib, signal, os
from segvol_pl.training import out_of_memory
from segvol_pl.training.segment import SegVolTask
out_of_memory.OWN_GROUP, out_of_memory.CGROUP = pathlib.Path("PLACE/own"), pathlib.Path("PLACE")
step = SegVolTask.training_step
def killing(self, batch, index):
    if index == 1:
        pathlib.Path("PLACE/memory.events").write_text("oom_kill COUNT\\n")
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
    return step(self, batch, index)
SegVolTask.training_step = killing
"""
"""Loader processes are killed as the kernel does it, which counts its kills."""


def _full(*keys: str) -> TrainConfig:
    config = loader.load("train", ["configs/train.yaml", "data.shards=x", "run.out=y", *keys])
    assert isinstance(config, TrainConfig)
    return config


def test_the_line_has_the_request_the_plan_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"total_memory": ROOM}))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setenv("RANK", "3")
    config = _full("run.devices=4", "data.global_batch=32", "run.prompts_at_once=30")
    line = describe(config, GPU, torch.device("cuda"))
    peak = memory.peak(config, 8, True, ROOM).total
    less = memory.peak(replace(config, run=replace(config.run, accumulate=2)), 4, True, ROOM).total
    assert re.match(
        r"out of GPU memory on rank 3 \(\S+\): requested 20.00 MiB, 3.00 MiB of 79.15 GiB free, 7.50 GiB", line
    )
    assert f"planned {peak / 2**30:.2f} GiB for 8 volumes at once" in line
    assert f"set run.accumulate=2 (plans {less / 2**30:.2f} GiB)" in line
    assert "\n" not in line and "docs/how-to/out-of-memory.md" in line


def test_changes_come_in_the_order_of_the_page_and_fit_the_run() -> None:
    config = _full("run.devices=4", "data.global_batch=24", "data.locality=4")
    found = dict(changes(config, True, ROOM))
    assert list(found) == [
        "run.accumulate=2",
        "run.prompts_at_once=15",
        "run.recompute=cheap",
        "run.recompute=blocks",
        "run.strategy=fsdp",
    ]
    assert found["run.recompute=blocks"] < found["run.recompute=cheap"] < memory.peak(config, 6, True, ROOM).total
    # The micro-batch is also shared by 8 places: neither 2 nor 3 micro-batches are possible.
    shared = replace(config, data=replace(config.data, locality=8, global_batch=8 * 4))
    assert "run.accumulate=2" in dict(changes(shared, True, ROOM))
    alone = _full("data.global_batch=1", "run.recompute=blocks", "run.prompts_at_once=1")
    assert list(changes(alone, True, ROOM)) == []
    sharded = _full("run.devices=4", "data.global_batch=4", "run.strategy=zero3")
    assert list(dict(changes(sharded, True, ROOM)))[-2:] == ["run.recompute=blocks", "run.offload=true"]
    first = _full("run.devices=4", "data.global_batch=16", "run.strategy=zero1")
    assert not any("accumulate" in key for key in dict(changes(first, True, ROOM)))
    for key in found:
        loader.load("train", ["configs/train.yaml", "data.shards=x", "run.out=y", "run.devices=4", key])


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(GPU), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("can't allocate memory"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception, so: bool) -> None:
    assert ran_out_of_memory(error) is so


def test_torchs_allocator_fails_as_is_expected() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out_of_memory(caught.value)
    requested = out_of_memory.REQUESTED.search(str(caught.value))
    assert requested is not None and requested[2] == str(2**60)


def test_a_step_that_finds_no_main_memory_ends_the_run_with_its_status(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    """A real process with a real limit."""
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run")))
    (status,), (said,) = ranks[1].ended("train", str(tmp_path / "run.yaml"), patch=LIMITED)
    line = said.strip().splitlines()[-1]
    assert status == OUT_OF_MEMORY
    found = re.fullmatch(
        r"segvol-pl train: error: out of main memory: requested 1\.00 GiB, (\d+\.\d\d) (?:M|G)iB free; planned "
        r"\S+ MiB for 2 volumes at once: set run\.\w+=\S+ \(plans \S+ MiB\) \(docs/how-to/out-of-memory\.md\)",
        line,
    )
    assert found, line
    assert "Traceback" not in said


@pytest.mark.parametrize("counted", [True, False])
def test_a_killed_loader_process_is_out_of_memory_if_the_kernel_counts_it(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], counted: bool
) -> None:
    config = train_config(phantom_shards, tmp_path / "run")
    data = replace(config.data, workers=1, prefetch=2)
    (tmp_path / "run.yaml").write_text(to_yaml(replace(config, data=data)))
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.events").write_text("oom_kill 3\n")
    patch = KILLING.replace("PLACE", str(tmp_path)).replace("COUNT", "4" if counted else "3")
    (status,), (said,) = ranks[1].ended("train", str(tmp_path / "run.yaml"), patch=patch)
    advice = "lower data.workers (1 for each of 1 ranks) or data.prefetch (2)"
    assert advice in said and "Traceback" not in said
    if counted:
        assert status == OUT_OF_MEMORY and "error: out of main memory: the kernel killed a loader process" in said
    else:
        assert status == FAILED and "a loader process was killed; if memory was full" in said


def test_the_kernels_count_and_limits_are_those_of_the_own_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 and 1 of cgroups, in a container (whose group is the root that it sees) or outside."""
    for name, value in (("OWN_GROUP", "own"), ("CGROUP", "group"), ("COUNTS", "vmstat")):
        monkeypatch.setattr(out_of_memory, name, tmp_path / value)
    (tmp_path / "vmstat").write_text("nr_free 1\noom_kill 9\n")
    assert kernel_kills() == 9
    machine = free_memory()
    inner, outer = tmp_path / "group/job/step", tmp_path / "group/memory"
    inner.mkdir(parents=True)
    outer.mkdir()
    (outer / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    (outer / "memory.limit_in_bytes").write_text("3000000\n")
    (outer / "memory.usage_in_bytes").write_text("2500000\n")
    (outer / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 250000\n")
    (tmp_path / "own").write_text("4:memory:/of/the/host\n0::/\n")
    assert kernel_kills() == 5
    assert free_memory() == 750000
    (inner / "memory.events").write_text("oom 1\noom_kill 2\n")
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    assert kernel_kills() == 2
    assert free_memory() == pytest.approx(machine, rel=0.5)


def test_snapshots_are_refused_on_a_cpu(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    run = RunConfig(memory_snapshot=True, recompute=Recompute.blocks, strategy=Strategy.auto)
    check_snapshots(run, torch.device("cuda"))
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run")))
    keys = ["run.memory_snapshot=true"]
    said = []
    for more in ([], ["run.rehearse=2"]):
        (status,), (text,) = ranks[1].ended("train", str(tmp_path / "run.yaml"), *keys, *more)
        assert status == MISUSED
        said.append(text.strip().splitlines()[-1])
    assert said[0] == said[1] and "error: run.memory_snapshot: only CUDA records allocations" in said[0]
