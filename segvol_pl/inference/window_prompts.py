"""A prompt on other grids than the one it was given on: scaled to the overview, or reflected into a zoom-in window.

1. `scale_prompt` brings it to a grid that spans the same extent: the model's input for the complete volume.
2. `reflect` makes the prompt of one window from the user's prompt and the coarse mask (paper Sec. 2.3).
3. `points_inside`, `clip_box` and `clip_landmarks` say what of it lies in a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from segvol_pl.imaging.box import Box, box_slices
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt, sample_points


def scale_prompt(prompt: Prompt, source: Sequence[int], target: Sequence[int]) -> Prompt:
    """The prompt on a grid of shape `target` that spans the same extent as its own grid of shape `source`."""
    points_N3 = prompt.points_N3 if prompt.points_N3 is None else _scale_points(prompt.points_N3, source, target)
    box = prompt.box if prompt.box is None else scale_box(prompt.box, source, target)
    landmarks = {name: _scale_points(landmarks_M3, source, target) for name, landmarks_M3 in prompt.landmarks.items()}
    return replace(prompt, points_N3=points_N3, box=box, landmarks=landmarks)


def _scale_points(points_N3: np.ndarray, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    return np.floor((points_N3 + 0.5) * np.divide(target, source)).astype(np.int64)


def scale_box(box: Box, source: Sequence[int], target: Sequence[int]) -> Box:
    """The box of the same solid after `resize_label` from shape `source` to `target`.

    A box thinner than a target voxel becomes the voxel that holds its middle.
    """
    lows, highs = [], []
    for low, high, old, new in zip(box[:3], box[3:], source, target, strict=True):
        first = math.ceil(low * new / old - 0.5)
        last = math.ceil((high + 1) * new / old - 0.5) - 1
        middle = int((low + high + 1) / 2 * new / old)
        lows.append(first if first <= last else middle)
        highs.append(last if first <= last else middle)
    return lows[0], lows[1], lows[2], highs[0], highs[1], highs[2]


def reflect(
    prompt: Prompt, coarse_DHW: np.ndarray, start: Sequence[int], points: int, rng: np.random.Generator
) -> Prompt | None:
    """The prompt of one window, in the window's voxels.

    Text is kept, and landmarks outside the window move to its edge. A box prompt becomes the part of the user's box
    inside the window. (The published code takes the coarse mask's box if the region is more than one window, and so
    repeats the mistakes of zooming out.) A points prompt keeps the user's points inside the window, and gets `points`
    more that are drawn from the coarse mask: where the user says that there is background, only from the half of it
    that is farther from there. (The published code forgets the points that say so. It adds the coarse mask's box, and
    so prompts by points, text and a box together, which no training combination does.)

    Args:
        prompt: in the volume's voxels.
        coarse_DHW: bool, the coarse mask inside the window.
        start: the window's first voxel.
        points: points to draw from the coarse mask for a points prompt.
        rng: draws them.

    Returns:
        None if the window is to be skipped: it holds neither a part of the coarse mask nor a user's point inside the
        structure, or lies outside the user's box and holds none of the user's points, or (with `points` 0) nothing of
        the prompt lies in it.
    """
    prompt = replace(prompt, landmarks=clip_landmarks(prompt, start, coarse_DHW.shape))
    points_N3, labels_N = points_inside(prompt, start, coarse_DHW.shape)
    if not coarse_DHW.any():
        return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=None) if INSIDE in labels_N else None
    box = clip_box(prompt.box, start, coarse_DHW.shape) if prompt.box is not None else None
    if prompt.box is not None and box is None and not len(points_N3):
        return None
    if prompt.points_N3 is None:
        return replace(prompt, box=box)
    background_N3 = points_N3[labels_N == OUTSIDE]
    if points and len(background_N3):
        coarse_DHW = _farther_half(coarse_DHW, background_N3)
    drawn_N3, drawn_N = sample_points(coarse_DHW, rng, positive=points, negative=0)
    points_N3, labels_N = np.concatenate([points_N3, drawn_N3]), np.concatenate([labels_N, drawn_N])
    if len(points_N3):
        return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=box)
    has_other_parts = prompt.text is not None or box is not None or prompt.landmarks
    return replace(prompt, points_N3=None, labels_N=None, box=box) if has_other_parts else None


def _farther_half(mask_DHW: np.ndarray, points_N3: np.ndarray) -> np.ndarray:
    """The half of a mask's voxels that is farther, in voxels, from the nearest of the points. Not empty."""
    voxels_M3 = np.argwhere(mask_DHW)
    squared_M = np.min([((voxels_M3 - point_3) ** 2).sum(axis=1) for point_3 in points_N3], axis=0)
    half_DHW = np.zeros_like(mask_DHW)
    half_DHW[tuple(voxels_M3[squared_M >= np.median(squared_M)].T)] = True
    return half_DHW


def prompt_map(prompt: Prompt, shape: Sequence[int]) -> np.ndarray:
    """Bool (D,H,W) of `shape`: a spatial prompt's points inside the structure, or, if it has no points, its box."""
    covered_DHW = np.zeros(tuple(shape), bool)
    if prompt.points_N3 is not None:
        covered_DHW[tuple(prompt.points_N3[prompt.labels_N == INSIDE].T)] = True
    elif prompt.box is not None:
        covered_DHW[box_slices(prompt.box)] = True
    return covered_DHW


def points_inside(prompt: Prompt, start: Sequence[int], shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The points in the window of `shape` at `start`, (N,3) in its voxels, and their labels (N,). N may be 0."""
    if prompt.points_N3 is None or prompt.labels_N is None:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    local_N3 = np.asarray(prompt.points_N3, np.int64) - np.asarray(start)
    inside_N = ((local_N3 >= 0) & (local_N3 < shape)).all(axis=1)
    return local_N3[inside_N], np.asarray(prompt.labels_N, np.int64)[inside_N]


def clip_landmarks(prompt: Prompt, start: Sequence[int], shape: Sequence[int]) -> dict[str, np.ndarray]:
    """The landmarks in voxels of the window of `shape` at `start`. Those outside move to its edge."""
    last_3 = np.subtract(shape, 1)
    return {
        name: np.clip(landmarks_M3 - np.asarray(start), 0, last_3) for name, landmarks_M3 in prompt.landmarks.items()
    }


def clip_box(box: Box, start: Sequence[int], shape: Sequence[int]) -> Box | None:
    """The part of the box inside the window of `shape` at `start`, in the window's voxels. None if there is no part."""
    low_3 = np.maximum(np.subtract(box[:3], start), 0)
    high_3 = np.minimum(np.subtract(box[3:], start), np.subtract(shape, 1))
    if (low_3 > high_3).any():
        return None
    d0, h0, w0, d1, h1, w1 = (int(value) for value in (*low_3, *high_3))
    return d0, h0, w0, d1, h1, w1
