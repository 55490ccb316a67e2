"""What a rank leaves when a run hangs: `run.out`/postmortem/rank-N.txt, and the last collectives that torch recorded.

    postmortem/summary.txt         the line with which the job ended: the rank that hung, its host, where it stood
    postmortem/rank-N.txt          step, last completed operation, samples, loader processes, Python stacks
    postmortem/collectives_N       the last collectives, of NCCL for `torchfrtrace postmortem --prefix collectives_`
    postmortem/earlier-N/          post-mortems of earlier starts, moved there when the run starts again

Every part is written within a time limit: the disk or the GPU that a run hangs on may not answer here either.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from segvol_pl import run_folder
from segvol_pl.atomic import write_text
from segvol_pl.data.loader_stacks import stacks_of

log = logging.getLogger(__name__)

FOLDER, SUMMARY = "postmortem", "summary.txt"
STANDS = "stands in: "
"""Begins the line of rank-N.txt that names where the main thread stands."""
RECORDED = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""How many collectives torch's Flight Recorder keeps: the name since torch 2.9, and the one before."""
KEPT = 2000
"""That number, unless the user has set one; newer versions of torch keep as many by default."""
PART = 5.0
"""Seconds that one part of a post-mortem may take."""
LOADERS = 8
"""Loader processes whose stacks are written; the others are likely to wait for the same."""

PACKAGE = Path(__file__).parents[1]
LOADER = "torch/utils/data/dataloader.py"
"""Where the main thread waits for loader processes."""

Value = TypeVar("Value")


def record_collectives() -> None:
    """Let torch record the last collectives, unless the user has set how many. Call it before there is a group."""
    if any(name in os.environ for name in RECORDED):
        return
    # Newer versions warn of the old name.
    for name in RECORDED[:1] if torch.__version__ >= "2.9" else RECORDED:
        os.environ[name] = str(KEPT)


def in_time(work: Callable[[], Value], otherwise: Value, seconds: float = PART) -> Value:
    """What `work` returns; `otherwise` if it fails, or does not return within `seconds` (it is then left behind).

    Whatever fails here must not keep a hanging job from its end; the failure is logged for --debug.
    """
    found = [otherwise]

    def run() -> None:
        try:
            found[0] = work()
        except Exception as error:
            log.debug("post-mortem: %r", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


@dataclass(frozen=True)
class Rank:
    """A rank that writes its post-mortem."""

    rank: int
    ranks: int
    host: str
    pid: int


@dataclass(frozen=True)
class Stall:
    """How far a rank has come."""

    step: int
    after: str
    """The last completed operation."""
    waited: float
    """Seconds without progress."""
    writing: str
    """The checkpoint that is being written in the background, and for how long; empty if there is none."""
    keys: Callable[[], list[str]]
    """Gives the samples of the batch that was last trained on."""


def write(folder: Path, who: Rank, stall: Stall) -> bool:
    """Write `folder`/rank-N.txt and, if torch recorded any, collectives_N. Return whether the disk took the text.

    Until torch has answered, the text is in rank-N-partial.txt: its recorder may wait for a GPU that hangs.
    """
    first = folder / f"rank-{who.rank}-partial.txt"
    text = _text(who, stall)
    if not in_time(lambda: _written(first, text), False):
        return False
    recorded = in_time(last_collectives, "(torch's recorder does not answer)")
    in_time(lambda: _write_collectives(folder / f"collectives_{who.rank}"), None)
    whole = f"{text}\nlast collectives: {recorded}\n"
    if in_time(lambda: _written(folder / f"rank-{who.rank}.txt", whole), False):
        in_time(first.unlink, None)
    return True


def _text(who: Rank, stall: Stall) -> str:
    states = in_time(lambda: "\n".join(loader_states()), "(unknown)", LOADERS * 2.0)
    parts = [
        f"rank {who.rank} of {who.ranks} on {who.host}, process {who.pid}, at {datetime.now().astimezone():%F %T %z}",
        f"no progress for {stall.waited:.0f} s: step {stall.step}, after {stall.after}",
        f"{STANDS}{in_time(main_stands, '(unknown)')}",
        f"checkpoint: {stall.writing or 'none is being written'}",
        f"last batch trained on: {', '.join(in_time(stall.keys, ['(unknown)'])) or 'none'}",
        f"\nloader processes:\n{states or 'none'}",
        f"\nthreads:\n{in_time(stacks, '(unknown)')}",
    ]
    return "\n".join(parts)


def _written(path: Path, text: str) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return True


def read_stands(folder: Path, rank: int) -> str:
    """Where the main thread of a rank stood; empty if the rank wrote nothing."""
    for path in (folder / f"rank-{rank}.txt", folder / f"rank-{rank}-partial.txt"):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            if line.startswith(STANDS):
                return line.removeprefix(STANDS)
    return ""


def set_aside(folder: Path) -> None:
    """Move the post-mortem of an earlier start to `folder`/earlier-N."""
    run_folder.set_aside([path for path in folder.glob("*") if path.is_file()], folder)


# ---- stacks ----


def main_stands() -> str:
    """Where the main thread stands: its innermost frame, and the innermost one of this package."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "(the main thread has ended)"
    return stands(frame)


def stands(frame: FrameType) -> str:
    """A frame as `function (file:line)`, and for whom: a loader process, or the innermost caller in this package."""
    if any(each.f_code.co_filename.endswith(LOADER) for each in _callers(frame)):
        return f"{_named(frame)}, waiting for a loader process"
    own = next((each for each in _callers(frame) if Path(each.f_code.co_filename).is_relative_to(PACKAGE)), frame)
    return _named(frame) if own is frame else f"{_named(frame)}, called by {_named(own)}"


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _named(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    roots = (parent for parent in path.parents if parent.name in ("site-packages", "dist-packages"))
    root = next(roots, PACKAGE.parent)
    short = path.relative_to(root) if path.is_relative_to(root) else Path(*path.parts[-2:])
    return f"{frame.f_code.co_name} ({short}:{frame.f_lineno})"


def stacks() -> str:
    """Python stacks of all threads of this process, the innermost frame first."""
    names = ", ".join(f"0x{each.ident or 0:016x} is {each.name}" for each in threading.enumerate())
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return f"{names}\n{file.read().decode(errors='replace')}"


def loader_states() -> Iterator[str]:
    """A line about each loader process that this rank started, with its stacks if it answers."""
    for number, worker in enumerate(multiprocessing.active_children()):
        yield _state(worker)
        if number < LOADERS and worker.pid is not None:
            yield in_time(partial(stacks_of, worker.pid, 1.0), "", 2.0) or "(no stacks: it does not answer)"


def _state(worker: BaseProcess) -> str:
    try:
        process = psutil.Process(worker.pid)
        used = process.cpu_times()
        return f"process {worker.pid} is {process.status()}, {used.user + used.system:.1f} s of CPU time"
    except psutil.Error:
        return f"process {worker.pid} has ended with status {worker.exitcode}"


# ---- collectives ----


def last_collectives() -> str:
    """The last collective of each process group, and whether it is finished, as torch's Flight Recorder has it."""
    last: dict[str, dict[str, Any]] = {}
    for dump in filter(None, map(_recorder, ("_dump_nccl_trace_json", "_dump_fr_trace_json"))):
        for entry in json.loads(dump(True, False)).get("entries", ()):
            last[" ".join((entry["profiling_name"].partition(":")[0], *entry["process_group"]))] = entry
    return "; ".join(map(_collective, last.values())) or "none recorded"


def _collective(entry: dict[str, Any]) -> str:
    done = "finished" if entry.get("retired") else "not finished"
    number, sizes = entry["collective_seq_id"], entry["input_sizes"]
    return f"{entry['profiling_name']} number {number} of group {' '.join(entry['process_group'])}, {sizes}, {done}"


def _write_collectives(path: Path) -> None:
    """Write what the default group's recorder holds, in the form that torch's analyser reads."""
    if not dist.is_initialized():
        return
    dump = _recorder("_dump_nccl_trace" if "nccl" in dist.get_backend_config() else "_dump_fr_trace")
    if dump is not None:
        path.write_bytes(dump(True, True, False))


def _recorder(name: str) -> Callable[..., Any] | None:
    """A function of torch's Flight Recorder; NCCL's are in builds for GPUs only, gloo's since torch 2.8."""
    found: Callable[..., Any] | None = getattr(getattr(torch._C, "_distributed_c10d", None), name, None)
    return found
