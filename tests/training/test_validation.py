"""Dice of validation: the figures, and that a GPU is never stopped for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segvol_pl.config import OptimConfig, PromptConfig, TrainConfig
from segvol_pl.model import TextBank
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.validation import ValidationDice

MODEL = tiny_model(hidden_size=32)
PROMPTS = PromptConfig(categories_per_volume=3, pseudo_per_volume=0, combinations=["text", "box"])
NAMES = ["one", "two", "three", "four"]


@pytest.fixture(scope="module")
def task() -> SegVolTask:
    config = TrainConfig(model=MODEL, prompts=PROMPTS, optim=OptimConfig(max_steps=1))
    return SegVolTask(config, TextBank.seeded(NAMES, MODEL.text_dim))


def _batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "category_BK": torch.tensor([[0, 2, 2], [3, 0, 1]]),
        "valid_BK": torch.tensor([[True, True, True], [True, False, False]]),
        "masks_BKDHW": torch.rand(2, 3, *MODEL.input_shape, generator=generator) < 0.3,
    }


def _sums(task: SegVolTask, batch: dict[str, Tensor], answers_BKCDHW: Tensor) -> Tensor:
    watching, trainer = ValidationDice(), SimpleNamespace(is_global_zero=False, loggers=[])
    watching.on_validation_start(trainer, task)  # type: ignore[arg-type]
    watching.on_validation_batch_end(trainer, task, answers_BKCDHW, batch, 0)  # type: ignore[arg-type]
    return watching.sums_CG2


def _answers() -> Tensor:
    return torch.rand(2, 3, 2, *MODEL.input_shape, generator=torch.Generator().manual_seed(1)) < 0.3


def test_sums_are_those_of_the_valid_masks_alone(task: SegVolTask) -> None:
    batch, answers = _batch(), _answers()
    expected = torch.zeros(2, 4, 2, dtype=torch.float64)
    for image, mask in ((0, 0), (0, 1), (0, 2), (1, 0)):
        truth = batch["masks_BKDHW"][image, mask]
        for place in range(2):
            found = answers[image, mask, place]
            dice = 2 * float((found & truth).sum()) / float(found.sum() + truth.sum())
            expected[place, batch["category_BK"][image, mask]] += torch.tensor([dice, 1.0], dtype=torch.float64)
    torch.testing.assert_close(_sums(task, batch, answers), expected, rtol=1e-6, atol=0)


def test_nothing_is_asked_of_a_gpu(task: SegVolTask) -> None:
    """Fake tensors have no values: whatever depends on one, as the number of valid masks does, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch: Any = {name: fake.from_tensor(value) for name, value in _batch().items()}
        assert _sums(task, batch, fake.from_tensor(_answers())).shape == (2, 4, 2)
