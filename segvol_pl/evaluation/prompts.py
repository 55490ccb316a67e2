"""Prompts drawn from the truth, as well or as badly as users draw them.

1. `settings` lists what an evaluation asks for: each mode with each prompt kind, box source and point source.
2. `parts_of` splits a scattered target into the components that each get a prompt of their own.
3. `draw` makes the prompt of one part.

A draw depends on the seeds (evaluation, case, category, part) alone, so that settings are compared, not draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segvol_pl.config import CUSTOM, DrawConfig, EvaluateConfig, Slice, landmarks_in, named_parts, points_drawn
from segvol_pl.config.loader import custom_function
from segvol_pl.errors import SampleError
from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.prompts import INSIDE, Prompt, jitter_box, sample_landmarks, sample_points

POINTS_STREAM, BOX_STREAM, MARKS_STREAM = 0, 2, 3
"""Ends of the seeds: what is drawn for one does not move the other. 1 is the zoom's."""

NEIGHBOURS = np.ones((3, 3, 3), bool)


@dataclass(frozen=True)
class Setting:
    """One way of asking: what a row of the results is about, beside its case and category."""

    mode: str
    prompt: str
    """A combination, see config.COMBINATIONS."""
    box: str = ""
    """Where its box comes from; empty where it has none."""
    points: str = ""

    def __str__(self) -> str:
        """`zoom box(exact)+text`."""
        drawn, mode = self.named
        return f"{mode} {drawn}"

    @property
    def named(self) -> tuple[str, str]:
        """The prompt with where it came from, and the mode."""
        drawn = {"box": f"box({self.box})", "points": f"points({self.points})"}
        return "+".join(drawn.get(part, part) for part in named_parts(self.prompt)), self.mode

    @property
    def free_of_truth(self) -> bool:
        """Whether the prompt knows nothing of the truth."""
        return self.prompt == "text"

    @property
    def has_text(self) -> bool:
        """Whether its prompts name the category."""
        return "text" in named_parts(self.prompt)


def settings(config: EvaluateConfig) -> list[Setting]:
    """All of them, in the order of the configuration."""
    return [
        Setting(mode.value, prompt, box, points)
        for mode in config.modes
        for prompt in config.prompts
        for box in (config.draw.boxes if "box" in named_parts(prompt) else [""])
        for points in (config.draw.points if "points" in named_parts(prompt) else [""])
    ]


def check_custom(config: EvaluateConfig) -> None:
    """Raises ConfigError where a function of the user's own, which is to draw, is not found."""
    drawing = {
        "draw.boxes": config.draw.boxes,
        "draw.points": config.draw.points,
        "prompts": landmarks_in(config.prompts),
    }
    for key, names in drawing.items():
        for name in filter(CUSTOM.fullmatch, names):
            custom_function(name, key)


def parts_of(truth_DHW: np.ndarray, setting: Setting, config: DrawConfig) -> list[np.ndarray]:
    """The masks that each get a prompt: the truth, or its components from `component_voxels` on, largest first."""
    if setting.free_of_truth or not config.components:
        return [truth_DHW]
    labels_DHW, count = ndimage.label(truth_DHW, NEIGHBOURS)
    sizes = np.bincount(labels_DHW.reshape(-1))[1:]
    order = (np.argsort(-sizes, kind="stable") + 1).tolist()
    kept = [label for label in order if sizes[label - 1] >= config.component_voxels] or order[:1]
    return [labels_DHW == label for label in kept] if count > 1 else [truth_DHW]


def draw(
    setting: Setting,
    category: str,
    truth_DHW: np.ndarray,
    spacing: Sequence[float] | None,
    config: DrawConfig,
    seeds: Sequence[int],
) -> Prompt:
    """The prompt of a mask, which a setting free of truth does not look at.

    spacing: mm along d, h, w. Raises SampleError where `config.depth` needs it and it is None, ValueError for an empty
    mask.
    """
    points_N3, labels_N, box = None, None, None
    if setting.points:
        points_N3, labels_N = _points(setting.points, truth_DHW, spacing, config, seeds)
    if setting.box:
        box = _box(setting.box, truth_DHW, spacing, config, seeds)
    landmarks = {
        name: sample_landmarks(name, truth_DHW, np.random.default_rng([*seeds, MARKS_STREAM]))
        for name in landmarks_in([setting.prompt])
    }
    return Prompt(category if setting.has_text else None, points_N3, labels_N, box, landmarks)


def _points(
    source: str, truth_DHW: np.ndarray, spacing: Sequence[float] | None, config: DrawConfig, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    if source == "centre":
        return deepest(truth_DHW, spacing)[None], np.array([INSIDE])
    rng = np.random.default_rng([*seeds, POINTS_STREAM])
    if not points_drawn(source):
        points_N3, labels_N = custom_function(source, "draw.points")(truth_DHW, spacing, rng)
        return points_N3, labels_N
    return sample_points(truth_DHW, rng, points_drawn(source), config.outside)


def deepest(mask_DHW: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """The voxel (d, h, w) of a mask farthest from its surface: unlike the centroid it is inside. Of several the first.

    Without a spacing voxels count as cubes. Raises ValueError for an empty mask.
    """
    box = box_of(mask_DHW)
    padded_DHW = np.pad(mask_DHW[box_slices(box)], 1)
    depth_DHW = ndimage.distance_transform_edt(padded_DHW, sampling=spacing)
    found_3 = np.array(np.unravel_index(int(depth_DHW.argmax()), depth_DHW.shape))
    return found_3 - 1 + np.array(box[:3])


def _box(
    source: str,
    truth_DHW: np.ndarray,
    spacing: Sequence[float] | None,
    config: DrawConfig,
    seeds: Sequence[int],
) -> Box:
    if source == "exact":
        return box_of(truth_DHW)
    if source == "slice":
        return slice_box(truth_DHW, spacing, config)
    rng = np.random.default_rng([*seeds, BOX_STREAM])
    if source == "jittered":
        return jitter_box(box_of(truth_DHW), truth_DHW.shape, config.jitter, rng)
    d0, h0, w0, d1, h1, w1 = custom_function(source, "draw.boxes")(truth_DHW, spacing, rng)
    return d0, h0, w0, d1, h1, w1


def slice_box(mask_DHW: np.ndarray, spacing: Sequence[float] | None, config: DrawConfig) -> Box:
    """The box of a mask's extent on one axial slice, as deep as the mask or as `config.depth` says."""
    d0, _, _, d1, _, _ = box_of(mask_DHW)
    areas_D = mask_DHW.reshape(len(mask_DHW), -1).sum(axis=1)
    spanned = np.flatnonzero(areas_D)
    at = int(areas_D.argmax()) if config.slice is Slice.largest else int(spanned[len(spanned) // 2])
    _, h0, w0, _, h1, w1 = box_of(mask_DHW[at : at + 1])
    if config.depth:
        if spacing is None:
            raise SampleError("its spacing is unknown, which draw.depth needs: use draw.depth=0")
        reach = int(config.depth / spacing[0] / 2)
        d0, d1 = max(at - reach, 0), min(at + reach, len(mask_DHW) - 1)
    return d0, h0, w0, d1, h1, w1
