"""A bounded cache of remote members on the node's own disk, shared by all loader processes there.

1. A member is cached in blocks of 1 MiB that are named by its hash. Entries never go stale, and the same sample from
   two stores is one entry.
2. A block is written under a temporary name and renamed, so several processes can fill the cache at once.
3. After adding a share of the limit, a process removes the least recently used blocks.
4. If the disk is full or not writable, the cache is bypassed; each process logs this once.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from segvol_pl.atomic import atomic_path
from segvol_pl.data.frames import ByteRange

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
"""Bytes of a block; a member's last one is shorter."""
KEPT_SHARE = 7 / 8
"""Share of the limit that is left after clearing, so that other processes can add before they check."""
CHECK_SHARE = 1 / 256
"""Share of the limit that a process adds before it checks: 32 processes on a node stay within the limit."""

FetchRanges = Callable[[list[ByteRange]], list[bytes]]
"""Reads ranges of a file."""


@dataclass(frozen=True)
class MemberParts:
    """Parts of one member of a file."""

    offset: int
    """First byte of the member in the file."""
    size: int
    """Bytes of the member."""
    spans: list[ByteRange]
    """The parts, in bytes of the member."""
    key: str = ""
    """The member's hash, its name in the cache. Empty: do not cache."""

    def in_file(self, span: ByteRange) -> ByteRange:
        """The place of a span of the member in the file."""
        return self.offset + span[0], self.offset + span[1]

    def block(self, number: int) -> ByteRange:
        """The span of a block."""
        return number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, self.size)


class Cache:
    """Cached blocks in `folder`, at most `limit` bytes."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self.added = limit
        """Bytes added since the last check. It starts at the limit: the cache may hold blocks of earlier runs."""
        self.failed = False

    def read(self, wanted: Sequence[MemberParts], fetch: FetchRanges) -> list[list[bytes]]:
        """Read parts of members of one file. fetch: reads the blocks that are not cached, all at once."""
        held = [self._held(member) for member in wanted]
        missing = [
            (member, blocks, number)
            for member, blocks in zip(wanted, held, strict=True)
            for number, content in blocks.items()
            if content is None
        ]
        ranges = [member.in_file(member.block(number)) for member, _, number in missing]
        for (member, blocks, number), content in zip(missing, fetch(ranges) if ranges else [], strict=True):
            blocks[number] = content
            # Do not keep what a truncated shard returned.
            if len(content) == _length(member.block(number)):
                self._put(member.key, number, content)
        return [
            [_assembled(blocks, span) for span in member.spans] for member, blocks in zip(wanted, held, strict=True)
        ]

    def _held(self, member: MemberParts) -> dict[int, bytes | None]:
        """The blocks that the member's parts are in: None for one that is not cached."""
        numbers = sorted({number for span in member.spans for number in _blocks_of(span)})
        return {number: self._get(member.key, number, _length(member.block(number))) for number in numbers}

    def forget(self, key: str) -> None:
        """Remove a member's blocks, because what was fetched was damaged."""
        with self._bypassed():
            for path in self._path(key, 0).parent.glob(f"{_file_name(key)}.*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def _bypassed(self) -> Iterator[None]:
        """Ignore errors of the disk: no sample is damaged. The next call tries again, as a full disk may be cleared."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                log.warning(
                    "data.cache %s fails (%s) and is bypassed: members not in it are read from the store each time: "
                    "check that it is writable and has space, or set data.cache_gb lower",
                    *(self.folder, error),
                )
            self.failed = True

    def _path(self, key: str, block: int) -> Path:
        name = _file_name(key)
        return self.folder / name[:2] / f"{name}.{block}"

    def _get(self, key: str, block: int, length: int) -> bytes | None:
        """None for a block that is missing or incomplete."""
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
            if self.added > self.limit * CHECK_SHARE:
                self._clear()
                self.added = 0

    def _clear(self) -> None:
        """Remove the least recently used blocks if the limit is near."""
        found = sorted(_last_used(path) for path in self.folder.glob("??/*"))
        total = sum(size for _, size, _ in found)
        if total <= self.limit * KEPT_SHARE:
            return
        log.info("cache %s: %.1f of %.1f GB used, clearing", self.folder, total / 1e9, self.limit / 1e9)
        for _, size, path in found:
            if total <= self.limit * KEPT_SHARE:
                break
            path.unlink(missing_ok=True)
            total -= size


def _file_name(key: str) -> str:
    """The file name of a key. Hashed, because a key comes from an index and could lead out of the folder."""
    return hashlib.sha256(key.encode()).hexdigest()[:40]


def _last_used(path: Path) -> tuple[int, int, Path]:
    """When a block was last used (ns) and its size (bytes); 0, 0 if another process has removed it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0, 0, path
    return status.st_mtime_ns, status.st_size, path


def _blocks_of(span: ByteRange) -> range:
    return range(span[0] // BLOCK_BYTES, -(-span[1] // BLOCK_BYTES))


def _length(span: ByteRange) -> int:
    return span[1] - span[0]


def _assembled(blocks: dict[int, bytes | None], span: ByteRange) -> bytes:
    first, last = span
    content = b"".join(blocks[block] or b"" for block in _blocks_of(span))
    offset = first // BLOCK_BYTES * BLOCK_BYTES
    return content[first - offset : last - offset]
