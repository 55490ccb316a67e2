"""Fused operations for GPUs: what a supervised step would otherwise spend on writing and reading large tensors.

1. `upscaled`: norm + GELU of the decoder's fine features, GELU + product with the mask's weights of its finest ones.
2. `compared`: upsampling, BCE and Dice from low-resolution logits, without a tensor of full resolution.
3. `device`: the Triton kernels that both launch. Without Triton each operation computes the same by torch's own.

Each is one operator of torch, forward and backward: compilers, fake tensors and recomputation see a single step. None
uses atomic sums, so equal inputs give equal bits. CPUs keep torch's own operations, which are as fast there.

Letters: A images x prompts flattened.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType

from torch import Tensor

log = logging.getLogger(__name__)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets its kernels, on the CPU and very slowly: for tests."""


def fused(x: Tensor) -> bool:
    """Whether `x` lies where the fused operations are the faster ones."""
    return x.is_cuda or INTERPRETED


def kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels if they can run where `x` lies."""
    return _triton() if fused(x) else None


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: the decoder and the losses run slower and need more GPU memory")
        return None
    # Imported here: on machines without a GPU nothing needs Triton.
    from segvol_pl.kernels import device

    return device
