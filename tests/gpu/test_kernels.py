"""The Triton kernels on the device, at the shapes of the base model: against float64, poisoned, and repeated."""

from __future__ import annotations

import math

import pytest
import torch
from plain_forms import (
    PROMPTS,
    check_bf16_step,
    check_compared,
    check_gelu_product,
    check_losses,
    check_norm_gelu,
    check_step,
    drawn,
    poisoned_memory,
    step_batch,
    step_task,
)
from torch import Tensor

from segvol_pl import kernels
from segvol_pl.config import SegVolConfig
from segvol_pl.kernels.upscaled import gelu_product, norm_gelu

pytestmark = pytest.mark.gpu

BASE = SegVolConfig()
TOKENS, WIDTH = math.prod(BASE.grid), BASE.hidden_size
LOW, FULL = [4 * size for size in BASE.grid], BASE.input_shape
DTYPES = [torch.float32, torch.bfloat16]


def test_triton_is_there() -> None:
    assert kernels.kernels(torch.zeros(1, device="cuda")) is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
def test_norm_and_gelu(rows: int, dtype: torch.dtype) -> None:
    check_norm_gelu("cuda", rows, TOKENS * 8 * WIDTH // 4, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [4, 16, 48, 96, 128, 160])
def test_gelu_and_product(channels: int, dtype: torch.dtype) -> None:
    check_gelu_product("cuda", 3, TOKENS * 64, channels, dtype)


@pytest.mark.parametrize(
    ("low", "full"), [(LOW, FULL), ((12, 24, 24), (24, 48, 48)), ((8, 12, 12), (12, 18, 18)), ((4, 8, 8), (2, 8, 4))]
)
@pytest.mark.parametrize("size", [3.0, 12.0])
def test_comparison(low: list[int], full: list[int], size: float) -> None:
    check_compared("cuda", low, full, size)


def test_saturated_losses() -> None:
    check_losses("cuda", LOW, FULL)


def test_more_than_two_milliards_of_elements() -> None:
    """The last of 180 prompts, behind 2^31 elements, gets what it gets alone."""
    rows, voxels, channels = 180, TOKENS * 64, WIDTH // 8
    one, weight = drawn((1, voxels, channels), "cuda", 0, torch.bfloat16), drawn((1, channels), "cuda", 1)
    many = one.new_zeros(rows, voxels, channels)
    many[-1] = one[0]
    assert many.numel() > 2**31
    many.requires_grad_()
    one.requires_grad_()

    def last(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        out = gelu_product(x, weights)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        return out[-1].detach(), gradient[-1]

    with poisoned_memory():
        found, alone = last(many, weight.expand(rows, -1).contiguous()), last(one, weight)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))


def test_norms_of_more_than_two_milliards_of_elements() -> None:
    rows, size = 700, TOKENS * 8 * WIDTH // 4
    one, scale = drawn((1, size), "cuda", 0, torch.bfloat16), torch.ones(size, device="cuda")
    many = one.new_zeros(rows, size)
    many[-1] = one[0]
    assert many.numel() > 2**31
    found, alone = norm_gelu(many, scale, scale, 1e-5), norm_gelu(one, scale, scale, 1e-5)
    assert torch.equal(found[-1], alone[0])


def test_a_step_costs_what_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    check_step("cuda", monkeypatch, [(100, True), (3, True), (3, False)])


def test_a_step_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bf16_step("cuda", monkeypatch)


def test_a_step_of_the_base_models_decoder_waits_for_nothing() -> None:
    """No operation of a step makes the host wait for the device."""
    model = SegVolConfig(num_layers=1)
    task, batch = step_task("cuda", model), step_batch("cuda", model, PROMPTS, images=1)

    def once() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = task.losses(batch)
        loss.backward()

    once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
