"""Supervised training: every category of a volume asked for in every prompt combination (paper Algorithm 1).

Letters: B batch, K categories (or pseudo-labels) of one volume, C prompt combinations, D H W voxels, N points.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segvol_pl.config import TrainConfig
from segvol_pl.configure import plain
from segvol_pl.data.stream import Batch
from segvol_pl.losses import mask_losses
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.tasks.optim import StepMeans, log_validation, optimizer


class SegVolTask(pl.LightningModule):
    """BCE + Dice over the prompt combinations plus `pseudo_weight` x the same over pseudo-labels (paper Eq. 2-4).

    A pure function of the batch: it draws nothing.
    """

    def __init__(self, config: TrainConfig, bank: TextBank) -> None:
        super().__init__()
        self.config, self.means = config, StepMeans()
        self.model = SegVol(config.model, bank)
        self.save_hyperparameters({"task": "segment", "config": plain(config), "categories": bank.names})

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss, parts = self.losses(batch)
        self.means.log(self, parts)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        _, parts = self.losses(batch)
        log_validation(self, parts, batch)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, and its parts by name: loss, supervised, pseudo, and Dice loss per combination."""
        combinations = self.config.prompts.combinations
        tokens_BTE = self.model.encode(batch["image_BCDHW"])
        dice_C, bce_C = self.prompt_losses(tokens_BTE, batch, "", combinations)
        supervised = (dice_C + bce_C).sum()
        parts = {f"dice_loss/{name}": dice.detach() for name, dice in zip(combinations, dice_C, strict=True)}
        loss = supervised
        if "pseudo_boxes_BK6" in batch:
            pseudo = self._pseudo(tokens_BTE, batch)
            parts["pseudo"] = pseudo.detach()
            loss = supervised + self.config.pseudo_weight * pseudo
        return loss, {**parts, "supervised": supervised.detach(), "loss": loss.detach()}

    def prompt_losses(
        self, tokens_BTE: Tensor, batch: Batch, prefix: str, combinations: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Dice loss and BCE per combination, (C,) each: means over the batch's masks, an invalid one counting 0."""
        prompts = combined(batch, prefix, combinations)
        logits_BPDHW = self.model.decode(tokens_BTE, prompts)
        logits_BKCDHW = logits_BPDHW.unflatten(1, (-1, len(combinations)))
        dice_BKC, bce_BKC = mask_losses(logits_BKCDHW, batch[f"{prefix}masks_BKDHW"])
        valid_BK1 = batch[f"{prefix}valid_BK"][..., None]
        return (dice_BKC * valid_BK1).mean((0, 1)), (bce_BKC * valid_BK1).mean((0, 1))

    def _pseudo(self, tokens_BTE: Tensor, batch: Batch) -> Tensor:
        """Even pseudo-labels are asked for by points, odd ones by their box: the sum over them, as in Algorithm 1."""
        total = tokens_BTE.new_zeros(())
        for first, kind in enumerate(("points", "box")):
            part = {name: value[:, first::2] for name, value in batch.items() if name.startswith("pseudo_")}
            count = part["pseudo_valid_BK"].shape[1]
            if count:
                dice_C, bce_C = self.prompt_losses(tokens_BTE, part, "pseudo_", [kind])
                total = total + count * (dice_C + bce_C).sum()
        return total

    def configure_optimizers(self) -> Any:
        adamw, scheduler = optimizer(self.parameters(), self.config.optim)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def combined(batch: Batch, prefix: str, combinations: list[str]) -> PromptTensors:
    """Each of the batch's K prompts in each of C combinations: P = K x C prompts, combination fastest."""
    count = len(combinations)

    def spread(name: str) -> Tensor:
        return batch[prefix + name].repeat_interleave(count, dim=1)

    def has(part: str) -> Tensor:
        valid_BK = batch[f"{prefix}valid_BK"]
        flags = torch.tensor([part in name for name in combinations], device=valid_BK.device)
        return flags.repeat(valid_BK.shape[1]).expand(len(valid_BK), -1)

    return PromptTensors(
        points_BPN3=spread("points_BKN3").float(),
        labels_BPN=spread("labels_BKN"),
        boxes_BP6=spread("boxes_BK6").float(),
        text_BP=spread("category_BK"),
        has_points_BP=has("points"),
        has_box_BP=has("box"),
        has_text_BP=has("text"),
    )
