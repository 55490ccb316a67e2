"""Where a process computes, and in what precision: devices by name, bf16 where the hardware is fast at it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from segvol_pl.config import Precision
from segvol_pl.errors import ConfigError
from segvol_pl.launched import local_rank


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


def own_device(name: str) -> torch.device:
    """`resolve_device` for a process that has a GPU to itself, which becomes its current one.

    `auto` and `cuda` spread a node's processes over the GPUs that they see: the one of the process's number there, and
    device 0 where each sees one alone. Raises ConfigError for a GPU that this process does not see.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    seen = torch.cuda.device_count()
    device = torch.device("cuda", local_rank() % seen if device.index is None else device.index)
    if device.index >= seen:
        raise ConfigError(f"device: {name} asked for, but this process sees {seen} CUDA devices: use device=cuda")
    torch.cuda.set_device(device)
    return device


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """auto: bf16 where the hardware multiplies it faster: GPUs that support it, CPUs with AMX."""
    if precision is not Precision.auto:
        return precision is Precision.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return has_amx()


def has_amx() -> bool:
    """Whether this CPU multiplies bf16 in tile registers; others emulate it, several times slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing, as `precision` says."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(device, precision) else nullcontext()
