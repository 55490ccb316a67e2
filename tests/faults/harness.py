"""Tries a cell of the matrix: a run with its fault, then the same command without it, against an uninterrupted run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from factories import train_config
from faults.cells import Cell, expected
from faults.injection import FILLER, Fault, Moment
from ranged_http import serving
from ranks import Ranks

from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import CheckpointError
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.resume import check_intact

TESTS = Path(__file__).parents[1]
STEPS, SAVED, VALIDATED = 7, 3, 4
"""Steps of a run, and how many lie between two checkpoints and two validations."""
HANG_TIMEOUT, PATIENT = 8.0, 60.0
"""`run.hang_timeout` (s) of runs that hang, and of the others, which a busy machine must not end."""
LIMIT, GRACE = 150.0, 8.0
"""Seconds after which a run that nobody ends is killed, and for which ranks may outlive one that has failed."""
COMBINATIONS = ["box+text", "points"]
AWAY, RETRIED = 1.5, 30.0
"""Seconds for which a store is away, and for which reads of it are retried."""
INTERVALS = 2
"""`run.straggler_intervals` of slow runs, which have few steps."""
DISK = "32m"
"""Size of the disk that becomes full."""
COMPLAINT = re.compile(r"^(?:Traceback .*|Exception in thread .*|.*\berror: .*|.*\baborting\b.*)$", re.MULTILINE)
"""A line by which a run says why it ended, or a traceback that nobody should see."""

Losses = dict[int, float]


@dataclass
class Outcome:
    """What a cell ended with. `problems` is empty if that is what was expected."""

    cell: Cell
    statuses: list[int]
    seconds: float
    """From the fault to the first rank that ended."""
    complaints: list[str]
    """What all ranks said about their end."""
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def no_small_disk() -> str:
    """Why no disk of a given size can be made here; empty if one can."""
    if shutil.which("mount") is None or os.geteuid():
        return "a full disk: needs root and mount"
    return ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at `folder`, of size `DISK`, while the block runs."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Bench:
    """Tries cells over one corpus. Ranks and uninterrupted runs are made once."""

    def __init__(self, folder: Path, shards: Path, ranks: dict[int, Ranks]) -> None:
        self.folder, self.shards, self.ranks = folder, shards, ranks
        self.uninterrupted: dict[tuple[str, int], dict[str, Losses]] = {}

    def attempt(self, cell: Cell) -> Outcome:
        """Try a cell, in a folder of its own that is removed if the cell is as expected."""
        place = self.folder / re.sub(r"\W+", "-", str(cell))
        shutil.rmtree(place, ignore_errors=True)  # of a matrix that was interrupted
        with ExitStack() as made:
            out = place / "run"
            if cell.fault is Fault.disk:
                made.enter_context(small_disk(out))
            store = made.enter_context(Store(self.shards)) if cell.fault in (Fault.store, Fault.outage) else None
            place.mkdir(exist_ok=True)
            outcome = self._with_fault(cell, place, store)
            (out / FILLER).unlink(missing_ok=True)
            self._resumed(cell, out, store, outcome)
        if not outcome.problems:
            shutil.rmtree(place)
        return outcome

    def whole(self, strategy: str, ranks: int) -> dict[str, Losses]:
        """The losses of an uninterrupted run, in training and in validation."""
        if (strategy, ranks) not in self.uninterrupted:
            out = self.folder / f"whole-{strategy}-{ranks}"
            self.ranks[ranks]("train", *self._keys(strategy, ranks, out, str(self.shards)))
            self.uninterrupted[strategy, ranks] = losses(out)
        return self.uninterrupted[strategy, ranks]

    def _keys(self, strategy: str, ranks: int, out: Path, shards: str) -> list[str]:
        file = self.folder / f"{ranks}-ranks.yaml"
        if not file.exists():
            config = train_config(self.shards, self.folder / "run", steps=STEPS)
            run = replace(config.run, checkpoint_every=SAVED, val_every=VALIDATED, hang_timeout=PATIENT)
            data = replace(config.data, global_batch=max(2, ranks))
            prompts = replace(config.prompts, combinations=COMBINATIONS)
            file.write_text(to_yaml(replace(config, run=run, data=data, prompts=prompts)))
        return [str(file), f"run.strategy={strategy}", f"run.out={out}", f"data.shards={shards}"]

    def _command(self, cell: Cell, out: Path, store: Store | None) -> list[str]:
        shards = str(self.shards) if store is None else store.url
        command = ["train", *self._keys(cell.strategy, cell.ranks, out, shards)]
        if cell.fault is Fault.slow:
            command.append(f"run.straggler_intervals={INTERVALS}")
        if cell.fault in (Fault.store, Fault.outage):
            command.append(f"data.retry_seconds={RETRIED if cell.fault is Fault.outage else 1.0}")
        return command

    def _with_fault(self, cell: Cell, place: Path, store: Store | None) -> Outcome:
        ranks, mark, out = self.ranks[cell.ranks], place / "mark.json", place / "run"
        given = {
            "fault": cell.fault.value,
            "moment": cell.moment.value,
            "rank": cell.victim,
            "mark": str(mark),
            "out": str(out),
            "port": store.port if store else 0,
        }
        patch = f"import sys\nsys.path.append({str(TESTS)!r})\nfrom faults.injection import inject\ninject(**{given!r})"
        hangs = [f"run.hang_timeout={HANG_TIMEOUT}"] if cell.fault in (Fault.hang, Fault.stop) else []
        ranks.begin(*self._command(cell, out, store), *hangs, patch=patch)
        with store.away_after(mark, cell.fault) if store else ExitStack():
            statuses = ranks.end(grace=GRACE, limit=LIMIT)
        said = ranks.said()
        (place / "said.txt").write_text("\n--\n".join(said))
        happened = json.loads(mark.read_text()) if mark.exists() else None
        ended = min((at for at, status in zip(ranks.ended_at, statuses, strict=True) if status), default=None)
        seconds = ended - happened if ended and happened else 0.0
        complaints = [found[0].replace(str(out), "RUN") for text in said for found in COMPLAINT.finditer(text)]
        outcome = Outcome(cell, statuses, seconds, complaints)
        if happened is None:
            outcome.problems.append("the fault did not happen")
        outcome.problems += [*_wrong_end(cell, statuses, ranks.killed), *_wrong_words(cell, said, complaints)]
        outcome.problems += _damaged(out)
        return outcome

    def _resumed(self, cell: Cell, out: Path, store: Store | None, outcome: Outcome) -> None:
        ranks, whole = self.ranks[cell.ranks], self.whole(cell.strategy, cell.ranks)
        statuses, said = ranks.ended(*self._command(cell, out, store))
        if any(statuses):
            outcome.problems.append(f"not resumed: exit statuses {statuses}: {' '.join(said)[-1000:]}")
            return
        step = resumed_from(cell)
        if step and not expected(cell).survives and f"resuming from step {step} of" not in said[0]:
            outcome.problems.append(f"not resumed from step {step}")
        found = losses(out)
        for name in whole:
            if cell.fault is Fault.nan and cell.moment is Moment.validation and name == "val/loss":
                found[name][VALIDATED] = whole[name][VALIDATED]
            if found[name] != whole[name]:
                outcome.problems.append(f"{name} is {found[name]}, not {whole[name]}")
        if parts := [path.name for path in out.rglob("*.part")]:
            outcome.problems.append(f"left half-written: {', '.join(parts)}")


def resumed_from(cell: Cell) -> int:
    """The step of the last checkpoint before the fault; 0 without one."""
    if cell.moment is Moment.first:
        return 0
    return SAVED


def losses(out: Path) -> dict[str, Losses]:
    """Metric -> step -> value of a run."""
    return {name: dict(read_metrics(out / "metrics.csv", name)) for name in ("train/loss", "val/loss")}


def _wrong_end(cell: Cell, statuses: list[int], killed: set[int]) -> Iterator[str]:
    due = expected(cell)
    allowed = {cell.victim} if cell.fault is Fault.stop else set()
    if killed - allowed:
        yield f"not noticed: rank {', '.join(map(str, sorted(killed - allowed)))} had to be killed"
    for rank, status in enumerate(statuses):
        wanted = due.victim if rank == cell.victim else due.others
        if status not in wanted:
            yield f"rank {rank} ended with {status}, not {' or '.join(map(str, sorted(wanted)))}"


def _wrong_words(cell: Cell, said: list[str], complaints: list[str]) -> Iterator[str]:
    due = expected(cell)
    found = [line for text in said for line in text.splitlines() if due.line and re.search(due.line, line)]
    if due.line and len(found) != 1:
        yield f"said {len(found)} times: {due.line}"
    if others := [line for line in complaints if not (due.line and re.search(due.line, line))]:
        yield f"said besides: {' | '.join(others)}"


def _damaged(out: Path) -> Iterator[str]:
    for path in sorted((out / "checkpoints").glob("*.ckpt")):
        try:
            check_intact(path)
        except CheckpointError as error:
            yield str(error)


class Store:
    """The corpus behind HTTP, on a port that stays the same while the server comes and goes."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self.serving = ExitStack()
        self.port, self.url = 0, ""

    def __enter__(self) -> Store:
        self.url = self.serving.enter_context(serving(self.shards, self.port))
        self.port = int(self.url.rpartition(":")[2])
        return self

    def __exit__(self, *error: object) -> None:
        self.serving.close()

    @contextmanager
    def away_after(self, mark: Path, fault: Fault) -> Iterator[None]:
        """While the block runs: closes once the mark is there. At the block's end it is there again, or before."""
        over = threading.Event()

        def watch() -> None:
            while not mark.exists():
                if over.wait(0.02):
                    return
            self.serving.close()
            if fault is Fault.outage:
                over.wait(AWAY)
            else:
                over.wait()
            self.__enter__()

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()
