"""A server of a folder that reads ranges, as object stores do; Python's own ignores them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Ranged(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        wanted = self.headers.get("Range")
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[str]:
    """The URL of a server of the folder, which runs while the block does. port: 0 takes one that is free."""
    with ThreadingHTTPServer(("127.0.0.1", port), partial(_Ranged, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
