"""One case before the model: any number of prompts, each answered in one of the three modes.

1. A prompt is drawn from the truth, or several, one for each component; drawing is not part of an prediction's time.
2. zoom: zoom-out-zoom-in. resize: the zoom-out alone, decoded apart so that its seconds are its own. sliding: windows
   over the whole volume.
3. The masks of all components are united.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segvol_pl.config import Convention, EvaluateConfig, Mode, Timing
from segvol_pl.device import autocast
from segvol_pl.evaluation.cases import EvalCase
from segvol_pl.evaluation.cost import CostMeter
from segvol_pl.evaluation.prompts import Setting, draw, parts_of
from segvol_pl.imaging.intensity import Normalised
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.transforms import resize_label
from segvol_pl.inference.coarse import Coarse, binary
from segvol_pl.inference.sliding import Slider
from segvol_pl.inference.zoom import Promptable, Zoomer, scale_prompt

ZOOM_STREAM = 1
"""End of the seeds that a zoom-in draws its windows' points by, see prompting."""


@dataclass(frozen=True, eq=False)
class Asked:
    """One prompt: in voxels of the volume, and of the model's input."""

    prompt: Prompt
    shrunk: Prompt
    seeds: list[int]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The mask that a setting's prompts found on the volume's grid, and what it cost."""

    mask_DHW: np.ndarray
    coarse_DHW: np.ndarray | None
    """The zoom-out's mask; None in other modes."""
    windows: int
    prompts: list[Prompt]
    seconds: float
    memory_mb: float | None


Found = tuple[np.ndarray, np.ndarray | None, int]
"""Mask, coarse mask, windows."""


class CaseRunner:
    """A case and its encodings, which prompts share unless `config.timing` is alone."""

    def __init__(self, model: Promptable, case: EvalCase, config: EvaluateConfig) -> None:
        self.model, self.case, self.config = model, case, config
        self.device = next(model.parameters()).device
        self.image_DHW = Normalised(case.hu_DHW, case.facts.intensity)
        self._encode_later()
        if config.timing is Timing.shared:
            self.overview()

    def _encode_later(self) -> None:
        self.zoomer = Zoomer(self.model, self.image_DHW, self.config.zoom)
        self.slider = Slider(self.model, self.image_DHW, self.config.sliding)

    def overview(self) -> torch.Tensor:
        """The overview's tokens (1, T, E)."""
        with autocast(self.device, self.config.precision):
            return self.zoomer.encode_overview()

    def predict(self, setting: Setting, category: str, truth_DHW: np.ndarray) -> Prediction:
        """Raises SampleError where a prompt cannot be drawn."""
        asked = self.queries(setting, category, truth_DHW)
        if self.config.timing is Timing.cold:
            self._encode_later()
        with CostMeter(self.device) as meter, torch.inference_mode(), autocast(self.device, self.config.precision):
            found = [self._find(Mode(setting.mode), one) for one in asked]
        masks, coarse, windows = zip(*found, strict=True)
        return Prediction(
            mask_DHW=np.logical_or.reduce(masks),
            coarse_DHW=np.logical_or.reduce(coarse) if setting.mode == Mode.zoom.value else None,
            windows=sum(windows),
            prompts=[one.prompt for one in asked],
            seconds=meter.seconds,
            memory_mb=meter.memory_mb,
        )

    def queries(self, setting: Setting, category: str, truth_DHW: np.ndarray) -> list[Asked]:
        """The prompts that a setting asks for a category."""
        parts = parts_of(truth_DHW, setting, self.config.draw)
        return [self._asked(setting, category, part_DHW, number) for number, part_DHW in enumerate(parts)]

    def _asked(self, setting: Setting, category: str, part_DHW: np.ndarray, number: int) -> Asked:
        facts = self.case.facts
        seeds = [self.config.seed, *(zlib.crc32(text.encode()) for text in (facts.key, category))]
        seeds += [number] if number else []
        shape, window = part_DHW.shape, self.zoomer.window
        if self.config.zoom.reflection is Convention.published and setting.mode != Mode.sliding.value:
            # The published code shrinks the truth and draws from that.
            shrunk_DHW = resize_label(part_DHW, window)
            if shrunk_DHW.any():
                wide = _resized_spacing(facts.spacing, shape, window)
                shrunk = draw(setting, category, shrunk_DHW, wide, self.config.draw, seeds)
                return Asked(scale_prompt(shrunk, window, shape), shrunk, seeds)
        prompt = draw(setting, category, part_DHW, facts.spacing, self.config.draw, seeds)
        return Asked(prompt, scale_prompt(prompt, shape, window), seeds)

    def _find(self, mode: Mode, asked: Asked) -> Found:
        threshold = self.config.zoom.threshold
        if mode is Mode.zoom:
            result = self.zoomer.zoom_in(asked.prompt, asked.shrunk, np.random.default_rng([*asked.seeds, ZOOM_STREAM]))
            return result.mask(threshold), result.coarse_mask(threshold), result.windows
        if mode is Mode.resize:
            return self._resized(asked.shrunk).mask(threshold), None, 0
        slid = self.slider.segment(asked.prompt)
        return binary(slid.logits_DHW, threshold), None, slid.windows

    def _resized(self, shrunk: Prompt) -> Coarse:
        """Zooming out alone, by the prompt in voxels of the model's input."""
        logits_BPDHW = self.model.decode(self.zoomer.encode_overview(), self.model.prompts([[shrunk]]))
        nearest = self.config.zoom.interpolation is Convention.published
        return Coarse(logits_BPDHW[0, 0].float().cpu().numpy(), self.image_DHW.shape, nearest)


def _resized_spacing(
    spacing: Sequence[float] | None, shape: Sequence[int], window: Sequence[int]
) -> list[float] | None:
    if spacing is None:
        return None
    return [step * old / new for step, old, new in zip(spacing, shape, window, strict=True)]
