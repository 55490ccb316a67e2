"""The cache of remote bytes: right, shared, bounded, and never a cause of damage."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.data.cache import BLOCK_BYTES, Cache, MemberParts
from segvol_pl.data.frames import ByteRange

SIZE = 2 * BLOCK_BYTES + 1000
CONTENT = np.random.default_rng(0).bytes(SIZE)


class Far:
    """A member far away, which counts what it is asked for."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content, self.asked = content, list[ByteRange]()

    def fetch(self, spans: list[ByteRange]) -> list[bytes]:
        self.asked += spans
        return [self.content[first:last] for first, last in spans]


def read(cache: Cache, key: str, spans: list[ByteRange], far: Far, size: int = SIZE) -> list[bytes]:
    """Parts of a member at the beginning of its file."""
    (parts,) = cache.read([MemberParts(0, size, spans, key)], far.fetch)
    return parts


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda ends: (min(ends), max(ends)))))
@settings(max_examples=30, deadline=None)
def test_spans_are_those_of_the_member(tmp_path_factory: object, spans: list[ByteRange]) -> None:
    folder = tmp_path_factory.mktemp("cache")  # type: ignore[attr-defined]
    for _ in range(2):
        cache, far = Cache(str(folder), 10 * SIZE), Far()
        assert read(cache, "key", spans, far) == [CONTENT[first:last] for first, last in spans]
    assert not far.asked


def test_what_one_process_read_another_has(tmp_path: Path) -> None:
    first, second, far = Cache(str(tmp_path), 10 * SIZE), Cache(str(tmp_path), 10 * SIZE), Far()
    read(first, "key", [(0, 10)], far)
    read(second, "key", [(5, BLOCK_BYTES + 5)], far)
    assert far.asked == [(0, BLOCK_BYTES), (BLOCK_BYTES, 2 * BLOCK_BYTES)]
    read(second, "other", [(0, 10)], far)
    assert far.asked[2:] == [(0, BLOCK_BYTES)]


def test_a_forgotten_member_is_fetched_anew(tmp_path: Path) -> None:
    cache, bad = Cache(str(tmp_path), 10 * SIZE), Far(bytes(SIZE))
    read(cache, "key", [(0, SIZE)], bad)
    cache.forget("key")
    assert read(cache, "key", [(0, SIZE)], Far()) == [CONTENT]


def test_a_block_that_is_not_whole_is_fetched_anew(tmp_path: Path) -> None:
    """Neither what a shard gave while it was cut, nor what is left of a block on the disk, is taken for the member."""
    cache = Cache(str(tmp_path), 10 * SIZE)
    assert read(cache, "key", [(0, SIZE)], Far(CONTENT[: BLOCK_BYTES + 5])) == [CONTENT[: BLOCK_BYTES + 5]]
    far = Far()
    assert read(cache, "key", [(0, SIZE)], far) == [CONTENT]
    assert far.asked == [(BLOCK_BYTES, 2 * BLOCK_BYTES), (2 * BLOCK_BYTES, SIZE)]
    for path in tmp_path.glob("??/*.0"):
        os.truncate(path, 7)
    assert read(cache, "key", [(0, SIZE)], far) == [CONTENT]


def test_it_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    limit = 20 * BLOCK_BYTES
    cache, far = Cache(str(tmp_path), limit), Far()
    for number in range(40):
        read(cache, f"key{number}", [(0, 10)], far, BLOCK_BYTES)
        for path in tmp_path.glob("??/*"):
            # The clock of some file systems is coarser than this loop.
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
        read(cache, "kept", [(0, 10)], far, BLOCK_BYTES)
    held = sum(path.stat().st_size for path in tmp_path.glob("??/*"))
    assert limit / 2 < held <= limit
    assert len(far.asked) == 41
