"""Initial weights and learning rates that transfer over widths: the maximal update parametrisation (muP) for AdamW.

Yang et al. 2022, Tensor Programs V (arXiv 2203.03466), Table 3. A model is compared, shape by shape, with its base: the
same model in the widths at which `optim.lr` was chosen. A dimension that differs between the two is a width. Factors on
what a model has without transfer, with s = the base's fan-in / fan-in:

    parameter                                           initial values   learning rate
    hidden weight: sums over a width, gives a width     1                s
    output weight: sums over a width, gives none        sqrt(s)          s
    input weight: sums over none                        1                1
    bias of a layer that sums over a width              1 / sqrt(s)      1
    norm, embedding, position, learned token            1                1

The initial weights of all layers that sum over a width shrink as 1 / sqrt(fan-in) in any case, and so do torch's biases,
which the table undoes. At the base's widths every factor is 1: such a model trains as without transfer, to the digit.

Two products multiply activations with each other. muP divides attention's logits by the size of a head instead of by
its root, and those of the mask by the number of channels. Here no forward pass changes, so that weights mean the same
with and without transfer, and can be exchanged. Instead the layers that make the operands get a factor m, on their
initial values and on their rate. The function then learns alike, because AdamW's steps do not grow with gradients
(Lemma J.1; up to its epsilon). With s = the base's size / size, of a head or of the channels:

    queries and keys                                         m = s ** 0.25
    in the encoder, where values share their weight: values  m = s ** 0.25, and the weight after them s ** -0.25
    hyper-network's last layer, text's projection to channels  m = s

Where wider models have more heads of the same size, attention is as without transfer.

AdamW shrinks a weight by rate x weight decay in each step. The weight decay is divided by the factor of the rate, so
that this share is the same at all widths (`training.parameter_groups`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from segvol_pl.config import PretrainConfig, TrainConfig, Transfer
from segvol_pl.model.image_encoder import Block
from segvol_pl.model.mask_decoder import Attention, MaskDecoder

AXES: dict[type[nn.Module], tuple[int, int]] = {nn.Linear: (1, 0), nn.ConvTranspose3d: (0, 1)}
"""Axis of a layer's weight that its product sums over, and the one that it gives. The decoder's kernels do not overlap,
so that their taps do not add up."""

Config = TypeVar("Config", PretrainConfig, TrainConfig)


class Factor(NamedTuple):
    """What a parameter's initial values and its learning rate are multiplied by."""

    start: float
    rate: float


def at_base(config: Config) -> Config:
    """The same run with a model of the widths `optim.base_widths`. Raises ConfigError."""
    model = replace(config.model, **asdict(config.optim.base_widths))
    return replace(config, model=model, optim=replace(config.optim, transfer=Transfer.none))


def transferred(module: nn.Module, make_base: Callable[[], nn.Module]) -> dict[str, float]:
    """Give `module` muP's initial weights. make_base: makes the same module in the base's widths.

    Returns the name of each parameter -> factor on its learning rate.
    """
    with torch.device("meta"):
        base = make_base()
    found = factors(module, base)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if found[name].start != 1:
                parameter.mul_(found[name].start)
    return {name: factor.rate for name, factor in found.items()}


def factors(module: nn.Module, base: nn.Module) -> dict[str, Factor]:
    """The factors of each parameter of `module`, by name. base: the same module in the base's widths."""
    operands, found = _operands(module, base), {}
    for path, part in module.named_modules():
        sums, gives = _growth(part, base.get_submodule(path))
        for leaf, _ in part.named_parameters(prefix=path, recurse=False):
            operand = operands.get(leaf, 1.0)
            if leaf.endswith(".bias"):
                found[leaf] = Factor(operand * sums**0.5, operand)
            else:
                output = sums != 1 and gives == 1
                found[leaf] = Factor(operand * (sums**-0.5 if output else 1.0), operand / sums)
    return found


def _growth(part: nn.Module, base: nn.Module) -> tuple[float, float]:
    """How often a layer's fan-in and fan-out are the base's; 1 and 1 for a module without a product."""
    axes = AXES.get(type(part))
    if axes is None:
        return 1.0, 1.0
    own, other = part.weight, base.weight
    assert isinstance(own, torch.Tensor) and isinstance(other, torch.Tensor)
    sums, gives = (own.shape[axis] / other.shape[axis] for axis in axes)
    return sums, gives


def _operands(module: nn.Module, base: nn.Module) -> dict[str, float]:
    """Name of each parameter whose layer makes an operand of a product of activations -> its factor m."""
    found: dict[str, float] = {}
    for path, part in module.named_modules():
        other = base.get_submodule(path)
        if isinstance(part, Block) and isinstance(other, Block):
            root = (_head(other.attn.qkv, 3 * other.attn.num_heads) / _head(part.attn.qkv, 3 * part.attn.num_heads)) ** 0.25
            found |= {f"{path}.attn.qkv.weight": root, f"{path}.attn.out_proj.weight": 1 / root}
        elif isinstance(part, Attention) and isinstance(other, Attention):
            root = (_head(other.q_proj, other.heads) / _head(part.q_proj, part.heads)) ** 0.25
            found |= _both(root, f"{path}.q_proj", f"{path}.k_proj")
        elif isinstance(part, MaskDecoder) and isinstance(other, MaskDecoder):
            projected, at_base = (each.txt_align_upscaled_embedding.out_features for each in (part, other))
            makers = (f"{path}.output_hypernetworks_mlps.0.layers.2", f"{path}.txt_align_upscaled_embedding")
            found |= _both(at_base / projected, *makers)
    return found


def _head(projection: nn.Module, parts: int) -> float:
    assert isinstance(projection, nn.Linear)
    return projection.out_features / parts


def _both(factor: float, *layers: str) -> dict[str, float]:
    """The factor of each layer's weight and bias."""
    return {f"{layer}.{leaf}": factor for layer in layers for leaf in ("weight", "bias")}
