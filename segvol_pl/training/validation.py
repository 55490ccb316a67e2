"""What validation logs besides the loss: Dice of each category and prompt combination, and pictures of masks.

Letters: B batch, K categories of one volume, C prompt combinations, D H W voxels, G categories of the bank.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segvol_pl.data.batch import Batch
from segvol_pl.run_folder import HELD_OUT, VOLUMES
from segvol_pl.training.loggers import WandbRun
from segvol_pl.training.segment import SegVolTask


class ValidationDice(pl.Callback):
    """Log `val/dice/PROMPT/CATEGORY`, means over the validation's masks, and `val/dice/PROMPT`, the mean of those.

    Dice of binary masks, at the model's input resolution. A slice of the first batch's first volume is logged to wandb.
    """

    def __init__(self) -> None:
        self.sums_CG2 = torch.zeros(0)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if isinstance(module, SegVolTask):
            shape = len(module.config.prompts.combinations), len(module.hparams["categories"]), 2
            self.sums_CG2 = torch.zeros(shape, dtype=torch.float64, device=module.device)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if not isinstance(module, SegVolTask):
            return
        masks_BKCDHW: Tensor = outputs
        valid_BK1 = batch["valid_BK"][..., None]
        dice_BKC = dice(masks_BKCDHW, batch["masks_BKDHW"])
        # An invalid mask adds 0 to its row: leaving it out would synchronise with the GPU.
        summed_BKC2 = torch.stack([dice_BKC.where(valid_BK1, 0), valid_BK1.expand_as(dice_BKC)], dim=-1)
        self.sums_CG2.index_add_(1, batch["category_BK"].flatten(), summed_BKC2.flatten(0, 1).transpose(0, 1).double())
        if index == 0 and trainer.is_global_zero:
            self._log_picture(trainer, module, batch, masks_BKCDHW)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not isinstance(module, SegVolTask):
            return
        total = trainer.strategy.reduce(self.sums_CG2, reduce_op="sum")
        assert isinstance(total, Tensor)
        names: list[str] = module.hparams["categories"]
        metrics: dict[str, float] = {}
        for prompt, sums_G2 in zip(module.config.prompts.combinations, total.cpu(), strict=True):
            seen = {name: float(dice / count) for name, (dice, count) in zip(names, sums_G2, strict=True) if count}
            metrics |= {f"val/dice/{prompt}/{name}": value for name, value in seen.items()}
            metrics |= {f"val/dice/{prompt}": sum(seen.values()) / len(seen)} if seen else {}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _log_picture(self, trainer: pl.Trainer, module: SegVolTask, batch: Batch, masks_BKCDHW: Tensor) -> None:
        """Log the axial slice in which the first category is largest, with its mask under each combination."""
        truth_DHW = batch["masks_BKDHW"][0, 0]
        at = int(truth_DHW.sum((1, 2)).argmax())
        name = module.hparams["categories"][int(batch["category_BK"][0, 0])]
        slices_CHW = masks_BKCDHW[0, 0, :, at]
        for logger in (each for each in trainer.loggers if isinstance(each, WandbRun)):
            logger.picture(
                f"val/masks/{name}",
                _upright(batch["image_BCDHW"][0, 0, at].float()),
                {"truth": _upright(truth_DHW[at])}
                | {kind: _upright(m) for kind, m in zip(module.config.prompts.combinations, slices_CHW, strict=True)},
            )


def _upright(plane_HW: Tensor) -> Any:
    """Turn a slice as radiologists view it: anterior up, the patient's right on the left."""
    return plane_HW.flip(0, 1).cpu().numpy()


def dice(masks_BKCDHW: Tensor, truth_BKDHW: Tensor) -> Tensor:
    """Compute Dice of bool masks, (B,K,C) float32."""
    # One combination at a time: converting all masks at once would take more memory than training.
    truth_BKV = truth_BKDHW.flatten(2)
    found = [masks_BKDHW.flatten(2) for masks_BKDHW in masks_BKCDHW.unbind(2)]
    shared = torch.stack([(mask_BKV & truth_BKV).sum(-1) for mask_BKV in found], -1)
    both = torch.stack([mask_BKV.sum(-1) for mask_BKV in found], -1) + truth_BKV.sum(-1)[..., None]
    return 2 * shared / both.clamp(min=1)


class CorpusSize(pl.Callback):
    """Log the number of volumes to train on and of held-out volumes, which scaling laws use as data size."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        sizes: dict[str, float] = {VOLUMES: data.train_corpus.num_volumes, HELD_OUT: data.val_corpus.num_volumes}
        for logger in trainer.loggers:
            logger.log_metrics(sizes, step=trainer.global_step)
