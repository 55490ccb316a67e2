"""Shards are plain WebDataset tars, read by range; what is damaged is named."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from ranged_http import serving

from segvol_pl.data.damage import Damage, DamagedSample
from segvol_pl.data.frames import CHUNK_HEADER, chunk_table, decode_array, encode_array
from segvol_pl.data.index_builder import build_index, walk_shard
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import CategoryFacts, Facts, Member, Sample
from segvol_pl.data.shard_index import list_samples, parse_index, read_index
from segvol_pl.data.shard_reader import read_array, read_facts, read_member
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.verify import sample_faults, verify
from segvol_pl.errors import SampleError, ShardError, StoreError
from segvol_pl.imaging.intensity import Intensity

SHAPE = (9, 40, 33)
OVERVIEW = [4, 8, 8]


def _arrays(seed: int, labelled: bool) -> dict[Member, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {
        Member.CT: rng.integers(-1000, 1000, SHAPE).astype(np.int16),
        Member.OVERVIEW: rng.integers(-1000, 1000, OVERVIEW).astype(np.int16),
        Member.REGIONS: rng.integers(0, 5, OVERVIEW).astype(np.uint16),
    }
    if labelled:
        made |= {Member.LABEL: rng.integers(0, 3, SHAPE).astype(np.uint8)}
        made |= {Member.OVERVIEW_LABEL: rng.integers(0, 3, OVERVIEW).astype(np.uint8)}
    return made


def _sample(
    key: str, seed: int = 0, labelled: bool = True, split: str = "train", frames: dict[Member, bytes] | None = None
) -> Sample:
    frames = {**{member: encode_array(array) for member, array in _arrays(seed, labelled).items()}, **(frames or {})}
    liver = CategoryFacts(values=[1], voxels=10 + seed, box=[0, 0, 0, 1, 1, 1], anchors=[[0, 0, 0]])
    facts = Facts(
        key=key,
        shape=list(SHAPE),
        spacing=[3.0, 1.0, 1.0],
        affine=np.eye(4).tolist(),
        source={"image": f"{key}.nii.gz"},
        dataset="made",
        split=split,
        modality="CT",
        intensity=Intensity(mean=-500.0, low=-400.0, high=900.0, minimum=-1000, maximum=999),
        categories={"liver": liver} if labelled else {},
        labelled=labelled,
        overview_shape=OVERVIEW,
        members={member.value: hashlib.sha256(frame).hexdigest() for member, frame in frames.items()},
    )
    return Sample(key, {Member.FACTS: facts.to_json().encode(), **frames})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, three samples, one of them unlabelled."""
    write_shard(tmp_path / "a-00000.tar", [_sample("a", 1), _sample("b", 2, split="test")])
    write_shard(tmp_path / "a-00001.tar", [_sample("c", 3, labelled=False)])
    build_index(tmp_path)
    return tmp_path


INTEGERS = st.sampled_from([np.int16, np.uint8, np.uint16]).map(np.dtype)


@settings(max_examples=40, deadline=None)
@given(arrays(INTEGERS, array_shapes(min_dims=3, max_dims=3, max_side=40)))
def test_arrays_come_back_and_equal_arrays_give_equal_bytes(array_DHW: np.ndarray) -> None:
    frame = encode_array(array_DHW)
    decoded = decode_array(frame)
    assert decoded.dtype == array_DHW.dtype
    assert np.array_equal(decoded[:], array_DHW)
    assert encode_array(np.asfortranarray(array_DHW)) == frame


def test_a_slice_is_decoded_alone() -> None:
    array_DHW = _arrays(0, False)[Member.CT]
    assert np.array_equal(decode_array(encode_array(array_DHW))[2:5, 10:20, 3:30], array_DHW[2:5, 10:20, 3:30])


def test_bytes_that_are_no_frame() -> None:
    with pytest.raises(SampleError, match="5 bytes are not a Blosc2 frame"):
        decode_array(b"hello")


def test_shards_are_deterministic_tars_in_the_order_of_members(folder: Path) -> None:
    write_shard(folder / "again.tar", [_sample("a", 1), _sample("b", 2, split="test")])
    assert (folder / "again.tar").read_bytes() == (folder / "a-00000.tar").read_bytes()
    with tarfile.open(folder / "again.tar") as tar:
        assert [entry.name for entry in tar] == [f"{key}.{member.value}" for key in "ab" for member in Member]
    assert not list(folder.glob(".*"))


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield _sample("a")
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write_shard(tmp_path / "a.tar", broken())
    assert not list(tmp_path.iterdir())


def test_webdataset_reads_them(folder: Path) -> None:
    read = list(webdataset.WebDataset(str(folder / "a-{00000..00001}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["a", "b", "c"]
    assert np.array_equal(decode_array(read[1]["ct.b2nd"])[:], _arrays(2, True)[Member.CT])
    assert json.loads(read[0]["json"])["key"] == "a"
    assert "label.b2nd" not in read[2]


def test_tars_written_by_plain_webdataset_are_usable_once_indexed(tmp_path: Path) -> None:
    """Members in webdataset's own order, bytes as its encoder leaves them."""
    with webdataset.TarWriter(str(tmp_path / "plain-000000.tar")) as writer:
        for key, seed in (("a", 1), ("b", 2)):
            members = {member.value: content for member, content in _sample(key, seed).members.items()}
            writer.write({"__key__": key, **members, "note.txt": "kept beside"})
    index = build_index(tmp_path)
    assert [record.key for record in index.samples] == ["a", "b"] and verify(tmp_path) == []
    for record, seed in zip(index.samples, (1, 2), strict=True):
        facts = read_facts(Store(tmp_path), record)
        for member, array_DHW in _arrays(seed, labelled=True).items():
            np.testing.assert_array_equal(read_array(Store(tmp_path), record, facts, member)[:], array_DHW)


def test_the_index_says_what_the_shards_hold(folder: Path) -> None:
    index = read_index(Store(folder))
    assert index == build_index(folder)
    assert (index.dataset, index.overview_shape, index.splits) == ("made", OVERVIEW, {"test": 1, "train": 2})
    assert (index.categories["liver"].cases, index.categories["liver"].voxels) == (2, 11 + 12)
    assert [(record.key, record.shard, record.labelled) for record in index.samples] == [
        ("a", "a-00000.tar", True),
        ("b", "a-00000.tar", True),
        ("c", "a-00001.tar", False),
    ]
    assert [shard.samples for shard in index.shards] == [2, 1]
    assert [row["key"] for row in list_samples(folder)] == ["a", "b", "c"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_every_member_is_read_by_range(folder: Path, scheme: str) -> None:
    place = f"{scheme}{folder}"
    for seed, record in enumerate(read_index(Store(place)).samples, start=1):
        assert read_facts(Store(place), record).key == record.key
        for member, array in _arrays(seed, record.labelled).items():
            assert np.array_equal(decode_array(read_member(Store(place), record, member))[:], array)


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    with serving(folder) as place:
        yield place


def test_shards_behind_http(folder: Path, server: str) -> None:
    pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")
    index = read_index(Store(server))
    assert index == read_index(Store(folder))
    assert read_member(Store(server), index.samples[1], Member.CT) == read_member(
        Store(folder), index.samples[1], Member.CT
    )


def test_a_folder_without_index_says_how_to_get_one(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "gone"):
        remedy = rf"{place.name}/index\.json does not exist: run segvol-pl index .*{place.name}$"
        with pytest.raises(ShardError, match=remedy):
            read_index(Store(place))
    with pytest.raises(ShardError, match=r"holds no \*\.tar"):
        build_index(tmp_path)
    with pytest.raises(ShardError, match="is not a folder"):
        build_index(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is not an index of shards"),
        ("{}", "is not an index of shards"),
        ('{"schema": 7}', "schema 7 but this version reads 1"),
        ('{"schema": 1, "shards": 3}', "is not an index of shards"),
    ],
)
def test_a_wrong_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(ShardError, match=message):
        read_index(Store(folder))


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    index = read_index(Store(folder))
    record = replace(index.samples[0], shard="../a-00000.tar")
    with pytest.raises(StoreError, match="outside the folder: run segvol-pl index"):
        read_member(Store(folder), record, Member.CT)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "a-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"a-00001\.tar is missing although the index names it"):
        read_index(Store(folder))


def test_a_truncated_shard_is_found_before_it_is_read(folder: Path) -> None:
    path = folder / "a-00000.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(ShardError, match=rf"a-00000\.tar is truncated \({size // 2} bytes, the index says {size}\)"):
        read_index(Store(folder))
    assert "a-00000.tar is truncated" in verify(folder)[0]


def test_a_shard_truncated_while_it_is_read(folder: Path) -> None:
    record = read_index(Store(folder)).samples[1]
    path = folder / record.shard
    path.write_bytes(path.read_bytes()[: record.members[Member.CT.value][0] + 5])
    with pytest.raises(ShardError, match=r"a-00000\.tar, sample b: ct\.b2nd gave 5 of \d+ bytes: .* truncated"):
        read_member(Store(folder), record, Member.CT)


def _cuts(path: Path) -> list[int]:
    """In a header, in a body, and at the boundary between two samples."""
    with tarfile.open(path) as tar:
        entry = tar.getmember("b.json")
    return [entry.offset, entry.offset + 100, entry.offset_data + 100, path.stat().st_size - 8000]


@pytest.mark.parametrize("number", range(4))
def test_a_shard_cut_anywhere_is_not_indexed(folder: Path, number: int) -> None:
    path = folder / "a-00000.tar"
    path.write_bytes(path.read_bytes()[: _cuts(path)[number]])
    with pytest.raises(ShardError, match=r"a-00000\.tar"):
        build_index(folder)


def test_a_sample_without_its_label_is_not_indexed(tmp_path: Path) -> None:
    sample = _sample("a")
    members = {member: frame for member, frame in sample.members.items() if member is not Member.LABEL}
    write_shard(tmp_path / "a.tar", [Sample("a", members)])
    with pytest.raises(ShardError, match=r"a\.tar, sample a: lacks label\.b2nd"):
        build_index(tmp_path)


def test_samples_that_do_not_belong_together(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [_sample("a")])
    write_shard(tmp_path / "b.tar", [_sample("a")])
    with pytest.raises(ShardError, match=r"sample a is in a\.tar and in b\.tar"):
        build_index(tmp_path)
    _, facts = walk_shard(tmp_path / "b.tar")[0]
    other = replace(facts, key="b", overview_shape=[8, 8, 8]).to_json().encode()
    write_shard(tmp_path / "b.tar", [Sample("b", {**_sample("b").members, Member.FACTS: other})])
    with pytest.raises(ShardError, match="mixes overviews of shape"):
        build_index(tmp_path)


def test_verify_finds_a_changed_byte_even_after_indexing_anew(folder: Path) -> None:
    assert verify(folder) == []
    record = read_index(Store(folder)).samples[1]
    path, (offset, size) = folder / record.shard, record.members[Member.LABEL.value]
    content = bytearray(path.read_bytes())
    content[offset + 40] ^= 0xFF
    path.write_bytes(content)
    named = f"shard {path}, sample b: label.b2nd is not what was packed"
    where = f"[altered, bytes {offset} to {offset + size} of {record.shard}]"
    for _ in range(2):
        (fault,) = verify(folder)
        assert fault.startswith(named) and fault.endswith(where)
        build_index(folder)


def _without_hashes(folder: Path, tamper: Callable[[dict[Member, bytes]], None], **changes: Any) -> SampleRecord:
    """Sample a, indexed, as another program may have packed it; `tamper` changes its frames, `changes` its facts."""
    sample = _sample("a")
    facts = json.loads(sample.members.pop(Member.FACTS)) | {"members": {}} | changes
    tamper(sample.members)
    write_shard(folder / "a.tar", [Sample("a", {Member.FACTS: json.dumps(facts).encode(), **sample.members})])
    return build_index(folder).samples[0]


def _spoil(frames: dict[Member, bytes]) -> None:
    """Where the first chunk says where its blocks lie."""
    frame, first = frames[Member.CT], 184 + CHUNK_HEADER
    frames[Member.CT] = frame[:first] + b"\xff" * 64 + frame[first + 64 :]


def test_chunks_that_cannot_be_decoded_are_damage_even_without_hashes(tmp_path: Path) -> None:
    record = _without_hashes(tmp_path, _spoil)
    named = r"a\.tar, sample a: ct\.b2nd: a chunk .* of \(9, 40, 33\) cannot be decoded"
    array = read_array(Store(tmp_path), record, read_facts(Store(tmp_path), record), Member.CT)
    with pytest.raises(DamagedSample, match=named) as raised:
        array[:2, :9]
    assert raised.value.damage is Damage.UNREADABLE
    (fault,) = verify(tmp_path)
    assert re.search(rf"{named}.*\[unreadable, bytes \d+ to \d+ of a\.tar\]", fault)


@pytest.mark.parametrize(
    ("member", "array_DHW", "said"),
    [
        (Member.CT, np.zeros((9, 40, 34), np.int16), r"holds int16 \(9, 40, 34\), not int16 \(9, 40, 33\)"),
        (Member.CT, np.zeros(SHAPE, np.uint8), "holds uint8"),
        (Member.LABEL, np.zeros(SHAPE, np.int64), "holds int64 .*, not uint8 or uint16"),
        (Member.REGIONS, np.zeros(SHAPE, np.uint16), r"holds .*, not uint16 \(4, 8, 8\)"),
        (Member.OVERVIEW, blosc2.zeros((2000, 2000, 2000), np.int16), r"holds int16 \(2000, 2000, 2000\), not"),
    ],
)
def test_a_frame_that_is_not_of_its_facts_is_refused_before_it_is_decoded(
    tmp_path: Path, member: Member, array_DHW: np.ndarray | blosc2.NDArray, said: str
) -> None:
    frame = array_DHW.to_cframe() if isinstance(array_DHW, blosc2.NDArray) else encode_array(array_DHW)
    record = _without_hashes(tmp_path, lambda frames: frames.update({member: bytes(frame)}))
    with pytest.raises(DamagedSample, match=rf"sample a: {member.value}: a Blosc2 frame {said}"):
        read_array(Store(tmp_path), record, read_facts(Store(tmp_path), record), member)
    assert [said for said in verify(tmp_path) if f"sample a: {member.value}" in said] == verify(tmp_path) != []


TABLE = chunk_table(encode_array(_arrays(0, True)[Member.CT]), worth=0)
assert TABLE is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [9, 40, 33.0]},
        {"shape": [9, 40]},
        {"chunk": [0, 40, 33]},
        {"chunk": [-9, 40, 33]},
        {"chunk": [99, 40, 33]},
        {"chunk": "all"},
        {"start": -5},
        {"start": TABLE.bytes},
        {"start": None},
        {"sizes": []},
        {"sizes": TABLE.sizes * 2},
        {"sizes": [TABLE.bytes]},
        {"sizes": [-1]},
        {"sizes": [0.5]},
        {"sizes": 7},
        {"hashes": ""},
        {"hashes": 7},
    ],
    ids=str,
)
def test_a_table_that_describes_no_chunks_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    record = _without_hashes(tmp_path, lambda _: None, chunks={"ct.b2nd": vars(TABLE) | changes})
    facts = read_facts(Store(tmp_path), record)
    with pytest.raises(DamagedSample, match=r"sample a: ct\.b2nd: its facts describe no chunks .*: pack it again"):
        read_array(Store(tmp_path), record, facts, Member.CT)
    assert len(verify(tmp_path)) == 1


def test_a_table_of_another_frame_is_damage(tmp_path: Path) -> None:
    other = chunk_table(encode_array(np.zeros(SHAPE, np.int16) + 7), worth=0)
    assert other is not None and TABLE is not None
    wrong = [{"ends": "0" * 16}, {"hashes": "0" * 16}, {"shape": [9, 40, 32], "chunk": [9, 40, 32]}, {"start": 90}]
    for changes in [*wrong, {"chunk": [9, 40, 20], "sizes": [*TABLE.sizes, 0], "hashes": TABLE.hashes + other.hashes}]:
        record = _without_hashes(tmp_path, lambda _: None, chunks={"ct.b2nd": vars(TABLE) | changes})
        facts = read_facts(Store(tmp_path), record)
        with pytest.raises(DamagedSample, match=r"sample a: ct\.b2nd"):
            read_array(Store(tmp_path), record, facts, Member.CT)[:]
        (fault,) = verify(tmp_path)
        assert "sample a: ct.b2nd" in fault


LIVER = {"values": [1], "voxels": 10, "box": [0, 0, 0, 1, 1, 1], "anchors": [[0, 0, 0]]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": [9, 40, 33.5]}, r"not a shape of three axes"),
        ({"shape": [9, 40]}, r"not a shape of three axes"),
        ({"overview_shape": [4, 8, -8]}, r"not a shape of three axes"),
        ({"members": {"note.txt": ""}}, r"'note.txt' is not a valid Member"),
        ({"members": {"ct.b2nd": 7}}, r"hash of ct.b2nd: 7 is not of type str"),
        ({"categories": {"liver": {**LIVER, "anchors": []}}}, r"anchors of liver are no voxels of"),
        ({"categories": {"liver": {**LIVER, "anchors": [[0, 40, 0]]}}}, r"anchors of liver are no voxels of"),
        ({"categories": {"liver": {**LIVER, "anchors": [[0, 1], [2]]}}}, r"inhomogeneous"),
        ({"categories": {"liver": {**LIVER, "values": "1"}}}, r"values of liver are no list"),
    ],
)
def test_facts_that_are_none_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DamagedSample, match=rf"a\.tar, sample a: .*{said}"):
        _without_hashes(tmp_path, lambda _: None, **changes)


def test_facts_of_another_shape_than_the_index_says(folder: Path) -> None:
    record = replace(read_index(Store(folder)).samples[0], shape=[9, 40, 32])
    with pytest.raises(DamagedSample, match=r"sample a: is of \[9, 40, 33\], the index says \[9, 40, 32\]: run"):
        read_facts(Store(folder), record)


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000])
def test_what_is_nested_too_deep_is_no_index_and_no_facts(folder: Path, deep: str) -> None:
    (folder / INDEX).write_text(deep)
    with pytest.raises(ShardError, match=r"index\.json is not an index of shards"):
        read_index(Store(folder))
    write_shard(folder / "a-00000.tar", [Sample("a", {Member.FACTS: deep.encode()})])
    with pytest.raises(DamagedSample, match=r"a-00000\.tar, sample a: .*recursion"):
        build_index(folder)


def test_verify_says_what_it_could_not_read(folder: Path) -> None:
    path = folder / "a-00001.tar"
    path.rename(folder / "moved")
    path.symlink_to("moved")
    assert verify(folder) == []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    record = read_index(Store(folder)).samples[0]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        (fault,) = sample_faults(Store(folder, 0.0), record)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "a-00000.tar could not be read for 0 s (Too many open files)" in fault and "[not read, bytes" in fault


def test_verify_finds_what_lies_between_the_members(folder: Path) -> None:
    path = folder / "a-00000.tar"
    content = bytearray(path.read_bytes())
    content[300] ^= 0xFF  # in the first header, where tar keeps nothing
    path.write_bytes(content)
    assert verify(folder) == [
        f"shard {path}: its sha256 is not the indexed one although all samples are sound: copy it again"
    ]


def test_facts_of_another_sample(folder: Path) -> None:
    index = read_index(Store(folder))
    mixed = replace(index.samples[0], members=index.samples[1].members, facts_sha256="")
    with pytest.raises(ShardError, match="sample a: holds the facts of b: run segvol-pl index"):
        read_facts(Store(folder), mixed)


def test_the_index_survives_its_text(folder: Path) -> None:
    index = read_index(Store(folder))
    assert parse_index(index.to_json().encode(), Store(folder)) == index
