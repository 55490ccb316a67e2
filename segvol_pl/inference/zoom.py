"""Zoom-out-zoom-in over a promptable model (paper Sec. 2.3). Knows no files and no checkpoints.

1. Zoom out: the whole volume is shrunk to the model's input, the prompt's coordinates with it; the logits stand for the
   volume's grid, and are brought there where they are needed.
2. Zoom in: windows of the model's input shape lie on one grid over the volume at native resolution, so that prompts
   share them; those that the region of interest needs are looked at. The prompt is reflected into each of them from the
   user's prompt and the coarse mask.
3. The windows' logits, averaged where they overlap, are pasted over the coarse logits of that region.
4. Many prompts are answered at once: each window is encoded once for all of them, and its tokens are kept as long as
   there is room.
5. On a GPU the logits stay there: they are summed and thresholded where they come up. The host waits for the coarse
   logits, by which windows are chosen, and for what is asked of the result: a mask, the logits inside it. Between the
   two it only gives work.
6. To refine, the mask found before takes the place of the coarse mask.

`config.interpolation`, `grid` and `reflection` say how each of these is done; set to `published` they give what the
released weights were validated with (configs/zoom/published.yaml).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Any, Protocol

import numpy as np
import torch

from segvol_pl.config import Convention, ZoomConfig
from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.prompts import INSIDE, PADDING, Prompt, sample_points
from segvol_pl.imaging.transforms import Sliceable, resize_image, resize_label
from segvol_pl.inference.coarse import Certain, Coarse, Ground, binary, enlarge
from segvol_pl.inference.token_cache import TokenStore

__all__ = ["Promptable", "Prompted", "ZoomResult", "Zoomer", "binary", "scale_prompt", "zoom"]

log = logging.getLogger(__name__)

Start = tuple[int, int, int]
"""First voxel (d, h, w) of a window."""

NOWHERE: Box = (-1, -1, -1, -1, -1, -1)
"""What the published code gives as the box of an empty mask."""

GIGABYTE = 1e9

VOXEL = 5
"""Bytes of a voxel of a region of interest: its logit and whether it is inside."""

TOGETHER = 2**27
"""Voxels of regions of interest beyond which no more prompts are worked on at once: 0.7 GB."""

LISTED = 2**22
"""Voxels of which those inside are listed at once: the list takes up to 8 bytes each."""

Progress = Callable[[int, int], None]
"""Told the windows decoded (on a GPU: given to it) and those to be decoded, of the prompts worked on at once."""


class Promptable(Protocol):
    """What zooming needs of a model; SegVol satisfies it."""

    config: Any
    """Holds `input_shape`, the voxels (d, h, w) that the model sees."""

    def encode(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        """tokens_BTE of images (B, 1, *config.input_shape) in [0, 1]."""

    def decode(self, tokens_BTE: torch.Tensor, prompts: Any) -> torch.Tensor:
        """logits_BPDHW at the input's resolution, of what `prompts` gave."""

    def prompts(self, prompts: list[list[Prompt]]) -> Any:
        """What `decode` takes, of a list of prompts for each image, in voxels of the model's input."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The first of them tells the device."""


@dataclass(frozen=True, eq=False)
class ZoomResult:
    """What one prompt gave, as float32 logits and as masks, on the volume's grid."""

    ground: Ground
    """Zoom-out; in refining, the mask found before."""
    roi: Box | None
    """Region of interest, inclusive: what zooming in may change, see `region_of`; None: the coarse mask is empty."""
    patch_DHW: torch.Tensor
    """Final logits of the region of interest, where they were summed: on the GPU where there is one with room."""
    windows: int
    """Windows decoded in the zoom-in."""

    @cached_property
    def coarse_DHW(self) -> np.ndarray:
        """Zoom-out's logits of the whole volume, worked out at the first call. `coarse_mask` needs far less memory."""
        return self.ground.logits(_whole(self.ground.shape))

    @cached_property
    def final_DHW(self) -> np.ndarray:
        """Zoom-in pasted over zoom-out, likewise; the zoom-out logits themselves where the coarse mask is empty."""
        if self.roi is None:
            return self.coarse_DHW
        final_DHW = self.coarse_DHW.copy()
        final_DHW[box_slices(self.roi)] = self.patch_DHW.numpy(force=True)
        return final_DHW

    def coarse_mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W) of zoom-out."""
        return self.ground.mask(threshold)

    def mask(self, threshold: float) -> np.ndarray:
        """Bool mask (D,H,W), the threshold being the one that was zoomed with: nothing lies outside of the region."""
        mask_DHW = np.zeros(self.ground.shape, bool)
        if self.roi is not None:
            mask_DHW[box_slices(self.roi)] = binary(self.patch_DHW, threshold).numpy(force=True)
        return mask_DHW

    def found(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """Bool mask of the region of interest, and the logits inside it in the mask's order; no others are fetched."""
        mask_DHW = binary(self.patch_DHW, threshold)
        parts = zip(self.patch_DHW.flatten().split(LISTED), mask_DHW.flatten().split(LISTED), strict=True)
        inside_N = torch.cat([logits_N[inside_N] for logits_N, inside_N in parts])
        return mask_DHW.numpy(force=True), inside_N.numpy(force=True)


@dataclass(frozen=True, eq=False)
class Prompted:
    """A prompt to be answered."""

    prompt: Prompt
    """In the volume's voxels."""
    shrunk: Prompt
    """The same in voxels of the model's input: all that published reflection reads."""
    rng: np.random.Generator
    """Draws the windows' points."""


@dataclass(frozen=True)
class Tile:
    """A zoom-in window: its first voxel, negative where it is padded in front, and the voxels that it may see."""

    start: Start
    bound: Box

    def slices(self, window: Sequence[int], box: Box, origin: Sequence[int]) -> tuple[slice, ...]:
        """The part of the window inside the box, in voxels counted from `origin`."""
        return tuple(
            slice(max(first, low) - base, min(first + size, high + 1) - base)
            for first, size, low, high, base in zip(self.start, window, box[:3], box[3:], origin, strict=True)
        )

    def cut(self, array_DHW: Sliceable, window: Sequence[int]) -> np.ndarray:
        """The window of a volume, to be read alone; zero outside the bound."""
        seen_DHW = array_DHW[self.slices(window, self.bound, (0, 0, 0))]
        if seen_DHW.shape == tuple(window):
            return seen_DHW
        tile_DHW = np.zeros(tuple(window), array_DHW.dtype)
        tile_DHW[self.slices(window, self.bound, self.start)] = seen_DHW
        return tile_DHW


def _whole(shape: Sequence[int]) -> Box:
    d, h, w = shape
    return 0, 0, 0, d - 1, h - 1, w - 1


def scale_prompt(prompt: Prompt, source: Sequence[int], target: Sequence[int]) -> Prompt:
    """The prompt on a grid of shape `target` that spans the same extent as its grid of shape `source`."""
    points_N3 = prompt.points_N3 if prompt.points_N3 is None else _scale_points(prompt.points_N3, source, target)
    box = prompt.box if prompt.box is None else scale_box(prompt.box, source, target)
    landmarks = {name: _scale_points(landmarks_M3, source, target) for name, landmarks_M3 in prompt.landmarks.items()}
    return replace(prompt, points_N3=points_N3, box=box, landmarks=landmarks)


def _scale_points(points_N3: np.ndarray, source: Sequence[int], target: Sequence[int]) -> np.ndarray:
    ratio_3 = np.divide(target, source)
    return np.floor((points_N3 + 0.5) * ratio_3).astype(np.int64)


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


def cut_off_region(mask_DHW: np.ndarray, window: Sequence[int]) -> Box:
    """The published region of interest: the mask's box, grown towards one window and cut off at the volume's border."""
    box = box_of(mask_DHW)
    missing = [max(size - (high - low + 1), 0) // 2 for low, high, size in zip(box[:3], box[3:], window, strict=True)]
    d0, h0, w0 = (max(low - more, 0) for low, more in zip(box[:3], missing, strict=True))
    d1, h1, w1 = (
        min(high + more, extent - 1) for high, more, extent in zip(box[3:], missing, mask_DHW.shape, strict=True)
    )
    return d0, h0, w0, d1, h1, w1


def widened_box(mask_DHW: np.ndarray, window: Sequence[int], reach: float) -> Box:
    """Inclusive box of the mask and of `reach` overview voxels around, inside the volume.

    Raises ValueError for an empty mask.
    """
    box = box_of(mask_DHW)
    more = [math.ceil(reach * extent / size) for extent, size in _pairs(mask_DHW.shape, window)]
    d0, h0, w0 = (max(low - by, 0) for low, by in _pairs(box[:3], more))
    d1, h1, w1 = (min(high + by, size - 1) for high, by, size in zip(box[3:], more, mask_DHW.shape, strict=True))
    return d0, h0, w0, d1, h1, w1


def region_of(mask_DHW: np.ndarray, prompt: Prompt, window: Sequence[int], reach: float) -> Box:
    """What zooming in may change: the widened box of the coarse mask, and what the user's box and inner points reach.

    Windows see more than that.
    """
    boxes = [widened_box(mask_DHW, window, reach)]
    if prompt.box is not None and (said := clip_box(prompt.box, (0, 0, 0), mask_DHW.shape)) is not None:
        boxes.append(said)
    points_N3, labels_N = points_inside(prompt, (0, 0, 0), mask_DHW.shape)
    boxes += [(d, h, w, d, h, w) for d, h, w in points_N3[labels_N == INSIDE].tolist()]
    d0, h0, w0 = (min(box[axis] for box in boxes) for axis in range(3))
    d1, h1, w1 = (max(box[axis] for box in boxes) for axis in range(3, 6))
    return d0, h0, w0, d1, h1, w1


def _pairs(one: Sequence[int], other: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip(one, other, strict=True)


def tiles(box: Box, window: Sequence[int], shape: Sequence[int], config: ZoomConfig) -> list[Tile]:
    """The windows that cover the box, neighbours overlapping by at least the share `config.overlap`.

    They lie on one grid over the volume of `shape`, so that another box needs the same ones; as few as will do. Those
    of the published grid begin where the box begins, and see the box alone, in their middle where it is smaller than
    they are. The last window of either grid ends where that ends, as in MONAI's sliding window.
    """
    if config.grid is Convention.published:
        return _tiles_of(box, window, config.overlap)
    bound = _whole(shape)
    axes = [
        _covering(_starts(0, extent, size, config.overlap), size, low, high)
        for low, high, size, extent in zip(box[:3], box[3:], window, shape, strict=True)
    ]
    return [Tile((d, h, w), bound) for d, h, w in product(*axes)]


def _tiles_of(box: Box, window: Sequence[int], overlap: float) -> list[Tile]:
    axes = []
    for low, high, size in zip(box[:3], box[3:], window, strict=True):
        lacking = max(size - (high - low + 1), 0) // 2
        axes.append(_starts(low - lacking, high - low + 1, size, overlap))
    return [Tile((d, h, w), box) for d, h, w in product(*axes)]


def _covering(starts: list[int], size: int, low: int, high: int) -> list[int]:
    """The fewest neighbouring windows that hold `low` to `high`; of several single ones the one around its middle."""
    first = max(place for place, start in enumerate(starts) if start <= low)
    last = min((place for place, start in enumerate(starts) if start + size > high), default=len(starts) - 1)
    if last > first:
        return starts[first : last + 1]
    return [min(starts[last : first + 1], key=lambda start: abs(2 * start + size - low - high))]


def _starts(low: int, extent: int, size: int, overlap: float) -> list[int]:
    if extent <= size:
        return [low]
    step = max(int(size * (1 - overlap)), 1)
    count = math.ceil((extent - size) / step) + 1
    return [low + min(index * step, extent - size) for index in range(count)]


def _reflected_as_published(
    prompt: Prompt, coarse_DHW: np.ndarray, said_DHW: np.ndarray, alone: bool, points: int, rng: np.random.Generator
) -> Prompt:
    """The published prompt of one window: coarse mask and prompt map inside it; `alone`: it is the only window.

    A box prompt becomes the box of the enlarged user's box where the region is one window, else of the coarse mask. A
    points prompt becomes `points` drawn from the enlarged user's points, and the coarse mask's box.
    """
    if prompt.points_N3 is None and prompt.box is None:
        return prompt
    boxed_DHW = said_DHW if alone and prompt.points_N3 is None else coarse_DHW
    box = box_of(boxed_DHW) if boxed_DHW.any() else NOWHERE
    if prompt.points_N3 is None:
        return replace(prompt, box=box)
    if said_DHW.any():
        points_N3, labels_N = sample_points(said_DHW, rng, positive=points, negative=0)
    else:
        points_N3, labels_N = np.full((1, 3), -1), np.array([PADDING])
    return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=box)


def prompt_map(prompt: Prompt, shape: Sequence[int]) -> np.ndarray:
    """Bool, what a spatial prompt covers on a grid of `shape`: its points inside the structure, else its box."""
    said_DHW = np.zeros(tuple(shape), bool)
    if prompt.points_N3 is not None:
        said_DHW[tuple(prompt.points_N3[prompt.labels_N == INSIDE].T)] = True
    elif prompt.box is not None:
        said_DHW[box_slices(prompt.box)] = True
    return said_DHW


def reflect(
    prompt: Prompt, coarse_DHW: np.ndarray, start: Start, points: int, rng: np.random.Generator
) -> Prompt | None:
    """The prompt of one window, in the window's voxels; None where the window is to be skipped.

    coarse_DHW: bool, the coarse mask inside the window. Text is kept. A box prompt becomes the part
    of the user's box inside the window (the published code takes the coarse mask's box where the region is more than
    one window, and hands on its mistakes). A points prompt keeps the user's points that lie inside and gets `points`
    more, drawn from the coarse mask, and its box. Marks outside the window move to its edge. A window is skipped where
    it holds neither coarse mask nor a user's point inside the structure, or lies outside the user's box.
    """
    empty = not coarse_DHW.any()
    prompt = replace(prompt, landmarks=clip_landmarks(prompt, start, coarse_DHW.shape))
    points_N3, labels_N = points_inside(prompt, start, coarse_DHW.shape)
    if empty:
        return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=None) if INSIDE in labels_N else None
    box = clip_box(prompt.box, start, coarse_DHW.shape) if prompt.box is not None else None
    if prompt.box is not None and box is None:
        return None
    if prompt.points_N3 is None:
        return replace(prompt, box=box)
    drawn_N3, drawn_N = sample_points(coarse_DHW, rng, positive=points, negative=0)
    return replace(
        prompt,
        points_N3=np.concatenate([points_N3, drawn_N3]),
        labels_N=np.concatenate([labels_N, drawn_N]),
        box=box or box_of(coarse_DHW),
    )


def points_inside(prompt: Prompt, start: Start, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The points inside the window of `shape` at `start`, in its voxels, (N,3), and their labels; maybe none."""
    if prompt.points_N3 is None or prompt.labels_N is None:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    local_N3 = np.asarray(prompt.points_N3, np.int64) - start
    inside_N = ((local_N3 >= 0) & (local_N3 < shape)).all(axis=1)
    return local_N3[inside_N], np.asarray(prompt.labels_N, np.int64)[inside_N]


def clip_landmarks(prompt: Prompt, start: Sequence[int], shape: Sequence[int]) -> dict[str, np.ndarray]:
    """The landmarks in voxels of the window of `shape` at `start`; those outside move to its edge, as a box does."""
    last_3 = np.subtract(shape, 1)
    return {
        name: np.clip(landmarks_M3 - np.asarray(start), 0, last_3) for name, landmarks_M3 in prompt.landmarks.items()
    }


def clip_box(box: Box, start: Sequence[int], shape: Sequence[int]) -> Box | None:
    """The part of the box inside the window of `shape` at `start`, in the window's voxels; None where there is none."""
    low_3 = np.maximum(np.subtract(box[:3], start), 0)
    high_3 = np.minimum(np.subtract(box[3:], start), np.subtract(shape, 1))
    if (low_3 > high_3).any():
        return None
    d0, h0, w0, d1, h1, w1 = (int(value) for value in (*low_3, *high_3))
    return d0, h0, w0, d1, h1, w1


def room(device: torch.device) -> float:
    """Bytes that a GPU has left for tensors. Main memory is not asked: it has always room."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device; the way to a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True, eq=False)
class _Plan:
    """One prompt's zoom-in: the windows to decode, and the sum of what they gave so far."""

    ground: Ground
    roi: Box | None
    local: list[tuple[Tile, Prompt]]
    window: tuple[int, ...]
    total_DHW: torch.Tensor

    def add(self, tile: Tile, logits_DHW: torch.Tensor) -> None:
        """What one window gave."""
        assert self.roi is not None
        seen_DHW = logits_DHW[tile.slices(self.window, self.roi, tile.start)]
        self.total_DHW[tile.slices(self.window, self.roi, self.roi[:3])].add_(seen_DHW.to(self.total_DHW.device))

    def result(self) -> ZoomResult:
        """The windows' mean; what none of them covered keeps its coarse logits."""
        if self.roi is not None:
            self._average(self.roi)
        return ZoomResult(self.ground, self.roi, self.total_DHW, len(self.local))

    def _average(self, roi: Box) -> None:
        d, h, w = roi[:3]
        for deep, count_HW in self._covered(roi):
            part_DHW, many_HW = self.total_DHW[deep], _sent(count_HW, self.total_DHW.device)
            if not count_HW.all():
                below_DHW = self.ground.logits((d + deep.start, h, w, d + deep.stop - 1, *roi[4:]))
                torch.where(many_HW == 0, _sent(below_DHW, many_HW.device), part_DHW, out=part_DHW)
            if count_HW.max() > 1:
                part_DHW.div_(many_HW.clamp_(min=1))

    def _covered(self, roi: Box) -> Iterator[tuple[slice, np.ndarray]]:
        """Slabs of the region, none deeper than a window, and how many windows cover each voxel (H,W) of their slices.

        The number is the same between two faces of windows: it is counted there alone, not voxel by voxel.
        """
        places = [tile.slices(self.window, roi, roi[:3]) for tile, _ in self.local]
        faces = [
            np.unique([0, size, *(face for place in places for face in (place[axis].start, place[axis].stop))])
            for axis, size in enumerate(self.total_DHW.shape)
        ]
        faces[0] = np.union1d(faces[0], np.arange(0, len(self.total_DHW), self.window[0]))
        count_DHW = np.zeros([len(axis) - 1 for axis in faces], np.float32)
        for place in places:
            within = zip(faces, place, strict=True)
            count_DHW[tuple(slice(*np.searchsorted(axis, (cut.start, cut.stop))) for axis, cut in within)] += 1
        high, wide = (np.diff(axis) for axis in faces[1:])
        for (first, stop), count_HW in zip(pairwise(faces[0].tolist()), count_DHW, strict=True):
            yield slice(first, stop), count_HW.repeat(high, axis=0).repeat(wide, axis=1)


class Zoomer:
    """One volume before one model: encodes the overview once, and each window once while there is room for its tokens.

    image_DHW: in [0, 1], the body crop; an array, or what reads like one. The model is expected in eval mode.
    """

    def __init__(
        self, model: Promptable, image_DHW: Sliceable, config: ZoomConfig, progress: Progress | None = None
    ) -> None:
        self.model, self.image_DHW, self.config = model, image_DHW, config
        self.window = tuple(int(size) for size in model.config.input_shape)
        self.device = next(model.parameters()).device
        self.batch, self.decode_batch = config.batches(self.device.type)
        self.tokens = TokenStore(config.cache_gb * GIGABYTE, config.device_gb * GIGABYTE)
        self._crowded = False
        self._progress = progress or (lambda done, wanted: None)
        self._overview_BTE: torch.Tensor | None = None

    @torch.inference_mode()
    def encode_overview(self) -> torch.Tensor:
        """Tokens (1, T, E) of the whole volume at the model's input shape; computed at the first call."""
        if self._overview_BTE is None:
            shrink = resize_label if self._nearest else resize_image
            self._overview_BTE = self._encode([shrink(self.image_DHW, self.window)])
        return self._overview_BTE

    @property
    def _nearest(self) -> bool:
        return self.config.interpolation is Convention.published

    @torch.inference_mode()
    def zoom_out(self, prompt: Prompt) -> Coarse:
        """Zooming out alone. The prompt is in the volume's voxels."""
        return self._coarse([scale_prompt(prompt, self.image_DHW.shape, self.window)])[0]

    def _coarse(self, shrunk: list[Prompt]) -> list[Coarse]:
        logits_BPDHW = self.model.decode(self.encode_overview(), self.model.prompts([shrunk]))
        low_PDHW = logits_BPDHW[0].float().cpu().numpy()
        return [Coarse(low_DHW, self.image_DHW.shape, self._nearest) for low_DHW in low_PDHW]

    def prompted(self, prompt: Prompt, rng: np.random.Generator) -> Prompted:
        """A prompt in the volume's voxels, to be answered."""
        return Prompted(prompt, scale_prompt(prompt, self.image_DHW.shape, self.window), rng)

    def zoom(self, prompt: Prompt, rng: np.random.Generator) -> ZoomResult:
        """Zoom-out-zoom-in of a prompt, given in the volume's voxels. `rng` draws the windows' points."""
        return next(self.zoom_all([self.prompted(prompt, rng)]))

    def zoom_in(self, prompt: Prompt, shrunk: Prompt, rng: np.random.Generator) -> ZoomResult:
        """As `zoom`, `shrunk` being the prompt in voxels of the model's input: all that published reflection reads."""
        return next(self.zoom_all([Prompted(prompt, shrunk, rng)]))

    @torch.inference_mode()
    def zoom_all(self, asked: Sequence[Prompted]) -> Iterator[ZoomResult]:
        """Zoom-out-zoom-in of each, in order, as many at once as memory allows: a window is encoded once for those."""
        plans: list[_Plan] = []
        for first in range(0, len(asked), self.decode_batch):
            group = asked[first : first + self.decode_batch]
            for one, coarse in zip(group, self._coarse([one.shrunk for one in group]), strict=True):
                plans.append(self._planned(one, coarse))
                if sum(plan.total_DHW.numel() for plan in plans) > TOGETHER:
                    yield from self._carried_out(plans)
                    plans = []
        yield from self._carried_out(plans)

    @torch.inference_mode()
    def refine(self, prompt: Prompt, previous_DHW: np.ndarray, rng: np.random.Generator) -> ZoomResult:
        """Zoom-in of a prompt in the volume's voxels with a mask found before in the place of the coarse mask.

        The model takes no masks: `previous_DHW` (bool, not empty) says where to look, and is reflected into each window
        as a coarse mask is. A prompt without a box gets the one around that mask and the points inside the structure.
        What the windows say replaces it.
        """
        mask_DHW = previous_DHW | (prompt_map(prompt, previous_DHW.shape) if prompt.points_N3 is not None else False)
        if prompt.box is None:
            prompt = replace(prompt, box=box_of(mask_DHW))
        (result,) = self._carried_out(
            [self._planned(self.prompted(prompt, rng), Certain(mask_DHW), Convention.consistent)]
        )
        return result

    def _planned(self, asked: Prompted, ground: Ground, reflection: Convention | None = None) -> _Plan:
        mask_DHW = ground.mask(self.config.threshold)
        if not mask_DHW.any():
            return _Plan(ground, None, [], self.window, torch.zeros(0, 0, 0))
        if self.config.grid is Convention.published:
            roi = cut_off_region(mask_DHW, self.window)
        else:
            roi = region_of(mask_DHW, asked.prompt, self.window, self.config.reach)
        grid = tiles(roi, self.window, mask_DHW.shape, self.config)
        published = (reflection or self.config.reflection) is Convention.published
        reflected = self._reflected_as_published if published else self._reflected
        local = list(reflected(asked, mask_DHW, grid))
        shape = [high - low + 1 for low, high in _pairs(roi[:3], roi[3:])]
        return _Plan(ground, roi, local, self.window, torch.zeros(shape, device=self._place(shape)))

    def _place(self, shape: Sequence[int]) -> torch.device:
        """Where the logits of a region are summed: beside the model, where half of the room there is enough."""
        wanted, left = VOXEL * math.prod(shape), room(self.device)
        if wanted <= left / 2:
            return self.device
        if not self._crowded:
            log.info(
                "a region of %d x %d x %d voxels takes %.1f GB, the GPU has %.1f GB left: regions that take more than "
                "half of that are summed in main memory, which is slower",
                *(*shape, wanted / GIGABYTE, left / GIGABYTE),
            )
        self._crowded = True
        return torch.device("cpu")

    def _reflected(self, asked: Prompted, mask_DHW: np.ndarray, grid: list[Tile]) -> Iterator[tuple[Tile, Prompt]]:
        for tile in grid:
            inside_DHW = tile.cut(mask_DHW, self.window)
            local = reflect(asked.prompt, inside_DHW, tile.start, self.config.points, asked.rng)
            if local is not None:
                yield tile, local

    def _reflected_as_published(
        self, asked: Prompted, mask_DHW: np.ndarray, grid: list[Tile]
    ) -> Iterator[tuple[Tile, Prompt]]:
        said_DHW = enlarge(prompt_map(asked.shrunk, self.window), mask_DHW.shape)
        for tile in grid:
            inside_DHW, said = tile.cut(mask_DHW, self.window), tile.cut(said_DHW, self.window)
            prompt = replace(asked.prompt, landmarks=clip_landmarks(asked.prompt, tile.start, self.window))
            alone = len(grid) == 1
            yield tile, _reflected_as_published(prompt, inside_DHW, said, alone, self.config.points, asked.rng)

    def _carried_out(self, plans: list[_Plan]) -> Iterator[ZoomResult]:
        """The prompts' results in their order."""
        self._look(plans)
        for plan in plans:
            yield plan.result()

    def _look(self, plans: list[_Plan]) -> None:
        """Window after window, each for all prompts that look at it. No step of this waits for a GPU."""
        wanted: dict[Tile, list[tuple[_Plan, Prompt]]] = {}
        for plan in plans:
            for tile, prompt in plan.local:
                wanted.setdefault(tile, []).append((plan, prompt))
        ordered, done = sorted(wanted, key=lambda tile: tile.start), 0
        for first in range(0, len(ordered), self.batch):
            tokens = self._encoded(ordered[first : first + self.batch])
            self._decode({tile: wanted[tile] for tile in tokens}, tokens)
            done += sum(len(wanted[tile]) for tile in tokens)
            self._progress(done, sum(len(plan.local) for plan in plans))

    def _decode(self, wanted: dict[Tile, list[tuple[_Plan, Prompt]]], tokens: dict[Tile, torch.Tensor]) -> None:
        """A window's prompts together, and windows that have equally many; `decode_batch` of them at a time."""
        size = self.decode_batch
        groups: dict[int, list[tuple[Tile, list[tuple[_Plan, Prompt]]]]] = {}
        for tile, asked in wanted.items():
            for first in range(0, len(asked), size):
                part = asked[first : first + size]
                groups.setdefault(len(part), []).append((tile, part))
        for count, group in groups.items():
            for first in range(0, len(group), max(size // count, 1)):
                self._decode_together(group[first : first + max(size // count, 1)], tokens)

    def _decode_together(
        self, group: list[tuple[Tile, list[tuple[_Plan, Prompt]]]], tokens: dict[Tile, torch.Tensor]
    ) -> None:
        tokens_BTE = torch.cat([tokens[tile] for tile, _ in group])
        prompts = self.model.prompts([[prompt for _, prompt in part] for _, part in group])
        logits_BPDHW = self.model.decode(tokens_BTE, prompts)
        for (tile, part), logits_PDHW in zip(group, logits_BPDHW.float(), strict=True):
            for (plan, _), logits_DHW in zip(part, logits_PDHW, strict=True):
                plan.add(tile, logits_DHW)

    def _encoded(self, wanted: list[Tile]) -> dict[Tile, torch.Tensor]:
        kept = {tile: self.tokens.get(tile, self.device) for tile in wanted}
        new = [tile for tile, tokens_BTE in kept.items() if tokens_BTE is None]
        found = {tile: tokens_BTE for tile, tokens_BTE in kept.items() if tokens_BTE is not None}
        if new:
            encoded_BTE = self._encode([tile.cut(self.image_DHW, self.window) for tile in new])
            for tile, tokens_BTE in zip(new, encoded_BTE.split(1), strict=True):
                found[tile] = tokens_BTE.clone()
                self.tokens.put(tile, found[tile])
        return {tile: found[tile] for tile in wanted}

    def _encode(self, images: list[np.ndarray]) -> torch.Tensor:
        """Under autocast the last norm gives float32 though what it was given had less: it is kept as that."""
        tokens_BTE = self.model.encode(_sent(np.stack(images, dtype=np.float32)[:, None], self.device))
        kind = self.device.type
        return tokens_BTE.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens_BTE


def zoom(
    model: Promptable, image_DHW: Sliceable, prompt: Prompt, config: ZoomConfig, rng: np.random.Generator
) -> ZoomResult:
    """Zoom-out-zoom-in of one prompt on one volume, see `Zoomer`, which several prompts should share."""
    return Zoomer(model, image_DHW, config).zoom(prompt, rng)
