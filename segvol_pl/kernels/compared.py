"""Logits of low resolution against masks of full resolution, which the logits themselves never reach.

1. `compared` interpolates a voxel, compares it with the mask, adds it to its prompt's four sums and forgets it. Dice
   loss and BCE are arithmetic on the sums.
2. Backward each low voxel visits the full voxels that take part of it, and gathers their gradients: no atomic sums.

The interpolation is `F.interpolate`'s: trilinear, half-pixel centres, any two shapes.

Letters: B images, P prompts of one image, K masks of one image, D H W voxels, d h w voxels of low resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_pl.kernels import kernels

SUMS = 4
"""BCE, probability, probability within the mask, mask."""


def compared(low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    """(B,P,4), float32: a prompt's sums over all voxels of BCE, probability, probability within the mask, and mask.

    masks_BKDHW: bool; rows_P: which of an image's K masks answers a prompt, int64.
    """
    sums_BP4: Tensor = torch.ops.segvol.compared(low_BPdhw, masks_BKDHW, rows_P)
    return sums_BP4


def interpolation(old: int, new: int) -> Tensor:
    """(new, old): linear interpolation along an axis, half-pixel centres, as a matrix."""
    return F.interpolate(torch.eye(old)[None], size=new, mode="linear", align_corners=False)[0].T.contiguous()


def _interpolated(low_BPdhw: Tensor, shape: Sequence[int], adjoint: bool = False) -> Tensor:
    """By one product per axis; adjoint: the gradient's way back."""
    x = low_BPdhw.float()
    sizes = [(new, old) if adjoint else (old, new) for old, new in zip(x.shape[2:], shape, strict=True)]
    for axis, (old, new) in enumerate(sizes, start=2):
        matrix = interpolation(old, new).to(x.device)
        x = torch.tensordot(x, matrix, ([axis], [0 if adjoint else 1])).movedim(-1, axis)
    return x


@torch.library.custom_op("segvol::compared", mutates_args=())
def _compared(low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    low_BPdhw, masks_BKDHW = low_BPdhw.contiguous(), masks_BKDHW.contiguous()
    if triton := kernels(low_BPdhw):
        sums_BP4: Tensor = triton.compared(low_BPdhw, masks_BKDHW, rows_P)
        return sums_BP4
    with torch.autocast(low_BPdhw.device.type, enabled=False):
        logits_BPDHW, truth_BPDHW = _interpolated(low_BPdhw, masks_BKDHW.shape[2:]), masks_BKDHW[:, rows_P]
        bce_BPDHW = F.softplus(torch.where(truth_BPDHW, -logits_BPDHW, logits_BPDHW))
        probability_BPDHW = logits_BPDHW.sigmoid()
        parts = bce_BPDHW, probability_BPDHW, probability_BPDHW * truth_BPDHW, truth_BPDHW
        return torch.stack([part.float().sum((2, 3, 4)) for part in parts], dim=-1)


@_compared.register_fake
def _(low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    return low_BPdhw.new_empty((*low_BPdhw.shape[:2], SUMS), dtype=torch.float32)


@torch.library.custom_op("segvol::compared_backward", mutates_args=())
def _compared_backward(grad_BP4: Tensor, low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    """The low logits' gradient."""
    grad_BP4, low_BPdhw, masks_BKDHW = grad_BP4.contiguous(), low_BPdhw.contiguous(), masks_BKDHW.contiguous()
    if triton := kernels(low_BPdhw):
        to_low_BPdhw: Tensor = triton.compared_backward(grad_BP4, low_BPdhw, masks_BKDHW, rows_P)
        return to_low_BPdhw
    with torch.autocast(low_BPdhw.device.type, enabled=False):
        logits_BPDHW, truth_BPDHW = _interpolated(low_BPdhw, masks_BKDHW.shape[2:]), masks_BKDHW[:, rows_P]
        to_bce, to_probability, to_overlap, _ = grad_BP4[..., None, None, None].unbind(2)
        # Not probability - 1 within the mask: near 1 its last digits are gone.
        off_BPDHW = torch.where(truth_BPDHW, -(-logits_BPDHW).sigmoid(), logits_BPDHW.sigmoid())
        slope_BPDHW = logits_BPDHW.sigmoid() * (-logits_BPDHW).sigmoid()
        to_logits = to_bce * off_BPDHW + (to_probability + to_overlap * truth_BPDHW) * slope_BPDHW
        return _interpolated(to_logits, low_BPdhw.shape[2:], adjoint=True).to(low_BPdhw.dtype)


@_compared_backward.register_fake
def _(grad_BP4: Tensor, low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    return low_BPdhw.new_empty(low_BPdhw.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_BP4: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.segvol.compared_backward(grad_BP4, *ctx.saved_tensors), None, None


_compared.register_autograd(_gradient, setup_context=_keep)
