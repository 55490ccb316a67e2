"""Casts to bf16 under autocast on a GPU: once per tensor that is used repeatedly, and one launch for several weights.

Autocast itself casts the operands of every product, each weight in a launch of its own, and each gradient back:
hundreds of launches per step. On a CPU autocast casts as usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segvol_pl.kernels import fused


def narrow(x: Tensor) -> Tensor:
    """Cast `x` as autocast does for a product; unchanged without autocast, and on a CPU."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if fused(x) and torch.is_autocast_enabled(kind) else x


def narrowed(*weights: Tensor) -> tuple[Tensor, ...]:
    """Like `narrow`, for several float32 weights in one operation."""
    kind = weights[0].device.type
    if not (fused(weights[0]) and torch.is_autocast_enabled(kind)) or weights[0].dtype is not torch.float32:
        return weights
    found: tuple[Tensor, ...] = _Cast.apply(torch.get_autocast_dtype(kind), *weights)  # type: ignore[no-untyped-call]
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return _copied(tensors, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        copied = iter(_copied([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(copied) for gradient in gradients)


def _copied(tensors: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
