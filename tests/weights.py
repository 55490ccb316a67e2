"""Weights of training checkpoints, read and compared."""

from __future__ import annotations

from pathlib import Path

import torch


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def moved_alike(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """All but a few weights agree: Adam turns the rounding of a vanishing gradient into a whole step."""
    close = [torch.isclose(first[name], second[name], atol=1e-5).float().flatten() for name in first]
    return float(torch.cat(close).mean()) > 0.98
