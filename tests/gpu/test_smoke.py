"""Pre-training, training and evaluation on a CUDA device, through their real entry points: in bf16, as they come."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from steps import STEPS, TINY, configured, logged

from segvol_pl.config.loader import load
from segvol_pl.training import run
from segvol_pl.training.strategies import trainer_precision

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pretrained(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain")
    assert run.pretrain(configured("pretrain", phantom_shards, out)) == out / "checkpoints" / "last.ckpt"
    return out


@pytest.fixture(scope="module")
def trained(pretrained: Path, phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train")
    start = f"pretrained={pretrained / 'checkpoints' / 'last.ckpt'}"
    run.train(configured("train", phantom_shards, out, start))
    return out


def assert_whole(out: Path, validations: int = 2) -> None:
    """A checkpoint of the last step with finite weights on no device, finite losses, rates, memory of the device."""
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    weights = checkpoint["state_dict"].values()
    assert checkpoint["global_step"] == STEPS
    assert all(weight.isfinite().all() and weight.device.type == "cpu" for weight in weights)
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.float32}
    losses = logged(out, "train/loss")
    assert len(losses) == STEPS // 2 and all(0 < loss < 10 for loss in losses)
    assert len(logged(out, "val/loss")) == validations
    assert all(memory > 0 for memory in logged(out, "rate/memory_gib"))


def test_auto_is_bf16_on_this_card(phantom_shards: Path, tmp_path: Path) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bf16")
    assert trainer_precision(configured("train", phantom_shards, tmp_path).run) == "bf16-mixed"


def test_pretraining_ends_with_a_checkpoint_and_finite_losses(pretrained: Path) -> None:
    assert_whole(pretrained)


def test_training_goes_on_from_the_pretrained_encoder(trained: Path) -> None:
    assert_whole(trained)


def test_training_starts_where_a_cpu_run_starts(trained: Path, pretrained: Path, phantom_shards: Path) -> None:
    """The validation before the first step: the same weights and batches, bf16 here against float32 there."""
    out = trained.with_name("cpu")
    start = f"pretrained={pretrained / 'checkpoints' / 'last.ckpt'}"
    on_cpu = ["run.accelerator=cpu", "run.precision=fp32", "optim.max_steps=1", "run.log_every=1"]
    run.train(configured("train", phantom_shards, out, start, *on_cpu))
    assert logged(trained, "val/loss")[0] == pytest.approx(logged(out, "val/loss")[0], rel=5e-3)


def test_a_run_that_stopped_goes_on_to_the_same_losses(
    trained: Path, pretrained: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    """The decay of the learning rate apart, which knows how long the run is to be: so to rounding of bf16."""
    start = f"pretrained={pretrained / 'checkpoints' / 'last.ckpt'}"
    run.train(configured("train", phantom_shards, tmp_path, start, f"optim.max_steps={STEPS // 2}"))
    run.train(configured("train", phantom_shards, tmp_path, start))
    assert_whole(tmp_path, validations=3)
    assert logged(tmp_path, "train/loss") == pytest.approx(logged(trained, "train/loss"), rel=1e-2)


def test_evaluation_in_bf16_agrees_with_one_on_the_cpu(trained: Path, phantom_shards: Path, tmp_path: Path) -> None:
    from segvol_pl.evaluation.run import evaluate

    def dice(device: str, precision: str) -> dict[tuple[str, str], float]:
        out = tmp_path / device
        keys = [f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}", f"data.shards={phantom_shards}", f"out={out}"]
        more = [f"device={device}", f"precision={precision}", "pictures=0", "match_categories=false", "modes=[resize]"]
        evaluate(load("evaluate", [str(TINY / "evaluate.yaml"), *keys, *more]))
        with (out / "rows.csv").open() as lines:
            return {(row["case"], row["category"] + row["prompt"]): float(row["dice"]) for row in csv.DictReader(lines)}

    here, there = dice("cuda", "auto"), dice("cpu", "fp32")
    assert here.keys() == there.keys() and len(here) > 9
    assert max(abs(here[row] - there[row]) for row in here) < 0.02
