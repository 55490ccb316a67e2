"""Store what is known of each case, one file per case: for restarts, and for ranks to exchange.

1. `CaseStore.open` records the settings that determine the records, and refuses a folder with other settings.
2. `CaseStore.write` writes the record of a case to `cases/KEY.json`, atomically. An evaluation keeps `CaseResult`s;
   `predict_images.py` has records of its own.
3. `Partition` selects the cases of a process by their position alone, so that each case is evaluated once.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from segvol_pl.atomic import write_text
from segvol_pl.config import EvaluateConfig, parse_part
from segvol_pl.config.loader import flat, plain
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.mask_category import CategoryMatch
from segvol_pl.evaluation.summary import Row
from segvol_pl.launched import SRUN, TORCHRUN

Item = TypeVar("Item")

POLL_SECONDS = 0.5
"""Time between two checks for what other ranks make."""
SCHEMA = 2
"""2: the surface Dice is by area, and there is HD95."""
CASES, SETTINGS = "cases", "settings.json"
NEUTRAL_KEYS = (
    "checkpoint",
    "data",
    "device",
    "limit",
    "max_bad_fraction",
    "out",
    "rank_timeout",
    "pictures",
    "resume",
    "part",
    "target_dice",
    "track",
    "zoom.cache_gb",
    "zoom.device_gb",
)
"""Keys and sections of the configuration that do not change a case's figures. Model and cases have fingerprints."""


@dataclass(frozen=True)
class Partition:
    """The cases of one process: rank `rank` of `ranks` within part `part` of `parts`."""

    rank: int = 0
    ranks: int = 1
    part: int = 0
    parts: int = 1

    @classmethod
    def of(cls, key: str, environment: Mapping[str, str] = os.environ) -> Partition:
        """Make it of the key `part` (K/N or empty) and the launcher's variables.

        Raises EvaluateError if the variables contradict each other.
        """
        part, parts = parse_part(key) if key else (0, 1)
        for rank_name, ranks_name in (TORCHRUN, SRUN):
            if rank_name in environment and ranks_name in environment:
                rank, ranks = int(environment[rank_name]), int(environment[ranks_name])
                if not 0 <= rank < ranks:
                    raise EvaluateError(f"{rank_name}={rank} and {ranks_name}={ranks}: set both or none of them")
                return cls(rank, ranks, part, parts)
        return cls(part=part, parts=parts)

    @property
    def lock(self) -> str:
        """Name of the lock file of this process's part."""
        suffix = f"-{self.part}-{self.rank}-of-{self.parts}-{self.ranks}"
        return f".lock{suffix if self.parts * self.ranks > 1 else ''}.json"

    def select(self, items: Sequence[Item]) -> list[Item]:
        """Select this process's items. Over all processes, each item is selected once."""
        return list(items[self.part * self.ranks + self.rank :: self.parts * self.ranks])


@dataclass(frozen=True)
class CaseRecord:
    """What is known of one case."""

    key: str
    fingerprint: str
    """Fingerprint of the case when it was read. It changes when the case does."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse the text of `CaseStore.write`. Raises ValueError, KeyError or TypeError for any other text."""
        return cls(**json.loads(text))


Record = TypeVar("Record", bound=CaseRecord)


@dataclass(frozen=True)
class CaseResult(CaseRecord):
    """The result of evaluating one case; its fingerprint is that of `EvalCases`."""

    seconds: float
    rows: list[Row] = field(default_factory=list)
    matches: list[CategoryMatch] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Configured categories that the case does not have."""
    unknown: list[str] = field(default_factory=list)
    """Categories of the case that the model does not know."""
    problem: str = ""
    """Why the case cannot be read; the other lists are then empty."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """As for every record; rows and matches become objects again."""
        raw = json.loads(text)
        rows, matches = [Row(**row) for row in raw["rows"]], [CategoryMatch(**match) for match in raw["matches"]]
        return cls(**{**raw, "rows": rows, "matches": matches})


def deciding_settings(config: Any, neutral: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a configuration that determine results: all but those that begin as one of `neutral`."""
    return {key: value for key, value in flat(plain(config)).items() if not key.startswith(neutral)}


def differing_settings(path: Path, settings: Mapping[str, Any]) -> list[str]:
    """Write the settings that determine the results of a folder, unless they are written; list those that differ.

    Raises ValueError if the file is not JSON.
    """
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
    # Read back, as another rank may have written it first.
    written = json.loads(path.read_text(encoding="utf-8"))
    return [key for key in {**settings, **written} if settings.get(key) != written.get(key)]


def wait_for_ranks(pending: Sequence[Item], is_there: Callable[[Item], bool], timeout: float, what: str) -> None:
    """Wait until what all ranks make is there.

    Args:
        pending: What must be there.
        is_there: Whether one of them is.
        timeout: `rank_timeout`, in seconds.
        what: What each of them is, in one word.

    Raises:
        EvaluateError: None arrived for `timeout` seconds.
    """
    last = time.monotonic()
    while left := [item for item in pending if not is_there(item)]:
        if len(left) < len(pending):
            last = time.monotonic()
        pending = left
        if time.monotonic() - last > timeout:
            raise EvaluateError(
                f"rank_timeout: no {what} of another rank in {timeout:.0f} s; {len(left)} are missing, the first is "
                f"{left[0]}: check that rank's log, then run again to continue"
            )
        time.sleep(POLL_SECONDS)


class CaseStore(Generic[Record]):
    """The records of the cases in a folder, all made with the same settings.

    Args:
        out: The folder.
        settings: That determine the records.
        kind: Of the records.
        what: The folder holds, for messages.
        remedy: For a folder with other settings, apart from another folder.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], kind: type[Record], what: str, remedy: str) -> None:
        self.out, self.folder, self.settings, self.kind = out, out / CASES, settings, kind
        self.what, self.remedy = what, remedy

    def open(self, restart: bool = False) -> None:
        """Create the folder, or check that its records have the same settings.

        Args:
            restart: Remove the records that the folder holds.

        Raises:
            EvaluateError: The folder holds records of other settings.
        """
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.out / SETTINGS).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        others = differing_settings(self.out / SETTINGS, self.settings)
        if others:
            raise EvaluateError(
                f"out: {self.out} holds {self.what} with other {', '.join(others)}: set out to another folder, or "
                f"{self.remedy}"
            )

    def find(self, key: str, fingerprint: str) -> Record | None:
        """Return the record of a case; None if there is none or the case has changed since.

        Raises EvaluateError if its file is not a record.
        """
        try:
            record = self._read(self._path(key))
        except FileNotFoundError:
            return None
        return record if record.fingerprint == fingerprint else None

    def all(self) -> list[Record]:
        """Return the records of all cases so far, in the order of their keys. Raises EvaluateError as `find`."""
        return [self._read(path) for path in sorted(self.folder.glob("*.json"))]

    def write(self, record: Record) -> None:
        """Write the record of a case, atomically."""
        write_text(self._path(record.key), json.dumps(asdict(record), ensure_ascii=False) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, path: Path) -> Record:
        try:
            return self.kind.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluateError(f"{path} is not a result of a case ({error}): remove it") from error


class ResultStore(CaseStore[CaseResult]):
    """The results of an evaluation in its folder."""

    def __init__(self, out: Path, config: EvaluateConfig, model: str) -> None:
        settings = {"schema": SCHEMA, "model": model, **deciding_settings(config, NEUTRAL_KEYS)}
        super().__init__(out, settings, CaseResult, "results of an evaluation", "set resume=false to remove them")
