"""Arrays as nnInteractive's client sends and reads them.

A message is `NNIA`, then four bytes: version 1, codec, number of axes, length of the dtype's name; the name in ASCII;
the axes as int64; the number of chunks as uint32. Each chunk has its size and its compressed size as uint64, and is a
Blosc2 chunk of zstd or LZ4. All numbers are little-endian.

What is read comes from elsewhere. Sizes are compared with each other and with a limit before memory is allocated, and
only compression that needs no plug-in is decoded: Blosc2 would load a plug-in that a chunk names.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import blosc2
import numpy as np

from segvol_pl.errors import RequestError

MAGIC, VERSION = b"NNIA", 1
ZSTD, LZ4 = 1, 2
"""The codecs, by their number in a message."""
FIRST, COUNT, SIZES = struct.Struct("<4sBBBB"), struct.Struct("<I"), struct.Struct("<QQ")
CHUNK = 1 << 30
"""Bytes of a chunk, at most: Blosc2 takes less than 2 GiB at once."""

DTYPES = {
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64"),
}
"""A dtype of objects would take the bytes as addresses."""

# The header of a Blosc2 chunk, see README_CHUNK_FORMAT of C-Blosc2.
CHUNK_HEADER, EXTENDED = 32, 0b101
FLAGS, FILTERS, MORE_FLAGS = 2, slice(16, 22), 31
FORMATS = {0, 1, 4}
"""BloscLZ, LZ4 and zstd, in the upper three bits of the flags; a few bytes, which are not compressed, have 0 too.
Another number may stand for a plug-in."""
LAZY = 0b1000
"""Flag of a chunk whose bytes are elsewhere."""
BUILT_IN = {0, 1, 2}
"""Filters: none, byte shuffle, bit shuffle."""


def pack_array(array: np.ndarray) -> bytes:
    """Return the message of an array that is not empty."""
    content, name = np.ascontiguousarray(array).data.cast("B"), array.dtype.name.encode("ascii")
    chunks = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    parts = [
        FIRST.pack(MAGIC, VERSION, ZSTD, array.ndim, len(name)),
        name,
        struct.pack(f"<{array.ndim}q", *array.shape),
        COUNT.pack(len(chunks)),
    ]
    for chunk in chunks:
        # Without the element's size, Blosc2 writes zeros of some lengths so that it cannot read them.
        compressed = blosc2.compress2(
            chunk,
            typesize=array.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=3,
            filters=[blosc2.Filter.NOFILTER],
        )
        parts += [SIZES.pack(len(chunk), len(compressed)), compressed]
    return b"".join(parts)


def unpack_array(message: bytes | bytearray, ndim: int, most_voxels: int) -> np.ndarray:
    """Return the array of a message.

    Args:
        message: the body of a request.
        ndim: number of axes that the array must have.
        most_voxels: number of elements that it may have.

    Raises:
        RequestError: the message is damaged, or holds another kind of array; code 413 for too many elements.
    """
    try:
        return _unpacked(message, ndim, most_voxels)
    except struct.error as error:
        raise _damaged("it is cut off") from error


def _damaged(reason: str) -> RequestError:
    return RequestError(f"body: not an array as nnInteractive's client packs it: {reason}")


def _unpacked(message: bytes | bytearray, ndim: int, most_voxels: int) -> np.ndarray:
    magic, version, codec, axes, length = FIRST.unpack_from(message)
    if (magic, version) != (MAGIC, VERSION) or codec not in (ZSTD, LZ4):
        raise _damaged(f"it begins with {bytes(message[: FIRST.size]).hex()}")
    place = FIRST.size + length
    name = bytes(message[FIRST.size : place]).decode("ascii", errors="replace")
    if name not in DTYPES:
        raise RequestError(f"body: an array of {name[:20]!r}: send whole numbers or floating point")
    if axes != ndim:
        raise RequestError(f"body: an array of {axes} axes, not {ndim}")
    shape = struct.unpack_from(f"<{ndim}q", message, place)
    if min(shape) < 1:
        raise RequestError(f"body: an array of shape {list(shape)} holds nothing")
    if math.prod(shape) > most_voxels:
        raise RequestError(f"body: an array of shape {list(shape)}: this server takes {most_voxels} voxels", 413)
    place += 8 * ndim
    (count,) = COUNT.unpack_from(message, place)
    # Pages that are never written are not allocated: what a message claims costs nothing.
    array: np.ndarray[Any, Any] = np.empty(math.prod(shape), np.dtype(name).newbyteorder("<"))
    _decode(message, place + COUNT.size, count, array.view(np.uint8))
    return array.reshape(shape)


def _decode(message: bytes | bytearray, place: int, count: int, into: np.ndarray) -> None:
    """Decode the chunks from `place` on into the bytes `into`."""
    content, written = memoryview(message), 0
    for _ in range(count):
        size, compressed = SIZES.unpack_from(message, place)
        place += SIZES.size
        chunk = content[place : place + compressed]
        if not 0 < size <= len(into) - written or len(chunk) != compressed or not _sound(chunk, size):
            raise _damaged("a chunk has impossible sizes or an unknown compression")
        try:
            blosc2.decompress2(chunk, dst=into[written : written + size])
        except (RuntimeError, ValueError) as error:
            raise _damaged(f"a chunk cannot be decoded ({error})") from error
        written, place = written + size, place + compressed
    if written != len(into):
        raise _damaged(f"it holds {written} bytes of {len(into)}")


def _sound(chunk: memoryview, size: int) -> bool:
    """Whether a chunk's header states these sizes, and nothing that needs a plug-in."""
    if len(chunk) < CHUNK_HEADER:
        return False
    flags = chunk[FLAGS]
    return (
        flags & EXTENDED == EXTENDED
        and flags >> 5 in FORMATS
        and set(chunk[FILTERS]) <= BUILT_IN
        and not chunk[MORE_FLAGS] & LAZY
        and blosc2.get_cbuffer_sizes(chunk)[:2] == (size, len(chunk))
    )
