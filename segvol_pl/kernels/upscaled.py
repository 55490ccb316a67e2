"""The two elementwise steps of the decoder's upscaling, each reading its large tensor as few times as it can.

1. `norm_gelu`: a norm over a complete row, then GELU. Statistics in float32; forward reads twice and writes once,
   backward reads twice two tensors and writes one. What autograd keeps is the input alone.
2. `gelu_product`: GELU, then the product with a vector, a row's own. Forward reads once; backward computes GELU again,
   reads once and writes once.

Letters: A rows (images x prompts), N elements of a row, V voxels, E channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segvol_pl.kernels import kernels

# ---- norm and GELU ----


def norm_gelu(x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, eps: float) -> Tensor:
    """GELU of `F.layer_norm` over N, in x's dtype; computed in float32, under autocast too."""
    out_AN: Tensor = torch.ops.segvol.norm_gelu(x_AN, scale_N, shift_N, eps)[0]
    return out_AN


@torch.library.custom_op("segvol::norm_gelu", mutates_args=())
def _norm_gelu(x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and each row's mean and 1 / standard deviation, float32."""
    x_AN = x_AN.contiguous()
    if triton := kernels(x_AN):
        return triton.norm_gelu(x_AN, scale_N, shift_N, eps)
    with torch.autocast(x_AN.device.type, enabled=False):
        variance_A, mean_A = torch.var_mean(x_AN.float(), 1, correction=0)
        inverse_A = torch.rsqrt(variance_A + eps)
        normed_AN = _normed(x_AN, mean_A, inverse_A)
        return F.gelu(normed_AN * scale_N.float() + shift_N.float()).to(x_AN.dtype), mean_A, inverse_A


def _normed(x_AN: Tensor, mean_A: Tensor, inverse_A: Tensor) -> Tensor:
    return (x_AN.float() - mean_A[:, None]) * inverse_A[:, None]


@_norm_gelu.register_fake
def _(x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = x_AN.new_empty(len(x_AN), dtype=torch.float32), x_AN.new_empty(len(x_AN), dtype=torch.float32)
    return x_AN.new_empty(x_AN.shape), *of_rows


@torch.library.custom_op("segvol::norm_gelu_backward", mutates_args=())
def _norm_gelu_backward(
    grad_AN: Tensor, x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, mean_A: Tensor, inverse_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and shift."""
    grad_AN, x_AN = grad_AN.contiguous(), x_AN.contiguous()
    if triton := kernels(x_AN):
        return triton.norm_gelu_backward(grad_AN, x_AN, scale_N, shift_N, mean_A, inverse_A)
    with torch.autocast(x_AN.device.type, enabled=False):
        normed_AN, scale = _normed(x_AN, mean_A, inverse_A), scale_N.float()
        inner_AN = torch.ops.aten.gelu_backward(grad_AN.float(), normed_AN * scale + shift_N.float())
        to_normed_AN = inner_AN * scale
        along_A1 = (to_normed_AN * normed_AN).mean(1, keepdim=True)
        to_x_AN = inverse_A[:, None] * (to_normed_AN - to_normed_AN.mean(1, keepdim=True) - normed_AN * along_A1)
        to_scale_N, to_shift_N = (inner_AN * normed_AN).sum(0), inner_AN.sum(0)
    return to_x_AN.to(x_AN.dtype), to_scale_N.to(scale_N.dtype), to_shift_N.to(shift_N.dtype)


@_norm_gelu_backward.register_fake
def _(
    grad_AN: Tensor, x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, mean_A: Tensor, inverse_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x_AN.new_empty(x_AN.shape), scale_N.new_empty(scale_N.shape), shift_N.new_empty(shift_N.shape)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_AN, scale_N, shift_N, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_AN, scale_N, shift_N, *output[1:])


def _norm_gradients(ctx: Any, grad_AN: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *torch.ops.segvol.norm_gelu_backward(grad_AN, *ctx.saved_tensors), None


_norm_gelu.register_autograd(_norm_gradients, setup_context=_keep_norm)

# ---- GELU and product ----


def gelu_product(x_AVE: Tensor, weights_AE: Tensor) -> Tensor:
    """(A, V), float32: GELU of each voxel's channels, summed with the row's weights; under autocast too."""
    out_AV: Tensor = torch.ops.segvol.gelu_product(x_AVE, weights_AE)
    return out_AV


@torch.library.custom_op("segvol::gelu_product", mutates_args=())
def _gelu_product(x_AVE: Tensor, weights_AE: Tensor) -> Tensor:
    x_AVE, weights_AE = x_AVE.contiguous(), weights_AE.contiguous()
    if triton := kernels(x_AVE):
        out_AV: Tensor = triton.gelu_product(x_AVE, weights_AE)
        return out_AV
    with torch.autocast(x_AVE.device.type, enabled=False):
        return (F.gelu(x_AVE.float()) @ weights_AE.float()[..., None])[..., 0]


@_gelu_product.register_fake
def _(x_AVE: Tensor, weights_AE: Tensor) -> Tensor:
    return x_AVE.new_empty(x_AVE.shape[:2], dtype=torch.float32)


@torch.library.custom_op("segvol::gelu_product_backward", mutates_args=())
def _gelu_product_backward(grad_AV: Tensor, x_AVE: Tensor, weights_AE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights."""
    grad_AV, x_AVE, weights_AE = grad_AV.contiguous(), x_AVE.contiguous(), weights_AE.contiguous()
    if triton := kernels(x_AVE):
        to_x_AVE, to_weights_AE = triton.gelu_product_backward(grad_AV, x_AVE, weights_AE)
        return to_x_AVE, to_weights_AE
    with torch.autocast(x_AVE.device.type, enabled=False):
        x = x_AVE.float()
        to_weights_AE = (grad_AV[:, None] @ F.gelu(x))[:, 0]
        to_x_AVE = torch.ops.aten.gelu_backward(grad_AV[..., None] * weights_AE.float()[:, None], x)
    return to_x_AVE.to(x_AVE.dtype), to_weights_AE.to(weights_AE.dtype)


@_gelu_product_backward.register_fake
def _(grad_AV: Tensor, x_AVE: Tensor, weights_AE: Tensor) -> tuple[Tensor, Tensor]:
    return x_AVE.new_empty(x_AVE.shape), weights_AE.new_empty(weights_AE.shape)


def _keep_product(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad_AV: Tensor) -> Any:
    return torch.ops.segvol.gelu_product_backward(grad_AV, *ctx.saved_tensors)


_gelu_product.register_autograd(_product_gradients, setup_context=_keep_product)
