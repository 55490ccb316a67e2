"""SimMIM pre-training of the image encoder (paper Sec. 2.2, Eq. 1; Xie et al. 2022).

Letters: B batch, C channel, D H W voxels, T tokens, E embedding, V voxels of one patch,
M hidden tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segvol_pl.config import PretrainConfig, Transfer
from segvol_pl.config.loader import plain
from segvol_pl.data.batch import Batch
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.model.transfer import transferred
from segvol_pl.training.losses import simmim_loss, simmim_losses
from segvol_pl.training.module import Task, log_validation, poisoned


class SimMIMTask(Task):
    """Masked tokens are replaced by a learned one; a linear head predicts their voxels.

    Unlike the published run, the head reads the encoder's normalised output, so that the final norm trains too. The
    loss is a pure function of the batch: the mask is sampled by the loader.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config, self.optim = config, config.optim
        self.encoder = ImageEncoder(config.model)
        self.mask_token = nn.Parameter(torch.zeros(config.model.hidden_size))
        self.head = nn.Linear(config.model.hidden_size, math.prod(config.model.patch_size))
        self.hidden = round(config.mask_ratio * math.prod(config.model.grid))
        self.encoder.compute_again(config.run.recompute)
        if config.optim.transfer is Transfer.mup:
            self.rates = transferred(self, config, SimMIMTask)
        self.save_hyperparameters({"task": "pretrain", "config": plain(config)})

    def loss(self, batch: Batch) -> Tensor:
        """Compute the mean absolute error () over the hidden voxels; images are in [0, 1]."""
        return simmim_loss(*self._hidden_patches(batch))

    def _hidden_patches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predicted and true voxels of the hidden tokens, (B,M,V) each."""
        mask_BT = batch["mask_BT"]
        patches_BTV = self.encoder.patches(batch["image_BCDHW"])
        tokens_BTE = self.encoder.encode_patches(patches_BTV, mask_BT, self.mask_token)
        hidden_BM1 = hidden_tokens(mask_BT, self.hidden)[..., None]
        # Only hidden tokens are predicted.
        predicted_BMV = self.head(tokens_BTE.take_along_dim(hidden_BM1, dim=1))
        return predicted_BMV, patches_BTV.take_along_dim(hidden_BM1, dim=1)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss (); its only part is the same, detached."""
        loss = self.loss(batch)
        return loss, {"loss": loss.detach()}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Compute the loss () of a micro-batch, and log it."""
        loss, parts = self.step_losses(batch)
        self.means.log(self, parts)
        return poisoned(loss)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Log the loss of a batch, and keep that of each volume."""
        predicted_BMV, patches_BMV = self._hidden_patches(batch)
        self.volume_losses_B = simmim_losses(predicted_BMV, patches_BMV)
        log_validation(self, {"loss": simmim_loss(predicted_BMV, patches_BMV)}, batch)


def hidden_tokens(mask_BT: Tensor, count: int) -> Tensor:
    """Indices of the `count` tokens that each row of the mask hides, ascending, int64 (B,M), M = count."""
    # Boolean indexing would synchronise with the GPU to learn how many there are.
    return mask_BT.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
