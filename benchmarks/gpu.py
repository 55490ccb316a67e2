"""Figures of one card: what it can do, what a step makes of it, and whether every strategy trains on it.

    python benchmarks/gpu.py OUT [--small] [--stages A,B] [--precision fp32|bf16] [--shards DIR] [--budget SECONDS]
    python benchmarks/gpu.py OUT --table
    python benchmarks/gpu.py DIR --pack

1. Everything is imported once; each stage is then a process forked from this one, which never touches the card, on its
   own clock (`LIMITS`). A stage that fails or takes too long is itself a figure, and the next one begins. `--budget`
   bounds all of them together: what would begin later is left out, and says so.
2. A figure is a JSON line in OUT/figures.jsonl, written as soon as it is known: stage, name, value, unit, card,
   settings, date. What the stages print goes to OUT/log.txt, kernel tables to OUT/profile.txt, traces beside it.
3. `--table` puts the newest figures of OUT into Markdown tables; they are also printed at the end.

`--small` takes a tiny model and runs on a CPU too, in a minute or two; what needs a GPU then says so. `--pack` makes
the phantoms' shards that the stages `runs`, `syncs`, `loader` read, for a machine that cannot pack (no SimpleITK):
there they are given as `--shards DIR`. What a stage measures stands at its function in `gpu_stages.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_figures import CLOCK, FAILED, now, read, tables

if TYPE_CHECKING:
    from gpu_stages import Bench

LIMITS = {
    "env": 40,
    "parity": 80,
    "syncs": 60,
    "steps": 80,
    "runs": 130,
    "micro": 50,
    "pack": 90,
    "zoom": 60,
    "loader": 120,
    "profile": 50,
    "compiled": 120,
}
"""Stage -> seconds after which it is ended, in the order in which they run: what matters most comes first."""
BUDGET = 460.0
"""Seconds for all of them, so that eight minutes hold them with what comes before and after."""
SMALL_FACTOR = 6
"""A CPU in other use may take so many times as long."""
LOG = "log.txt"
LOOK = 0.1
"""Seconds between two looks whether a stage has ended."""
# Asked so, whether there is a card, torch leaves this process as it is: those forked from it can use the card.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


# ---- stages on their clocks ----


def run(given: argparse.Namespace) -> int:
    """All stages asked for, one after another; returns the number of figures that say that something failed."""
    ends = time.monotonic() + given.budget
    given.out.mkdir(parents=True, exist_ok=True)
    before = len(read(given.out))
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as scratch:
        bench = begun(given, Path(scratch))
        for stage in given.stages:
            bench = bench.at(stage)
            left = ends - time.monotonic()
            if left < 5:
                bench.note("not begun", f"the budget of {given.budget:.0f} s is spent")
                continue
            started = time.monotonic()
            problem = run_stage(bench, min(left, LIMITS[stage] * (SMALL_FACTOR if given.small else 1)))
            if problem:
                bench.note(FAILED, problem)
            bench.note(CLOCK, round(time.monotonic() - started, 1), "s")
    return sum(one.name == FAILED for one in read(given.out)[before:])


def begun(given: argparse.Namespace, scratch: Path) -> Bench:
    """What stages work with. The card is asked for its name in a process forked for that."""
    import gpu_stages

    told = scratch / "device.json"
    pid = os.fork()
    if not pid:
        with ended_after():
            told.write_text(json.dumps(gpu_stages.device_and_card()))
    os.waitpid(pid, 0)
    if not told.exists():
        raise SystemExit("the card cannot be used from a forked process: see the error above")
    device, card = json.loads(told.read_text())
    return gpu_stages.bench_of(given.out, scratch, given.small, given.precision, given.shards, device, card)


class ended_after:
    """Ends this process behind its block: nothing of the one that it was forked from is run."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error is not None)


def run_stage(bench: Bench, limit: float) -> str:
    """What went wrong, in one line; nothing where it ended well."""
    import gpu_stages

    with (bench.out / LOG).open("a+", encoding="utf-8") as log:
        print(f"\n==== {bench.stage}, {bench.card}, {now()}", file=log, flush=True)
        begins = log.tell()
        pid = os.fork()
        if not pid:
            with ended_after():
                os.setsid()
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = sys.stderr = log
                gpu_stages.STAGES[bench.stage](bench)
        status = waited(pid, limit)
        if status == 0:
            return ""
        log.seek(begins)
        said = [line for line in log.read().splitlines() if line.strip()]
    if status is None:
        return f"ended after {limit:.0f} s"
    return (said[-1] if said else f"exit status {status}")[:300]


def waited(pid: int, limit: float) -> int | None:
    """The exit status; none where time is up. What the process has started ends with it."""
    ends, ended = time.monotonic() + limit, (0, 0)
    while not ended[0] and time.monotonic() < ends:
        time.sleep(LOOK)
        ended = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended[0]:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of figures.jsonl")
    parser.add_argument("--small", action="store_true", help="a tiny model; runs on a CPU too")
    parser.add_argument("--stages", default=",".join(LIMITS), help=f"some of {','.join(LIMITS)}")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--shards", type=Path, help="folder that --pack made")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages, default {BUDGET:.0f}")
    parser.add_argument("--table", action="store_true", help="print the tables of the figures in OUT, run nothing")
    parser.add_argument("--pack", action="store_true", help="pack phantoms into OUT for --shards, run nothing else")
    given = parser.parse_args()
    given.stages = given.stages.split(",")
    unknown = [stage for stage in given.stages if stage not in LIMITS]
    if unknown:
        parser.error(f"--stages: {unknown[0]!r} is none of {', '.join(LIMITS)}")
    if given.shards and not (given.shards / "tiny" / "index.json").is_file():
        parser.error(
            f"--shards: {given.shards} holds no tiny/index.json: make it by python benchmarks/gpu.py DIR --pack"
        )
    given.budget = given.budget or BUDGET * (SMALL_FACTOR if given.small else 1)
    return given


def main() -> int:
    given = parsed()
    if given.pack:
        from gpu_stages import pack_phantoms

        pack_phantoms(given.out, given.small)
        return 0
    failed = 0 if given.table else run(given)
    print(tables(read(given.out)))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
