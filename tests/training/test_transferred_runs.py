"""Runs with muP: every strategy gives the losses of one process and goes on from its checkpoints; loaded weights stay.

Groups of weights with rates of their own are what strategies that split the optimizer must keep apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import pretrain_config, tiny_model, train_config
from ranks import Ranks
from trained import RELATIVE, Losses, Trained, same_state

from segvol_pl.config import Transfer, Widths
from segvol_pl.model.checkpoint import load_model
from segvol_pl.training.run import prepared, pretrain, train
from segvol_pl.training.segment import SegVolTask

BASE = Widths(hidden_size=16, mlp_dim=32, num_heads=2, decoder_heads=2, decoder_mlp_dim=32)
WIDE = tiny_model(hidden_size=32, mlp_dim=64, decoder_mlp_dim=64)
STEPS, HALF = 6, 3


@pytest.fixture(scope="module")
def trained(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = Trained(tmp_path_factory.mktemp("transferred"), ranks)
    config = train_config(phantom_shards, trained / "run", steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, save_every=HALF, val_every=0, val_batches=0)
    optim = replace(config.optim, transfer=Transfer.mup, base_widths=BASE, weight_decay=0.1, lr=4e-3)
    trained.configure(replace(config, run=run, optim=optim, model=WIDE))
    return trained


@pytest.fixture(scope="module")
def losses(trained: Trained) -> Losses:
    """Of one process."""
    return trained("auto", "auto", 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_every_strategy_keeps_the_rates_apart(strategy: str, losses: Losses, trained: Trained) -> None:
    """From the start on two ranks, and from the checkpoint of half the way on one."""
    found = trained(strategy, strategy, 2)
    np.testing.assert_allclose(list(found.values()), list(losses.values()), rtol=RELATIVE)
    ends = [trained / name / "checkpoints/last.ckpt" for name in ("auto", strategy)]
    same_state(*(torch.load(end, weights_only=True) for end in ends))
    after = trained.after(trained / strategy / f"checkpoints/step-{HALF}.ckpt", f"{strategy}-after", strategy, 1)
    np.testing.assert_allclose(list(after.values()), [losses[step] for step in after], rtol=RELATIVE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_rates_change_what_is_learned(losses: Losses, trained: Trained) -> None:
    """Else the tests above would prove nothing."""
    plain = trained("plain", "auto", 1, "optim.transfer=none")
    assert plain[1] != losses[1] and abs(plain[STEPS] / losses[STEPS] - 1) > 100 * RELATIVE


def test_training_with_mup_starts_from_pretraining_with_mup(phantom_shards: Path, tmp_path: Path) -> None:
    """Loaded values are those of the file, whatever the initialisation is; the rates are those of the widths."""
    config = pretrain_config(phantom_shards, tmp_path / "simmim", steps=2)
    optim = replace(config.optim, transfer=Transfer.mup, base_widths=BASE)
    run = replace(config.run, val_batches=0)
    encoder = pretrain(replace(config, model=WIDE, optim=optim, run=run))
    config = train_config(phantom_shards, tmp_path / "run", steps=1)
    config = replace(config, model=WIDE, optim=optim, run=replace(config.run, val_batches=0), pretrained=str(encoder))
    task, _ = prepared(config)
    assert isinstance(task, SegVolTask)
    saved = torch.load(encoder, weights_only=True)["state_dict"]
    for name, value in task.model.image_encoder.state_dict().items():
        assert torch.equal(value, saved[f"encoder.{name}"]), name
    assert task.rates["model.image_encoder.blocks.0.mlp.linear1.weight"] == 0.5
    # Its result is an ordinary model, which can be trained further with other rates or without transfer.
    last = train(config)
    tuned = replace(config, pretrained=None, weights=str(last), optim=replace(optim, transfer=Transfer.none))
    again, model = prepared(tuned)[0], load_model(last)
    assert isinstance(again, SegVolTask)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
