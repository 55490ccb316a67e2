"""Every strategy with real processes on the CPU: the same losses, and checkpoints that any of them goes on from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import _train_config

from segvol_pl.config import Strategy
from segvol_pl.configure import to_yaml
from segvol_pl.run.tracking import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, HALF = 20, 10
MULTIPLE = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
MATRIX = ["ddp", "fsdp", "zero2", "zero3"]
RELATIVE = 1e-5
FROZEN = "freeze=[image_encoder.*]"

Losses = dict[int, float]


def _train(folder: Path, name: str, strategy: str, devices: int, *more: str) -> Losses:
    """The losses of a run in `folder`/`name`."""
    keys = [f"run.out={folder / name}", f"run.strategy={strategy}", f"run.devices={devices}", *more]
    command = [sys.executable, "-m", "segvol_pl", "train", str(folder / "config.yaml"), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    return dict(read_metrics(folder / name / "metrics.csv", "train/loss"))


@pytest.fixture(scope="module")
def folder(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the configuration of all runs."""
    folder = tmp_path_factory.mktemp("strategies")
    config = _train_config(phantom_shards, folder / "run", steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, keep_every=HALF, val_every=0, val_batches=1)
    data = replace(config.data, samples_per_volume=5)
    (folder / "config.yaml").write_text(to_yaml(replace(config, run=run, data=data)))
    return folder


@pytest.fixture(scope="module")
def losses(folder: Path) -> dict[str, Losses]:
    """Strategy -> losses; of one process, and of two by every strategy."""
    return {"auto": _train(folder, "auto", "auto", 1)} | {name: _train(folder, name, name, 2) for name in MULTIPLE}


@pytest.fixture(scope="module")
def frozen(folder: Path) -> Losses:
    """Of one process that trains the prompts' side alone."""
    return _train(folder, "frozen", "auto", 1, FROZEN)


def test_all_strategies_are_tried() -> None:
    assert {"auto", *MULTIPLE} == {strategy.value for strategy in Strategy}


def test_every_strategy_gives_the_losses_of_one_process(losses: dict[str, Losses]) -> None:
    for name, found in losses.items():
        worst = max(abs(found[step] / losses["auto"][step] - 1) for step in range(1, STEPS + 1))
        assert worst < RELATIVE, name


def test_every_strategy_tells_the_norm_of_the_gradients(losses: dict[str, Losses], folder: Path) -> None:
    first, *others = (dict(read_metrics(folder / name / "metrics.csv", "train/grad_norm")) for name in losses)
    assert first
    for other in others:
        assert other == pytest.approx(first, rel=RELATIVE)


def test_every_strategy_writes_the_same_checkpoint(losses: dict[str, Losses], folder: Path) -> None:
    """By names, shapes and the optimizer's moments: small gradients' steps differ by Adam's rounding."""
    first, *others = (torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True) for name in losses)
    for other in others:
        assert other.keys() == first.keys() and other["state_dict"].keys() == first["state_dict"].keys()
        (ours,), (theirs,) = first["optimizer_states"], other["optimizer_states"]
        assert ours["param_groups"] == theirs["param_groups"]
        for key, state in ours["state"].items():
            assert state["step"] == theirs["state"][key]["step"] == STEPS
            torch.testing.assert_close(theirs["state"][key]["exp_avg_sq"], state["exp_avg_sq"], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("strategy", MATRIX)
def test_micro_batches_change_no_gradient(losses: dict[str, Losses], folder: Path, strategy: str) -> None:
    """Clipping sees the norm of the whole step's gradients under every strategy."""
    name = f"{strategy}-accumulate"
    _train(folder, name, strategy, 1, "run.accumulate=2", "optim.max_steps=4")
    found, whole = (dict(read_metrics(folder / of / "metrics.csv", "train/grad_norm")) for of in (name, "auto"))
    assert found and found == pytest.approx({step: whole[step] for step in found}, rel=1e-4)


@pytest.mark.parametrize("before", MATRIX)
@pytest.mark.parametrize("to", ["same", "other world", "other strategy"])
def test_a_run_goes_on_under_another_strategy_and_world(
    losses: dict[str, Losses], folder: Path, before: str, to: str
) -> None:
    """From the checkpoint of step 10, optimizer included: the losses are those of the unbroken run."""
    after = MATRIX[(MATRIX.index(before) + 1) % len(MATRIX)] if to == "other strategy" else before
    name = f"{before}-{to}".replace(" ", "-")
    (folder / name / "checkpoints").mkdir(parents=True)
    shutil.copy(folder / before / f"checkpoints/step-{HALF}.ckpt", folder / name / "checkpoints/last.ckpt")
    found = _train(folder, name, after, 1 if to == "other world" else 2)
    assert list(found) == list(range(HALF + 1, STEPS + 1))
    expected = [losses["auto"][step] for step in found]
    np.testing.assert_allclose(list(found.values()), expected, rtol=RELATIVE)


@pytest.mark.parametrize("strategy", MATRIX)
def test_frozen_parts_stay_under_every_strategy(
    losses: dict[str, Losses], frozen: Losses, folder: Path, strategy: str
) -> None:
    found = _train(folder, f"frozen-{strategy}", strategy, 2, FROZEN)
    np.testing.assert_allclose(list(found.values()), list(frozen.values()), rtol=RELATIVE)
    assert found[STEPS] != losses["auto"][STEPS]


@pytest.mark.parametrize(("strategy", "recompute"), [*((name, "blocks") for name in MATRIX), ("fsdp", "cheap")])
def test_activations_can_be_computed_again_under_every_strategy(
    losses: dict[str, Losses], folder: Path, strategy: str, recompute: str
) -> None:
    """Prompts in small groups besides, which FSDP and ZeRO-3 compute again."""
    keys = (f"run.recompute={recompute}", "run.prompts_at_once=3")
    found = _train(folder, f"{strategy}-{recompute}", strategy, 2, *keys)
    np.testing.assert_allclose(list(found.values()), list(losses["auto"].values()), rtol=RELATIVE)


def test_kept_checkpoints_are_bounded_and_the_best_is_there(losses: dict[str, Losses], folder: Path) -> None:
    names = {path.name for path in (folder / "auto/checkpoints").iterdir()}
    assert names == {"last.ckpt", "best.ckpt", f"step-{HALF}.ckpt"}
