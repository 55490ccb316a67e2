"""What corrections cost: a training step with them over one without, of the same model and batch, taken in turn.

    python benchmarks/corrections.py             # full size: the model of configs/interactive/train.yaml, one volume
    python benchmarks/corrections.py --small     # a small model

A step is forward, backward and AdamW, of 4 categories in 6 combinations and 6 pseudo-labels, as published. The figure
is the median of the ratios of neighbouring steps. The masks are boxes in noise, so the errors are large.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from results import record
from training import OPTIM, SMALL, timed, train_batch, train_config

from segvol_pl.config import Precision, SegVolConfig
from segvol_pl.device import autocast, resolve_device
from segvol_pl.model import TextBank
from segvol_pl.training.module import optimizer
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.strategies import keep_freed_memory


def stepper(model: SegVolConfig, corrections: int, precision: Precision) -> Callable[[], None]:
    """A function that takes one step."""
    torch.manual_seed(0)
    config = train_config(model, categories=4, pseudo=6)
    config = replace(config, prompts=replace(config.prompts, corrections=corrections))
    device = resolve_device("auto")
    task = SegVolTask(config, TextBank.seeded(["one"], model.text_dim)).to(device)
    batch = train_batch(config)
    if corrections:
        generator, of_masks = torch.Generator().manual_seed(0), batch["valid_BK"].shape
        batch["corrected_BK"] = torch.zeros(of_masks, dtype=torch.int64)
        batch["chance_BKR3"] = torch.rand(*of_masks, corrections, 3, generator=generator)
    batch = {name: value.to(device) for name, value in batch.items()}
    adamw, _ = optimizer(task, OPTIM)

    def step() -> None:
        with autocast(device, precision):
            loss, _ = task.losses(batch)
        loss.backward()
        adamw.step()
        adamw.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--corrections", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    device = resolve_device("auto")
    if device.type == "cpu":
        keep_freed_memory()
    model = replace(SMALL if given.small else SegVolConfig(), mask_prompt=True)
    steps = [stepper(model, count, Precision.fp32) for count in (0, given.corrections)]
    seconds: list[list[float]] = [[], []]
    for repeat in range(1 + given.repeats):
        for place, step in enumerate(steps):
            took = timed(step, device)
            if repeat:  # the first step allocates
                seconds[place].append(took)
    ratio = statistics.median(each / plain for plain, each in zip(*seconds, strict=True))
    without, with_them = (statistics.median(each) for each in seconds)
    print(f"{'small' if given.small else 'full-size'} model, {device.type}, float32, {torch.get_num_threads()} threads")
    print(f"a step without corrections {without:.2f} s, with {given.corrections} {with_them:.2f} s: {ratio:.2f} times")
    if not given.small:
        figures = {"without_s": without, "with_s": with_them, "ratio": ratio, "corrections": given.corrections}
        record("corrections", figures)


if __name__ == "__main__":
    main()
