"""From a user's box, points and landmarks, in voxels or millimetres, to the voxels of the crop that the model sees.

1. `check_prompt` refuses what is wrong for every CT: an inverted box, an unknown label of a point, fractions of voxels.
2. `prompt_of` converts box and points to voxels of the CT, through its affine if they are in millimetres.
3. `into_crop` converts a prompt from the CT's voxels to those of the body crop, and refuses what lies outside the CT.

Letters: see data/schema.py; digits are extents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from segvol_pl.config import LINE, Coordinates, PredictConfig
from segvol_pl.errors import PromptError
from segvol_pl.imaging.box import Box
from segvol_pl.imaging.geometry import Volume, voxels_of, world_of
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt, ordered_line
from segvol_pl.inference.window_prompts import clip_box, clip_landmarks


def check_prompt(config: PredictConfig) -> None:
    """Check box, points and landmarks before the CT is read. Raises PromptError."""
    marked = [number for rows in config.landmark_rows.values() for row in rows for number in row]
    numbers = [*(config.box or []), *(number for row in config.points or [] for number in row)]
    for keys, held in (("box, points", numbers), ("line, landmarks", marked)):
        fractions = [number for number in held if number != int(number)]
        if config.coordinates is Coordinates.voxel and fractions:
            raise PromptError(
                f"{keys}: {fractions[0]} is not a whole number; for millimetres set coordinates=ras or coordinates=lps"
            )
    if config.box and any(low > high for low, high in zip(config.box[:3], config.box[3:], strict=True)):
        raise PromptError(f"box {config.box} is inverted: its minimum exceeds its maximum")
    if any(row[3] not in (INSIDE, OUTSIDE) for row in config.points or []):
        raise PromptError("points: the fourth number of each row must be 1 (inside) or 0 (outside)")


def prompt_of(config: PredictConfig, text: str | None, volume: Volume) -> Prompt:
    """The configuration's prompt, in the CT's voxels.

    Args:
        config: box, points and landmarks in its `coordinates`.
        text: the category, if one is prompted.
        volume: the CT.

    Raises:
        PromptError: box, points or landmarks are wrong, or lie outside the CT.
    """
    check_prompt(config)
    rows_N4 = None if config.points is None else np.array(config.points, float).reshape(-1, 4)
    points_N3 = None if rows_N4 is None else _point_voxels(rows_N4[:, :3], config.coordinates, volume)
    labels_N = None if rows_N4 is None else rows_N4[:, 3].astype(np.int64)
    box = None if config.box is None else _box_voxels(config.box, config.coordinates, volume)
    landmarks = {
        name: _point_voxels(np.array(rows, float), config.coordinates, volume)
        for name, rows in config.landmark_rows.items()
    }
    if LINE in landmarks:
        landmarks[LINE] = ordered_line(landmarks[LINE])
    return Prompt(text=text, points_N3=points_N3, labels_N=labels_N, box=box, landmarks=landmarks)


def _point_voxels(given_N3: np.ndarray, coordinates: Coordinates, volume: Volume) -> np.ndarray:
    if coordinates is Coordinates.voxel:
        return given_N3.astype(np.int64)
    lps = coordinates is Coordinates.lps
    voxels_N3: np.ndarray = np.rint(voxels_of(given_N3, volume, lps)).astype(np.int64)
    outside_N = ((voxels_N3 < 0) | (voxels_N3 >= volume.array_DHW.shape)).any(axis=1)
    if outside_N.any():
        point = given_N3[outside_N][0].tolist()
        raise PromptError(f"point {point} lies outside the CT, which spans {_span_text(volume, coordinates)}")
    return voxels_N3


def _box_voxels(given: Sequence[float], coordinates: Coordinates, volume: Volume) -> Box:
    """In a CT that is oblique to the millimetre axes: the box around the corners of the given one."""
    corners_23 = np.array(given, float).reshape(2, 3)
    if coordinates is not Coordinates.voxel:
        corners_83 = np.array(list(product(*corners_23.T)))
        placed_83 = np.rint(voxels_of(corners_83, volume, coordinates is Coordinates.lps))
        last_3 = np.subtract(volume.array_DHW.shape, 1)
        span_23 = _world_span(volume, coordinates)
        corners_23 = np.stack([placed_83.min(axis=0).clip(0), placed_83.max(axis=0).clip(None, last_3)])
        within = (span_23[0] <= given[:3]).all() and (span_23[1] >= given[3:]).all()
        if not within or (corners_23[0] > corners_23[1]).any():
            raise PromptError(
                f"box {list(given)} reaches outside the CT, which spans {_span_text(volume, coordinates)}"
            )
    d0, h0, w0, d1, h1, w1 = (int(number) for number in corners_23.reshape(-1))
    return d0, h0, w0, d1, h1, w1


def _world_span(volume: Volume, coordinates: Coordinates) -> np.ndarray:
    """Lowest and highest millimetres (2,3) of the CT, to the outer faces of its outermost voxels."""
    corners_83 = np.array(list(product(*((-0.5, size - 0.5) for size in volume.array_DHW.shape))))
    world_83 = world_of(corners_83, volume, coordinates is Coordinates.lps)
    return np.stack([world_83.min(axis=0), world_83.max(axis=0)])


def _span_text(volume: Volume, coordinates: Coordinates) -> str:
    low, high = (" ".join(f"{number:.1f}" for number in edge) for edge in _world_span(volume, coordinates))
    return f"{low} to {high} mm ({coordinates.value})"


def into_crop(prompt: Prompt, shape: Sequence[int], body: Box, refining: bool = False) -> Prompt:
    """Convert a prompt from the CT's voxels to those of the body crop.

    Box and landmarks are clipped to the crop; points outside it are left out.

    Args:
        prompt: in the CT's voxels.
        shape: voxels (d, h, w) of the CT.
        body: the crop, a box in the CT.
        refining: a mask is known, so all points may be outside the structure.

    Raises:
        PromptError: box, points or landmarks lie outside the CT, or no part of the box or points lies in the crop.
    """
    extent = [high - low + 1 for low, high in zip(body[:3], body[3:], strict=True)]
    box = None if prompt.box is None else _box_into_crop(prompt.box, shape, body, extent)
    for landmarks_M3 in prompt.landmarks.values():
        _check_points(landmarks_M3, shape)
    prompt = replace(prompt, landmarks=clip_landmarks(prompt, body[:3], extent))
    if prompt.points_N3 is None or prompt.labels_N is None:
        return replace(prompt, box=box)
    _check_points(prompt.points_N3, shape)
    local_N3, labels_N = prompt.points_N3 - np.array(body[:3]), np.asarray(prompt.labels_N)
    kept_N = ((local_N3 >= 0) & (local_N3 < extent)).all(axis=1)
    if not kept_N.any() or not (refining or (labels_N[kept_N] == INSIDE).any()):
        raise PromptError(
            f"points: none with label 1 lies inside the body {list(body)} of the CT of {list(shape)} voxels"
        )
    return replace(prompt, points_N3=local_N3[kept_N], labels_N=labels_N[kept_N], box=box)


def _box_into_crop(box: Box, shape: Sequence[int], body: Box, extent: Sequence[int]) -> Box:
    if any(low < 0 or high >= size for low, high, size in zip(box[:3], box[3:], shape, strict=True)):
        raise PromptError(f"box {list(box)} reaches outside the CT, whose voxels (d h w) are 0 0 0 to {_last(shape)}")
    local = clip_box(box, body[:3], extent)
    if local is None:
        raise PromptError(f"box {list(box)} lies in the air: the body of this CT is {list(body)}")
    return local


def _check_points(points_N3: np.ndarray, shape: Sequence[int]) -> None:
    outside_N = ((points_N3 < 0) | (points_N3 >= np.array(shape))).any(axis=1)
    if outside_N.any():
        point = points_N3[outside_N][0].tolist()
        raise PromptError(f"point {point} lies outside the CT, whose voxels (d h w) are 0 0 0 to {_last(shape)}")


def _last(shape: Sequence[int]) -> str:
    return " ".join(str(size - 1) for size in shape)
