"""The optimizer's groups of weights: which of them decay.

Groups follow from names and types of modules alone, so that every strategy and every start of a run makes the same
ones, in the same order: a checkpoint numbers the optimizer's state by it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from segvol_pl.config import OptimConfig

MATRICES = (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)
"""Modules whose `weight` multiplies their input."""


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The weights that require a gradient, in groups for AdamW: those that decay, and those that do not.

    With `optim.weight_decay_all` there is one group, in the order of `module.parameters()`. Otherwise only the weights
    of linear layers and convolutions decay: not norms, biases, embeddings and learned tokens.
    """
    groups: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            path, _, leaf = name.rpartition(".")
            decays = config.weight_decay_all or _is_matrix(module.get_submodule(path), leaf)
            groups.setdefault(decays, []).append(parameter)
    ordered = [(decays, groups[decays]) for decays in (True, False) if decays in groups]
    return [{"params": members} | ({} if decays else {"weight_decay": 0.0}) for decays, members in ordered]


def _is_matrix(owner: nn.Module, leaf: str) -> bool:
    """Whether a parameter of the module `owner` multiplies its input."""
    return leaf == "weight" and isinstance(owner, MATRICES)
