"""What a fine-tuning will take, before it starts: on which device, how long, how much memory.

`planning` counts operations and memory. For a device that it lists, the rate is the device's peak times the shares of
it that were measured on a GPU. For any other, such as a CPU, the peak is measured here by products of matrices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from segvol_pl.config import Strategy, TrainConfig
from segvol_pl.data.sample_table import SampleTable
from segvol_pl.device import resolve_device, uses_bf16
from segvol_pl.planning import devices
from segvol_pl.planning.devices import Accelerator
from segvol_pl.planning.plan import GIB, Plan

CPU_REACHED = (0.05, 0.5)
"""Shares of a measured CPU peak that training reached: from a small model on a busy machine to an idle one."""
SIDE = 768
"""Rows of the matrices that are multiplied to measure a peak."""
MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class Estimate:
    """What a training run will take."""

    device: str
    """Its name, and the rate that the estimate is from."""
    seconds: tuple[float, float]
    """Least and most."""
    steps: int
    volumes: int
    """Volumes per step."""
    gib: float
    """Peak memory per process, for weights, gradients, optimizer and activations."""
    room: float
    """Memory of the device (GiB)."""

    @property
    def text(self) -> str:
        """The estimate as one line."""
        low, high = (_duration(seconds) for seconds in self.seconds)
        fits = "" if self.gib < self.room else ", which does not fit: see run.accumulate and run.recompute"
        return (
            f"training: {self.steps} steps of {self.volumes} volumes on {self.device}: about {low} to {high}; "
            f"{self.gib:.1f} of {self.room:.0f} GiB of memory{fits}"
        )


def estimate(config: TrainConfig) -> Estimate:
    """Estimate the training run. Measures the device's rate for a fraction of a second if it is not a known one."""
    device = resolve_device("cuda" if config.run.accelerator == "gpu" else config.run.accelerator)
    bf16 = uses_bf16(device, config.run.precision)
    known = devices.accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    used = known or _measured(device, bf16, config.run.cpu_threads)
    plan = Plan(config, used)
    if known or device.type == "cuda":
        low, high = plan.rates()
    else:
        low, high = (share * plan.ranks * used.peak(bf16) * 1e12 / plan.operations for share in CPU_REACHED)
    volumes = config.optim.max_steps * config.data.global_batch
    strategy = config.run.strategy
    chosen = strategy if strategy is not Strategy.auto or plan.ranks == 1 else Strategy.ddp
    return Estimate(
        device=f"{plan.ranks} x {used.name}" if plan.ranks > 1 else used.name,
        seconds=(volumes / high, volumes / low),
        steps=config.optim.max_steps,
        volumes=config.data.global_batch,
        gib=plan.peak(chosen, plan.micro_batch).total / GIB,
        room=used.gib,
    )


def _measured(device: torch.device, bf16: bool, threads: int) -> Accelerator:
    """Measure the rate of a device that is in no table."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        tflops = _product_rate(device, torch.bfloat16 if bf16 else torch.float32) / 1e12
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    precision = "bf16" if bf16 else "fp32"
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / GIB
        name = f"{torch.cuda.get_device_name(device)} ({tflops:.0f} TFLOP/s measured in {precision})"
    else:
        gib = psutil.virtual_memory().total / GIB
        threaded = f"{used} thread{'s' * (used != 1)}"
        name = f"the CPU, {threaded} ({1000 * tflops:.0f} GFLOP/s measured in {precision})"
    return Accelerator(name, tflops, tflops, gib, ())


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of two matrices."""
    side = SIDE if device.type == "cpu" else 8 * SIDE
    one, other = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    one @ other
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < MEASURED_SECONDS:
        float((one @ other)[0, 0])  # waits for a GPU
        count += 1
    return count * 2 * side**3 / spent


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_cases(train: SampleTable, validation: SampleTable) -> Iterator[str]:
    """Describe, in lines, how many cases there are for each category, and what is missing."""
    counted = {split: table.per_category() for split, table in (("train", train), ("validation", validation))}
    names = sorted(counted["train"].keys() | counted["validation"].keys())
    each = ", ".join(f"{name} {counted['train'].get(name, 0)}+{counted['validation'].get(name, 0)}" for name in names)
    yield f"cases: {len(train)} to train on, {len(validation)} to validate with ({each})"
    for split, other in (("train", "validation"), ("validation", "train")):
        if lacking := [name for name in names if name not in counted[split]]:
            what = "cannot be learned" if split == "train" else "cannot be measured"
            yield f"caution: {', '.join(lacking)}: only among the {other} cases, and {what}"
