"""What watching a run costs, and whether injected slow ranks are named right.

    python benchmarks/watching.py                # the cost, as a share of a step: two ranks, one run
    python benchmarks/watching.py --trials 30    # runs of four ranks, in each of which three become slow in turn

Cost: the time in all functions of the watchdog and of the comparison of ranks, the wait for the other rank in its
collective included, and the CPU time of the watchdog's threads, over the time of the steps of the same run. The model
is that of `trainer_overhead.py`: a longer step lowers the share.

Trials: in each run three of four ranks, in random order, are slow for 45 steps each, and recover. One computes more in
each encoder block, or pauses in it as a throttled device does, or waits for its data; which and how much is random. A
trial counts if exactly these ranks are named, each within its own steps, with its cause.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import record
from trainer_overhead import MODEL

from segvol_pl.__main__ import main as command
from segvol_pl.config.loader import load
from segvol_pl.data.stream import Stream
from segvol_pl.model.image_encoder import Block
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms
from segvol_pl.training.callbacks import Throughput
from segvol_pl.training.stragglers import Stragglers
from segvol_pl.training.watchdog import Watchdog

STEPS, WARM = 150, 20
"""Of the run whose cost is measured; of them, the first are not."""
EVERY = 10
"""Steps of a log interval in the trials: the default of `run.log_every`."""
SLOW, QUIET = 45, 35
"""Steps for which a rank is slow, and for which none is: before it, so that it counts as slow, and after it, as not."""
KINDS = {"computes more": "by computing", "pauses": "by computing", "waits for data": "by data"}
"""What is injected -> the cause that the line must name."""
LINE = re.compile(r"step (\d+): rank (\d+) on (\S+) is slow, .*, (by \w+):")


# ---- processes ----


def ranks(number: int, folder: Path, prepare: Callable[[int], Callable[[], None]], *arguments: str) -> list[str]:
    """Run `segvol-pl *arguments` on ranks forked from this process; return what each wrote to standard error.

    prepare: changes a rank before it starts, by its number; what it returns is called when the run has ended. Raises
    RuntimeError if a rank fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    logs, pids = [folder / f"rank-{rank}.log" for rank in range(number)], []
    for rank, log in enumerate(logs):
        pid = os.fork()
        if not pid:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0", LOCAL_RANK=str(rank))
            ended = prepare(rank)
            status = command([*arguments, f"run.devices={number}"])
            ended()
            os._exit(status)
        pids.append(pid)
    failed = [rank for rank, pid in enumerate(pids) if os.waitpid(pid, 0)[1]]
    said = [log.read_text() for log in logs]
    if failed:
        raise RuntimeError("\n".join(said[rank][-2000:] for rank in failed))
    return said


def phantoms(folder: Path) -> Path:
    """Pack six small phantoms."""
    write_phantoms(folder, 6, seed=0, scale=0.45)
    sources = [f"{part}={folder / part}" for part in ("images", "labels")]
    keys = [f"categories={folder / 'categories.yaml'}", f"out={folder / 'shards'}", "overview_shape=[16,32,32]"]
    pack(load("pack", [*sources, *keys, "test_fraction=0.4", "workers=1"]))
    return folder / "shards"


def keys(shards: Path, out: Path, steps: int, batch: int) -> list[str]:
    """What the runs share."""
    data = [f"data.shards={shards}", f"data.global_batch={batch}", "data.samples_per_volume=80", "data.workers=0"]
    run = ["run.accelerator=cpu", "run.precision=fp32", "run.val_batches=0", "run.cpu_threads=1", f"run.out={out}"]
    ends = [f"optim.max_steps={steps}", "run.checkpoint_every=100000", "track.wandb=disabled"]
    return [*data, *run, *ends, f"model={MODEL}"]


# ---- the cost ----


def timed(kind: type, spent: dict[str, float]) -> None:
    """Let all hooks of a class add the seconds in them to `spent`, and its threads their CPU time."""

    def hook(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spent[kind.__name__] += time.perf_counter() - start

        return wrapped

    for name, call in list(vars(kind).items()):
        if name.startswith("on_train_batch") or name in ("on_before_backward", "on_before_optimizer_step", "_mark"):
            setattr(kind, name, hook(call))


def cost(shards: Path, folder: Path) -> dict[str, float]:
    """Milliseconds of a step, and of what watches it, on rank 0 of two."""

    def prepare(rank: int) -> Callable[[], None]:
        torch.set_num_threads(1)
        spent = {"Watchdog": 0.0, "Stragglers": 0.0, "threads": 0.0}
        marks: list[float] = []
        threads: list[int] = []
        for kind in (Watchdog, Stragglers):
            timed(kind, spent)
        begun = Throughput.on_train_batch_start

        def mark(self: Throughput, *given: Any) -> None:
            if len(marks) == WARM:
                spent.update(dict.fromkeys(spent, 0.0))
            marks.append(time.perf_counter())
            begun(self, *given)

        Throughput.on_train_batch_start = mark  # type: ignore[method-assign]
        for name in ("_beat", "_watch"):
            loop = getattr(Watchdog, name)

            def thread(self: Watchdog, loop: Callable[[Watchdog], None] = loop) -> None:
                loop(self)
                spent["threads"] += time.thread_time()
                threads.append(1)

            setattr(Watchdog, name, thread)

        def ended() -> None:
            # The threads end when they next look.
            deadline = time.monotonic() + 10
            while len(threads) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            steps = len(marks) - 1 - WARM
            # The threads have also run before: their share is an upper bound.
            figures = {f"{name.lower()}_ms": 1e3 * seconds / steps for name, seconds in spent.items()}
            figures["step_ms"] = 1e3 * (marks[-1] - marks[WARM]) / steps
            (folder / f"cost-{rank}.json").write_text(json.dumps(figures))

        return ended

    prompts = ["prompts.categories_per_volume=1", "prompts.pseudo_per_volume=2", "text.source=seeded"]
    # Beats every 3 s; by default every 180 s.
    watch = ["run.log_every=10", "run.hang_timeout=30"]
    ranks(2, folder, prepare, "train", *keys(shards, folder / "cost", STEPS, batch=2), *prompts, *watch)
    figures: dict[str, float] = json.loads((folder / "cost-0.json").read_text())
    watching = sum(value for name, value in figures.items() if name != "step_ms")
    return {**figures, "share": watching / figures["step_ms"]}


# ---- slow ranks ----


@dataclass(frozen=True)
class Injected:
    """A rank that is slow for some steps."""

    rank: int
    kind: str
    more: float
    """How much longer its blocks take, or how long it waits for data: a share of a block or step when none is slow."""
    begin: int

    def now(self, step: int) -> bool:
        return self.begin <= step < self.begin + SLOW


def schedule(draw: random.Random) -> list[Injected]:
    """Three slow ranks of four, in turn."""
    begins = [QUIET + number * (SLOW + QUIET) for number in range(3)]
    chosen = draw.sample(range(4), 3)
    return [
        Injected(rank, draw.choice(list(KINDS)), draw.uniform(1.0, 2.0), begin)
        for rank, begin in zip(chosen, begins, strict=True)
    ]


def inject(rank: int, slow: list[Injected]) -> None:
    """Make this process, a rank, slow whenever `slow` says so."""
    steps, since = [0], [time.perf_counter()]
    # Seconds of the last steps and blocks while no rank is slow. What is added is a share of them: four ranks share the
    # cores here, so that a block is faster while the others wait.
    took, blocks = deque([0.1], maxlen=20), deque([0.01], maxlen=80)
    computed, sample, begun = Block._computed, Stream.sample, Throughput.on_train_batch_start

    def current(*kinds: str) -> Injected | None:
        now = (each for each in slow if each.rank == rank and each.now(steps[0]))
        return next((each for each in now if each.kind in kinds), None)

    def quiet() -> bool:
        return not any(each.now(steps[0]) for each in slow)

    def block(self: Block, tokens_BTE: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        out_BTE = computed(self, tokens_BTE)
        now = time.perf_counter()
        if quiet():
            blocks.append(now - start)
        elif found := current("computes more", "pauses"):
            end = now + found.more * statistics.median(blocks)
            with torch.no_grad():
                while found.kind == "computes more" and time.perf_counter() < end:
                    computed(self, tokens_BTE)
            time.sleep(max(0.0, end - time.perf_counter()))
        return out_BTE

    def drawn(self: Stream, *given: Any) -> Any:
        if found := current("waits for data"):
            time.sleep(found.more * statistics.median(took))
        return sample(self, *given)

    def counted(self: Throughput, *given: Any) -> None:
        begun(self, *given)
        steps[0] += 1
        now = time.perf_counter()
        if quiet():
            took.append(now - since[0])
        since[0] = now

    Block._computed = block  # type: ignore[method-assign]
    Stream.sample = drawn  # type: ignore[method-assign]
    Throughput.on_train_batch_start = counted  # type: ignore[method-assign]


def trial(shards: Path, folder: Path, seed: int) -> bool:
    """Run four ranks, print what was injected and what was named, and return whether that is right."""
    slow = schedule(random.Random(seed))
    steps = slow[-1].begin + SLOW + QUIET

    def prepare(rank: int) -> Callable[[], None]:
        torch.set_num_threads(1)
        inject(rank, slow)
        return lambda: None

    run = [*keys(shards, folder / f"trial-{seed}", steps, batch=4), f"run.log_every={EVERY}"]
    said = ranks(4, folder, prepare, "pretrain", *run)
    named = [(int(step), int(rank), host, cause) for step, rank, host, cause in LINE.findall(said[0])]
    # One interval later, because the last one of a slow rank may be the one that counts.
    right = len(named) == len(slow) and all(
        (rank, host, cause) == (each.rank, socket.gethostname(), KINDS[each.kind])
        and each.begin < step <= each.begin + SLOW + EVERY
        for each, (step, rank, host, cause) in zip(slow, named, strict=True)
    )
    injected = "; ".join(f"rank {each.rank} {each.kind} ({each.more:.1f}) from step {each.begin}" for each in slow)
    found = "; ".join(f"step {step}: rank {rank} {cause}" for step, rank, _, cause in named)
    print(f"{'right' if right else 'WRONG'}: {injected} -> {found}", flush=True)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = phantoms(folder)
        if not arguments.trials:
            figures = cost(shards, folder)
            record("watching", figures)
            print("\n".join(f"{what}: {value:.4f}" for what, value in figures.items()))
            print(f"watching takes {100 * figures['share']:.2f} % of a step of {figures['step_ms']:.0f} ms")
            return
        seeds = range(arguments.seed, arguments.seed + arguments.trials)
        right = sum(trial(shards, folder, seed) for seed in seeds)
        print(f"{right} of {arguments.trials} runs named their three slow ranks right")
    sys.exit(right < arguments.trials)


if __name__ == "__main__":
    main()
