"""Prompts, which say which structure to segment, and how training samples them from a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from segvol_pl.config import SHIPPED_LANDMARKS
from segvol_pl.config.loader import custom_function
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.box import Box
from segvol_pl.imaging.masks import BoxedMask

INSIDE, OUTSIDE, PADDING = 1, 0, -1
"""Labels of points, as in the published model."""

ABSENT = -2
"""Label of an unused row of a points array: attention ignores it. (PADDING is a token, as published.)"""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Any combination of text, points, a box and landmarks, in voxels (d, h, w) of the array to segment.

    Args:
        text: category name, as in the text bank ("liver").
        points_N3: int, one (d, h, w) row per point.
        labels_N: int, one label per point: 1 inside the structure, 0 outside.
        box: `d0 h0 w0 d1 h1 w1`, inclusive maximum.
        landmarks: int (d, h, w) rows of each kind, by its name in the model's configuration: `line`, or a custom one.
        mask_DHW: float32 probabilities of a mask found before, on a grid of any shape that spans the array to segment.

    Raises:
        ValueError: nothing is given, shapes are wrong, or the box is inverted.
    """

    text: str | None = None
    points_N3: np.ndarray | None = None
    labels_N: np.ndarray | None = None
    box: Box | None = None
    landmarks: dict[str, np.ndarray] = field(default_factory=dict)
    mask_DHW: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.text is None and self.points_N3 is None and self.box is None and not self.landmarks:
            raise ValueError("a prompt needs at least one of text, points, box, landmarks")
        if self.points_N3 is not None:
            self._check_points(self.points_N3)
        if self.box is not None:
            self._check_box(self.box)

    def with_points(self, points_N3: np.ndarray, labels_N: np.ndarray) -> Prompt:
        """The same with further points, after those that it has."""
        if self.points_N3 is not None and self.labels_N is not None:
            points_N3 = np.concatenate([self.points_N3, points_N3])
            labels_N = np.concatenate([self.labels_N, labels_N])
        return replace(self, points_N3=points_N3, labels_N=labels_N)

    def _check_points(self, points_N3: np.ndarray) -> None:
        if points_N3.ndim != 2 or points_N3.shape[1] != 3 or len(points_N3) == 0:
            raise ValueError(f"points have shape {points_N3.shape}, expected (N, 3) with N >= 1")
        if self.labels_N is None or len(self.labels_N) != len(points_N3):
            raise ValueError("points need one label each: 1 inside, 0 outside")

    @staticmethod
    def _check_box(box: tuple[int, ...]) -> None:
        if len(box) != 6:
            raise ValueError(f"a box has 6 numbers d0 h0 w0 d1 h1 w1, got {len(box)}")
        if any(low > high for low, high in zip(box[:3], box[3:], strict=True)):
            raise ValueError(f"box {list(box)} is inverted: its minimum exceeds its maximum")


def sample_points(
    mask: BoxedMask | np.ndarray, rng: np.random.Generator, positive: int, negative: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw voxels inside and outside a mask, with replacement.

    Args:
        mask: a boxed mask, or a bool array (D,H,W).
        rng: draws them.
        positive: number of voxels inside.
        negative: number of voxels outside; none are drawn if the mask covers everything.

    Returns:
        points_N3 (int64) and labels_N (int64: 1 inside, 0 outside).

    Raises:
        ValueError: the mask is empty.
    """
    mask = mask if isinstance(mask, BoxedMask) else BoxedMask.of(mask)
    chosen = [mask.draw(rng, positive), mask.draw_outside(rng, negative)]
    labels_N = np.repeat([INSIDE, OUTSIDE], [len(part) for part in chosen])
    return np.concatenate(chosen), labels_N.astype(np.int64)


def landmark_function(name: str) -> Callable[..., Any]:
    """Import the function that marks a shipped or custom kind of landmarks. Raises ConfigError if it is not found."""
    _, function = SHIPPED_LANDMARKS.get(name, (0, name))
    return custom_function(function, "model.landmarks")


def sample_landmarks(
    name: str, mask_DHW: np.ndarray, rng: np.random.Generator, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """Place landmarks of a shipped or custom kind in a mask that is not empty.

    Args:
        name: as in the model's configuration.
        mask_DHW: bool.
        rng: draws what is drawn.
        spacing: mm along d, h, w, for shipped kinds, which measure in mm; None if unknown, as in training.

    Returns:
        int64 (M,3), one (d, h, w) row per landmark.

    Raises:
        ConfigError: there is no function of this name, or it returns an array of another shape.
    """
    given = (mask_DHW, rng, spacing) if name in SHIPPED_LANDMARKS else (mask_DHW, rng)
    landmarks_M3 = np.asarray(landmark_function(name)(*given))
    if landmarks_M3.ndim != 2 or landmarks_M3.shape[1] != 3:
        raise ConfigError(
            f"model.landmarks: {name} returned an array of shape {list(landmarks_M3.shape)}, not rows of d h w",
            "model.landmarks",
        )
    return landmarks_M3.astype(np.int64)


def ordered_line(line_23: np.ndarray) -> np.ndarray:
    """The ends (d, h, w) of a line in ascending order: a model has one embedding for the first, one for the second."""
    return line_23[np.lexsort(line_23.T[::-1])]


def gathered_landmarks(landmarks: dict[str, np.ndarray], counts: dict[str, int]) -> np.ndarray:
    """Put all kinds of landmarks that a model knows into one array, kind after kind.

    Args:
        landmarks: kind -> int (M,3).
        counts: kind -> number of landmarks, as the model is configured.

    Returns:
        int64 (M,3); zeros for missing kinds.

    Raises:
        ConfigError: the model does not know a kind, or knows another number of its landmarks.
    """
    for name, landmarks_M3 in landmarks.items():
        if name not in counts:
            known = ", ".join(counts) or "none"
            raise ConfigError(f"prompts: the model has no landmarks {name}; its model.landmarks: {known}", "prompts")
        if len(landmarks_M3) != counts[name]:
            raise ConfigError(
                f"model.landmarks: {name} has {len(landmarks_M3)} landmarks, not {counts[name]}", "model.landmarks"
            )
    rows = [landmarks.get(name, np.zeros((count, 3), np.int64)) for name, count in counts.items()]
    return np.concatenate([np.zeros((0, 3), np.int64), *rows])


def jitter_box(box: Box, shape: tuple[int, ...], share: float, rng: np.random.Generator) -> Box:
    """Move each face by up to `share` of the box's extent, but not out of `shape` (paper Sec. 2.2)."""
    low, high = np.array(box[:3]), np.array(box[3:])
    reach = share * (high - low + 1)
    moved = np.rint(rng.uniform(-1, 1, size=(2, 3)) * reach).astype(int)
    low = np.clip(low + moved[0], 0, np.array(shape) - 1)
    high = np.clip(high + moved[1], low, np.array(shape) - 1)
    d0, h0, w0, d1, h1, w1 = (int(value) for value in (*low, *high))
    return d0, h0, w0, d1, h1, w1
