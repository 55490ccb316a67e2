"""Which label map belongs to which CT.

1. `pair_cases` finds the files of `images` and `labels` (file, DICOM folder, folder of cases or glob) and pairs them by
   id.
2. `read_cases` reads the pairs from a CSV or JSON file.

CTs and label maps that cannot be paired are an error that lists them: no CT is left out, or left without its label,
without notice.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segvol_pl.errors import CaseError, listed
from segvol_pl.imaging.dicom import files_of, is_dicom
from segvol_pl.imaging.read import READABLE

IMAGE_ENDINGS = ("_ct", "_image", "_0000", "_dicom")
LABEL_ENDINGS = ("_seg", "_label")

COLUMNS = ("id", "image", "label", "split")
"""Columns of a list of cases. Any other column is named after a category and holds the files of its masks."""
SPLITS = ("train", "test")
"""What the column `split` may hold; an empty cell leaves the split to the hash of the CT's content."""


@dataclass(frozen=True)
class Case:
    """A CT and, if it has labels, its label map or one file for each category."""

    id: str
    image: Path
    label: Path | None = None
    masks: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    """Category name -> its mask files; their voxels above 0 belong to it. Categories may overlap."""
    channels: tuple[str, ...] = ()
    """Names of the channels of a `label` in the processed M3D-Seg form, see `m3d.py`."""
    notes: dict[str, str] = field(default_factory=dict)
    """What else is known about its origin, for `Facts.source`."""
    split: str = ""
    """The split that its list names; empty: the hash of its content decides."""

    @property
    def paths(self) -> list[Path]:
        """All files and folders of the case."""
        masks = [path for paths in self.masks.values() for path in paths]
        return [self.image, *([self.label] if self.label else []), *masks]


def pair_cases(images: str, labels: str | None = None) -> list[Case]:
    """Find CTs and label maps and pair them by id. A single image and a single label are paired as they are.

    Args:
        images: A CT file, a DICOM folder, a folder of CTs, or a glob.
        labels: The same, for the label maps. By default the cases have no labels.

    Returns:
        The cases, sorted by id.

    Raises:
        CaseError: Nothing is found, two files have one id, or an image or label has no partner.
    """
    found_images = _expand(images, LABEL_ENDINGS, "images")
    if labels is None:
        return [Case(id, path) for id, path in sorted(_by_id(found_images).items())]
    found_labels = _expand(labels, IMAGE_ENDINGS, "labels")
    _check_roles(found_images, found_labels)
    if len(found_images) == len(found_labels) == 1:
        return [Case(case_id(found_images[0]), found_images[0], found_labels[0])]
    return _pair(_by_id(found_images), _by_id(found_labels))


def find_volumes(pattern: str) -> list[Path]:
    """Return the CTs of a file, a DICOM folder or a glob. Raises CaseError if there is none."""
    return _expand(pattern, (), "images")


def case_id(path: Path) -> str:
    """Return the name of a file or folder without its ending and without `_ct`, `_seg` etc. (any case)."""
    name = _stem(path)
    return _role_ending(IMAGE_ENDINGS + LABEL_ENDINGS).sub("", name) or name


def _role_ending(endings: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(endings)})$", re.IGNORECASE)


def _expand(pattern: str, foreign: tuple[str, ...], key: str) -> list[Path]:
    """Return the volumes of `pattern`. In a folder, names with a `foreign` ending belong to the other key."""
    path = Path(pattern)
    if path.is_dir():
        return _expand_folder(path, foreign, key)
    if path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if is_volume(Path(name))]
    if not found:
        raise CaseError(f"{key}: {pattern} matches no CT file and no DICOM folder: check the path")
    return found


def _expand_folder(folder: Path, foreign: tuple[str, ...], key: str) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if is_volume(entry))
    except OSError as error:
        raise CaseError(
            f"{key}: {error.filename} cannot be read ({error.strerror}): give read permission, or move it away"
        ) from error
    own = [entry for entry in entries if not _role_ending(foreign).search(_stem(entry))]
    if own:
        return own
    if _is_dicom_folder(folder):
        return [folder]
    raise CaseError(f"{key}: {folder} holds no {'/'.join(READABLE)} and no DICOM series for {key}: check the path")


def _stem(path: Path) -> str:
    return re.sub("|".join(re.escape(ending) + "$" for ending in READABLE[::-1]), "", path.name, flags=re.IGNORECASE)


def is_volume(path: Path) -> bool:
    """Return whether a file has the ending, or a folder the content, of a CT."""
    return path.name.lower().endswith(READABLE) if path.is_file() else _is_dicom_folder(path)


def _is_dicom_folder(path: Path) -> bool:
    return path.is_dir() and any(is_dicom(file) for file in files_of(path))


def _by_id(paths: list[Path]) -> dict[str, Path]:
    counts = Counter(case_id(path) for path in paths)
    twice = [str(path) for path in paths if counts[case_id(path)] > 1]
    if twice:
        raise CaseError(
            f"several files have one case id: {listed(twice)}: rename them, or give the pairs with cases=FILE"
        )
    return {case_id(path): path for path in paths}


def _check_roles(images: list[Path], labels: list[Path]) -> None:
    both = sorted(str(path) for path in set(images) & set(labels))
    if both:
        raise CaseError(f"both image and label: {listed(both)}: name them ..._ct and ..._seg, or use cases=FILE")


def _pair(images: dict[str, Path], labels: dict[str, Path]) -> list[Case]:
    alone = [f"{images[id]} (no label)" for id in sorted(images.keys() - labels.keys())]
    alone += [f"{labels[id]} (no image)" for id in sorted(labels.keys() - images.keys())]
    if alone:
        raise CaseError(f"cannot be paired: {listed(alone)}: rename them, or give the pairs with cases=FILE")
    return [Case(id, images[id], labels[id]) for id in sorted(images)]


# Lists of cases


def read_cases(path: str | Path) -> list[Case]:
    """Read a list of cases: CSV with the columns id, image, label and split, or JSON with a list of such objects.

    Instead of `label` there may be columns named after categories, which hold the category's mask file. Paths are
    relative to the list. All but id and image may be empty or left out. `split` is train or test.

    Returns the cases, sorted by id. Raises CaseError for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise CaseError(f"cases: {path} does not exist: check the path")
    rows = _read_json(path) if path.suffix.lower() == ".json" else _read_csv(path)
    cases = [_case_of_row(row, path, number) for number, row in enumerate(rows, start=1)]
    counts = Counter(case.id for case in cases)
    twice = [id for id, count in counts.items() if count > 1]
    if twice or not cases:
        raise CaseError(f"cases: {path} " + (f"lists {listed(twice)} twice" if twice else "lists no case"))
    return sorted(cases, key=lambda case: case.id)


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CaseError(f"cases: {path} is not JSON ({error})") from error
    if not isinstance(rows, list):
        raise CaseError(f"cases: {path} is not a list: write [{{id, image, label}}, ...]")
    return rows


def _read_csv(path: Path) -> list[Any]:
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return list(csv.DictReader(stream))


def _case_of_row(row: Any, path: Path, number: int) -> Case:
    place = f"cases: {path}, case {number}"
    if not isinstance(row, dict):
        raise CaseError(f"{place}: is not an object with id, image, label")
    if None in row:
        raise CaseError(f"{place}: has more cells than the file has columns")
    cells = {str(key): value or "" for key, value in row.items()}
    id, image, label, split = (cells.get(key, "") for key in COLUMNS)
    if not (id and image and all(isinstance(value, str) for value in cells.values())):
        raise CaseError(f"{place}: needs an id and an image, both as text; labels, if any, are text too")
    if split and split not in SPLITS:
        raise CaseError(f"{place}: split is {split!r}: write {' or '.join(SPLITS)}, or leave it empty")
    masks: dict[str, tuple[Path, ...]] = {
        name: (path.parent / cells[name],) for name in sorted(cells.keys() - set(COLUMNS)) if cells[name]
    }
    _check_columns(sorted(cells.keys() - set(COLUMNS)), bool(label and masks), place)
    return Case(id, path.parent / image, path.parent / label if label else None, masks, split=split)


def _check_columns(names: list[str], both: bool, place: str) -> None:
    for name in names:
        meant = difflib.get_close_matches(name.lower(), [*COLUMNS, "images", "labels"], n=1, cutoff=0.75)
        if meant or not name.strip():
            raise CaseError(
                f"{place}: unknown column {name!r}: the columns are id, image, label, split, or category names"
            )
    if both:
        raise CaseError(f"{place}: has both a label map and category files: give one of the two")
