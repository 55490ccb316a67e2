"""A Hugging Face hub on this machine: as much of its HTTP as huggingface_hub needs to take and to upload a model."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

GATED = "owner/gated"
TOKEN = "hf_token_of_the_test"


@dataclass
class Hub:
    """Its repositories, and the requests that it saw."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """OWNER/NAME -> commit -> file -> content. The last commit is that of `main`."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    seen: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit; return its hash."""
        commits = self.repositories.setdefault(repository, {})
        name = hashlib.sha1(f"{repository}{len(commits)}".encode()).hexdigest()
        commits[name] = files
        return name

    def environment(self, home: object) -> dict[str, str]:
        """Variables with which a process takes this hub for the real one."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._file(with_content=False)

    def do_GET(self) -> None:
        self._file(with_content=True)

    def _file(self, with_content: bool) -> None:
        self.hub.seen.append(f"{self.command} {self.path}")
        owner, name, resolve, revision, *rest = [*unquote(self.path).strip("/").split("/"), "", "", ""]
        repository, file = f"{owner}/{name}", "/".join(filter(None, rest))
        commits = self.hub.repositories.get(repository)
        if repository == GATED:
            return self._answer(403, headers={"X-Error-Code": "GatedRepo"})
        if commits is None or resolve != "resolve":
            return self._answer(404, headers={"X-Error-Code": "RepoNotFound"})
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        if file not in commits[commit]:
            return self._answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = commits[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._answer(200, content, headers, with_content)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer(200)

    def do_POST(self) -> None:
        body, path = self._body(), unquote(self.path)
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.hub.private.setdefault(repository, bool(asked.get("private") or asked.get("visibility") == "private"))
            self.hub.repositories.setdefault(repository, {})
            return self._json({"url": f"{self.hub.address}/{repository}", "id": repository})
        if "/preupload/" in path:
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in json.loads(body)["files"]
            ]
            return self._json({"files": [{**each, "shouldIgnore": False} for each in files]})
        if path.endswith("/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}} for each in wanted
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            owner, name = path.split("/")[3:5]
            commit = self.hub.commit(f"{owner}/{name}", dict(self._committed(body)))
            return self._json({"commitOid": commit, "commitUrl": f"{self.hub.address}/{owner}/{name}/commit/{commit}"})
        return self._json({"errors": [], "warnings": []})  # validate-yaml

    def _committed(self, body: bytes) -> Iterator[tuple[str, bytes]]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                yield value["path"], self.hub.objects[value["oid"]]

    def _body(self) -> bytes:
        self.hub.seen.append(f"{self.command} {self.path}")
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None, with_content: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    handler = type("OwnHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
