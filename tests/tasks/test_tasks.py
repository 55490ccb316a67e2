"""The tasks: pure functions of the batch, every trainable parameter gets a gradient, a batch can be learned."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from segvol_pl.config import DataConfig, OptimConfig, PretrainConfig, PromptConfig, SegVolConfig, TrainConfig
from segvol_pl.data import views
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.shards import read_index
from segvol_pl.data.store import Store
from segvol_pl.data.stream import Batch, Draw, Plan, Stream
from segvol_pl.model import TextBank
from segvol_pl.tasks.optim import optimizer, schedule
from segvol_pl.tasks.pretrain import SimMIMTask
from segvol_pl.tasks.segment import SegVolTask, combined

MODEL = SegVolConfig(
    input_shape=[8, 16, 16], patch=[4, 8, 8], hidden=32, layers=2, heads=2, mlp=64, decoder_heads=2, decoder_mlp=64
)
PROMPTS = PromptConfig(categories_per_volume=2, pseudo_per_volume=3)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=5, max_steps=60)


def _batch(folder: Path, draw: Draw, size: int = 2) -> Batch:
    records = [record for record in read_index(Store(folder)).samples if record.labelled]
    return next(iter(Stream(Corpus([Part(Store(folder), records)]), draw, Plan(len(records), size))))


@pytest.fixture(scope="module")
def segment_batch(phantom_shards: Path) -> Batch:
    rows = {name: row for row, name in enumerate(sorted(read_index(Store(phantom_shards)).categories))}
    data = DataConfig(overview_fraction=1.0, flip=0.0)
    return _batch(
        phantom_shards, functools.partial(views.draw_segment, model=MODEL, data=data, prompts=PROMPTS, row_of=rows)
    )


@pytest.fixture(scope="module")
def simmim_batch(phantom_shards: Path) -> Batch:
    draw = functools.partial(views.draw_simmim, model=MODEL, data=DataConfig(), mask_ratio=0.6)
    return _batch(phantom_shards, draw)


def _segment_task() -> SegVolTask:
    torch.manual_seed(0)
    return SegVolTask(
        TrainConfig(model=MODEL, prompts=PROMPTS, optim=OPTIM), TextBank.seeded([str(i) for i in range(9)], 512)
    )


def _simmim_task() -> SimMIMTask:
    torch.manual_seed(0)
    return SimMIMTask(PretrainConfig(model=MODEL, optim=OPTIM))


def test_every_trainable_parameter_of_segvol_gets_a_gradient(segment_batch: Batch) -> None:
    task = _segment_task()
    task.losses(segment_batch)[0].backward()
    assert [name for name, value in task.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_every_parameter_of_simmim_gets_a_gradient(simmim_batch: Batch) -> None:
    task = _simmim_task()
    task.loss(simmim_batch).backward()
    assert [name for name, value in task.named_parameters() if value.grad is None] == []


def test_the_loss_is_a_function_of_the_batch(segment_batch: Batch) -> None:
    task = _segment_task()
    assert torch.equal(task.losses(segment_batch)[0], task.losses(segment_batch)[0])


def test_the_loss_sums_combinations_and_weighs_pseudo_labels(segment_batch: Batch) -> None:
    loss, parts = _segment_task().losses(segment_batch)
    assert torch.isclose(loss, parts["supervised"] + 0.1 * parts["pseudo"])
    dice = [value for name, value in parts.items() if name.startswith("dice_loss/")]
    assert len(dice) == 6 and all(0 < value < 1 for value in dice)


def test_prompts_decoded_together_equal_prompts_decoded_alone(segment_batch: Batch) -> None:
    task = _segment_task()
    tokens = task.model.encode(segment_batch["image_BCDHW"])
    names = PROMPTS.combinations
    together = task.model.decode(tokens, combined(segment_batch, "", names)).unflatten(1, (-1, len(names)))
    for place, name in enumerate(names):
        alone = task.model.decode(tokens, combined(segment_batch, "", [name]))
        assert torch.allclose(together[:, :, place], alone, atol=1e-5)


def test_an_invalid_mask_counts_nothing(segment_batch: Batch) -> None:
    task = _segment_task()
    batch = {**segment_batch, "valid_BK": torch.zeros_like(segment_batch["valid_BK"])}
    assert float(task.losses(batch)[1]["supervised"]) == 0


def test_the_mask_hides_exactly_its_share(simmim_batch: Batch) -> None:
    hidden = simmim_batch["mask_BT"].sum(1)
    assert hidden.tolist() == [round(0.6 * 8)] * 2
    assert not torch.equal(simmim_batch["mask_BT"][0], simmim_batch["mask_BT"][1])


def test_hidden_voxels_do_not_reach_the_encoder(simmim_batch: Batch) -> None:
    encoder, mask = _simmim_task().encoder, simmim_batch["mask_BT"]
    image = simmim_batch["image_BCDHW"].clone().requires_grad_()
    encoder(image, mask, torch.zeros(MODEL.hidden)).sum().backward()
    gradient_BTV = encoder.patches(image.grad)  # type: ignore[arg-type]
    assert not gradient_BTV[mask].any() and gradient_BTV[~mask].any()


@pytest.mark.parametrize("kind", ["segment", "simmim"])
def test_a_batch_can_be_learned(kind: str, request: pytest.FixtureRequest) -> None:
    batch: Batch = request.getfixturevalue(f"{kind}_batch")
    task = _segment_task() if kind == "segment" else _simmim_task()
    adamw, scheduler = optimizer(task.parameters(), OPTIM)
    losses = []
    for _ in range(OPTIM.max_steps):
        loss = task.losses(batch)[0] if isinstance(task, SegVolTask) else task.loss(batch)
        losses.append(float(loss.detach()))
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        scheduler.step()
    assert losses[-1] < 0.75 * losses[0]


def test_the_schedule_warms_up_and_decays_to_nothing() -> None:
    config = OptimConfig(warmup_steps=10, max_steps=110)
    rates = [schedule(step, config) for step in range(111)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[110] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
