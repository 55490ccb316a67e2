"""Segment one case by any number of prompts, in one of three modes.

1. Sample a prompt from the truth, or one for each connected component. The time of a prediction excludes this.
2. Segment: `zoom` is zoom-out-zoom-in; `resize` is the zoom-out alone, decoded separately so that its time is its own;
   `sliding` runs windows over the entire volume.
3. Unite the masks of all components.
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
from segvol_pl.evaluation.prompts import Setting, sample_prompt, split_components
from segvol_pl.imaging.intensity import Normalised
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.transforms import resize_label
from segvol_pl.inference.coarse import CoarseLogits, binary
from segvol_pl.inference.sliding import Slider
from segvol_pl.inference.window_prompts import scale_prompt
from segvol_pl.inference.zoom import Promptable, Zoomer, ZoomRequest

ZOOM_STREAM = 1
"""Last element of the seeds for the points that a zoom-in samples in its windows, see `evaluation.prompts`."""


@dataclass(frozen=True, eq=False)
class SampledPrompt:
    """One prompt, in two grids."""

    prompt: Prompt
    """In voxels of the volume."""
    model_prompt: Prompt
    """In voxels of the model's input."""
    seeds: list[int]


@dataclass(frozen=True, eq=False)
class Prediction:
    """The united mask of a setting's prompts on the volume's grid, with its cost."""

    mask_DHW: np.ndarray
    coarse_DHW: np.ndarray | None
    """Mask of the zoom-out; None in other modes."""
    windows: int
    """Windows at native resolution that the model decoded."""
    prompts: list[Prompt]
    seconds: float
    memory_mb: float | None
    """Peak, see `CostMeter`."""


Segmented = tuple[np.ndarray, np.ndarray | None, int]
"""Mask, coarse mask, number of windows."""


class CaseRunner:
    """A case with its image encodings. Prompts share them unless `config.timing` is `cold`."""

    def __init__(self, model: Promptable, case: EvalCase, config: EvaluateConfig) -> None:
        self.model, self.case, self.config = model, case, config
        self.device = next(model.parameters()).device
        self.image_DHW = Normalised(case.hu_DHW, case.facts.intensity)
        self._drop_encodings()
        if config.timing is Timing.shared:
            self.overview()

    def _drop_encodings(self) -> None:
        self.zoomer = Zoomer(self.model, self.image_DHW, self.config.zoom)
        self.slider = Slider(self.model, self.image_DHW, self.config.sliding)

    def overview(self) -> torch.Tensor:
        """Encode the overview, or return its cached tokens (1, T, E)."""
        with autocast(self.device, self.config.precision):
            return self.zoomer.encode_overview()

    def predict(self, setting: Setting, category: str, truth_DHW: np.ndarray) -> Prediction:
        """Segment a category by the prompts of a setting. Raises SampleError if a prompt cannot be sampled."""
        sampled = self.sample_prompts(setting, category, truth_DHW)
        if self.config.timing is Timing.cold:
            self._drop_encodings()
        with CostMeter(self.device) as meter, torch.inference_mode(), autocast(self.device, self.config.precision):
            found = [self._segment(Mode(setting.mode), each) for each in sampled]
        masks, coarse, windows = zip(*found, strict=True)
        return Prediction(
            mask_DHW=np.logical_or.reduce(masks),
            coarse_DHW=np.logical_or.reduce(coarse) if setting.mode == Mode.zoom.value else None,
            windows=sum(windows),
            prompts=[each.prompt for each in sampled],
            seconds=meter.seconds,
            memory_mb=meter.memory_mb,
        )

    def answer(self, prompt: Prompt, previous_DHW: np.ndarray | None, category: str) -> Prediction:
        """Segment by a given prompt, or refine a mask by it.

        Args:
            prompt: In voxels of the volume.
            previous_DHW: Bool mask to refine; None, or an empty one, starts from nothing.
            category: Its name decides the points that are drawn in windows.
        """
        if self.config.timing is Timing.cold:
            self._drop_encodings()
        rng = np.random.default_rng([*self.seeds(category), ZOOM_STREAM])
        with CostMeter(self.device) as meter, torch.inference_mode(), autocast(self.device, self.config.precision):
            if previous_DHW is None or not previous_DHW.any():
                result = self.zoomer.zoom(prompt, rng)
            else:
                result = self.zoomer.refine(prompt, previous_DHW, rng)
            mask_DHW = result.mask(self.config.zoom.threshold)
        return Prediction(mask_DHW, None, result.windows, [prompt], meter.seconds, meter.memory_mb)

    def seeds(self, category: str) -> list[int]:
        """Seeds of all that is drawn for a category of the case: the same whatever else is evaluated."""
        return [self.config.seed, *(zlib.crc32(text.encode()) for text in (self.case.facts.key, category))]

    def sample_prompts(self, setting: Setting, category: str, truth_DHW: np.ndarray) -> list[SampledPrompt]:
        """Sample the prompts of a setting for a category, one for each component of the truth."""
        parts = split_components(truth_DHW, setting, self.config.draw)
        return [self._sample(setting, category, part_DHW, number) for number, part_DHW in enumerate(parts)]

    def _sample(self, setting: Setting, category: str, part_DHW: np.ndarray, number: int) -> SampledPrompt:
        facts = self.case.facts
        seeds = self.seeds(category) + ([number] if number else [])
        shape, window = part_DHW.shape, self.zoomer.window_shape
        if self.config.zoom.reflection is Convention.published and setting.mode != Mode.sliding.value:
            # The published code resizes the truth to the model's input and samples from that.
            resized_DHW = resize_label(part_DHW, window)
            if resized_DHW.any():
                spacing = _resized_spacing(facts.spacing, shape, window)
                model_prompt = sample_prompt(setting, category, resized_DHW, spacing, self.config.draw, seeds)
                return SampledPrompt(scale_prompt(model_prompt, window, shape), model_prompt, seeds)
        prompt = sample_prompt(setting, category, part_DHW, facts.spacing, self.config.draw, seeds)
        return SampledPrompt(prompt, scale_prompt(prompt, shape, window), seeds)

    def _segment(self, mode: Mode, sampled: SampledPrompt) -> Segmented:
        threshold = self.config.zoom.threshold
        if mode is Mode.zoom:
            rng = np.random.default_rng([*sampled.seeds, ZOOM_STREAM])
            result = next(self.zoomer.zoom_all([ZoomRequest(sampled.prompt, sampled.model_prompt, rng)]))
            return result.mask(threshold), result.coarse_mask(threshold), result.windows
        if mode is Mode.resize:
            return self._zoom_out(sampled.model_prompt).mask(threshold), None, 0
        slid = self.slider.segment(sampled.prompt)
        return binary(slid.logits_DHW, threshold), None, slid.windows

    def _zoom_out(self, model_prompt: Prompt) -> CoarseLogits:
        logits_BPDHW = self.model.decode(self.zoomer.encode_overview(), self.model.prompts([[model_prompt]]))
        nearest = self.config.zoom.interpolation is Convention.published
        return CoarseLogits(logits_BPDHW[0, 0].float().cpu().numpy(), self.image_DHW.shape, nearest)


def _resized_spacing(
    spacing: Sequence[float] | None, shape: Sequence[int], window: Sequence[int]
) -> list[float] | None:
    if spacing is None:
        return None
    return [step * old / new for step, old, new in zip(spacing, shape, window, strict=True)]
