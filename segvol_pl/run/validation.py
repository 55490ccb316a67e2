"""What validation shows beside the loss: Dice of each category under each prompt combination, and pictures of masks.

Letters: B batch, K categories of one volume, C prompt combinations, D H W voxels, G categories of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segvol_pl.data.stream import Batch
from segvol_pl.run.record import HELD_OUT, VOLUMES
from segvol_pl.run.tracking import WandbRun
from segvol_pl.tasks.segment import SegVolTask


class ValidationDice(pl.Callback):
    """Logs `val/dice/PROMPT/CATEGORY`, means over the validation's masks, and `val/dice/PROMPT`, the mean of those.

    Dice is that of masks, not of probabilities, at the model's input resolution.
    The first batch's first volume is pictured at wandb.
    """

    def __init__(self) -> None:
        self.sums_CG2 = torch.zeros(0)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if isinstance(module, SegVolTask):
            shape = len(module.config.prompts.combinations), len(module.hparams["categories"]), 2
            self.sums_CG2 = torch.zeros(shape, dtype=torch.float64, device=_summing_device(module))

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if not isinstance(module, SegVolTask):
            return
        masks_BKCDHW: Tensor = outputs
        rows_BK, valid_BK = batch["category_BK"].long(), batch["valid_BK"]
        for place, dice_BK in enumerate(dice(masks_BKCDHW, batch["masks_BKDHW"]).unbind(-1)):
            for part, value_BK in enumerate((dice_BK, torch.ones_like(dice_BK))):
                summed = (value_BK * valid_BK)[valid_BK].to(self.sums_CG2)
                self.sums_CG2[place, :, part].index_add_(0, rows_BK[valid_BK].to(self.sums_CG2.device), summed)
        if index == 0 and trainer.is_global_zero:
            self._picture(trainer, module, batch, masks_BKCDHW)

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

    def _picture(self, trainer: pl.Trainer, module: SegVolTask, batch: Batch, masks_BKCDHW: Tensor) -> None:
        """The axial slice where the first category is largest, with its mask under each combination."""
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


def _summing_device(module: pl.LightningModule) -> torch.device:
    """float64 sums are exact whatever the order of ranks; Apple's GPUs have none."""
    return module.device if module.device.type != "mps" else torch.device("cpu")


def _upright(plane_HW: Tensor) -> Any:
    """As radiologists look at it: anterior up, the patient's right on the left."""
    return plane_HW.flip(0, 1).cpu().numpy()


def dice(masks_BKCDHW: Tensor, truth_BKDHW: Tensor) -> Tensor:
    """Dice of bool masks, (B,K,C) in float32."""
    masks, truth = masks_BKCDHW.flatten(3).float(), truth_BKDHW.flatten(2)[:, :, None].float()
    both = masks.sum(-1) + truth.sum(-1)
    return 2 * (masks * truth).sum(-1) / both.clamp(min=1)


class GradientNorm(pl.Callback):
    """Every `every` steps logs `train/grad_norm`, that of all gradients before they are clipped."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.logged = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % self.every:
            return
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        if gradients:
            self._log(trainer, whole_norm(gradients), trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """DeepSpeed keeps the gradients to itself, and tells their norm once it has stepped."""
        told = getattr(trainer.strategy.model, "get_global_grad_norm", None)
        # Micro-batches between two steps see the same step.
        if told is not None and trainer.global_step % self.every == 0 and trainer.global_step > self.logged:
            self._log(trainer, float(told()), trainer.global_step)

    def _log(self, trainer: pl.Trainer, norm: float, step: int) -> None:
        self.logged = step
        for logger in trainer.loggers:
            logger.log_metrics({"train/grad_norm": norm}, step=step)


def whole_norm(gradients: Sequence[Tensor]) -> float:
    """Of gradients that lie whole here, or are split over the ranks."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class CorpusSize(pl.Callback):
    """Logs how many volumes the run trains on and is held against: what D counts where it is volumes."""

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        sizes: dict[str, float] = {VOLUMES: len(data.train_corpus.records), HELD_OUT: len(data.val_corpus.records)}
        for logger in trainer.loggers:
            logger.log_metrics(sizes, step=trainer.global_step)
