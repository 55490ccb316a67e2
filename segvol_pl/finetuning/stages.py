"""Which stages of a fine-tuning are done: `OUT/stages.json`, which rank 0 writes and the other ranks wait for."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segvol_pl.atomic import write_text

log = logging.getLogger(__name__)

STAGES = "stages.json"
POLL_SECONDS = 0.5
"""Time between two looks at what rank 0 has done."""


@dataclass(frozen=True)
class Done:
    """A stage that is done."""

    inputs: str
    """Digest of what it was made from."""
    seconds: float
    """What its last start took."""


class Stages:
    """The stages of one folder. A stage whose inputs are those of the last time is not done again.

    Args:
        folder: Of the fine-tuning.
        first: Whether this process is rank 0, which keeps the record.
    """

    def __init__(self, folder: Path, first: bool) -> None:
        self.path, self.first = folder / STAGES, first

    def read(self) -> dict[str, Done]:
        """Read the stages that are done, in their order."""
        if not self.path.exists():
            return {}
        return {name: Done(**done) for name, done in json.loads(self.path.read_text(encoding="utf-8")).items()}

    def run(self, name: str, inputs: Any, work: Callable[[], object], together: bool = False) -> None:
        """Do a stage, unless it is done.

        Args:
            name: Of the stage.
            inputs: What it is made from, as JSON. All ranks give the same.
            work: What to do.
            together: Whether every rank does a part of it. If not, the other ranks wait for rank 0.
        """
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        if self._is_done(name, digest):
            log.info("%s: is done", name)
            return
        began = time.monotonic()
        if self.first or together:
            log.info("---- %s", name)
            work()
        if not self.first:
            # No time limit: packing may take hours, and if rank 0 fails its launcher ends this rank too.
            while not self._is_done(name, digest):
                time.sleep(POLL_SECONDS)
            return
        found = {**self.read(), name: Done(digest, round(time.monotonic() - began, 1))}
        write_text(self.path, json.dumps({each: asdict(done) for each, done in found.items()}, indent=1) + "\n")

    def _is_done(self, name: str, digest: str) -> bool:
        done = self.read().get(name)
        return done is not None and done.inputs == digest
