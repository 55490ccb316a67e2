"""The fused operations: by torch's own where Triton is missing, by Triton's interpreter, and in the model."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_forms import (
    check_bf16_step,
    check_compared,
    check_gelu_product,
    check_losses,
    check_norm_gelu,
    check_step,
    drawn,
    step_batch,
    step_task,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segvol_pl import kernels

TESTS = Path(__file__).parent


def test_triton_interprets_the_kernels() -> None:
    """In a process of its own: Triton asks once, when it is imported, whether to interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton, version of constraints.txt")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS / "kernels_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


BASE = (32, 64, 64, 32, 256, 256)
"""The base model's voxels, low and full."""
COMPILED: list[tuple[str, str, tuple[int, ...]]] = [
    ("_moments_of_blocks", "*bf16 *fp32 *fp32 i32 i32", (4096,)),
    ("_moments_of_rows", "*fp32 *fp32 *fp32 *fp32 fp32 i32 i32", (4096, 1024)),
    ("_norm_gelu", "*bf16 *fp32 *fp32 *fp32 *fp32 *bf16 i32 i32", (1024,)),
    ("_norm_gelu_sums", "*bf16 *bf16 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 i32 i32 i32", (1024,)),
    ("_norm_gelu_backward", "*bf16 *bf16 *fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *bf16 i32 i32", (1024,)),
    ("_gelu_product", "*bf16 *bf16 *fp32 i32 i32", (96, 64, 32)),
    ("_gelu_product_backward", "*fp32 *bf16 *bf16 *bf16 *fp32 i32 i32", (96, 1024, 64, 32)),
    ("_compared", "*fp32 *u8 *i64 *fp32 i32 i32 i32 i32", (*BASE, 8192, 1024)),
    ("_compared_backward", "*fp32 *fp32 *u8 *i64 *fp32 i32 i32 i32", (*BASE, 1, 8, 8, 128)),
]
"""Kernels, the types of their first arguments, and the constants that are the others."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "types", "constants"), COMPILED)
def test_kernels_compile_for_a_gpu(
    name: str, types: str, constants: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code of an H100, which needs none: what the interpreter takes the compiler may refuse."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton, version of constraints.txt")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from segvol_pl.kernels import device

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, given = getattr(device, name), types.split()
    names = kernel.arg_names
    fixed = dict(zip(names[len(given) :], constants, strict=True))
    signature = {**dict(zip(names, given, strict=False)), **dict.fromkeys(fixed, "constexpr")}
    compiled = compile(ASTSource(kernel, signature, fixed), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"] and "atom." not in compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size", "mean"), [(3, 5000, 0.0), (1, 17, 0.0), (2, 4096, 30.0)])
def test_norm_and_gelu(rows: int, size: int, mean: float, dtype: torch.dtype) -> None:
    check_norm_gelu("cpu", rows, size, dtype, mean if dtype is torch.float32 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 48, 96])
def test_gelu_and_product(channels: int, dtype: torch.dtype) -> None:
    check_gelu_product("cpu", 3, 150, channels, dtype)


@pytest.mark.parametrize(
    ("low", "full"), [((3, 4, 5), (3, 16, 20)), ((4, 4, 4), (6, 6, 10)), ((4, 4, 8), (2, 4, 2)), ((1, 2, 2), (4, 8, 8))]
)
@pytest.mark.parametrize("size", [3.0, 12.0])
def test_comparison(low: tuple[int, int, int], full: tuple[int, int, int], size: float) -> None:
    check_compared("cpu", low, full, size)


def test_saturated_losses() -> None:
    check_losses("cpu", (3, 8, 8), (3, 32, 32))


def test_extreme_logits_stay_finite() -> None:
    low = torch.tensor([-300.0, 300.0]).view(1, 1, 1, 1, 2).requires_grad_()
    masks = torch.tensor([True, False]).view(1, 1, 1, 1, 2)
    sums = torch.ops.segvol.compared(low, masks, torch.zeros(1, dtype=torch.int64))
    assert sums.tolist() == [[[600.0, 1.0, 0.0, 1.0]]]
    (gradient,) = torch.autograd.grad(sums[..., 0].sum(), low)
    assert gradient.flatten().tolist() == [-1.0, 1.0]


# ---- in the model ----


def test_a_step_costs_what_the_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts at once and in groups, gradients taken ahead or by computing a group again."""
    check_step("cpu", monkeypatch, [(100, True), (3, True), (3, False)])


def test_a_step_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    check_bf16_step("cpu", monkeypatch)


def test_cpus_keep_their_own_operations() -> None:
    assert not kernels.fused(torch.zeros(1))
    with _Names() as seen:
        step_task("cpu").losses(step_batch("cpu"))[0].backward()
    assert not [name for name in seen.names if name.startswith("segvol.")] and "aten.native_layer_norm" in seen.names


class _Names(TorchDispatchMode):
    """Notes the operations, and how many elements the largest result has."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func).rpartition(".")[0])
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                self.largest = max(self.largest, one.numel())
        return out


def test_a_step_on_a_gpu_is_one_operator_each_and_has_no_tensor_of_full_resolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted with fake tensors, where nothing could wait for a GPU either: their values are not there."""
    for module in ("model.mask_decoder", "training.segment"):
        monkeypatch.setattr(f"segvol_pl.{module}.fused", lambda x: True)
    task, batch = step_task("cpu"), step_batch("cpu")
    task.config.run.prompts_at_once = 100
    with FakeTensorMode(allow_non_fake_inputs=True), _Names() as seen:
        # Gradients of the prompts are taken in here.
        task.losses(batch)
    ours = sorted(name for name in seen.names if name.startswith("segvol."))
    names = ("compared", "gelu_product", "norm_gelu")
    assert ours == sorted(f"segvol.{name}{end}" for name in names for end in ("", "_backward"))
    prompts = task.config.prompts
    asked = 2 * (2 * len(prompts.combinations) + 2)
    finest = asked * 64 * 8 * task.config.model.hidden_size // 8
    assert seen.largest == finest


# ---- as operators of torch ----


def _operators() -> list[Any]:
    ops = torch.ops.segvol
    x, row, mean = drawn((3, 40), "cpu", 0), drawn((40,), "cpu", 1), torch.ones(3)
    voxels, weights = drawn((2, 30, 6), "cpu", 0), drawn((2, 6), "cpu", 1)
    low, masks, rows = drawn((1, 2, 2, 3, 3), "cpu", 0), torch.ones(1, 2, 4, 6, 6, dtype=torch.bool), torch.arange(2)
    return [
        (ops.norm_gelu.default, (x.requires_grad_(), row.requires_grad_(), row, 1e-5)),
        (ops.norm_gelu_backward.default, (x.detach(), x.detach(), row.detach(), row.detach(), mean, mean)),
        (ops.gelu_product.default, (voxels.requires_grad_(), weights.requires_grad_())),
        (ops.gelu_product_backward.default, (torch.ones(2, 30), voxels.detach(), weights.detach())),
        (ops.compared.default, (low.requires_grad_(), masks, rows)),
        (ops.compared_backward.default, (torch.ones(1, 2, 4), low.detach(), masks, rows)),
    ]


@pytest.mark.parametrize("place", range(6))
def test_compilers_may_take_each_as_it_says(place: int) -> None:
    """Schema, gradients, shapes without values, and tracing with changing shapes."""
    torch.library.opcheck(*_operators()[place])


def test_a_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "fused", lambda x: True)
    kernels._triton.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kernels.kernels(torch.zeros(1)) is None and kernels.kernels(torch.zeros(1)) is None
    finally:
        kernels._triton.cache_clear()
    assert len(caplog.records) == 1 and "Triton is not installed" in caplog.text
