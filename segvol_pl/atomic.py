"""A file is whole or not there: it is written under another name in its folder, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoRoomError(OSError):
    """A disk or quota that is full. The message names the file, what it needs where that is known, and what is left."""


@contextmanager
def atomic_path(path: Path, ending: str = "") -> Iterator[Path]:
    """The name to write to; it becomes `path` when the block ends, and is removed when the block fails.

    `ending`: for writers that tell the format by the name. Raises NoRoomError where the disk is full.
    """
    # Containers and hosts that share a folder have equal process numbers.
    own = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    part = path.with_name(f".{path.name}.{own}.part{ending}")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_room(path) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def no_room(path: Path, needed: int = 0) -> NoRoomError:
    """That `path` could not be written for want of room; `needed` in bytes, 0 where it is not known."""
    wants = f"it needs {needed / 1e6:.0f} MB, " if needed else ""
    free = shutil.disk_usage(path.parent).free / 1e6
    return NoRoomError(
        f"{path}: no space left on its disk, or in its quota ({wants}{free:.0f} MB free): make room, then start again"
    )


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
