"""Where shards lie: a local folder, a URL that fsspec opens (http, https, s3, gs), or a command (pipe:).

A `Store` reads ranges of its files. A read from a URL that fails, or that gives fewer bytes than asked for, is tried
again after a pause that doubles. A store that stays away longer than its patience ends the run with a StoreError: no
sample is to blame for it. What comes from a URL may be kept in a cache on this machine.

`pipe:COMMAND {file}` runs the command for a file of the folder and reads what it prints. It cannot seek: the stream of
such a folder is sequential, see `pipe`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from segvol_pl.data.cache import Cache
from segvol_pl.data.frames import Span

Source = str | Path
"""A folder of shards: a path, a URL that fsspec opens (file:, http:, https:, s3:, gs:), or `pipe:COMMAND {file}`."""

PATIENCE = 60.0
"""Seconds for which a store is asked again."""
REQUEST_TIMEOUT = 20.0
"""Seconds for which one request may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
SHORT_ANSWERS = 3
"""A file that is this often as short as before ends there."""

PIPE, FILE = "pipe:", "{file}"


Asked = tuple[int, int] | None
"""Offset and size of a range; None for the whole file."""


class StoreError(ValueError):
    """A store that does not answer. The message names it, how long it was tried, and what it said last."""


@dataclass(frozen=True)
class Store:
    """A folder of shards and how it is read."""

    folder: Source
    patience: float = PATIENCE
    """Seconds for which a URL that gives no answer is asked again."""
    cache: Cache | None = None
    """Where the bytes of a URL are kept, if at all."""

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
        """A whole file. Raises OSError (FileNotFoundError where there is none), or StoreError."""
        place = self.place(name)
        if self.piped:
            return _printed(place)
        return Path(place).read_bytes() if self.local else _patiently(place, [None], self.patience)[0]

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
        return _pread(place, asked) if self.local else _patiently(place, asked, self.patience)


def _plain(name: str) -> bool:
    """Whether a shell takes the name as it stands."""
    return all(letter.isalnum() or letter in "._-" for letter in name)


def _printed(command: str) -> bytes:
    done = subprocess.run(command.removeprefix(PIPE), shell=True, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise StoreError(f"{command}: the command failed (status {done.returncode}): {said or 'it said nothing'}")
    return done.stdout


def _patiently(place: str, asked: Sequence[Asked], patience: float) -> list[bytes]:
    """The answers, one a range; one that fails, or is too short, is asked for again."""
    started, pause = time.monotonic(), FIRST_PAUSE
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
        waited = time.monotonic() - started
        if waited + pause > patience:
            failed = [answer for answer in answers.values() if isinstance(answer, Exception)]
            if failed:
                raise _away(place, waited, failed[0]) from failed[0]
            return [last[number] for number in range(len(asked))]
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


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
    for answer in found:
        if isinstance(answer, FileNotFoundError | PermissionError):
            raise answer
    return [answer if isinstance(answer, Exception) else bytes(answer) for answer in found]


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
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)}}


def _pread(place: str, asked: list[tuple[int, int]]) -> list[bytes]:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        return [os.pread(descriptor, size, offset) for offset, size in asked]
    finally:
        os.close(descriptor)
