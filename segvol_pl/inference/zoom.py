"""Zoom-out-zoom-in over a promptable model (paper Sec. 2.3). Knows no files and no checkpoints.

1. Zoom out: shrink the volume to the model's input, and the prompt's coordinates with it. The logits stand for the
   volume's grid and are interpolated only where they are needed (`coarse`).
2. Choose windows of the model's input shape at native resolution that cover the region of interest (`windows`).
3. Reflect the prompt into each window, from the user's prompt and the coarse mask (`window_prompts`).
4. Zoom in: encode and decode the windows. Their logits, averaged where they overlap, replace the coarse logits of that
   region (`zoom_result`).

To refine a mask, start at step 2 with that mask in place of the coarse one.

Many prompts are processed at once: each window is encoded once for all of them, and its tokens are kept while there is
room (`token_cache`). On a GPU the logits stay there. The host waits for the coarse masks, which decide the windows, and
for what is read from the results; in between it only queues work.

`config.interpolation`, `grid` and `reflection` choose how each step is done; with `published` they follow the published
code (`published_zoom`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from segvol_pl.config import Convention, ZoomConfig
from segvol_pl.imaging.box import Box, box_of, union_box
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.transforms import Sliceable, resize_image, resize_label
from segvol_pl.inference.coarse import BaseLogits, CoarseLogits, KnownMask
from segvol_pl.inference.gpu_memory import free_bytes, send
from segvol_pl.inference.published_zoom import published_reflections, published_region, published_windows
from segvol_pl.inference.token_cache import TokenStore
from segvol_pl.inference.window_prompts import clip_box, prompt_map, reflect, scale_prompt
from segvol_pl.inference.windows import Window, region_of, windows_around, windows_over
from segvol_pl.inference.zoom_result import ZoomIn, ZoomResult

log = logging.getLogger(__name__)

GIGABYTE = 1e9

BYTES_PER_VOXEL = 5
"""Memory of a region of interest: each voxel's logit and whether it is inside."""

VOXELS_AT_ONCE = 2**27
"""No further prompts are added to a group whose regions of interest hold more voxels: 0.7 GB."""

Progress = Callable[[int, int], None]
"""Called with the windows decoded so far (on a GPU: queued) and those to decode, for the current group of prompts."""

WindowPrompts = list[tuple[ZoomIn, Prompt]]
"""The prompts of one window, each with the zoom-in that it belongs to."""


class Promptable(Protocol):
    """What zooming needs of a model; SegVol satisfies it."""

    config: Any
    """Holds `input_shape`, the voxels (d, h, w) that the model sees; `mask_prompt`, whether prompts may come with a
    mask; and `mask_shape`, the voxels of such a mask."""

    def encode(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        """tokens_BTE of images (B, 1, *config.input_shape) in [0, 1]."""

    def decode(self, tokens_BTE: torch.Tensor, prompts: Any) -> torch.Tensor:
        """logits_BPDHW at the input's resolution. prompts: what the method `prompts` returned."""

    def prompts(self, prompts: list[list[Prompt]]) -> Any:
        """The argument of `decode`, from a list of prompts for each image, in voxels of the model's input."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The weights; the first one's device is the model's."""


@dataclass(frozen=True, eq=False)
class ZoomRequest:
    """One prompt to segment."""

    prompt: Prompt
    """In the volume's voxels."""
    scaled: Prompt
    """The same in voxels of the model's input."""
    rng: np.random.Generator
    """Draws the points in windows."""


class Zoomer:
    """One volume and one model: encodes the overview once, and each window once while there is room for its tokens.

    Args:
        model: in eval mode.
        image_DHW: float32 in [0, 1], the body crop; an array, or an object that is sliced like one.
        config: how to zoom.
        progress: called as windows are decoded.
    """

    def __init__(
        self, model: Promptable, image_DHW: Sliceable, config: ZoomConfig, progress: Progress | None = None
    ) -> None:
        self.model, self.image_DHW, self.config = model, image_DHW, config
        self.window_shape = tuple(int(size) for size in model.config.input_shape)
        self.device = next(model.parameters()).device
        self.batch, self.decode_batch = config.batches(self.device.type)
        self.tokens = TokenStore(config.cache_gb * GIGABYTE, config.device_gb * GIGABYTE)
        self._nearest = config.interpolation is Convention.published
        self._lack_logged = False
        self._progress = progress or (lambda done, wanted: None)
        self._overview_BTE: torch.Tensor | None = None

    # ---- what is segmented ----

    def zoom(self, prompt: Prompt, rng: np.random.Generator) -> ZoomResult:
        """Zoom out and in for one prompt.

        Args:
            prompt: in the volume's voxels.
            rng: draws the points in windows.
        """
        return next(self.zoom_all([self.request(prompt, rng)]))

    def request(self, prompt: Prompt, rng: np.random.Generator) -> ZoomRequest:
        """What `zoom_all` takes, of a prompt in the volume's voxels."""
        return ZoomRequest(prompt, scale_prompt(prompt, self.image_DHW.shape, self.window_shape), rng)

    @torch.inference_mode()
    def zoom_all(self, requests: Sequence[ZoomRequest]) -> Iterator[ZoomResult]:
        """Zoom out and in for many prompts, as many at once as memory allows; those share their encoded windows.

        Args:
            requests: see `request`.

        Returns:
            One result per request, in their order.
        """
        group: list[ZoomIn] = []
        for first in range(0, len(requests), self.decode_batch):
            batch = requests[first : first + self.decode_batch]
            for request, coarse in zip(batch, self._zoom_out([one.scaled for one in batch]), strict=True):
                group.append(self._choose_windows(request, coarse, self.config.reflection))
                if sum(zoom_in.total_DHW.numel() for zoom_in in group) > VOXELS_AT_ONCE:
                    yield from self._zoom_in(group)
                    group = []
        yield from self._zoom_in(group)

    @torch.inference_mode()
    def refine(
        self, prompt: Prompt, previous_DHW: np.ndarray, rng: np.random.Generator, everywhere: bool = False
    ) -> ZoomResult:
        """Zoom in again, with a mask found before in place of the coarse mask.

        Without points the previous mask decides which windows are decoded, and is reflected into each of them as a
        coarse mask is; their logits replace it. So it is with points for a model that takes no masks. A model with
        `mask_prompt` sees the mask in its windows. Then clicks change the mask around them: only windows with a point
        in their middle are decoded, with the user's points alone, and all else stays.

        A prompt without a box gets the box around that mask and the points inside the structure, unless it has points
        and text: no training combination has all three.

        Args:
            prompt: in the volume's voxels.
            previous_DHW: bool, on the volume's grid; not empty.
            rng: draws the points in windows.
            everywhere: decode all windows even so, as a new box or text asks for.
        """
        mask_DHW = previous_DHW | (prompt_map(prompt, previous_DHW.shape) if prompt.points_N3 is not None else False)
        if prompt.box is None and not (prompt.text is not None and prompt.points_N3 is not None):
            prompt = replace(prompt, box=box_of(mask_DHW))
        request, base = self.request(prompt, rng), KnownMask(mask_DHW)
        if self.model.config.mask_prompt and prompt.points_N3 is not None and not everywhere:
            zoom_in = self._around_clicks(request, base, prompt.points_N3)
        else:
            zoom_in = self._choose_windows(request, base, Convention.consistent)
        return next(self._zoom_in([zoom_in]))

    # ---- 1. zoom out ----

    @torch.inference_mode()
    def zoom_out(self, prompt: Prompt) -> CoarseLogits:
        """Zoom out alone. The prompt is in the volume's voxels."""
        return self._zoom_out([scale_prompt(prompt, self.image_DHW.shape, self.window_shape)])[0]

    def _zoom_out(self, scaled: list[Prompt]) -> list[CoarseLogits]:
        logits_BPDHW = self.model.decode(self.encode_overview(), self.model.prompts([scaled]))
        low_PDHW = logits_BPDHW[0].float().cpu().numpy()
        return [CoarseLogits(low_DHW, self.image_DHW.shape, self._nearest) for low_DHW in low_PDHW]

    @torch.inference_mode()
    def encode_overview(self) -> torch.Tensor:
        """Tokens (1, T, E) of the complete volume at the model's input shape; computed at the first call."""
        if self._overview_BTE is None:
            shrink = resize_label if self._nearest else resize_image
            self._overview_BTE = self._encode([shrink(self.image_DHW, self.window_shape)])
        return self._overview_BTE

    # ---- 2. and 3. choose windows, and reflect the prompt into them ----

    def _choose_windows(self, request: ZoomRequest, base: BaseLogits, reflection: Convention) -> ZoomIn:
        mask_DHW = base.mask(self.config.threshold)
        if not mask_DHW.any():
            return ZoomIn(base, None, [], self.window_shape, torch.zeros(0, 0, 0))
        if self.config.grid is Convention.published:
            roi = published_region(mask_DHW, self.window_shape)
            windows = published_windows(roi, self.window_shape, self.config.overlap)
        else:
            roi = region_of(mask_DHW, request.prompt, self.window_shape, self.config.reach)
            windows = windows_over(roi, self.window_shape, mask_DHW.shape, self.config.overlap)
        reflect_all = self._reflected_as_published if reflection is Convention.published else self._reflected
        # A known mask is no logits: mixed in, it would decide every voxel.
        mix = 0.0 if isinstance(base, KnownMask) else self.config.mix
        return self._of(base, roi, list(reflect_all(request, base, mask_DHW, windows)), mix)

    def _around_clicks(self, request: ZoomRequest, base: KnownMask, points_N3: np.ndarray) -> ZoomIn:
        """The windows around the points of a prompt that refines a mask; they may change all that they show."""
        mask_DHW = base.mask(self.config.threshold)
        windows = windows_around(points_N3, self.window_shape, mask_DHW.shape)
        shown = [clip_box(window.box(self.window_shape), (0, 0, 0), mask_DHW.shape) for window in windows]
        roi = union_box([box_of(mask_DHW), *(box for box in shown if box is not None)])
        return self._of(base, roi, list(self._reflected(request, base, mask_DHW, windows)), mix=0.0)

    def _of(self, base: BaseLogits, roi: Box, prompted: list[tuple[Window, Prompt]], mix: float) -> ZoomIn:
        shape = [high - low + 1 for low, high in zip(roi[:3], roi[3:], strict=True)]
        total_DHW = torch.zeros(shape, device=self._device_for(shape))
        return ZoomIn(base, roi, prompted, self.window_shape, total_DHW, mix)

    def _reflected(
        self, request: ZoomRequest, base: BaseLogits, mask_DHW: np.ndarray, windows: list[Window]
    ) -> Iterator[tuple[Window, Prompt]]:
        config = self.model.config
        seen = config.mask_prompt and isinstance(base, KnownMask)
        points = 0 if seen else self.config.points
        for window in windows:
            inside_DHW = window.cut(mask_DHW, self.window_shape)
            local = reflect(request.prompt, inside_DHW, window.start, points, request.rng)
            if local is None:
                continue
            if config.mask_prompt:
                likely_DHW = base.probabilities(window.start, self.window_shape, config.mask_shape)
                local = replace(local, mask_DHW=likely_DHW)
            yield window, local

    def _reflected_as_published(
        self, request: ZoomRequest, base: BaseLogits, mask_DHW: np.ndarray, windows: list[Window]
    ) -> Iterator[tuple[Window, Prompt]]:
        return published_reflections(
            *(request.prompt, request.scaled, mask_DHW, windows, self.window_shape, self.config.points, request.rng)
        )

    def _device_for(self, shape: Sequence[int]) -> torch.device:
        """Where to sum a region's logits: on the model's device if they take at most half of its free memory."""
        needed, left = BYTES_PER_VOXEL * math.prod(shape), free_bytes(self.device)
        if needed <= left / 2:
            return self.device
        if not self._lack_logged:
            log.info(
                "a region of %d x %d x %d voxels needs %.1f GB and the GPU has %.1f GB left: regions that need more "
                "than half of that are summed in main memory, which is slower",
                *(*shape, needed / GIGABYTE, left / GIGABYTE),
            )
        self._lack_logged = True
        return torch.device("cpu")

    # ---- 4. zoom in ----

    def _zoom_in(self, group: list[ZoomIn]) -> Iterator[ZoomResult]:
        self._decode_windows(group)
        for zoom_in in group:
            yield zoom_in.result()

    def _decode_windows(self, group: list[ZoomIn]) -> None:
        """Window after window, each for all prompts that need it. Nothing here waits for a GPU."""
        wanted: dict[Window, WindowPrompts] = {}
        for zoom_in in group:
            for window, prompt in zoom_in.windows:
                wanted.setdefault(window, []).append((zoom_in, prompt))
        ordered, done = sorted(wanted, key=lambda window: window.start), 0
        for first in range(0, len(ordered), self.batch):
            tokens = self._encoded(ordered[first : first + self.batch])
            self._decode({window: wanted[window] for window in tokens}, tokens)
            done += sum(len(wanted[window]) for window in tokens)
            self._progress(done, sum(len(zoom_in.windows) for zoom_in in group))

    def _encoded(self, windows: list[Window]) -> dict[Window, torch.Tensor]:
        """Tokens (1, T, E) of each window: those kept, and those of the others, which are encoded together."""
        kept = {window: self.tokens.get(window, self.device) for window in windows}
        new = [window for window, tokens_BTE in kept.items() if tokens_BTE is None]
        found = {window: tokens_BTE for window, tokens_BTE in kept.items() if tokens_BTE is not None}
        if new:
            encoded_BTE = self._encode([window.cut(self.image_DHW, self.window_shape) for window in new])
            for window, tokens_BTE in zip(new, encoded_BTE.split(1), strict=True):
                found[window] = tokens_BTE.clone()
                self.tokens.put(window, found[window])
        return {window: found[window] for window in windows}

    def _encode(self, images: list[np.ndarray]) -> torch.Tensor:
        tokens_BTE = self.model.encode(send(np.stack(images, dtype=np.float32)[:, None], self.device))
        # Under autocast the last norm returns float32 though its input was less precise: do not keep the padding.
        kind = self.device.type
        return tokens_BTE.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens_BTE

    def _decode(self, wanted: dict[Window, WindowPrompts], tokens: dict[Window, torch.Tensor]) -> None:
        """Decode windows with equally many prompts together, `decode_batch` prompts at a time."""
        size = self.decode_batch
        by_count: dict[int, list[tuple[Window, WindowPrompts]]] = {}
        for window, prompts in wanted.items():
            for first in range(0, len(prompts), size):
                part = prompts[first : first + size]
                by_count.setdefault(len(part), []).append((window, part))
        for count, parts in by_count.items():
            for first in range(0, len(parts), max(size // count, 1)):
                self._decode_together(parts[first : first + max(size // count, 1)], tokens)

    def _decode_together(self, parts: list[tuple[Window, WindowPrompts]], tokens: dict[Window, torch.Tensor]) -> None:
        tokens_BTE = torch.cat([tokens[window] for window, _ in parts])
        prompts = self.model.prompts([[prompt for _, prompt in part] for _, part in parts])
        logits_BPDHW = self.model.decode(tokens_BTE, prompts)
        for (window, part), logits_PDHW in zip(parts, logits_BPDHW.float(), strict=True):
            for (zoom_in, _), logits_DHW in zip(part, logits_PDHW, strict=True):
                zoom_in.add(window, logits_DHW)


def zoom(
    model: Promptable, image_DHW: Sliceable, prompt: Prompt, config: ZoomConfig, rng: np.random.Generator
) -> ZoomResult:
    """Zoom out and in for one prompt on one volume. For several prompts share a `Zoomer`.

    Args:
        model: in eval mode.
        image_DHW: float32 in [0, 1], the body crop.
        prompt: in the volume's voxels.
        config: how to zoom.
        rng: draws the points in windows.
    """
    return Zoomer(model, image_DHW, config).zoom(prompt, rng)
