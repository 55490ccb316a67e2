"""The published code's rules for zooming in, which the released weights were validated with.

Set by configs/zoom/published.yaml.

1. `published_region`: the coarse mask's box, grown to one window and cut off at the volume's border.
2. `published_windows`: a grid that begins where the region begins; windows see the region alone.
3. `published_reflections`: each window's prompt comes from the coarse mask and an enlarged map of the user's prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from segvol_pl.imaging.box import Box, box_of
from segvol_pl.imaging.prompts import PADDING, Prompt, sample_points
from segvol_pl.imaging.transforms import grid_starts
from segvol_pl.inference.coarse import enlarge
from segvol_pl.inference.window_prompts import clip_landmarks, prompt_map
from segvol_pl.inference.windows import Window

NOWHERE: Box = (-1, -1, -1, -1, -1, -1)
"""The published code's box of an empty mask."""


def published_region(mask_DHW: np.ndarray, window_shape: Sequence[int]) -> Box:
    """The mask's box, grown towards the size of one window and cut off at the volume's border."""
    box = box_of(mask_DHW)
    missing = [
        max(size - (high - low + 1), 0) // 2 for low, high, size in zip(box[:3], box[3:], window_shape, strict=True)
    ]
    d0, h0, w0 = (max(low - more, 0) for low, more in zip(box[:3], missing, strict=True))
    d1, h1, w1 = (
        min(high + more, extent - 1) for high, more, extent in zip(box[3:], missing, mask_DHW.shape, strict=True)
    )
    return d0, h0, w0, d1, h1, w1


def published_windows(box: Box, window_shape: Sequence[int], overlap: float) -> list[Window]:
    """The windows over the box, zero outside it. Along axes where the box is smaller than a window it is centred."""
    axes = []
    for low, high, size in zip(box[:3], box[3:], window_shape, strict=True):
        lacking = max(size - (high - low + 1), 0) // 2
        axes.append(grid_starts(low - lacking, high - low + 1, size, overlap))
    return [Window((d, h, w), box) for d, h, w in product(*axes)]


def published_reflections(
    prompt: Prompt,
    scaled: Prompt,
    mask_DHW: np.ndarray,
    windows: Sequence[Window],
    window_shape: Sequence[int],
    points: int,
    rng: np.random.Generator,
) -> Iterator[tuple[Window, Prompt]]:
    """Each window with its prompt; none is skipped.

    Args:
        prompt: in the volume's voxels. Text and landmarks come from it.
        scaled: the same in voxels of the model's input; its map is enlarged to the volume.
        mask_DHW: bool, the coarse mask on the volume's grid.
        windows: in the order in which their points are drawn.
        window_shape: voxels (d, h, w) of a window.
        points: points to draw in each window for a points prompt.
        rng: draws them.
    """
    covered_DHW = enlarge(prompt_map(scaled, window_shape), mask_DHW.shape)
    for window in windows:
        yield (
            window,
            _reflected(
                replace(prompt, landmarks=clip_landmarks(prompt, window.start, window_shape)),
                window.cut(mask_DHW, window_shape),
                window.cut(covered_DHW, window_shape),
                len(windows) == 1,
                points,
                rng,
            ),
        )


def _reflected(
    prompt: Prompt, coarse_DHW: np.ndarray, covered_DHW: np.ndarray, alone: bool, points: int, rng: np.random.Generator
) -> Prompt:
    """The prompt of one window, from coarse mask and prompt map inside it; `alone`: the region is one window.

    A box prompt becomes the box of the enlarged user's box if the region is one window, else that of the coarse mask. A
    points prompt becomes `points` points drawn from the enlarged user's points, and the coarse mask's box.
    """
    if prompt.points_N3 is None and prompt.box is None:
        return prompt
    boxed_DHW = covered_DHW if alone and prompt.points_N3 is None else coarse_DHW
    box = box_of(boxed_DHW) if boxed_DHW.any() else NOWHERE
    if prompt.points_N3 is None:
        return replace(prompt, box=box)
    if covered_DHW.any():
        points_N3, labels_N = sample_points(covered_DHW, rng, positive=points, negative=0)
    else:
        points_N3, labels_N = np.full((1, 3), -1), np.array([PADDING])
    return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=box)
