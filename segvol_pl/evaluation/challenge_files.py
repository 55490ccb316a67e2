"""The files of the CVPR 2025 challenge on interactive segmentation: CASE.npz with an image and prompts, and the answer.

1. `read_case` reads the image, its prompts and the answer before. Pickles in it are not executed, see `npz_objects`.
2. `ChallengeCase.prompts` makes one prompt of a class from its box, clicks and text.
3. `write_answer` writes the label map of all classes. `read_labels` reads a label map: an answer, or the truth.

The files state no affine. Their arrays' own axes are taken as d, h, w; a model trained on canonical axes (superior,
anterior, right) works best if they run that way. Entry i of `boxes` and `clicks` is class i + 1.

Letters: D H W voxels; N clicks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.atomic import atomic_path
from segvol_pl.errors import ChallengeError
from segvol_pl.evaluation.npz_objects import NpzReader
from segvol_pl.imaging.box import Box, point_boxes, union_box
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt

ENDING = ".npz"
IMAGE, SPACING, BOXES, CLICKS, ORDER, PREVIOUS, TEXTS, ANSWER = (
    *("imgs", "spacing", "boxes", "clicks", "clicks_order", "prev_pred", "text_prompts", "segs"),
)
"""The arrays of a file. Only the image must be there; `segs` is the answer's."""
INSTANCES = "instance_label"
"""The entry of `text_prompts` that is no class: 1 if the structures are to be counted one by one."""
MOST = 255
"""Highest value of an image, and of a class."""
ROUNDING = 1e-3
"""By how much a resampled image may leave its range."""
MOST_CLICKS = 10_000
"""Clicks of one class."""
BOX_LOW = ("z_min", "z_mid_y_min", "z_mid_x_min")
BOX_HIGH = ("z_max", "z_mid_y_max", "z_mid_x_max")


@dataclass(frozen=True, eq=False)
class ChallengeCase:
    """One image of the challenge, with the prompts of its classes.

    Args:
        path: the file.
        image_DHW: of its own dtype, 0 to 255.
        spacing: mm along d, h, w as the file states it, or 1 if it does not. No mask depends on it.
        boxes: class -> extent in its middle slice, from its first slice to its last; inclusive.
        clicks: class -> clicks in their order, int (N,3), and their labels (N,): 1 inside, 0 outside.
        previous_DHW: uint8 label map of the answer before; None if there is none.
        texts: class -> the text that describes it.
        instances: whether the texts ask for structures one by one.
    """

    path: Path
    image_DHW: np.ndarray
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    boxes: dict[int, Box] = field(default_factory=dict)
    clicks: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    previous_DHW: np.ndarray | None = None
    texts: dict[int, str] = field(default_factory=dict)
    instances: bool = False

    @property
    def classes(self) -> list[int]:
        """The classes that have a box, clicks or a text, in ascending order."""
        return sorted({*self.boxes, *self.clicks, *self.texts})

    def previous(self, value: int) -> np.ndarray | None:
        """Bool mask of a class in the answer before; None if there is none, or it is empty."""
        if self.previous_DHW is None:
            return None
        mask_DHW: np.ndarray = self.previous_DHW == value
        return mask_DHW if mask_DHW.any() else None

    def prompts(self) -> dict[int, Prompt]:
        """One prompt of each class from all that is given of it.

        The challenge's box spans a middle slice, and is often smaller than the structure: it grows to hold the clicks
        inside the structure. Clicks outside it alone, with no mask before, say nothing about where it is: they are
        left out, and a class that has nothing else gets no prompt.
        """
        return {value: prompt for value in self.classes if (prompt := self._prompt(value)) is not None}

    def _prompt(self, value: int) -> Prompt | None:
        points_N3, labels_N = self.clicks.get(value, (None, None))
        box, text = self.boxes.get(value), self.texts.get(value)
        if labels_N is not None and not (labels_N == INSIDE).any() and self.previous(value) is None:
            points_N3, labels_N = None, None
        if points_N3 is None and box is None and text is None:
            return None
        if box is not None and points_N3 is not None and labels_N is not None:
            box = union_box([box, *point_boxes(points_N3[labels_N == INSIDE])])
        return Prompt(text=text, points_N3=points_N3, labels_N=labels_N, box=box)


def case_files(folder: Path) -> list[Path]:
    """The cases of a folder, by name. Raises ChallengeError if the folder is missing or holds none."""
    if not folder.is_dir():
        raise ChallengeError(f"{folder} is no folder: give the folder that holds the cases, CASE{ENDING}")
    found = sorted(path for path in folder.iterdir() if path.suffix == ENDING and not path.name.startswith("."))
    if not found:
        raise ChallengeError(f"{folder} holds no case: give the folder that holds CASE{ENDING}")
    return found


def read_case(path: Path) -> ChallengeCase:
    """Read an image and its prompts.

    Raises:
        ChallengeError: the file is damaged or has no image, its pickles hold more than plain values, or a prompt does
            not fit the image. The message names file and array.
    """
    with NpzReader(path) as npz:
        image_DHW = _image(npz)
        shape = image_DHW.shape
        texts, instances = _texts(npz)
        return ChallengeCase(
            path=path,
            image_DHW=image_DHW,
            spacing=_spacing(npz),
            boxes=dict(_boxes(npz, shape)),
            clicks=dict(_clicks(npz, shape)),
            previous_DHW=_labels(npz, PREVIOUS, shape) if PREVIOUS in npz else None,
            texts=texts,
            instances=instances,
        )


def read_texts(path: Path) -> dict[int, str]:
    """Read the texts of a case alone: class -> text. Raises ChallengeError as `read_case`."""
    with NpzReader(path) as npz:
        return _texts(npz)[0]


def read_labels(path: Path, key: str = ANSWER, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read a label map (D,H,W), uint8.

    Args:
        path: the file.
        key: `segs` of an answer, `gts` of a truth.
        shape: the voxels (d, h, w) that it must have; None: any.

    Raises:
        ChallengeError: it is missing, damaged, of another shape, or holds anything but whole numbers from 0 to 255.
    """
    with NpzReader(path) as npz:
        return _labels(npz, key, shape)


def write_answer(labels_DHW: np.ndarray, path: Path) -> None:
    """Write the label map of a case as `segs`, uint8; the file is complete or absent.

    Raises:
        ValueError: a value is beyond 0 to 255.
        NoRoomError: the disk is full.
    """
    if labels_DHW.size and not (labels_DHW.min() >= 0 and labels_DHW.max() <= MOST):
        raise ValueError(f"{path}: {ANSWER}: holds values beyond 0 to {MOST}")
    with atomic_path(path) as part, part.open("wb") as stream:
        np.savez_compressed(stream, segs=labels_DHW.astype(np.uint8))


# ---- the arrays ----


def _image(npz: NpzReader) -> np.ndarray:
    image_DHW = npz.array(IMAGE)
    _check_volume(npz, IMAGE, image_DHW)
    if image_DHW.dtype.kind == "f" and not np.isfinite(image_DHW).all():
        raise _fault(npz, IMAGE, "holds NaN or infinite values")
    lowest, highest = image_DHW.min(), image_DHW.max()
    if lowest < -ROUNDING or highest > MOST + ROUNDING:
        raise _fault(
            npz, IMAGE, f"holds values from {lowest:g} to {highest:g}; images of the challenge hold 0 to {MOST}"
        )
    return image_DHW


def _check_volume(npz: NpzReader, key: str, array: np.ndarray) -> None:
    if array.ndim != 3 or not array.size:
        raise _fault(npz, key, f"is {array.dtype} of shape {list(array.shape)}, not numbers of a volume (D,H,W)")


def _spacing(npz: NpzReader) -> tuple[float, float, float]:
    if SPACING not in npz:
        return 1.0, 1.0, 1.0
    given_3 = np.ravel(npz.array(SPACING)).astype(float)
    if given_3.shape != (3,) or not np.isfinite(given_3).all() or (given_3 <= 0).any():
        raise _fault(npz, SPACING, f"is {given_3.tolist()}, not 3 lengths in mm")
    d, h, w = given_3.tolist()
    return d, h, w


def _labels(npz: NpzReader, key: str, shape: tuple[int, ...] | None) -> np.ndarray:
    labels_DHW = npz.array(key)
    _check_volume(npz, key, labels_DHW)
    if shape is not None and labels_DHW.shape != shape:
        raise _fault(npz, key, f"has the shape {list(labels_DHW.shape)}, the image {list(shape)}")
    lowest, highest = labels_DHW.min(), labels_DHW.max()
    if not (lowest >= 0 and highest <= MOST) or not np.array_equal(labels_DHW, labels_DHW.astype(np.uint8)):
        raise _fault(npz, key, f"holds values from {lowest:g} to {highest:g}; classes are whole numbers up to {MOST}")
    return labels_DHW.astype(np.uint8)


def _boxes(npz: NpzReader, shape: tuple[int, ...]) -> Iterator[tuple[int, Box]]:
    for value, entry in _entries(npz, BOXES):
        missing = [name for name in (*BOX_LOW, *BOX_HIGH) if name not in entry]
        if missing:
            raise _fault(npz, BOXES, f"the box of class {value} lacks {', '.join(missing)}")
        low, high = ([_whole(npz, BOXES, entry[name]) for name in names] for names in (BOX_LOW, BOX_HIGH))
        spanned = zip(low, high, shape, strict=True)
        if not all(0 <= first <= last < size for first, last, size in spanned):
            sizes, box = " x ".join(map(str, shape)), f"the box {[*low, *high]} (d0 h0 w0 d1 h1 w1) of class {value}"
            raise _fault(npz, BOXES, f"{box} is inverted or reaches outside the image of {sizes} voxels")
        yield value, (low[0], low[1], low[2], high[0], high[1], high[2])


def _clicks(npz: NpzReader, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    orders = _orders(npz)
    for value, entry in _entries(npz, CLICKS):
        rows = {name: _points(npz, value, entry.get(name), shape) for name in ("fg", "bg")}
        order = orders.get(value, [])
        if sorted(order) != sorted(name for name, points in rows.items() for _ in points):
            order = [name for name, points in rows.items() for _ in points]
        left = {name: iter(points) for name, points in rows.items()}
        if order:
            points_N3 = np.array([next(left[name]) for name in order], np.int64)
            yield value, (points_N3, np.array([INSIDE if name == "fg" else OUTSIDE for name in order], np.int64))


def _orders(npz: NpzReader) -> dict[int, list[str]]:
    """Class -> `fg` or `bg` of each of its clicks, in the order in which they were made."""
    if ORDER not in npz:
        return {}
    held = npz.objects(ORDER)
    rows = held if isinstance(held, list) else []
    return {
        value: [name for name in row if name in ("fg", "bg")]
        for value, row in enumerate(rows, 1)
        if isinstance(row, list | tuple)
    }


def _points(npz: NpzReader, value: int, held: Any, shape: tuple[int, ...]) -> list[list[int]]:
    rows = [] if held is None else held.tolist() if isinstance(held, np.ndarray) else held
    if not isinstance(rows, list | tuple) or len(rows) > MOST_CLICKS:
        raise _fault(npz, CLICKS, f"the clicks of class {value} are no list of at most {MOST_CLICKS}")
    points = []
    for row in rows:
        numbers = row.tolist() if isinstance(row, np.ndarray) else row
        if not isinstance(numbers, list | tuple) or len(numbers) != 3:
            raise _fault(npz, CLICKS, f"a click of class {value} has no 3 numbers (d, h, w)")
        point = [_whole(npz, CLICKS, number) for number in numbers]
        if not all(0 <= place < size for place, size in zip(point, shape, strict=True)):
            sizes = " x ".join(map(str, shape))
            raise _fault(npz, CLICKS, f"the click {point} of class {value} lies outside the image of {sizes} voxels")
        points.append(point)
    return points


def _texts(npz: NpzReader) -> tuple[dict[int, str], bool]:
    """Class -> text, and whether structures are to be found one by one."""
    held = npz.objects(TEXTS) if TEXTS in npz else {}
    if not isinstance(held, dict):
        raise _fault(npz, TEXTS, "is no dict of class and text")
    texts = {}
    for key, text in held.items():
        if key == INSTANCES:
            continue
        number = str(key)
        if not (number.isdecimal() and 0 < int(number[:4]) <= MOST and len(number) < 5) or not isinstance(text, str):
            raise _fault(npz, TEXTS, f"the entry {key!r} is no class from 1 to {MOST} with its text")
        texts[int(number)] = text.strip()
    return texts, bool(held.get(INSTANCES))


def _entries(npz: NpzReader, key: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The entries of an array of dicts that are not empty, each with its class."""
    held = npz.objects(key) if key in npz else None
    if held is None:
        return
    if not isinstance(held, list | tuple) or len(held) > MOST:
        raise _fault(npz, key, f"is no list of at most {MOST} classes")
    for value, entry in enumerate(held, 1):
        if entry is None:
            continue
        if not isinstance(entry, dict):
            raise _fault(npz, key, f"the entry of class {value} is no dict")
        yield value, entry


def _whole(npz: NpzReader, key: str, number: Any) -> int:
    held = number.item() if isinstance(number, np.ndarray) and number.size == 1 else number
    if isinstance(held, bool) or not isinstance(held, int | float) or not -1e9 < held < 1e9 or held != int(held):
        raise _fault(npz, key, f"{str(number)[:50]} is no whole number")
    return int(held)


def _fault(npz: NpzReader, key: str, problem: str) -> ChallengeError:
    return ChallengeError(f"{npz.path}: {key}: {problem}")
