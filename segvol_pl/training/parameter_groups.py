"""The optimizer's groups of weights: which of them decay, and how fast each learns.

Groups follow from names, types of modules and factors on the rate alone, so that every strategy and every start of a
run makes the same ones, in the same order: a checkpoint numbers the optimizer's state by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from segvol_pl.config import OptimConfig
from segvol_pl.model import lora

MATRICES = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)
"""Modules whose `weight` multiplies their input, and whose adapters do."""


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The weights that require a gradient, in groups for AdamW.

    With `optim.weight_decay_all` all decay. Otherwise only the weights of linear layers and convolutions: not norms,
    biases, embeddings and learned tokens. A task's `rates` are factors on the learning rate by name; groups with the
    factor 1 are first. Without both there is one group, in the order of `module.parameters()`.
    """
    rates: Mapping[str, float] = getattr(module, "rates", {})
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            path, _, leaf = name.rpartition(".")
            decays = config.weight_decay_all or _is_matrix(module.get_submodule(path), leaf)
            groups.setdefault((rates.get(name, 1.0), decays), []).append(parameter)
    ordered = sorted(groups, key=lambda kind: (abs(math.log(kind[0])), kind[0], not kind[1]))
    return [_group(groups[kind], *kind, config) for kind in ordered]


def _group(members: list[nn.Parameter], rate: float, decays: bool, config: OptimConfig) -> dict[str, Any]:
    """A group for AdamW. What it does not state is that of the optimizer."""
    group: dict[str, Any] = {"params": members}
    if rate != 1:
        # AdamW shrinks a weight by lr x weight_decay in each step: that share does not depend on the rate's factor.
        group |= {"lr": config.lr * rate, "weight_decay": config.weight_decay / rate}
    return group | ({} if decays else {"weight_decay": 0.0})


def _is_matrix(owner: nn.Module, leaf: str) -> bool:
    """Whether a parameter of the module `owner` multiplies its input."""
    return leaf in ("weight", *lora.MATRICES) and isinstance(owner, MATRICES)
