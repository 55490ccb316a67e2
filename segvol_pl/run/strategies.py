"""Devices, precision, and how the work is spread over processes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from segvol_pl.config import ConfigError, Precision, RunConfig, Strategy


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1`. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is no device: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} asked for, but torch finds no CUDA device: use device=cpu")
    return device


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """auto: bf16 where the hardware multiplies it faster: GPUs that support it, CPUs with AMX."""
    if precision is not Precision.auto:
        return precision is Precision.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # CPUs without tile registers emulate bf16, several times slower than float32.
    return bool(torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing, as `precision` says."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(device, precision) else nullcontext()


def trainer_precision(run: RunConfig) -> Any:
    """Lightning's name of the precision."""
    device = torch.device("cuda") if _accelerator(run) == "cuda" else torch.device("cpu")
    return "bf16-mixed" if uses_bf16(device, run.precision) else "32-true"


def _accelerator(run: RunConfig) -> str:
    if run.accelerator not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"run.accelerator: {run.accelerator!r} is none of auto, cpu, cuda")
    return resolve_device(run.accelerator).type


def trainer_placement(run: RunConfig) -> dict[str, Any]:
    """Lightning's accelerator, devices, num_nodes and strategy."""
    accelerator = _accelerator(run)
    return {
        "accelerator": accelerator,
        "devices": run.devices,
        "num_nodes": run.nodes,
        "strategy": _strategy(run, accelerator),
    }


def _strategy(run: RunConfig, accelerator: str) -> Any:
    if run.strategy is Strategy.auto and run.devices * run.nodes == 1:
        return "auto"
    backend = "nccl" if accelerator == "cuda" else "gloo"
    # torch fails where the first backward pass of a static graph is one without synchronisation.
    static = run.accumulate == 1
    return DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True, static_graph=static)
