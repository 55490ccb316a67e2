"""One case as a tar of its own in the staging folder, from which `join.py` makes shards.

1. A `Job` is a case, the key of its sample, the `Rules`, and a fingerprint: the hash of the rules and of the names,
   sizes and times of the case's files (`stat_of`).
2. `stage` reads, crops, measures and encodes the case (`prepare.pack_case`) and writes it to `<key>.<fingerprint>.tar`.
   If that file exists, nothing is done: an interrupted run continues, and a case with a changed file is packed again.
3. A case that cannot be used becomes a `BadCase` with the reason, whatever is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segvol_pl.atomic import NoRoomError
from segvol_pl.data.index_builder import walk_shard
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.errors import PackError, SampleError, VolumeError
from segvol_pl.imaging.dicom import files_of
from segvol_pl.imaging.read import source_sha256
from segvol_pl.packing.cases import Case
from segvol_pl.packing.prepare import VERSIONS, Rules, pack_case

log = logging.getLogger(__name__)

STAGING = ".staging"
"""The staging folder, within the folder of shards."""
KEY_LENGTH = 80
"""Most characters of a key: the name of a tar's member may have 100."""
KEY_HASH = 8
"""How many of these are a hash, for ids with letters beyond ASCII."""


@dataclass(frozen=True)
class Job:
    """One case on its way to a worker."""

    case: Case
    key: str
    rules: Rules
    staging: Path
    fingerprint: str
    """Changes when the case's files or the rules do."""

    @property
    def path(self) -> Path:
        """The file that it is staged in."""
        return self.staging / f"{self.key}.{self.fingerprint}.tar"


@dataclass(frozen=True)
class Staged:
    """A packed case, in a tar of its own in the staging folder."""

    id: str
    record: SampleRecord
    content_sha256: str
    fingerprint: str


@dataclass(frozen=True)
class BadCase:
    """A case that cannot be used, and why."""

    id: str
    file: str
    reason: str


def stage(job: Job) -> Staged | BadCase:
    """Pack the case into the staging folder, unless it is there already.

    Raises PackError if the staging folder cannot be written, because then no other case can be staged either.
    """
    if not job.path.exists():
        try:
            sample = pack_case(job.case, job.key, job.rules, _source_of(job.case))
        except Exception as error:
            log.debug("case %s: %s", job.case.id, traceback.format_exc())
            return BadCase(job.case.id, str(job.case.image), _reason(error, job.case))
        with writing(job.path, f"case {job.case.id}: "):
            write_shard(job.path, [sample])
    record, facts = walk_shard(job.path)[0]
    return Staged(job.case.id, record, facts.source["content_sha256"], job.fingerprint)


def fingerprint_of(case: Case, rules: Rules, versions: Sequence[Any] = VERSIONS) -> str:
    """Return what changes when the case's files, the rules or the versions do."""
    return rules.fingerprint(stat_of(case), versions=versions)[:16]


def stat_of(case: Case) -> list[Any]:
    """Return what shows, without reading the files, whether a case changed: ids, file names, sizes and times."""
    stats = [stat for path in case.paths for stat in _file_stats(path)]
    # Without a split as before there were any, so that folders packed then are still complete.
    return [case.id, sorted(case.masks), case.channels, case.notes, stats, *([case.split] if case.split else [])]


def _file_stats(path: Path) -> list[list[Any]]:
    """Name, size and time of each file. Files without access are left out: reading them will give the error."""
    try:
        return [[file.name, *((s := file.stat()).st_size, s.st_mtime_ns)] for file in files_of(path) if file.exists()]
    except OSError:
        return []


def key_of(id: str) -> str:
    """Return the key of a case's sample: its id in ASCII, with a hash if the id has other letters.

    Raises PackError for an ASCII id that is too long.
    """
    if not id.isascii():
        # In one spelling: macOS stores an accent apart from its letter.
        name = unicodedata.normalize("NFC", id)
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_HASH]
        return f"{in_ascii(name)[: KEY_LENGTH - KEY_HASH - 1]}-{digest}"
    key = in_ascii(id)
    if len(key) > KEY_LENGTH:
        raise PackError(f"case {id}: its id is longer than {KEY_LENGTH} characters: shorten it, or use cases=FILE")
    return key


def in_ascii(name: str) -> str:
    """Replace all but ASCII letters, digits, - and _ by _. (WebDataset ends a key at its first dot.)"""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


@contextmanager
def writing(path: Path, prefix: str = "") -> Iterator[None]:
    """Turn an error while `path` is written into a PackError that names it. `prefix` starts the message."""
    try:
        yield
    except NoRoomError as error:
        raise PackError(f"{prefix}{error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise PackError(f"{prefix}{path} cannot be written ({reason}): fix that, then run again to continue") from error


def _reason(error: Exception, case: Case) -> str:
    """Say in one line that names its file why a case cannot be used."""
    if isinstance(error, VolumeError | SampleError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{case.image}: there is not enough memory for it: use fewer workers= or leave it out"
    text = " ".join(str(error).split())
    return f"{case.image} cannot be packed ({type(error).__name__}: {text}): repair the case's files or leave it out"


def _source_of(case: Case) -> dict[str, str]:
    source = {"image": case.image.name, "image_sha256": source_sha256(case.image), **case.notes}
    if case.label is not None:
        source |= {"label": case.label.name, "label_sha256": source_sha256(case.label)}
    if case.masks:
        digests = {name: [source_sha256(path) for path in paths] for name, paths in case.masks.items()}
        together = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
        source |= {"label": f"{len(digests)} files", "label_sha256": together}
    return source
