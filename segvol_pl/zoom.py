"""Zoom-out-zoom-in over a promptable model (paper Sec. 2.3). Knows no files and no checkpoints.

1. Zoom out: the whole volume is shrunk to the model's input, the prompt's coordinates with it; the logits are brought
   back to the volume's grid.
2. The region of interest is the box of the coarse mask, grown to at least one window.
3. Zoom in: windows of the model's input shape slide over the region at native resolution; the prompt is reflected into
   each window from the user's prompt and the coarse mask.
4. The windows' logits, averaged where they overlap, are pasted over the coarse logits.

`config.interpolation`, `grid` and `reflection` say how each of these is done; set to `published` they give what the
released weights were validated with (configs/zoom/published.yaml).

Several prompts on one volume share the encoding of the overview and, in a bounded cache, of the windows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from segvol_pl.config import Rule, ZoomConfig
from segvol_pl.data.prompts import INSIDE, PADDING, Prompt, box_of, draw_points
from segvol_pl.data.sample import Box
from segvol_pl.data.transforms import box_slices, resize_image, resize_label, resize_tensor

Start = tuple[int, int, int]
"""First voxel (d, h, w) of a window."""

NOWHERE: Box = (-1, -1, -1, -1, -1, -1)
"""What the published code gives as the box of an empty mask."""

CACHED_WINDOWS = 64
"""Windows whose tokens a Zoomer keeps: about 400 MB at the published size (2048 x 768 float32 tokens)."""


class Shaped(Protocol):
    """A model's configuration, as far as zooming needs it."""

    input_shape: list[int]


class Promptable(Protocol):
    """What zooming needs of a model; SegVol satisfies it."""

    config: Any

    def encode(self, image_BCDHW: torch.Tensor) -> torch.Tensor: ...

    def decode(self, tokens_BTE: torch.Tensor, prompts: Any) -> torch.Tensor: ...

    def prompts(self, prompts: list[list[Prompt]]) -> Any: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


@dataclass(frozen=True, eq=False)
class ZoomResult:
    """Logits of one prompt on the volume's grid, float32."""

    coarse_DHW: np.ndarray
    """Zoom-out."""
    final_DHW: np.ndarray
    """Zoom-in pasted over zoom-out; the zoom-out logits themselves where the coarse mask is empty."""
    roi: Box | None
    """Region of interest, inclusive; None where the coarse mask is empty."""
    windows: int
    """Windows decoded in the zoom-in."""


@dataclass(frozen=True)
class Tile:
    """A zoom-in window: its first voxel, negative where it is padded in front, and the voxels that it may see."""

    start: Start
    bound: Box

    def slices(self, window: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
        """The part of the window inside the bound, in voxels counted from `origin`."""
        return tuple(
            slice(max(first, low) - base, min(first + size, high + 1) - base)
            for first, size, low, high, base in zip(
                self.start, window, self.bound[:3], self.bound[3:], origin, strict=True
            )
        )

    def cut(self, array_DHW: np.ndarray, window: Sequence[int]) -> np.ndarray:
        """The window of a volume; zero outside the bound."""
        tile_DHW = np.zeros(tuple(window), array_DHW.dtype)
        tile_DHW[self.slices(window, self.start)] = array_DHW[self.slices(window, (0, 0, 0))]
        return tile_DHW


def binary(logits_DHW: np.ndarray, threshold: float) -> np.ndarray:
    """Bool mask of the voxels whose probability exceeds `threshold`."""
    return logits_DHW > math.log(threshold / (1 - threshold))


def scale_prompt(prompt: Prompt, source: Sequence[int], target: Sequence[int]) -> Prompt:
    """The prompt on a grid of shape `target` that spans the same extent as its grid of shape `source`."""
    points_N3 = prompt.points_N3 if prompt.points_N3 is None else _scale_points(prompt.points_N3, source, target)
    box = prompt.box if prompt.box is None else scale_box(prompt.box, source, target)
    return replace(prompt, points_N3=points_N3, box=box)


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


def region_of_interest(mask_DHW: np.ndarray, window: Sequence[int]) -> Box:
    """Inclusive box of the mask, grown about its middle to at least one window and kept inside the volume.

    Along an axis where the volume is shorter than the window it is the whole axis. Raises ValueError for an empty mask.
    """
    box = box_of(mask_DHW)
    spans = [
        _grow(low, high, size, extent)
        for low, high, size, extent in zip(box[:3], box[3:], window, mask_DHW.shape, strict=True)
    ]
    return spans[0][0], spans[1][0], spans[2][0], spans[0][1], spans[1][1], spans[2][1]


def _grow(low: int, high: int, size: int, extent: int) -> tuple[int, int]:
    size = min(size, extent)
    missing = max(size - (high - low + 1), 0)
    low = min(max(low - missing // 2, 0), extent - max(size, high - low + 1))
    return low, max(high, low + size - 1)


def cut_off_region(mask_DHW: np.ndarray, window: Sequence[int]) -> Box:
    """The published region of interest: grown likewise, but cut off at the volume's border, hence maybe smaller."""
    box = box_of(mask_DHW)
    missing = [max(size - (high - low + 1), 0) // 2 for low, high, size in zip(box[:3], box[3:], window, strict=True)]
    d0, h0, w0 = (max(low - more, 0) for low, more in zip(box[:3], missing, strict=True))
    d1, h1, w1 = (
        min(high + more, extent - 1) for high, more, extent in zip(box[3:], missing, mask_DHW.shape, strict=True)
    )
    return d0, h0, w0, d1, h1, w1


def tiles(roi: Box, window: Sequence[int], shape: Sequence[int], config: ZoomConfig) -> list[Tile]:
    """The windows that cover the region, neighbours overlapping by at least the share `config.overlap`.

    The last window of an axis ends where the region ends, as in MONAI's sliding window. Windows see the whole volume
    of `shape`; those of the published grid see the region alone, in their middle where it is smaller than they are.
    """
    d, h, w = shape
    published = config.grid is Rule.published
    bound: Box = roi if published else (0, 0, 0, d - 1, h - 1, w - 1)
    axes = []
    for low, high, size in zip(roi[:3], roi[3:], window, strict=True):
        lacking = max(size - (high - low + 1), 0) // 2 if published else 0
        axes.append(_starts(low - lacking, high - low + 1, size, config.overlap))
    return [Tile((d, h, w), bound) for d, h, w in product(*axes)]


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
        points_N3, labels_N = draw_points(said_DHW, rng, positive=points, negative=0)
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


def enlarge(array_DHW: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """By the published nearest neighbour: torch's own, which takes the voxel under a cell's first corner, not centre.

    Its rounding in float32 is part of it: a whole number of voxels may fall to the voxel before.
    """
    indices = []
    for old, new in zip(array_DHW.shape, shape, strict=True):
        source = torch.arange(old, dtype=torch.float32)[None, None]
        indices.append(F.interpolate(source, size=new, mode="nearest")[0, 0].long().numpy())
    return array_DHW[np.ix_(*indices)]


def reflect(
    prompt: Prompt, coarse_DHW: np.ndarray, start: Start, points: int, rng: np.random.Generator
) -> Prompt | None:
    """The prompt of one window, in the window's voxels; None where the window is to be skipped.

    coarse_DHW: bool, the coarse mask inside the window. Text is kept. A box prompt becomes the part
    of the user's box inside the window (the published code takes the coarse mask's box where the region is more than
    one window, and hands on its mistakes). A points prompt keeps the user's points that lie inside and gets `points`
    more, drawn from the coarse mask, and its box. A window is skipped where it holds neither coarse mask nor a user's
    point inside the structure, or lies outside the user's box.
    """
    empty = not coarse_DHW.any()
    points_N3, labels_N = _points_inside(prompt, start, coarse_DHW.shape)
    if empty:
        return replace(prompt, points_N3=points_N3, labels_N=labels_N, box=None) if INSIDE in labels_N else None
    box = clip_box(prompt.box, start, coarse_DHW.shape) if prompt.box is not None else None
    if prompt.box is not None and box is None:
        return None
    if prompt.points_N3 is None:
        return replace(prompt, box=box)
    drawn_N3, drawn_N = draw_points(coarse_DHW, rng, positive=points, negative=0)
    return replace(
        prompt,
        points_N3=np.concatenate([points_N3, drawn_N3]),
        labels_N=np.concatenate([labels_N, drawn_N]),
        box=box or box_of(coarse_DHW),
    )


def _points_inside(prompt: Prompt, start: Start, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    if prompt.points_N3 is None or prompt.labels_N is None:
        return np.zeros((0, 3), np.int64), np.zeros(0, np.int64)
    local_N3 = np.asarray(prompt.points_N3, np.int64) - start
    inside_N = ((local_N3 >= 0) & (local_N3 < shape)).all(axis=1)
    return local_N3[inside_N], np.asarray(prompt.labels_N, np.int64)[inside_N]


def clip_box(box: Box, start: Sequence[int], shape: Sequence[int]) -> Box | None:
    """The part of the box inside the window of `shape` at `start`, in the window's voxels; None where there is none."""
    low_3 = np.maximum(np.subtract(box[:3], start), 0)
    high_3 = np.minimum(np.subtract(box[3:], start), np.subtract(shape, 1))
    if (low_3 > high_3).any():
        return None
    d0, h0, w0, d1, h1, w1 = (int(value) for value in (*low_3, *high_3))
    return d0, h0, w0, d1, h1, w1


class Zoomer:
    """One volume before one model: encodes the overview once and each window once while it stays in the cache.

    image_DHW: float32 in [0, 1], the body crop. The model is expected in eval mode.
    """

    def __init__(
        self, model: Promptable, image_DHW: np.ndarray, config: ZoomConfig, cached: int = CACHED_WINDOWS
    ) -> None:
        self.model, self.image_DHW, self.config = model, image_DHW, config
        self.window = tuple(int(size) for size in model.config.input_shape)
        self.device = next(model.parameters()).device
        self._cached = max(cached, config.batch)
        self._windows: OrderedDict[Tile, torch.Tensor] = OrderedDict()
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
        return self.config.interpolation is Rule.published

    def zoom_out(self, prompt: Prompt) -> np.ndarray:
        """Coarse logits of a prompt (in the volume's voxels) on the volume's grid, float32."""
        return self._coarse(scale_prompt(prompt, self.image_DHW.shape, self.window))

    @torch.inference_mode()
    def _coarse(self, shrunk: Prompt) -> np.ndarray:
        logits_BPDHW = self.model.decode(self.encode_overview(), self.model.prompts([[shrunk]])).float()
        if self._nearest:
            return enlarge(logits_BPDHW[0, 0].cpu().numpy(), self.image_DHW.shape)
        return resize_tensor(logits_BPDHW, self.image_DHW.shape)[0, 0].cpu().numpy()

    def zoom(self, prompt: Prompt, rng: np.random.Generator) -> ZoomResult:
        """Zoom-out-zoom-in of a prompt, given in the volume's voxels. `rng` draws the windows' points."""
        return self.zoom_in(prompt, scale_prompt(prompt, self.image_DHW.shape, self.window), rng)

    @torch.inference_mode()
    def zoom_in(self, prompt: Prompt, shrunk: Prompt, rng: np.random.Generator) -> ZoomResult:
        """As `zoom`, `shrunk` being the prompt in voxels of the model's input: all that published reflection reads."""
        coarse_DHW = self._coarse(shrunk)
        mask_DHW = binary(coarse_DHW, self.config.threshold)
        if not mask_DHW.any():
            return ZoomResult(coarse_DHW, coarse_DHW, None, 0)
        region = cut_off_region if self.config.grid is Rule.published else region_of_interest
        roi = region(mask_DHW, self.window)
        grid = tiles(roi, self.window, self.image_DHW.shape, self.config)
        reflected = list(self._reflected(prompt, shrunk, mask_DHW, grid, rng))
        return ZoomResult(coarse_DHW, self._paste(coarse_DHW, roi, reflected), roi, len(reflected))

    def _reflected(
        self, prompt: Prompt, shrunk: Prompt, mask_DHW: np.ndarray, grid: list[Tile], rng: np.random.Generator
    ) -> Iterator[tuple[Tile, Prompt]]:
        points, published = self.config.points, self.config.reflection is Rule.published
        said_DHW = enlarge(prompt_map(shrunk, self.window), mask_DHW.shape) if published else mask_DHW
        for tile in grid:
            inside_DHW = tile.cut(mask_DHW, self.window)
            if published:
                said = tile.cut(said_DHW, self.window)
                yield tile, _reflected_as_published(prompt, inside_DHW, said, len(grid) == 1, points, rng)
            elif (local := reflect(prompt, inside_DHW, tile.start, points, rng)) is not None:
                yield tile, local

    def _paste(self, coarse_DHW: np.ndarray, roi: Box, reflected: list[tuple[Tile, Prompt]]) -> np.ndarray:
        total_DHW = np.zeros([high - low + 1 for low, high in zip(roi[:3], roi[3:], strict=True)], np.float32)
        count_DHW = np.zeros(total_DHW.shape, np.uint16)
        for first in range(0, len(reflected), self.config.batch):
            batch = reflected[first : first + self.config.batch]
            for (tile, _), logits_DHW in zip(batch, self._decode(batch), strict=True):
                place = tile.slices(self.window, roi[:3])
                total_DHW[place] += logits_DHW[tile.slices(self.window, tile.start)]
                count_DHW[place] += 1
        final_DHW = coarse_DHW.copy()
        covered_DHW = count_DHW > 0
        # A view: what no window covered keeps its coarse logits.
        final_DHW[box_slices(roi)][covered_DHW] = total_DHW[covered_DHW] / count_DHW[covered_DHW]
        return final_DHW

    def _decode(self, batch: list[tuple[Tile, Prompt]]) -> np.ndarray:
        tokens_BTE = self._tokens([tile for tile, _ in batch])
        logits_BPDHW = self.model.decode(tokens_BTE, self.model.prompts([[prompt] for _, prompt in batch]))
        return logits_BPDHW[:, 0].float().cpu().numpy()

    def _tokens(self, wanted: list[Tile]) -> torch.Tensor:
        new = [tile for tile in wanted if tile not in self._windows]
        if new:
            encoded_BTE = self._encode([tile.cut(self.image_DHW, self.window) for tile in new])
            self._windows.update(zip(new, encoded_BTE.split(1), strict=True))
        for tile in wanted:
            self._windows.move_to_end(tile)
        while len(self._windows) > self._cached:
            self._windows.popitem(last=False)
        return torch.cat([self._windows[tile] for tile in wanted])

    def _encode(self, images: list[np.ndarray]) -> torch.Tensor:
        image_BCDHW = torch.from_numpy(np.stack(images, dtype=np.float32)[:, None])
        return self.model.encode(image_BCDHW.to(self.device))


def zoom(
    model: Promptable, image_DHW: np.ndarray, prompt: Prompt, config: ZoomConfig, rng: np.random.Generator
) -> ZoomResult:
    """Zoom-out-zoom-in of one prompt on one volume, see `Zoomer`, which several prompts should share."""
    return Zoomer(model, image_DHW, config).zoom(prompt, rng)
