"""What many ranks share: copies of sharded weights (HSDP), and checkpoints that they write together.

All by real ranks: they train as one process, and go on from each other's checkpoints.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config
from ranks import Ranks
from trained import RELATIVE, Losses, Trained, same_averages, same_state

from segvol_pl.model.checkpoint import read_header
from segvol_pl.model.sharded import HEADER, open_sharded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, HALF = 6, 3
DEGREE = "run.shard_degree=2"
SHARDED = "run.checkpoint_format=sharded"


@pytest.fixture(scope="module")
def trained(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    trained = Trained(tmp_path_factory.mktemp("sharded"), ranks)
    config = train_config(phantom_shards, trained / "run", steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, save_every=HALF, val_every=0, val_batches=1)
    optim = replace(config.optim, ema=0.8, weight_decay_all=False)
    trained.configure(replace(config, run=run, data=replace(config.data, global_batch=4), optim=optim))
    return trained


@pytest.fixture(scope="module")
def alone(trained: Trained) -> Losses:
    """Of one process."""
    return trained("auto", "auto", 1)


@pytest.fixture(scope="module")
def hybrid(trained: Trained) -> Losses:
    """Of four ranks, of which two share each copy of the weights."""
    return trained("hsdp", "fsdp", 4, DEGREE)


@pytest.fixture(scope="module")
def together(trained: Trained) -> dict[str, Losses]:
    """Runs whose ranks write checkpoints together: by strategy, number of ranks and degree."""
    return {
        "fsdp-4": trained("fsdp-4", "fsdp", 4, SHARDED, DEGREE),
        "fsdp-2": trained("fsdp-2", "fsdp", 2, SHARDED),
        "ddp-2": trained("ddp-2", "ddp", 2, SHARDED),
        "zero2-2": trained("zero2-2", "zero2", 2, SHARDED),
        "auto-1": trained("auto-1", "auto", 1, SHARDED),
    }


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


def test_a_checkpoint_of_all_ranks_is_the_one_of_one_process(
    alone: Losses, together: dict[str, Losses], trained: Trained
) -> None:
    """Complete again, it has the same names, places, values besides tensors, and moments."""
    whole = torch.load(trained / "auto/checkpoints/last.ckpt", weights_only=True)
    for name, losses in together.items():
        agree(losses, alone)
        folder = trained / name / "checkpoints"
        assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt", f"step-{HALF}.ckpt"}
        ranks = int(name[-1])
        parts = [path.name for path in (folder / "last.ckpt").iterdir()]
        assert sorted(parts) == [*(f"__{rank}_0.distcp" for rank in range(ranks)), HEADER]
        found = open_sharded(folder / "last.ckpt")
        sizes = [part.bytes for part in found.parts.values()]
        assert max(sizes) < 1.3 * min(sizes), "all ranks write as much"
        same_state(whole, found.complete())
        assert found.header["loops"]["fit_loop"] == whole["loops"]["fit_loop"]
        assert found.header["lr_schedulers"] == whole["lr_schedulers"]


@pytest.mark.parametrize(
    ("before", "strategy", "devices", "keys"),
    [
        ("fsdp-4", "fsdp", 4, [SHARDED, DEGREE]),
        ("fsdp-4", "fsdp", 2, []),
        ("fsdp-4", "auto", 1, []),
        ("fsdp-2", "fsdp", 4, [SHARDED]),
        ("fsdp-2", "zero3", 2, []),
        ("ddp-2", "fsdp", 2, [SHARDED]),
        ("zero2-2", "ddp", 2, [SHARDED]),
        ("auto-1", "zero2", 2, [SHARDED]),
        ("auto", "fsdp", 2, [SHARDED]),
    ],
)
def test_every_strategy_goes_on_from_it(
    alone: Losses,
    together: dict[str, Losses],
    trained: Trained,
    before: str,
    strategy: str,
    devices: int,
    keys: list[str],
) -> None:
    checkpoint, name = trained / before / f"checkpoints/step-{HALF}.ckpt", f"{before}-to-{strategy}-{devices}"
    agree(trained.after(checkpoint, name, strategy, devices, *keys), alone, HALF + 1)
    last = trained / name / "checkpoints/last.ckpt"
    assert last.is_dir() is (SHARDED in keys)
    assert read_header(last)["global_step"] == STEPS
    same_averages(trained / "auto/checkpoints/last.ckpt", last)


def test_ranks_killed_while_they_write_go_on_from_the_checkpoint_before(alone: Losses, trained: Trained) -> None:
    """One rank has written its part of the second checkpoint, the other has not."""
    patch = "\n".join(
        [
            "import os, signal, time",
            "from segvol_pl.training.sharded import PartWriter",
            "write, calls = PartWriter.write_data, [0]",
            "def dying(self, *arguments):",
            "    calls[0] += 1",
            "    if calls[0] == 2 and os.environ['LOCAL_RANK'] == '1':",
            "        os.kill(os.getpid(), signal.SIGKILL)",
            "    return write(self, *arguments)",
            "PartWriter.write_data = dying",
        ]
    )
    keys = [f"run.out={trained / 'killed'}", "run.strategy=fsdp", "run.save_every=0", SHARDED]
    statuses, _ = trained.ranks[2].ended("train", str(trained / "config.yaml"), *keys, patch=patch)
    assert all(statuses)
    folder = trained / "killed/checkpoints"
    assert read_header(folder / "last.ckpt")["global_step"] == HALF
    trained("killed", "fsdp", 2, "run.save_every=0", SHARDED)
    agree(trained.metric("killed", "train/loss"), alone)
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "best.ckpt"}, "what was half written is gone"


def test_an_error_of_one_rank_ends_all_and_is_reported_once(trained: Trained) -> None:
    """Its disk is full. The checkpoint before stays."""
    patch = "\n".join(
        [
            "import errno, os",
            "from segvol_pl.training.sharded import PartWriter",
            "write, calls = PartWriter.write_data, [0]",
            "def full(self, *arguments):",
            "    calls[0] += 1",
            "    if calls[0] == 2 and os.environ['LOCAL_RANK'] == '1':",
            "        raise OSError(errno.ENOSPC, 'No space left on device')",
            "    return write(self, *arguments)",
            "PartWriter.write_data = full",
        ]
    )
    keys = [f"run.out={trained / 'full'}", "run.strategy=ddp", "run.save_every=0", SHARDED]
    statuses, said = trained.ranks[2].ended("train", str(trained / "config.yaml"), *keys, patch=patch)
    assert statuses == [1, 1]
    assert "\n".join(said).count("best.ckpt: no space left on the disk") == 1
    assert read_header(trained / "full/checkpoints/last.ckpt")["global_step"] == HALF
    assert not list(trained.folder.glob("full/checkpoints/.*"))
