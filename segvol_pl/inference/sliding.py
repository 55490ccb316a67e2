"""Segmentation by windows over the whole volume at native resolution: the paper's comparison (Table 3).

1. The volume is padded at its far ends to one window at least, and covered by a grid of overlapping windows (MONAI's).
2. Each window is asked with what of the prompt lies inside it. A window that a spatial prompt does not touch is not
   asked and says nothing: what only such windows see is outside the mask.
3. The windows' logits are averaged where they overlap, alike or weighted towards their middles.

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
from segvol_pl.inference.zoom import Promptable, Start, clip_box, clip_landmarks, points_inside

OUTSIDE_LOGIT = -100.0
"""Of voxels that no window saw: surely not inside, and finite."""

KEPT_WINDOWS = 64
"""Windows whose tokens are kept for further prompts: about 400 MB at the published size."""


@dataclass(frozen=True, eq=False)
class SlidingResult:
    """Logits of one prompt on the volume's grid, float32, and how many windows were asked."""

    logits_DHW: np.ndarray
    windows: int


class Slider:
    """One volume before one model. image_DHW: in [0, 1], the body crop. The model is expected in eval mode."""

    def __init__(self, model: Promptable, image_DHW: Sliceable, config: SlidingConfig) -> None:
        self.model, self.image_DHW, self.config = model, image_DHW, config
        self.window = tuple(int(size) for size in model.config.input_shape)
        self.starts = grid(image_DHW.shape, self.window, config.overlap)
        self.weight_DHW = compute_importance_map(self.window, mode=config.blend.value).numpy().astype(np.float32)
        self._tokens: dict[Start, torch.Tensor] = {}

    @torch.inference_mode()
    def segment(self, prompt: Prompt) -> SlidingResult:
        """The logits of a prompt, given in the volume's voxels."""
        asked = [(start, local) for start in self.starts if (local := within(prompt, start, self.window))]
        total_DHW = np.zeros(self.image_DHW.shape, np.float32)
        weight_DHW = np.zeros(self.image_DHW.shape, np.float32)
        for first in range(0, len(asked), self.config.batch):
            batch = asked[first : first + self.config.batch]
            for (start, _), logits_DHW in zip(batch, self._decode(batch), strict=True):
                place, seen = self._slices(start)
                total_DHW[place] += (logits_DHW * self.weight_DHW)[seen]
                weight_DHW[place] += self.weight_DHW[seen]
        unseen_DHW = np.full(total_DHW.shape, OUTSIDE_LOGIT, np.float32)
        logits_DHW = np.divide(total_DHW, weight_DHW, out=unseen_DHW, where=weight_DHW > 0)
        return SlidingResult(logits_DHW, len(asked))

    def _slices(self, start: Start) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a window lies in the volume, and the part of it that does."""
        sizes = [
            min(size, extent - first)
            for first, size, extent in zip(start, self.window, self.image_DHW.shape, strict=True)
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
            windows = np.stack([crop(self.image_DHW, start, self.window) for start in new])
            image_BCDHW = torch.from_numpy(windows[:, None]).to(next(self.model.parameters()).device)
            fresh = dict(zip(new, self.model.encode(image_BCDHW).split(1), strict=True))
        # A grid is walked in one order: keeping its first windows serves the next prompt, keeping its last would not.
        self._tokens.update(list(fresh.items())[: max(KEPT_WINDOWS - len(self._tokens), 0)])
        return torch.cat([fresh[start] if start in fresh else self._tokens[start] for start in starts])


def grid(shape: Sequence[int], window: Sequence[int], overlap: float) -> list[Start]:
    """First voxels of the windows that cover a volume of `shape`; 0 along axes shorter than the window."""
    padded = [max(extent, size) for extent, size in zip(shape, window, strict=True)]
    steps = [max(int(size * (1 - overlap)), 1) for size in window]
    starts = [tuple(int(part.start) for part in place) for place in dense_patch_slices(padded, window, steps)]
    return [(d, h, w) for d, h, w in starts]


def within(prompt: Prompt, start: Start, window: Sequence[int]) -> Prompt | None:
    """What of a prompt lies in the window at `start`, in its voxels; None where the window is not to be asked.

    Text is kept. A spatial prompt asks the windows that hold a part of its box, or one of its points inside; landmarks
    alone those that hold a part of the box around them.
    """
    box = None if prompt.box is None else clip_box(prompt.box, start, window)
    points_N3, labels_N = points_inside(prompt, start, window)
    if prompt.box is not None:
        asked = box is not None
    elif prompt.points_N3 is not None:
        asked = INSIDE in labels_N
    else:
        asked = not prompt.landmarks or clip_box(_around(prompt), start, window) is not None
    if not asked:
        return None
    prompt = replace(prompt, box=box, landmarks=clip_landmarks(prompt, start, window))
    if len(points_N3) == 0:
        return replace(prompt, points_N3=None, labels_N=None)
    return replace(prompt, points_N3=points_N3, labels_N=labels_N)


def _around(prompt: Prompt) -> Box:
    landmarks_M3 = np.concatenate(list(prompt.landmarks.values()))
    d0, h0, w0, d1, h1, w1 = (int(number) for number in (*landmarks_M3.min(axis=0), *landmarks_M3.max(axis=0)))
    return d0, h0, w0, d1, h1, w1
