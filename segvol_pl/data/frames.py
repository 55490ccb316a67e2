"""Voxel arrays as Blosc2 frames, of which a crop reads, checks and decodes only what it touches.

1. `encode_array` turns an array into a frame: a head, compressed chunks one behind the other, a tail.
2. `chunk_table` says where the chunks lie and what they hash to; large members have one in their sample's facts.
3. `PartialFrame` fetches the chunks that a slice touches, holds them against their hashes, and decodes the slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import blosc2
import numpy as np

from segvol_pl.data.sample import ChunkTable, SampleError

CHUNK = (32, 64, 64)
"""Voxels that are read at once at most."""
BLOCK = (8, 32, 32)
"""Voxels that are compressed together: a crop decodes only the blocks that it touches."""

WORTH_PARTS = 1 << 20
"""Bytes from which a frame gets a table: smaller ones are read whole."""
GAP = 1 << 17
"""Bytes between two wanted chunks that are read along rather than asked for apart."""
HEAD = 4096
"""Bytes before the first chunk, at most."""
CHUNK_HEADER = 32
"""Bytes of a chunk's own header. Blosc2 looks at the first chunk's to open a frame: it counts as part of the head."""
DIGITS = 16
"""Hex digits kept of a chunk's sha256: 64 bits find every accident."""

Span = tuple[int, int]
"""First byte, and the byte behind the last."""

Fetch = Callable[[list[Span], Callable[[list[bytes]], bool]], list[bytes]]
"""Gives the bytes of the spans; the second argument says whether they are those that were packed."""


def encode_array(array_DHW: np.ndarray) -> bytes:
    """A 3-D integer array as a Blosc2 frame (`.b2nd`): zstd level 5 behind a byte shuffle.

    Equal arrays give equal bytes: block sizes are fixed, not chosen for this machine's caches, and one thread writes.
    """
    chunks = tuple(min(size, limit) for size, limit in zip(array_DHW.shape, CHUNK, strict=True))
    blocks = tuple(min(size, limit) for size, limit in zip(chunks, BLOCK, strict=True))
    parameters = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=1)
    encoded = blosc2.asarray(np.ascontiguousarray(array_DHW), chunks=chunks, blocks=blocks, cparams=parameters)
    return bytes(encoded.to_cframe())


def decode_array(frame: bytes | bytearray) -> blosc2.NDArray:
    """The array of a Blosc2 frame, still encoded: slicing it decodes only what the slice touches.

    Raises SampleError for bytes that are no such frame.
    """
    try:
        array = cast(blosc2.NDArray, blosc2.ndarray_from_cframe(frame))
        kind = array.dtype.kind
    except (RuntimeError, ValueError, TypeError, SyntaxError) as error:
        raise SampleError(f"{len(frame)} bytes are no Blosc2 frame ({error})") from error
    if kind not in "iu":
        # Bytes that call themselves objects would be taken for addresses.
        raise SampleError(f"a Blosc2 frame holds {array.dtype}, not whole numbers")
    return array


def chunk_table(frame: bytes, worth: int = WORTH_PARTS) -> ChunkTable | None:
    """Where the chunks of a frame lie; None for a frame of fewer than `worth` bytes, which is read whole."""
    if len(frame) < worth:
        return None
    array = decode_array(frame)
    chunks = [array.schunk.get_chunk(number) for number in range(array.schunk.nchunks)]
    start = next(place for place in (frame.find(chunk, 0, HEAD + len(chunk)) for chunk in chunks) if place > 0)
    sizes, hashes, place = [], [], start
    for chunk in chunks:
        # A chunk of one value alone takes no room: the tail states it.
        stored = chunk if frame.startswith(chunk, place) else b""
        sizes.append(len(stored))
        hashes.append(_digest(stored))
        place += len(stored)
    return ChunkTable(
        shape=list(array.shape),
        chunk=list(array.chunks),
        bytes=len(frame),
        start=start,
        sizes=sizes,
        hashes="".join(hashes),
        ends=_digest(frame[: start + CHUNK_HEADER] + frame[place:]),
    )


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


class PartialFrame:
    """A frame of which only the chunks that a slice touches are fetched, each once. Slices are of step 1."""

    def __init__(self, table: ChunkTable, fetch: Fetch) -> None:
        self.table, self.fetch = table, fetch
        self.shape = tuple(table.shape)
        # Pages that are never written take no memory.
        self.frame = bytearray(table.bytes)
        self.bounds = np.cumsum([table.start, *table.sizes]).tolist()
        self.have: set[int] = set()
        self.opened = False
        """Whether head and tail are there."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array, read off the frame's ends."""
        return self._array().dtype

    def __getitem__(self, key: slice | tuple[slice, ...]) -> np.ndarray:
        slices = self._full(key)
        self._load(self._touched(slices))
        return np.asarray(self._array()[slices])

    def _array(self) -> blosc2.NDArray:
        self._load([])
        return decode_array(self.frame)

    def _full(self, key: slice | tuple[slice, ...]) -> tuple[slice, ...]:
        given = key if isinstance(key, tuple) else (key,)
        padded = (*given, *[slice(None)] * (len(self.shape) - len(given)))
        return tuple(slice(*part.indices(extent)[:2]) for part, extent in zip(padded, self.shape, strict=True))

    def _touched(self, slices: Sequence[slice]) -> list[int]:
        """Numbers of the chunks that the slices touch."""
        grid = [-(-extent // chunk) for extent, chunk in zip(self.shape, self.table.chunk, strict=True)]
        along = [
            np.arange(part.start // chunk, -(-part.stop // chunk))
            for part, chunk in zip(slices, self.table.chunk, strict=True)
        ]
        return np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), grid).reshape(-1).tolist()

    def _load(self, numbers: list[int]) -> None:
        missing = [number for number in numbers if number not in self.have and self.table.sizes[number]]
        ends = [] if self.opened else [(0, self.table.start + CHUNK_HEADER), (self.bounds[-1], self.table.bytes)]
        runs = list(self._runs(missing))
        spans = [(self.bounds[first], self.bounds[last + 1]) for first, last in runs] + ends
        if not spans:
            return
        parts = self.fetch(spans, lambda parts: self._sound(runs, parts))
        for (first, last), part in zip(spans, parts, strict=True):
            self.frame[first:last] = part
        self.have.update(number for first, last in runs for number in range(first, last + 1))
        self.opened = True

    def _runs(self, numbers: list[int]) -> Iterator[Span]:
        """First and last chunk of each stretch that is read at once."""
        if not numbers:
            return
        first = last = numbers[0]
        for number in numbers[1:]:
            if self.bounds[number] - self.bounds[last + 1] > GAP:
                yield first, last
                first = number
            last = number
        yield first, last

    def _sound(self, runs: list[Span], parts: list[bytes]) -> bool:
        """Whether the parts are what was packed: the runs' chunks one by one, then the ends."""
        ends = parts[len(runs) :]
        if ends and _digest(b"".join(ends)) != self.table.ends:
            return False
        return all(self._run_sound(first, last, part) for (first, last), part in zip(runs, parts, strict=False))

    def _run_sound(self, first: int, last: int, part: bytes) -> bool:
        view, offset = memoryview(part), self.bounds[first]
        return all(
            _digest(view[self.bounds[number] - offset : self.bounds[number + 1] - offset]) == self._hash(number)
            for number in range(first, last + 1)
        )

    def _hash(self, number: int) -> str:
        return self.table.hashes[number * DIGITS : (number + 1) * DIGITS]
