"""A file is whole or not there: it is written under another name in its folder, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, ending: str = "") -> Iterator[Path]:
    """The name to write to; it becomes `path` when the block ends, and is removed when the block fails.

    `ending`: for writers that tell the format by the name.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part{ending}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
