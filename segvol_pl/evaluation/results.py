"""The results so far, a file for each case: what a restart goes on from, and what ranks share.

1. `ResultStore.open` writes down what decides the figures, or refuses a folder whose results were decided otherwise.
2. `ResultStore.write` leaves a case's result whole, or not at all, as `cases/KEY.json`.
3. `Share` says which cases are whose: a function of their number alone, so that each is evaluated once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from segvol_pl.atomic import write_text
from segvol_pl.config import EvaluateConfig, parse_part
from segvol_pl.config.loader import plain
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.mask_category import CategoryMatch
from segvol_pl.evaluation.summary import Row

Item = TypeVar("Item")

SCHEMA = 1
CASES, SETTINGS = "cases", "settings.json"
UNDECIDED = (
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
    "track",
    "zoom.cache_gb",
    "zoom.device_gb",
)
"""Keys of the configuration, or sections, that do not decide a case's figures. The checkpoint's content and the cases'
landmarks do."""

RANK_VARIABLES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""A process's rank and how many there are: torchrun's names, and those that srun (but not sbatch) sets."""


@dataclass(frozen=True)
class Share:
    """This process's part of the cases: of array task `part` of `parts`, rank `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1
    part: int = 0
    parts: int = 1

    @classmethod
    def of(cls, slice: str, environment: Mapping[str, str] = os.environ) -> Share:
        """By `part=K/N` and the launcher's variables. Raises EvaluateError where they contradict each other."""
        part, parts = parse_part(slice) if slice else (0, 1)
        for rank_name, ranks_name in RANK_VARIABLES:
            if rank_name in environment and ranks_name in environment:
                rank, ranks = int(environment[rank_name]), int(environment[ranks_name])
                if not 0 <= rank < ranks:
                    raise EvaluateError(f"{rank_name}={rank} and {ranks_name}={ranks}: set both or none of them")
                return cls(rank, ranks, part, parts)
        return cls(part=part, parts=parts)

    @property
    def lock(self) -> str:
        """Name of the lock file of who evaluates this part."""
        own = f"-{self.part}-{self.rank}-of-{self.parts}-{self.ranks}"
        return f".lock{own if self.parts * self.ranks > 1 else ''}.json"

    def of_list(self, items: Sequence[Item]) -> list[Item]:
        """This process's items. The shares of all processes hold each item once."""
        return list(items[self.part * self.ranks + self.rank :: self.parts * self.ranks])


@dataclass(frozen=True)
class CaseResult:
    """What became of one case."""

    key: str
    fingerprint: str
    """Of the case as it was read, see `EvalCases`."""
    seconds: float
    rows: list[Row] = field(default_factory=list)
    matches: list[CategoryMatch] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Categories asked for that it does not hold."""
    unknown: list[str] = field(default_factory=list)
    """Categories that it holds and the model does not know."""
    problem: str = ""
    """Why it cannot be read; the rest is empty then."""

    @classmethod
    def from_json(cls, text: str) -> CaseResult:
        """What `ResultStore.write` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(text)
        rows, matches = [Row(**row) for row in raw["rows"]], [CategoryMatch(**match) for match in raw["matches"]]
        return cls(**{**raw, "rows": rows, "matches": matches})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class ResultStore:
    """The results in one folder."""

    def __init__(self, out: Path, config: EvaluateConfig, model: str) -> None:
        self.out, self.folder = out, out / CASES
        decided = {key: value for key, value in _flat(plain(config)) if not key.startswith(UNDECIDED)}
        self.settings = {"schema": SCHEMA, "model": model, **decided}

    def open(self, anew: bool) -> None:
        """Raises EvaluateError where the folder holds results of other settings. `anew` removes what it holds."""
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.out / SETTINGS).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.out / SETTINGS).exists():
            write_text(self.out / SETTINGS, json.dumps(self.settings, indent=1) + "\n")
        # Read again: another rank may have been first.
        written = json.loads((self.out / SETTINGS).read_text(encoding="utf-8"))
        others = [key for key in {**self.settings, **written} if self.settings.get(key) != written.get(key)]
        if others:
            raise EvaluateError(
                f"out: {self.out} holds results of an evaluation with other {', '.join(others)}: give another folder, "
                "or begin anew with resume=false"
            )

    def find(self, key: str, fingerprint: str) -> CaseResult | None:
        """The result of a case; None where there is none, or the case has changed since."""
        try:
            result = CaseResult.from_json(self._path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluateError(f"{self._path(key)} is no result of a case ({error}): remove it") from error
        return result if result.fingerprint == fingerprint else None

    def write(self, result: CaseResult) -> None:
        """The case's result, whole: a reader sees all of it or none."""
        write_text(self._path(result.key), json.dumps(asdict(result), ensure_ascii=False) + "\n")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
