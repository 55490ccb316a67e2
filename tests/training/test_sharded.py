"""Copies of sharded weights (HSDP): four ranks, of which two share each copy, train as one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config
from ranks import Ranks
from trained import RELATIVE, Losses, Trained, same_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, HALF = 6, 3
DEGREE = "run.shard_degree=2"


@pytest.fixture(scope="module")
def trained(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = Trained(tmp_path_factory.mktemp("sharded"), ranks)
    config = train_config(phantom_shards, trained / "run", steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, save_every=HALF, val_every=0, val_batches=1)
    trained.configure(replace(config, run=run, data=replace(config.data, global_batch=4)))
    return trained


@pytest.fixture(scope="module")
def alone(trained: Trained) -> Losses:
    """Of one process."""
    return trained("auto", "auto", 1)


@pytest.fixture(scope="module")
def hybrid(trained: Trained) -> Losses:
    """Of four ranks, of which two share each copy of the weights."""
    return trained("hsdp", "fsdp", 4, DEGREE)


def agree(found: Losses, alone: Losses, first: int = 1) -> None:
    assert list(found) == list(range(first, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), [alone[step] for step in found], rtol=RELATIVE)


def test_copies_of_sharded_weights_train_as_one_process(alone: Losses, hybrid: Losses, trained: Trained) -> None:
    agree(hybrid, alone)
    norms, whole = (trained.metric(of, "train/grad_norm") for of in ("hsdp", "auto"))
    assert norms and norms == pytest.approx(whole, rel=RELATIVE)
    same_state(*(torch.load(trained / of / "checkpoints/last.ckpt", weights_only=True) for of in ("auto", "hsdp")))


@pytest.mark.parametrize(("strategy", "devices", "degree"), [("fsdp", 4, 1), ("fsdp", 2, 0), ("auto", 1, 0)])
def test_they_go_on_in_another_layout(
    alone: Losses, hybrid: Losses, trained: Trained, strategy: str, devices: int, degree: int
) -> None:
    checkpoint, name = trained / f"hsdp/checkpoints/step-{HALF}.ckpt", f"hsdp-{strategy}-{devices}"
    agree(trained.after(checkpoint, name, strategy, devices, f"run.shard_degree={degree}"), alone, HALF + 1)


def test_they_go_on_from_one_process(alone: Losses, trained: Trained) -> None:
    agree(trained.after(trained / f"auto/checkpoints/step-{HALF}.ckpt", "on", "fsdp", 4, DEGREE), alone, HALF + 1)


def test_all_copies_skip_a_step_that_is_not_finite(trained: Trained) -> None:
    """The loss is NaN on one rank of four, in the second step."""
    patch = "\n".join(
        [
            "import math, os",
            "from segvol_pl.training.segment import SegVolTask",
            "losses, calls = SegVolTask.losses, [0]",
            "def poisoned(self, *arguments):",
            "    loss, parts = losses(self, *arguments)",
            "    calls[0] += self.training",
            "    bad = os.environ['LOCAL_RANK'] == '3' and calls[0] == 2",
            "    return (loss * math.nan if bad else loss), parts",
            "SegVolTask.losses = poisoned",
        ]
    )
    trained("nan", "fsdp", 4, DEGREE, "run.max_bad_steps=1", "optim.max_steps=3", patch=patch)
    assert trained.metric("nan", "train/skipped_steps") == {2: 1}
    (optimizer,) = torch.load(trained / "nan/checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert {float(state["step"]) for state in optimizer["state"].values()} == {2}
