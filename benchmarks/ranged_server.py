"""A server of a folder that reads ranges, responds late, and counts requests: a distant store on this machine.

    with serving(folder) as served:
        Store(f"{served.url}/050") ...          # 50 ms before each response
        served.requests()                       # those since the last call

It runs in a process of its own, so that its CPU time is not the client's. A connection stays open between requests, as
those of object stores do. An S3 client can read from it too, with the milliseconds as the bucket: the server answers
the ranged requests of a stream, not the rest of S3.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Served:
    """A running server. Its address continues with the milliseconds to wait."""

    url: str
    counts: tuple[Synchronized[int], Synchronized[int]]

    def requests(self) -> tuple[int, int]:
        """Requests and the bytes of their responses since the last call."""
        found = []
        for count in self.counts:
            with count.get_lock():
                found.append(count.value)
                count.value = 0
        return found[0], found[1]


class _Late(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # The header and the content leave together: sent apart, each response would wait for an acknowledgement.
    wbufsize = -1
    folder: Path
    counts: tuple[Synchronized[int], Synchronized[int]]

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond(content=False)

    def _respond(self, content: bool = True) -> None:
        # A request for the bucket alone has no name: it finds no file.
        _, milliseconds, *name = self.path.partition("?")[0].split("/")
        time.sleep(float(milliseconds) / 1000)
        path = self.folder.joinpath(*name)
        if not path.is_file():
            self.send_error(404)
            return
        size, wanted = path.stat().st_size, self.headers.get("Range")
        first, last = 0, size - 1
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            last = min(last, size - 1)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        for count, added in zip(self.counts, (1, (last - first + 1) * content), strict=True):
            with count.get_lock():
                count.value += added
        if content:
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a loader process that ends with its connection open."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _serve(folder: Path, counts: tuple[Synchronized[int], Synchronized[int]], place: Connection) -> None:
    handler = type("Handler", (_Late,), {"folder": folder, "counts": counts})
    with _Server(("127.0.0.1", 0), handler) as server:
        place.send(server.server_port)
        server.serve_forever()


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serve a folder while the block runs."""
    context = multiprocessing.get_context("fork")
    counts = context.Value("q", 0), context.Value("q", 0)
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(folder, counts, far), daemon=True)
    process.start()
    try:
        yield Served(f"http://127.0.0.1:{near.recv()}", counts)
    finally:
        process.terminate()
        process.join()
