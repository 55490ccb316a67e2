"""Voxel arrays as Blosc2 frames: a crop reads, checks and decodes only the parts that it touches.

1. `encode_array` turns an array into a frame: a head, compressed chunks one after another, a tail.
2. `chunk_table` lists the chunks' places and hashes; the facts of a sample hold one for each large array.
3. `WholeFrame` decodes slices of a frame in memory; `PartialFrame` first fetches the chunks that a slice touches and
   compares their hashes. Both refuse a frame that is not of the stated `Form` before they allocate memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import blosc2
import numpy as np
import xxhash

from segvol_pl.data.schema import ChunkTable
from segvol_pl.errors import SampleError

CHUNK = (32, 64, 64)
"""Voxels (d, h, w) that are read together."""
BLOCK = (8, 32, 32)
"""Voxels (d, h, w) that are compressed together: a crop decodes only the blocks that it touches."""

WORTH_PARTS = 1 << 20
"""Bytes from which a frame gets a table; smaller ones are read completely."""
GAP = 1 << 17
"""Two wanted chunks with at most this many bytes between them are read in one request."""
HEAD = 4096
"""Bytes before the first chunk, at most."""
CHUNK_HEADER = 32
"""Bytes of a chunk's own header. Blosc2 reads the first chunk's to open a frame, so it counts as part of the head."""
HASH_DIGITS = 16
"""Hex digits of a chunk's hash: 64 bits find every accident."""

COMPACT = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "filters": [blosc2.Filter.SHUFFLE]}
FAST = {"codec": blosc2.Codec.LZ4HC, "clevel": 9, "filters": [blosc2.Filter.BITSHUFFLE]}
"""Two compressions; `FAST` is decoded in about half the time."""
FAST_WORTH = 1.1
"""A fast frame may be this many times as large as a compact one."""
ENCODING = 2
"""Counts the ways of encoding so far. A sample states its own; `packing/repack.py` upgrades earlier ones."""

ByteRange = tuple[int, int]
"""First byte, and the byte behind the last."""

Slices = slice | tuple[slice, ...]
"""A part of an array."""

Content = bytes | memoryview


def _sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]


def _xxh3(content: Content) -> str:
    return xxhash.xxh3_64_hexdigest(content)


HASHES: dict[str, Callable[[Content], str]] = {"sha256": _sha256, "xxh3": _xxh3}
"""How chunks are hashed, by the name in their table. xxh3 takes a tenth of the time; earlier shards have sha256."""
HASH = "xxh3"
"""How new chunks are hashed."""

FetchChecked = Callable[[list[ByteRange], Callable[[list[bytes]], bool]], list[bytes]]
"""Reads the bytes of the spans; the second argument checks that they are those that were packed."""


def encode_array(array_DHW: np.ndarray, fast: bool = False) -> bytes:
    """Encode a 3-D integer array as a Blosc2 frame (`.b2nd`).

    Equal arrays give equal bytes: block sizes are fixed, not chosen for this machine's caches, and one thread writes.

    Args:
        array_DHW: the array.
        fast: LZ4HC behind a bit shuffle, if that takes at most a tenth more bytes than zstd behind a byte shuffle,
            which is the default.
    """
    compact = _encoded(array_DHW, COMPACT)
    return _faster(array_DHW, compact) if fast else compact


def encode_again(frame: bytes, fast: bool = False) -> bytes:
    """Return a frame as `encode_array` encodes its array today: the same bytes if it is encoded so already.

    Raises SampleError for bytes that are not a frame, or that cannot be decoded.
    """
    array = decode_array(frame)
    if _is_encoded(array, FAST if fast else COMPACT):
        return frame
    array_DHW = decoded(array, slice(None))
    return _faster(array_DHW, frame) if _is_encoded(array, COMPACT) else encode_array(array_DHW, fast)


def _faster(array_DHW: np.ndarray, compact: bytes) -> bytes:
    quick = _encoded(array_DHW, FAST)
    return quick if len(quick) <= FAST_WORTH * len(compact) else compact


def _encoded(array_DHW: np.ndarray, compression: dict[str, Any]) -> bytes:
    chunks, blocks = _parts_of(array_DHW.shape)
    parameters = blosc2.CParams(**compression, nthreads=1)
    encoded = blosc2.asarray(np.ascontiguousarray(array_DHW), chunks=chunks, blocks=blocks, cparams=parameters)
    return bytes(encoded.to_cframe())


def _parts_of(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the chunks and of the blocks of an array."""
    chunks = tuple(min(size, limit) for size, limit in zip(shape, CHUNK, strict=True))
    return chunks, tuple(min(size, limit) for size, limit in zip(chunks, BLOCK, strict=True))


def _is_encoded(array: blosc2.NDArray, compression: dict[str, Any]) -> bool:
    """Whether `_encoded` with this compression gave the array."""
    found = array.schunk.cparams
    filters = [each for each in found.filters if each is not blosc2.Filter.NOFILTER]
    same = (found.codec, found.clevel, filters) == tuple(compression[name] for name in ("codec", "clevel", "filters"))
    return same and (array.chunks, array.blocks) == _parts_of(array.shape)


@dataclass(frozen=True)
class Form:
    """What is known of an array before its frame is opened."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    """The dtypes that it may have, by numpy's names."""


def decode_array(frame: bytes | np.ndarray, form: Form | None = None) -> blosc2.NDArray:
    """The array of a Blosc2 frame, still encoded: slicing it decodes only what the slice touches.

    Raises SampleError for bytes that are not a frame, or not of the form.
    """
    try:
        array = cast(blosc2.NDArray, blosc2.ndarray_from_cframe(frame))
        kind = array.dtype.kind
    except MemoryError:
        raise
    except Exception as error:  # any error is possible: it evaluates the dtype in the bytes
        raise SampleError(f"{len(frame)} bytes are not a Blosc2 frame ({error})") from error
    if kind not in "iu":
        # Bytes with dtype object would be used as addresses.
        raise SampleError(f"a Blosc2 frame holds {array.dtype}, not whole numbers")
    dtype = array.dtype.newbyteorder("=").name
    if form is not None and (array.shape != form.shape or dtype not in form.dtypes):
        raise SampleError(f"a Blosc2 frame holds {dtype} {array.shape}, not {' or '.join(form.dtypes)} {form.shape}")
    # A slice allocates memory for complete chunks.
    if len(array.chunks) != len(array.shape) or any(np.greater(array.chunks, array.shape)):
        raise SampleError(f"a Blosc2 frame of {array.shape} has impossible chunks of {array.chunks}")
    return array


def decoded(array: blosc2.NDArray, key: Slices) -> np.ndarray:
    """Decode a slice. Raises SampleError if a chunk cannot be decoded."""
    try:
        return np.asarray(array[key])
    except RuntimeError as error:
        raise SampleError(f"a chunk of a Blosc2 frame of {array.shape} cannot be decoded ({error})") from error


def decode_alone() -> None:
    """Let this process decode with one thread from now on. For processes and threads that decode in parallel.

    By default Blosc2 uses all cores in each of them. Call it before a fork.
    """
    blosc2.set_nthreads(1)


def chunk_table(frame: bytes, worth: int = WORTH_PARTS) -> ChunkTable | None:
    """The chunks of a frame; None for a frame of fewer than `worth` bytes, which is read completely."""
    if len(frame) < worth:
        return None
    array = decode_array(frame)
    chunks = [array.schunk.get_chunk(number) for number in range(array.schunk.nchunks)]
    places = (frame.find(chunk, 0, HEAD + len(chunk)) for chunk in chunks)
    start = next((place for place in places if place > 0), None)
    if start is None:
        raise SampleError(f"a Blosc2 frame of {array.shape} does not begin with its first chunk")
    digest = HASHES[HASH]
    sizes, hashes, place = [], [], start
    for chunk in chunks:
        # A chunk of a single value takes no space: the tail holds the value.
        stored = chunk if frame.startswith(chunk, place) else b""
        sizes.append(len(stored))
        hashes.append(digest(stored))
        place += len(stored)
    return ChunkTable(
        shape=list(array.shape),
        chunk=list(array.chunks),
        bytes=len(frame),
        start=start,
        sizes=sizes,
        hashes="".join(hashes),
        ends=digest(frame[: start + CHUNK_HEADER] + frame[place:]),
        hash=HASH,
    )


class WholeFrame:
    """A frame in memory; slicing it decodes only what the slice touches."""

    def __init__(self, frame: bytes, form: Form | None = None) -> None:
        self._array = decode_array(frame, form)
        self.shape = tuple(self._array.shape)
        self.dtype: np.dtype[Any] = self._array.dtype

    def __getitem__(self, key: Slices) -> np.ndarray:
        return decoded(self._array, key)


@dataclass(frozen=True)
class Missing:
    """What a slice of a `PartialFrame` needs and the frame has not fetched."""

    runs: list[tuple[int, int]]
    """First and last chunk of each run of chunks that is read in one request."""
    spans: list[ByteRange]
    """Bytes of the frame: those of the runs, then its head and tail."""


def _check_table(table: ChunkTable) -> None:
    """Raise SampleError for a table that describes no frame: it comes from a file."""
    lists = [table.shape, table.chunk, table.sizes, [table.bytes, table.start]]
    if (
        all(isinstance(numbers, list) and all(type(number) is int for number in numbers) for numbers in lists)
        and len(table.shape) == len(table.chunk) == 3
        and all(0 < chunk <= extent for chunk, extent in zip(table.chunk, table.shape, strict=True))
        and min(table.sizes, default=0) >= 0 < table.start
        and len(table.sizes) == math.prod(map(_parts, table.shape, table.chunk))
        and table.start + max(sum(table.sizes), CHUNK_HEADER) <= table.bytes
        and isinstance(table.hashes, str)
        and isinstance(table.hash, str)
        and len(table.hashes) == HASH_DIGITS * len(table.sizes)
    ):
        if table.hash in HASHES:
            return
        raise SampleError(f"its chunks are hashed by {table.hash!r}, unknown to this version: update segvol_pl")
    raise SampleError(f"its facts describe no chunks of an array of {table.shape}: pack it again")


def _parts(extent: int, chunk: int) -> int:
    return -(-extent // chunk)


class PartialFrame:
    """A frame that fetches only the chunks that a slice touches, each once. Slices must have step 1.

    `missing`, `is_sound` and `add` are the steps of a fetch, for a caller that fetches for several frames at once.

    Args:
        table: the frame's chunks.
        fetch: reads bytes of the frame.
        form: shape and dtypes that the array must have.

    Raises:
        SampleError: the table describes no frame, or not one of the form.
    """

    def __init__(self, table: ChunkTable, fetch: FetchChecked, form: Form | None = None) -> None:
        _check_table(table)
        self.table, self.fetch, self.form = table, fetch, form
        self._digest = HASHES[table.hash]
        self.shape = tuple(table.shape)
        if form is not None and self.shape != form.shape:
            raise SampleError(f"its facts describe chunks of an array of {self.shape}, not {form.shape}")
        # Memory pages that are never written are not allocated; a bytearray would be filled with zeros.
        self.frame = np.empty(table.bytes, np.uint8)
        self.bounds = np.cumsum([table.start, *table.sizes]).tolist()
        self.have: set[int] = set()
        self.opened = False
        """Whether head and tail are fetched."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The array's dtype, from the frame's head."""
        dtype: np.dtype[Any] = self._array().dtype
        return dtype

    def __getitem__(self, key: Slices) -> np.ndarray:
        slices = self._slices_of(key)
        self._load(self._missing(self._touched(slices)))
        return decoded(self._array(), slices)

    def missing(self, key: Slices) -> Missing:
        """What must be added before the slice can be decoded without a fetch."""
        return self._missing(self._touched(self._slices_of(key)))

    def is_sound(self, missing: Missing, parts: list[bytes]) -> bool:
        """Whether the parts, one for each span, are what was packed."""
        ends = parts[len(missing.runs) :]
        if ends and self._digest(b"".join(ends)) != self.table.ends:
            return False
        return all(self._run_sound(first, last, part) for (first, last), part in zip(missing.runs, parts, strict=False))

    def add(self, missing: Missing, parts: list[bytes]) -> None:
        """Keep the parts, which are sound."""
        for (first, last), part in zip(missing.spans, parts, strict=True):
            self.frame[first:last] = np.frombuffer(part, np.uint8)
        self.have.update(number for first, last in missing.runs for number in range(first, last + 1))
        self.opened = True

    def _array(self) -> blosc2.NDArray:
        self._load(self._missing([]))
        array = decode_array(self.frame, self.form)
        if (array.shape, array.chunks) != (self.shape, tuple(self.table.chunk)):
            raise SampleError(
                f"a Blosc2 frame holds {array.shape} in chunks of {array.chunks}, "
                f"not {self.shape} in {tuple(self.table.chunk)}"
            )
        return array

    def _slices_of(self, key: Slices) -> tuple[slice, ...]:
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

    def _missing(self, numbers: list[int]) -> Missing:
        runs = list(self._runs([number for number in numbers if number not in self.have and self.table.sizes[number]]))
        ends = [] if self.opened else [(0, self.table.start + CHUNK_HEADER), (self.bounds[-1], self.table.bytes)]
        return Missing(runs, [(self.bounds[first], self.bounds[last + 1]) for first, last in runs] + ends)

    def _load(self, missing: Missing) -> None:
        if missing.spans:
            self.add(missing, self.fetch(missing.spans, lambda parts: self.is_sound(missing, parts)))

    def _runs(self, numbers: list[int]) -> Iterator[ByteRange]:
        """First and last chunk of each run, see `Missing`."""
        if not numbers:
            return
        first = last = numbers[0]
        for number in numbers[1:]:
            if self.bounds[number] - self.bounds[last + 1] > GAP:
                yield first, last
                first = number
            last = number
        yield first, last

    def _run_sound(self, first: int, last: int, part: bytes) -> bool:
        view, offset = memoryview(part), self.bounds[first]
        return all(
            self._digest(view[self.bounds[number] - offset : self.bounds[number + 1] - offset]) == self._hash(number)
            for number in range(first, last + 1)
        )

    def _hash(self, number: int) -> str:
        return self.table.hashes[number * HASH_DIGITS : (number + 1) * HASH_DIGITS]
