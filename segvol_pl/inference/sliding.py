"""Sliding-window segmentation of the complete volume at native resolution: the paper's comparison (Table 3).

1. Pad the volume at its far ends to at least one window, and cover it with MONAI's grid of overlapping windows.
2. Decode each window with the part of the prompt that lies inside it. A window that a spatial prompt does not touch is
   skipped; voxels that only such windows cover are outside the mask.
3. Average the windows' logits where they overlap, with equal weights or with more weight on the windows' middles.

Letters: B windows, T tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.data.utils import compute_importance_map, dense_patch_slices

from segvol_pl.config import SlidingConfig
from segvol_pl.imaging.box import Box
from segvol_pl.imaging.prompts import INSIDE, Prompt
from segvol_pl.imaging.transforms import Sliceable, crop
from segvol_pl.inference.window_prompts import clip_box, clip_landmarks, points_inside
from segvol_pl.inference.windows import Start
from segvol_pl.inference.zoom import Promptable

OUTSIDE_LOGIT = -100.0
"""Logit of voxels that no window covers: certainly outside, and finite."""

KEPT_BYTES = 400e6
"""Tokens that are kept for further prompts: of 64 windows at the published size."""


@dataclass(frozen=True, eq=False)
class SlidingResult:
    """Logits of one prompt, float32 on the volume's grid, and the number of windows decoded."""

    logits_DHW: np.ndarray
    windows: int


class Slider:
    """One volume and one model.

    Args:
        model: in eval mode.
        image_DHW: float32 in [0, 1], the body crop.
        config: overlap, blending and batch size.
    """

    def __init__(self, model: Promptable, image_DHW: Sliceable, config: SlidingConfig) -> None:
        self.model, self.image_DHW, self.config = model, image_DHW, config
        self.window_shape = tuple(int(size) for size in model.config.input_shape)
        self.starts = grid(image_DHW.shape, self.window_shape, config.overlap)
        self.weight_DHW = compute_importance_map(self.window_shape, mode=config.blend.value).numpy().astype(np.float32)
        self._tokens: dict[Start, torch.Tensor] = {}

    @torch.inference_mode()
    def segment(self, prompt: Prompt) -> SlidingResult:
        """Segment by a prompt, given in the volume's voxels."""
        windows = [(start, local) for start in self.starts if (local := within(prompt, start, self.window_shape))]
        total_DHW = np.zeros(self.image_DHW.shape, np.float32)
        weight_DHW = np.zeros(self.image_DHW.shape, np.float32)
        for first in range(0, len(windows), self.config.batch):
            batch = windows[first : first + self.config.batch]
            for (start, _), logits_DHW in zip(batch, self._decode(batch), strict=True):
                place, part = self._slices(start)
                total_DHW[place] += (logits_DHW * self.weight_DHW)[part]
                weight_DHW[place] += self.weight_DHW[part]
        outside_DHW = np.full(total_DHW.shape, OUTSIDE_LOGIT, np.float32)
        logits_DHW = np.divide(total_DHW, weight_DHW, out=outside_DHW, where=weight_DHW > 0)
        return SlidingResult(logits_DHW, len(windows))

    def _slices(self, start: Start) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the volume that a window covers, and the part of the window that covers it."""
        sizes = [
            min(size, extent - first)
            for first, size, extent in zip(start, self.window_shape, self.image_DHW.shape, strict=True)
        ]
        place = tuple(slice(first, first + size) for first, size in zip(start, sizes, strict=True))
        return place, tuple(slice(0, size) for size in sizes)

    def _decode(self, batch: list[tuple[Start, Prompt]]) -> np.ndarray:
        tokens_BTE = self._encoded([start for start, _ in batch])
        logits_BPDHW = self.model.decode(tokens_BTE, self.model.prompts([[local] for _, local in batch]))
        return logits_BPDHW[:, 0].float().cpu().numpy()

    def _encoded(self, starts: list[Start]) -> torch.Tensor:
        new = [start for start in starts if start not in self._tokens]
        fresh: dict[Start, torch.Tensor] = {}
        if new:
            windows = np.stack([crop(self.image_DHW, start, self.window_shape) for start in new])
            image_BCDHW = torch.from_numpy(windows[:, None]).to(next(self.model.parameters()).device)
            fresh = dict(zip(new, self.model.encode(image_BCDHW).split(1), strict=True))
        # A grid is walked in one order: keeping its first windows serves the next prompt, keeping its last would not.
        for start, tokens_BTE in fresh.items():
            if (len(self._tokens) + 1) * tokens_BTE.nbytes <= KEPT_BYTES:
                self._tokens[start] = tokens_BTE.clone()
        return torch.cat([fresh[start] if start in fresh else self._tokens[start] for start in starts])


def grid(shape: Sequence[int], window: Sequence[int], overlap: float) -> list[Start]:
    """First voxels of the windows that cover a volume of `shape`; 0 along axes shorter than the window."""
    padded = [max(extent, size) for extent, size in zip(shape, window, strict=True)]
    steps = [max(int(size * (1 - overlap)), 1) for size in window]
    starts = [tuple(int(part.start) for part in place) for place in dense_patch_slices(padded, window, steps)]
    return [(d, h, w) for d, h, w in starts]


def within(prompt: Prompt, start: Start, window: Sequence[int]) -> Prompt | None:
    """The part of a prompt in the window at `start`, in the window's voxels; None if the window is to be skipped.

    Text is kept. A box needs the windows that hold a part of it; points without a box those that hold a point inside
    the structure; landmarks alone need those that hold a part of the box around them.
    """
    box = None if prompt.box is None else clip_box(prompt.box, start, window)
    points_N3, labels_N = points_inside(prompt, start, window)
    if prompt.box is not None:
        needed = box is not None
    elif prompt.points_N3 is not None:
        needed = INSIDE in labels_N
    else:
        needed = not prompt.landmarks or clip_box(_around(prompt), start, window) is not None
    if not needed:
        return None
    prompt = replace(prompt, box=box, landmarks=clip_landmarks(prompt, start, window))
    if len(points_N3) == 0:
        return replace(prompt, points_N3=None, labels_N=None)
    return replace(prompt, points_N3=points_N3, labels_N=labels_N)


def _around(prompt: Prompt) -> Box:
    landmarks_M3 = np.concatenate(list(prompt.landmarks.values()))
    d0, h0, w0, d1, h1, w1 = (int(number) for number in (*landmarks_M3.min(axis=0), *landmarks_M3.max(axis=0)))
    return d0, h0, w0, d1, h1, w1
