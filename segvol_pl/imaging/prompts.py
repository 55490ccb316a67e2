"""Prompts, which say what to segment, and drawing them from a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from segvol_pl.config.loader import custom_function
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.box import Box

INSIDE, OUTSIDE, PADDING = 1, 0, -1
"""Labels of points, as in the published model."""

ABSENT = -2
"""Label of an unused row in an array of points: attention leaves it out. (PADDING is a token, as published.)"""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Any of text, points, a box and landmarks, in voxels of the array that is segmented.

    Args:
        text: Category name, as in the text bank ("liver").
        points_N3: int, rows (d, h, w).
        labels_N: One for each point: 1 inside, 0 outside.
        box: `d0 h0 w0 d1 h1 w1`, inclusive maximum.
        landmarks: int, rows (d, h, w) for each of the user's own kinds, by their names in the model's configuration.

    Raises:
        ValueError: Nothing is given, a shape is wrong, or the box is inverted.
    """

    text: str | None = None
    points_N3: np.ndarray | None = None
    labels_N: np.ndarray | None = None
    box: Box | None = None
    landmarks: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is None and self.points_N3 is None and self.box is None and not self.landmarks:
            raise ValueError("a prompt needs at least one of text, points, box, landmarks")
        if self.points_N3 is not None:
            self._check_points(self.points_N3)
        if self.box is not None:
            self._check_box(self.box)

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
    mask_DHW: np.ndarray, rng: np.random.Generator, positive: int, negative: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw voxels inside and outside a mask, with replacement. A mask without an outside gets no negative points.

    Args:
        mask_DHW: bool or labels; everything but 0 is inside.
        rng: Draws the points.
        positive: Points inside.
        negative: Points outside.

    Returns:
        points_N3 (int64) and labels_N (int64: 1 inside, 0 outside).

    Raises:
        ValueError: The mask is empty.
    """
    inside = np.flatnonzero(mask_DHW)
    if inside.size == 0:
        raise ValueError("points cannot be drawn from an empty mask")
    chosen = [rng.choice(inside, size=positive)]
    if inside.size < mask_DHW.size and negative > 0:
        chosen.append(_draw_outside(mask_DHW, rng, negative))
    labels_N = np.repeat([INSIDE, OUTSIDE][: len(chosen)], [len(part) for part in chosen])
    points_N3 = np.stack(np.unravel_index(np.concatenate(chosen), mask_DHW.shape), axis=1)
    return points_N3.astype(np.int64), labels_N.astype(np.int64)


def _draw_outside(mask_DHW: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    # Most voxels are outside, so rejection is far cheaper than listing every outside voxel.
    flat = mask_DHW.reshape(-1)
    drawn = rng.integers(flat.size, size=8 * count)
    outside = drawn[~flat[drawn].astype(bool)]
    return outside[:count] if outside.size >= count else rng.choice(np.flatnonzero(~flat.astype(bool)), size=count)


def sample_landmarks(name: str, mask_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Call the user's function on a mask that is not empty and return its voxels: int64, rows (d, h, w).

    Args:
        name: `package.module:function`.
        mask_DHW: The mask.
        rng: Passed to the function.

    Raises:
        ConfigError: There is no such function, or it returns something else.
    """
    landmarks_M3 = np.asarray(custom_function(name, "model.landmarks")(mask_DHW, rng))
    if landmarks_M3.ndim != 2 or landmarks_M3.shape[1] != 3:
        raise ConfigError(
            f"model.landmarks: {name} returned an array of shape {list(landmarks_M3.shape)}, not rows of d h w",
            "model.landmarks",
        )
    return landmarks_M3.astype(np.int64)


def gathered_landmarks(landmarks: dict[str, np.ndarray], counts: dict[str, int]) -> np.ndarray:
    """Gather a prompt's landmarks into one array (M,3), kind after kind, with zeros for missing kinds.

    Args:
        landmarks: Kind -> rows (d, h, w).
        counts: Kind -> number of its landmarks, for all kinds that the model knows.

    Raises:
        ConfigError: The model does not know a kind, or expects another number of it.
    """
    for name, landmarks_M3 in landmarks.items():
        if name not in counts:
            known = ", ".join(counts) or "none"
            raise ConfigError(f"prompts: the model has no landmarks {name}; its model.landmarks: {known}", "prompts")
        if len(landmarks_M3) != counts[name]:
            raise ConfigError(
                f"model.landmarks: {name} has {len(landmarks_M3)} voxels, not {counts[name]}", "model.landmarks"
            )
    rows = [landmarks.get(name, np.zeros((count, 3), np.int64)) for name, count in counts.items()]
    return np.concatenate([np.zeros((0, 3), np.int64), *rows])


def jitter_box(box: Box, shape: tuple[int, ...], share: float, rng: np.random.Generator) -> Box:
    """Move each face of a box by up to `share` of the box's extent, within a volume of `shape` (paper Sec. 2.2)."""
    low, high = np.array(box[:3]), np.array(box[3:])
    reach = share * (high - low + 1)
    moved = np.rint(rng.uniform(-1, 1, size=(2, 3)) * reach).astype(int)
    low = np.clip(low + moved[0], 0, np.array(shape) - 1)
    high = np.clip(high + moved[1], low, np.array(shape) - 1)
    d0, h0, w0, d1, h1, w1 = (int(value) for value in (*low, *high))
    return d0, h0, w0, d1, h1, w1
