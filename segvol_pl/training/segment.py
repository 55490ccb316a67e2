"""Supervised training: each category of a volume is prompted in every combination (paper Algorithm 1).

1. Each volume is encoded once, and what its prompts share is computed once.
2. All its prompts (each category in every combination, and the pseudo-labels) are decoded group by group.
3. A group is upsampled and compared with its masks before the next one is decoded, see `grouped_loss`.

Letters: B batch, K categories (or pseudo-labels) of one volume, C prompt combinations, P prompts of one volume, D H W
voxels, d h w voxels of low resolution, N points, M landmarks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, distributed

from segvol_pl.config import TrainConfig, named_parts
from segvol_pl.config.loader import plain
from segvol_pl.data.batch import Batch
from segvol_pl.data.sampling import BYTE
from segvol_pl.kernels import fused
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.mask_decoder import ImageContext
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.planning import memory
from segvol_pl.training.grouped_loss import sum_over_groups
from segvol_pl.training.losses import low_mask_losses, mask_losses
from segvol_pl.training.module import Task, log_validation, poisoned

log = logging.getLogger(__name__)


class SegVolTask(Task):
    """BCE + Dice loss over the prompt combinations, plus `pseudo_weight` x the same over pseudo-labels (Eq. 2-4).

    The loss is a pure function of the batch: all randomness is in the samples.

    Args:
        config: the run's configuration.
        bank: vectors of the categories that text prompts name; its rows are the batch's `category_BK`.
    """

    def __init__(self, config: TrainConfig, bank: TextBank) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        self.model = SegVol(config.model, bank)
        self.model.image_encoder.compute_again(config.run.recompute)
        self.save_hyperparameters({"task": "segment", "config": plain(config), "categories": bank.names})

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss () of a micro-batch, and log it and its parts."""
        loss, parts = self.step_losses(batch)
        self.means.log(self, parts)
        return poisoned(loss)

    def validation_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Log the loss and its parts; return the predicted masks of all combinations, bool (B,K,C,D,H,W)."""
        predicted: list[Tensor] = []
        _, parts = self.losses(batch, predicted)
        log_validation(self, parts, batch)
        combinations = len(self.config.prompts.combinations)
        count = batch["valid_BK"].shape[1] * combinations
        masks_BKCDHW: Tensor = torch.cat(predicted, dim=1)[:, :count].unflatten(1, (-1, combinations))
        return masks_BKCDHW

    def losses(self, batch: Batch, predicted: list[Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch.

        Args:
            batch: a micro-batch, see `data.batch`.
            predicted: a list to which the predicted masks are appended group by group, bool (B,P,D,H,W). Only without
                gradients.

        Returns:
            The loss () to minimise, and its detached parts by name: loss, supervised, pseudo, and Dice loss and BCE of
            each combination.
        """
        combinations, landmark_counts = self.config.prompts.combinations, self.config.model.landmark_counts
        targets = labelled = supervised_targets(batch, combinations, landmark_counts)
        pseudo = pseudo_targets(batch, landmark_counts) if "pseudo_boxes_BK6" in batch else None
        if pseudo is not None:
            targets = labelled.joined(pseudo, self.config.pseudo_weight)
        loss, dice_BP, bce_BP = self.prompt_losses(self.model.encode(batch["image_BCDHW"]), targets, predicted)
        count = labelled.weights_BP.shape[1]
        parts: dict[str, Tensor] = {}
        for kind, loss_BP in (("dice_loss", dice_BP), ("bce", bce_BP)):
            weighted_BP = labelled.weights_BP * loss_BP[:, :count]
            loss_C = by_combination(weighted_BP, batch, len(combinations))
            parts |= {f"{kind}/{name}": each for name, each in zip(combinations, loss_C, strict=True)}
        both_BP = dice_BP + bce_BP
        if pseudo is not None:
            parts["pseudo"] = (pseudo.weights_BP * both_BP[:, count:]).sum()
        supervised = (labelled.weights_BP * both_BP[:, :count]).sum()
        return loss, {**parts, "supervised": supervised, "loss": loss.detach()}

    def prompt_losses(
        self, tokens_BTE: Tensor, targets: PromptTargets, predicted: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode prompts and compare them with their masks, group by group.

        Args:
            tokens_BTE: the encoded images.
            targets: the prompts, their masks and their weights in the loss.
            predicted: as in `losses`.

        Returns:
            The weighted loss (), and the detached Dice loss and BCE of every prompt, (B,P) each.
        """

        def term(group: slice, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.sharding.gather()
            low_BPdhw = self.model.decode_from_context(ImageContext(*context), targets.prompts.at(group))
            rows_P = targets.rows_P[group]
            if fused(low_BPdhw) and predicted is None:
                dice_BP, bce_BP = low_mask_losses(low_BPdhw, targets.masks_BKDHW, rows_P)
            else:
                logits_BPDHW = self.model.upsample(low_BPdhw)
                if predicted is not None:
                    predicted.append(logits_BPDHW > 0)
                found = mask_losses(logits_BPDHW[:, :, None], targets.masks_BKDHW[:, rows_P])
                dice_BP, bce_BP = (loss[..., 0] for loss in found)
            return (targets.weights_BP[:, group] * (dice_BP + bce_BP)).sum(), dice_BP, bce_BP

        groups = self.groups(len(targets.rows_P), len(tokens_BTE))
        decoding = (self.model.prompt_encoder, self.model.text_encoder, self.model.mask_decoder)
        weights = [parameter for part in decoding for parameter in part.parameters()]
        return sum_over_groups(
            term, groups, self.model.image_context(tokens_BTE), weights, self.sharding.weights_resident
        )

    def groups(self, count: int, volumes: int) -> list[slice]:
        """Slices of the `count` prompts of each volume that are decoded together, for `volumes` volumes."""
        bf16 = torch.is_autocast_enabled(self.device.type)
        sizes = memory.prompt_groups(self.config, count, volumes, bf16, self.room)
        return [slice(last - size, last) for size, last in zip(sizes, accumulate(sizes), strict=True)]

    @functools.cached_property
    def room(self) -> float | None:
        """Bytes of GPU memory that this run may use: the minimum over all ranks. None on a CPU. Measured once."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        room = torch.tensor(float(free + torch.cuda.memory_reserved(self.device)), device=self.device)
        # Ranks that gather weights for each group must have the same number of groups.
        if distributed.is_initialized():
            distributed.all_reduce(room, distributed.ReduceOp.MIN)
        log.info("memory: %.1f GiB of the GPU for this run", room.item() / 2**30)
        return room.item()


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


def by_combination(loss_BP: Tensor, batch: Batch, count: int) -> Tensor:
    """Sum a loss over the prompts of each of `count` combinations, (C,)."""
    drawn_BP = drawn_combinations(batch)
    loss_BKC: Tensor
    if drawn_BP is None:
        loss_BKC = loss_BP.unflatten(1, (-1, count))
    else:
        loss_BKC = loss_BP[..., None] * (drawn_BP[..., None] == torch.arange(count, device=loss_BP.device))
    return loss_BKC.sum((0, 1))


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
    return PromptTargets(prompts, batch["masks_BKDHW"], _rows(valid_BK).repeat_interleave(each), weights_BP)


def pseudo_targets(batch: Batch, landmark_counts: dict[str, int]) -> PromptTargets:
    """Pseudo-labels, even ones prompted by points and odd ones by their box; summed as in Algorithm 1."""
    valid_BK = batch["pseudo_valid_BK"]
    kinds = ["box" if place % 2 else "points" for place in range(valid_BK.shape[1])]
    weights_BP = valid_BK.float() / len(valid_BK)
    prompts = _prompts(batch, "pseudo_", kinds, landmark_counts)
    return PromptTargets(prompts, batch["pseudo_masks_BKDHW"], _rows(valid_BK), weights_BP)


def _rows(valid_BK: Tensor) -> Tensor:
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
