"""Devices by name, and the precision to compute in: bf16 if the hardware is fast at it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from segvol_pl.config import Precision
from segvol_pl.errors import ConfigError
from segvol_pl.launched import local_rank


def resolve_device(name: str) -> torch.device:
    """The device called `auto`, `cpu`, `cuda` or `cuda:1`. Raises ConfigError if it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device: use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name} requested, but torch finds no CUDA device: use device=cpu")
    return device


def own_device(name: str) -> torch.device:
    """Like `resolve_device`, for one of several processes of a node: the GPU becomes its current device.

    `auto` and `cuda` choose the GPU by the process's local rank, modulo the number of visible GPUs (device 0 if only
    one is visible). Raises ConfigError for a GPU that is not visible.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    seen = torch.cuda.device_count()
    device = torch.device("cuda", local_rank() % seen if device.index is None else device.index)
    if device.index >= seen:
        raise ConfigError(f"device: {name} requested, but this process sees {seen} CUDA devices: use device=cuda")
    torch.cuda.set_device(device)
    return device


def uses_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether to compute in bf16. `auto`: on GPUs that support it and CPUs with AMX, which multiply bf16 faster."""
    if precision is not Precision.auto:
        return precision is Precision.bf16
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return has_amx()


def has_amx() -> bool:
    """Whether this CPU has AMX tiles for bf16; others emulate bf16, several times slower than float32."""
    return bool(torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """A context of bf16 autocast, or of no change, by `precision`."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bf16(device, precision) else nullcontext()
