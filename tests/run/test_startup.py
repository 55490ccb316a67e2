"""What differs between ranks, or is not there, is said before the first step."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from test_trainer import _train_config
from torch.torch_version import TorchVersion

from segvol_pl.config import ConfigError, RunConfig, Strategy
from segvol_pl.configure import to_yaml
from segvol_pl.run.startup import StartUpError, check_room, check_shared_memory, compare, compare_clocks
from segvol_pl.run.strategies import FullyShard, trainer_placement

SAME = {"configuration": "1", "packages": "torch 2", "samples": "3"}


def test_ranks_that_agree_may_start() -> None:
    compare([SAME, dict(SAME)], ["n1", "n2"])


@pytest.mark.parametrize("what", SAME)
def test_the_rank_that_differs_is_named(what: str) -> None:
    with pytest.raises(StartUpError, match=f"rank 2 on n2 has other {what} than rank 0 on n1"):
        compare([SAME, SAME, {**SAME, what: "other"}], ["n1", "n1", "n2"])


def test_clocks_apart_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare_clocks([0.0, 30.0], ["n1", "n2"])
        assert not caplog.messages
        compare_clocks([0.0, 90.0], ["n1", "n2"])
    assert caplog.messages == ["the clocks of n2 and n1 are 90 s apart"]


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(out=str(tmp_path), keep_every=0, keep=5)
    check_room(run, weights=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 3 checkpoints need 3.6"):
        check_room(run, weights=10**8)
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 8 checkpoints need 9.6"):
        check_room(replace(run, keep_every=10), weights=10**8)


def test_a_container_with_little_shared_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26))
    check_shared_memory(workers=0, place=tmp_path)
    with pytest.raises(StartUpError, match="has 64 MiB, too little for loader processes"):
        check_shared_memory(workers=2, place=tmp_path)


def test_ranks_started_with_other_arguments_end_in_seconds(phantom_shards: Path, tmp_path: Path) -> None:
    """Two real processes, as on two nodes: one has another seed."""
    config = _train_config(phantom_shards, tmp_path / "run")
    run = replace(config.run, devices=1, nodes=2, strategy=Strategy.ddp)
    (tmp_path / "run.yaml").write_text(to_yaml(replace(config, run=run)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "run.yaml"), f"data.seed={seed}"],
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": node, "LOCAL_RANK": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, seed in (("0", 1), ("1", 2))
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 1
        assert f"error: rank 1 on {socket.gethostname()} has other configuration than rank 0" in errors


def test_fsdp_is_refused_where_torch_would_sum_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(out="out", strategy=Strategy.fsdp, devices=2, accelerator="cpu")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cu128"))
    with pytest.raises(ConfigError, match=r"run\.strategy: fsdp needs torch 2\.9"):
        trainer_placement(run)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.0"))
    assert isinstance(trainer_placement(run)["strategy"], FullyShard)


def test_fsdp_leaves_offloaded_weights_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not split is brought to the device; torch refuses to compute with shares that were."""
    strategy = FullyShard(RunConfig(out="out", strategy=Strategy.fsdp, offload=True), "gloo", timedelta(seconds=60))
    strategy.parallel_devices = [torch.device("meta")]
    module = pl.LightningModule()
    module.norm = torch.nn.BatchNorm1d(2)
    monkeypatch.setattr(strategy, "_lightning_module", module)
    monkeypatch.setattr(strategy, "model", module)
    strategy.model_to_device()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
    assert module.device == torch.device("meta"), "where batches and metrics go"


@pytest.mark.parametrize(
    ("offload", "accelerator", "backend"),
    [(True, "cuda", "cuda:nccl,cpu:gloo"), (False, "cuda", "nccl"), (True, "cpu", "gloo")],
)
def test_gradients_in_main_memory_can_be_summed_there(
    monkeypatch: pytest.MonkeyPatch, offload: bool, accelerator: str, backend: str
) -> None:
    """NCCL alone cannot: clipping raises."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: accelerator == "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    run = RunConfig(out="out", strategy=Strategy.fsdp, offload=offload, accelerator=accelerator)
    assert trainer_placement(run)["strategy"].process_group_backend == backend
