"""The prompts of a training step with their target masks and their weights in the loss, from a batch.

Letters: B batch, K categories (or pseudo-labels) of one volume, C prompt combinations, P prompts of one volume, D H W
voxels, N points, M landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segvol_pl.config import named_parts
from segvol_pl.data.batch import Batch
from segvol_pl.data.sampling import BYTE
from segvol_pl.model.prompt_encoder import PromptTensors


@dataclass(frozen=True)
class PromptTargets:
    """Prompts, their target masks, and their weights in the loss."""

    prompts: PromptTensors
    masks_BKDHW: Tensor
    """bool; prompts of one mask share it."""
    rows_P: Tensor
    """Index of each prompt's target mask among its volume's K masks, int64."""
    weights_BP: Tensor

    def joined(self, other: PromptTargets, weight: float) -> PromptTargets:
        """Append the other's prompts, with their loss weights multiplied by `weight`."""
        weights_BP = torch.cat([self.weights_BP, weight * other.weights_BP], dim=1)
        masks_BKDHW = torch.cat([self.masks_BKDHW, other.masks_BKDHW], dim=1)
        rows_P = torch.cat([self.rows_P, self.masks_BKDHW.shape[1] + other.rows_P])
        return PromptTargets(self.prompts.joined(other.prompts), masks_BKDHW, rows_P, weights_BP)


def drawn_combinations(batch: Batch) -> Tensor | None:
    """Index of the combination of each prompt, int64 (B,P), if they were drawn; None: each category in all of them."""
    return batch["combination_BKC"].flatten(1) if "combination_BKC" in batch else None


def supervised_targets(batch: Batch, combinations: list[str], landmark_counts: dict[str, int]) -> PromptTargets:
    """Each category in its combinations. A combination counts as its mean over the batch's masks; invalid masks as 0.

    If combinations are drawn, the loss is multiplied by how many more there are: this estimates the loss over all.

    landmark_counts: number of landmarks of each kind that the model has.
    """
    valid_BK, drawn_BP = batch["valid_BK"], drawn_combinations(batch)
    each = len(combinations) if drawn_BP is None else drawn_BP.shape[1] // valid_BK.shape[1]
    weights_BP = valid_BK.float().repeat_interleave(each, dim=1) / (valid_BK.numel() * each / len(combinations))
    kinds = combinations * valid_BK.shape[1] if drawn_BP is None else combinations
    prompts = _prompts(batch, "", kinds, landmark_counts, drawn_BP)
    return PromptTargets(prompts, batch["masks_BKDHW"], mask_rows(valid_BK).repeat_interleave(each), weights_BP)


def pseudo_targets(batch: Batch, landmark_counts: dict[str, int]) -> PromptTargets:
    """Pseudo-labels, even ones prompted by points and odd ones by their box; summed as in Algorithm 1."""
    valid_BK = batch["pseudo_valid_BK"]
    kinds = ["box" if place % 2 else "points" for place in range(valid_BK.shape[1])]
    weights_BP = valid_BK.float() / len(valid_BK)
    prompts = _prompts(batch, "pseudo_", kinds, landmark_counts)
    return PromptTargets(prompts, batch["pseudo_masks_BKDHW"], mask_rows(valid_BK), weights_BP)


def mask_rows(valid_BK: Tensor) -> Tensor:
    """Index of each of the K masks, int64 (K,)."""
    return torch.arange(valid_BK.shape[1], device=valid_BK.device)


def _prompts(
    batch: Batch, prefix: str, kinds: Sequence[str], landmark_counts: dict[str, int], drawn_BP: Tensor | None = None
) -> PromptTensors:
    """The batch's K prompts, each repeated P / K times, with the parts that their kind names.

    drawn_BP: index of each prompt's kind; None if `kinds` has one entry for each of the P prompts.
    """
    valid_BK = batch[f"{prefix}valid_BK"]
    shape = (len(valid_BK), len(kinds)) if drawn_BP is None else tuple(drawn_BP.shape)
    each = shape[1] // valid_BK.shape[1]
    # Created on the device: copying Python booleans there would synchronise with the GPU.
    yes, no = valid_BK.new_ones(()), valid_BK.new_zeros(())

    def spread(name: str) -> Tensor:
        return batch[prefix + name].repeat_interleave(each, dim=1)

    def has(part: str) -> Tensor:
        named = torch.stack([yes if part in named_parts(kind) else no for kind in kinds])
        return named.expand(shape) if drawn_BP is None else named[drawn_BP]

    known = prefix + "landmarks_BKM3" in batch
    landmarks_BPM3 = (
        spread("landmarks_BKM3").float()
        if known
        else torch.zeros(*shape, sum(landmark_counts.values()), 3, device=valid_BK.device)
    )
    has_landmarks = [has(name)[..., None].expand(-1, -1, count) for name, count in landmark_counts.items()]
    return PromptTensors(
        points_BPN3=spread("points_BKN3").float(),
        labels_BPN=spread("labels_BKN"),
        boxes_BP6=spread("boxes_BK6").float(),
        text_BP=spread("category_BK"),
        landmarks_BPM3=landmarks_BPM3,
        has_points_BP=has("points"),
        has_box_BP=has("box"),
        has_text_BP=has("text"),
        has_landmarks_BPM=torch.cat([valid_BK.new_zeros((*shape, 0)), *has_landmarks], dim=-1),
        **_masks(batch, prefix, shape),
    )


def _masks(batch: Batch, prefix: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The coarse masks of prompts of this shape; none for pseudo-labels, and nothing if the model takes no masks."""
    if "coarse_BKDHW" not in batch:
        return {}
    coarse_BKDHW, has_BK = batch["coarse_BKDHW"], batch["has_coarse_BK"]
    if prefix:
        nothing = coarse_BKDHW.new_zeros((), dtype=torch.float32)
        masks_BPDHW = nothing.expand(*shape, *coarse_BKDHW.shape[2:])
        return {"masks_BPDHW": masks_BPDHW, "has_mask_BP": has_BK.new_zeros(shape)}
    each = shape[1] // has_BK.shape[1]
    masks_BPDHW = (coarse_BKDHW.float() / BYTE).repeat_interleave(each, dim=1)
    return {"masks_BPDHW": masks_BPDHW, "has_mask_BP": has_BK.repeat_interleave(each, dim=1)}
