"""Sample prompts from the ground truth, as precisely or as roughly as users place them.

1. `settings` lists what an evaluation compares: each mode with each prompt kind, box source and point source.
2. `split_components` splits a scattered structure into components, each with its own prompt.
3. `sample_prompt` makes the prompt of one component.

A sample depends only on the seeds (evaluation, case, category, component). So two settings differ by what they are, not
by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segvol_pl.config import CUSTOM, DrawConfig, EvaluateConfig, Slice, landmarks_in, named_parts, points_drawn
from segvol_pl.config.loader import custom_function
from segvol_pl.errors import SampleError
from segvol_pl.imaging.box import Box, box_of, box_slices, middle_slice, slice_box
from segvol_pl.imaging.prompts import INSIDE, Prompt, jitter_box, sample_landmarks, sample_points

POINTS_STREAM, BOX_STREAM, LANDMARKS_STREAM = 0, 2, 3
"""Last elements of the seeds, so that points, box and landmarks are independent. 1 is the zoom's."""

NEIGHBOURS = np.ones((3, 3, 3), bool)
"""26-connectivity of components."""


@dataclass(frozen=True)
class Setting:
    """One way to prompt the model: the part of a row's identity besides its case and category."""

    mode: str
    prompt: str
    """A combination, see config.COMBINATIONS."""
    box: str = ""
    """Source of its box; empty if it has none."""
    points: str = ""
    """Source of its points; empty if it has none."""

    def __str__(self) -> str:
        """As `zoom box(exact)+text`."""
        prompt, mode = self.named
        return f"{mode} {prompt}"

    @property
    def named(self) -> tuple[str, str]:
        """The prompt with its sources, as `box(exact)+text`, and the mode."""
        sourced = {"box": f"box({self.box})", "points": f"points({self.points})"}
        return "+".join(sourced.get(part, part) for part in named_parts(self.prompt)), self.mode

    @property
    def free_of_truth(self) -> bool:
        """Whether the prompt is independent of the truth."""
        return self.prompt == "text"

    @property
    def has_text(self) -> bool:
        """Whether the prompt names the category."""
        return "text" in named_parts(self.prompt)


def settings(config: EvaluateConfig) -> list[Setting]:
    """List the settings of an evaluation, in the order of the configuration."""
    return [
        Setting(mode.value, prompt, box, points)
        for mode in config.modes
        for prompt in config.prompts
        for box in (config.draw.boxes if "box" in named_parts(prompt) else [""])
        for points in (config.draw.points if "points" in named_parts(prompt) else [""])
    ]


def check_custom(config: EvaluateConfig) -> None:
    """Raise ConfigError if a custom function that samples prompts cannot be imported."""
    sources = {
        "draw.boxes": config.draw.boxes,
        "draw.points": config.draw.points,
        "prompts": landmarks_in(config.prompts),
    }
    for key, names in sources.items():
        for name in filter(CUSTOM.fullmatch, names):
            custom_function(name, key)


def split_components(truth_DHW: np.ndarray, setting: Setting, config: DrawConfig) -> list[np.ndarray]:
    """Split a bool mask into the masks that each get a prompt.

    Returns:
        With `config.components`, the connected components of at least `config.component_voxels` voxels, largest first
        (the largest alone if all are smaller); else the mask itself.
    """
    if setting.free_of_truth or not config.components:
        return [truth_DHW]
    labels_DHW, count = ndimage.label(truth_DHW, NEIGHBOURS)
    sizes = np.bincount(labels_DHW.reshape(-1))[1:]
    order = (np.argsort(-sizes, kind="stable") + 1).tolist()
    kept = [label for label in order if sizes[label - 1] >= config.component_voxels] or order[:1]
    return [labels_DHW == label for label in kept] if count > 1 else [truth_DHW]


def sample_prompt(
    setting: Setting,
    category: str,
    truth_DHW: np.ndarray,
    spacing: Sequence[float] | None,
    config: DrawConfig,
    seeds: Sequence[int],
) -> Prompt:
    """Sample the prompt of one mask.

    Args:
        setting: Kind and sources of the prompt.
        category: Its text, if the setting has one.
        truth_DHW: Bool mask; not read if the setting is free of truth.
        spacing: In mm along d, h, w; None if unknown.
        config: How to sample.
        seeds: Of the evaluation, case, category and component.

    Raises:
        SampleError: `config.depth` needs the spacing, which is None.
        ValueError: The mask is empty.
    """
    points_N3, labels_N, box = None, None, None
    if setting.points:
        points_N3, labels_N = _sample_points(setting.points, truth_DHW, spacing, config, seeds)
    if setting.box:
        box = _sample_box(setting.box, truth_DHW, spacing, config, seeds)
    landmarks = {
        name: sample_landmarks(name, truth_DHW, np.random.default_rng([*seeds, LANDMARKS_STREAM]), spacing)
        for name in landmarks_in([setting.prompt])
    }
    return Prompt(category if setting.has_text else None, points_N3, labels_N, box, landmarks)


def _sample_points(
    source: str, truth_DHW: np.ndarray, spacing: Sequence[float] | None, config: DrawConfig, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    if source == "centre":
        return deepest_voxel(truth_DHW, spacing)[None], np.array([INSIDE])
    rng = np.random.default_rng([*seeds, POINTS_STREAM])
    if not points_drawn(source):
        points_N3, labels_N = custom_function(source, "draw.points")(truth_DHW, spacing, rng)
        return points_N3, labels_N
    return sample_points(truth_DHW, rng, points_drawn(source), config.outside)


def deepest_voxel(mask_DHW: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
    """Find the voxel (d, h, w) of a bool mask farthest from its surface; unlike the centroid, it is always inside.

    Args:
        mask_DHW: Not empty.
        spacing: In mm along d, h, w; None treats voxels as cubes.

    Returns:
        The voxel, of shape (3,); the first of several.

    Raises:
        ValueError: The mask is empty.
    """
    box = box_of(mask_DHW)
    padded_DHW = np.pad(mask_DHW[box_slices(box)], 1)
    depth_DHW = ndimage.distance_transform_edt(padded_DHW, sampling=spacing)
    found_3 = np.array(np.unravel_index(int(depth_DHW.argmax()), depth_DHW.shape))
    place_3: np.ndarray = found_3 - 1 + np.array(box[:3])
    return place_3


def _sample_box(
    source: str,
    truth_DHW: np.ndarray,
    spacing: Sequence[float] | None,
    config: DrawConfig,
    seeds: Sequence[int],
) -> Box:
    if source == "exact":
        return box_of(truth_DHW)
    if source == "slice":
        return _slice_box(truth_DHW, spacing, config)
    rng = np.random.default_rng([*seeds, BOX_STREAM])
    if source == "jittered":
        return jitter_box(box_of(truth_DHW), truth_DHW.shape, config.jitter, rng)
    d0, h0, w0, d1, h1, w1 = custom_function(source, "draw.boxes")(truth_DHW, spacing, rng)
    return d0, h0, w0, d1, h1, w1


def _slice_box(mask_DHW: np.ndarray, spacing: Sequence[float] | None, config: DrawConfig) -> Box:
    """Make a box of a mask's extent on one axial slice, as deep as the mask or as `config.depth` (mm).

    Raises SampleError if `config.depth` needs the spacing, which is None.
    """
    largest = config.slice is Slice.largest
    at = int(mask_DHW.sum(axis=(1, 2)).argmax()) if largest else middle_slice(mask_DHW)
    d0, h0, w0, d1, h1, w1 = slice_box(mask_DHW, at)
    if config.depth:
        if spacing is None:
            raise SampleError("draw.depth needs the spacing, which is unknown: set draw.depth=0")
        reach = int(config.depth / spacing[0] / 2)
        d0, d1 = max(at - reach, 0), min(at + reach, len(mask_DHW) - 1)
    return d0, h0, w0, d1, h1, w1
