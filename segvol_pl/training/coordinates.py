"""The coordinate check: whether a wider model's activations move as far in a few steps as a narrow one's.

`segvol-pl plan FILE coordinates=true` prints it. Small models of several widths, with the parts and the
parametrisation of the run's, take a few steps on one batch of smooth noise (Yang et al. 2022, arXiv 2203.03466). Where
rates transfer, the mean size of each layer's output after them is the same at all widths. Where they do not, it grows
with the width.

The number of heads is the same at all widths, so that their size grows: the harder of the two ways to widen attention.
Depth, number of tokens, batch and rate are those of the check, not of the run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvol_pl.config import PretrainConfig, TrainConfig, Transfer, Widths
from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.prompts import INSIDE, Prompt
from segvol_pl.model.image_encoder import Block
from segvol_pl.model.mask_decoder import MLPBlock, Upscaling
from segvol_pl.model.text_encoder import TextBank, TextEncoder
from segvol_pl.training.losses import mask_losses
from segvol_pl.training.module import Task, optimizer
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask

Config = PretrainConfig | TrainConfig

WIDTHS = (64, 128, 256, 512)
STEPS = 10
WEIGHTS = 512
"""Initial weights are drawn WEIGHTS // width times, and the sizes averaged: chance matters more in narrow models."""
RATE = 1e-3
"""Learning rate at the smallest width: so high that the steps show against the initial values."""
FLAT = 1.2
"""Largest ratio of the sizes at two widths that counts as flat."""
VOLUMES = 2
HEADS = 4
NAME = "structure"
WATCHED = (Block, MLPBlock, Upscaling, TextEncoder)
"""Not the embedding of masks: it starts at 0, and after the steps is a hundredth of what it is added to."""
WATCHED_LAYERS = ("patch_embeddings.1", "out_proj", "head")
"""Layers that belong to none of these types, by the end of their names."""
DECODER_BLOCK = re.compile(r"(?<=transformer\.layers\.)(\d+)\..*")
"""In the name of a layer: what is within a block of the decoder. Its own outputs are normalised, and so of one size;
what counts is the mean of what its attentions and its MLP add."""


@dataclass(frozen=True)
class Coordinates:
    """Mean absolute outputs after the steps."""

    transfer: Transfer
    widths: Sequence[int]
    sizes: dict[str, list[float]]
    """Layer -> its size at each width."""

    def ratio(self, layer: str) -> float:
        """The layer's largest size by its smallest."""
        return max(self.sizes[layer]) / min(self.sizes[layer])

    @property
    def uneven(self) -> list[str]:
        """The layers that are not flat."""
        return [layer for layer in self.sizes if not self.ratio(layer) <= FLAT]


def measured(config: Config, widths: Sequence[int] = WIDTHS) -> Coordinates:
    """Take the steps at each width with the run's transfer."""
    sizes: dict[str, list[float]] = {}
    for width in widths:
        found = [_sizes(narrowed(config, width, widths[0]), seed) for seed in range(max(1, WEIGHTS // width))]
        for layer in found[0]:
            sizes.setdefault(layer, []).append(sum(each[layer] for each in found) / len(found))
    return Coordinates(config.optim.transfer, widths, sizes)


def narrowed(config: Config, width: int, base: int) -> Config:
    """The run with a small model of a width, and rates from a base width."""

    def at(hidden: int) -> dict[str, Any]:
        return {
            "hidden_size": hidden,
            "mlp_dim": 4 * hidden,
            "num_heads": HEADS,
            "decoder_heads": HEADS,
            "decoder_mlp_dim": 2 * hidden,
        }

    shape = [2 * size for size in config.model.patch_size]
    model = replace(config.model, input_shape=shape, num_layers=2, landmarks=[], **at(width))
    optim = replace(config.optim, lr=RATE, warmup_steps=0, max_steps=10 * STEPS, base_widths=Widths(**at(base)))
    return replace(config, model=model, optim=optim)


def lines(config: Config) -> Iterator[str]:
    """The check as text: a table of layers and widths, and which layers are not flat."""
    found = measured(config)
    heads = "".join(f"{width:>10}" for width in found.widths)
    yield f"mean size of activations after {STEPS} steps by width, optim.transfer={found.transfer.value}"
    wide = max(map(len, found.sizes))
    yield f"  {'layer':<{wide}}{heads}  largest / smallest"
    for layer, sizes in found.sizes.items():
        cells = "".join(f"{size:>10.4f}" for size in sizes)
        mark = "  not flat" if layer in found.uneven else ""
        yield f"  {layer:<{wide}}{cells}{found.ratio(layer):>10.2f}{mark}"
    if found.uneven:
        yield f"not flat (more than {FLAT}): {', '.join(found.uneven)}: a learning rate does not transfer over widths"
    else:
        yield f"flat (at most {FLAT}): a learning rate transfers over widths"


def _sizes(config: Config, seed: int) -> dict[str, float]:
    """Mean absolute output of each layer after the steps."""
    torch.manual_seed(seed)
    task = _task(config)
    loss = _loss(task, config)
    adamw, _ = optimizer(task, config.optim)
    for _ in range(STEPS):
        adamw.zero_grad()
        loss().backward()
        adamw.step()
    found: dict[str, list[float]] = {}

    def kept(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, given: Any, output: Tensor) -> None:
            found.setdefault(DECODER_BLOCK.sub(r"\1", name), []).append(float(output.abs().mean()))

        return keep

    hooks = [
        part.register_forward_hook(kept(name.removeprefix("model.")))
        for name, part in task.named_modules()
        if isinstance(part, WATCHED) or name.endswith(WATCHED_LAYERS)
    ]
    with torch.no_grad():
        loss()
    for hook in hooks:
        hook.remove()
    return {layer: sum(sizes) / len(sizes) for layer, sizes in found.items()}


def _task(config: Config) -> Task:
    if isinstance(config, PretrainConfig):
        return SimMIMTask(config)
    return SegVolTask(config, TextBank.seeded([NAME], config.model.text_dim))


def _loss(task: Task, config: Config) -> Callable[[], Tensor]:
    """Computes the task's loss on smooth noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(VOLUMES, 1, 4, 4, 4, generator=generator)
    image_BCDHW = F.interpolate(coarse, size=config.model.input_shape, mode="trilinear")
    if isinstance(task, SimMIMTask):
        tokens = len(task.encoder.patches(image_BCDHW)[0])
        mask_BT = (torch.randperm(tokens, generator=generator) < task.hidden).expand(VOLUMES, -1)
        return lambda: task.loss({"image_BCDHW": image_BCDHW, "mask_BT": mask_BT})
    assert isinstance(task, SegVolTask)
    model, masks_BKDHW = task.model, image_BCDHW > 0.5
    prompts = model.prompts([[_prompt(mask_KDHW[0].numpy(), config.model.mask_prompt)] for mask_KDHW in masks_BKDHW])

    def loss() -> Tensor:
        logits_BPDHW = model(image_BCDHW, prompts)
        dice_BKP, bce_BKP = mask_losses(logits_BPDHW[:, :, None], masks_BKDHW)
        return (dice_BKP + bce_BKP).mean()

    return loss


def _prompt(mask_DHW: np.ndarray, with_mask: bool) -> Prompt:
    """All kinds of prompts for a mask."""
    points_N3 = np.argwhere(mask_DHW)[:2]
    before_DHW = mask_DHW.astype(np.float32) if with_mask else None
    labels_N = np.full(len(points_N3), INSIDE)
    return Prompt(NAME, points_N3, labels_N, box_of(mask_DHW), mask_DHW=before_DHW)
