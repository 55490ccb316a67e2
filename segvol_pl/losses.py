"""The losses of the paper: Eq. 1 (SimMIM), Eq. 2 (BCE), Eq. 3 (Dice), Eq. 4 (their sum).

Letters: B batch, K masks, P prompts (of one mask), D H W voxels, M hidden tokens, V voxels of one patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_SMOOTH = 1.0
"""Added to Dice's denominator alone, as in the published code: an empty prediction of an empty mask costs 1."""


def mask_losses(logits_BKPDHW: Tensor, masks_BKDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Dice loss and BCE of every prompt, each (B,K,P), float32 under autocast too.

    `masks_BKDHW` is bool or 0/1; P prompts share one.
    """
    logits = logits_BKPDHW.float().flatten(3)
    truth = masks_BKDHW.float().flatten(2)[:, :, None]
    # BCE is a small difference of large sums: with products rounded to bf16 nothing would be left of it.
    with torch.autocast(logits.device.type, enabled=False):
        # Matrix products sum without holding the products: these tensors are the largest of the whole step.
        overlap_logits = (logits @ truth.transpose(2, 3))[..., 0]
        bce_BKP = (F.softplus(logits).sum(-1) - overlap_logits) / logits.shape[-1]
        probability = logits.sigmoid()
        overlap = (probability @ truth.transpose(2, 3))[..., 0]
        dice_BKP = 1 - 2 * overlap / (probability.sum(-1) + truth.sum(-1) + DICE_SMOOTH)
    return dice_BKP, bce_BKP


def simmim_loss(predicted_BMV: Tensor, patches_BMV: Tensor) -> Tensor:
    """Mean absolute error over the voxels of the hidden tokens (paper Eq. 1)."""
    return F.l1_loss(predicted_BMV.float(), patches_BMV.float())
