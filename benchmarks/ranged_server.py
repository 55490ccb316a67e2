"""A server of a folder that reads ranges, responds late, and counts requests: a distant store on this machine.

    with serving(folder, latency=0.05) as served:
        Store(served.url) ...
        served.requests()       # those since the last call

It runs in a process of its own, so that its CPU time is not the client's. A connection stays open between requests, as
those of object stores do.
"""

from __future__ import annotations

import multiprocessing
import os
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
    """A running server."""

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
    disable_nagle_algorithm = True
    folder: Path
    latency: float
    counts: tuple[Synchronized[int], Synchronized[int]]

    def do_GET(self) -> None:
        time.sleep(self.latency)
        descriptor = os.open(self.folder / Path(self.path).name, os.O_RDONLY)
        try:
            size, wanted = os.fstat(descriptor).st_size, self.headers.get("Range")
            first, last = (
                int(number) for number in (wanted or f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
            )
            content = os.pread(descriptor, last + 1 - first, first)
        finally:
            os.close(descriptor)
        for count, added in zip(self.counts, (1, len(content)), strict=True):
            with count.get_lock():
                count.value += added
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


def _serve(handler: dict[str, Any], place: Connection) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Late,), handler)) as server:
        place.send(server.server_port)
        server.serve_forever()


@contextmanager
def serving(folder: Path, latency: float = 0.0) -> Iterator[Served]:
    """Serve a folder while the block runs. latency: seconds before each response."""
    context = multiprocessing.get_context("fork")
    counts = context.Value("q", 0), context.Value("q", 0)
    near, far = context.Pipe()
    handler = {"folder": folder, "latency": latency, "counts": counts}
    process = context.Process(target=_serve, args=(handler, far), daemon=True)
    process.start()
    try:
        yield Served(f"http://127.0.0.1:{near.recv()}", counts)
    finally:
        process.terminate()
        process.join()
