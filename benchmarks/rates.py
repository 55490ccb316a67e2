"""Whether one learning rate is the best at all widths: `optim.transfer=none` against `mup`, for SimMIM and training.

    python benchmarks/rates.py                               # makes phantoms first; 5 minutes of one core
    python benchmarks/rates.py shards=DIR commands=pretrain  # packed by configs/tiny/pack.yaml; SimMIM alone

Phantoms, models of two layers, short runs: it shows the instrument, not accuracy. Every run sees the same batches in
the same order and has a schedule of its own to the end: warm-up over a tenth of the steps, then cosine. Its loss is the
mean over the last fifth of its steps. Rates are steps of a factor 2; from the best rate of the width before, neighbours
are tried until the best one has a worse one on both sides. The heads are four at each width, so that their size grows.
The base of muP is the second width.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ladder import shards_of
from results import record
from torch import nn

from segvol_pl.config import PretrainConfig, TrainConfig, Transfer
from segvol_pl.config.loader import load
from segvol_pl.data.batch import Batch
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.training.module import optimizer
from segvol_pl.training.run import prepared
from segvol_pl.training.strategies import keep_freed_memory

ROOT = Path(__file__).parents[1]
RATE = 1e-3
"""The rate with the exponent 0."""
TAIL = 0.2
"""Share of the steps, the last ones, over which a run's loss is averaged."""
OWN = ("shards", "steps", "widths", "commands", "volumes", "out")

Config = PretrainConfig | TrainConfig


@dataclass(frozen=True)
class Sweep:
    """Runs of one command and one parametrisation, over widths and rates."""

    command: str
    transfer: Transfer
    config: Config
    batches: list[Batch]

    def at(self, width: int, rate: float) -> Config:
        """The run with a width and a rate."""
        sizes: dict[str, Any] = {"hidden_size": width, "mlp_dim": 4 * width, "decoder_mlp_dim": 2 * width}
        optim = replace(self.config.optim, lr=rate, transfer=self.transfer)
        return replace(self.config, model=replace(self.config.model, **sizes), optim=optim)

    def loss(self, width: int, rate: float) -> float:
        """Train, and return the loss of the last steps; infinite where it is not a number."""
        task, _ = prepared(self.at(width, rate))
        adamw, scheduler = optimizer(task, task.optim)
        losses = []
        for batch in self.batches:
            loss, _ = task.losses(batch)
            adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(task.parameters(), task.optim.clip_norm)
            adamw.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        tail = losses[-max(1, round(TAIL * len(losses))) :]
        mean = sum(tail) / len(tail)
        return mean if math.isfinite(mean) else math.inf

    def best(self, width: int, start: int) -> tuple[int, dict[int, float]]:
        """The exponent of the best rate, and the loss of each that was tried, found by going downhill from `start`."""
        found: dict[int, float] = {}
        exponent = start
        while True:
            for each in (exponent, exponent - 1, exponent + 1):
                if each not in found:
                    found[each] = self.loss(width, RATE * 2.0**each)
            best = min(found, key=lambda each: found[each])
            if best == exponent:
                return best, found
            exponent = best


def configured(command: str, shards: Path, steps: int, base: int) -> Config:
    """The tiny configuration with two layers; a third of its prompts, which are what a step takes its time for."""
    widths = {"hidden_size": base, "mlp_dim": 4 * base, "decoder_mlp_dim": 2 * base}
    keys = [
        "model.num_layers=2",
        *(f"optim.base_widths.{key}={value}" for key, value in widths.items()),
        f"optim.max_steps={steps}",
        f"optim.warmup_steps={steps // 10}",
        f"data.shards={shards}",
        "data.workers=0",
        "run.out=unused",
        "run.cpu_threads=1",
        "run.accelerator=cpu",
        *(["prompts.categories_per_volume=1"] if command == "train" else []),
    ]
    config: Config = load(command, [str(ROOT / "configs" / "tiny" / f"{command}.yaml"), *keys])
    return config


def batches_of(config: Config) -> list[Batch]:
    """The batches of all steps, in memory."""
    module: VolumeModule
    _, module = prepared(config)
    steps, found = config.optim.max_steps, []
    for _, batch in zip(range(steps), module.train_dataloader(), strict=False):
        found.append(module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0))
    if len(found) < steps:
        raise SystemExit(f"{config.data.shards}: gives {len(found)} batches, {steps} are needed: lower steps")
    return found


def swept(sweep: Sweep, widths: list[int]) -> dict[int, int]:
    """The exponent of the best rate at each width, printed as they are found."""
    start, best = 1, {}
    for width in widths:
        began = time.process_time()
        start, found = sweep.best(width, start)
        best[width] = start
        tried = "  ".join(f"{RATE * 2.0**each:.4g}: {found[each]:.4f}" for each in sorted(found))
        seconds = time.process_time() - began
        where = f"{sweep.command:<9}{sweep.transfer.value:<5} width {width:>4}"
        print(f"{where}  best {RATE * 2.0**start:.4g}  ({tried})  {seconds:.0f} s", flush=True)
    return best


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if unknown := given.keys() - set(OWN):
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}: takes {', '.join(OWN)}")
    torch.set_num_threads(1)
    keep_freed_memory()
    out = Path(given.get("out", "runs/rates")).resolve()
    shards = Path(given["shards"]) if "shards" in given else shards_of(out, int(given.get("volumes", 48)))
    steps = int(given.get("steps", 60))
    widths = [int(each) for each in given.get("widths", "32,64,128,256").split(",")]
    for command in given.get("commands", "pretrain,train").split(","):
        config = configured(command, shards, steps, widths[1])
        batches, figures = batches_of(config), {"steps": float(steps)}
        for transfer in (Transfer.mup, Transfer.none):
            best = swept(Sweep(command, transfer, config, batches), widths)
            apart = max(best.values()) - min(best.values())
            print(f"{command:<9}{transfer.value:<5} best rates lie {apart} factor-2 steps apart", flush=True)
            figures |= {f"{transfer.value}_w{width}_lr": RATE * 2.0**each for width, each in best.items()}
            figures[f"{transfer.value}_apart_steps"] = apart
        record(f"rates_{command}", {**figures, "cpu_s": round(time.process_time())})


if __name__ == "__main__":
    main()
