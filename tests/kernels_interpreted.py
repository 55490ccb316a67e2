"""The Triton kernels on the CPU, by Triton's interpreter: run by tests/test_fused.py, with TRITON_INTERPRET=1.

The interpreter needs a millisecond for each operation of a program: all shapes are tiny. tests/gpu has large ones.
"""

from __future__ import annotations

import pytest
import torch
from plain_forms import (
    FORWARD,
    TINIEST,
    check_compared,
    check_gelu_product,
    check_losses,
    check_norm_gelu,
    close,
    step,
    step_batch,
    step_task,
)
from torch import Tensor

from segvol_pl import kernels
from segvol_pl.config import PromptConfig


def test_the_kernels_are_what_runs() -> None:
    triton = kernels.kernels(torch.zeros(1))
    assert kernels.INTERPRETED and triton is not None and hasattr(triton, "compared")


@pytest.mark.parametrize(
    ("rows", "size", "dtype", "mean"),
    [(2, 5000, torch.float32, 0.0), (2, 1024, torch.float32, 30.0), (1, 17, torch.bfloat16, 0.0)],
)
def test_norm_and_gelu(rows: int, size: int, dtype: torch.dtype, mean: float) -> None:
    check_norm_gelu("cpu", rows, size, dtype, mean)


@pytest.mark.parametrize(
    ("rows", "voxels", "channels", "dtype"),
    [(2, 150, 5, torch.float32), (1, 70, 48, torch.float32), (1, 40, 96, torch.bfloat16), (1, 20, 160, torch.bfloat16)],
)
def test_gelu_and_product(rows: int, voxels: int, channels: int, dtype: torch.dtype) -> None:
    check_gelu_product("cpu", rows, voxels, channels, dtype)


@pytest.mark.parametrize(
    ("low", "full"),
    [
        ((2, 3, 5), (2, 6, 10)),
        # No whole factors, and an axis of one voxel.
        ((2, 1, 2), (3, 2, 3)),
        # A patch of less than four voxels: full resolution is the lower one.
        ((1, 2, 4), (1, 1, 2)),
        ((1, 2, 3), (1, 2, 12)),
    ],
)
def test_comparison(low: tuple[int, int, int], full: tuple[int, int, int]) -> None:
    check_compared("cpu", low, full, counts=(1, 1, 1))


def test_images_prompts_and_masks_are_not_mixed_up() -> None:
    check_compared("cpu", (1, 1, 2), (1, 2, 4), counts=(2, 3, 2))


def test_saturated_losses() -> None:
    check_losses("cpu", (1, 3, 4), (1, 6, 8), sizes=(8.0,))


def test_a_step_in_bf16_is_that_of_torchs_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in the model, against the same operators without Triton: losses, and gradients as one vector."""
    prompts = PromptConfig(categories_per_volume=1, pseudo_per_volume=1, combinations=["text", "box"])
    task, batch = step_task("cpu", TINIEST, prompts), step_batch("cpu", TINIEST, prompts, images=1)
    found = step(task, batch, monkeypatch, fused=True, autocast=True)
    monkeypatch.setattr(kernels, "_triton", lambda: None)
    wanted = step(task, batch, monkeypatch, fused=True, autocast=True)
    close(found.loss, wanted.loss, 100 * FORWARD)

    def together(gradients: list[Tensor]) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients])

    ours, theirs = together(found.gradients), together(wanted.gradients)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
