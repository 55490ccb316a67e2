"""One trunk, many lengths: the schedule wsd, and runs that branch from another run's checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import train_config
from ranks import Ranks
from trained import Trained

from segvol_pl.config import DecayShape, OptimConfig, RunConfig, Schedule, TrainConfig
from segvol_pl.errors import CheckpointError, ConfigError
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.module import schedule
from segvol_pl.training.run import train

TRUNK, SHORT, BRANCHES_AT = 10, 5, 3


# ---- the schedule ----


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (DecayShape.sqrt, [0.5, 1, 1, 1, 1, 1, 1, 0.5, 0.29289, 0.13397, 0]),
        (DecayShape.linear, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (DecayShape.cosine, [0.5, 1, 1, 1, 1, 1, 1, 0.85355, 0.5, 0.14645, 0]),
    ],
)
def test_wsd_warms_up_stays_and_decays(shape: DecayShape, expected: list[float]) -> None:
    """Two steps of warm-up, and a decay over the last four of ten."""
    config = OptimConfig(warmup_steps=2, max_steps=10, schedule=Schedule.wsd, decay_share=0.4, decay_shape=shape)
    assert [schedule(step, config) for step in range(11)] == pytest.approx(expected, abs=1e-5)


def test_until_its_decay_a_length_has_the_rates_of_a_longer_one() -> None:
    short, long = (OptimConfig(warmup_steps=10, max_steps=steps, schedule=Schedule.wsd) for steps in (100, 800))
    assert (short.decay_start, long.decay_start) == (80, 640)
    assert [schedule(step, short) for step in range(81)] == [schedule(step, long) for step in range(81)]


def test_a_warm_up_that_reaches_into_the_decay_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^optim\.warmup_steps: 90 steps .* begins at step 80 of optim\.max_steps=100"
    ):
        OptimConfig(warmup_steps=90, max_steps=100, schedule=Schedule.wsd)
    OptimConfig(warmup_steps=90, max_steps=100)


# ---- branches ----


def _config(shards: Path, out: Path, steps: int, **run: Any) -> TrainConfig:
    config = train_config(shards, out, steps)
    optim = replace(
        config.optim, schedule=Schedule.wsd, decay_share=0.4, ema=0.9, weight_decay=0.1, weight_decay_all=False
    )
    return replace(config, optim=optim, run=replace(config.run, **run))


@pytest.fixture(scope="module")
def trunk(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    out = tmp_path_factory.mktemp("trunk") / "run"
    # One of the others' checkpoints is removed after the one that is kept.
    config = _config(phantom_shards, out, TRUNK, keep_steps=[BRANCHES_AT], save_every=4, keep_last=1)
    train(config)
    return config


def _branch(trunk: TrainConfig, out: Path, steps: int = SHORT) -> TrainConfig:
    kept = Path(trunk.run.out) / f"checkpoints/step-{BRANCHES_AT}.ckpt"
    run = replace(trunk.run, out=str(out), keep_steps=[], branch_from=str(kept))
    return replace(trunk, run=run, optim=replace(trunk.optim, max_steps=steps))


def _losses(config: TrainConfig, metric: str = "train/loss") -> dict[int, float]:
    return dict(read_metrics(Path(config.run.out) / "metrics.csv", metric))


def _state(out: str | Path) -> dict[str, Any]:
    checkpoint = torch.load(Path(out) / "checkpoints/last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def _same_bits(first: Any, other: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, other)
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(_same_bits(first[key], other[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(other) and all(map(_same_bits, first, other))
    return bool(first == other)


def test_a_branch_is_a_run_of_its_length(trunk: TrainConfig, phantom_shards: Path, tmp_path: Path) -> None:
    kept = {path.name for path in (Path(trunk.run.out) / "checkpoints").glob("step-*")}
    assert kept == {f"step-{BRANCHES_AT}.ckpt", "step-8.ckpt"}
    whole, branch = _config(phantom_shards, tmp_path / "whole", SHORT), _branch(trunk, tmp_path / "branch")
    train(whole)
    train(branch)
    assert list(_losses(branch)) == [4, 5]
    assert _losses(branch).items() <= _losses(whole).items()
    assert _losses(branch, "val/loss").items() <= _losses(whole, "val/loss").items()
    assert _same_bits(_state(branch.run.out), _state(whole.run.out))
    assert not _same_bits(_state(branch.run.out), _state(trunk.run.out))


def test_a_branch_that_was_stopped_goes_on_by_itself(trunk: TrainConfig, tmp_path: Path) -> None:
    branch = _branch(trunk, tmp_path / "branch", steps=9)
    train(branch)
    whole, losses = _state(branch.run.out), _losses(branch)
    folder = Path(branch.run.out) / "checkpoints"
    longer = replace(branch, run=replace(branch.run, out=str(tmp_path / "stopped"), save_every=6))
    train(longer)
    stopped = tmp_path / "stopped/checkpoints"
    shutil.copy(stopped / "step-6.ckpt", stopped / "last.ckpt")
    # The trunk is no longer needed, and not looked at.
    train(replace(longer, run=replace(longer.run, branch_from=str(tmp_path / "gone.ckpt"))))
    assert _same_bits(_state(tmp_path / "stopped"), whole)
    assert _losses(longer) == losses
    # Before its first checkpoint it begins again from the trunk; what it logged does not count as a lost run.
    for path in folder.glob("*.ckpt"):
        path.unlink()
    (folder.parent / "metrics.csv").write_text("step,metric,value\n8,train/loss,1.0\n")
    train(branch)
    assert _same_bits(_state(branch.run.out), whole)


def test_the_best_loss_of_a_branch_is_its_own(trunk: TrainConfig, tmp_path: Path) -> None:
    train(_branch(trunk, tmp_path / "branch"))
    best = torch.load(tmp_path / "branch/checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] == 4


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"optim": {"lr": 2e-3}}, r"optim\.lr 0\.001 -> 0\.002: only optim\.max_steps, .* and run\.\* may differ"),
        ({"optim": {"ema": 0.5}}, r"optim\.ema 0\.9 -> 0\.5: only"),
        ({"data": {"seed": 1}}, r"data\.seed 0 -> 1: only"),
        ({"optim": {"decay_share": 0.6}}, r"step 3, and the decay of this run begins at step 2 \(optim.*=0\.6\): take"),
    ],
)
def test_a_branch_differs_in_nothing_else(
    trunk: TrainConfig, tmp_path: Path, keys: dict[str, Any], expected: str
) -> None:
    branch = _branch(trunk, tmp_path / "branch")
    ((section, changed),) = keys.items()
    with pytest.raises(ConfigError, match=expected):
        train(replace(branch, **{section: replace(getattr(branch, section), **changed)}))
    assert not (tmp_path / "branch/checkpoints").exists()


def test_a_branch_needs_a_checkpoint_before_its_trunk_decays(trunk: TrainConfig, tmp_path: Path) -> None:
    branch = _branch(trunk, tmp_path / "branch", steps=40)
    later = replace(branch.run, branch_from=str(Path(trunk.run.out) / "checkpoints/step-8.ckpt"))
    with pytest.raises(ConfigError, match=r"step-8\.ckpt is of step 8, and the decay of its run begins at step 6"):
        train(replace(branch, run=later))
    missing = replace(branch.run, branch_from=str(Path(trunk.run.out) / "checkpoints/step-7.ckpt"))
    with pytest.raises(CheckpointError, match=r"run\.branch_from: .*step-7\.ckpt: no such checkpoint"):
        train(replace(branch, run=missing))


def test_what_cannot_be_kept_or_branched_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^run\.keep_steps: 10 is not below optim\.max_steps=10"):
        TrainConfig(optim=OptimConfig(max_steps=10), run=RunConfig(keep_steps=[3, 10]))
    with pytest.raises(ConfigError, match=r"^run\.branch_from: needs optim\.schedule=wsd, this is cosine"):
        TrainConfig(optim=OptimConfig(max_steps=10), run=RunConfig(branch_from="a.ckpt"))


def test_a_step_to_keep_is_kept_also_by_a_start_that_resumes_from_it(trunk: TrainConfig, tmp_path: Path) -> None:
    """A kill may come between last.ckpt of that step and the one to keep."""
    kept = Path(trunk.run.out) / f"checkpoints/step-{BRANCHES_AT}.ckpt"
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(kept, folder / "last.ckpt")
    train(replace(trunk, run=replace(trunk.run, out=str(tmp_path / "run"), save_every=0)))
    again, before = (torch.load(path, weights_only=True) for path in (folder / kept.name, kept))
    assert _same_bits(again["state_dict"], before["state_dict"])
    assert _same_bits(again["optimizer_states"], before["optimizer_states"])
    assert _same_bits(_state(tmp_path / "run"), _state(trunk.run.out))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_a_branch_of_two_ranks_is_a_run_of_its_length(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], strategy: str
) -> None:
    trained = Trained(tmp_path, ranks)
    trained.configure(_config(phantom_shards, tmp_path / "run", SHORT))
    whole = trained("whole", strategy, 2)
    trained("trunk", strategy, 2, f"optim.max_steps={TRUNK}", f"run.keep_steps=[{BRANCHES_AT}]")
    kept = tmp_path / f"trunk/checkpoints/step-{BRANCHES_AT}.ckpt"
    branch = trained("branch", strategy, 2, f"run.branch_from={kept}")
    assert list(branch) == [4, 5] and branch.items() <= whole.items()
    assert trained.metric("branch", "val/loss").items() <= trained.metric("whole", "val/loss").items()
    assert _same_bits(_state(tmp_path / "branch"), _state(tmp_path / "whole"))
