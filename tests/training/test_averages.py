"""The averaged weights of a run, and which weights decay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import TINY, train_config
from torch import nn

from segvol_pl.__main__ import main
from segvol_pl.config import OptimConfig, PretrainConfig, TrainConfig
from segvol_pl.errors import CheckpointError
from segvol_pl.model.checkpoint import EMA, read_weights, with_averages
from segvol_pl.model.convert import export
from segvol_pl.model.released import read_contents
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.averages import exchange
from segvol_pl.training.module import optimizer
from segvol_pl.training.parameter_groups import parameter_groups
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.run import train

STEPS = 4


def test_an_average_begins_after_the_first_step_and_follows() -> None:
    layer = nn.Linear(3, 2)
    adamw, _ = optimizer(layer, OptimConfig(lr=0.1, warmup_steps=0, max_steps=9, ema=0.75))
    expected = None
    for _ in range(4):
        layer(torch.ones(3)).square().sum().backward()
        adamw.step()
        adamw.zero_grad()
        now = layer.weight.detach().clone()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    average = adamw.state[layer.weight][EMA]
    torch.testing.assert_close(average, expected)
    weights, averages = layer.weight.detach().clone(), average.clone()
    exchange(adamw)
    assert torch.equal(layer.weight, averages) and torch.equal(average, weights)
    exchange(adamw)
    assert torch.equal(layer.weight, weights) and torch.equal(average, averages)


def test_a_weight_without_a_gradient_has_no_average() -> None:
    layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    adamw, _ = optimizer(layers, OptimConfig(warmup_steps=0, max_steps=9, ema=0.5))
    for index in (0, 1):  # the second one joins later
        layers[index](torch.ones(3)).sum().backward()
        adamw.step()
        assert (EMA in adamw.state.get(layers[1].weight, {})) is (index == 1)


# ---- in a run ----


@pytest.fixture(scope="module")
def averaged(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = train_config(phantom_shards, tmp_path_factory.mktemp("averaged") / "run", steps=STEPS)
    config = replace(config, optim=replace(config.optim, ema=0.9))
    train(config)
    return config


def _validated(config: TrainConfig, step: int) -> float:
    return dict(read_metrics(Path(config.run.out) / "metrics.csv", "val/loss"))[step]


def test_validation_is_of_the_averages_that_export_writes(
    averaged: TrainConfig, phantom_shards: Path, tmp_path: Path
) -> None:
    """A run that begins from the export validates it before its first step."""
    last = Path(averaged.run.out) / "checkpoints/last.ckpt"
    assert main(["export", str(last), str(tmp_path / "ema.safetensors"), "weights=ema"]) == 0
    export(last, tmp_path / "raw.safetensors")
    found = {}
    for name in ("ema", "raw"):
        config = replace(
            train_config(phantom_shards, tmp_path / name, steps=1), weights=str(tmp_path / f"{name}.safetensors")
        )
        train(config)
        found[name] = _validated(config, 0)
    assert found["ema"] == _validated(averaged, STEPS) != found["raw"]


def test_averages_change_no_loss_of_training(averaged: TrainConfig, tmp_path: Path) -> None:
    plain = replace(averaged, optim=replace(averaged.optim, ema=0.0), run=replace(averaged.run, out=str(tmp_path)))
    train(plain)
    first, second = (read_metrics(Path(config.run.out) / "metrics.csv", "train/loss") for config in (plain, averaged))
    assert first == second and len(first) == STEPS
    last = tmp_path / "checkpoints/last.ckpt"
    theirs = read_weights(Path(averaged.run.out) / "checkpoints/last.ckpt").tensors
    assert all(torch.equal(value, theirs[name]) for name, value in read_weights(last).tensors.items())
    with pytest.raises(CheckpointError, match=r"last\.ckpt: holds no averaged weights: train with optim\.ema"):
        with_averages(read_contents(last))


def test_other_weights_to_export_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "a.ckpt", "b.safetensors", "weights=best"]) == 2
    assert "weights (command line): 'best' is none of trained, ema" in capsys.readouterr().err


# ---- weight decay ----


def test_all_weights_decay_by_default_in_one_group() -> None:
    task = SimMIMTask(PretrainConfig(model=TINY, optim=OptimConfig(max_steps=1)))
    (group,) = parameter_groups(task, task.optim)
    assert list(group) == ["params"] and group["params"] == list(task.parameters())


def test_norms_biases_and_embeddings_may_be_left_out() -> None:
    task = SimMIMTask(PretrainConfig(model=TINY, optim=OptimConfig(max_steps=1, weight_decay_all=False)))
    task.encoder.norm.weight.requires_grad_(False)
    adamw, _ = optimizer(task, task.optim)
    names = {parameter: name for name, parameter in task.named_parameters()}
    decays, others = ([names[parameter] for parameter in group["params"]] for group in adamw.param_groups)
    assert [group["weight_decay"] for group in adamw.param_groups] == [1e-5, 0.0]
    assert "head.weight" in decays and all(name.endswith(".weight") and "norm" not in name for name in decays)
    assert {"mask_token", "head.bias", "encoder.norm.bias"} < set(others)
    assert any("position_embeddings" in name for name in others)
    assert len(decays) + len(others) == len(names) - 1
