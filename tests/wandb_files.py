"""What an offline wandb run holds, read back from its file: the log format of LevelDB, of protocol buffers."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(out: Path) -> list[Record]:
    """All records of the run's files, in order of their writing."""
    paths = sorted(out.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    assert paths
    return [record for path in paths for record in _whole(path)]


def _whole(path: Path) -> list[Record]:
    """With the record that ends a run: wandb's process writes on for a moment after `finish` has returned."""
    deadline = time.monotonic() + 30
    while True:
        found = list(_records(path.read_bytes()))
        if found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{path}: not ended"
        time.sleep(0.1)


def _records(content: bytes) -> Iterator[Record]:
    assert content[:4] == b":W&B"
    at, held = 7, b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(content, at)
        held += content[at + HEADER.size : at + HEADER.size + size]
        at += HEADER.size + size
        if kind in (WHOLE, LAST):
            yield Record.FromString(held)
            held = b""
        else:
            assert kind in (FIRST, MIDDLE)


def history(out: Path) -> list[dict[str, Any]]:
    """What was logged, row by row; a picture's parts by dotted keys."""
    rows = [record.history.item for record in records(out) if record.WhichOneof("record_type") == "history"]
    return [{(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in row} for row in rows]
