"""Ranged reads from a store that fails: asked again for a while, then named."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import resource
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.data import store
from segvol_pl.data.cache import Cache, MemberParts
from segvol_pl.data.store import OpenFiles, Store
from segvol_pl.errors import StoreError

pytest.importorskip("aiohttp", reason="http: needs fsspec's http extra")

CONTENT = bytes(range(256)) * 16


class Moody(BaseHTTPRequestHandler):
    """Answers ranged requests; before that it behaves as the list `moods` says, one request each."""

    moods: list[str]
    asked: int

    def do_GET(self) -> None:
        server = type(self)
        server.asked += 1
        mood = server.moods.pop(0) if server.moods else "well"
        if mood.isdigit():
            self.send_error(int(mood))
        elif mood == "drop":
            self.connection.close()
        else:
            self._answer(mood)

    def _answer(self, mood: str) -> None:
        content, wanted = CONTENT, self.headers.get("Range") if mood != "ignores ranges" else None
        if mood == "delay":
            time.sleep(1.0)
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            content = CONTENT[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if mood == "truncate" else content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def moody() -> Iterator[tuple[str, type[Moody]]]:
    handler = type("Handler", (Moody,), {"moods": [], "asked": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()


def read(folder: str | Path, offset: int, size: int, retry_seconds: float = 60.0) -> bytes:
    (part,) = Store(folder, retry_seconds).member("shard.tar", offset, size, [(0, size)])
    return part


@pytest.mark.parametrize("moods", [["500"], ["drop", "drop"], ["truncate"], ["500", "truncate", "drop"]])
def test_a_store_that_fails_for_a_while_is_asked_again(moody: tuple[str, type[Moody]], moods: list[str]) -> None:
    place, handler = moody
    handler.moods[:] = moods
    assert read(place, 300, 500) == CONTENT[300:800]
    assert handler.asked == len(moods) + 1
    assert Store(place).file("shard.tar") == CONTENT


def test_of_several_ranges_those_that_fail_are_asked_for_again(
    moody: tuple[str, type[Moody]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, handler = moody
    monkeypatch.setattr(store, "MERGE_GAP", -1)
    handler.moods[:] = ["well", "500", "drop"]
    spans = [(0, 10), (50, 90), (200, 1000)]
    parts = Store(place).member("shard.tar", 100, 2000, spans)
    assert parts == [CONTENT[100 + first : 100 + last] for first, last in spans]
    assert handler.asked == 5


@given(st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 300)), min_size=1, max_size=12), st.integers(0, 400))
@settings(max_examples=200, deadline=None)
def test_neighbours_are_read_in_one_request(starts: list[tuple[int, int]], gap: int) -> None:
    """Whatever their order, and though they overlap: each range comes back, and what is fetched is not far from it."""
    ranges = [(first, first + size) for first, size in starts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "MERGE_GAP", gap)
        patch.setattr(store, "MERGED_BYTES", 1000)
        requests = store.merged(ranges)
    content = np.random.default_rng(0).bytes(5000)
    responses = [content[first:last] for first, last in requests]
    assert [store._cut(span, requests, responses) for span in ranges] == [content[a:b] for a, b in ranges]
    assert requests == sorted(requests) and len(requests) <= len(ranges)
    assert all(last - first <= 1000 for first, last in requests)
    fetched, needed = ({place for a, b in each for place in range(a, b)} for each in (requests, ranges))
    assert len(fetched - needed) <= gap * (len(ranges) - len(requests))


def test_members_that_lie_close_take_one_request(moody: tuple[str, type[Moody]], tmp_path: Path) -> None:
    place, handler = moody
    wanted = [MemberParts(100, 900, [(10, 20), (500, 900)], "a"), MemberParts(1500, 500, [(0, 500)], "b")]
    expected = [[CONTENT[110:120], CONTENT[600:1000]], [CONTENT[1500:2000]]]
    assert Store(place).members("shard.tar", wanted) == expected
    assert handler.asked == 1
    cached = Store(place, cache=Cache(str(tmp_path), 10**9))
    assert cached.members("shard.tar", wanted[:1]) == expected[:1]
    assert cached.members("shard.tar", wanted) == expected
    assert handler.asked == 3
    assert cached.members("shard.tar", wanted[::-1]) == expected[::-1]
    assert handler.asked == 3


def test_a_slow_answer_is_not_waited_for_for_ever(
    moody: tuple[str, type[Moody]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, handler = moody
    monkeypatch.setattr(store, "REQUEST_TIMEOUT", 0.3)
    handler.moods[:] = ["delay"]
    assert read(place, 0, 10) == CONTENT[:10]
    assert handler.asked == 2


def test_a_store_that_stays_away_is_named_within_the_stated_time(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["500"] * 1000
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"http://127.*no response for \d s .*500.*resumes where it stopped"):
        read(place, 0, 10, retry_seconds=1.0)
    assert time.monotonic() - started < 10 and handler.asked > 2


def test_no_server_at_all() -> None:
    with pytest.raises(StoreError, match="no response"):
        read("http://127.0.0.1:9", 0, 10, retry_seconds=0.2)


def test_what_is_not_there_is_not_asked_for_again(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["404"]
    with pytest.raises(FileNotFoundError):
        read(place, 0, 10)
    assert handler.asked == 1


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_store_that_refuses_is_named_at_once(moody: tuple[str, type[Moody]], status: str) -> None:
    place, handler = moody
    for ask in (lambda: read(place, 0, 10), lambda: Store(place).file("index.json")):
        handler.moods[:], handler.asked = [status] * 1000, 0
        with pytest.raises(StoreError, match=rf"http://127.*: the store refuses it .*{status}.*check the address"):
            ask()
        assert handler.asked == 1


def test_a_range_behind_the_end_is_none_of_the_stores_faults(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["416"] * 1000
    started = time.monotonic()
    assert read(place, 2 * len(CONTENT), 10) == b""
    assert time.monotonic() - started < 10


def test_a_server_without_ranges_is_named_before_a_shard_is_fetched(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["ignores ranges"] * 1000
    with pytest.raises(StoreError, match=r"shard\.tar: the server ignores ranges.*pipe:curl"):
        read(place, 300, 10)
    assert handler.asked == 1
    assert Store(place).file("shard.tar") == CONTENT


def test_a_file_that_is_shorter_gives_what_it_has(moody: tuple[str, type[Moody]], tmp_path: Path) -> None:
    place, handler = moody
    assert read(place, len(CONTENT) - 5, 50) == CONTENT[-5:]
    assert handler.asked == 3
    (tmp_path / "shard.tar").write_bytes(CONTENT)
    assert read(tmp_path, len(CONTENT) - 5, 50) == CONTENT[-5:]


def test_what_the_cache_holds_is_not_asked_for(moody: tuple[str, type[Moody]], tmp_path: Path) -> None:
    place, handler = moody
    cached = Store(place, cache=Cache(str(tmp_path), 10**9))
    for _ in range(3):
        assert cached.member("shard.tar", 100, 900, [(10, 20), (500, 900)], "hash") == [
            CONTENT[110:120],
            CONTENT[600:1000],
        ]
    assert handler.asked == 1
    cached.member("shard.tar", 100, 900, [(10, 20)])
    assert handler.asked == 2


@pytest.mark.parametrize("fault", ["no folder", "no room"])
def test_a_cache_that_fails_is_gone_without_and_said_once(
    moody: tuple[str, type[Moody]], tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    place, handler = moody
    folder = tmp_path / "cache"
    if fault == "no folder":
        folder.write_text("in the way")
    cached = Store(place, cache=Cache(str(folder), 10**9))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if fault == "no room" else limits[0], limits[1]))
        for _ in range(3):
            assert cached.member("shard.tar", 100, 900, [(10, 20)], "hash") == [CONTENT[110:120]]
        assert cached.cache
        cached.cache.forget("hash")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert handler.asked == 3
    assert caplog.text.count(f"data.cache {folder} fails") == 1
    if fault == "no room":
        cached.member("shard.tar", 100, 900, [(10, 20)], "hash")
        cached.member("shard.tar", 100, 900, [(10, 20)], "hash")
        assert handler.asked == 4, "it serves again when there is room"


# folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mount" / "shards"
    made.mkdir(parents=True)
    (made / "index.json").write_bytes(CONTENT)
    (made / "shard.tar").write_bytes(CONTENT)
    return made


def test_a_folder_that_is_away_for_a_while_is_waited_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = folder.parent.rename(folder.parent.with_name("away"))
    back = threading.Timer(0.5, lambda: gone.rename(folder.parent))
    back.start()
    assert read(folder, 300, 500) == CONTENT[300:800]
    back.join()
    assert "shard.tar cannot be read (No such file or directory): retrying for 60 s" in caplog.text


def test_a_folder_that_stays_away_is_named_within_the_stated_time(folder: Path) -> None:
    folder.parent.rename(folder.parent.with_name("away"))
    (folder.parent / "shards").mkdir(parents=True)  # as a mount point is without its mount
    started = time.monotonic()
    with pytest.raises(StoreError, match=rf"{folder}/shard\.tar could not be read for \d s .*mounted.*resumes where"):
        read(folder, 0, 10, retry_seconds=0.5)
    assert 0.1 < time.monotonic() - started < 10


def test_a_shard_that_lacks_beside_its_index_is_missing(folder: Path) -> None:
    (folder / "shard.tar").unlink()
    with pytest.raises(FileNotFoundError):
        read(folder, 0, 10)


def opened(folder: Path) -> list[str]:
    """Names of the files of a folder that this process has open."""
    targets = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sorted(target.name for target in targets if target.is_relative_to(folder))


def test_a_shard_is_opened_once_and_closed_with_its_store(folder: Path) -> None:
    there = Store(folder, files=OpenFiles())
    for first in (0, 300, 900):
        assert there.member("shard.tar", first, 10, [(0, 5), (5, 10)]) == [
            CONTENT[first : first + 5],
            CONTENT[first + 5 : first + 10],
        ]
        assert opened(folder) == ["shard.tar"]
    del there
    assert opened(folder) == []


def test_only_some_files_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEPT_OPEN", 2)
    there = Store(folder, files=OpenFiles())
    for name in ("a.tar", "b.tar", "c.tar"):
        (folder / name).write_bytes(name.encode() + CONTENT)
    for name in ("a.tar", "b.tar", "a.tar", "c.tar", "b.tar"):
        assert there.member(name, 0, 5, [(0, 5)]) == [name.encode()]
    assert opened(folder) == ["b.tar", "c.tar"]


def test_another_process_opens_its_own_files(folder: Path) -> None:
    there = Store(folder, files=OpenFiles())
    there.member("shard.tar", 0, 10, [(0, 10)])
    sent = pickle.loads(pickle.dumps(there))
    assert sent == there and sent.files is not None and sent.files is not there.files
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(there.member, ("shard.tar", 7, 10, [(0, 10)])) == [CONTENT[7:17]]
    assert there.member("shard.tar", 20, 10, [(0, 10)]) == [CONTENT[20:30]]


def test_a_file_that_the_server_forgot_is_opened_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Store(folder, files=OpenFiles())
    there.member("shard.tar", 0, 10, [(0, 10)])
    assert there.files is not None
    (descriptor,) = there.files._descriptors.values()
    os.dup2(os.open(folder, os.O_RDONLY), descriptor)  # reading it fails from now on
    assert there.member("shard.tar", 0, 10, [(0, 10)]) == [CONTENT[:10]]


@pytest.mark.parametrize("fault", ["Too many open files", "Too many levels of symbolic links"])
def test_an_error_of_the_system_is_no_damage(folder: Path, fault: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        if "files" in fault:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        else:
            (folder / "shard.tar").unlink()
            (folder / "shard.tar").symlink_to("shard.tar")
        for ask in (lambda: read(folder, 0, 10, 0.2), lambda: Store(folder, 0.2).file("shard.tar")):
            with pytest.raises(StoreError, match=rf"shard\.tar could not be read for 0 s \({fault}\)"):
                ask()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["../shard.tar", "/etc/passwd", "a/b.tar", ".."])
def test_a_name_that_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="outside the folder"):
        Store(tmp_path).member(name, 0, 10, [(0, 10)])


# pipes


def test_a_pipe_prints_a_file(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(CONTENT)
    piped = Store(f"pipe:cat {tmp_path}/{{file}}")
    assert piped.piped and not piped.local
    assert piped.file("index.json") == CONTENT
    with pytest.raises(StoreError, match=r"gone.*the command failed \(status 1\): cat: .*No such file"):
        piped.file("gone.json")
    with pytest.raises(StoreError, match="a pipe cannot be read in parts"):
        piped.member("index.json", 0, 10, [(0, 10)])
    for name in ("a;touch b.tar", "$HOME.tar", "a b.tar", "`ls`.tar"):
        with pytest.raises(StoreError, match="outside the folder"):
            piped.file(name)


# S3


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server on this machine, with the content as shard.tar."""
    server_module = pytest.importorskip("moto.server", reason="s3: needs a server to talk to")
    s3fs = pytest.importorskip("s3fs", reason="s3: needs s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.makedirs("volumes", exist_ok=True)
    filesystem.pipe_file("volumes/mine/shard.tar", CONTENT)
    yield "s3://volumes/mine"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_ranges_of_an_s3_bucket(bucket: str) -> None:
    far = Store(bucket, retry_seconds=5.0)
    assert far.file("shard.tar") == CONTENT
    assert far.member("shard.tar", 100, 900, [(0, 10), (800, 900)]) == [CONTENT[100:110], CONTENT[900:1000]]
    with pytest.raises(FileNotFoundError):
        far.file("gone.tar")


def test_an_s3_server_that_is_away(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://volumes/mine/shard.tar: the store gave no response for"):
        read(bucket, 0, 10, retry_seconds=1.0)
    assert time.monotonic() - started < 30


def test_credentials_that_an_s3_server_refuses(
    bucket: str, moody: tuple[str, type[Moody]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    place, handler = moody
    handler.moods[:] = ["403"] * 1000
    monkeypatch.setenv("AWS_ENDPOINT_URL", place)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match=r"s3://volumes/mine/shard.tar: the store refuses it .*credentials"):
        read(bucket, 0, 10)
    assert handler.asked == 1


def test_a_range_behind_the_end_of_an_s3_object(bucket: str) -> None:
    assert read(bucket, 2 * len(CONTENT), 10) == b""
