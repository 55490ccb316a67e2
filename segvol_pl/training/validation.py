"""What validation logs besides the loss: Dice of each category and prompt combination, pictures, figures per source.

Letters: B batch, K categories of one volume, C prompt combinations, D H W voxels, G categories of the bank, S sources:
the folders of `data.shards` and `data.mix`.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from segvol_pl.data.batch import Batch
from segvol_pl.run_folder import HELD_OUT, SHARE, VOLUMES
from segvol_pl.training.module import Task
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.trackers import Tracker


class ValidationDice(pl.Callback):
    """Log `val/dice/PROMPT/CATEGORY`, means over the validation's masks, and `val/dice/PROMPT`, the mean of those.

    Dice of binary masks, at the model's input resolution. A slice of the first volume is logged as a picture.
    """

    def __init__(self) -> None:
        self.sums_CG2 = torch.zeros(0)
        self.latest_BKC2 = torch.zeros(0)
        """Of the last batch: each mask's Dice, or 0 if it is not valid, and whether it is valid."""
        self.mean: float | None = None
        """Of the last validation: the mean of all `val/dice/PROMPT`; None if no mask was valid."""

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
        self.latest_BKC2 = summed_BKC2
        if index == 0 and trainer.is_global_zero:
            self._log_picture(trainer, module, batch, masks_BKCDHW)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not isinstance(module, SegVolTask):
            return
        total = trainer.strategy.reduce(self.sums_CG2, reduce_op="sum")
        assert isinstance(total, Tensor)
        names: list[str] = module.hparams["categories"]
        metrics: dict[str, float] = {}
        means: list[float] = []
        for prompt, sums_G2 in zip(module.config.prompts.combinations, total.cpu(), strict=True):
            seen = {name: float(dice / count) for name, (dice, count) in zip(names, sums_G2, strict=True) if count}
            metrics |= {f"val/dice/{prompt}/{name}": value for name, value in seen.items()}
            means += [sum(seen.values()) / len(seen)] if seen else []
            metrics |= {f"val/dice/{prompt}": means[-1]} if seen else {}
        self.mean = sum(means) / len(means) if means else None
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _log_picture(self, trainer: pl.Trainer, module: SegVolTask, batch: Batch, masks_BKCDHW: Tensor) -> None:
        """Log the axial slice in which the first category is largest, with its mask under each combination."""
        truth_DHW = batch["masks_BKDHW"][0, 0]
        at = int(truth_DHW.sum((1, 2)).argmax())
        name = module.hparams["categories"][int(batch["category_BK"][0, 0])]
        slices_CHW = masks_BKCDHW[0, 0, :, at]
        for logger in (each for each in trainer.loggers if isinstance(each, Tracker)):
            logger.picture(
                f"val/masks/{name}",
                _upright(batch["image_BCDHW"][0, 0, at].float()),
                {"truth": _upright(truth_DHW[at])}
                | {kind: _upright(m) for kind, m in zip(module.config.prompts.combinations, slices_CHW, strict=True)},
                trainer.global_step,
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


class ValidationBySource(pl.Callback):
    """Log `val/loss/SOURCE` and, in training, `val/dice/SOURCE`, for each source that has held-out volumes.

    The loss of a source is the mean over its volumes: weighted by their numbers, the sources' losses give `val/loss`.
    Its Dice is the mean over the prompt combinations of means over its categories. A rank adds up its volumes, and all
    ranks their sums, so that the figures do not depend on their number.

    Args:
        dice: it is called before this one, and computes the Dice of each mask.
    """

    def __init__(self, dice: ValidationDice) -> None:
        self.dice = dice
        self.losses_S2 = self.dice_SCG2 = torch.zeros(0)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        sources = len(source_names(trainer, module))
        self.losses_S2 = torch.zeros((sources, 2), dtype=torch.float64, device=module.device)
        if isinstance(module, SegVolTask):
            shape = sources, len(module.config.prompts.combinations), len(module.hparams["categories"]), 2
            self.dice_SCG2 = torch.zeros(shape, dtype=torch.float64, device=module.device)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        assert isinstance(module, Task) and module.volume_losses_B is not None
        losses_B = module.volume_losses_B.detach().double()
        # The sources are known on the host: volume by volume, nothing has to be copied to the device.
        for volume, source in enumerate(trainer.datamodule.batch_sources()):  # type: ignore[attr-defined]
            self.losses_S2[source, 0] += losses_B[volume]
            self.losses_S2[source, 1] += 1
            if isinstance(module, SegVolTask):
                seen_CK2 = self.dice.latest_BKC2[volume].transpose(0, 1).double()
                self.dice_SCG2[source].index_add_(1, batch["category_BK"][volume], seen_CK2)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        losses_S2 = trainer.strategy.reduce(self.losses_S2, reduce_op="sum")
        assert isinstance(losses_S2, Tensor)
        names, metrics = source_names(trainer, module), dict[str, float]()
        for name, (loss, volumes) in zip(names, losses_S2.tolist(), strict=True):
            metrics |= {f"val/loss/{name}": loss / volumes} if volumes else {}
        if isinstance(module, SegVolTask):
            dice_SCG2 = trainer.strategy.reduce(self.dice_SCG2, reduce_op="sum")
            assert isinstance(dice_SCG2, Tensor)
            for name, dice_CG2 in zip(names, dice_SCG2.cpu(), strict=True):
                seen_G = dice_CG2[0, :, 1] > 0  # every combination has been tried on the same masks
                means_CG = dice_CG2[:, seen_G, 0] / dice_CG2[:, seen_G, 1]
                metrics |= {f"val/dice/{name}": float(means_CG.mean())} if seen_G.any() else {}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


def source_names(trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
    """Names of the sources in metrics; none is that of a prompt combination, whose Dice is `val/dice/PROMPT`."""
    reserved = module.config.prompts.combinations if isinstance(module, SegVolTask) else []
    names: list[str] = trainer.datamodule.source_names(reserved)  # type: ignore[attr-defined]
    return names


class CorpusSize(pl.Callback):
    """Log the number of volumes to train on and of held-out volumes, which scaling laws use as data size.

    With several sources also `data/share/SOURCE`, the share of an epoch's samples that each of them has.
    """

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        sizes: dict[str, float] = {VOLUMES: data.train_corpus.num_volumes, HELD_OUT: data.val_corpus.num_volumes}
        if len(data.train_corpus.parts) > 1:
            parts, samples = data.train_corpus.parts, data.train_corpus.num_samples
            named = zip(source_names(trainer, module), parts, strict=True)
            sizes |= {f"{SHARE}{name}": part.dealt / samples for name, part in named}
        for logger in trainer.loggers:
            logger.log_metrics(sizes, step=trainer.global_step)
