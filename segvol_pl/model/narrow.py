"""Autocast's casts on a GPU, made once for what is used more than once, and together for weights that go together.

Autocast casts what a product is given at each product, each weight in an operation of its own, and each gradient back:
hundreds of launches a step. A CPU keeps autocast's own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from segvol_pl.kernels import fused


def narrow(x: Tensor) -> Tensor:
    """`x` as autocast would have it for a product; as it is without autocast, and on a CPU."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if fused(x) and torch.is_autocast_enabled(kind) else x


def narrowed(*weights: Tensor) -> tuple[Tensor, ...]:
    """The same of several float32 weights, in one operation."""
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
