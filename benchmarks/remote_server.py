"""A server of ranges of a folder's files on loopback, for `benchmarks/remote.py`. It waits before each response.

    python benchmarks/remote_server.py FOLDER

Prints its port. /MILLISECONDS/NAME is the file NAME, after a pause of so long. An S3 client can read from it too, with
MILLISECONDS as the bucket: it answers the ranged requests of a stream, not the rest of S3.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Ranged(BaseHTTPRequestHandler):
    """Ranges of the files in `folder`."""

    protocol_version = "HTTP/1.1"
    # The header and the content leave together: sent apart, each response would wait for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def __init__(self, *arguments: object, folder: Path) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

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
        if not content:
            return
        with path.open("rb") as file:
            file.seek(first)
            self.wfile.write(file.read(last - first + 1))

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranged, folder=Path(sys.argv[1]))) as running:
        print(running.server_port, flush=True)
        running.serve_forever()
