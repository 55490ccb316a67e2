"""Supervised training: every category of a volume asked for in every prompt combination (paper Algorithm 1).

1. Each volume is encoded once, and what its prompts have in common is made once.
2. All its prompts, those of categories in every combination and those of pseudo-labels, are decoded group by group.
3. A group is brought to full resolution and compared with its masks before the next one is decoded, see `groups`.

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
    """BCE + Dice over the prompt combinations plus `pseudo_weight` x the same over pseudo-labels (paper Eq. 2-4).

    A pure function of the batch: it draws nothing.
    """

    def __init__(self, config: TrainConfig, bank: TextBank) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        self.model = SegVol(config.model, bank)
        self.model.image_encoder.compute_again(config.run.recompute)
        self.save_hyperparameters({"task": "segment", "config": plain(config), "categories": bank.names})

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a micro-batch; it and its parts are logged as their step's means."""
        loss, parts = self.losses(batch)
        self.means.log(self, parts)
        return poisoned(loss)

    def validation_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The masks of the categories in every combination, for whoever looks on: bool (B,K,C,D,H,W)."""
        answers: list[Tensor] = []
        _, parts = self.losses(batch, answers)
        log_validation(self, parts, batch)
        combinations = len(self.config.prompts.combinations)
        count = batch["valid_BK"].shape[1] * combinations
        return torch.cat(answers, dim=1)[:, :count].unflatten(1, (-1, combinations))

    def losses(self, batch: Batch, answers: list[Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, and its parts by name: loss, supervised, pseudo, and Dice loss and BCE per combination.

        answers: if given, the masks are appended to it, group by group, bool (B,P,D,H,W); without gradients alone.
        """
        combinations, marked = self.config.prompts.combinations, self.config.model.landmark_counts
        asked = questions = supervised_questions(batch, combinations, marked)
        pseudo = pseudo_questions(batch, marked) if "pseudo_boxes_BK6" in batch else None
        if pseudo is not None:
            asked = questions.joined(pseudo, self.config.pseudo_weight)
        loss, dice_BP, bce_BP = self.prompt_losses(self.model.encode(batch["image_BCDHW"]), asked, answers)
        count = questions.weights_BP.shape[1]
        parts: dict[str, Tensor] = {}
        for kind, loss_BP in (("dice_loss", dice_BP), ("bce", bce_BP)):
            loss_C = (questions.weights_BP * loss_BP[:, :count]).unflatten(1, (-1, len(combinations))).sum((0, 1))
            parts |= {f"{kind}/{name}": each for name, each in zip(combinations, loss_C, strict=True)}
        both_BP = dice_BP + bce_BP
        if pseudo is not None:
            parts["pseudo"] = (pseudo.weights_BP * both_BP[:, count:]).sum()
        supervised = (questions.weights_BP * both_BP[:, :count]).sum()
        return loss, {**parts, "supervised": supervised, "loss": loss.detach()}

    def prompt_losses(
        self, tokens_BTE: Tensor, asked: Questions, answers: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss (), and Dice loss and BCE of every prompt, detached, (B,P) each; `answers` as above."""

        def term(group: slice, *context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            self.sharding.gather()
            low_BPdhw, rows_P = (
                self.model.decode_from_context(ImageContext(*context), asked.prompts.at(group)),
                asked.rows_P[group],
            )
            if fused(low_BPdhw) and answers is None:
                dice_BP, bce_BP = low_mask_losses(low_BPdhw, asked.masks_BKDHW, rows_P)
            else:
                logits_BPDHW = self.model.upsample(low_BPdhw)
                if answers is not None:
                    answers.append(logits_BPDHW > 0)
                found = mask_losses(logits_BPDHW[:, :, None], asked.masks_BKDHW[:, rows_P])
                dice_BP, bce_BP = (loss[..., 0] for loss in found)
            return (asked.weights_BP[:, group] * (dice_BP + bce_BP)).sum(), dice_BP, bce_BP

        groups = self.groups(len(asked.rows_P), len(tokens_BTE))
        decoding = (self.model.prompt_encoder, self.model.text_encoder, self.model.mask_decoder)
        weights = [parameter for part in decoding for parameter in part.parameters()]
        return sum_over_groups(
            term, groups, self.model.image_context(tokens_BTE), weights, self.sharding.weights_resident
        )

    def groups(self, count: int, volumes: int) -> list[slice]:
        """Which of `count` prompts of each of so many volumes are decoded together."""
        bf16 = torch.is_autocast_enabled(self.device.type)
        sizes = memory.prompt_groups(self.config, count, volumes, bf16, self.room)
        return [slice(last - size, last) for size, last in zip(sizes, accumulate(sizes), strict=True)]

    @functools.cached_property
    def room(self) -> float | None:
        """Bytes of a GPU that this run may fill, on the fullest of all ranks'; None on a CPU. Asked for once."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        room = torch.tensor(float(free + torch.cuda.memory_reserved(self.device)), device=self.device)
        # Ranks that gather weights for each group must have as many of them.
        if distributed.is_initialized():
            distributed.all_reduce(room, distributed.ReduceOp.MIN)
        log.info("memory: %.1f GiB of the GPU for this run", room.item() / 2**30)
        return room.item()


@dataclass(frozen=True)
class Questions:
    """Prompts with the masks that answer them, and what each counts in the loss."""

    prompts: PromptTensors
    masks_BKDHW: Tensor
    """bool; prompts of one mask share it."""
    rows_P: Tensor
    """Which of its volume's masks answers a prompt, int64."""
    weights_BP: Tensor

    def joined(self, other: Questions, weight: float) -> Questions:
        """With the other's behind them, which count `weight` times as much."""
        weights_BP = torch.cat([self.weights_BP, weight * other.weights_BP], dim=1)
        masks_BKDHW = torch.cat([self.masks_BKDHW, other.masks_BKDHW], dim=1)
        rows_P = torch.cat([self.rows_P, self.masks_BKDHW.shape[1] + other.rows_P])
        return Questions(self.prompts.joined(other.prompts), masks_BKDHW, rows_P, weights_BP)


def supervised_questions(batch: Batch, combinations: list[str], marked: dict[str, int]) -> Questions:
    """The categories in every combination: a combination counts its mean over the batch's masks, an invalid one 0.

    marked: the model's kinds of landmarks, and how many each has.
    """
    valid_BK = batch["valid_BK"]
    weights_BP = valid_BK.float().repeat_interleave(len(combinations), dim=1) / valid_BK.numel()
    asked = combined(batch, combinations, marked)
    rows_P = _rows(valid_BK).repeat_interleave(len(combinations))
    return Questions(asked, batch["masks_BKDHW"], rows_P, weights_BP)


def pseudo_questions(batch: Batch, marked: dict[str, int]) -> Questions:
    """Even pseudo-labels are asked for by points, odd ones by their box: the sum over them, as in Algorithm 1."""
    valid_BK = batch["pseudo_valid_BK"]
    kinds = ["box" if place % 2 else "points" for place in range(valid_BK.shape[1])]
    weights_BP = valid_BK.float() / len(valid_BK)
    asked = _prompts(batch, "pseudo_", kinds, marked)
    return Questions(asked, batch["pseudo_masks_BKDHW"], _rows(valid_BK), weights_BP)


def _rows(valid_BK: Tensor) -> Tensor:
    return torch.arange(valid_BK.shape[1], device=valid_BK.device)


def combined(batch: Batch, combinations: list[str], marked: dict[str, int]) -> PromptTensors:
    """Each of the batch's K categories in each of C combinations: P = K x C prompts, combination fastest."""
    return _prompts(batch, "", combinations * batch["valid_BK"].shape[1], marked)


def _prompts(batch: Batch, prefix: str, kinds: Sequence[str], marked: dict[str, int]) -> PromptTensors:
    """The batch's K prompts, each P / K times in a row, with the parts that the P `kinds` name."""
    valid_BK = batch[f"{prefix}valid_BK"]
    each = len(kinds) // valid_BK.shape[1]
    # Made on the device: a tensor of Python's own booleans would stop a GPU.
    yes, no = valid_BK.new_ones(()), valid_BK.new_zeros(())

    def spread(name: str) -> Tensor:
        return batch[prefix + name].repeat_interleave(each, dim=1)

    def has(part: str) -> Tensor:
        return torch.stack([yes if part in named_parts(kind) else no for kind in kinds]).expand(len(valid_BK), -1)

    shape, known = (len(valid_BK), len(kinds)), prefix + "landmarks_BKM3" in batch
    no_marks = (*shape, sum(marked.values()), 3)
    has_landmarks = [has(name)[..., None].expand(-1, -1, count) for name, count in marked.items()]
    return PromptTensors(
        points_BPN3=spread("points_BKN3").float(),
        labels_BPN=spread("labels_BKN"),
        boxes_BP6=spread("boxes_BK6").float(),
        text_BP=spread("category_BK"),
        landmarks_BPM3=spread("landmarks_BKM3").float() if known else valid_BK.new_zeros(no_marks, dtype=torch.float32),
        has_points_BP=has("points"),
        has_box_BP=has("box"),
        has_text_BP=has("text"),
        has_marks_BPM=torch.cat([valid_BK.new_zeros((*shape, 0)), *has_landmarks], dim=-1),
    )
