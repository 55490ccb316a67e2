"""A folder of shards in an earlier encoding becomes one of today's: the same samples, whatever interrupts it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ct_files import write_case
from damaged import flip
from factories import TINY
from holders import holding
from large_samples import large_sample

from segvol_pl.__main__ import main
from segvol_pl.config import DataConfig, PackConfig, PromptConfig, RegionsConfig, RepackConfig
from segvol_pl.data import frames, sampling, shard_index
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.schema import Member, Sample
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_array, read_facts, read_sample
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.stream import BatchPlan, Stream
from segvol_pl.data.verify import verify
from segvol_pl.errors import LockedError, PackError, ShardError
from segvol_pl.packing import repack as repacking
from segvol_pl.packing.pack import pack
from segvol_pl.packing.prepare import VERSIONS, Rules, sample_of
from segvol_pl.packing.repack import RepackReport, repack
from segvol_pl.packing.report import REPORT


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, but for times in the report."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != REPORT}


def make_earlier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the shards of a folder again as they were first encoded: zstd, sha256, and facts that do not state it."""
    store = Store(folder)
    by_shard: dict[str, list[Sample]] = {}
    with monkeypatch.context() as patch:
        patch.setattr(frames, "HASH", "sha256")
        for record in read_index(store).samples:
            facts, sample = read_facts(store, record), read_sample(store, record)
            arrays = {m: frames.decode_array(frame)[:] for m, frame in sample.members.items() if m is not Member.FACTS}
            old = sample_of(facts, {member: frames.encode_array(array_DHW) for member, array_DHW in arrays.items()})
            stated = json.loads(old.members[Member.FACTS])
            del stated["encoding"]
            for table in stated["chunks"].values():
                del table["hash"]
            text = json.dumps(stated, sort_keys=True, separators=(",", ":")).encode()
            by_shard.setdefault(record.shard, []).append(Sample(old.key, {**old.members, Member.FACTS: text}))
    for name, samples in by_shard.items():
        write_shard(folder / name, samples)
    build_index(folder)
    return folder


@pytest.fixture
def earlier(phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six phantoms in three shards or more, in the earlier encoding."""
    return make_earlier(Path(shutil.copytree(phantom_shards, tmp_path / "shards")), monkeypatch)


def run(folder: Path, workers: int = 1) -> RepackReport:
    return repack(RepackConfig(folder=str(folder), workers=workers))


def batches(folder: Path) -> str:
    """A digest of the first training batches."""
    index = read_index(Store(folder))
    rows = {name: row for row, name in enumerate(sorted(index.categories))}
    prompts = PromptConfig(categories_per_volume=2, pseudo_per_volume=2)
    draw = functools.partial(sampling.sample_segmentation, model=TINY, data=DataConfig(), prompts=prompts, row_of=rows)
    records = index.samples
    stream = Stream(Corpus([Part(Store(folder), records, 3)]), draw, BatchPlan(3 * len(records), 4, seed=7))
    digest = hashlib.sha256()
    for batch in islice(iter(stream), 4):
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_bytes_are_those_that_packing_gives_today(earlier: Path, phantom_shards: Path, workers: int) -> None:
    before, held = batches(earlier), contents(earlier)
    assert held != contents(phantom_shards)
    report = run(earlier, workers)
    assert (report.samples, report.faults) == (6, [])
    assert report.shards == len(list(earlier.glob("*.tar")))
    assert report.before == sum(len(held[path.name]) for path in earlier.glob("*.tar"))
    assert report.after == sum(path.stat().st_size for path in earlier.glob("*.tar"))
    assert contents(earlier) == contents(phantom_shards) and verify(earlier) == []
    assert json.loads((earlier / REPORT).read_text())["bytes"] == report.after
    assert batches(earlier) == before == batches(phantom_shards)
    assert [path.name for path in earlier.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("stopped_in", ["copyfile", "rmtree"])
def test_the_rows_of_a_large_index_are_swapped_with_it(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    monkeypatch.setattr(shard_index, "INLINE", 0)
    build_index(earlier)
    before = list(read_index(Store(earlier)).samples)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repacking.shutil, stopped_in, interrupt)
        run(earlier)
    run(earlier)
    after = list(read_index(Store(earlier)).samples)
    assert [record.key for record in after] == [record.key for record in before] and after != before
    assert len(list(earlier.glob("index-*.npy"))) == 1 and verify(earlier) == []


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_large_members_get_chunks_hashed_as_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", [large_sample("a")])
    build_index(tmp_path)
    held = contents(tmp_path)
    make_earlier(tmp_path, monkeypatch)
    store = Store(tmp_path)
    (record,) = read_index(store).samples
    facts = read_facts(store, record)
    ct_DHW = read_array(store, record, facts, Member.CT)[:]
    assert (facts.chunks["ct.b2nd"].hash, facts.encoding) == ("sha256", 1)
    (tmp_path / "a.tar").chmod(0o640)
    run(tmp_path)
    assert (tmp_path / "a.tar").stat().st_mode & 0o777 == 0o640
    (record,) = read_index(store).samples
    facts = read_facts(store, record)
    assert (facts.chunks["ct.b2nd"].hash, facts.encoding) == ("xxh3", frames.ENCODING)
    np.testing.assert_array_equal(read_array(store, record, facts, Member.CT)[:], ct_DHW)
    assert contents(tmp_path) == held


def test_a_second_time_there_is_nothing_to_do(earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repack", str(earlier), "workers=1"]) == 0
    said = capsys.readouterr().out
    assert f"{earlier}: " in said and "shards repacked (6 samples)" in said and " MB before, " in said
    held = {path: path.stat().st_mtime_ns for path in earlier.glob("*.tar")}
    assert main(["repack", str(earlier)]) == 0
    assert "have today's encoding: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in earlier.glob("*.tar")} == held


@pytest.mark.parametrize("member", [Member.FACTS, Member.CT, Member.REGIONS])
def test_a_shard_with_a_damaged_sample_is_left_as_it_is(
    earlier: Path, member: Member, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_index(Store(earlier)).samples[0]
    others = [path for path in earlier.glob("*.tar") if path.name != record.shard]
    flip(earlier, record, member)
    faults, held = verify(earlier), (earlier / record.shard).read_bytes()
    assert main(["repack", str(earlier), "workers=1"]) == 1
    said = capsys.readouterr().out.splitlines()
    (line,) = [line for line in said if line.startswith("shard ")]
    assert f"{record.shard}, sample {record.key}: " in line and member.value in line + "json"
    assert any(f"{len(others)} of {len(others) + 1} shards repacked" in line for line in said)
    assert (earlier / record.shard).read_bytes() == held
    assert verify(earlier) == faults, "the new index hides no damage"
    assert main(["repack", str(earlier), "workers=1"]) == 1


def test_a_truncated_shard_is_left_as_it_is(earlier: Path) -> None:
    path = sorted(earlier.glob("*.tar"))[0]
    os.truncate(path, path.stat().st_size - 2000)
    report = run(earlier)
    (fault,) = report.faults
    assert f"shard {path} is truncated" in fault and report.shards == len(list(earlier.glob("*.tar"))) - 1


def test_what_repacking_would_lose_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tars that webdataset wrote may hold further members, and facts without hashes."""
    import webdataset

    write_shard(tmp_path / "a.tar", [large_sample("a")])
    build_index(tmp_path)
    make_earlier(tmp_path, monkeypatch)
    (record,) = read_index(Store(tmp_path)).samples
    members = {member.value: content for member, content in read_sample(Store(tmp_path), record).members.items()}
    facts = json.loads(members["json"])
    del facts["members"]["overview.b2nd"], facts["chunks"]
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", **members, "json": json.dumps(facts).encode(), "note.txt": "kept"})
    build_index(tmp_path)
    held = contents(tmp_path)
    first, second = run(tmp_path).faults
    assert "sample a: holds note.txt, which would be lost" in first
    assert "sample a: overview.b2nd has no hash, so damage would not be found" in second
    assert contents(tmp_path) == held


# ---- interruptions ----


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "segvol_pl", "repack", str(folder), "workers=2"]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while workers write: the folder is as it was, and what was staged is not encoded again."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(4):
        write_shard(folder / f"a-{number}.tar", [large_sample(f"s{number}", number)])
    build_index(folder)
    today = contents(folder)
    held = contents(make_earlier(folder, monkeypatch))
    process = start(folder)
    deadline = time.monotonic() + 60
    while not list(folder.glob(".repack-*/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # A worker sees that its parent is gone within moments.
    while any(_lives(path, process.pid) for path in Path("/proc").glob("[0-9]*/stat")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (folder / INDEX).exists()
    assert {name: content for name, content in contents(folder).items() if name != ".lock.json"} == held
    assert verify(folder) == []
    staged = {path.name for path in folder.glob(".repack-*/*.tar")}
    (folder / f".repack-{'0' * 16}").mkdir()  # of another index
    written: list[str] = []
    with monkeypatch.context() as patch:
        again = repacking._again
        patch.setattr(repacking, "_again", lambda job: written.append(job.shard.name) or again(job))
        assert run(folder).samples == 4
    assert set(written) == {f"a-{number}.tar" for number in range(4)} - staged
    assert contents(folder) == today and not list(folder.glob(".repack-*"))


def _lives(stat: Path, group: int) -> bool:
    try:
        state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return int(of_group) == group and state != "Z"


def _killed_at(folder: Path, step: int) -> None:
    """Repack in this process, which dies before it changes the folder for the `step`-th time."""
    left = iter(range(step))

    def counted(act: Callable[..., object]) -> Callable[..., object]:
        def counting(*arguments: object, **keys: object) -> object:
            if next(left, None) is None:
                os._exit(9)
            return act(*arguments, **keys)

        return counting

    swap = repacking._swap

    def swapped(*arguments: Path) -> None:
        Path.unlink, Path.replace = counted(Path.unlink), counted(Path.replace)  # type: ignore[method-assign, assignment]
        repacking.shutil = SimpleNamespace(rmtree=counted(shutil.rmtree))  # type: ignore[assignment]
        swap(*arguments)

    repacking._swap = swapped
    run(folder)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_the_last_step_is_finished_by_the_next(
    earlier: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    steps, shards = 0, len(list(earlier.glob("*.tar")))
    while True:
        folder = Path(shutil.copytree(earlier, tmp_path / f"killed-{steps}"))
        process = get_context("fork").Process(target=_killed_at, args=(folder, steps))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
        if (folder / INDEX).exists():
            assert verify(folder) == [], "an index agrees with its shards"
        else:
            with pytest.raises(ShardError, match="run segvol-pl index"):
                read_index(Store(folder))
            if steps == 2:  # one shard is new
                mixed = Path(shutil.copytree(folder, tmp_path / "mixed"))
                build_index(mixed)
                assert verify(mixed) == [], "what the message says to do helps too"
                run(mixed)
                assert contents(mixed) == contents(phantom_shards)
        run(folder)
        assert contents(folder) == contents(phantom_shards) and not list(folder.glob(".repack-*"))
        steps += 1
    assert steps >= shards + 3  # index away, shards, index, staging folder away


def test_a_staged_shard_that_was_damaged_since_is_written_again(
    earlier: Path, phantom_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(repacking, "_swap", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(earlier)
    staged = sorted(earlier.glob(".repack-*/*.tar"))
    content = bytearray(staged[0].read_bytes())
    content[len(content) // 2] ^= 0xFF
    staged[0].write_bytes(content)
    os.truncate(staged[1], 5000)
    run(earlier)
    assert contents(earlier) == contents(phantom_shards)


def test_shards_that_are_not_what_was_read_are_never_put_in_place(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = contents(earlier)
    monkeypatch.setattr(
        repacking, "encode_again", lambda frame, fast: frames.encode_array(frames.decode_array(frame)[:] ^ 1, fast)
    )
    with pytest.raises(ShardError, match="differs from what was read"):
        run(earlier)
    assert contents(earlier) == held


# ---- folders that cannot be repacked ----


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/shards", "s3://bucket/shards", "pipe:cat /shards/{file}"])
def test_a_folder_elsewhere_is_refused(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repack", place]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{place} is not a local folder: run segvol-pl repack where the shards lie")


def test_a_folder_that_is_none_or_has_no_index(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="gone is not a folder"):
        run(tmp_path / "gone")
    with pytest.raises(ShardError, match=r"index\.json does not exist: run segvol-pl index"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_index_without_hashes_is_written_again_first(earlier: Path) -> None:
    index = json.loads((earlier / INDEX).read_text())
    for sample in index["samples"]:
        del sample["facts_sha256"]
    (earlier / INDEX).write_text(json.dumps(index))
    with pytest.raises(ShardError, match=rf"has no hashes of the facts: run segvol-pl index {earlier}"):
        run(earlier)


def test_a_folder_that_cannot_be_written_is_named(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, flags: int, *rest: object, **keys: object) -> int:
        if flags & os.O_CREAT and Path(str(path)).parent == earlier:
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest, **keys)  # type: ignore[arg-type]

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LockedError, match=rf"{earlier} cannot be written \(Permission denied\)"):
        run(earlier)


def test_a_folder_that_another_process_writes_to_is_refused(earlier: Path) -> None:
    for lock in (".lock.json", ".lock-0-of-3.json"):
        with holding(earlier, lock), pytest.raises(LockedError, match="is being written by"):
            run(earlier)


def test_a_disk_without_room_is_named_before_anything_is_written(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PackError, match=r"needs about \d+ MB, 0 MB are free: make room"):
        run(earlier)
    assert not list(earlier.glob(".repack-*"))


# ---- packing into a repacked folder ----


def test_cases_join_a_folder_once_it_is_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    config = PackConfig(
        images=str(source),
        labels=str(source),
        categories=str(tmp_path / "categories.yaml"),
        out=str(out),
        overview_shape=[8, 16, 16],
        samples_per_shard=2,
        workers=1,
        regions=RegionsConfig(enabled=False),
    )
    (tmp_path / "categories.yaml").write_text("liver: [1]\nlung: [2]\n")
    for number in range(3):
        write_case(source, f"case{number}", number)
    earlier = functools.partialmethod(_unstated, fingerprint=Rules.fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(Rules, "fingerprint", earlier)
        pack(config)
    stated = json.loads((out / REPORT).read_text())
    del stated["versions"]
    (out / REPORT).write_text(json.dumps(stated))
    make_earlier(out, monkeypatch)
    assert pack(config).packed == 3, "nothing to do"
    write_case(source, "case3", 3)
    held = contents(out)
    with pytest.raises(PackError, match=rf"{out} holds an earlier encoding: run segvol-pl repack {out}, then pack"):
        pack(config)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")}.items() <= held.items()
    run(out)
    assert pack(config).packed == 4
    pack(replace(config, out=str(tmp_path / "again")))
    assert contents(out) == contents(tmp_path / "again") and verify(out) == []
    report = json.loads((out / REPORT).read_text())
    report["versions"][-1] = "1.0"
    (out / REPORT).write_text(json.dumps(report))
    write_case(source, "case4", 4)
    with pytest.raises(PackError, match=r"packed .* with another configuration \(with Blosc2 1\.0, now it is"):
        pack(config)


def _unstated(
    rules: Rules, *parts: object, fingerprint: Callable[..., str], versions: tuple[object, ...] = VERSIONS
) -> str:
    """The fingerprint as it was before encodings were counted."""
    return fingerprint(rules, *parts, versions=(versions[0], versions[-1]))
