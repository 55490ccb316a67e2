"""Where shards lie: ranged reads from a local folder or from a URL that fsspec opens (http, https, s3, gs).

A read from a URL that fails, or that gives fewer bytes than asked for, is tried again after a pause that doubles. A
store that stays away longer than `PATIENCE` ends the run with a StoreError: no sample is to blame for it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fsspec

Source = str | Path
"""A folder of shards: a path, or a URL that fsspec opens (file:, http:, https:, s3:, gs:)."""

PATIENCE = 60.0
"""Seconds for which a store is asked again."""
REQUEST_TIMEOUT = 20.0
"""Seconds for which one request may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class StoreError(ValueError):
    """A store that does not answer. The message names it, how long it was tried, and what it said last."""


def is_url(folder: Source) -> bool:
    return "://" in str(folder)


def read_file(place: str, patience: float = PATIENCE) -> bytes:
    """A whole file. Raises as `read_range`."""
    return _patiently(place, None, patience) if is_url(place) else Path(place).read_bytes()


def read_range(place: str, offset: int, size: int, patience: float = PATIENCE) -> bytes:
    """Bytes offset to offset + size of a file; fewer where it is shorter.

    Raises OSError (FileNotFoundError where there is none) for a local file, StoreError for a store that stays away.
    """
    return _patiently(place, (offset, size), patience) if is_url(place) else _pread(place, offset, size)


def _patiently(place: str, span: tuple[int, int] | None, patience: float) -> bytes:
    started, pause = time.monotonic(), FIRST_PAUSE
    while True:
        content, error = _asked(place, span)
        if error is None and (span is None or len(content) == span[1]):
            return content
        waited = time.monotonic() - started
        if waited + pause > patience:
            if error is None:
                return content
            raise StoreError(
                f"{place}: the store gave no answer for {waited:.0f} s ({type(error).__name__}: {error}): "
                "check it, then start the run again: it goes on where it stopped"
            ) from error
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _asked(place: str, span: tuple[int, int] | None) -> tuple[bytes, Exception | None]:
    start, end = (None, None) if span is None else (span[0], sum(span))
    try:
        filesystem, path = fsspec.url_to_fs(place, **_options(place))
        return bytes(filesystem.cat_file(path, start=start, end=end)), None
    except ImportError as error:
        raise StoreError(
            f"{place}: needs a package that is not installed ({error}): pip install 'segvol_pl[remote]'"
        ) from error
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # the client libraries behind fsspec share no class of errors
        return b"", error


def _options(place: str) -> dict[str, Any]:
    if not place.startswith(("http://", "https://")):
        return {}
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec says what is lacking
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=REQUEST_TIMEOUT)}}


def _pread(place: str, offset: int, size: int) -> bytes:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
