"""The cells of the matrix, and what each must end with: in this one place."""

from __future__ import annotations

import itertools
import signal
from dataclasses import dataclass

from faults.injection import Fault, Moment

from segvol_pl.errors import FAILED, HUNG, NOT_FINITE, OUT_OF_MEMORY

STRATEGIES = ("ddp", "fsdp", "zero2")
CLEAN = frozenset({0})
KILLED = frozenset({-int(signal.SIGKILL)})


@dataclass(frozen=True)
class Cell:
    """One fault at one moment of one run."""

    fault: Fault
    moment: Moment
    strategy: str
    ranks: int = 2

    def __str__(self) -> str:
        return f"{self.fault}, {self.moment}, {self.strategy}, {self.ranks} ranks"

    @property
    def victim(self) -> int:
        """The rank that it befalls: the one that writes, or one that does not."""
        return 0 if self.moment is Moment.saving else self.ranks - 1


@dataclass(frozen=True)
class Expected:
    """What a cell ends with."""

    line: str
    """Regular expression of the line that the user reads, once over the logs of all ranks; empty: no line."""
    victim: frozenset[int]
    """The exit statuses that the victim may have."""
    others: frozenset[int]

    @property
    def survives(self) -> bool:
        """Whether the run reaches its end as if nothing had been."""
        return self.victim == CLEAN


def expected(cell: Cell) -> Expected:
    """What the cell must end with."""
    gone, failed = frozenset({FAILED}), frozenset({FAILED})
    not_finite, hung = frozenset({NOT_FINITE}), frozenset({HUNG})
    named = rf"stalled: rank {cell.victim} on \S+ \(process \d+, after [^)]+\)"
    written = rf"stalled: rank {cell.victim} on \S+ \(process \d+\): last\.ckpt is being written, for \d+ s"
    saving = cell.moment is Moment.saving
    match cell.fault:
        case Fault.hang:
            # Of a save that hangs rank 0 knows first.
            return Expected(written, hung, hung | failed) if saving else Expected(named, hung, hung)
        case Fault.stop:
            return Expected(named, KILLED, hung)
        case Fault.crash:
            return Expected("error: unexpected RuntimeError: injected fault", failed, gone)
        case Fault.kill:
            return Expected(rf"error: rank {cell.victim} on \S+ \(process \d+\) ended without an error", KILLED, gone)
        case Fault.slow:
            # What only slows down a validation or a save is no straggler.
            seen = cell.moment in (Moment.first, Moment.middle)
            return Expected(rf"rank {cell.victim} on \S+ is slow, for \d+ log intervals" if seen else "", CLEAN, CLEAN)
        case Fault.disk:
            return Expected(r"\.ckpt: no space left on the disk or in the quota \(.*\): make room", failed, gone)
        case Fault.store:
            return Expected(r"the store gave no response for \d+ s .*: check it", failed, gone)
        case Fault.outage:
            return Expected("", CLEAN, CLEAN)
        case Fault.nan if saving:
            return Expected(r"last\.ckpt: not saved, because state_dict\.\S+ is not finite", not_finite, gone)
        case Fault.nan if cell.moment is Moment.validation:
            return Expected("step 4  validation loss nan", CLEAN, CLEAN)
        case Fault.nan:
            return Expected(rf"step \d: the loss is not finite on rank {cell.victim} \(", not_finite, not_finite)
        case Fault.memory:
            return Expected("error: out of main memory", frozenset({OUT_OF_MEMORY}), gone)


WIDE = [
    Cell(fault, moment, strategy, ranks=4)
    for fault, moment, strategy in (
        (Fault.hang, Moment.middle, "ddp"),
        (Fault.stop, Moment.validation, "fsdp"),
        (Fault.kill, Moment.middle, "zero2"),
        (Fault.slow, Moment.first, "ddp"),
    )
]
"""Where one of four ranks must be named: with two, the other one is all that is left."""

CELLS = [
    *(Cell(fault, moment, strategy) for fault, moment, strategy in itertools.product(Fault, Moment, STRATEGIES)),
    *WIDE,
]

CHOSEN = [
    Cell(Fault.hang, Moment.validation, "fsdp"),
    Cell(Fault.crash, Moment.saving, "zero2"),
    Cell(Fault.slow, Moment.first, "ddp"),
    Cell(Fault.kill, Moment.middle, "zero2"),
    Cell(Fault.stop, Moment.saving, "ddp"),
    Cell(Fault.disk, Moment.first, "fsdp"),
    Cell(Fault.store, Moment.validation, "ddp"),
    Cell(Fault.outage, Moment.middle, "fsdp"),
    Cell(Fault.nan, Moment.first, "zero2"),
    Cell(Fault.nan, Moment.saving, "fsdp"),
    Cell(Fault.memory, Moment.middle, "ddp"),
]
"""Those that are tried at every change: each fault, moment and strategy is among them."""
