"""A step on a CUDA device against the same step on the CPU: loss and every gradient, of both tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from steps import simmim_batch, simmim_task, supervised_batch, supervised_task
from torch import Tensor

from segvol_pl.training.module import Sharding
from segvol_pl.training.segment import SegVolTask

pytestmark = pytest.mark.gpu

EXACT, SUMMED = 1e-4, 1e-5
"""Of float32: between a CPU and a GPU; between groups of prompts and all at once, which sum in another order."""
LOSS_BF16, GRADIENT_BF16 = 1e-2, 5e-2
"""Of bf16 against float32, whose products are off by 0.4 % each; of gradients, the norm of the difference of all."""
FLOOR = 1e-3
"""Gradients whose norm is less than this share of all are compared with it: a key's bias has rounding alone."""


@dataclass(frozen=True)
class Result:
    loss: float
    gradients: list[Tensor]

    @property
    def norm(self) -> float:
        return float(torch.stack([gradient.norm() for gradient in self.gradients]).norm())

    def away(self, other: Result) -> float:
        """The norm of the difference of all gradients, over the other's norm."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return float(torch.stack([(ours - theirs).norm() for ours, theirs in pairs]).norm()) / other.norm

    def farthest(self, other: Result) -> float:
        """The same of the one gradient that differs most."""
        floor = FLOOR * other.norm
        pairs = zip(self.gradients, other.gradients, strict=True)
        return max(float((a - b).norm()) / max(float(b.norm()), floor) for a, b in pairs)


def step(kind: str, device: str, bf16: bool = False, **run: Any) -> Result:
    task = supervised_task(**run) if kind == "supervised" else simmim_task()
    task.to(device)
    made = supervised_batch() if kind == "supervised" else simmim_batch()
    batch = {name: value.to(device) for name, value in made.items()}
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = task.losses(batch)[0] if isinstance(task, SegVolTask) else task.loss(batch)
    loss.backward()
    gradients = [value.grad.double().cpu() for value in task.parameters() if value.grad is not None]
    assert len(gradients) == len(list(task.parameters()))
    return Result(float(loss.detach()), gradients)


@pytest.mark.parametrize("kind", ["supervised", "simmim"])
def test_float32_is_that_of_the_cpu(kind: str) -> None:
    wanted, found = step(kind, "cpu"), step(kind, "cuda")
    assert found.loss == pytest.approx(wanted.loss, rel=EXACT)
    assert found.farthest(wanted) < EXACT


@pytest.mark.parametrize("kind", ["supervised", "simmim"])
def test_bf16_is_near_float32(kind: str) -> None:
    wanted, found = step(kind, "cpu"), step(kind, "cuda", bf16=True)
    assert found.loss == pytest.approx(wanted.loss, rel=LOSS_BF16)
    assert found.away(wanted) < GRADIENT_BF16


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_groups_of_prompts_give_what_all_at_once_do(size: int, bf16: bool) -> None:
    whole, groups = step("supervised", "cuda", bf16), step("supervised", "cuda", bf16, prompts_at_once=size)
    assert groups.loss == pytest.approx(whole.loss, rel=1e-3 if bf16 else SUMMED)
    assert groups.away(whole) < (GRADIENT_BF16 if bf16 else SUMMED)


@pytest.mark.parametrize("weights_resident", [True, False])
def test_groups_computed_again_give_the_same(weights_resident: bool) -> None:
    """As where weights are split over ranks."""
    wanted = step("supervised", "cuda")
    task = supervised_task(prompts_at_once=4).cuda()
    task.sharding = Sharding(weights_resident)
    batch = {name: value.cuda() for name, value in supervised_batch().items()}
    loss, _ = task.losses(batch)
    gradients = torch.autograd.grad(loss, list(task.parameters()))
    found = Result(float(loss.detach()), [gradient.double().cpu() for gradient in gradients])
    assert found.loss == pytest.approx(wanted.loss, rel=SUMMED) and found.away(wanted) < SUMMED


def test_as_many_prompts_as_fit_are_decoded_together() -> None:
    task = supervised_task().cuda()
    _, total = torch.cuda.mem_get_info()
    assert task.room is not None and 0 < task.room <= total
    assert [group.stop - group.start for group in task.groups(15, 2)] == [15]
