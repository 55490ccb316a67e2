"""Between main memory and a GPU: how much a GPU has left, and copies to it that are not waited for."""

from __future__ import annotations

import math

import numpy as np
import torch


def free_bytes(device: torch.device) -> float:
    """Bytes that a GPU has left for tensors; infinite for main memory, which is not measured."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device. A copy to a GPU is queued, not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
