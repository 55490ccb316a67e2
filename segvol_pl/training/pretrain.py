"""SimMIM pre-training of the image encoder (paper Sec. 2.2, Eq. 1; Xie et al. 2022).

Letters: B batch, C channel, D H W voxels, T tokens, E embedding, V voxels of one patch,
M hidden tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segvol_pl.config import PretrainConfig
from segvol_pl.config.loader import plain
from segvol_pl.data.batch import Batch
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.training.losses import simmim_loss
from segvol_pl.training.module import Task, log_validation, poisoned


class SimMIMTask(Task):
    """Hidden tokens are replaced by a learned one; a linear head restores their voxels.

    Unlike the published run, the head reads the encoder's normalised output, so that the final norm trains too.
    A pure function of the batch: the mask is drawn in the loader.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        self.encoder = ImageEncoder(config.model)
        self.mask_token = nn.Parameter(torch.zeros(config.model.hidden_size))
        self.head = nn.Linear(config.model.hidden_size, math.prod(config.model.patch_size))
        self.hidden = round(config.mask_ratio * math.prod(config.model.grid))
        self.encoder.compute_again(config.run.recompute)
        self.save_hyperparameters({"task": "pretrain", "config": plain(config)})

    def loss(self, batch: Batch) -> Tensor:
        """Mean absolute error over the hidden voxels, images being in [0, 1]."""
        mask_BT = batch["mask_BT"]
        patches_BTV = self.encoder.patches(batch["image_BCDHW"])
        tokens_BTE = self.encoder.encode_patches(patches_BTV, mask_BT, self.mask_token)
        hidden_BM1 = hidden_tokens(mask_BT, self.hidden)[..., None]
        # Only what is hidden has to be restored.
        predicted_BMV = self.head(tokens_BTE.take_along_dim(hidden_BM1, dim=1))
        return simmim_loss(predicted_BMV, patches_BTV.take_along_dim(hidden_BM1, dim=1))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of a micro-batch, which is logged as its step's mean."""
        loss = self.loss(batch)
        self.means.log(self, {"loss": loss.detach()})
        return poisoned(loss)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Logs the loss of a batch."""
        log_validation(self, {"loss": self.loss(batch)}, batch)


def hidden_tokens(mask_BT: Tensor, count: int) -> Tensor:
    """Places of the `count` tokens that each row of the mask hides, ascending, (B, count)."""
    # Indexing by the mask itself would ask the GPU how many they are, and stop it.
    return mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
