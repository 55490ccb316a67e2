"""The tasks: pure functions of the batch, every trainable parameter gets a gradient, a batch can be learned."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from segvol_pl.config import (
    DataConfig,
    OptimConfig,
    PretrainConfig,
    PromptConfig,
    Recompute,
    TrainConfig,
)
from segvol_pl.data import sampling
from segvol_pl.data.batch import Batch, unpacked
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Draw, Stream
from segvol_pl.model import TextBank
from segvol_pl.packing.phantom_anatomy import CATEGORIES
from segvol_pl.planning import memory
from segvol_pl.training.module import Sharding, optimizer, schedule
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.targets import PromptTargets, pseudo_targets, supervised_targets

MODEL = tiny_model(hidden_size=32, num_layers=2, mlp_dim=64, decoder_mlp_dim=64)
PROMPTS = PromptConfig(categories_per_volume=2, pseudo_per_volume=3)
OPTIM = OptimConfig(lr=3e-3, warmup_steps=5, max_steps=60)


def _batch(folder: Path, draw: Draw, size: int = 2) -> Batch:
    records = read_index(Store(folder)).samples.labelled()
    return unpacked(next(iter(Stream(Corpus([Part(Store(folder), records)]), draw, BatchPlan(len(records), size)))))


@pytest.fixture(scope="module")
def segment_batch(phantom_shards: Path) -> Batch:
    rows = {name: row for row, name in enumerate(sorted(read_index(Store(phantom_shards)).categories))}
    data = DataConfig(overview_fraction=1.0, flip=0.0)
    return _batch(
        phantom_shards,
        functools.partial(sampling.sample_segmentation, model=MODEL, data=data, prompts=PROMPTS, row_of=rows),
    )


@pytest.fixture(scope="module")
def simmim_batch(phantom_shards: Path) -> Batch:
    draw = functools.partial(sampling.sample_simmim, model=MODEL, data=DataConfig(), mask_ratio=0.6)
    return _batch(phantom_shards, draw)


def _segment_task() -> SegVolTask:
    torch.manual_seed(0)
    return SegVolTask(TrainConfig(model=MODEL, prompts=PROMPTS, optim=OPTIM), TextBank.seeded(sorted(CATEGORIES), 512))


def targets_of(batch: Batch, combinations: Sequence[str] = PROMPTS.combinations) -> PromptTargets:
    return supervised_targets(batch, list(combinations), {})


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
    bce = [value for name, value in parts.items() if name.startswith("bce/")]
    assert len(dice) == len(bce) == 6 and all(0 < value < 1 for value in dice)
    assert torch.isclose(sum(dice) + sum(bce), parts["supervised"])


def test_the_masks_that_validation_looks_at_are_those_of_the_loss(segment_batch: Batch) -> None:
    task, predicted = _segment_task(), []
    with torch.no_grad():
        task.losses(segment_batch, predicted)
        asked = targets_of(segment_batch).prompts
        masks = task.model.decode(task.model.encode(segment_batch["image_BCDHW"]), asked) > 0
    found = torch.cat(predicted, dim=1)[:, : masks.shape[1]]
    assert found.shape == masks.shape and (found == masks).float().mean() > 0.9999


def test_prompts_decoded_together_equal_prompts_decoded_alone(segment_batch: Batch) -> None:
    task = _segment_task()
    tokens = task.model.encode(segment_batch["image_BCDHW"])
    names = PROMPTS.combinations
    together = task.model.decode(tokens, targets_of(segment_batch).prompts).unflatten(1, (-1, len(names)))
    for place, name in enumerate(names):
        alone = task.model.decode(tokens, targets_of(segment_batch, [name]).prompts)
        assert torch.allclose(together[:, :, place], alone, atol=1e-5)


def test_drawn_combinations_estimate_the_loss_over_all(segment_batch: Batch) -> None:
    """Each pair of combinations in turn: the mean of their losses is the loss over all combinations."""
    task, names = _segment_task(), PROMPTS.combinations
    shape = (*segment_batch["valid_BK"].shape, 2)
    with torch.no_grad():
        expected, parts = task.losses(segment_batch)
        drawn = [
            task.losses({**segment_batch, "combination_BKC": torch.tensor(pair).expand(shape)})
            for pair in itertools.combinations(range(len(names)), 2)
        ]
    assert torch.isclose(torch.stack([loss for loss, _ in drawn]).mean(), expected, rtol=1e-5)
    for name in (f"{kind}/{each}" for kind in ("dice_loss", "bce") for each in names):
        assert torch.isclose(torch.stack([found[name] for _, found in drawn]).mean(), parts[name], rtol=1e-5)


def test_a_mask_that_comes_with_a_prompt_is_trained_and_changes_its_prompts_alone(phantom_shards: Path) -> None:
    model, prompts = replace(MODEL, mask_prompt=True), replace(PROMPTS, mask_fraction=1.0)
    rows = {name: row for row, name in enumerate(sorted(read_index(Store(phantom_shards)).categories))}
    data = DataConfig(overview_fraction=0.0)
    batch = _batch(
        phantom_shards,
        functools.partial(sampling.sample_segmentation, model=model, data=data, prompts=prompts, row_of=rows),
    )
    assert batch["has_coarse_BK"].all() and batch["coarse_BKDHW"].flatten(2).amax(-1).min() > 0
    torch.manual_seed(0)
    config = TrainConfig(model=model, prompts=prompts, optim=OPTIM)
    task = SegVolTask(config, TextBank.seeded(sorted(CATEGORIES), 512))
    without = {**batch, "has_coarse_BK": torch.zeros_like(batch["has_coarse_BK"])}
    loss = task.losses(batch)[0]
    assert torch.equal(loss, task.losses(without)[0])  # untrained, masks change nothing
    loss.backward()
    embedding = task.model.prompt_encoder.mask_embedding
    assert embedding is not None and embedding.lin2.weight.grad.any()
    torch.nn.init.normal_(embedding.lin2.weight)
    first_alone = {**without, "has_coarse_BK": torch.eye(2, dtype=torch.bool)[:1].expand(2, 2)}
    with torch.no_grad():
        tokens = task.model.encode(batch["image_BCDHW"])
        one, none = (task.model.decode(tokens, targets_of(each).prompts) for each in (first_alone, without))
    changed_BP = (one - none).abs().flatten(2).amax(-1) > 1e-3
    count = len(PROMPTS.combinations)
    assert changed_BP[:, :count].all() and not changed_BP[:, count:].any()


def _plain_loss(task: SegVolTask, batch: Batch) -> torch.Tensor:
    """Each prompt decoded alone, each time from an image encoded anew, by the papers' formulas."""
    loss = torch.zeros(())
    asked = targets_of(batch).joined(pseudo_targets(batch, {}), task.config.pseudo_weight)
    for place, mask_BDHW in enumerate(asked.masks_BKDHW[:, asked.rows_P].unbind(1)):
        tokens_BTE = task.model.encode(batch["image_BCDHW"])
        logits = task.model.decode(tokens_BTE, asked.prompts.at(slice(place, place + 1)))[:, 0].flatten(1)
        truth = mask_BDHW.float().flatten(1)
        bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
        both = logits.sigmoid().sum(1) + truth.sum(1)
        dice = 1 - 2 * (logits.sigmoid() * truth).sum(1) / (both + 1)
        loss = loss + (asked.weights_BP[:, place] * (dice + bce)).sum()
    return loss


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_prompts_in_groups_cost_what_prompts_one_by_one_do(segment_batch: Batch, size: int, whole: bool) -> None:
    """Loss and every gradient, whether taken in the forward pass or by computing a group again."""
    task = _segment_task()
    task.config.run.prompts_at_once, task.sharding = size, Sharding(weights_resident=whole)
    trained = list(task.parameters())
    plain = _plain_loss(task, segment_batch)
    expected = torch.autograd.grad(plain, trained)
    loss, _ = task.losses(segment_batch)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    # A loss that is scaled, as in accumulation, scales them.
    gradients = torch.autograd.grad(3 * loss, trained)
    for found, wanted in zip(gradients, expected, strict=True):
        # A key's bias moves no softmax: its gradient is rounding alone.
        torch.testing.assert_close(found / 3, wanted, rtol=1e-5, atol=1e-8 + 1e-5 * float(wanted.abs().max()))


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(segment_batch: Batch) -> None:
    whole, partly = _segment_task(), _segment_task()
    partly.model.image_encoder.requires_grad_(False)
    partly.model.mask_decoder.output_upscaling.requires_grad_(False)
    for task in (whole, partly):
        task.losses(segment_batch)[0].backward()
    pairs = zip(partly.named_parameters(), whole.parameters(), strict=True)
    for (_, ours), theirs in pairs:
        assert ours.grad is None if not ours.requires_grad else torch.allclose(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_gpu_decodes_together_what_its_memory_holds(monkeypatch: pytest.MonkeyPatch, segment_batch: Batch) -> None:
    """The task's own groups: 15 prompts, each of which takes a third of what is left for them."""
    task, count = _segment_task(), 2 * len(PROMPTS.combinations) + PROMPTS.pseudo_per_volume
    alone = [slice(first, min(first + 6, count)) for first in range(0, count, 6)]
    assert task.room is None and task.groups(count, 2) == alone
    fixed = memory.moments(task.config, 2, False, 0, True)[0].total
    one = 2 * memory.prompt_bytes(MODEL, False, True)
    monkeypatch.setitem(task.__dict__, "room", (fixed + 4.5 * one) / memory.MARGIN)
    groups = task.groups(count, 2)
    assert [group.stop - group.start for group in groups] == [3, 4, 4, 4]
    assert [group.start for group in groups] == [0, *(group.stop for group in groups[:-1])]
    loss = float(task.losses(segment_batch)[0].detach())
    assert loss == pytest.approx(float(_segment_task().losses(segment_batch)[0].detach()), rel=1e-6)


class _Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_no_more_is_made_at_once_than_a_group_needs(segment_batch: Batch) -> None:
    task = _segment_task()
    task.config.run.prompts_at_once = 1
    with _Largest() as watch:
        task.losses(segment_batch)[0].backward()
    prompts = 2 * len(PROMPTS.combinations) + PROMPTS.pseudo_per_volume
    assert watch.largest < prompts * 2 * math.prod(MODEL.input_shape) / 2


@pytest.mark.parametrize("recompute", [Recompute.cheap, Recompute.blocks])
def test_activations_computed_again_give_the_same_gradients(recompute: Recompute, segment_batch: Batch) -> None:
    gradients, held = [], []
    for chosen in (Recompute.none, recompute):
        task = _segment_task()
        task.model.image_encoder.compute_again(chosen)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=saved: kept.append(x.numel()) or x, lambda x: x):  # type: ignore[misc]
            loss, _ = task.losses(segment_batch)
        held.append(sum(saved))
        gradients.append(torch.autograd.grad(loss, list(task.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert held[1] < held[0]


def test_an_invalid_mask_counts_nothing(segment_batch: Batch) -> None:
    task = _segment_task()
    batch = {**segment_batch, "valid_BK": torch.zeros_like(segment_batch["valid_BK"])}
    assert float(task.losses(batch)[1]["supervised"]) == 0


def test_simmim_equals_its_plain_form(simmim_batch: Batch) -> None:
    """Head on every token, and the loss picked by the mask."""
    task, mask_BT = _simmim_task(), simmim_batch["mask_BT"]
    loss = task.loss(simmim_batch)
    ours = torch.autograd.grad(loss, list(task.parameters()))
    patches_BTV = task.encoder.patches(simmim_batch["image_BCDHW"])
    restored_BTV = task.head(task.encoder.encode_patches(patches_BTV, mask_BT, task.mask_token))
    plain = (restored_BTV - patches_BTV).abs()[mask_BT].mean()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, list(task.parameters())), rtol=1e-5, atol=1e-7)


def test_the_mask_hides_exactly_its_share(simmim_batch: Batch) -> None:
    hidden = simmim_batch["mask_BT"].sum(1)
    assert hidden.tolist() == [round(0.6 * 8)] * 2
    assert not torch.equal(simmim_batch["mask_BT"][0], simmim_batch["mask_BT"][1])


def test_hidden_voxels_do_not_reach_the_encoder(simmim_batch: Batch) -> None:
    encoder, mask = _simmim_task().encoder, simmim_batch["mask_BT"]
    image = simmim_batch["image_BCDHW"].clone().requires_grad_()
    encoder.encode_patches(encoder.patches(image), mask, torch.zeros(MODEL.hidden_size)).sum().backward()
    gradient_BTV = encoder.patches(image.grad)  # type: ignore[arg-type]
    assert not gradient_BTV[mask].any() and gradient_BTV[~mask].any()


@pytest.mark.parametrize("kind", ["segment", "simmim"])
def test_a_batch_can_be_learned(kind: str, request: pytest.FixtureRequest) -> None:
    batch: Batch = request.getfixturevalue(f"{kind}_batch")
    task = _segment_task() if kind == "segment" else _simmim_task()
    adamw, scheduler = optimizer(task, OPTIM)
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
