"""Supervised training: each category of a volume is prompted in every combination (paper Algorithm 1).

1. Each volume is encoded once, and what its prompts share is computed once.
2. All its prompts (each category in every combination, and the pseudo-labels) are decoded group by group.
3. A group is upsampled and compared with its masks before the next one is decoded, see `grouped_loss`.
4. With `prompts.corrections`, one prompt of each category is then asked again, see `corrections`.

Letters: B batch, K categories (or pseudo-labels) of one volume, C prompt combinations, P prompts of one volume, D H W
voxels, d h w voxels of low resolution, N points, M landmarks.
"""

from __future__ import annotations

import functools
import logging
from itertools import accumulate

import torch
from torch import Tensor, distributed

from segvol_pl.config import TrainConfig, Transfer
from segvol_pl.config.loader import plain
from segvol_pl.data.batch import Batch
from segvol_pl.kernels import fused
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.mask_decoder import ImageContext
from segvol_pl.model.transfer import transferred
from segvol_pl.planning import memory
from segvol_pl.training.corrections import Corrections
from segvol_pl.training.grouped_loss import Group, sum_over_groups
from segvol_pl.training.losses import low_mask_losses, mask_losses
from segvol_pl.training.module import Task, log_validation, poisoned
from segvol_pl.training.targets import PromptTargets, drawn_combinations, pseudo_targets, supervised_targets

log = logging.getLogger(__name__)


class SegVolTask(Task):
    """BCE + Dice loss over the prompt combinations, plus `pseudo_weight` x the same over pseudo-labels (Eq. 2-4).

    The loss is a pure function of the batch: all randomness is in the samples.

    Args:
        config: the run's configuration.
        bank: vectors of the categories that text prompts name, and of their synonyms; its rows are the batch's
            `category_BK`.
    """

    def __init__(self, config: TrainConfig, bank: TextBank) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        self.model = SegVol(config.model, bank)
        self.model.image_encoder.compute_again(config.run.recompute)
        if config.optim.transfer is Transfer.mup:
            self.rates = transferred(self, config, lambda other: SegVolTask(other, bank))
        stated = {"task": "segment", "config": plain(config), "categories": bank.names}
        self.save_hyperparameters(stated | ({"synonyms": bank.synonyms} if bank.synonyms else {}))

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
                gradients. With it, `volume_losses_B` is set too.

        Returns:
            The loss () to minimise, and its detached parts by name: loss, supervised, pseudo, and Dice loss and BCE of
            each combination and of each round of corrections.
        """
        combinations, landmark_counts = self.config.prompts.combinations, self.config.model.landmark_counts
        targets = labelled = supervised_targets(batch, combinations, landmark_counts)
        corrections = Corrections.of(batch, labelled, len(combinations))
        pseudo = pseudo_targets(batch, landmark_counts) if "pseudo_boxes_BK6" in batch else None
        if pseudo is not None:
            targets = labelled.joined(pseudo, self.config.pseudo_weight)
        tokens_BTE = self.model.encode(batch["image_BCDHW"])
        loss, dice_BP, bce_BP = self.prompt_losses(tokens_BTE, targets, predicted, corrections)
        count, first = labelled.weights_BP.shape[1], targets.weights_BP.shape[1]
        parts: dict[str, Tensor] = {}
        for kind, loss_BP in (("dice_loss", dice_BP), ("bce", bce_BP)):
            weighted_BP = labelled.weights_BP * loss_BP[:, :count]
            loss_C = by_combination(weighted_BP, batch, len(combinations))
            parts |= {f"{kind}/{name}": each for name, each in zip(combinations, loss_C, strict=True)}
            if corrections is not None:
                loss_R = corrections.by_round(loss_BP[:, first:])
                parts |= {f"{kind}/correction{asked}": each for asked, each in enumerate(loss_R, start=1)}
        both_BP = dice_BP + bce_BP
        if pseudo is not None:
            parts["pseudo"] = (pseudo.weights_BP * both_BP[:, count:first]).sum()
        if predicted is not None:
            asked = [] if corrections is None else [corrections.weights_BK] * corrections.rounds
            # A weight is divided by the number of volumes of the batch.
            self.volume_losses_B = len(both_BP) * (torch.cat([targets.weights_BP, *asked], dim=1) * both_BP).sum(1)
        supervised = (labelled.weights_BP * both_BP[:, :count]).sum()
        return loss, {**parts, "supervised": supervised, "loss": loss.detach()}

    def prompt_losses(
        self,
        tokens_BTE: Tensor,
        targets: PromptTargets,
        predicted: list[Tensor] | None = None,
        corrections: Corrections | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode prompts and compare them with their masks, group by group.

        Args:
            tokens_BTE: the encoded images.
            targets: the prompts, their masks and their weights in the loss.
            predicted: as in `losses`.
            corrections: what to ask again after that.

        Returns:
            The weighted loss (), and the detached Dice loss and BCE of every prompt, (B,P) each; then those of each
            round of corrections.
        """

        def term(group: Group, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.sharding.gather()
            place = group.prompts
            asked = targets if corrections is None or not group.asked else corrections.targets(group.asked)
            low_BPdhw = self.model.decode_from_context(ImageContext(*context), asked.prompts.at(place))
            if corrections is not None:
                corrections.answered(group, low_BPdhw)
            if fused(low_BPdhw) and predicted is None:
                dice_BP, bce_BP = low_mask_losses(low_BPdhw, asked.masks_BKDHW, asked.rows_P[place])
            else:
                logits_BPDHW = self.model.upsample(low_BPdhw)
                if predicted is not None and not group.asked:
                    predicted.append(logits_BPDHW > 0)
                found = mask_losses(logits_BPDHW[:, :, None], asked.masks_BKDHW[:, asked.rows_P[place]])
                dice_BP, bce_BP = (loss[..., 0] for loss in found)
            return (asked.weights_BP[:, place] * (dice_BP + bce_BP)).sum(), dice_BP, bce_BP

        volumes = len(tokens_BTE)
        groups = [Group(place) for place in self.groups(len(targets.rows_P), volumes)]
        if corrections is not None:
            again = self.groups(corrections.categories, volumes)
            groups += [Group(place, asked) for asked in range(1, corrections.rounds + 1) for place in again]
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


def by_combination(loss_BP: Tensor, batch: Batch, count: int) -> Tensor:
    """Sum a loss over the prompts of each of `count` combinations, (C,)."""
    drawn_BP = drawn_combinations(batch)
    loss_BKC: Tensor
    if drawn_BP is None:
        loss_BKC = loss_BP.unflatten(1, (-1, count))
    else:
        loss_BKC = loss_BP[..., None] * (drawn_BP[..., None] == torch.arange(count, device=loss_BP.device))
    return loss_BKC.sum((0, 1))
