"""What the trainer and all its callbacks cost over a bare loop of the same step, and what looking for NaN costs of it.

    python benchmarks/trainer_overhead.py [steps=120]

All read the same stream of phantoms with one loader process and train on one core, by turns; the fastest turn of each
counts, in float32. The bare loop is loss, backward, clipping, AdamW, schedule.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from results import record
from rich.console import Console
from torch import nn

from segvol_pl.config import TrainConfig
from segvol_pl.config.loader import load
from segvol_pl.data import sampling
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.model import TextBank
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms
from segvol_pl.training import run, segment
from segvol_pl.training.gradients import FiniteSteps
from segvol_pl.training.module import optimizer
from segvol_pl.training.segment import SegVolTask

WARM, TURNS = 10, 3
MODEL = (
    "{input_shape: [16, 32, 32], patch_size: [4, 8, 8], hidden_size: 96, num_layers: 4, num_heads: 4, mlp_dim: 384, "
    "decoder_heads: 4, decoder_mlp_dim: 192}"
)


def configured(folder: Path, steps: int) -> TrainConfig:
    """Packs six phantoms and configures a run over them."""
    write_phantoms(folder, 6, seed=0, scale=0.45)
    sources = [f"{part}={folder / part}" for part in ("images", "labels")]
    keys = [f"categories={folder / 'categories.yaml'}", f"out={folder / 'shards'}", "overview_shape=[16,32,32]"]
    pack(load("pack", [*sources, *keys, "test_fraction=0.4", "workers=1"]))
    data = [f"data.shards={folder / 'shards'}", "data.global_batch=1", "data.samples_per_volume=80", "data.workers=1"]
    prompts = ["prompts.categories_per_volume=1", "prompts.pseudo_per_volume=2", "text.source=seeded"]
    run = [
        "run.accelerator=cpu",
        "run.precision=fp32",
        "run.val_every=0",
        "run.val_batches=1",
        "run.checkpoint_every=100000",
        "run.cpu_threads=1",
    ]
    goal = [f"model={MODEL}", f"run.out={folder / 'run'}", f"optim.max_steps={steps}", "track.wandb=disabled"]
    config: TrainConfig = load("train", [*data, *prompts, *run, *goal])
    return config


def seconds_a_step(marks: list[float]) -> float:
    return (marks[-1] - marks[WARM]) / (len(marks) - 1 - WARM)


def by_trainer(config: TrainConfig) -> tuple[float, float]:
    """Seconds a step by the command's own function, and those of them that go into looking for NaN.

    The moments at which the optimizer has stepped are noted on its way.
    """
    marks: list[float] = []
    looking: list[float] = []

    class Noted(SegVolTask):
        def on_train_batch_end(self, *_: Any) -> None:
            marks.append(time.perf_counter())

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                looking.append(time.perf_counter() - start)

        return wrapped

    class Timed(FiniteSteps):
        on_train_batch_start = timed(FiniteSteps.on_train_batch_start)
        on_train_batch_end = timed(FiniteSteps.on_train_batch_end)

    with (
        mock.patch.object(run, "SegVolTask", Noted),
        mock.patch.object(run, "FiniteSteps", Timed),
        mock.patch.object(segment, "poisoned", timed(segment.poisoned)),
    ):
        run.train(config)
    return seconds_a_step(marks), sum(looking) / len(marks)


def by_bare_loop(config: TrainConfig) -> float:
    rows: dict[str, int] = {}
    draw = partial(
        sampling.sample_segmentation, model=config.model, prompts=config.prompts, row_of=rows, data=config.data
    )
    module = VolumeModule(config.data, config.run, draw, draw, labelled=True)
    rows.update({name: row for row, name in enumerate(module.categories)})
    task = SegVolTask(config, TextBank.seeded(module.categories, config.model.text_dim))
    adamw, scheduler = optimizer(task, config.optim)
    marks = []
    for _, batch in zip(range(config.optim.max_steps), module.train_dataloader(), strict=False):
        loss, _ = task.losses(module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0))
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), config.optim.clip_norm)
        adamw.step()
        scheduler.step()
        adamw.zero_grad()
        marks.append(time.perf_counter())
    return seconds_a_step(marks)


def main(steps: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        config = configured(Path(name), steps)
        bare, ours = [], []
        for turn in range(TURNS):
            bare.append(by_bare_loop(config))
            ours.append(by_trainer(replace(config, run=replace(config.run, out=f"{name}/run{turn}"))))
    step, looking = min(ours)
    record("trainer_overhead", {"bare_ms": 1e3 * min(bare), "trainer_ms": 1e3 * step, "nan_check_ms": 1e3 * looking})
    console = Console()
    console.print(f"bare loop: {1000 * min(bare):.1f} ms a step; trainer with callbacks: {1000 * step:.1f} ms")
    console.print(f"overhead: {100 * (step / min(bare) - 1):.1f} % (lightning {pl.__version__})")
    console.print(f"of it, looking for NaN: {1000 * looking:.2f} ms, {100 * looking / step:.2f} % of a step")


if __name__ == "__main__":
    main(int(dict(argument.split("=") for argument in sys.argv[1:]).get("steps", 120)))
