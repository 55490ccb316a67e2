"""A step that is recorded as a CUDA graph gives what it gives as it comes, and its loader goes on beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from steps import configured, logged, simmim_batch, simmim_task, supervised_batch, supervised_task
from torch import Tensor

from segvol_pl.data.batch import Batch
from segvol_pl.training import run
from segvol_pl.training.graph import StepGraph
from segvol_pl.training.module import Task, optimizer, poisoned

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def stepped(task: Task, batches: list[Batch], bf16: bool) -> list[Tensor]:
    """The loss of every step."""
    adamw, _ = optimizer(task, task.optim)
    losses = []
    for place, batch in enumerate(batches):
        if place == len(batches) - 2:
            task.on_validation_start()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss, parts = task.step_losses(batch)
        poisoned(loss).backward()
        task.configure_gradient_clipping(adamw, 1.0)
        adamw.step()
        adamw.zero_grad()
        assert torch.equal(parts["loss"], loss.detach())
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make", "first"), [(supervised_task, supervised_batch), (simmim_task, simmim_batch)], ids=["train", "pretrain"]
)
def test_a_recorded_step_is_the_plain_one_to_the_bit(
    make: Callable[[], Task], first: Callable[[], Batch], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every batch, which all differ; a validation comes between."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    batch = {name: value.cuda() for name, value in first().items()}
    batches = [{**batch, "image_BCDHW": (batch["image_BCDHW"] + 0.05 * place).clamp(0, 1)} for place in range(6)]
    plain, graph = make().cuda(), make().cuda()
    graph.graph = StepGraph(graph, graph.losses)
    expected, found = stepped(plain, batches, bf16), stepped(graph, batches, bf16)
    assert graph.graph.recording is not None
    assert torch.equal(torch.stack(found), torch.stack(expected))
    named = dict(plain.named_parameters())
    assert {name for name, weight in graph.named_parameters() if not torch.equal(weight, named[name])} == set()


def test_a_compiled_run_is_recorded_and_has_the_plain_one_s_losses(phantom_shards: Path, tmp_path: Path) -> None:
    recorded = []
    record = StepGraph._recording

    def counted(self: StepGraph, batch: Batch, like: tuple[object, ...]) -> object:
        recorded.append(like)
        return record(self, batch, like)

    keys = ["run.precision=fp32", "run.log_every=1", "run.val_every=4", "data.workers=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepGraph, "_recording", counted)
        run.train(configured("train", phantom_shards, tmp_path / "compiled", "run.compile=true", *keys))
    run.train(configured("train", phantom_shards, tmp_path / "plain", *keys))
    # The second step, and the first one after a validation in the run's middle.
    assert len(recorded) == 2
    for metric in ("train/loss", "val/loss"):
        assert logged(tmp_path / "compiled", metric) == pytest.approx(logged(tmp_path / "plain", metric), rel=5e-3)


def test_loader_processes_beside_a_gpu_give_what_the_trainer_s_own_does(phantom_shards: Path, tmp_path: Path) -> None:
    """They are started by a fork server, which holds nothing of the GPU."""
    for workers in (0, 2):
        keys = ["run.precision=fp32", "run.deterministic=true", "run.log_every=1", f"data.workers={workers}"]
        run.train(configured("train", phantom_shards, tmp_path / str(workers), *keys))
    assert logged(tmp_path / "0", "train/loss") == logged(tmp_path / "2", "train/loss")
