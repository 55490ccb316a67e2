"""Large arrays are read in parts: what a slice touches, checked, and nothing else."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, replace

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.data.frames import CHUNK_HEADER, ByteRange, PartialFrame, chunk_table, decode_array, encode_array
from segvol_pl.data.schema import ChunkTable
from segvol_pl.errors import SampleError

SHAPE = (70, 150, 140)


@pytest.fixture(scope="module")
def array_DHW() -> np.ndarray:
    """Noise, with a corner of one value alone: its chunk takes no room in a frame."""
    array_DHW = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    array_DHW[:40, :70, :70] = -7
    return array_DHW


@pytest.fixture(scope="module", params=[False, True], ids=["zstd", "lz4hc"])
def content(array_DHW: np.ndarray, request: pytest.FixtureRequest) -> bytes:
    return encode_array(array_DHW, fast=request.param)


class Bytes:
    """A frame whose reader notes what it is asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        table = chunk_table(bytes(self.content))
        assert table is not None
        self.table, self.asked = table, list[ByteRange]()
        self.frame = PartialFrame(table, self.fetch)

    def fetch(self, spans: list[ByteRange], sound: object) -> list[bytes]:
        self.asked += spans
        parts = [bytes(self.content[first:last]) for first, last in spans]
        assert callable(sound)
        if not sound(parts):
            raise ValueError("damaged")
        return parts


@given(st.tuples(*(st.tuples(st.integers(0, size), st.integers(0, size)) for size in SHAPE)))
@settings(max_examples=40, deadline=None)
def test_a_slice_is_that_of_the_array(array_DHW: np.ndarray, content: bytes, ends: tuple[tuple[int, int], ...]) -> None:
    slices = tuple(slice(min(pair), max(pair)) for pair in ends)
    np.testing.assert_array_equal(Bytes(content).frame[slices], array_DHW[slices])


def test_the_whole_is_the_array_and_each_byte_is_read_once(array_DHW: np.ndarray, content: bytes) -> None:
    source = Bytes(content)
    assert source.frame.shape == SHAPE and source.frame.dtype == np.int16
    np.testing.assert_array_equal(source.frame[40:50, 3:9], array_DHW[40:50, 3:9])
    np.testing.assert_array_equal(source.frame[:], array_DHW)
    assert sum(last - first for first, last in source.asked) == len(source.content) + CHUNK_HEADER
    assert source.frame.frame.tobytes() == source.content


def test_a_crop_reads_little(content: bytes) -> None:
    source = Bytes(content)
    source.frame[:32, 64:128, 64:128]
    assert sum(last - first for first, last in source.asked) < len(source.content) / 9


@pytest.mark.parametrize(("place", "found"), [("touched", True), ("elsewhere", False), ("head", True), ("tail", True)])
def test_damage_is_found_where_it_matters(array_DHW: np.ndarray, content: bytes, place: str, found: bool) -> None:
    source = Bytes(content)
    behind = sum(source.table.sizes) + source.table.start
    untouched = source.table.start + source.table.sizes[0] + 50
    byte = {"touched": behind - 9, "elsewhere": untouched, "head": 20, "tail": behind + 3}[place]
    source.content[byte] ^= 1
    if found:
        with pytest.raises(ValueError, match="damaged"):
            source.frame[64:, 128:, 128:]
    else:
        np.testing.assert_array_equal(source.frame[64:, 128:, 128:], array_DHW[64:, 128:, 128:])


def test_an_earlier_table_is_checked_by_its_sha256(array_DHW: np.ndarray, content: bytes) -> None:
    source = Bytes(content)
    ends = [source.table.start, *source.table.sizes]
    places = np.cumsum(ends).tolist()
    parts = [content[first:last] for first, last in itertools.pairwise(places)]
    around = content[: source.table.start + CHUNK_HEADER] + content[places[-1] :]
    hashes = [hashlib.sha256(part).hexdigest()[:16] for part in (*parts, around)]
    written = {**asdict(source.table), "hashes": "".join(hashes[:-1]), "ends": hashes[-1]}
    del written["hash"]
    source.frame = PartialFrame(ChunkTable(**written), source.fetch)
    np.testing.assert_array_equal(source.frame[:50, 3:90], array_DHW[:50, 3:90])
    source.content[places[-2] + 40] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        source.frame[64:, 128:, 128:]


def test_a_table_of_an_unknown_hash_is_refused(content: bytes) -> None:
    source = Bytes(content)
    with pytest.raises(SampleError, match=r"'md5'.*update"):
        PartialFrame(replace(source.table, hash="md5"), source.fetch)


def test_a_fast_frame_is_used_only_if_it_is_not_much_larger() -> None:
    noise_DHW = np.random.default_rng(0).normal(0, 12, (64, 128, 128)).astype(np.int16)
    repeated_DHW = noise_DHW[:32, :64, :64].repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert encode_array(repeated_DHW, fast=True) == encode_array(repeated_DHW)
    assert decode_array(encode_array(noise_DHW, fast=True)).cparams.codec is blosc2.Codec.LZ4HC
    assert decode_array(encode_array(noise_DHW)).cparams.codec is blosc2.Codec.ZSTD


def test_a_small_frame_has_no_table() -> None:
    frame = encode_array(np.zeros((8, 8, 8), dtype=np.uint8))
    assert chunk_table(frame) is None
    assert not decode_array(frame)[:].any()


def test_equal_values_next_to_noise_in_one_row_of_chunks() -> None:
    """The head is found though the first chunks take no room."""
    array_DHW = np.zeros((32, 64, 640), dtype=np.int16)
    array_DHW[:, :, 320:] = np.random.default_rng(1).integers(-9000, 9000, (32, 64, 320))
    source = Bytes(encode_array(array_DHW))
    assert source.table.sizes[:5] == [0] * 5 and all(source.table.sizes[5:])
    np.testing.assert_array_equal(source.frame[:], array_DHW)
