"""SimMIM pre-training of the image encoder (paper Sec. 2.2, Eq. 1; Xie et al. 2022).

Letters: B batch, C channel, D H W voxels, T tokens, E embedding, V voxels of one patch.
"""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from segvol_pl.config import PretrainConfig
from segvol_pl.configure import plain
from segvol_pl.data.stream import Batch
from segvol_pl.losses import simmim_loss
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.tasks.optim import StepMeans, log_validation, optimizer


class SimMIMTask(pl.LightningModule):
    """Hidden tokens are replaced by a learned one; a linear head restores their voxels.

    Unlike the published run, the head reads the encoder's normalised output, so that the final norm trains too.
    A pure function of the batch: the mask is drawn in the loader.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config, self.means = config, StepMeans()
        self.encoder = ImageEncoder(config.model)
        self.mask_token = nn.Parameter(torch.zeros(config.model.hidden))
        self.head = nn.Linear(config.model.hidden, math.prod(config.model.patch))
        self.save_hyperparameters({"task": "pretrain", "config": plain(config)})

    def loss(self, batch: Batch) -> Tensor:
        """Mean absolute error over the hidden voxels, images being in [0, 1]."""
        image_BCDHW, mask_BT = batch["image_BCDHW"], batch["mask_BT"]
        tokens_BTE = self.encoder(image_BCDHW, mask_BT, self.mask_token)
        return simmim_loss(self.head(tokens_BTE), self.encoder.patches(image_BCDHW), mask_BT)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = self.loss(batch)
        self.means.log(self, {"loss": loss.detach()})
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        log_validation(self, {"loss": self.loss(batch)}, batch)

    def configure_optimizers(self) -> Any:
        adamw, scheduler = optimizer(self.parameters(), self.config.optim)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
