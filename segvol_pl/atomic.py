"""Writes files atomically: under a temporary name in the same folder, then renamed. A file is complete or absent."""

from __future__ import annotations

import csv
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class NoRoomError(OSError):
    """A full disk or quota. The message names the file, the space it needs (if known) and the free space."""


@contextmanager
def atomic_path(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield a temporary path; it is renamed to `path` when the block ends, and removed if the block fails.

    ending: suffix for writers that derive the format from the name. Raises NoRoomError if the disk is full.
    """
    part = part_name(path, ending)
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(path) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def part_name(path: Path, ending: str = "") -> Path:
    """A name in the folder of `path` for what is not complete yet; no other process uses it."""
    # Processes of different hosts or containers that share a folder may have the same pid.
    own = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{own}.part{ending}")


def no_room(path: Path, needed: int = 0) -> NoRoomError:
    """The error for `path` on a full disk; `needed` in bytes, 0 if unknown."""
    wants = f"it needs {needed / 1e6:.0f} MB, " if needed else ""
    free = shutil.disk_usage(path.parent).free / 1e6
    return NoRoomError(
        f"{path}: no space left on the disk or in the quota ({wants}{free:.0f} MB free): make room, then start again"
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, atomically. columns: those to write, in order; by default all of the first row, if any."""
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns or list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def claim(path: Path) -> bool:
    """Create an empty file; return whether this process was the first to do so."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def put(new: Path, path: Path) -> None:
    """Give a complete file or folder its name, and remove what had it before.

    A folder cannot be replaced in one step: in between, the previous one is called `before-NAME`.
    """
    if path.is_dir() or (new.is_dir() and path.exists()):
        before = path.with_name(f"before-{path.name}")
        remove(before)
        path.rename(before)
        new.rename(path)
        remove(before)
    else:
        new.replace(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
