"""Kernels and bytes of a training step on a GPU, by part, counted on fake tensors: no GPU is needed, nor memory.

    python benchmarks/step_counts.py [--operations N] [STEP ...]

Forward and backward in bf16 autocast; the optimizer comes on top. Steps: simmim (8 volumes), prompts (1 volume, 96
prompts), default (4 volumes, 30 prompts each). --operations lists the N operations that move most.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from counting import GIGA, PARTS, Counts, counted
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training import OPTIM, train_batch, train_config

from segvol_pl.config import PretrainConfig, SegVolConfig
from segvol_pl.model import TextBank
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask


def simmim(volumes: int) -> Counts:
    """SimMIM with so many volumes."""
    config = PretrainConfig(model=SegVolConfig(), optim=OPTIM)
    tokens = math.prod(config.model.grid)

    def batch() -> dict[str, Tensor]:
        mask_BT = torch.empty(volumes, tokens, dtype=torch.bool)
        return {"image_BCDHW": torch.empty(volumes, 1, *config.model.input_shape), "mask_BT": mask_BT}

    return counted(lambda: SimMIMTask(config), batch, 0)


def supervised(volumes: int, categories: int, pseudo: int, at_once: int | None = None) -> Counts:
    """Six combinations of so many categories, and pseudo-labels, of each volume; all at once unless it is said."""
    config = train_config(SegVolConfig(), categories, pseudo)
    count = config.prompts.per_volume
    at_once = at_once or count
    config = replace(config, run=replace(config.run, prompts_at_once=at_once))

    def batch() -> dict[str, Tensor]:
        return {name: value.expand(volumes, *value.shape[1:]).clone() for name, value in train_batch(config).items()}

    return counted(
        lambda: SegVolTask(config, TextBank.seeded(["one"], config.model.text_dim)), batch, volumes * at_once
    )


@functools.cache
def default_step() -> Counts:
    """Supervised training as configured."""
    return supervised(4, 4, 6)


STEPS: dict[str, tuple[str, Callable[[], Counts]]] = {
    "simmim": ("SimMIM, 8 volumes", lambda: simmim(8)),
    "prompts": ("1 volume, 96 prompts", lambda: supervised(1, 8, 48)),
    "default": ("4 volumes, 30 prompts each", default_step),
}


def show(title: str, counts: Counts, operations: int) -> None:
    table = Table(title=title)
    for column in ("part", "kernels", "GB moved"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in PARTS:
        kernels, moved = counts.of(part)
        table.add_row(part, f"{kernels}", f"{moved / GIGA:.1f}")
    table.add_row("together", f"{counts.kernels.total()}", f"{counts.moved.total() / GIGA:.1f}")
    Console().print(table)
    for (part, name), moved in counts.moved.most_common(operations):
        print(f"{counts.kernels[part, name]:7} {moved / GIGA:7.2f} GB  {part}: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP")
    parser.add_argument("--operations", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.steps or STEPS:
        title, count = STEPS[name]
        show(title, count(), arguments.operations)


if __name__ == "__main__":
    main()
