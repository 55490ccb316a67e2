"""Out of memory in training: one line that names what was requested, what was planned, and which key to change.

1. `OutOfMemoryNamed` surrounds training. It recognises torch's errors for GPUs and for main memory, those of loader
   processes, and loader processes that the kernel has killed because main memory was full.
2. The line has the planner's figure for this run, and for the first change that would lower it noticeably.
3. `MemorySnapshot` (`run.memory_snapshot`) records CUDA's allocations and writes them for pytorch.org/memory_viz.
"""

from __future__ import annotations

import logging
import re
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

from segvol_pl.atomic import atomic_path
from segvol_pl.config import PretrainConfig, Recompute, RunConfig, Strategy, TrainConfig
from segvol_pl.device import uses_bf16
from segvol_pl.errors import ConfigError, OutOfMemory, ran_out_of_memory
from segvol_pl.launched import rank_named
from segvol_pl.planning import memory
from segvol_pl.planning.plan import GIB, micro_batch, sample_bytes
from segvol_pl.training.module import Task
from segvol_pl.training.startup import SHARED
from segvol_pl.training.strategies import run_device

log = logging.getLogger(__name__)

SIZE = r"([\d.]+ [KMGT]?i?B)"
REQUESTED = re.compile(rf"[Tt]ried to allocate (?:{SIZE}|(\d+) bytes)")
"""In torch's errors, for GPUs and for main memory."""
FREE = re.compile(rf"total capacity of {SIZE} of which {SIZE} is free")
UNUSED = re.compile(r"and ([\d.]+) GiB is reserved by PyTorch but unallocated")
"""Memory that torch holds in pieces too small for the request."""
FRAGMENTED = 1.0
"""GiB of such memory above which the allocator is advised to use segments that grow."""
IN_LOADER = re.compile(r"Caught \w+ in DataLoader worker")
KILLED = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (is killed by signal: (Killed|Bus error)|exited)")
LESS = 0.9
"""Share of the planned memory that a change must not exceed to be suggested."""
STEPS = 3
"""Steps after which the first snapshot is written: moments and buckets exist by then."""
EVENTS = 200_000
"""Allocations that a snapshot goes back."""
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP, COUNTS = Path("/proc/self/cgroup"), Path("/proc/vmstat")
PAGES = re.compile(r"^(?:total_)?inactive_file (\d+)$", re.MULTILINE)
PAGE = "docs/how-to/out-of-memory.md"

Config = PretrainConfig | TrainConfig


class OutOfMemoryNamed:
    """A block in which memory that runs out raises OutOfMemory. task: the run's, which knows its device."""

    def __init__(self, config: Config, task: Task) -> None:
        self.config, self.task = config, task
        self.kills = kernel_kills()

    def __enter__(self) -> OutOfMemoryNamed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None or isinstance(error, OutOfMemory):
            return
        if ran_out_of_memory(error):
            device = run_device(self.config.run)
            if self.config.run.memory_snapshot and device.type == "cuda":
                write_snapshot(Path(self.config.run.out), "out-of-memory")
            raise OutOfMemory(describe(self.config, str(error), device)) from error
        if found := KILLED.search(str(error)):
            self._name_killed(found[2] or "", error)

    def _name_killed(self, by: str, error: BaseException) -> None:
        run, data = self.config.run, self.config.data
        advice = (
            f"lower data.workers ({data.workers} for each of {run.devices} ranks) or data.prefetch ({data.prefetch})"
        )
        free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
        if by == "Bus error" and free < sample_bytes(self.config) * micro_batch(self.config):
            raise OutOfMemory(f"out of shared memory{_where()}: {SHARED} is full: {advice}, or enlarge it") from error
        if kernel_kills() > self.kills:
            raise OutOfMemory(
                f"out of main memory{_where()}: the kernel killed a loader process; {_gib(free_memory())} are free "
                f"now: {advice}, or request more memory for the job"
            ) from error
        log.error("a loader process was killed; if memory was full (dmesg shows it), %s", advice)


def kernel_kills() -> int:
    """How many processes the kernel has killed for lack of memory: of this process's cgroup, or else of the machine."""
    for file in [*cgroup_files("memory.events"), *cgroup_files("memory.oom_control"), COUNTS]:
        if found := re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            return int(found[1])
    return 0


def cgroup_files(name: str) -> Iterator[Path]:
    """The files of this name of this process's cgroup, version 2, or 1 for memory; innermost first."""
    for line in OWN_GROUP.read_text(encoding="utf-8").splitlines() if OWN_GROUP.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            # In a container the second is this group: the path is that of the host.
            places = (CGROUP / controllers / path.lstrip("/"), CGROUP / controllers)
            yield from (place / name for place in dict.fromkeys(places) if (place / name).is_file())


def free_memory() -> float:
    """Bytes of main memory that this process may still take: of the machine, by its cgroup and by `ulimit -v`."""
    free = float(psutil.virtual_memory().available)
    for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for limit in cgroup_files(most):
            if (text := limit.read_text(encoding="utf-8").strip()).isdecimal():
                taken = int(limit.with_name(used).read_text(encoding="utf-8"))
                # Pages of files that were read count as used, but are given up first.
                files = PAGES.findall(limit.with_name("memory.stat").read_text(encoding="utf-8"))
                free = min(free, int(text) - taken + max(map(int, files), default=0))
    limit_of_addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit_of_addresses != resource.RLIM_INFINITY:
        free = min(free, limit_of_addresses - psutil.Process().memory_info().vms)
    return max(0.0, free)


def describe(config: Config, report: str, device: torch.device) -> str:
    """The line about memory that ran out.

    Args:
        config: the run's configuration.
        report: the message of torch's error.
        device: where the run computes.
    """
    wanted = REQUESTED.search(report)
    requested = f"requested {wanted[1] or _gib(float(wanted[2]))}" if wanted else "of an unknown request"
    if IN_LOADER.search(report):
        loaders = f"{config.data.workers} loader processes for each of {config.run.devices} ranks of a node"
        return (
            f"out of main memory in a loader process{_where()}: {requested}, {_gib(free_memory())} free; {loaders}: "
            f"lower data.workers or data.prefetch ({PAGE})"
        )
    on_gpu = device.type == "cuda" and "DefaultCPUAllocator" not in report
    state = FREE.search(report)
    free = (
        f"{state[2]} of {state[1]} free" if state else f"{_gib(free_memory())} free" if not on_gpu else "free: unknown"
    )
    unused = UNUSED.search(report)
    if unused and float(unused[1]) > FRAGMENTED:
        free += f", {unused[1]} GiB in pieces (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True joins them)"
    place = "GPU" if on_gpu else "main"
    return f"out of {place} memory{_where()}: {requested}, {free}; {_planned(config, device)} ({PAGE})"


def _where() -> str:
    rank = rank_named()
    return f" on {rank} ({socket.gethostname()})" if rank else ""


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _planned(config: Config, device: torch.device) -> str:
    """What the planner has for this run, and the key to change."""
    room = float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    bf16 = uses_bf16(device, config.run.precision)
    total = memory.peak(config, micro_batch(config), bf16, room).total
    volumes = micro_batch(config)
    what = f"planned {_gib(total)} for {volumes} volume{'s' * (volumes != 1)} at once"
    for key, less in changes(config, bf16, room):
        if less <= LESS * total:
            return f"{what}: set {key} (plans {_gib(less)})"
    return f"{what}: use a smaller model, or fewer prompts"


def changes(config: Config, bf16: bool, room: float | None) -> Iterator[tuple[str, float]]:
    """Keys that save memory, those first that change no result, and the bytes that are planned with each."""
    run, volumes = config.run, micro_batch(config)

    def planned(**changed: Any) -> float:
        other = replace(config, run=replace(run, **changed))
        return memory.peak(other, micro_batch(other), bf16, room).total

    ranks, batch = run.devices * run.nodes, config.data.global_batch
    for accumulate in range(run.accumulate + 1, run.accumulate * volumes + 1):
        if batch % (ranks * accumulate) == 0 == batch % (config.data.locality * accumulate):
            if run.strategy is not Strategy.zero1:
                yield f"run.accumulate={accumulate}", planned(accumulate=accumulate)
            break
    if isinstance(config, TrainConfig):
        groups = memory.prompt_groups(config, config.prompts.per_volume, volumes, bf16, room)
        if (half := max(groups) // 2) > 0:
            yield f"run.prompts_at_once={half}", planned(prompts_at_once=half)
    for recompute in (Recompute.cheap, Recompute.blocks):
        done = run.recompute in (recompute, Recompute.blocks)
        if not done and not (recompute is Recompute.cheap and run.strategy is Strategy.zero3):
            yield f"run.recompute={recompute.value}", planned(recompute=recompute)
    if ranks > 1 and run.strategy in (Strategy.auto, Strategy.ddp) and not run.custom_strategy:
        yield "run.strategy=fsdp", planned(strategy=Strategy.fsdp)
    elif ranks > 1 and not run.offload and not run.custom_strategy:
        yield "run.offload=true", planned(offload=True)


# ---- snapshots ----


def check_snapshots(run: RunConfig, device: torch.device) -> None:
    """Raise ConfigError if `run.memory_snapshot` is set and the run computes on a CPU."""
    if run.memory_snapshot and device.type != "cuda":
        raise ConfigError(
            "run.memory_snapshot: only CUDA records allocations, this run computes on a CPU: leave it out"
        )


def write_snapshot(out: Path, name: str) -> Path:
    """Write what CUDA has recorded on this rank into the run folder, as `memory/NAME-RANK.pickle`."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    path = out / "memory" / f"{name}-{rank}.pickle"
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as part:
        torch.cuda.memory._dump_snapshot(str(part))
    log.info("memory: %s shows what holds it at pytorch.org/memory_viz", path)
    return path


class MemorySnapshot(pl.Callback):
    """Record CUDA's allocations, and write them after the first steps."""

    def __init__(self, out: Path) -> None:
        self.out, self.until = out, 0

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        torch.cuda.memory._record_memory_history(max_entries=EVENTS)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.until = trainer.global_step + STEPS

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.until and trainer.global_step == self.until:
            self.until = 0
            write_snapshot(self.out, "first-steps")
