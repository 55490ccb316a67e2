"""What the start of a run of several ranks costs, rank by rank, and what of it grows with their number.

    python benchmarks/start_ranks.py SHARDS [ranks=2,8,16]

SHARDS is a folder of labelled shards, such as that of the demo. Every rank is a process of its own that imports all it
needs, on the CPUs of this machine: with more ranks than cores, seconds are those of a full machine, so seconds of CPU
time are stated too. For each number of ranks:

1. Seconds of a rank (median over ranks) in each part of the start: imports, data and weights, process group, comparing
   the ranks, up to the end of the first step.
2. Comparing the ranks by way of rank 0, as `training.startup` does, and by gathering every statement on every rank:
   the fastest of several times, and the bytes that arrive at a rank.
3. A group of gloo that connects all ranks at once, or each pair when it first sends (TORCH_GLOO_LAZY_INIT): seconds
   until its first reduction is done, and connections of a rank.

With strace, also the calls that open or look up files of one start, and those that name the shards' folder.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from results import record

RANKS = (2, 8, 16)
REPEATS = 20
KEYS = [
    str(Path(__file__).parents[1] / "configs" / "tiny" / "train.yaml"),
    "optim.max_steps=1",
    "optim.warmup_steps=1",
    "track.wandb=disabled",
    "run.accelerator=cpu",
    "run.precision=fp32",
    "run.val_batches=0",
    "run.cpu_threads=1",
    "data.workers=0",
]
PARTS = ("imports", "data and weights", "process group", "comparing", "first step")
CALL = re.compile(r"(openat|newfstatat|readlink|access|stat|lstat|statx|faccessat2?|readlinkat)\(")


# ---- one rank ----


def rank_process(arguments: list[str], result: Path) -> None:
    """Start as a rank of a run; write its times to `result`."""
    began = time.time() - _age()
    marks: dict[str, tuple[float, float]] = {}

    def mark(name: str) -> None:
        # The trainer sets up twice: for validation, and for training.
        marks.setdefault(name, (time.time() - began, time.process_time()))

    import torch.distributed as dist

    from segvol_pl.__main__ import main
    from segvol_pl.training import run, startup

    mark("imports")
    _after(run, "prepared", lambda: mark("data and weights"))
    _after(startup.StartUp, "setup", lambda: mark("comparing"))
    _before(startup.StartUp, "setup", lambda: mark("process group"))
    assert main(arguments) == 0
    mark("first step")
    found: dict[str, Any] = {"marks": marks}
    ranks, statement = dist.get_world_size(), {"configuration": "0" * 16, "packages": "p" * 200, "samples": "1" * 16}
    startup.LATE = float("inf")
    node = 0 if dist.get_rank() == 0 else None
    found["compare"] = _fastest(lambda: startup.compare(statement, node, 1))
    gathered: list[Any] = [None] * ranks
    stated = (statement, socket.gethostname(), time.time())
    found["gather"] = _fastest(lambda: dist.all_gather_object(gathered, stated))
    size = len(pickle.dumps(stated))
    found["bytes"] = {"compare": size + 8 * (3 + 2 + 8), "gather": (ranks - 1) * size}
    for kind, lazy in (("full", "0"), ("lazy", "1")):
        os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
        before, start = _connections(), time.perf_counter()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=300))
        dist.all_reduce(_number(), group=group)
        found[kind] = {"seconds": time.perf_counter() - start, "connections": _connections() - before}
        dist.barrier()
    result.write_text(json.dumps(found))


def _number() -> Any:
    import torch

    return torch.ones(1)


def _age() -> float:
    import psutil

    return time.time() - psutil.Process().create_time()


def _before(owner: Any, name: str, call: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        call()
        return inner(*given, **named)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, call: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def wrapped(*given: Any, **named: Any) -> Any:
        done = inner(*given, **named)
        call()
        return done

    setattr(owner, name, wrapped)


def _fastest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _connections() -> int:
    import psutil

    return sum(connection.status == "ESTABLISHED" for connection in psutil.Process().net_connections("tcp"))


# ---- all of them ----


def started(shards: str, ranks: int) -> list[dict[str, Any]]:
    """The times of each rank of one start."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        arguments = [*KEYS, f"data.shards={shards}", f"run.out={folder}/run", f"run.devices={ranks}"]
        arguments += ["data.samples_per_volume=64", f"data.global_batch={ranks}"]
        place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", f"{folder}/{rank}.json", "train", *arguments],
                env={**place, "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE if rank else None,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            _, said = process.communicate()
            assert process.returncode == 0, (said or b"").decode()
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Figures of one start."""
    figures: dict[str, float] = {}
    before = (0.0, 0.0)
    for part in PARTS:
        wall, cpu = (statistics.median(each["marks"][part][kind] for each in found) for kind in (0, 1))
        figures[f"{part}, s"], figures[f"{part}, s of CPU"] = wall - before[0], cpu - before[1]
        before = wall, cpu
    for kind in ("compare", "gather"):
        figures[f"{kind}, ms"] = 1000 * max(each[kind] for each in found)
        figures[f"{kind}, bytes to a rank"] = found[-1]["bytes"][kind]
    for kind in ("full", "lazy"):
        figures[f"{kind} group, ms"] = 1000 * max(each[kind]["seconds"] for each in found)
        figures[f"{kind} group, connections of a rank"] = max(each[kind]["connections"] for each in found)
    return figures


def file_calls(shards: str) -> dict[str, float]:
    """Calls about files: of a start of one process, of its imports alone, of opening the data as local rank 0 and 1."""
    opening = (
        "import sys; from segvol_pl.config import DataConfig; from segvol_pl.data.corpus import open_folders; "
        "open_folders(DataConfig(shards=sys.argv[1]))"
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = [*KEYS, f"data.shards={shards}", f"run.out={folder}/run", "data.global_batch=1"]
        commands = {
            "a start": ["-m", "segvol_pl", "train", *whole],
            "imports": ["-c", "import segvol_pl.training.run"],
            "local rank 0": ["-c", opening, shards],
            "local rank 1": ["-c", opening, shards],
        }
        figures: dict[str, float] = {}
        for name, command in commands.items():
            trace = Path(folder, "trace")
            subprocess.run(
                ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace), sys.executable, *command],
                check=True,
                env={**os.environ, "LOCAL_RANK": name[-1]} if name.startswith("local") else None,
                stderr=subprocess.DEVNULL,
            )
            lines = trace.read_text(errors="replace").splitlines()
            calls = collections.Counter(match[1] for line in lines if (match := CALL.search(line)))
            if not name.startswith("local"):
                figures[f"{name}, opens"] = calls["openat"]
                figures[f"{name}, other look-ups"] = sum(calls.values()) - calls["openat"]
            figures[f"{name}, calls in the shards' folder"] = sum(shards in line for line in lines)
    return figures


def main(shards: str, numbers: list[int]) -> None:
    figures: dict[str, Any] = {}
    if shutil.which("strace"):
        figures["one process"] = file_calls(shards)
        for name, count in figures["one process"].items():
            print(f"{name:44}{count:10.0f}", flush=True)
    for ranks in numbers:
        figures[f"{ranks} ranks"] = summary(started(shards, ranks))
        print(f"{ranks} ranks", flush=True)
        for name, figure in figures[f"{ranks} ranks"].items():
            print(f"  {name:44}{figure:12.3f}", flush=True)
    record("start_ranks", figures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_process(sys.argv[3:], Path(sys.argv[2]))
        sys.exit()
    given = dict(argument.split("=") for argument in sys.argv[2:])
    main(sys.argv[1], [int(number) for number in given.get("ranks", ",".join(map(str, RANKS))).split(",")])
