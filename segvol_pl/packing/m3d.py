"""Cases from the processed M3D-Seg form, in which most users have the paper's 25 data sets.

1. `m3d_cases` reads `<code>/<code>.json`: the cases, their published split, the names of the mask channels.
2. `read_m3d_image` reads `<case>/image.npy`, (1, W, H, D), normalised floats.
3. `read_m3d_masks` reads `<case>/mask_(C, W, H, D).npz`, a sparse matrix with a row for each channel.

The form has no spacing, no orientation and no Hounsfield units. Axes are read as the published code reads them, the
last one as D. Which way they point is unknown (BAAI-DCAI/M3D#51); the sample's facts say so.
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

from segvol_pl.errors import CaseError, VolumeError, listed
from segvol_pl.packing.cases import Case
from segvol_pl.packing.recipes import DatasetRecipe

PUBLISHED_SPLIT = {"train": "train", "training": "train", "test": "test", "validation": "test"}
"""Key of the list -> published split."""


def is_m3d(path: str | Path) -> bool:
    """Return whether a file lists cases of this form."""
    path = Path(path)
    return path.suffix.lower() == ".json" and path.is_file() and "labels" in _read(path, quietly=True)


def m3d_cases(path: str | Path, recipe: DatasetRecipe | None = None) -> list[Case]:
    """Read the cases of `<code>.json`.

    Args:
        path: The JSON file. The cases' folders lie in the same folder; their names are the ids.
        recipe: Corrects the names of the channels.

    Returns:
        The cases, sorted by id.

    Raises:
        CaseError: The file lists no case, or a case or a channel's name occurs twice.
    """
    path = Path(path)
    raw = _read(path)
    channels = _channels_of(raw, path, recipe)
    try:
        cases = [
            _m3d_case(row, path, split, channels)
            for part, split in PUBLISHED_SPLIT.items()
            for row in raw.get(part, [])
        ]
    except (KeyError, TypeError) as error:
        raise CaseError(f"cases: {path}: a case is not an object with image and label ({error})") from error
    counts = Counter(case.id for case in cases)
    twice = [id for id, count in counts.items() if count > 1]
    if twice or not cases:
        raise CaseError(f"cases: {path} " + (f"lists {listed(twice)} twice" if twice else "lists no case"))
    return sorted(cases, key=lambda case: case.id)


def read_m3d_image(path: Path) -> tuple[np.ndarray, str]:
    """Read an image as int16 (D,H,W), and what its values mean.

    Whole numbers are kept; other numbers are scaled to the range of int16. Raises VolumeError for anything but a 3-D
    array of finite numbers that are not all equal.
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
        raise VolumeError(f"{path}: holds NaN or infinite voxels: repair it or leave it out")
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise VolumeError(f"{path}: every voxel is {low}: it holds no image, leave it out")
    voxels, meaning = _to_int16(array, low, high)
    return np.ascontiguousarray(voxels.swapaxes(-1, -3)), meaning


def read_m3d_masks(path: Path, channels: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Read the masks of all channels that are not empty, one at a time.

    Args:
        path: The sparse matrix.
        channels: Names of its rows.
        shape: (D,H,W) of the image.

    Yields:
        A channel's name and its mask, bool (D,H,W).

    Raises:
        VolumeError: The file is not such a matrix, or has another number of channels or voxels.
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
    """Return the object in a JSON file. If `quietly`, anything else gives an empty one, not an error."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        if quietly:
            return {}
        raise CaseError(f"cases: {path} is not JSON ({error})") from error
    return raw if isinstance(raw, dict) else {}


def _channels_of(raw: dict[str, Any], path: Path, recipe: DatasetRecipe | None) -> tuple[str, ...]:
    labels = raw.get("labels")
    if not isinstance(labels, dict) or set(labels) != {str(number) for number in range(len(labels))}:
        raise CaseError(f'cases: {path}: labels must be {{"0": "background", "1": name, ...}}')
    names = tuple(str(labels[str(number)]) for number in range(1, len(labels)))
    if recipe is not None and recipe.m3d_labels:
        if len(recipe.m3d_labels) != len(names):
            count = len(recipe.m3d_labels)
            raise CaseError(
                f"cases: {path} has {len(names)} labels, the recipe {recipe.name} {count}: use this data set's recipe"
            )
        return tuple(recipe.m3d_labels)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise CaseError(f"cases: {path}: labels name {listed(twice)} twice: give recipe=FILE, which corrects that")
    return names


def _m3d_case(row: dict[str, str], path: Path, split: str, channels: tuple[str, ...]) -> Case:
    # Paths in the list are those of the machine where it was made: only the last folder and the name are used.
    image, label = PurePosixPath(row["image"]), PurePosixPath(row["label"])
    if {"", ".."} & {image.parent.name, image.name, label.name}:
        raise CaseError(f"cases: {path}: {image}, {label}: are not files in a folder next to the list")
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
