"""Which category the mask of a spatial prompt looks like (paper Fig. 5: the eight likeliest).

1. On the overview the model decodes the spatial prompt alone, without text: p, a probability a voxel.
2. It decodes each category of its text bank by text alone: q.
3. Their soft_dice is the soft Dice of the two, 2 sum(pq) / (sum(p) + sum(q)): what is asked is where the model itself
   sees a category, so a mask within a larger organ is not read as that organ.

Letters: J prompts, K categories, V voxels of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.zoom import Promptable

READ = 8
"""Categories named for each mask, as in the paper's figure."""
TOGETHER = 8
"""Prompts decoded together."""


@dataclass(frozen=True)
class CategoryMatch:
    """One category in the match of one mask."""

    case: str
    category: str
    """What the prompt was drawn for."""
    prompt: str
    """Its kind and source."""
    place: int
    """1 for the likeliest."""
    named: str
    """The category at that place."""
    soft_dice: float


@torch.inference_mode()
def soft_dice(model: Promptable, tokens_BTE: torch.Tensor, asked: Sequence[Prompt], names: Sequence[str]) -> np.ndarray:
    """Soft Dice (J,K) of the masks of `asked`, in voxels of the model's input, with the masks of `names` by text.

    tokens_BTE: the overview's, B = 1. All J masks are held at once: 8 MB each at the published size.
    """
    asked_JV = torch.cat([_masks(model, tokens_BTE, part) for part in _batches(asked)])
    sizes_J = asked_JV.sum(dim=1)
    columns = []
    for part in _batches([Prompt(text=name) for name in names]):
        named_KV = _masks(model, tokens_BTE, part)
        columns.append(2 * (asked_JV @ named_KV.T) / (sizes_J[:, None] + named_KV.sum(dim=1)))
    return torch.cat(columns, dim=1).cpu().numpy()


def _batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    return [list(prompts[first : first + TOGETHER]) for first in range(0, len(prompts), TOGETHER)]


def _masks(model: Promptable, tokens_BTE: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
    logits_BPDHW = model.decode(tokens_BTE, model.prompts([prompts]))
    return logits_BPDHW[0].float().sigmoid().flatten(1)


def matches_of(
    case: str, category: str, prompt: str, soft_dice_K: np.ndarray, names: Sequence[str]
) -> list[CategoryMatch]:
    """The first `READ` places, and the place of the category itself where it comes later and is known."""
    order = np.argsort(-soft_dice_K, kind="stable").tolist()
    places = [*range(min(READ, len(order)))]
    if category in names and (own := order.index(list(names).index(category))) >= READ:
        places.append(own)
    return [
        CategoryMatch(case, category, prompt, place + 1, names[order[place]], float(soft_dice_K[order[place]]))
        for place in places
    ]
