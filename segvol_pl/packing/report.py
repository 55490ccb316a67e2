"""What became of the cases that were packed: `pack_report.json`, `splits.csv` and what is printed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import blosc2
from rich.console import Console
from rich.table import Table

from segvol_pl.atomic import write_text
from segvol_pl.data.schema import SCHEMA
from segvol_pl.errors import PackError
from segvol_pl.packing.prepare import VERSIONS
from segvol_pl.packing.stage import BadCase, Staged

log = logging.getLogger(__name__)

REPORT = "pack_report.json"
SPLITS = "splits.csv"
UNSTATED = (SCHEMA, blosc2.__version__)
"""The versions of a report that does not state them. If it was another Blosc2, the fingerprints differ."""


@dataclass(frozen=True)
class PackReport:
    """What became of the cases."""

    cases: int
    fingerprint: str
    """Of all cases' files and of the configuration."""
    bad: list[BadCase]
    duplicates: dict[str, str]
    """Case left out -> the case kept that holds the same voxels."""
    staged: dict[str, str] = field(default_factory=dict)
    """Key of each packed sample -> the fingerprint of its files and rules."""
    versions: Sequence[Any] = VERSIONS
    """With which the fingerprints were taken."""
    samples_per_shard: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    """Split -> samples packed. Empty if packing failed."""
    shards: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def packed(self) -> int:
        """Samples in the shards."""
        return sum(self.splits.values())

    def write(self, out: Path) -> None:
        """Write the report into the folder of the shards."""
        write_text(out / REPORT, json.dumps(asdict(self), indent=1) + "\n")


def read_report(out: Path) -> PackReport:
    """Read the report of a finished folder. Raises PackError if something else wrote the folder."""
    try:
        raw = json.loads((out / REPORT).read_text(encoding="utf-8"))
        return PackReport(**{"versions": UNSTATED, **raw, "bad": [BadCase(**case) for case in raw["bad"]]})
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise PackError(f"out: {out} holds an index that pack did not write: give another folder") from None


def write_splits(out: Path, kept: Sequence[Staged]) -> None:
    """Write which case is in which split, by the sha256 of its voxels."""
    rows = sorted((case.record.split, case.record.key, case.content_sha256) for case in kept)
    write_text(out / SPLITS, "\n".join(["split,key,content_sha256", *(",".join(row) for row in rows)]) + "\n")


def print_left_out(report: PackReport, console: Console) -> None:
    """Print the cases that cannot be used, and the duplicates."""
    if report.bad:
        table = Table("case", "file", "reason", title=f"{len(report.bad)} of {report.cases} cases cannot be used")
        for case in report.bad:
            table.add_row(case.id, case.file, case.reason)
        console.print(table)
    for left_out, kept in report.duplicates.items():
        console.print(f"{left_out} holds the same voxels as {kept}: left out")


def print_summary(report: PackReport, out: Path, console: Console) -> None:
    """Print what was packed, and warn if all of it is in one split."""
    splits = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    rate = report.packed / max(report.seconds, 1e-9)
    console.print(
        f"{out}: {report.packed} samples ({splits}) in {len(report.shards)} shards, {report.bytes / 1e6:.1f} MB, "
        f"{report.seconds:.1f} s ({rate:.2f} volumes/s)"
    )
    if len(report.splits) == 1:
        log.warning("%s: all cases are in the split %s, by the hash of their content", out, *report.splits)
