"""Ranged reads from a store that fails: asked again for a while, then named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segvol_pl.data import store
from segvol_pl.data.store import StoreError, read_file, read_range

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
        if mood == "500":
            self.send_error(500)
        elif mood == "404":
            self.send_error(404)
        elif mood == "drop":
            self.connection.close()
        else:
            self._answer(mood)

    def _answer(self, mood: str) -> None:
        content, wanted = CONTENT, self.headers.get("Range")
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
        yield f"http://127.0.0.1:{running.server_port}/shard.tar", handler
        running.shutdown()


@pytest.mark.parametrize("moods", [["500"], ["drop", "drop"], ["truncate"], ["500", "truncate", "drop"]])
def test_a_store_that_fails_for_a_while_is_asked_again(moody: tuple[str, type[Moody]], moods: list[str]) -> None:
    place, handler = moody
    handler.moods[:] = moods
    assert read_range(place, 300, 500) == CONTENT[300:800]
    assert handler.asked == len(moods) + 1
    assert read_file(place) == CONTENT


def test_a_slow_answer_is_not_waited_for_for_ever(
    moody: tuple[str, type[Moody]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, handler = moody
    monkeypatch.setattr(store, "REQUEST_TIMEOUT", 0.3)
    handler.moods[:] = ["delay"]
    assert read_range(place, 0, 10) == CONTENT[:10]
    assert handler.asked == 2


def test_a_store_that_stays_away_is_named_within_the_stated_time(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["500"] * 1000
    started = time.monotonic()
    with pytest.raises(StoreError, match=r"http://127.*no answer for \d s .*500.*goes on where it stopped"):
        read_range(place, 0, 10, patience=1.0)
    assert time.monotonic() - started < 10 and handler.asked > 2


def test_no_server_at_all() -> None:
    with pytest.raises(StoreError, match="no answer"):
        read_range("http://127.0.0.1:9/shard.tar", 0, 10, patience=0.2)


def test_what_is_not_there_is_not_asked_for_again(moody: tuple[str, type[Moody]]) -> None:
    place, handler = moody
    handler.moods[:] = ["404"]
    with pytest.raises(FileNotFoundError):
        read_range(place, 0, 10)
    assert handler.asked == 1


def test_a_file_that_is_shorter_gives_what_it_has(moody: tuple[str, type[Moody]], tmp_path: Path) -> None:
    place, _ = moody
    assert read_range(place, len(CONTENT) - 5, 50, patience=0.0) == CONTENT[-5:]
    (tmp_path / "a").write_bytes(CONTENT)
    assert read_range(str(tmp_path / "a"), len(CONTENT) - 5, 50) == CONTENT[-5:]
