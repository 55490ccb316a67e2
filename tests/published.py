"""Weights as the reference run of the published code had them: made from each tensor's name alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from segvol_pl.config import Convention, SegVolConfig
from segvol_pl.data.sampling import merged_inside
from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.masks import LabelMap
from segvol_pl.model import SegVol
from segvol_pl.model.checkpoint import BANK
from segvol_pl.model.released import TOWER

SMALL = SegVolConfig(input_shape=[16, 64, 64], coordinates=Convention.published)
FULL = SegVolConfig(coordinates=Convention.published)

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
"""Figures of the published code at the small geometry: prompts, logits, losses. Measured in float32 on a CPU."""


def deterministic(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the reference run gave to the parameter `name`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("positional_encoding_gaussian_matrix"):
        return torch.from_numpy(noise)
    if len(shape) == 1 and name.endswith("weight"):
        return torch.from_numpy(1 + np.float32(0.02) * noise)
    return torch.from_numpy(np.float32(0.04) * noise)


def released_shapes(config: SegVolConfig, tower: CLIPTextConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the released weights, without their prefix."""
    with torch.device("meta"):
        own = {name: tuple(value.shape) for name, value in SegVol(config).state_dict().items() if name != BANK}
        clip = CLIPTextModel(tower or CLIPTextConfig()).state_dict()
    text = {TOWER + name.removeprefix("text_model."): tuple(value.shape) for name, value in clip.items()}
    return {**own, **_never_run(config.hidden_size), **text}


def _never_run(hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    networks = {f"mask_decoder.output_hypernetworks_mlps.{i}": (hidden, hidden, hidden // 8) for i in (1, 2, 3)}
    for stem, widths in {**networks, "mask_decoder.iou_prediction_head": (256, 256, 4)}.items():
        for layer, (fan_in, fan_out) in enumerate(zip((hidden, *widths[:2]), widths, strict=True)):
            shapes |= {f"{stem}.layers.{layer}.weight": (fan_out, fan_in), f"{stem}.layers.{layer}.bias": (fan_out,)}
    convolutions = {0: (4, 1, 2, 2), 1: (4,), 3: (16, 4, 2, 2), 4: (16,), 6: (hidden, 16, 1, 1)}
    for layer, shape in convolutions.items():
        stem = f"prompt_encoder.mask_downscaling.{layer}"
        shapes |= {f"{stem}.weight": shape, f"{stem}.bias": shape[:1]}
    return shapes


def released_state(config: SegVolConfig, tower: CLIPTextConfig | None = None) -> dict[str, Tensor]:
    """The released weights' tensors, with deterministic values."""
    return {name: deterministic(name, shape) for name, shape in released_shapes(config, tower).items()}


def reference_image(config: SegVolConfig, batch: int, seed: int = 100) -> Tensor:
    """image_BCDHW of the reference run."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.random((batch, 1, *config.input_shape), dtype=np.float32))


def mask_of_box(box: list[int]) -> np.ndarray:
    mask_DHW = np.zeros(SMALL.input_shape, bool)
    mask_DHW[box_slices(tuple(box))] = True  # type: ignore[arg-type]
    return mask_DHW


def regions_of(image: int) -> np.ndarray:
    regions_DHW = np.zeros(SMALL.input_shape, np.uint16)
    for region, box in GOLDEN["losses"]["regions"][image]:
        regions_DHW[mask_of_box(box)] = region
    return regions_DHW


def pseudo_target(iteration: int, image: int) -> tuple[np.ndarray, Box]:
    """The mask that Algorithm 1 draws for the published run's region, and that region's box."""
    regions_DHW = regions_of(image)
    mask_DHW = regions_DHW == GOLDEN["losses"]["pseudo_regions"][iteration][image]
    box = box_of(mask_DHW)
    return (merged_inside(LabelMap(regions_DHW), box).complete() if iteration % 2 else mask_DHW), box
