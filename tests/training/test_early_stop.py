"""A run that ends when its validation Dice no longer improves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import train_config
from ranks import Ranks

from segvol_pl import goodput
from segvol_pl.config import PretrainConfig, RunConfig, TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import ConfigError
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.early_stop import STATE
from segvol_pl.training.run import train

STEPS = 8


def _config(shards: Path, out: Path) -> TrainConfig:
    """With a rise that no validation reaches after the first, so that the third ends the run, at step 3."""
    config = train_config(shards, out, steps=STEPS)
    run = replace(config.run, val_every=1, val_batches=1, checkpoint_every=STEPS, early_stop=2, early_stop_delta=0.99)
    return replace(config, run=run)


def _dice(out: Path) -> dict[int, float]:
    return dict(read_metrics(out / "metrics.csv", "val/dice"))


def _held(out: Path, name: str) -> dict[str, object]:
    checkpoint: dict[str, object] = torch.load(out / "checkpoints" / name, weights_only=True)
    return checkpoint


def test_a_run_ends_when_nothing_improves_and_stays_ended(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(phantom_shards, tmp_path)
    last = train(config)
    assert _held(tmp_path, "last.ckpt")["global_step"] == 3 and list(_dice(tmp_path)) == [0, 1, 2, 3]
    row = goodput.describe(tmp_path)
    assert (row["state"], row["step"]) == ("done", f"3/{STEPS}")
    assert row[""].startswith("stopped early: in 2 validations Dice has not come more than 0.99 above 0.")
    with caplog.at_level(logging.INFO):
        assert train(config) == last
    assert "at step 3, stopped early" in caplog.text and "run.early_stop=0 trains on" in caplog.text
    assert len(_dice(tmp_path)) == 4
    train(replace(config, run=replace(config.run, early_stop=3)))
    assert _held(tmp_path, "last.ckpt")["global_step"] == 4
    train(replace(config, run=replace(config.run, early_stop=0)))
    assert _held(tmp_path, "last.ckpt")["global_step"] == STEPS


def test_the_best_checkpoint_is_that_of_the_best_dice(phantom_shards: Path, tmp_path: Path) -> None:
    config = _config(phantom_shards, tmp_path)
    train(replace(config, run=replace(config.run, early_stop=STEPS, early_stop_delta=0.0)))
    found = {step: value for step, value in _dice(tmp_path).items() if step}
    best = max(found.values())
    assert _held(tmp_path, "best.ckpt")["global_step"] == min(step for step, value in found.items() if value == best)
    prompts = config.prompts.combinations
    means = [dict(read_metrics(tmp_path / "metrics.csv", f"val/dice/{prompt}")) for prompt in prompts]
    assert found[STEPS] == pytest.approx(sum(each[STEPS] for each in means) / len(means))


@pytest.mark.slow
def test_ranks_stop_together(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(_config(phantom_shards, tmp_path / "run")))
    said = ranks[2]("train", str(tmp_path / "run.yaml"), "run.strategy=ddp")
    assert "stopped early" in said
    callbacks = _held(tmp_path / "run", "last.ckpt")["callbacks"]
    assert isinstance(callbacks, dict) and callbacks[STATE]["wait_count"] == 2


def test_stopping_needs_validations_with_a_dice() -> None:
    for changes in ({"val_every": 0}, {"val_batches": 0}):
        with pytest.raises(ConfigError, match=r"run\.early_stop: needs run\.val_every"):
            RunConfig(early_stop=1, **changes)
    with pytest.raises(ConfigError, match=r"run\.early_stop: pre-training has no Dice"):
        PretrainConfig(run=RunConfig(early_stop=1))
