"""Initial weights and learning rates that transfer over widths: the maximal update parametrisation (muP) for AdamW.

Yang et al. 2022, Tensor Programs V (arXiv 2203.03466), Table 3, with output layers that start at 0 (Appendix D.2). A
model is compared, shape by shape, with its base, which is the same model in the widths at which `optim.lr` was chosen,
and with one twice as wide: a dimension that grows there is a width. Factors on what a model has without transfer, with
s = the base's fan-in / fan-in:

    parameter                                           initial values   learning rate
    hidden weight: sums over a width, gives a width     1                s
    output weight: sums over a width, gives none        0                s
    input weight: sums over none                        1                1
    bias of a layer that sums over a width              1 / sqrt(s)      1
    norm, embedding, position, learned token            1                1

The initial weights of all layers that sum over a width shrink as 1 / sqrt(fan-in) in any case. So do torch's biases,
which the table undoes. A model of the base's widths differs from one without transfer in its output layers alone: those
start at 0, because what random ones add depends on the width.

Two products multiply activations with each other. muP divides attention's logits by the size of a head instead of by
its root, and those of the mask by the number of channels. Here no forward pass changes, so that weights mean the same
with and without transfer, and can be exchanged. Instead the layers that make the operands get a factor m, on their
initial values and on their rate. The function then learns alike, because AdamW's steps do not grow with gradients
(Lemma J.1; up to its epsilon). With s = the base's size / size, of a head or of the channels:

    queries and keys                                         m = s ** 0.25
    in the encoder, where values share their weight: values  m = s ** 0.25, and the weight after them s ** -0.25
    hyper-network's last layer, text's projection to channels  m = s; they start at 0, as output layers

Where wider models have more heads of the same size, attention is as without transfer. Depth is not considered.

AdamW shrinks a weight by rate x weight decay in each step. The weight decay is divided by the factor of the rate, so
that this share is the same at all widths (`training.parameter_groups`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """The same run with a model of the widths `optim.base_widths`, without transfer. Raises ConfigError."""
    return _resized(config, asdict(config.optim.base_widths))


def twice_as_wide(config: Config) -> Config:
    """The same run with a model of twice the width, without transfer."""
    model = config.model
    return _resized(config, {key: 2 * getattr(model, key) for key in ("hidden_size", "mlp_dim", "decoder_mlp_dim")})


def _resized(config: Config, sizes: Mapping[str, int]) -> Config:
    model, optim = replace(config.model, **sizes), replace(config.optim, transfer=Transfer.none)  # type: ignore[arg-type]
    return replace(config, model=model, optim=optim)


def transferred(module: nn.Module, config: Config, make: Callable[[Config], nn.Module]) -> dict[str, float]:
    """Give `module` muP's initial weights. make: makes such a module from another configuration.

    Returns the name of each parameter -> factor on its learning rate.
    """
    with torch.device("meta"):
        base, wider = make(at_base(config)), make(twice_as_wide(config))
    found = factors(module, base, wider)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if found[name].start != 1:
                parameter.mul_(found[name].start)
    return {name: factor.rate for name, factor in found.items()}


def factors(module: nn.Module, base: nn.Module, wider: nn.Module) -> dict[str, Factor]:
    """The factors of each parameter of `module`, by name. The others are the same module in the base's and twice its
    own widths."""
    found = {}
    for path, part in module.named_modules():
        sums, _ = _growth(base.get_submodule(path), part)
        sums_more, gives_more = _growth(part, wider.get_submodule(path))
        for leaf, _ in part.named_parameters(recurse=False):
            bias, output = leaf == "bias", sums_more > 1 and gives_more == 1
            start = sums**0.5 if bias else 0.0 if output else 1.0
            found[f"{path}.{leaf}".lstrip(".")] = Factor(start, 1.0 if bias else 1 / sums)
    for path, part in module.named_modules():
        for name, (start, rate) in _operands(path, part, base.get_submodule(path)).items():
            found[name] = Factor(found[name].start * start, found[name].rate * rate)
    return found


def _growth(part: nn.Module, other: nn.Module) -> tuple[float, float]:
    """The other layer's fan-in and fan-out by this one's; 1 and 1 for a module without a product."""
    axes = AXES.get(type(part))
    if axes is None:
        return 1.0, 1.0
    own, others = part.weight, other.weight
    assert isinstance(own, torch.Tensor) and isinstance(others, torch.Tensor)
    sums, gives = (others.shape[axis] / own.shape[axis] for axis in axes)
    return sums, gives


def _operands(path: str, part: nn.Module, base: nn.Module) -> dict[str, Factor]:
    """The factors m that `part` asks for where it multiplies activations, by names of parameters within it."""
    if isinstance(part, Block) and isinstance(base, Block):
        own, others = (_head(each.attn.qkv, 3 * int(each.attn.num_heads)) for each in (part, base))
        root = (others / own) ** 0.25
        weights = {f"{path}.attn.qkv.weight": root, f"{path}.attn.out_proj.weight": 1 / root}
        return {name: Factor(m, m) for name, m in weights.items()}
    if isinstance(part, Attention) and isinstance(base, Attention):
        own, others = (_head(each.q_proj, each.heads) for each in (part, base))
        root = (others / own) ** 0.25
        return _both(Factor(root, root), f"{path}.q_proj", f"{path}.k_proj")
    if isinstance(part, MaskDecoder) and isinstance(base, MaskDecoder):
        own, others = (each.txt_align_upscaled_embedding.out_features for each in (part, base))
        makers = (f"{path}.output_hypernetworks_mlps.0.layers.2", f"{path}.txt_align_upscaled_embedding")
        return _both(Factor(0.0, others / own), *makers)
    return {}


def _head(projection: nn.Module, parts: int) -> float:
    assert isinstance(projection, nn.Linear)
    return projection.out_features / parts


def _both(factor: Factor, *layers: str) -> dict[str, Factor]:
    """The factor for each layer's weight and bias."""
    return {f"{layer}.{leaf}": factor for layer in layers for leaf in ("weight", "bias")}
