"""Low-rank adapters of the image encoder (LoRA, Hu et al. 2021, arXiv 2106.09685).

1. `adapt` freezes the encoder, and gives each chosen linear layer two trained matrices, of R rows and of R columns. The
   layer then computes W x + b + (alpha / R) B (A x). B starts at 0: training starts from the encoder's function.
2. `merged` puts W + (alpha / R) B A in the place of W: a file of weights that is read has no adapters.

The matrices are parameters of the layer itself, next to its weight: every strategy splits, gathers and saves them as it
does that. A parametrisation of the weight would read as well, but makes the full matrix B A in each step, and its full
gradient: two thin products cost a fraction of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

A, B = "lora_A", "lora_B"
"""Names of a layer's matrices, (R, inputs) and (outputs, R)."""
MATRICES = (A, B)


def adapt(model: nn.Module, layers: Iterable[str], rank: int, alpha: float) -> None:
    """Freeze the model's image encoder, and add adapters, which train.

    Args:
        model: a SegVol; its decoder and prompt encoder stay as they are.
        layers: names of linear layers of the encoder's blocks.
        rank: R.
        alpha: the adapters' products are multiplied by alpha / R.
    """
    for parameter in model.get_submodule("image_encoder").parameters():
        parameter.requires_grad_(False)
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        thin = layer.weight.new_empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(thin, a=math.sqrt(5))
        layer.register_parameter(A, nn.Parameter(thin))
        layer.register_parameter(B, nn.Parameter(layer.weight.new_zeros(layer.out_features, rank)))
        cast(Any, layer).lora_scale = alpha / rank


def linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of a linear layer with `weight` and `bias`, plus that of its adapter, if it has one."""
    product = F.linear(x, weight, bias)
    if not hasattr(layer, A):
        return product
    # Access by name: this is when DeepSpeed gathers a split weight.
    return product + F.linear(layer.lora_scale * F.linear(x, layer.lora_A), layer.lora_B)


def merged(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A model's tensors, with each adapter added to the weight of its layer, and without the adapters.

    Raises ValueError, which names the layer, if an adapter does not fit its layer.
    """
    found = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in MATRICES}
    for layer in (name.removesuffix(f".{A}") for name in tensors if name.endswith(f".{A}")):
        matrix, thin, wide = (tensors.get(f"{layer}.{leaf}") for leaf in ("weight", A, B))
        if matrix is None or thin is None or wide is None or (wide.ndim, thin.ndim) != (2, 2):
            raise ValueError(layer)
        if wide.shape[1] != len(thin) or (len(wide), thin.shape[1]) != matrix.shape:
            raise ValueError(layer)
        added = (alpha / len(thin)) * (wide.double() @ thin.double())
        found[f"{layer}.weight"] = (matrix.double() + added).to(matrix.dtype)
    return found


def is_adapted(tensors: Mapping[str, Tensor]) -> bool:
    """Whether adapters are among a file's tensors."""
    return any(name.rpartition(".")[2] in MATRICES for name in tensors)
