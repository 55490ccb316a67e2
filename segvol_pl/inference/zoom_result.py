"""What zooming in gives: the sum of the windows' logits over the region of interest, and the result made of it.

1. `ZoomIn` holds one prompt's windows and sums their logits while they are decoded.
2. `ZoomIn.result` averages them; what no window covered keeps its coarse logits.
3. `ZoomResult` pastes them over the coarse logits when a mask or logits are read.

On a GPU the sum stays there. Boxes are inclusive, voxels are (d, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from segvol_pl.imaging.box import Box, box_slices, whole_box
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.coarse import BaseLogits, binary
from segvol_pl.inference.gpu_memory import send
from segvol_pl.inference.windows import Window

INDEXED_AT_ONCE = 2**22
"""Voxels that are indexed by a mask at once: the list of those inside takes up to 8 bytes each."""


@dataclass(frozen=True, eq=False)
class ZoomResult:
    """The result of one prompt: float32 logits and masks on the volume's grid."""

    base: BaseLogits
    """What zooming in started from: the zoom-out, or the mask to refine."""
    roi: Box | None
    """Region of interest: what zooming in may change, see `region_of`. None: the coarse mask is empty."""
    patch_DHW: torch.Tensor
    """Final logits of the region of interest, on the device where they were summed."""
    windows: int
    """Windows decoded in the zoom-in."""

    @cached_property
    def coarse_DHW(self) -> np.ndarray:
        """The zoom-out's logits of the volume, computed at the first call. `coarse_mask` needs far less memory."""
        return self.base.logits(whole_box(self.base.shape))

    @cached_property
    def final_DHW(self) -> np.ndarray:
        """The zoom-in's logits pasted over the zoom-out's, computed at the first call."""
        if self.roi is None:
            return self.coarse_DHW
        final_DHW = self.coarse_DHW.copy()
        final_DHW[box_slices(self.roi)] = self.patch_DHW.numpy(force=True)
        return final_DHW

    def coarse_mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W) of the zoom-out. threshold: a probability."""
        return self.base.mask(threshold)

    def mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W). Give the threshold of the configuration: then nothing lies outside the region."""
        mask_DHW = np.zeros(self.base.shape, bool)
        if self.roi is not None:
            mask_DHW[box_slices(self.roi)] = binary(self.patch_DHW, threshold).numpy(force=True)
        return mask_DHW

    def found(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """What is inside the mask; only that is copied from a GPU.

        Returns:
            The bool mask of the region of interest, and the logits of the voxels inside it, in the mask's order.
        """
        mask_DHW = binary(self.patch_DHW, threshold)
        flat_logits, flat_mask = self.patch_DHW.flatten(), mask_DHW.flatten()
        parts = zip(flat_logits.split(INDEXED_AT_ONCE), flat_mask.split(INDEXED_AT_ONCE), strict=True)
        inside_N = torch.cat([logits_N[inside_N] for logits_N, inside_N in parts])
        return mask_DHW.numpy(force=True), inside_N.numpy(force=True)


@dataclass(frozen=True, eq=False)
class ZoomIn:
    """One prompt's zoom-in: the windows to decode, and the sum of those decoded so far."""

    base: BaseLogits
    roi: Box | None
    windows: list[tuple[Window, Prompt]]
    """Each with the prompt that is reflected into it."""
    window_shape: tuple[int, ...]
    total_DHW: torch.Tensor
    """Over the region of interest."""
    mix: float = 0.0
    """Weight of the coarse logits, relative to the windows' mean."""

    def add(self, window: Window, logits_DHW: torch.Tensor) -> None:
        """Add the logits of one window."""
        assert self.roi is not None
        inside_DHW = logits_DHW[window.slices(self.window_shape, self.roi, window.start)]
        place = window.slices(self.window_shape, self.roi, self.roi[:3])
        self.total_DHW[place].add_(inside_DHW.to(self.total_DHW.device))

    def result(self) -> ZoomResult:
        """The windows' mean, mixed with the coarse logits. Voxels that no window covers keep their coarse logits."""
        if self.roi is not None:
            self._average(self.roi)
        return ZoomResult(self.base, self.roi, self.total_DHW, len(self.windows))

    def _average(self, roi: Box) -> None:
        d, h, w = roi[:3]
        for slab, count_HW in self._covered(roi):
            part_DHW, number_HW = self.total_DHW[slab], send(count_HW, self.total_DHW.device)
            if self.mix or not count_HW.all():
                box = (d + slab.start, h, w, d + slab.stop - 1, *roi[4:])
                coarse_DHW = send(self.base.logits(box), number_HW.device)
                torch.where(number_HW == 0, coarse_DHW, part_DHW, out=part_DHW)
            if count_HW.max() > 1:
                part_DHW.div_(number_HW.clamp_(min=1))
            if self.mix:
                part_DHW.lerp_(coarse_DHW, self.mix / (1 + self.mix))

    def _covered(self, roi: Box) -> Iterator[tuple[slice, np.ndarray]]:
        """Slabs of the region, none deeper than a window, and how many windows cover each voxel (H,W) of their slices.

        The number is the same between two faces of windows, so it is counted once there, not for every voxel.
        """
        places = [window.slices(self.window_shape, roi, roi[:3]) for window, _ in self.windows]
        faces = [
            np.unique([0, size, *(face for place in places for face in (place[axis].start, place[axis].stop))])
            for axis, size in enumerate(self.total_DHW.shape)
        ]
        faces[0] = np.union1d(faces[0], np.arange(0, len(self.total_DHW), self.window_shape[0]))
        count_DHW = np.zeros([len(axis) - 1 for axis in faces], np.float32)
        for place in places:
            within = zip(faces, place, strict=True)
            count_DHW[tuple(slice(*np.searchsorted(axis, (cut.start, cut.stop))) for axis, cut in within)] += 1
        high, wide = (np.diff(axis) for axis in faces[1:])
        for (first, stop), count_HW in zip(pairwise(faces[0].tolist()), count_DHW, strict=True):
            yield slice(first, stop), count_HW.repeat(high, axis=0).repeat(wide, axis=1)
