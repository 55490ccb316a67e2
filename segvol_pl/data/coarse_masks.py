"""Simulated coarse masks: what zooming out finds of a structure, made from its true mask, for training zoom-in windows.

1. The window's true mask is averaged to the overview's voxels: thin structures become faint.
2. It is shifted, blurred and disturbed by smooth noise; sometimes a part is missing, or there is one too many.
3. A steep function of the result gives logits, which are interpolated to the decoder's resolution, as those of a
   zoom-out are.

How often and how strongly was chosen by comparison with real coarse masks, see `benchmarks/coarse_masks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from segvol_pl.imaging.transforms import resize_image

SHIFT = 0.5
"""Standard deviation of the shift along each axis (voxels of the overview)."""
BLUR = (0.3, 0.9)
"""Range of the blur's standard deviation (voxels of the overview)."""
LEVEL = (0.3, 0.65)
"""Range of the share above which a blurred voxel is inside: low levels make the mask too large, high ones too small."""
NOISE = 0.25
"""Highest standard deviation of the smooth noise, as a share."""
STEEPNESS = (6.0, 16.0)
"""Range of logits per share."""
MISSING, SPILLED = 0.15, 0.15
"""Probability that a part of the structure is missing, and that a part of its surroundings is inside."""
RADIUS = (1.0, 3.0)
"""Range of such a part's radius (voxels of the overview)."""


def simulated_coarse(
    mask_DHW: np.ndarray, step_3: Sequence[float], shape: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """Simulate the probabilities that zooming out would give in a window.

    Args:
        mask_DHW: bool, the true mask in the window.
        step_3: voxels of the window per voxel of the overview along (d, h, w); at least 1.
        shape: of the result, over the same extent.
        rng: the sample's own.

    Returns:
        float32 (D,H,W) of `shape`.
    """
    cells = [max(1, round(size / step)) for size, step in zip(mask_DHW.shape, step_3, strict=True)]
    share_DHW = resize_image(mask_DHW, cells)
    share_DHW = ndimage.shift(share_DHW, rng.normal(0, SHIFT, 3), order=1, mode="nearest")
    missing, spilled = rng.random(2) < (MISSING, SPILLED)
    if missing:
        share_DHW *= 1 - _bump(share_DHW, rng)
    if spilled:
        share_DHW = np.maximum(share_DHW, _bump(ndimage.grey_dilation(share_DHW, 3), rng))
    share_DHW = ndimage.gaussian_filter(share_DHW, rng.uniform(*BLUR), mode="nearest")
    noise_DHW = ndimage.gaussian_filter(rng.standard_normal(cells, dtype=np.float32), 1.0, mode="nearest")
    share_DHW += noise_DHW * (rng.uniform(0, NOISE) / max(float(noise_DHW.std()), 1e-6))
    logits_DHW = (share_DHW - rng.uniform(*LEVEL)) * rng.uniform(*STEEPNESS)
    simulated_DHW: np.ndarray = (1 / (1 + np.exp(-resize_image(logits_DHW, shape)))).astype(np.float32)
    return simulated_DHW


def _bump(near_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth part around a random voxel, drawn in proportion to `near_DHW`; 1 at its middle."""
    weights = np.maximum(near_DHW, 0).ravel().astype(np.float64)
    total = weights.sum()
    centre = rng.choice(weights.size, p=weights / total if total > 0 else None)
    middle = np.unravel_index(centre, near_DHW.shape)
    grids = np.meshgrid(*(np.arange(size) for size in near_DHW.shape), indexing="ij", sparse=True)
    squared = sum(np.square(grid - at) for grid, at in zip(grids, middle, strict=True))
    bump_DHW: np.ndarray = np.exp(-squared / (2 * rng.uniform(*RADIUS) ** 2)).astype(np.float32)
    return bump_DHW
