"""Dice and figures per source of validation: the figures, and that a GPU is never stopped for them."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import pretrain_config, tiny_model, train_config
from ranks import Ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from segvol_pl.config import OptimConfig, PretrainConfig, PromptConfig, TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.index_builder import build_index
from segvol_pl.model import TextBank
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.validation import ValidationBySource, ValidationDice

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


# ---- by source ----


@pytest.fixture(scope="module")
def sources(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The phantoms three times: two with held-out volumes, one of them named as a kind of prompt, and one without."""
    folder = tmp_path_factory.mktemp("sources")
    held = [Path(shutil.copytree(phantom_shards, folder / name)) for name in ("here/CT 1", "here/text")]
    train_only = Path(shutil.copytree(phantom_shards, folder / "train_only"))
    for path in train_only.glob("*-test-*.tar"):
        path.unlink()
    build_index(train_only)
    return [*held, train_only]


def _mixed(config: TrainConfig | PretrainConfig, sources: list[Path]) -> Any:
    mix = [f"2*{sources[1]}", str(sources[2])]
    data = replace(config.data, shards=str(sources[0]), mix=mix, global_batch=4, overview_fraction=1.0)
    # All held-out volumes equally often: the means over them can be compared with those of other divisions.
    return replace(config, data=data, run=replace(config.run, val_every=2, val_batches=3))


def _metrics(out: Path, step: int) -> dict[str, float]:
    with (out / "metrics.csv").open(newline="") as stream:
        return {row["metric"]: float(row["value"]) for row in csv.DictReader(stream) if int(row["step"]) == step}


def test_losses_of_sources_average_to_the_loss_on_one_and_two_ranks(
    sources: list[Path], tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    for kind, make in (("pretrain", pretrain_config), ("train", train_config)):
        found = []
        for number in (1, 2):
            config = _mixed(make(sources[0], tmp_path / f"{kind}{number}", steps=2), sources)
            (tmp_path / "run.yaml").write_text(to_yaml(config))
            ranks[number](kind, str(tmp_path / "run.yaml"))
            found.append([_metrics(Path(config.run.out), step) for step in (0, 2)])
        for before, after in zip(*found, strict=True):
            # Of two folders there are held-out volumes, equally many in a validation; text is a kind of prompt.
            names = ("CT_1", "text-2") if kind == "train" else ("CT_1", "text")
            assert {name for name in before if name.startswith("val/loss/")} == {f"val/loss/{n}" for n in names}
            mean = sum(before[f"val/loss/{name}"] for name in names) / 2
            assert mean == pytest.approx(before["val/loss"], rel=1e-6)
            if kind == "train":
                assert {f"val/dice/{name}" for name in names} <= set(before)
            for name in (n for n in before if n.rpartition("/")[2] in names):
                assert before[name] == pytest.approx(after[name], rel=1e-3 if before is found[0][1] else 1e-6)
        shares = {name: value for name, value in found[0][0].items() if name.startswith("data/share/")}
        assert shares == {
            f"data/share/{name}": share for name, share in zip((*names, "train_only"), (0.25, 0.5, 0.25), strict=True)
        }


def test_dice_of_a_source_is_that_of_its_own_volumes(task: SegVolTask) -> None:
    batch, answers = _batch(), _answers()
    logged: dict[str, float] = {}
    trainer: Any = SimpleNamespace(
        is_global_zero=False,
        global_step=3,
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: logged.update(metrics))],
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
        datamodule=SimpleNamespace(source_names=lambda reserved: ["a", "b", "c"], batch_sources=lambda: [2, 0]),
    )
    watching = ValidationDice()
    by_source = ValidationBySource(watching)
    task.volume_losses_B = torch.tensor([0.5, 2.0])
    for callback in (watching, by_source):
        callback.on_validation_start(trainer, task)
        callback.on_validation_batch_end(trainer, task, answers, batch, 0)
    by_source.on_validation_end(trainer, task)
    assert logged["val/loss/c"] == 0.5 and logged["val/loss/a"] == 2.0 and "val/loss/b" not in logged
    # Volume 1 has one valid mask, of the category four.
    dice_C = [2 * float((answers[1, 0, c] & batch["masks_BKDHW"][1, 0]).sum()) for c in range(2)]
    dice_C = [d / float(answers[1, 0, c].sum() + batch["masks_BKDHW"][1, 0].sum()) for c, d in enumerate(dice_C)]
    assert logged["val/dice/a"] == pytest.approx(sum(dice_C) / 2, rel=1e-6)
    assert set(logged) == {"val/loss/a", "val/loss/c", "val/dice/a", "val/dice/c"}
