"""A step recorded once and replayed: the same losses and weights as one that computes as it comes.

Here what is recorded is done again by the CPU, into the same memory; tests/gpu/test_graph_on_gpu.py records on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steps import simmim_batch, simmim_task, supervised_batch, supervised_task
from torch import Tensor

from segvol_pl.config import RunConfig, Strategy
from segvol_pl.data.batch import Batch
from segvol_pl.errors import ConfigError
from segvol_pl.planning.memory import replays
from segvol_pl.training.graph import Found, StepGraph, recorded
from segvol_pl.training.module import Task, optimizer, poisoned


class Recorder:
    """Counts what was recorded, and how often it was done again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Found]) -> tuple[Found, Callable[[], Any]]:
        self.recorded += 1
        found = work()

        def again() -> None:
            self.replayed += 1
            new = work()
            found.losses_N.copy_(new.losses_N)
            for old, gradient in zip(found.gradients, new.gradients, strict=True):
                if old is not None and gradient is not None:
                    old.copy_(gradient)

        # What was recorded is not computed until it is played.
        poison(found)
        again()
        return found, again


def poison(found: Found) -> None:
    for tensor in (found.losses_N, *found.gradients):
        if tensor is not None:
            tensor.fill_(torch.nan)


def steps(task: Task, batches: list[Batch]) -> list[dict[str, Tensor]]:
    """Of every step, its parts and the loss as it is descended."""
    adamw, _ = optimizer(task, task.optim)
    seen = []
    for batch in batches:
        loss, parts = task.step_losses(batch)
        (0.5 * poisoned(loss)).backward()
        task.configure_gradient_clipping(adamw, 1.0)
        adamw.step()
        adamw.zero_grad()
        seen.append({**parts, "descended": loss.detach()})
    return seen


def brighter(batch: Batch, by: float) -> Batch:
    return {**batch, "image_BCDHW": (batch["image_BCDHW"] + by).clamp(0, 1), "row_B": torch.tensor([0])}


@pytest.mark.parametrize(
    ("make", "first"), [(supervised_task, supervised_batch), (simmim_task, simmim_batch)], ids=["train", "pretrain"]
)
def test_a_replayed_step_is_the_plain_one_to_the_bit(make: Callable[[], Task], first: Callable[[], Batch]) -> None:
    batch = first()
    halves = {name: value[:1] for name, value in batch.items()}
    batches = [brighter(one, 0.1 * place) for place, one in enumerate([batch, batch, batch, halves, batch, batch])]
    plain, replayed, recorder = make(), make(), Recorder()
    replayed.graph = StepGraph(replayed, replayed.losses, recorder)
    expected, found = steps(plain, batches), steps(replayed, batches)
    # The second is recorded; one of another shape computes as it comes and leaves what is recorded alone.
    assert (recorder.recorded, recorder.replayed) == (1, 5)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    named = dict(plain.named_parameters())
    assert all(torch.equal(weight, named[name]) for name, weight in replayed.named_parameters())


def test_frozen_weights_get_no_gradient() -> None:
    task = supervised_task()
    task.model.image_encoder.requires_grad_(False)
    task.graph = StepGraph(task, task.losses, Recorder())
    before = [weight.clone() for weight in task.parameters()]
    steps(task, [supervised_batch()] * 3)
    for now, then in zip(task.parameters(), before, strict=True):
        assert now.requires_grad or torch.equal(now, then)
    assert any(not torch.equal(now, then) for now, then in zip(task.parameters(), before, strict=True))


def test_a_validation_gives_the_memory_back_and_the_next_step_is_recorded_anew() -> None:
    task, recorder = simmim_task(), Recorder()
    task.graph = StepGraph(task, task.losses, recorder)
    steps(task, [simmim_batch()] * 3)
    assert task.graph.recording is not None
    task.on_validation_start()
    assert task.graph.recording is None
    steps(task, [simmim_batch()])
    assert recorder.recorded == 2


def test_weights_that_moved_are_not_taken_for_those_that_were_recorded() -> None:
    task, recorder = simmim_task(), Recorder()
    task.graph = StepGraph(task, task.losses, recorder)
    steps(task, [simmim_batch()] * 2)
    before = recorder.replayed
    task.mask_token.data = task.mask_token.data + 1.0
    expected = task.losses(simmim_batch())[0]
    assert torch.equal(task.step_losses(simmim_batch())[0], expected) and recorder.replayed == before


def test_a_step_that_waits_for_the_gpu_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits() -> Found:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def fills() -> Found:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    with pytest.raises(ConfigError, match=r"^run\.compile: .*\(operation not .* capturing\): set run\.strategy=ddp"):
        recorded(waits)
    with pytest.raises(torch.OutOfMemoryError):
        recorded(fills)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (RunConfig(compile=True), True),
        (RunConfig(), False),
        (RunConfig(compile=True, devices=2), False),
        (RunConfig(compile=True, strategy=Strategy.ddp), False),
        (RunConfig(compile=True, strategy=Strategy.fsdp), False),
        (RunConfig(compile=True, custom_strategy="toys:strategy"), False),
    ],
)
def test_a_single_process_records(run: RunConfig, expected: bool) -> None:
    assert replays(run) is expected
