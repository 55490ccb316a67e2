"""A bounded cache of remote members on the node's own disk, shared by all loader processes there.

1. A member is cached in blocks of 1 MiB, named by the member's hash: what is cached can be out of date never, and the
   same sample from two stores is one entry.
2. A block is written under another name and renamed, so that processes may fill the cache side by side.
3. When a process has added a part of the bound, it removes the blocks used longest ago.
4. A cache that fails, on a disk that is full or cannot be written, is gone without: it is said once a process.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from segvol_pl.atomic import atomic_path
from segvol_pl.data.frames import Span

log = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes of a block; a member's last one is shorter."""
KEPT = 7 / 8
"""Share of the bound that is left after a clearing, so that other processes may add before they look in turn."""
SHARE = 1 / 256
"""Share of the bound that a process adds before it looks whether to clear: 32 processes a node stay within it."""

Fetch = Callable[[list[Span]], list[bytes]]


class Cache:
    """Blocks in `folder`, at most `limit` bytes."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.added = limit
        """Bytes since the last look; at first the cache may hold anything."""
        self.failed = False

    def read(self, key: str, size: int, spans: list[Span], fetch: Fetch) -> list[bytes]:
        """The bytes of the spans of a member of `size` bytes; `fetch` is asked for the blocks that are not there."""
        wanted = sorted({block for first, last in spans for block in range(first // BLOCK, -(-last // BLOCK))})
        places = {block: (block * BLOCK, min((block + 1) * BLOCK, size)) for block in wanted}
        blocks = {block: self._get(key, block, _length(places[block])) for block in wanted}
        missing = [block for block in wanted if blocks[block] is None]
        fetched = fetch([places[block] for block in missing]) if missing else []
        for block, content in zip(missing, fetched, strict=True):
            blocks[block] = content
            # What a cut shard gave must not outlive the cut.
            if len(content) == _length(places[block]):
                self._put(key, block, content)
        return [_assembled(blocks, span) for span in spans]

    def forget(self, key: str) -> None:
        """Removes a member's blocks: what was fetched was damaged."""
        with self._bypassed():
            for path in self._path(key, 0).parent.glob(f"{_name(key)}.*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _bypassed(self) -> Iterator[None]:
        """The disk's errors are no fault of a sample. They are met anew each time: a full disk may be cleared."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                log.warning(
                    "data.cache %s fails (%s): what it does not hold is read from the store each time: "
                    "see that it may be written and has room, or set data.cache_gb lower",
                    *(self.folder, error),
                )
            self.failed = True

    def _path(self, key: str, block: int) -> Path:
        name = _name(key)
        return self.folder / name[:2] / f"{name}.{block}"

    def _get(self, key: str, block: int, length: int) -> bytes | None:
        """None for a block that is not there or not whole."""
        path = self._path(key, block)
        content = None
        with self._bypassed(), suppress(FileNotFoundError):
            content = path.read_bytes()
            os.utime(path)
        return content if content is not None and len(content) == length else None

    def _put(self, key: str, block: int, content: bytes) -> None:
        path = self._path(key, block)
        with self._bypassed():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                part.write_bytes(content)
            self.added += len(content)
            if self.added > self.limit * SHARE:
                self._clear()
                self.added = 0

    def _clear(self) -> None:
        """Removes the blocks used longest ago where the bound is near."""
        found = sorted(_used(path) for path in self.folder.glob("??/*"))
        total = sum(size for _, size, _ in found)
        if total <= self.limit * KEPT:
            return
        log.info("cache %s: %.1f of %.1f GB used, clearing", self.folder, total / 1e9, self.limit / 1e9)
        for _, size, path in found:
            if total <= self.limit * KEPT:
                break
            path.unlink(missing_ok=True)
            total -= size


def _name(key: str) -> str:
    """A key comes from an index: it must not lead out of the folder."""
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _used(path: Path) -> tuple[int, int, Path]:
    """When a block was last used, in ns, and its bytes; another process may have removed it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, path
    return status.st_mtime_ns, status.st_size, path


def _length(span: Span) -> int:
    return span[1] - span[0]


def _assembled(blocks: dict[int, bytes | None], span: Span) -> bytes:
    first, last = span
    whole = b"".join(blocks[block] or b"" for block in range(first // BLOCK, -(-last // BLOCK)))
    offset = first // BLOCK * BLOCK
    return whole[first - offset : last - offset]
