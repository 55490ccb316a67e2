"""Match the mask of a spatial prompt with the categories that it resembles most (paper Fig. 5: the first eight).

1. Decode the spatial prompt on the overview, without text: p, a probability for each voxel.
2. Decode each category of the text bank by its text alone: q.
3. Compare the two by soft Dice, 2 sum(pq) / (sum(p) + sum(q)). It compares with where the model itself sees a category,
   so a mask within a larger organ does not match that organ.

Letters: J prompts, K categories, V voxels of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.zoom import Promptable

TOP = 8
"""Categories listed for each mask, as in the paper's figure."""
PROMPT_BATCH = 8
"""Prompts decoded at once."""


@dataclass(frozen=True)
class CategoryMatch:
    """One category that the mask of a prompt resembles."""

    case: str
    category: str
    """The category that the prompt was sampled for."""
    prompt: str
    """Kind and source of the prompt."""
    place: int
    """Rank by soft Dice; 1 is the most similar."""
    named: str
    """The category at that rank."""
    soft_dice: float


@torch.inference_mode()
def soft_dice(
    model: Promptable, tokens_BTE: torch.Tensor, prompts: Sequence[Prompt], names: Sequence[str]
) -> np.ndarray:
    """Compute the soft Dice of the masks of J prompts with the masks of K categories by text.

    All J masks are in memory at once: 8 MB each at the published size.

    Args:
        model: Decodes both.
        tokens_BTE: Tokens of the overview, B = 1.
        prompts: Spatial prompts in voxels of the model's input.
        names: Categories of the model's text bank.

    Returns:
        Soft Dice, float32 of shape (J, K).
    """
    masks_JV = torch.cat([_masks(model, tokens_BTE, batch) for batch in _batches(prompts)])
    sizes_J = masks_JV.sum(dim=1)
    columns = []
    for batch in _batches([Prompt(text=name) for name in names]):
        named_KV = _masks(model, tokens_BTE, batch)
        columns.append(2 * (masks_JV @ named_KV.T) / (sizes_J[:, None] + named_KV.sum(dim=1)))
    return torch.cat(columns, dim=1).cpu().numpy()


def _batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    return [list(prompts[first : first + PROMPT_BATCH]) for first in range(0, len(prompts), PROMPT_BATCH)]


def _masks(model: Promptable, tokens_BTE: torch.Tensor, prompts: list[Prompt]) -> torch.Tensor:
    logits_BPDHW = model.decode(tokens_BTE, model.prompts([prompts]))
    return logits_BPDHW[0].float().sigmoid().flatten(1)


def matches_of(
    case: str, category: str, prompt: str, soft_dice_K: np.ndarray, names: Sequence[str]
) -> list[CategoryMatch]:
    """List the `TOP` most similar categories, and the prompt's own category if it ranks lower.

    Args:
        case: Key of the case.
        category: Category that the prompt was sampled for.
        prompt: Kind and source of the prompt.
        soft_dice_K: Soft Dice with each category of `names`.
        names: Categories of the model's text bank.
    """
    order = np.argsort(-soft_dice_K, kind="stable").tolist()
    places = [*range(min(TOP, len(order)))]
    if category in names and (own := order.index(list(names).index(category))) >= TOP:
        places.append(own)
    return [
        CategoryMatch(case, category, prompt, place + 1, names[order[place]], float(soft_dice_K[order[place]]))
        for place in places
    ]
