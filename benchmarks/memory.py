"""The planner's memory of a step against what a process really takes: CPU, one volume, float32 or bf16.

    python benchmarks/memory.py [SIZE ...] [precision=fp32|bf16]

A row is a process of its own. Measured is the highest resident size over three steps, less that before the model was
built. malloc is told to map every larger block by itself, so that what is freed is gone: as it comes, glibc's holds 10
to 30 % more than a process has in use. Sizes: mini (4 layers), and small, base, large of configs/model; the larger ones
take minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from resident import NOW, resident
from rich.console import Console
from rich.table import Table
from training import OPTIM, SMALL, train_batch, train_config

from segvol_pl.config import Precision, PretrainConfig, SegVolConfig, TrainConfig
from segvol_pl.config.loader import load
from segvol_pl.device import autocast
from segvol_pl.model import TextBank
from segvol_pl.planning import memory
from segvol_pl.training.module import optimizer
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask

MINI = replace(SMALL, input_shape=[32, 128, 128])
ROWS = [f"{command} {size}" for size in ("mini", "small", "base") for command in ("train", "pretrain")]
STEPS = 3
MAPPED = "MALLOC_MMAP_THRESHOLD_"


def model_of(size: str) -> SegVolConfig:
    if size == "mini":
        return MINI
    path = Path(__file__).parents[1] / "configs" / "model" / f"{size}.yaml"
    config: SegVolConfig = load("import", [f"model={path}", "source=-", "out=-"]).model
    return config


def configured(row: str) -> TrainConfig | PretrainConfig:
    command, size = row.split()
    model = model_of(size)
    return train_config(model, 1, 6) if command == "train" else PretrainConfig(model=model, optim=OPTIM)


def measure(row: str, precision: Precision) -> tuple[float, float]:
    """Bytes beyond those of a process that has imported everything and multiplied once; and as planned."""
    config = configured(row)
    torch.randn(64, 64) @ torch.randn(64, 64)
    before = resident(NOW)
    task: SegVolTask | SimMIMTask
    if isinstance(config, TrainConfig):
        batch = train_batch(config)
        task = SegVolTask(config, TextBank.seeded(["one"], config.model.text_dim))
    else:
        task = SimMIMTask(config)
        tokens = config.model.grid[0] * config.model.grid[1] * config.model.grid[2]
        mask_BT = torch.randperm(tokens)[None] < task.hidden
        batch = {"image_BCDHW": torch.rand(1, 1, *config.model.input_shape), "mask_BT": mask_BT}
    adamw, _ = optimizer(task, OPTIM)
    for _ in range(STEPS):
        with autocast(torch.device("cpu"), precision):
            loss = task.losses(batch)[0] if isinstance(task, SegVolTask) else task.loss(batch)
        loss.backward()
        adamw.step()
        adamw.zero_grad()
    taken = resident() - before
    return taken, memory.peak(config, 1, bf16=precision is Precision.bf16).total


def compare(rows: list[str], precision: Precision = Precision.fp32) -> dict[str, tuple[float, float]]:
    """Row -> measured and planned bytes."""
    found = {}
    for row in rows:
        command = [sys.executable, __file__, "--row", row, precision.value]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{row}: {done.stderr[-2000:]}")
        found[row] = tuple(json.loads(done.stdout))
    return found


def main(rows: list[str], precision: Precision) -> None:
    table = Table(title=f"peak memory of a step, one volume, CPU, {precision.value}")
    for column in ("run", "measured, GiB", "planned, GiB", "planned / measured"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row, (measured, planned) in compare(rows, precision).items():
        table.add_row(row, f"{measured / 2**30:.2f}", f"{planned / 2**30:.2f}", f"{planned / measured:.2f}")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--row"] and MAPPED not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, MAPPED: "65536"})
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(sys.argv[2], Precision(sys.argv[3]))))
    else:
        keys = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
        sizes = [argument for argument in sys.argv[1:] if "=" not in argument]
        chosen = [row for row in ROWS if not sizes or row.split()[1] in sizes]
        main(chosen, Precision(keys.get("precision", "fp32")))
