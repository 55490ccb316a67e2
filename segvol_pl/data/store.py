"""Where shards lie: a local folder, a URL that fsspec opens (http, https, s3, gs), or a command (pipe:).

A `Store` reads byte ranges of its files. It retries a read that fails, or that returns too few bytes from a URL, with
pauses that double. If a store does not respond for `retry_seconds`, or refuses, the run ends with a StoreError: no
sample is damaged. Only two faults are a sample's own: its shard is missing although the index is there, or too short.
Bytes from a URL may be kept in a cache on this machine.

`pipe:COMMAND {file}` runs the command for one file and reads its output. It cannot seek, so the stream of such a folder
is sequential, see `pipe`.
"""

from __future__ import annotations

import bisect
import logging
import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from segvol_pl.credentials import is_masked
from segvol_pl.data.cache import Cache, MemberParts
from segvol_pl.data.frames import ByteRange
from segvol_pl.errors import StoreError

log = logging.getLogger(__name__)

INDEX = "index.json"
"""The index file in every folder of shards."""

ShardSource = str | Path
"""A folder of shards: a path, a URL that fsspec opens (file:, http:, https:, s3:, gs:), or `pipe:COMMAND {file}`."""

RETRY_SECONDS = 60.0
"""How long to retry a store (s)."""
KEPT_OPEN = 256
"""Local files that a store keeps open: a quarter of what most systems allow a process."""
REQUEST_TIMEOUT = 20.0
"""How long one request may take (s)."""
MERGE_GAP = 1 << 16
"""Two ranges of a URL with at most this many bytes between them are read in one request. Measured from 4 KiB to 1 MiB,
requests and bytes are the same: `frames` has joined the chunks that lie close."""
MERGED_BYTES = 1 << 23
"""Bytes of such a request, at most: several at once are faster than a longer one."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
SAME_LENGTH_READS = 3
"""A file is taken as short when this many reads return the same number of bytes."""
BEYOND = 416
"""HTTP status for a range that begins behind the file's end."""
REFUSED = {401, 403, 405, 407, 410}
"""HTTP statuses that a retry does not change."""

PIPE, FILE = "pipe:", "{file}"

Content = TypeVar("Content", bytes, list[bytes])

Range = tuple[int, int] | None
"""Offset and size; None for the complete file."""


@dataclass
class Retries:
    """Retries within a time limit, with pauses that double."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE

    @property
    def waited(self) -> float:
        """Seconds since the first try."""
        return time.monotonic() - self.started

    def again(self) -> bool:
        """Pause and return True if there is time for another try."""
        if self.waited + self.pause > self.seconds:
            return False
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return True


class OpenFiles:
    """Local files that stay open, the last `KEPT_OPEN` of them. For one thread; another process opens its own.

    A file that is replaced meanwhile is read as it was.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type[OpenFiles], tuple[()]]:
        return OpenFiles, ()

    def read(self, place: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges (offset, size) of a file. Raises OSError."""
        if place not in self._descriptors:
            self._descriptors[place] = os.open(place, os.O_RDONLY)
            if len(self._descriptors) > KEPT_OPEN:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(place)
        try:
            return [os.pread(self._descriptors[place], size, offset) for offset, size in ranges]
        except OSError:
            # The server of a mounted folder may have forgotten the file: the next try opens it again.
            os.close(self._descriptors.pop(place))
            raise


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


@dataclass(frozen=True)
class Store:
    """A folder of shards and how to read it.

    Args:
        folder: a path, a URL, or `pipe:COMMAND {file}`.
        retry_seconds: how long to retry a read.
        cache: where to keep the bytes of a URL.
        files: keeps local files open between reads; None: each read opens and closes its file.

    Raises:
        StoreError: the folder's name comes from a written configuration, with its credentials masked.
    """

    folder: ShardSource
    retry_seconds: float = RETRY_SECONDS
    cache: Cache | None = None
    files: OpenFiles | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if is_masked(str(self.folder)):
            raise StoreError(
                f"{self.folder}: its credentials were masked when the configuration was written: give the place again "
                'on the command line, as data.shards="$SHARDS"'
            )

    @property
    def local(self) -> bool:
        """Whether it is a folder on this machine."""
        return not self.piped and "://" not in str(self.folder)

    @property
    def piped(self) -> bool:
        """Whether it is a command, which cannot seek."""
        return str(self.folder).startswith(PIPE)

    def place(self, name: str) -> str:
        """Path, URL or command of a file. Raises StoreError for a name that leads out of the folder."""
        # An index is data from elsewhere.
        if name != Path(name).name or name in ("", ".", "..") or (self.piped and not _shell_safe(name)):
            raise StoreError(f"{self.folder}: the index names a file {name!r} outside the folder: run segvol-pl index")
        if self.piped:
            return str(self.folder).replace(FILE, name)
        return f"{str(self.folder).rstrip('/')}/{name}"

    def file(self, name: str) -> bytes:
        """Read a complete file.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            StoreError: the store cannot be read, or refuses.
        """
        place = self.place(name)
        if self.piped:
            return _output_of(place)
        if self.local:
            return _read_local(place, Path(place).read_bytes, self.retry_seconds, lambda: True)
        return _read_remote(place, [None], self.retry_seconds)[0]

    def as_file(self, name: str, size: int) -> tuple[Path, object]:
        """A file on this machine with the bytes of a file of the folder; it is there as long as the second value.

        size: bytes of the file; one from a URL is read in parts, each within the time of a request. Raises as `file`.
        """
        if self.local:
            place = self.place(name)
            _read_local(place, lambda: OpenFiles().read(place, [(0, 1)]), self.retry_seconds, self._indexed)
            return Path(place), None
        copy = tempfile.NamedTemporaryFile(prefix="segvol_pl-")  # noqa: SIM115
        parts = [(first, min(first + MERGED_BYTES, size)) for first in range(0, size, MERGED_BYTES)]
        copy.writelines([self.file(name)] if self.piped else self._ranges(name, parts))
        copy.flush()
        return Path(copy.name), copy

    def member(self, name: str, offset: int, size: int, spans: list[ByteRange], key: str = "") -> list[bytes]:
        """Read parts of one member, see `members`."""
        return self.members(name, [MemberParts(offset, size, spans, key)])[0]

    def members(self, name: str, wanted: Sequence[MemberParts]) -> list[list[bytes]]:
        """Read parts of several members of a file. From a URL they are requested together.

        Args:
            name: the file.
            wanted: the parts of each member. They are cached if all have a key.

        Returns:
            The parts of each member; one is shorter if the file ends in it.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such file.
            StoreError: the store cannot be read, refuses, or cannot seek.
        """
        if self.cache is not None and not self.local and all(member.key for member in wanted):
            return self.cache.read(wanted, lambda ranges: self._ranges(name, ranges))
        parts = iter(self._ranges(name, [member.in_file(span) for member in wanted for span in member.spans]))
        return [[next(parts) for _ in member.spans] for member in wanted]

    def _ranges(self, name: str, ranges: list[ByteRange]) -> list[bytes]:
        place = self.place(name)
        if self.piped:
            raise StoreError(f"{self.folder}: a pipe cannot be read in parts: give the folder's path or URL instead")
        if self.local:
            sized = [(first, last - first) for first, last in ranges]
            return _read_local(
                place, lambda: (self.files or OpenFiles()).read(place, sized), self.retry_seconds, self._indexed
            )
        requests = merged(ranges)
        responses = _read_remote(place, [(first, last - first) for first, last in requests], self.retry_seconds)
        return [_cut(span, requests, responses) for span in ranges]

    def _indexed(self) -> bool:
        """Whether the index is there. Without it the folder is not mounted, and no single file is missing."""
        # Unlike Path.exists, this is False on a mount that fails.
        return os.access(self.place(INDEX), os.F_OK)


def merged(ranges: Sequence[ByteRange]) -> list[ByteRange]:
    """Ranges that contain all of these, in ascending order: neighbours are one, see `MERGE_GAP`."""
    together: list[ByteRange] = []
    for first, last in sorted(ranges):
        if together and first - together[-1][1] <= MERGE_GAP and last - together[-1][0] <= MERGED_BYTES:
            together[-1] = together[-1][0], max(last, together[-1][1])
        else:
            together.append((first, last))
    return together


def _cut(span: ByteRange, requests: list[ByteRange], responses: list[bytes]) -> bytes:
    """The bytes of a range, from the merged request that contains it."""
    number = bisect.bisect_right(requests, (span[0], sys.maxsize)) - 1
    start = requests[number][0]
    return responses[number][span[0] - start : span[1] - start]


def _shell_safe(name: str) -> bool:
    """Whether the name means the same in a shell."""
    return all(letter.isalnum() or letter in "._-" for letter in name)


def _output_of(command: str) -> bytes:
    done = subprocess.run(command.removeprefix(PIPE), shell=True, capture_output=True, check=False)
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(f"{command}: the command failed (status {done.returncode}): {last_line or 'no error message'}")
    return done.stdout


def _read_local(place: str, read: Callable[[], Content], retry_seconds: float, lost: Callable[[], bool]) -> Content:
    """Read a local file, with retries: a mounted folder may be away for a while.

    lost: whether a file that is not there is really missing; then FileNotFoundError or NotADirectoryError is raised.
    Raises StoreError for every other error of the system.
    """
    retries = Retries(retry_seconds)
    while True:
        try:
            return read()
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and lost():
                raise
            if retries.pause == FIRST_PAUSE and retry_seconds:
                log.warning("%s cannot be read (%s): retrying for %.0f s", place, error.strerror, retry_seconds)
            if not retries.again():
                raise StoreError(
                    f"{place} could not be read for {retries.waited:.0f} s ({error.strerror}): check that its folder "
                    "is mounted and readable, then start the run again: it resumes where it stopped"
                ) from error


def _read_remote(place: str, ranges: Sequence[Range], retry_seconds: float) -> list[bytes]:
    """Read ranges of a URL; retry those that fail or are too short."""
    retries = Retries(retry_seconds)
    last: dict[int, bytes] = {}
    done: set[int] = set()
    short = Counter[tuple[int, int]]()
    while True:
        missing = [number for number in range(len(ranges)) if number not in done]
        responses = dict(zip(missing, _responses(place, [ranges[number] for number in missing]), strict=True))
        for number, response in responses.items():
            if isinstance(response, bytes):
                last[number] = response
                short[number, len(response)] += 1
                if _complete(ranges[number], response) or short[number, len(response)] == SAME_LENGTH_READS:
                    done.add(number)
        if len(done) == len(ranges):
            return [last[number] for number in range(len(ranges))]
        if not retries.again():
            failed = [response for response in responses.values() if isinstance(response, Exception)]
            if failed:
                raise _unresponsive(place, retries.waited, failed[0]) from failed[0]
            return [last[number] for number in range(len(ranges))]


def _complete(ranges: Range, response: bytes) -> bool:
    return ranges is None or len(response) == ranges[1]


def _unresponsive(place: str, waited: float, error: Exception) -> StoreError:
    return StoreError(
        f"{place}: the store gave no response for {waited:.0f} s ({type(error).__name__}: {error}): "
        "check it, then start the run again: it resumes where it stopped"
    )


def _responses(place: str, ranges: Sequence[Range]) -> list[bytes | Exception]:
    """Request all ranges concurrently: one response or error each. Raises what a retry does not change."""
    starts = [span and span[0] for span in ranges]
    ends = [span and sum(span) for span in ranges]
    try:
        filesystem, path = fsspec.url_to_fs(place, **_options(place))
        found = filesystem.cat_ranges([path] * len(ranges), starts, ends, on_error="return")
    except ImportError as error:
        raise StoreError(
            f"{place}: needs a package that is not installed ({error}): pip install 'segvol_pl[remote]'"
        ) from error
    except Exception as error:  # the client libraries behind fsspec have no common class of errors
        found = [error] * len(ranges)
    return [_retriable(place, response) for response in found]


def _retriable(place: str, response: bytes | Exception) -> bytes | Exception:
    """The response, or an error that a retry may resolve. Raises other errors."""
    if not isinstance(response, Exception):
        return bytes(response)
    if isinstance(response, FileNotFoundError | StoreError):
        raise response
    status = _status(response)
    if status == BEYOND:
        return b""
    if isinstance(response, PermissionError) or status in REFUSED:
        raise StoreError(
            f"{place}: the store refuses it ({type(response).__name__}: {response}): check the address and the "
            "credentials, then start the run again: it resumes where it stopped"
        ) from response
    return response


def _status(error: Exception) -> int | None:
    """The HTTP status of an error: aiohttp's own, or botocore's, which s3fs sets as the cause."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status
    return getattr(error, "status", None)


async def _refuse_whole(response: Any) -> None:
    """Refuse, by its headers, a response that holds the complete shard instead of the requested range."""
    if response.status == 200 and "Range" in response.request_info.headers:
        raise StoreError(
            f"{response.url}: the server ignores ranges and sends complete files: use one that supports them "
            "(nginx, Apache, S3), copy the folder here, or read it in order by pipe:curl -sf URL/{file}"
        )


def _options(place: str) -> dict[str, Any]:
    if place.startswith("s3://"):
        # Retries are made here, within `retry_seconds`.
        timeouts = {"connect_timeout": REQUEST_TIMEOUT, "read_timeout": REQUEST_TIMEOUT}
        return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 1}}}
    if not place.startswith(("http://", "https://")):
        return {}
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec's error names the missing package
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
    return {"client_kwargs": {"timeout": timeout, "raise_for_status": _refuse_whole}}
