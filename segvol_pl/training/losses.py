"""The losses of the paper: Eq. 1 (SimMIM), Eq. 2 (BCE), Eq. 3 (Dice), Eq. 4 (their sum).

Letters: B batch, K masks, P prompts (of one mask, or of a volume), D H W voxels, d h w voxels of low resolution, M
hidden tokens, V voxels of one patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_pl.kernels.compared import compared

DICE_SMOOTH = 1.0
"""Added to the denominator of Dice only, as in the published code: an empty prediction of an empty mask costs 1."""


def mask_losses(logits_BKPDHW: Tensor, masks_BKDHW: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Dice loss and BCE of every prompt.

    Args:
        logits_BKPDHW: logits of P prompts of each mask.
        masks_BKDHW: target masks, bool or 0/1.

    Returns:
        Dice loss and BCE, each (B,K,P), float32 also under autocast.
    """
    logits = logits_BKPDHW.float().flatten(3)
    truth = masks_BKDHW.float().flatten(2)[:, :, None]
    # BCE is a small difference of large sums: rounding the products to bf16 would destroy it.
    with torch.autocast(logits.device.type, enabled=False):
        # A matrix product does not store the elementwise products: these tensors are the largest of the step.
        overlap_logits = (logits @ truth.transpose(2, 3))[..., 0]
        bce_BKP = (F.softplus(logits).sum(-1) - overlap_logits) / logits.shape[-1]
        probability = logits.sigmoid()
        overlap = (probability @ truth.transpose(2, 3))[..., 0]
        dice_BKP = 1 - 2 * overlap / (probability.sum(-1) + truth.sum(-1) + DICE_SMOOTH)
    return dice_BKP, bce_BKP


def low_mask_losses(low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Dice loss and BCE of low-resolution logits; equal to `mask_losses` of the upsampled logits.

    With the fused operations no tensor of full resolution is allocated.

    Args:
        low_BPdhw: low-resolution logits of P prompts.
        masks_BKDHW: target masks, bool.
        rows_P: index of each prompt's target mask among the K masks, int64.

    Returns:
        Dice loss and BCE, each (B,P), float32.
    """
    bce_BP, probability_BP, overlap_BP, truth_BP = compared(low_BPdhw, masks_BKDHW, rows_P).unbind(-1)
    dice_BP = 1 - 2 * overlap_BP / (probability_BP + truth_BP + DICE_SMOOTH)
    return dice_BP, bce_BP / masks_BKDHW[0, 0].numel()


def simmim_loss(predicted_BMV: Tensor, patches_BMV: Tensor) -> Tensor:
    """Compute the mean absolute error () over the voxels of the hidden tokens (paper Eq. 1)."""
    return F.l1_loss(predicted_BMV.float(), patches_BMV.float())


def simmim_losses(predicted_BMV: Tensor, patches_BMV: Tensor) -> Tensor:
    """Compute the same for each volume, (B,). All volumes hide the same number of tokens."""
    return (predicted_BMV.float() - patches_BMV.float()).abs().mean((1, 2))
