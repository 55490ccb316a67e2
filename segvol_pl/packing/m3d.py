"""The processed M3D-Seg form, as most users hold the paper's 25 data sets, into cases.

1. `m3d_cases` reads `<code>/<code>.json`: the cases, their published split, the names of the mask channels.
2. `read_m3d_image` reads `<case>/image.npy`, (1, W, H, D), normalised floats.
3. `read_m3d_masks` reads `<case>/mask_(C, W, H, D).npz`, a sparse matrix with a row for each channel.

The form lost spacing, orientation and Hounsfield units. Axes are read as the published code reads them, the last one as
D; which way they point is unknown (BAAI-DCAI/M3D#51), and is marked so.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy import sparse

from segvol_pl.config.categories import listed
from segvol_pl.errors import CaseError, VolumeError
from segvol_pl.packing.cases import Case
from segvol_pl.packing.recipes import DatasetRecipe

PARTS = {"train": "train", "training": "train", "test": "test", "validation": "test"}
"""Key of the list -> published split."""


def is_m3d(path: str | Path) -> bool:
    """Whether the file lists cases of this form."""
    path = Path(path)
    return path.suffix.lower() == ".json" and path.is_file() and "labels" in _read(path, quietly=True)


def m3d_cases(path: str | Path, recipe: DatasetRecipe | None = None) -> list[Case]:
    """The cases that `<code>.json` lists, sorted by id, which is the folder's name beside it.

    `recipe` corrects the names of the channels. Raises CaseError for a file that lists none, a case listed twice, or
    names that occur twice.
    """
    path = Path(path)
    raw = _read(path)
    channels = _channels_of(raw, path, recipe)
    try:
        cases = [_case_of(row, path, split, channels) for part, split in PARTS.items() for row in raw.get(part, [])]
    except (KeyError, TypeError) as error:
        raise CaseError(f"cases: {path}: a case is no object with image and label ({error})") from error
    counts = Counter(case.id for case in cases)
    twice = [id for id, count in counts.items() if count > 1]
    if twice or not cases:
        raise CaseError(f"cases: {path} " + (f"lists {listed(twice)} twice" if twice else "lists no case"))
    return sorted(cases, key=lambda case: case.id)


def read_m3d_image(path: Path) -> tuple[np.ndarray, str]:
    """int16 (D,H,W) and what its values mean: whole numbers as they are, others spread over the range of int16.

    Raises VolumeError for what is no 3-D array of finite, differing numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VolumeError(f"{path} cannot be read ({' '.join(str(error).split())}): copy it again") from error
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.number):
        raise VolumeError(f"{path}: {array.dtype} of shape {array.shape}: image.npy holds numbers, (1, W, H, D)")
    if not np.isfinite(array).all():
        raise VolumeError(f"{path}: holds NaN or infinite voxels: mend or leave it out")
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise VolumeError(f"{path}: every voxel is {low}: it holds no image, leave it out")
    voxels, meaning = _to_int16(array, low, high)
    return np.ascontiguousarray(voxels.swapaxes(-1, -3)), meaning


def read_m3d_masks(path: Path, channels: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mask, bool (D,H,W) of `shape`, of each channel that is not empty, one at a time.

    Raises VolumeError for a file that is no such matrix, or of other channels or voxels.
    """
    try:
        matrix = sparse.load_npz(path)
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)  # compiled code follows its indices
        matrix = matrix.tocsr()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise VolumeError(f"{path} cannot be read ({' '.join(str(error).split())}): copy it again") from error
    wanted = (len(channels), int(np.prod(shape)))
    if matrix.shape != wanted:
        raise VolumeError(
            f"{path}: (channels, voxels) {matrix.shape}, not {wanted}: it belongs to another image or list"
        )
    for channel, name in enumerate(channels):
        row = slice(matrix.indptr[channel], matrix.indptr[channel + 1])
        inside = matrix.indices[row][matrix.data[row] > 0]
        if len(inside):
            mask_WHD = np.zeros(shape[::-1], dtype=bool)
            mask_WHD.reshape(-1)[inside] = True
            yield name, mask_WHD.swapaxes(-1, -3)


def _read(path: Path, quietly: bool = False) -> dict[str, Any]:
    """The object that the JSON file holds; empty for anything else if `quietly`."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        if quietly:
            return {}
        raise CaseError(f"cases: {path} is no JSON ({error})") from error
    return raw if isinstance(raw, dict) else {}


def _channels_of(raw: dict[str, Any], path: Path, recipe: DatasetRecipe | None) -> tuple[str, ...]:
    labels = raw.get("labels")
    if not isinstance(labels, dict) or set(labels) != {str(number) for number in range(len(labels))}:
        raise CaseError(f'cases: {path}: labels must be {{"0": "background", "1": name, ...}}')
    names = tuple(str(labels[str(number)]) for number in range(1, len(labels)))
    if recipe is not None and recipe.m3d_labels:
        if len(recipe.m3d_labels) != len(names):
            count = len(recipe.m3d_labels)
            raise CaseError(f"cases: {path} has {len(names)} labels, the recipe {recipe.name} {count}: give its own")
        return tuple(recipe.m3d_labels)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CaseError(f"cases: {path}: labels name {listed(twice)} twice: give recipe=FILE, which corrects it")
    return names


def _case_of(row: dict[str, str], path: Path, split: str, channels: tuple[str, ...]) -> Case:
    # Paths in the list start wherever it was made: the case's folder lies beside the list.
    image, label = PurePosixPath(row["image"]), PurePosixPath(row["label"])
    if {"", ".."} & {image.parent.name, image.name, label.name}:
        raise CaseError(f"cases: {path}: {image}, {label}: are no files of a folder beside the list")
    folder = path.parent / image.parent.name
    notes = {"form": "M3D-Seg", "published_split": split}
    return Case(image.parent.name, folder / image.name, folder / label.name, channels=channels, notes=notes)


def _to_int16(array: np.ndarray, low: float, high: float) -> tuple[np.ndarray, str]:
    limits = np.iinfo(np.int16)
    if limits.min <= low and high <= limits.max and np.array_equal(array, np.rint(array)):
        return np.asarray(array, dtype=np.int16), "as published, unit unknown"
    step = (high - low) / (limits.max - limits.min)
    voxels = np.rint((array.astype(np.float64) - low) / step + limits.min).astype(np.int16)
    return voxels, f"unit unknown: published value = {low:.9g} + (stored + {-limits.min}) * {step:.9g}"
