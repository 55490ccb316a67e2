"""The rules of the CVPR 2025 challenge on interactive 3-D segmentation, as pure functions of masks and scores.

1. `challenge_box` draws the box of the first call around the truth.
2. `next_click` places the click of each further call in the largest error of the answer before it.
3. `case_scores` turns the scores of the six calls into areas under the curve and final scores.
4. `instance_scores` matches instances, for the challenge's track of text prompts.

The functions give the same numbers as the challenge's own (`CVPR25_iter_eval.py`, `CVPR25_text_eval.py`,
`get_boxes.py`). Nothing here knows a model. Boxes of the challenge name their axes x, y, z: these are w, h, d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from segvol_pl.imaging.box import Box, box_of, box_or_none, box_slices, middle_slice, slice_box

CLICKS = 5
"""Calls with one more click each, after the call with the box alone."""
CALLS = 1 + CLICKS
NSD_TOLERANCE = 2.0
"""In mm."""
LEAST_DICE = 0.2
"""Up to this mean Dice over a case's classes its NSD counts as 0."""
SECONDS_A_CLASS = 90.0
"""The challenge scores a case 0 if its calls take longer together, times the number of classes."""
LEAST_IOU = 0.5
"""From this intersection over union on, two instances match."""

CLICK_SEED = 42
LARGE = 60_000_000
"""Above this number of voxels in the padded crop of an error, its distances are those of every second voxel."""
PADDING = 0.25
"""Margin of that crop on each side, as a share of its size, at least one voxel."""
BOX_SHIFT = 6
"""A box's faces move outward by a whole number below this, for an image of `BOX_SCALE` voxels."""
BOX_SCALE = 256

EVERY_NEIGHBOUR = ndimage.generate_binary_structure(3, 3)
FACE_NEIGHBOURS = ndimage.generate_binary_structure(3, 1)

Voxel = tuple[int, int, int]
Kind = Literal["fg", "bg"]


# ---- the box ----


def challenge_box(truth_DHW: np.ndarray, rng: np.random.Generator | np.random.RandomState) -> dict[str, int]:
    """Draw the box of a class: its slices, and its extent on the middle one, slightly enlarged.

    The extent is that of one slice, so the box is often smaller than the object.

    Args:
        truth_DHW: bool, or any array that is not 0 inside the class.
        rng: Draws one whole number. The challenge's own boxes come from `np.random.RandomState`, one draw for each
            class in turn.

    Returns:
        z_min, z_max, z_mid, z_mid_x_min, z_mid_y_min, z_mid_x_max, z_mid_y_max: voxels, maximum included.

    Raises:
        ValueError: The class has no voxel.
    """
    inside_DHW = np.asarray(truth_DHW) != 0
    middle = middle_slice(inside_DHW)
    z_min, y_min, x_min, z_max, y_max, x_max = slice_box(inside_DHW, middle)
    draw = rng.randint if isinstance(rng, np.random.RandomState) else rng.integers
    shift = int(draw(0, BOX_SHIFT, 1)[0])
    _, height, width = inside_DHW.shape
    shift_y, shift_x = int(shift * height / BOX_SCALE), int(shift * width / BOX_SCALE)
    return {
        "z_min": z_min,
        "z_max": z_max,
        "z_mid": middle,
        "z_mid_x_min": max(0, x_min - shift_x),
        "z_mid_y_min": max(0, y_min - shift_y),
        "z_mid_x_max": min(width - 1, x_max + shift_x),
        "z_mid_y_max": min(height - 1, y_max + shift_y),
    }


def box_of_challenge(box: Mapping[str, int]) -> Box:
    """Return a box of the challenge as ours, d0 h0 w0 d1 h1 w1, maximum included. Raises KeyError if a part lacks."""
    low = (int(box["z_min"]), int(box["z_mid_y_min"]), int(box["z_mid_x_min"]))
    return *low, int(box["z_max"]), int(box["z_mid_y_max"]), int(box["z_mid_x_max"])


# ---- clicks ----


def next_click(truth_DHW: np.ndarray, mask_DHW: np.ndarray) -> tuple[Voxel, Kind] | None:
    """Place the next click on an answer: in the middle of its largest error.

    Errors are connected by faces, edges and corners. The largest has most voxels; of equal ones it is the one whose
    first voxel comes first in the order d, h, w. Its middle is a voxel as far as possible, in voxels, from the error's
    surface; of several, one is drawn with a fixed seed.

    Args:
        truth_DHW: bool, the class.
        mask_DHW: bool, the answer, of the same shape.

    Returns:
        The voxel (d, h, w), and whether it lies inside the class (`fg`) or outside (`bg`); None if nothing is wrong.

    Raises:
        ValueError: The shapes differ.
    """
    if truth_DHW.shape != mask_DHW.shape:
        raise ValueError(f"truth and mask have the shapes {list(truth_DHW.shape)} and {list(mask_DHW.shape)}")
    truth_DHW = np.asarray(truth_DHW, bool)
    error_DHW = truth_DHW != np.asarray(mask_DHW, bool)
    around = box_or_none(error_DHW)
    if around is None:
        return None
    labels_DHW, _ = ndimage.label(error_DHW[box_slices(around)], EVERY_NEIGHBOUR)
    sizes = np.bincount(labels_DHW.reshape(-1))
    sizes[0] = 0
    largest_DHW = labels_DHW == sizes.argmax()
    own = box_of(largest_DHW)
    depth_DHW = _depth(largest_DHW[box_slices(own)])
    deepest_N3 = np.argwhere(depth_DHW == depth_DHW.max())
    # The legacy generator: the challenge's clicks are drawn by it.
    chosen_3 = deepest_N3[np.random.RandomState(CLICK_SEED).choice(len(deepest_N3))]
    d, h, w = (int(at) for at in chosen_3 + own[:3] + around[:3])
    return (d, h, w), "fg" if truth_DHW[d, h, w] else "bg"


def _depth(error_DHW: np.ndarray) -> np.ndarray:
    """Distance in voxels of each voxel of an error's own box from outside the error, float64."""
    margin = [max(int(size * PADDING), 1) for size in error_DHW.shape]
    if np.prod([size + 2 * more for size, more in zip(error_DHW.shape, margin, strict=True)]) > LARGE:
        return _coarse_depth(error_DHW, margin)
    # A wider margin changes no distance.
    depth_DHW: np.ndarray = ndimage.distance_transform_edt(np.pad(error_DHW, 1))[1:-1, 1:-1, 1:-1]
    return depth_DHW


def _coarse_depth(error_DHW: np.ndarray, margin: Sequence[int]) -> np.ndarray:
    """The same of blocks of 2 x 2 x 2 voxels of the padded box, in blocks; a block with an error voxel is an error."""
    after = [more + (size + 2 * more) % 2 for size, more in zip(error_DHW.shape, margin, strict=True)]
    padded_DHW = np.pad(error_DHW, list(zip(margin, after, strict=True)))
    for axis in range(3):
        lines = np.moveaxis(padded_DHW, axis, 0)
        padded_DHW = np.moveaxis(lines[::2] | lines[1::2], 0, axis)
    depth_DHW: np.ndarray = ndimage.distance_transform_edt(padded_DHW)
    places = [(np.arange(size) + more) // 2 for size, more in zip(error_DHW.shape, margin, strict=True)]
    repeated_DHW: np.ndarray = depth_DHW[np.ix_(*places)]
    return repeated_DHW


# ---- scores ----


def case_nsd(dsc: float, nsd: float) -> float:
    """Return the NSD that counts for one call on a case: 0 up to a mean Dice of `LEAST_DICE`.

    Args:
        dsc: Mean over the case's classes.
        nsd: Mean over the case's classes.
    """
    return nsd if dsc > LEAST_DICE else 0.0


def case_scores(dsc: Sequence[float], nsd: Sequence[float]) -> dict[str, float]:
    """Summarise the scores of a case's calls.

    Args:
        dsc: Dice of each call, the five calls with clicks last. What comes before them enters no figure.
        nsd: Surface Dice of the same calls.

    Returns:
        dsc_auc and nsd_auc, the areas under the five scores by trapezoids at x = 0..4, so at most 4; dsc_final and
        nsd_final, the scores after the last click.

    Raises:
        ValueError: There are fewer than five calls, or not equally many of both.
    """
    if len(dsc) != len(nsd) or len(dsc) < CLICKS:
        raise ValueError(f"needs the scores of at least {CLICKS} calls, got {len(dsc)} Dice and {len(nsd)} NSD")
    return {
        "dsc_auc": float(np.trapezoid(dsc[-CLICKS:])),
        "nsd_auc": float(np.trapezoid(nsd[-CLICKS:])),
        "dsc_final": float(dsc[-1]),
        "nsd_final": float(nsd[-1]),
    }


# ---- instances ----


def instance_scores(truth_DHW: np.ndarray, mask_DHW: np.ndarray) -> dict[str, float]:
    """Match the instances of an answer with those of the truth, one to one.

    As many pairs as possible that overlap with an intersection over union of at least `LEAST_IOU`.

    Args:
        truth_DHW: Whole numbers, a value for each instance; 0 outside.
        mask_DHW: The same for the answer. An answer of a single value is split into its parts, connected by faces.

    Returns:
        tp, fp and fn, the numbers of pairs, of other instances of the answer and of other instances of the truth; f1;
        dsc_tp, the mean Dice of the pairs. As in the challenge all are 0 for an empty answer, fn too.

    Raises:
        ValueError: The shapes differ.
    """
    if truth_DHW.shape != mask_DHW.shape:
        raise ValueError(f"truth and mask have the shapes {list(truth_DHW.shape)} and {list(mask_DHW.shape)}")
    truth_DHW, mask_DHW = np.asarray(truth_DHW), np.asarray(mask_DHW)
    if not mask_DHW.any():
        return {"tp": 0, "fp": 0, "fn": 0, "f1": 0.0, "dsc_tp": 0.0}
    within = box_slices(box_of((truth_DHW != 0) | (mask_DHW != 0)))
    shared_TM, truth_T, mask_M = _overlaps(truth_DHW[within], _instances(mask_DHW[within], bool(mask_DHW.all())))
    iou_TM = shared_TM / (truth_T[:, None] + mask_M - shared_TM)
    matches_TM = iou_TM >= LEAST_IOU
    # The number of matches counts first: all of the overlap together weighs less than one of them.
    costs_TM = -matches_TM.astype(float) - iou_TM / (2 * max(min(iou_TM.shape), 1))
    rows, columns = linear_sum_assignment(costs_TM)
    kept = matches_TM[rows, columns]
    rows, columns = rows[kept], columns[kept]
    pairs = len(rows)
    dice_P = 2 * shared_TM[rows, columns] / (truth_T[rows] + mask_M[columns])
    extra, missed = len(mask_M) - pairs, len(truth_T) - pairs
    f1 = 2 * pairs / (2 * pairs + extra + missed)
    return {"tp": pairs, "fp": extra, "fn": missed, "f1": f1, "dsc_tp": float(dice_P.mean()) if pairs else 0.0}


def instance_counts(truth_DHW: np.ndarray, mask_DHW: np.ndarray) -> dict[str, float]:
    """Score the parts of a bool mask, connected by faces, as instances.

    Args:
        truth_DHW: A value for each instance of the truth; bool: its parts are its instances.
        mask_DHW: bool.

    Returns:
        f1 and dsc_tp as `instance_scores`; missed and extra, the numbers of the truth's and of the answer's parts
        without a partner. Unlike there, all of the truth's parts are missed by an empty answer.
    """
    parts_DHW = ndimage.label(truth_DHW, FACE_NEIGHBOURS)[0] if truth_DHW.dtype == bool else truth_DHW
    parts = np.count_nonzero(np.unique(parts_DHW))
    found = instance_scores(parts_DHW, np.asarray(mask_DHW, np.uint8))
    return {"f1": found["f1"], "dsc_tp": found["dsc_tp"], "missed": parts - found["tp"], "extra": found["fp"]}


def _instances(mask_DHW: np.ndarray, filled: bool) -> np.ndarray:
    """A crop of the answer with a value for each instance: its own, or its parts if all of it has two values.

    `filled`: the answer has no background. Of two values 0 is then none, as in the challenge, and both have parts.
    """
    values = np.unique(mask_DHW)
    values = values[values != 0]
    if len(values) + (not filled) != 2:
        return mask_DHW
    parts_DHW = np.zeros(mask_DHW.shape, np.int64)
    for value in values:
        labels_DHW, _ = ndimage.label(mask_DHW == value, FACE_NEIGHBOURS)
        parts_DHW += np.where(labels_DHW > 0, labels_DHW + parts_DHW.max(), 0)
    return parts_DHW


def _overlaps(truth_DHW: np.ndarray, mask_DHW: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels that instances share (T,M), and voxels of each instance of the truth (T,) and of the answer (M,)."""
    (of_truth, truth_V), (of_mask, mask_V) = (_numbered(array) for array in (truth_DHW, mask_DHW))
    counts = np.bincount(truth_V * (of_mask + 1) + mask_V, minlength=(of_truth + 1) * (of_mask + 1))
    table = counts.reshape(of_truth + 1, of_mask + 1)
    return table[1:, 1:], table[1:].sum(axis=1), table[:, 1:].sum(axis=0)


def _numbered(array_DHW: np.ndarray) -> tuple[int, np.ndarray]:
    """The number of values other than 0, and each voxel's place among them (V,), 0 for 0 and from 1 on."""
    values, places_V = np.unique(array_DHW, return_inverse=True)
    number_of = np.cumsum(values != 0) * (values != 0)
    return int((values != 0).sum()), number_of[places_V.reshape(-1)]
