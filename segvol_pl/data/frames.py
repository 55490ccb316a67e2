"""Voxel arrays as Blosc2 frames, of which a crop reads, checks and decodes only what it touches.

1. `encode_array` turns an array into a frame: a head, compressed chunks one behind the other, a tail.
2. `chunk_table` says where the chunks lie and what they hash to; large members have one in their sample's facts.
3. `WholeFrame` decodes a slice of a frame that is there; `PartialFrame` first fetches the chunks that the slice touches
   and holds them against their hashes. Both refuse, before memory is taken, a frame that is not of the stated `Form`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import blosc2
import numpy as np

from segvol_pl.data.schema import ChunkTable
from segvol_pl.errors import SampleError

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


@dataclass(frozen=True)
class Form:
    """What is known of an array before its frame is opened."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """Those that it may have, as numpy names them."""


def decode_array(frame: bytes | bytearray, form: Form | None = None) -> blosc2.NDArray:
    """The array of a Blosc2 frame, still encoded: slicing it decodes only what the slice touches.

    Raises SampleError for bytes that are no such frame, or not of the form.
    """
    try:
        array = cast(blosc2.NDArray, blosc2.ndarray_from_cframe(frame))
        kind = array.dtype.kind
    except MemoryError:
        raise
    except Exception as error:  # what it raises depends on the bytes: it evaluates the dtype that they state
        raise SampleError(f"{len(frame)} bytes are no Blosc2 frame ({error})") from error
    if kind not in "iu":
        # Bytes that call themselves objects would be taken for addresses.
        raise SampleError(f"a Blosc2 frame holds {array.dtype}, not whole numbers")
    dtype = array.dtype.newbyteorder("=").name
    if form is not None and (array.shape != form.shape or dtype not in form.dtypes):
        raise SampleError(f"a Blosc2 frame holds {dtype} {array.shape}, not {' or '.join(form.dtypes)} {form.shape}")
    # A slice takes memory for whole chunks.
    if len(array.chunks) != len(array.shape) or any(np.greater(array.chunks, array.shape)):
        raise SampleError(f"a Blosc2 frame of {array.shape} says that its chunks are of {array.chunks}")
    return array


def decoded(array: blosc2.NDArray, key: slice | tuple[slice, ...]) -> np.ndarray:
    """A slice. Raises SampleError where a chunk cannot be decoded."""
    try:
        return np.asarray(array[key])
    except RuntimeError as error:
        raise SampleError(f"a chunk of a Blosc2 frame of {array.shape} cannot be decoded ({error})") from error


def decode_alone() -> None:
    """From here on this process decodes with one thread: for processes and threads beside which others decode.

    Blosc2 would take every core that the process may use, in each of them. To be called before a fork.
    """
    blosc2.set_nthreads(1)


def chunk_table(frame: bytes, worth: int = WORTH_PARTS) -> ChunkTable | None:
    """Where the chunks of a frame lie; None for a frame of fewer than `worth` bytes, which is read whole."""
    if len(frame) < worth:
        return None
    array = decode_array(frame)
    chunks = [array.schunk.get_chunk(number) for number in range(array.schunk.nchunks)]
    places = (frame.find(chunk, 0, HEAD + len(chunk)) for chunk in chunks)
    start = next((place for place in places if place > 0), None)
    if start is None:
        raise SampleError(f"a Blosc2 frame of {array.shape} does not begin with its first chunk")
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


class WholeFrame:
    """A frame whose bytes are all there; slicing it decodes only what the slice touches."""

    def __init__(self, frame: bytes, form: Form | None = None) -> None:
        self._array = decode_array(frame, form)
        self.shape = tuple(self._array.shape)
        self.dtype: np.dtype[Any] = self._array.dtype

    def __getitem__(self, key: slice | tuple[slice, ...]) -> np.ndarray:
        return decoded(self._array, key)


def _check_table(table: ChunkTable) -> None:
    """A table is data from elsewhere. Raises SampleError for one that describes no frame."""
    lists = [table.shape, table.chunk, table.sizes, [table.bytes, table.start]]
    if (
        all(isinstance(numbers, list) and all(type(number) is int for number in numbers) for numbers in lists)
        and len(table.shape) == len(table.chunk) == 3
        and all(0 < chunk <= extent for chunk, extent in zip(table.chunk, table.shape, strict=True))
        and min(table.sizes, default=0) >= 0 < table.start
        and len(table.sizes) == math.prod(map(_parts, table.shape, table.chunk))
        and table.start + max(sum(table.sizes), CHUNK_HEADER) <= table.bytes
        and isinstance(table.hashes, str)
        and len(table.hashes) == DIGITS * len(table.sizes)
    ):
        return
    raise SampleError(f"its facts describe no chunks of an array of {table.shape}: pack it again")


def _parts(extent: int, chunk: int) -> int:
    return -(-extent // chunk)


class PartialFrame:
    """A frame of which only the chunks that a slice touches are fetched, each once. Slices are of step 1.

    Raises SampleError for a table that describes no frame, or not one of the form.
    """

    def __init__(self, table: ChunkTable, fetch: Fetch, form: Form | None = None) -> None:
        _check_table(table)
        self.table, self.fetch, self.form = table, fetch, form
        self.shape = tuple(table.shape)
        if form is not None and self.shape != form.shape:
            raise SampleError(f"its facts describe chunks of an array of {self.shape}, not {form.shape}")
        # Pages that are never written take no memory.
        self.frame = bytearray(table.bytes)
        self.bounds = np.cumsum([table.start, *table.sizes]).tolist()
        self.have: set[int] = set()
        self.opened = False
        """Whether head and tail are there."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the array, read off the frame's ends."""
        dtype: np.dtype[Any] = self._array().dtype
        return dtype

    def __getitem__(self, key: slice | tuple[slice, ...]) -> np.ndarray:
        slices = self._full(key)
        self._load(self._touched(slices))
        return decoded(self._array(), slices)

    def _array(self) -> blosc2.NDArray:
        self._load([])
        array = decode_array(self.frame, self.form)
        if (array.shape, array.chunks) != (self.shape, tuple(self.table.chunk)):
            raise SampleError(
                f"a Blosc2 frame holds {array.shape} in chunks of {array.chunks}, "
                f"not {self.shape} in {tuple(self.table.chunk)}"
            )
        return array

    def _full(self, key: slice | tuple[slice, ...]) -> tuple[slice, ...]:
        given = key if isinstance(key, tuple) else (key,)
        padded = (*given, *[slice(None)] * (len(self.shape) - len(given)))
        return tuple(slice(*part.indices(extent)[:2]) for part, extent in zip(padded, self.shape, strict=True))

    def _touched(self, slices: Sequence[slice]) -> list[int]:
        """Numbers of the chunks that the slices touch."""
        grid = list(map(_parts, self.shape, self.table.chunk))
        along = [
            np.arange(part.start // chunk, _parts(part.stop, chunk))
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
