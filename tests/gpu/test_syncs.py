"""A training step never makes the host wait for the CUDA device: it would stand still while the host catches up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from steps import simmim_batch, simmim_task, supervised_batch, supervised_task
from torch import Tensor

from segvol_pl.training.module import Task, optimizer, poisoned
from segvol_pl.training.segment import SegVolTask

pytestmark = pytest.mark.gpu


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_steps(task: Task, batch: dict[str, Tensor], bf16: bool) -> None:
    adamw, scheduler = optimizer(task, replace(task.optim, ema=0.9))

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = task.losses(batch)[0] if isinstance(task, SegVolTask) else task.loss(batch)  # type: ignore[operator]
        poisoned(loss).backward()
        task.configure_gradient_clipping(adamw, 1.0)
        adamw.step()
        scheduler.step()
        adamw.zero_grad()

    step()  # asks once how much memory there is, builds kernels, makes the optimizer's state
    before = [value.detach().clone() for value in task.parameters()]
    with no_waiting():
        step()
    assert any(not torch.equal(now, then) for now, then in zip(task.parameters(), before, strict=True))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("at_once", [0, 4])
def test_a_supervised_step_waits_for_nothing(at_once: int, bf16: bool) -> None:
    batch = {name: value.cuda() for name, value in supervised_batch().items()}
    run_steps(supervised_task(prompts_at_once=at_once).cuda(), batch, bf16)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_simmim_step_waits_for_nothing(bf16: bool) -> None:
    run_steps(simmim_task().cuda(), {name: value.cuda() for name, value in simmim_batch().items()}, bf16)


def test_what_waits_is_found() -> None:
    with no_waiting(), pytest.raises(RuntimeError):
        torch.ones(1, device="cuda").item()
