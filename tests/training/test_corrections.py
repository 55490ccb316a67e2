"""Corrections: where clicks are drawn, and what a step makes of them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from torch import Tensor

from segvol_pl.config import DataConfig, OptimConfig, PromptConfig, TrainConfig
from segvol_pl.data import sampling
from segvol_pl.data.batch import Batch, unpacked
from segvol_pl.data.corpus import Corpus, Part
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.prompts import ABSENT, INSIDE, OUTSIDE
from segvol_pl.model import TextBank
from segvol_pl.packing.phantom_anatomy import CATEGORIES
from segvol_pl.training.corrections import Corrections, draw_click
from segvol_pl.training.grouped_loss import Group
from segvol_pl.training.module import Sharding
from segvol_pl.training.segment import SegVolTask

MODEL = tiny_model(hidden_size=32, num_layers=2, mlp_dim=64, decoder_mlp_dim=64, mask_prompt=True)
PROMPTS = PromptConfig(categories_per_volume=2, pseudo_per_volume=2, mask_fraction=0.5, corrections=2)
CELL = (1, 2, 2)
DRAWS = 400


def _cells(*boxes: tuple[int, ...]) -> Tensor:
    """Low-resolution mask (1,1,8,16,16) of boxes d0 d1 h0 h1 w0 w1, the ends excluded."""
    mask = torch.zeros(1, 1, 8, 16, 16, dtype=torch.bool)
    for d0, d1, h0, h1, w0, w1 in boxes:
        mask[..., d0:d1, h0:h1, w0:w1] = True
    return mask


def _voxels(cells: Tensor) -> Tensor:
    for axis, size in enumerate(CELL, start=2):
        cells = cells.repeat_interleave(size, axis)
    return cells


def _clicks(answer: Tensor, truth: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Many clicks on one answer: (N,3), (N)."""
    chance = torch.from_numpy(np.random.default_rng(0).random((DRAWS, 1, 2), dtype=np.float32))
    click = draw_click(answer.expand(DRAWS, -1, -1, -1, -1), truth.expand(DRAWS, -1, -1, -1, -1), chance)
    return click.voxel_BK3[:, 0].numpy(), click.label_BK[:, 0].numpy()


def test_clicks_lie_on_voxels_that_are_wrong_and_say_so() -> None:
    truth, answer = _voxels(_cells((1, 6, 2, 8, 2, 8))), _cells((1, 6, 2, 8, 6, 14))
    voxels, labels = _clicks(answer, truth)
    assert set(labels) == {INSIDE, OUTSIDE}
    inside = truth[0, 0][tuple(voxels.T)].numpy()
    assert (inside == (labels == INSIDE)).all()
    assert (inside != _voxels(answer)[0, 0][tuple(voxels.T)].numpy()).all()


def test_large_errors_are_clicked_more_often_and_in_their_middle() -> None:
    nothing = _cells()
    large, small = (1, 6, 1, 8, 1, 8), (1, 4, 12, 15, 12, 15)
    voxels, _ = _clicks(nothing, _voxels(_cells(large, small)))
    at_large = voxels[:, 1] < 2 * 8
    assert 0.8 < at_large.mean() < 1
    # The middle third along each axis is a 27th of the error.
    middle = np.abs(voxels[at_large] - [3, 8.5, 8.5]) <= [1, 3, 3]
    assert middle.all(axis=1).mean() > 0.5


def test_errors_smaller_than_a_cell_are_clicked_only_where_there_are_no_others() -> None:
    """A border that the answer's resolution cannot show is an error along the whole organ."""
    truth = _voxels(_cells((1, 7, 2, 14, 2, 14)))
    truth[..., 4:29, 4] = False
    answer = _cells((1, 7, 2, 14, 2, 14), (0, 1, 0, 2, 0, 2))
    voxels, labels = _clicks(answer, truth)
    assert (voxels[:, 0] == 0).mean() > 0.9 and (labels == OUTSIDE).all()
    voxels, labels = _clicks(_cells((1, 7, 2, 14, 2, 14)), truth)
    assert (voxels[:, 2] == 4).all() and (labels == OUTSIDE).all()


def test_a_thin_structure_that_was_missed_is_clicked() -> None:
    truth = torch.zeros(1, 1, 8, 32, 32, dtype=torch.bool)
    truth[..., 2:6, 9, 9] = True
    voxels, labels = _clicks(_cells(), truth)
    assert (labels == INSIDE).all() and truth[0, 0][tuple(voxels.T)].all()


def test_an_answer_without_errors_gets_no_click() -> None:
    cells = _cells((1, 4, 2, 8, 2, 8))
    _, labels = _clicks(cells, _voxels(cells))
    assert (labels == ABSENT).all()


# ---- a step ----


def _batch(folder: Path, prompts: PromptConfig) -> Batch:
    records = read_index(Store(folder)).samples.labelled()
    rows = {name: row for row, name in enumerate(sorted(read_index(Store(folder)).categories))}
    draw = functools.partial(sampling.sample_segmentation, model=MODEL, data=DataConfig(), prompts=prompts, row_of=rows)
    return unpacked(next(iter(Stream(Corpus([Part(Store(folder), records)]), draw, BatchPlan(len(records), 2)))))


@pytest.fixture(scope="module")
def batch(phantom_shards: Path) -> Batch:
    return _batch(phantom_shards, PROMPTS)


@pytest.fixture(scope="module")
def batch_without(phantom_shards: Path) -> Batch:
    return _batch(phantom_shards, replace(PROMPTS, corrections=0))


def _task(**changes: object) -> SegVolTask:
    torch.manual_seed(0)
    config = TrainConfig(model=MODEL, prompts=PROMPTS, optim=OptimConfig(max_steps=60, lr=3e-3, warmup_steps=5))
    return SegVolTask(replace(config, **changes), TextBank.seeded(sorted(CATEGORIES), 512))


def test_all_else_of_a_sample_is_the_same_without_corrections(batch: Batch, batch_without: Batch) -> None:
    assert set(batch) - set(batch_without) == {"corrected_BK", "chance_BKR3"}
    assert all(torch.equal(batch[name], value) for name, value in batch_without.items())


def test_rounds_are_added_to_the_loss_and_logged(batch: Batch, batch_without: Batch) -> None:
    task = _task()
    loss, parts = task.losses(batch)
    _, without = task.losses(batch_without)
    assert all(torch.equal(parts[name], value) for name, value in without.items() if name != "loss")
    rounds = [parts[f"{kind}/correction{asked}"] for kind in ("dice_loss", "bce") for asked in (1, 2)]
    assert all(value > 0 for value in rounds)
    torch.testing.assert_close(loss, without["loss"] + len(PROMPTS.combinations) * sum(rounds))


def test_the_loss_is_a_function_of_the_batch(batch: Batch) -> None:
    task = _task()
    assert torch.equal(task.losses(batch)[0], task.losses(batch)[0])


def test_the_mask_embedding_learns_from_corrections_alone(batch: Batch) -> None:
    """The batch without corrections has coarse masks in windows only."""
    overviews = {**batch, "has_coarse_BK": torch.zeros_like(batch["has_coarse_BK"])}
    task = _task()
    task.losses(overviews)[0].backward()
    embedding = task.model.prompt_encoder.mask_embedding
    assert embedding is not None and embedding.lin2.weight.grad is not None and embedding.lin2.weight.grad.any()


@pytest.mark.parametrize("whole", [True, False])
def test_groups_of_any_size_give_the_same_loss_and_gradients(
    batch: Batch, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where activations are computed again in the backward pass, as under FSDP and ZeRO-3."""
    one = _task()
    loss, parts = one.losses(batch)
    loss.backward()
    other = _task()
    other.sharding = Sharding(weights_resident=whole)
    monkeypatch.setattr(other, "groups", lambda count, volumes: [slice(at, min(at + 1, count)) for at in range(count)])
    loss_again, parts_again = other.losses(batch)
    loss_again.backward()
    torch.testing.assert_close(loss_again, loss)
    torch.testing.assert_close(parts_again, parts)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_each_round_has_one_click_more_and_the_answer_before_as_its_mask(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = _task()
    asked: list[tuple[Corrections, Group, Tensor]] = []
    original = Corrections.answered

    def answered(self: Corrections, group: Group, low: Tensor) -> None:
        asked.append((self, group, low.detach()))
        original(self, group, low)

    monkeypatch.setattr(Corrections, "answered", answered)
    task.losses(batch)
    corrections, valid = asked[0][0], batch["valid_BK"]
    for number in (1, 2):
        prompts = corrections.targets(number).prompts
        assert prompts.labels_BPN.shape[2] == batch["labels_BKN"].shape[2] + 2
        new = prompts.labels_BPN[:, :, -2:] != ABSENT
        assert (new.sum(-1)[valid] == number).all()
        assert prompts.has_mask_BP is not None and prompts.has_mask_BP.all()
        masks = corrections.targets(number).masks_BKDHW
        for volume, category in valid.nonzero().tolist():
            at = prompts.points_BPN3[volume, category, -2 + number - 1].long()
            inside = bool(masks[volume, category][tuple(at)])
            assert prompts.labels_BPN[volume, category, -2 + number - 1] == int(inside)
    low = torch.cat([answer for _, group, answer in asked if group.asked == 1], dim=1)
    masks = corrections.targets(2).prompts.masks_BPDHW
    assert masks is not None
    binary = batch["chance_BKR3"][:, :, 1, 2] < 0.5
    torch.testing.assert_close(masks[binary], (low > 0).float()[binary])
    torch.testing.assert_close(masks[~binary], low.sigmoid()[~binary])


def test_corrections_need_a_model_that_takes_masks() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.corrections"):
        TrainConfig(model=replace(MODEL, mask_prompt=False), prompts=replace(PROMPTS, mask_fraction=0.0))
