"""Where shards lie: a local folder, a URL that fsspec opens (http, https, s3, gs), or a command (pipe:).

A `Store` reads ranges of its files. A read that fails, or one from a URL that gives fewer bytes than asked for, is
retried after a pause that doubles. A store that stays away for longer than `retry_seconds`, or that refuses, ends the
run with a StoreError: no sample is to blame for it. Only two faults count as a sample's: its shard is missing while the
index beside it is there, or is too short. What comes from a URL may be kept in a cache on this machine.

`pipe:COMMAND {file}` runs the command for a file of the folder and reads what it prints. It cannot seek: the stream of
such a folder is sequential, see `pipe`.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from segvol_pl.credentials import is_masked
from segvol_pl.data.cache import Cache
from segvol_pl.data.frames import Span
from segvol_pl.errors import StoreError

log = logging.getLogger(__name__)

INDEX = "index.json"
"""What every folder of shards holds beside them."""

Source = str | Path
"""A folder of shards: a path, a URL that fsspec opens (file:, http:, https:, s3:, gs:), or `pipe:COMMAND {file}`."""

PATIENCE = 60.0
"""Seconds for which a store is asked again."""
REQUEST_TIMEOUT = 20.0
"""Seconds for which one request may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
SHORT_ANSWERS = 3
"""A file that is this often as short as before ends there."""
BEYOND = 416
"""Status of an answer to a range that begins behind the file's end."""
REFUSED = {401, 403, 405, 407, 410}
"""Statuses that asking again does not mend."""

PIPE, FILE = "pipe:", "{file}"

Content = TypeVar("Content", bytes, list[bytes])

Asked = tuple[int, int] | None
"""Offset and size of a range; None for the whole file."""


@dataclass
class Patience:
    """How long something is tried again, with pauses that double."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    pause: float = FIRST_PAUSE

    @property
    def waited(self) -> float:
        """Seconds since the first try."""
        return time.monotonic() - self.started

    def again(self) -> bool:
        """Pauses, and gives True, where there is time for another try."""
        if self.waited + self.pause > self.seconds:
            return False
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, LONGEST_PAUSE)
        return True


@dataclass(frozen=True)
class Store:
    """A folder of shards and how it is read."""

    folder: Source
    retry_seconds: float = PATIENCE
    """Seconds for which a folder or URL that cannot be read is tried again."""
    cache: Cache | None = None
    """Where the bytes of a URL are kept, if at all."""

    def __post_init__(self) -> None:
        """Raises StoreError where the folder is named by a configuration that was written without its credentials."""
        if is_masked(str(self.folder)):
            raise StoreError(
                f"{self.folder}: its credentials were masked when the configuration was written: give the place anew, "
                'behind the file, as data.shards="$SHARDS"'
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
        if name != Path(name).name or name in ("", ".", "..") or (self.piped and not _plain(name)):
            raise StoreError(f"{self.folder}: the index names a file {name!r} that lies outside: index the folder anew")
        if self.piped:
            return str(self.folder).replace(FILE, name)
        return f"{str(self.folder).rstrip('/')}/{name}"

    def file(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError or NotADirectoryError where there is none, or StoreError."""
        place = self.place(name)
        if self.piped:
            return _printed(place)
        if self.local:
            return _steadily(place, Path(place).read_bytes, self.retry_seconds, lambda: True)
        return _patiently(place, [None], self.retry_seconds)[0]

    def member(self, name: str, offset: int, size: int, spans: list[Span], key: str = "") -> list[bytes]:
        """Parts of the member that lies at `offset` of a file; `key`, its hash, names it in the cache.

        A part is shorter where the file is. Raises as `file`, and StoreError where the store cannot seek.
        """
        if self.cache is None or not key or self.local:
            return self._ranges(name, offset, spans)
        return self.cache.read(key, size, spans, lambda blocks: self._ranges(name, offset, blocks))

    def _ranges(self, name: str, offset: int, spans: list[Span]) -> list[bytes]:
        place = self.place(name)
        if self.piped:
            raise StoreError(f"{self.folder}: a pipe cannot be read in parts: name the folder's path or URL instead")
        asked = [(offset + first, last - first) for first, last in spans]
        if self.local:
            return _steadily(place, lambda: _pread(place, asked), self.retry_seconds, self._indexed)
        return _patiently(place, asked, self.retry_seconds)

    def _indexed(self) -> bool:
        """Whether the index is there: where it is gone too, the folder is away, and no single file is missing."""
        # Unlike Path.exists, this says no of a mount that fails.
        return os.access(self.place(INDEX), os.F_OK)


def _plain(name: str) -> bool:
    """Whether a shell takes the name as it stands."""
    return all(letter.isalnum() or letter in "._-" for letter in name)


def _printed(command: str) -> bytes:
    done = subprocess.run(command.removeprefix(PIPE), shell=True, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(f"{command}: the command failed (status {done.returncode}): {said or 'it said nothing'}")
    return done.stdout


def _steadily(place: str, read: Callable[[], Content], retry_seconds: float, lost: Callable[[], bool]) -> Content:
    """What `read` gives: a mounted folder may be away for a while. `lost`: whether a file that is not there is missing.

    Raises FileNotFoundError or NotADirectoryError where it is, StoreError for every other error of the system.
    """
    waiting = Patience(retry_seconds)
    while True:
        try:
            return read()
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and lost():
                raise
            if waiting.pause == FIRST_PAUSE and retry_seconds:
                log.warning("%s cannot be read (%s): trying again for %.0f s", place, error.strerror, retry_seconds)
            if not waiting.again():
                raise StoreError(
                    f"{place} could not be read for {waiting.waited:.0f} s ({error.strerror}): see that its folder is "
                    "mounted and may be read, then start the run again: it goes on where it stopped"
                ) from error


def _patiently(place: str, asked: Sequence[Asked], retry_seconds: float) -> list[bytes]:
    """The answers, one a range; one that fails, or is too short, is asked for again."""
    waiting = Patience(retry_seconds)
    last: dict[int, bytes] = {}
    done: set[int] = set()
    short = Counter[tuple[int, int]]()
    while True:
        missing = [number for number in range(len(asked)) if number not in done]
        answers = dict(zip(missing, _answers(place, [asked[number] for number in missing]), strict=True))
        for number, answer in answers.items():
            if isinstance(answer, bytes):
                last[number] = answer
                short[number, len(answer)] += 1
                if _complete(asked[number], answer) or short[number, len(answer)] == SHORT_ANSWERS:
                    done.add(number)
        if len(done) == len(asked):
            return [last[number] for number in range(len(asked))]
        if not waiting.again():
            failed = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if failed:
                raise _away(place, waiting.waited, failed[0]) from failed[0]
            return [last[number] for number in range(len(asked))]


def _complete(asked: Asked, answer: bytes) -> bool:
    return asked is None or len(answer) == asked[1]


def _away(place: str, waited: float, error: Exception) -> StoreError:
    return StoreError(
        f"{place}: the store gave no answer for {waited:.0f} s ({type(error).__name__}: {error}): "
        "check it, then start the run again: it goes on where it stopped"
    )


def _answers(place: str, asked: Sequence[Asked]) -> list[bytes | Exception]:
    """One answer a range, asked for side by side. Raises what asking again does not mend."""
    starts = [span and span[0] for span in asked]
    ends = [span and sum(span) for span in asked]
    try:
        filesystem, path = fsspec.url_to_fs(place, **_options(place))
        found = filesystem.cat_ranges([path] * len(asked), starts, ends, on_error="return")
    except ImportError as error:
        raise StoreError(
            f"{place}: needs a package that is not installed ({error}): pip install 'segvol_pl[remote]'"
        ) from error
    except Exception as error:  # the client libraries behind fsspec share no class of errors
        found = [error] * len(asked)
    return [_judged(place, answer) for answer in found]


def _judged(place: str, answer: bytes | Exception) -> bytes | Exception:
    """The answer, or an error that asking again may mend. Raises the others."""
    if not isinstance(answer, Exception):
        return bytes(answer)
    if isinstance(answer, FileNotFoundError | StoreError):
        raise answer
    status = _status(answer)
    if status == BEYOND:
        return b""
    if isinstance(answer, PermissionError) or status in REFUSED:
        raise StoreError(
            f"{place}: the store refuses it ({type(answer).__name__}: {answer}): check the address and the "
            "credentials, then start the run again: it goes on where it stopped"
        ) from answer
    return answer


def _status(error: Exception) -> int | None:
    """The HTTP status that an error tells: aiohttp's own, or botocore's, which s3fs gives as its cause."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status
    return getattr(error, "status", None)


async def _refuse_whole(response: Any) -> None:
    """Called with the head of an answer, before a whole shard is fetched for each of its members."""
    if response.status == 200 and "Range" in response.request_info.headers:
        raise StoreError(
            f"{response.url}: the server takes no ranges, it sends whole files: use one that does (nginx, Apache, S3), "
            "copy the folder here, or read it in order by pipe:curl -sf URL/{file}"
        )


def _options(place: str) -> dict[str, Any]:
    if place.startswith("s3://"):
        # Retrying is done here, within the stated time.
        timeouts = {"connect_timeout": REQUEST_TIMEOUT, "read_timeout": REQUEST_TIMEOUT}
        return {"config_kwargs": {**timeouts, "retries": {"max_attempts": 1}}}
    if not place.startswith(("http://", "https://")):
        return {}
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec says what is lacking
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)
    return {"client_kwargs": {"timeout": timeout, "raise_for_status": _refuse_whole}}


def _pread(place: str, asked: list[tuple[int, int]]) -> list[bytes]:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        return [os.pread(descriptor, size, offset) for offset, size in asked]
    finally:
        os.close(descriptor)
