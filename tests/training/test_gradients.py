"""Losses and gradients that are not finite: skipped alike on all ranks, named, bounded, and never saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config
from ranks import Ranks
from weights import moved_alike, weights_of

from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import NOT_FINITE, NonFiniteError
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.checkpoints import check_finite
from segvol_pl.training.gradients import describe

STEPS, BAD = 6, 3
POISONED = f"""
import os
from segvol_pl.training.segment import SegVolTask
losses = SegVolTask.losses
def poisoned(self, batch, predicted=None):
    loss, parts = losses(self, batch, predicted)
    bad = int(os.environ["LOCAL_RANK"]) == BAD_RANK and predicted is None and self.global_step + 1 == {BAD}
    return (loss * float("nan") if bad else loss), parts
SegVolTask.losses = poisoned
"""
"""The loss of one step is NaN on one rank."""
LEFT_OUT = f"""
import torch
step, calls = torch.optim.AdamW.step, []
def left_out(self, closure=None):
    calls.append(0)
    return closure() if len(calls) == {BAD} else step(self, closure)
torch.optim.AdamW.step = left_out
"""
"""The optimizer does not take one of the steps."""


def _written(shards: Path, out: Path) -> str:
    """The file of a configuration."""
    config = train_config(shards, out, steps=STEPS)
    run = replace(config.run, val_every=0, val_batches=1, checkpoint_every=1)
    config = replace(config, run=run, data=replace(config.data, samples_per_volume=5))
    out.with_suffix(".yaml").write_text(to_yaml(config))
    return str(out.with_suffix(".yaml"))


def _poisoned(bad_rank: int) -> str:
    return POISONED.replace("BAD_RANK", str(bad_rank))


def _losses(out: Path) -> dict[int, float]:
    return dict(read_metrics(out / "metrics.csv", "train/loss"))


@pytest.fixture(scope="module")
def left_out(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process whose optimizer does not take the step."""
    out = tmp_path_factory.mktemp("left out") / "run"
    ranks[1]("train", _written(phantom_shards, out), patch=LEFT_OUT)
    return out


@pytest.mark.parametrize("number", [1, 2])
def test_a_step_that_is_not_finite_ends_the_run_and_is_named(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], number: int
) -> None:
    bad_rank = number - 1
    file = _written(phantom_shards, tmp_path / "run")
    statuses, said = ranks[number].ended("train", file, patch=_poisoned(bad_rank))
    assert statuses == [NOT_FINITE] * number, said
    last_line = said[0].strip().splitlines()[-1]
    assert f"step {BAD}: the loss is not finite on rank {bad_rank} (samples " in last_line
    assert "run.max_bad_steps=0" in last_line and "Traceback" not in said[0]
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == BAD - 1
    check_finite(last, Path("last.ckpt"))


@pytest.mark.parametrize(
    ("number", "strategy"),
    [(1, "auto"), *(pytest.param(2, name, marks=pytest.mark.slow) for name in ("ddp", "fsdp", "zero2", "zero3"))],
)
def test_a_skipped_step_leaves_the_weights_of_a_run_without_it(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], left_out: Path, number: int, strategy: str
) -> None:
    """Which is one whose optimizer does not take it."""
    keys, bad_rank = [f"run.strategy={strategy}", "run.max_bad_steps=1"], number - 1
    file = _written(phantom_shards, tmp_path / "run")
    said = ranks[number]("train", file, *keys, patch=_poisoned(bad_rank))
    assert f"step {BAD}: the loss is not finite on rank {bad_rank}" in said and "skipped; 1 so far" in said
    found, expected = _losses(tmp_path / "run"), _losses(left_out)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), [expected[step] for step in found], rtol=1e-5)
    weights = [weights_of(out / "checkpoints/last.ckpt") for out in (tmp_path / "run", left_out)]
    if number == 1:
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    else:
        assert moved_alike(*weights)
    assert read_metrics(tmp_path / "run/metrics.csv", "train/skipped_steps") == [(BAD, 1.0)]


def test_weights_that_overflow_are_not_saved(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    keys = ["optim.lr=1e30", "optim.warmup_steps=0"]
    statuses, said = ranks[1].ended("train", _written(phantom_shards, tmp_path / "run"), *keys)
    assert statuses == [NOT_FINITE], said
    for path in (tmp_path / "run/checkpoints").glob("*.ckpt"):
        check_finite(torch.load(path, weights_only=True), path)


def test_a_checkpoint_that_is_not_finite_is_refused_by_name() -> None:
    moments = {"state": {0: {"exp_avg": torch.tensor([0.0, float("inf")])}}}
    with pytest.raises(NonFiniteError, match=r"last.ckpt: not saved, because optimizer_states\.0\.state\.0\.exp_avg"):
        check_finite({"state_dict": {"w": torch.ones(2)}, "optimizer_states": [moments]}, Path("last.ckpt"))


def test_gradients_that_overflow_alone_are_told_apart() -> None:
    told = [(False, ["a", "b"]), (False, ["c"])]
    assert describe(told) == "the gradients are not finite, though every loss is (samples a, b, c)"
    assert describe([(True, ["a"]), (False, ["c"])]) == "the loss is not finite on rank 0 (samples a)"
