"""What the machine does to a packing: killed workers, no memory, no room, no right to read. Each case is named."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from ct_files import cube_header, write_case
from holders import holding

from segvol_pl.config import PackConfig, RegionsConfig
from segvol_pl.data.store import INDEX
from segvol_pl.data.verify import verify
from segvol_pl.errors import CaseError, LockedError, PackError
from segvol_pl.packing.cases import pair_cases
from segvol_pl.packing.pack import pack
from segvol_pl.packing.pool import KILLS_PER_WORKER
from segvol_pl.packing.report import REPORT
from segvol_pl.packing.stage import STAGING

CASES = [f"case{number}" for number in range(4)]
FIRST = "case0"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four labelled cases, stated in a list."""
    folder = tmp_path / "source"
    rows = []
    for number, name in enumerate(CASES):
        image, label = write_case(folder, name, number)
        rows.append({"id": name, "image": image.name, "label": label.name})
    (folder / "cases.json").write_text(json.dumps(rows))
    (folder / "categories.yaml").write_text("liver: [1]\nlung: [2]\n")
    return folder


def config_of(source: Path, out: Path, workers: int = 1, bound: float = 0.3) -> PackConfig:
    return PackConfig(
        cases=str(source / "cases.json"),
        categories=str(source / "categories.yaml"),
        out=str(out),
        overview_shape=[4, 8, 8],
        samples_per_shard=2,
        max_bad_fraction=bound,
        anchors=4,
        workers=workers,
        regions=RegionsConfig(enabled=False),
    )


def image_of(source: Path, name: str) -> Path:
    return source / f"{name}_ct.nii.gz"


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*.part"))


# Killed workers: a case that is a pipe holds its worker until the test has killed it.


def block(source: Path, name: str) -> Path:
    """Puts a pipe in the place of the case's image, which is kept beside it."""
    path = image_of(source, name)
    path.rename(path.with_suffix(".kept"))
    os.mkfifo(path)
    return path


def kill_reader(pipe: Path, before: Collection[int] = ()) -> list[int]:
    """Waits until a process reads the pipe, other than those killed before, which may still be dying, and kills it."""
    deadline = time.monotonic() + 120
    while True:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            assert error.errno == errno.ENXIO and time.monotonic() < deadline, error
            time.sleep(0.02)
    try:
        while not (readers := [pid for pid in readers_of(pipe) if pid not in before]):
            assert time.monotonic() < deadline, "nobody reads"
            time.sleep(0.02)
        kill(readers)
    finally:
        os.close(writer)
    return [*before, *readers]


def readers_of(pipe: Path) -> list[int]:
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            pid = int(link.parts[2])
            if pid != os.getpid() and link.readlink() == pipe:
                found.append(pid)
        except OSError:
            continue
    return found


def kill(processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # dying of the last time
            os.kill(process, signal.SIGKILL)


def in_background(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_a_case_that_kills_its_worker_twice_is_bad_and_the_others_are_packed(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = block(source, FIRST)

    def kill_twice() -> None:
        kill_reader(pipe, kill_reader(pipe))

    killer = in_background(kill_twice)
    report = pack(config_of(source, tmp_path / "out", workers=2))
    killer.join()
    assert report.packed == len(CASES) - 1 and verify(tmp_path / "out") == []
    (bad,) = report.bad
    assert (bad.id, bad.file) == (FIRST, str(pipe))
    assert f"{pipe}: its worker was killed twice" in bad.reason and "\n" not in bad.reason
    assert f"a worker was killed over case {FIRST} ({pipe})" in caplog.text


def test_a_case_over_which_a_worker_was_killed_once_is_tried_again(source: Path, tmp_path: Path) -> None:
    pack(config_of(source, tmp_path / "alone"))
    pipe = block(source, FIRST)

    def kill_and_mend() -> None:
        kill_reader(pipe)
        pipe.with_suffix(".kept").replace(pipe)

    killer = in_background(kill_and_mend)
    report = pack(config_of(source, tmp_path / "out", workers=2, bound=0))
    killer.join()
    assert (report.packed, report.bad) == (len(CASES), [])
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


def test_packing_gives_up_where_every_worker_is_killed(source: Path, tmp_path: Path) -> None:
    rows = json.loads((source / "cases.json").read_text())
    pipe = block(source, FIRST)
    rows = [{**rows[0], "id": f"twin{number}"} for number in range(KILLS_PER_WORKER * 2 + 2)]
    (source / "cases.json").write_text(json.dumps(rows))
    enough = threading.Event()

    def kill_all() -> None:
        while not enough.is_set():
            kill(readers_of(pipe))
            time.sleep(0.05)

    writer = os.open(pipe, os.O_RDWR)
    killer = in_background(kill_all)
    try:
        with pytest.raises(
            PackError, match=r"6 workers were killed and none finished a case; they were working on twin\d \(.*\), twin"
        ):
            pack(config_of(source, tmp_path / "out", workers=2))
    finally:
        enough.set()
        killer.join()
        os.close(writer)
    assert not (tmp_path / "out" / INDEX).exists()


# Limits: packing in a process that may take no more memory, or write no larger file.

LIMITED = """
import os, resource, signal, sys
from segvol_pl.__main__ import main
import segvol_pl.packing.pack
if "KILLED" in os.environ:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
kind, room = getattr(resource, sys.argv[1]), int(sys.argv[2])
if kind == resource.RLIMIT_AS:
    room += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(kind, (room, room))
sys.exit(main(sys.argv[3:]))
"""


def pack_limited(source: Path, out: Path, limit: int, room: int, **settings: str) -> subprocess.CompletedProcess[str]:
    name = next(name for name in ("RLIMIT_AS", "RLIMIT_FSIZE") if getattr(resource, name) == limit)
    keys = {"cases": source / "cases.json", "categories": source / "categories.yaml", "out": out, "workers": 1}
    keys |= {"overview_shape": "[4,8,8]", "samples_per_shard": 2, "anchors": 4, "regions.enabled": "false"}
    keys |= {"max_bad_fraction": 0.3}
    command = [
        sys.executable,
        "-c",
        LIMITED,
        name,
        str(room),
        "pack",
        *(f"{key}={value}" for key, value in keys.items()),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400", **settings}
    )


def write_large(path: Path, side: int) -> None:
    """A sound .nii.gz of `side` voxels along each axis, of zeros alone: 0.1 % of its voxels' bytes."""
    block = gzip.compress(bytes(2**24))
    path.write_bytes(gzip.compress(cube_header(side) + bytes(4)) + block * (2 * side**3 // 2**24 + 1))


def test_a_case_larger_than_memory_is_listed_and_left_out(source: Path, tmp_path: Path) -> None:
    write_large(image_of(source, FIRST), 1000)
    done = pack_limited(source, tmp_path / "out", resource.RLIMIT_AS, 2**30)
    assert done.returncode == 0, done.stderr
    assert f"{image_of(source, FIRST)}: there is not enough memory for it" in done.stdout
    (bad,) = json.loads((tmp_path / "out" / REPORT).read_text())["bad"]
    assert (bad["id"], bad["file"]) == (FIRST, str(image_of(source, FIRST)))
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["staging", "joining"])
def test_what_cannot_be_written_is_named_and_nothing_half_written_stays(
    source: Path, tmp_path: Path, share: float
) -> None:
    """Room for half a case, and for one and a half where two make a shard."""
    pack(config_of(source, tmp_path / "alone"))
    largest = max(len(content) for content in shards(tmp_path / "alone").values()) // 2
    out = tmp_path / "out"
    done = pack_limited(source, out, resource.RLIMIT_FSIZE, int(largest * share))
    named = f"case {FIRST}: {out / STAGING}/{FIRST}." if share < 1 else f"error: {out}/"
    assert done.returncode == 1
    assert named in done.stderr and "cannot be written (File too large)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert leftovers(out) == [] and not (out / INDEX).exists()
    pack(config_of(source, out))
    assert shards(out) == shards(tmp_path / "alone") and verify(out) == []


def test_the_parts_that_a_killed_joining_left_are_removed(source: Path, tmp_path: Path) -> None:
    pack(config_of(source, tmp_path / "alone"))
    largest = max(len(content) for content in shards(tmp_path / "alone").values()) // 2
    out = tmp_path / "out"
    done = pack_limited(source, out, resource.RLIMIT_FSIZE, int(largest * 1.5), KILLED="1")
    assert done.returncode == -signal.SIGXFSZ and leftovers(out) != [] and not (out / INDEX).exists()
    pack(config_of(source, out))
    assert leftovers(out) == [] and shards(out) == shards(tmp_path / "alone")


# Others that pack


def test_a_folder_that_another_process_packs_into_is_refused(source: Path, tmp_path: Path) -> None:
    """Slices stage side by side; what joins them waits for none of them."""
    whole = config_of(source, tmp_path / "out")
    slice_ = replace(whole, part="1/3")
    with holding(tmp_path / "out"):
        for config in (whole, slice_):
            with pytest.raises(LockedError, match="is being written by"):
                pack(config)
    with holding(tmp_path / "out", ".lock-0-of-3.json"):
        pack(slice_)
        with pytest.raises(LockedError, match=r"\.lock-0-of-3\.json"):
            pack(whole)
    assert list((tmp_path / "out").glob("*.tar")) == []
    pack(whole)
    assert verify(tmp_path / "out") == [] and leftovers(tmp_path / "out") == []


# Rights


@pytest.fixture
def open_source(source: Path) -> Iterator[Path]:
    """The source where every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def as_anybody() -> Iterator[None]:
    """Root may read everything: for the block, the process is a user who may not."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_case_that_may_not_be_read_is_listed_and_left_out(open_source: Path) -> None:
    image_of(open_source, FIRST).chmod(0)
    with as_anybody():
        report = pack(config_of(open_source, open_source / "out"))
    (bad,) = report.bad
    assert (bad.id, report.packed) == (FIRST, 3)
    assert f"{image_of(open_source, FIRST)} cannot be read (Permission denied)" in bad.reason


def test_a_case_in_a_folder_that_may_not_be_entered(open_source: Path) -> None:
    (open_source / "closed").mkdir(mode=0)
    rows = json.loads((open_source / "cases.json").read_text())
    rows[0]["image"] = "closed/ct.nii.gz"
    (open_source / "cases.json").write_text(json.dumps(rows))
    with as_anybody():
        (bad,) = pack(config_of(open_source, open_source / "out")).bad
    (open_source / "closed").chmod(0o700)
    assert f"{open_source}/closed/ct.nii.gz cannot be read (Permission denied)" in bad.reason


def test_a_folder_among_the_cases_that_may_not_be_read(open_source: Path) -> None:
    (open_source / "closed").mkdir(mode=0)
    reason = f"images: {open_source}/closed cannot be read .Permission denied.: give read permission"
    with as_anybody(), pytest.raises(CaseError, match=reason):
        pair_cases(str(open_source))
    (open_source / "closed").chmod(0o700)


def test_a_stated_file_whose_name_no_file_can_have(source: Path, tmp_path: Path) -> None:
    rows = json.loads((source / "cases.json").read_text())
    rows[0]["image"] = f"{'x' * 300}.nii.gz"
    (source / "cases.json").write_text(json.dumps(rows))
    (bad,) = pack(config_of(source, tmp_path / "out")).bad
    assert "cannot be read (File name too long)" in bad.reason
