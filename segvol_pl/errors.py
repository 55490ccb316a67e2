"""The errors that a user can cause and fix: one line each, which names the file, key or sample and the remedy.

The command line prints the message of a `SegVolError` alone; any other error counts as a fault of the program. `status`
is the exit status of a command that ends with it. The causes for which a training run ends are here too.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from enum import StrEnum
from typing import ClassVar

from segvol_pl.credentials import masked

FAILED, MISUSED = 1, 2
"""Exit statuses of a command that failed, and of one that was used wrongly."""
NOT_FINITE = 65
"""Exit status of a run whose losses or gradients were not finite (EX_DATAERR)."""
HUNG = 70
"""Exit status of a rank that ended because a rank hung (EX_SOFTWARE)."""
OUT_OF_MEMORY = 71
"""Exit status of a run for whose tensors a device or the main memory was too small (EX_OSERR)."""
NO_MEMORY = re.compile(
    "can't allocate memory|Cannot allocate memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)
"""What torch's CPU allocator, the system, CUDA and cuBLAS report, in errors without a class of their own."""
LOST = 75
"""Exit status of a process whose folder another process has taken over (EX_TEMPFAIL)."""
SIGNALLED = 128
"""Exit status of a process ended by a signal, minus the signal's number: the convention of shells."""


class Cause(StrEnum):
    """Why a start of a training run ended."""

    done = "done"
    preempted = "preempted"
    """Stopped by a signal; by SIGUSR1 and SIGTERM after saving."""
    node_lost = "node_lost"
    """Never recorded, but inferred: the start left no record of its end, and SLURM started the job again."""
    hang = "hang"
    non_finite = "non_finite"
    configuration = "configuration"
    """A key, file, folder or data set that must be fixed before another start can work."""
    out_of_memory = "out_of_memory"
    crash = "crash"
    """Everything else, such as an error of the system, or a process that was killed."""


STATUSES = {
    Cause.done: 0,
    Cause.crash: FAILED,
    Cause.configuration: MISUSED,
    Cause.non_finite: NOT_FINITE,
    Cause.hang: HUNG,
    Cause.out_of_memory: OUT_OF_MEMORY,
    Cause.preempted: SIGNALLED,
}
"""Exit status of a rank whose run ended for a cause; to that of `preempted` the signal's number is added."""

LISTED = 10
"""Most names in one message."""


def listed(names: Iterable[str], between: str = ", ") -> str:
    """Join the first names for a message, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return between.join(names[:LISTED]) + more


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: that of a GPU, or main memory. Needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, for GPUs
        return True
    return isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)) is not None


class SegVolError(ValueError):
    """Every error of this package that a user can fix."""

    status: ClassVar[int] = FAILED
    passing: ClassVar[bool] = False
    """Whether the cause may go away by itself, so that the same command may work later."""


class ConfigError(SegVolError):
    """A configuration that cannot be used. The message names key and remedy; `key` is the dotted key, if one."""

    status = MISUSED

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class PlaceError(SegVolError):
    """An error whose message names a folder or URL; credentials in it are masked."""

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class VolumeError(SegVolError):
    """A CT or label file that cannot be used. The message names the file and the remedy."""


class CaseError(SegVolError):
    """Cases or categories that cannot be used. The message names the files and the remedy."""


class PackError(SegVolError):
    """A data set that cannot be packed. The message names the folder or cases, and the remedy."""


class SampleError(PlaceError):
    """A sample that cannot be used. The message names the file and key, and the remedy."""


class ShardError(PlaceError):
    """A folder of shards that cannot be used. The message names the shard and key, and the remedy."""


class StoreError(PlaceError):
    """A store that does not respond, or refuses. The message names it, how long it was tried, and its last error."""

    passing = True


class LockedError(SegVolError):
    """A folder that another process writes to (the message names it), or that cannot be written at all."""


class CheckpointError(SegVolError):
    """A checkpoint that cannot be used. The message names the file and what is wrong."""


class HubError(PlaceError):
    """A model on the hub that cannot be taken or uploaded. The message names it and the remedy."""


class UnknownCategory(SegVolError):
    """A name that the text bank does not hold. The message offers the nearest ones."""


class TextError(SegVolError):
    """A text tower that cannot be loaded."""


class StartUpError(SegVolError):
    """Ranks that differ, or a folder without room. The message names the rank or folder, and the remedy."""


class LostRankError(SegVolError):
    """A rank that the others can no longer reach. The message names it, its host and process, if they are known."""

    passing = True


class NonFiniteError(SegVolError):
    """Losses, gradients or weights that are NaN or infinite."""

    status = NOT_FINITE


class OutOfMemory(SegVolError):
    """Memory that was too small for a run. The message names what was requested and free, and the key to change."""

    status = OUT_OF_MEMORY


class PromptError(SegVolError):
    """A prompt that does not fit the CT. The message names the prompt's part and the CT's shape."""


class ChallengeError(SegVolError):
    """A case of the challenge that cannot be used. The message names the file and the array in it."""


class ExportError(SegVolError):
    """A model that cannot be written in a format, or a card that cannot be made. The message names the remedy."""


class ViewError(SegVolError):
    """A viewer that cannot start. The message names the remedy."""


class ServeError(SegVolError):
    """A server that cannot start. The message names the remedy."""


class RequestError(SegVolError):
    """A request that a server refuses. The message names the field and the remedy; `code` is the HTTP status."""

    def __init__(self, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.code = code


class EvaluateError(PlaceError):
    """Cases, categories or results that cannot be evaluated or put together. The message names key and remedy."""


class RunError(SegVolError):
    """A run of a grid that cannot be started, or runs that failed."""


class PointsError(SegVolError):
    """Runs or tables that give no points."""


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with `error`."""
    if isinstance(error, KeyboardInterrupt):
        return SIGNALLED + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    return error.status if isinstance(error, SegVolError) else STATUSES[cause_of(error)]


def cause_of(error: BaseException) -> Cause:
    """The cause that an error of a training run belongs to."""
    if isinstance(error, KeyboardInterrupt):
        return Cause.preempted
    if isinstance(error, SystemExit):
        return Cause.preempted if isinstance(error.code, int) and error.code > SIGNALLED else Cause.crash
    named = {STATUSES[cause]: cause for cause in Cause if STATUSES.get(cause, FAILED) != FAILED}
    if isinstance(error, SegVolError):
        by_itself = Cause.crash if error.passing else Cause.configuration
        return named.get(error.status, by_itself)
    return Cause.out_of_memory if ran_out_of_memory(error) else Cause.crash
