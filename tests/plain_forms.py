"""The fused operations against the plain forms, wherever they run: as torch's own, interpreted, or on a GPU.

Errors are measured against the largest figure of what is compared. The plain form computes in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_model
from torch import Tensor

from segvol_pl.config import OptimConfig, PromptConfig, SegVolConfig, TrainConfig
from segvol_pl.data.batch import Batch
from segvol_pl.kernels.compared import compared
from segvol_pl.kernels.upscaled import gelu_product, norm_gelu
from segvol_pl.model import TextBank
from segvol_pl.training.losses import low_mask_losses
from segvol_pl.training.module import Sharding
from segvol_pl.training.segment import SegVolTask

FORWARD, BACKWARD = 1e-5, 1e-4
"""Of float32."""
BF16 = 8e-3
"""Of bf16, forward and backward: a unit in the last of its 8 bits, since Triton's interpreter cuts off where GPUs
round. Operands are the same, sums are float32."""

TINY = tiny_model(hidden_size=32)
TINIEST = replace(TINY, input_shape=[8, 8, 8], patch_size=[4, 4, 4])
"""For the interpreter."""
PROMPTS = PromptConfig(categories_per_volume=2, pseudo_per_volume=2)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Finite, of the same shape, and nowhere further off than `tolerance` of the largest figure."""
    assert found.shape == wanted.shape
    off = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert off <= tolerance, f"off by {float(off):.1e}, not {tolerance:.0e}"


def drawn(shape: Sequence[int], device: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same normal figures on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _compare(
    fused: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    forward: float,
    backward: float,
) -> None:
    """Results and gradients; on a GPU a second time too: equal to the bit."""
    with poisoned_memory():
        found = [_with_gradients(fused, inputs) for _ in range(2 if inputs[0].is_cuda else 1)]
    wanted = _with_gradients(plain, [x.double() for x in inputs])
    for place, (ours, theirs) in enumerate(zip(found[0], wanted, strict=True)):
        close(ours, theirs, backward if place else forward)
        assert torch.equal(ours, found[-1][place])
    for x, gradient in zip(inputs, found[0][1:], strict=True):
        assert gradient.dtype == x.dtype and gradient.device == x.device


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    # Such that bf16 holds it exactly.
    above = drawn(out.shape, str(out.device), 9, torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, above)]


def check_norm_gelu(device: str, rows: int, size: int, dtype: torch.dtype, mean: float = 0.0) -> None:
    """mean: of what is normed; far from 0, squares around 0 would cancel."""
    x = (drawn((rows, size), device, 0) + mean).to(dtype)
    scale, shift = 1 + drawn((size,), device, 1) / 2, drawn((size,), device, 2)
    narrow = dtype is torch.bfloat16
    # A mean of 100 leaves float32 two digits less.
    forward, backward = (BF16, BF16) if narrow else (FORWARD, BACKWARD)
    _compare(
        lambda x, scale, shift: norm_gelu(x, scale, shift, 1e-5),
        lambda x, scale, shift: F.gelu(F.layer_norm(x, (size,), scale, shift, 1e-5)),
        (x, scale, shift),
        forward,
        backward,
    )


def check_gelu_product(device: str, rows: int, voxels: int, channels: int, dtype: torch.dtype) -> None:
    """The result is float32 whatever the operands are."""
    x, weights = drawn((rows, voxels, channels), device, 0, dtype), drawn((rows, channels), device, 1, dtype)
    backward = BF16 if dtype is torch.bfloat16 else BACKWARD
    assert gelu_product(x, weights).dtype == torch.float32
    _compare(gelu_product, lambda x, w: (F.gelu(x) * w[:, None]).sum(-1), (x, weights), FORWARD, backward)


def check_compared(
    device: str, low: Sequence[int], full: Sequence[int], size: float = 3.0, counts: tuple[int, int, int] = (2, 3, 2)
) -> None:
    """size: of the logits; counts: images, prompts and masks of each."""
    images, prompts, kinds = counts
    logits = size * drawn((images, prompts, *low), device, 0)
    masks = drawn((images, kinds, *full), device, 1) > 0.5
    rows = torch.arange(prompts, device=device).flip(0) % kinds

    def plain(low_BPdhw: Tensor) -> Tensor:
        x = F.interpolate(low_BPdhw, size=tuple(full), mode="trilinear", align_corners=False)
        truth = masks[:, rows].double()
        bce = F.binary_cross_entropy_with_logits(x, truth, reduction="none")
        # The last sum, the mask's own, has no gradient; it stands here with one that is zero.
        parts = bce, x.sigmoid(), x.sigmoid() * truth, truth + 0 * x
        return torch.stack([part.sum((2, 3, 4)) for part in parts], dim=-1)

    _compare(lambda x: compared(x, masks, rows), plain, (logits,), FORWARD, BACKWARD)


def check_losses(device: str, low: Sequence[int], full: Sequence[int], sizes: Sequence[float] = (8.0, 30.0)) -> None:
    """Late in training: each loss is a small difference of large sums; sizes: of the logits."""
    masks = drawn((1, 1, *full), device, 0) > 1
    grown = F.interpolate(masks.float(), size=tuple(low), mode="trilinear", align_corners=False)
    for size in sizes:
        logits = (size * (2 * grown - 1)).requires_grad_()
        exact = logits.detach().double().requires_grad_()
        full_size = F.interpolate(exact, size=tuple(full), mode="trilinear", align_corners=False)
        bce = F.binary_cross_entropy_with_logits(full_size, masks.double(), reduction="none").mean((2, 3, 4))
        both = full_size.sigmoid().sum((2, 3, 4)) + masks.sum((2, 3, 4))
        dice = 1 - 2 * (full_size.sigmoid() * masks).sum((2, 3, 4)) / (both + 1)
        with torch.autocast(device, torch.bfloat16):
            found = low_mask_losses(logits, masks, torch.zeros(1, dtype=torch.int64, device=device))
        assert all(loss.dtype == torch.float32 for loss in found)
        for ours, theirs in zip(found, (dice, bce), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=FORWARD)
        gradients = torch.autograd.grad(sum(found).sum(), logits)[0], torch.autograd.grad((dice + bce).sum(), exact)[0]
        close(*gradients, BACKWARD)


def step_batch(device: str, model: SegVolConfig = TINY, prompts: PromptConfig = PROMPTS, images: int = 2) -> Batch:
    """Figures of the right shapes; two volumes of a few balls would say no more."""
    kinds, pseudo = prompts.categories_per_volume, prompts.pseudo_per_volume
    d, h, w = model.input_shape

    def asked(prefix: str, count: int) -> Batch:
        corner = drawn((images, count, 3), "cpu", 1).sigmoid() * 0.4
        return {
            f"{prefix}masks_BKDHW": drawn((images, count, d, h, w), device, 2) > 0.8,
            f"{prefix}valid_BK": torch.ones(images, count, dtype=torch.bool, device=device),
            f"{prefix}points_BKN3": (drawn((images, count, 4, 3), "cpu", 3).sigmoid() * min(d, h, w)).to(device),
            f"{prefix}labels_BKN": torch.ones(images, count, 4, dtype=torch.int64, device=device),
            f"{prefix}boxes_BK6": (torch.cat([corner, corner + 0.5], -1) * min(d, h, w)).to(device),
            f"{prefix}category_BK": torch.zeros(images, count, dtype=torch.int64, device=device),
        }

    image = drawn((images, 1, d, h, w), device, 4).sigmoid()
    return {"image_BCDHW": image, **asked("", kinds), **asked("pseudo_", pseudo)}


def step_task(device: str, model: SegVolConfig = TINY, prompts: PromptConfig = PROMPTS) -> SegVolTask:
    """With a norm in the decoder that scales and shifts."""
    torch.manual_seed(0)
    task = SegVolTask(
        TrainConfig(model=model, prompts=prompts, optim=OptimConfig()), TextBank.seeded(["liver", "spleen"], 512)
    )
    norm = task.model.mask_decoder.output_upscaling[1]
    torch.nn.init.normal_(norm.weight, 1, 0.3)
    torch.nn.init.normal_(norm.bias, 0, 0.3)
    return task.to(device)


@dataclass
class Step:
    """What a step gives."""

    loss: Tensor
    parts: dict[str, Tensor]
    gradients: list[Tensor]


def step(task: SegVolTask, batch: Batch, patch: pytest.MonkeyPatch, fused: bool, autocast: bool = False) -> Step:
    """One step, by the fused operations or by the plain ones."""
    with patch.context() as patched:
        for module in ("model.mask_decoder", "training.segment"):
            patched.setattr(f"segvol_pl.{module}.fused", lambda x: fused)
        with torch.autocast(batch["image_BCDHW"].device.type, torch.bfloat16, autocast):
            loss, parts = task.losses(batch)
        return Step(loss.detach(), parts, list(torch.autograd.grad(loss, list(task.parameters()))))


def check_step(device: str, patch: pytest.MonkeyPatch, groups: Sequence[tuple[int, bool]]) -> None:
    """Loss, its parts and all gradients; groups: prompts at once, and whether this process holds whole weights."""
    task, batch = step_task(device), step_batch(device)
    wanted = step(task, batch, patch, fused=False)
    for task.config.run.prompts_at_once, weights_resident in groups:
        task.sharding = Sharding(weights_resident)
        found = step(task, batch, patch, fused=True)
        close(found.loss, wanted.loss, FORWARD)
        for name, part in wanted.parts.items():
            close(found.parts[name], part, FORWARD)
        largest = max(float(gradient.abs().max()) for gradient in wanted.gradients)
        for ours, theirs in zip(found.gradients, wanted.gradients, strict=True):
            # A key's bias moves no softmax: its gradient is rounding alone.
            torch.testing.assert_close(
                ours, theirs, rtol=BACKWARD, atol=BACKWARD * float(theirs.abs().max()) + 1e-7 * largest
            )


def check_bf16_step(device: str, patch: pytest.MonkeyPatch) -> None:
    """Fused in bf16 is as near to float32 as the plain form in bf16 is: by loss within 2e-3, by gradient within 5 %."""
    task, batch = step_task(device), step_batch(device)
    wanted = step(task, batch, patch, fused=False)
    found = step(task, batch, patch, fused=True, autocast=True)
    assert abs(float(found.loss / wanted.loss) - 1) < 2e-3
    ours, theirs = (torch.cat([x.float().flatten() for x in one.gradients]) for one in (found, wanted))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
