"""Training runs of real processes, and what their results must have in common."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks import Ranks

from segvol_pl.config import TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.model.checkpoint import with_averages
from segvol_pl.model.released import read_contents
from segvol_pl.run_folder import read_metrics

RELATIVE = 1e-5
"""Largest difference of losses that rounding explains."""

Losses = dict[int, float]


@dataclass(frozen=True)
class Trained:
    """Runs of one configuration, each in a folder of its own, by one process or by several ranks."""

    folder: Path
    ranks: dict[int, Ranks]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def configure(self, config: TrainConfig) -> None:
        (self / "config.yaml").write_text(to_yaml(config))

    def __call__(self, name: str, strategy: str, devices: int, *more: str, patch: str = "") -> Losses:
        """The losses of a run in `folder`/`name`. patch: Python that each rank runs before."""
        keys = [f"run.out={self / name}", f"run.strategy={strategy}", *more]
        self.ranks[devices]("train", str(self / "config.yaml"), *keys, patch=patch)
        return self.metric(name, "train/loss")

    def after(self, checkpoint: Path, name: str, strategy: str, devices: int, *more: str) -> Losses:
        """The losses of a run in `folder`/`name` that goes on from another run's checkpoint."""
        last = self / name / "checkpoints/last.ckpt"
        last.parent.mkdir(parents=True)
        (shutil.copytree if checkpoint.is_dir() else shutil.copy)(checkpoint, last)
        return self(name, strategy, devices, *more)

    def metric(self, name: str, metric: str) -> Losses:
        return dict(read_metrics(self / name / "metrics.csv", metric))


def same_state(first: dict[str, Any], other: dict[str, Any]) -> None:
    """By names, shapes and the optimizer's moments: small gradients' steps differ by Adam's rounding."""
    assert other.keys() == first.keys() and list(other["state_dict"]) == list(first["state_dict"])
    (ours,), (theirs,) = first["optimizer_states"], other["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        assert state["step"] == theirs["state"][key]["step"] == first["global_step"]
        torch.testing.assert_close(theirs["state"][key]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-3, atol=1e-8)
        assert theirs["state"][key].keys() == state.keys()


def same_averages(first: Path, other: Path) -> None:
    """Of two checkpoints, but for Adam's rounding: much nearer to each other than to the weights."""
    whole, found = read_contents(first), with_averages(read_contents(other)).tensors
    averages = with_averages(whole).tensors

    def apart(tensors: dict[str, torch.Tensor]) -> float:
        return sum(float((value - tensors[name]).abs().sum()) for name, value in averages.items())

    assert apart(found) < 0.05 * apart(whole.tensors)
