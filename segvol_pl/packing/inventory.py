"""A list of the CTs in a folder tree or a list of cases, by their headers alone (command `inventory`).

1. `inventory` finds every CT file and DICOM folder and reads its header.
2. Files that cannot be used are listed with the reason; files that can be used but look wrong, with the doubts.
3. Files of equal size and shape are hashed, to find copies under other names. Copies in another format or orientation
   are found by `pack`, which reads the voxels.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from segvol_pl.atomic import write_text
from segvol_pl.config import InventoryConfig
from segvol_pl.errors import CaseError, VolumeError
from segvol_pl.imaging.dicom import files_of
from segvol_pl.imaging.read import VolumeHeader, read_header, source_sha256
from segvol_pl.packing.cases import LABEL_ENDINGS, case_id, find_volumes, is_volume, read_cases

THREADS = 8
FEWEST_VOXELS = 8
"""Along an axis; a volume with fewer is doubtful."""
USUAL_SPACING = (0.1, 10.0)
"""mm between voxels; a spacing outside this range is doubtful."""
USUAL_EXTENT = (20.0, 2500.0)
"""mm along an axis; an extent outside this range is doubtful."""
PERCENTILES = (0, 25, 50, 75, 100)
SHOWN = 20


@dataclass(frozen=True)
class Entry:
    """One CT or label map."""

    path: str
    bytes: int
    files: int
    header: VolumeHeader | None = None
    problem: str = ""
    """Why it cannot be used; empty if its header shows no fault."""
    doubts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Inventory:
    """Everything found; `inventory.json`."""

    entries: list[Entry]
    copies: list[list[str]]
    """Files that hold the same bytes."""
    ignored: dict[str, int]
    """Ending -> how many files are not CTs."""

    @property
    def usable(self) -> list[tuple[Entry, VolumeHeader]]:
        """The entries whose header could be read, each with its header."""
        return [(entry, entry.header) for entry in self.entries if entry.header]


def inventory(config: InventoryConfig, console: Console | None = None) -> Inventory:
    """Read every header, print a summary, and write all entries to `config.out`.

    Raises CaseError if nothing is found.
    """
    console = console or Console()
    paths, ignored = _paths_of(config)
    if not paths:
        raise CaseError(f"images: {config.images} holds no CT file and no DICOM folder: check the path")
    with ThreadPoolExecutor(THREADS) as threads:
        entries = list(track(threads.map(_entry, paths), "headers", len(paths), console=console))
    found = Inventory(entries, _copies(entries), dict(ignored.most_common()))
    _print(found, console)
    if config.out:
        write_text(Path(config.out), json.dumps(asdict(found), indent=1) + "\n")
        console.print(f"{config.out} lists all of them")
    return found


def _paths_of(config: InventoryConfig) -> tuple[list[Path], Counter[str]]:
    if config.cases:
        return sorted({path for case in read_cases(config.cases) for path in case.paths}), Counter()
    root = Path(str(config.images))
    if not root.is_dir() or is_volume(root):
        return find_volumes(str(config.images)), Counter()
    ignored: Counter[str] = Counter()
    return sorted(_walk(root, ignored)), ignored


def _walk(root: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Yield the CT files and DICOM folders below `root`, and count the endings of other files."""
    for name, _, files in os.walk(root):
        folder = Path(name)
        if is_volume(folder):
            yield folder
            continue
        for file in files:
            if is_volume(folder / file):
                yield folder / file
            else:
                ignored[Path(file).suffix.lower() or "(none)"] += 1


def _entry(path: Path) -> Entry:
    entry = Entry(str(path), 0, 0)
    try:
        files = files_of(path)
        entry = replace(entry, bytes=sum(file.stat().st_size for file in files), files=len(files))
        header = read_header(path)
    except (VolumeError, OSError) as error:
        return replace(entry, problem=str(error))
    return replace(entry, header=header, doubts=list(_doubts(header, path)))


def _doubts(header: VolumeHeader, path: Path) -> Iterator[str]:
    yield from header.remarks
    if not header.placed:
        yield "its header states no orientation (qform and sform are 0)"
    if header.missing_bytes:
        yield f"{header.missing_bytes} bytes shorter than its header says"
    if min(header.shape) < FEWEST_VOXELS:
        yield f"only {min(header.shape)} voxels along an axis"
    if min(header.spacing) < USUAL_SPACING[0] or max(header.spacing) > USUAL_SPACING[1]:
        yield f"spacing {_triple(header.spacing)} mm"
    extents = [size * step for size, step in zip(header.shape, header.spacing, strict=True)]
    if min(extents) < USUAL_EXTENT[0] or max(extents) > USUAL_EXTENT[1]:
        yield f"extent {_triple(extents)} mm"
    if header.dtype.startswith("8-bit") and case_id(path) == path.name.partition(".")[0]:
        yield f"{header.dtype}: a label map (its name has none of {', '.join(LABEL_ENDINGS)}) or a windowed image"


def _triple(values: Iterable[float]) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _copies(entries: list[Entry]) -> list[list[str]]:
    """Return the groups of files with equal bytes. Only files of equal size and shape are read."""
    alike: dict[object, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.header:
            alike[entry.bytes, entry.header.shape].append(entry)
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in (entry for group in alike.values() if len(group) > 1 for entry in group):
        groups[source_sha256(Path(entry.path))].append(entry.path)
    return sorted(paths for paths in groups.values() if len(paths) > 1)


# Printing


def _print(found: Inventory, console: Console) -> None:
    headers = [header for _, header in found.usable]
    problems = [(entry.path, entry.problem) for entry in found.entries if entry.problem]
    doubts = [(entry.path, "; ".join(entry.doubts)) for entry in found.entries if entry.doubts]
    size = sum(entry.bytes for entry in found.entries)
    console.print(
        f"{len(found.entries)} volumes, {size / 1e9:.2f} GB: {len(headers)} usable, {len(doubts)} of them doubtful; "
        f"{len(problems)} not usable; {sum(map(len, found.copies)) - len(found.copies)} copies"
    )
    if headers:
        console.print(_percentiles(headers))
        console.print("orientation: " + _counts(header.orientation for header in headers))
        console.print("voxels: " + _counts(header.dtype for header in headers))
    if found.ignored:
        console.print("other files: " + ", ".join(f"{count} {ending}" for ending, count in found.ignored.items()))
    _print_list(problems, "not usable", console)
    _print_list(doubts, "doubtful", console)
    _print_list([(paths[0], ", ".join(paths[1:])) for paths in found.copies], "the same bytes", console)


def _percentiles(headers: list[VolumeHeader]) -> Table:
    table = Table("", "least", "25 %", "median", "75 %", "most", title="of the usable volumes")
    for name, values in (
        ("voxels", [header.shape for header in headers]),
        ("mm", [header.spacing for header in headers]),
    ):
        for axis, row in zip("DHW", np.percentile(values, PERCENTILES, axis=0).T, strict=True):
            table.add_row(f"{name} along {axis}", *(f"{value:.4g}" for value in row))
    return table


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())


def _print_list(rows: list[tuple[str, str]], title: str, console: Console) -> None:
    if not rows:
        return
    table = Table("file", "", title=title)
    for row in rows[:SHOWN]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more")
