"""Every strategy on one GPU, with NCCL where there are ranks: losses alike, the end saved, gone on from once.

Each run is a process of its own, and all of them share the device at once: their models are tiny.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config

from segvol_pl.config.loader import to_yaml
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.checkpoints import AtomicCheckpointIO

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

STEPS, HALF = 4, 2
RELATIVE = 1e-4
"""Of a loss in float32: attention's backward pass sums in another order each time, and Adam makes steps of rounding."""
DEEPSPEED = {"zero1", "zero2", "zero3", "zero2-offload"}
KEYS = {
    "auto": [],
    "ddp": ["run.strategy=ddp"],
    "fsdp": ["run.strategy=fsdp"],
    "fsdp-offload": ["run.strategy=fsdp", "run.offload=true"],
    "zero1": ["run.strategy=zero1"],
    "zero2": ["run.strategy=zero2"],
    "zero2-offload": ["run.strategy=zero2", "run.offload=true"],
    "zero3": ["run.strategy=zero3"],
    "fsdp-bf16": ["run.strategy=fsdp", "run.precision=bf16"],
    "ddp-bf16": ["run.strategy=ddp", "run.precision=bf16"],
    "same-1": ["run.deterministic=true"],
    "same-2": ["run.deterministic=true"],
    "same-bf16-1": ["run.deterministic=true", "run.precision=bf16"],
    "same-bf16-2": ["run.deterministic=true", "run.precision=bf16"],
    "same-ddp-1": ["run.strategy=ddp", "run.deterministic=true"],
    "same-ddp-2": ["run.strategy=ddp", "run.deterministic=true"],
}
"""Name of a run -> what it is given."""
STRATEGIES = ["ddp", "fsdp", "fsdp-offload", "zero1", "zero2", "zero2-offload", "zero3"]


class Runs:
    """Of one configuration, in one folder; those of one round at the same time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, str] = {}
        """Of the runs that failed: the end of what they said."""

    def round(self, names: Iterable[str], suffix: str = "") -> None:
        """Runs, each in the folder of its name and suffix."""
        began = {name: self._begin(KEYS[name], name + suffix) for name in names}
        for name, process in began.items():
            if process.wait(timeout=200):
                self.said[name + suffix] = self.log(name + suffix).read_text()[-3000:]

    def log(self, name: str) -> Path:
        """What a run said."""
        return self.folder / f"{name}.log"

    def _begin(self, keys: list[str], name: str) -> subprocess.Popen[bytes]:
        keys = [str(self.folder / "config.yaml"), f"run.out={self.folder / name}", *keys]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = [sys.executable, "-m", "segvol_pl", "train", *keys]
        with self.log(name).open("w") as log:
            return subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log)

    def losses(self, name: str) -> dict[int, float]:
        """By step. Fails where the run did."""
        assert name not in self.said, self.said[name]
        return dict(read_metrics(self.folder / name / "metrics.csv", "train/loss"))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Those that the run ended with."""
        path = self.folder / name / "checkpoints/last.ckpt"
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["global_step"] == STEPS
        state: dict[str, torch.Tensor] = saved["state_dict"]
        return state


@pytest.fixture(scope="module")
def runs(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every run, and once more each from its own checkpoint of the middle."""
    runs = Runs(tmp_path_factory.mktemp("gpu"))
    config = train_config(phantom_shards, runs.folder, steps=STEPS)
    run = replace(config.run, accelerator="cuda", checkpoint_every=HALF, save_every=HALF, val_every=0, val_batches=1)
    (runs.folder / "config.yaml").write_text(to_yaml(replace(config, run=run)))
    names = [name for name in KEYS if name not in DEEPSPEED or importlib.util.find_spec("deepspeed")]
    runs.round(names)
    again = [name for name in names if (runs.folder / name / f"checkpoints/step-{HALF}.ckpt").exists()]
    for name in again:
        (runs.folder / f"{name}-again/checkpoints").mkdir(parents=True)
        shutil.copy(
            runs.folder / name / f"checkpoints/step-{HALF}.ckpt", runs.folder / f"{name}-again/checkpoints/last.ckpt"
        )
    runs.round(again, "-again")
    return runs


def _here(name: str) -> None:
    if name in DEEPSPEED:
        pytest.importorskip("deepspeed")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_gives_the_losses_of_one_process(runs: Runs, name: str) -> None:
    _here(name)
    found, expected = runs.losses(name), runs.losses("auto")
    assert list(found) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=RELATIVE)


@pytest.mark.parametrize("name", ["auto", *STRATEGIES])
def test_every_strategy_saves_its_end_and_goes_on(runs: Runs, name: str) -> None:
    _here(name)
    whole, again = runs.losses(name), runs.losses(f"{name}-again")
    assert list(again) == list(range(HALF + 1, STEPS + 1))
    np.testing.assert_allclose(list(again.values()), [whole[step] for step in again], rtol=RELATIVE)
    assert runs.weights(name).keys() == runs.weights(f"{name}-again").keys() == runs.weights("auto").keys()


def test_fsdp_in_bf16_is_near_ddp(runs: Runs) -> None:
    """Norms and position embeddings are of 8 bits in the one and of 24 in the other."""
    found, expected = runs.losses("fsdp-bf16"), runs.losses("ddp-bf16")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-2)


@pytest.mark.parametrize("kind", ["same", "same-bf16", "same-ddp"])
def test_deterministic_runs_are_equal_to_the_bit(runs: Runs, kind: str) -> None:
    """Two of them, and one that goes on: losses, and every weight after the last step."""
    first, *others = (f"{kind}-1", f"{kind}-2", f"{kind}-1-again")
    for other in others:
        assert runs.losses(other).items() <= runs.losses(first).items()
        theirs = runs.weights(other)
        assert {name for name, weight in runs.weights(first).items() if not torch.equal(weight, theirs[name])} == set()


def test_ddp_brings_no_gradient_to_another_stream(runs: Runs) -> None:
    assert runs.losses("ddp") and "AccumulateGrad" not in runs.log("ddp").read_text()


def test_copies_of_a_gpu_are_whole_and_their_memory_is_used_again(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    state = {"weight": torch.arange(2.0**20, device="cuda"), "count": torch.tensor(3)}
    io.save_checkpoint({"state_dict": state}, tmp_path / "first.ckpt")
    places = [place.data_ptr() for place in io.copies.held]
    state["weight"] += 1
    io.save_checkpoint({"state_dict": state}, tmp_path / "second.ckpt")
    state["weight"] += 1
    io.wait()
    assert [place.data_ptr() for place in io.copies.held] == places and all(
        place.is_pinned() for place in io.copies.held
    )
    for number, name in enumerate(("first", "second")):
        written = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(written["weight"], torch.arange(2.0**20) + number) and written["count"] == 3
