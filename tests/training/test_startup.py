"""What differs between ranks, or is not there, is said before the first step."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from factories import train_config
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.torch_version import TorchVersion

from segvol_pl.config import Precision, RunConfig, Strategy, TrainConfig
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.errors import ConfigError, StartUpError
from segvol_pl.planning.plan import sample_bytes
from segvol_pl.training.deepspeed import ZeRO
from segvol_pl.training.ranks import host_group
from segvol_pl.training.startup import check_room, check_shared_memory, compare, compare_clocks, shared_bytes
from segvol_pl.training.strategies import FullyShard, environments, replicated, trainer_placement

SAME = {"configuration": "1", "packages": "torch 2", "samples": "3"}


def test_ranks_that_agree_may_start() -> None:
    compare([SAME, dict(SAME)], ["n1", "n2"])


@pytest.mark.parametrize("what", SAME)
def test_the_rank_that_differs_is_named(what: str) -> None:
    with pytest.raises(StartUpError, match=f"{what} of rank 2 on n2 differs from rank 0 on n1"):
        compare([SAME, SAME, {**SAME, what: "other"}], ["n1", "n1", "n2"])


def test_clocks_apart_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compare_clocks([0.0, 30.0], ["n1", "n2"])
        assert not caplog.messages
        compare_clocks([0.0, 90.0], ["n1", "n2"])
    assert caplog.messages == ["the clocks of n2 and n1 differ by 90 s"]


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(out=str(tmp_path), save_every=0, keep_last=5)
    check_room(run, weights=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 3 checkpoints need 3.6"):
        check_room(run, weights=10**8)
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 8 checkpoints need 9.6"):
        check_room(replace(run, save_every=10), weights=10**8)


def test_shared_memory_must_hold_the_batches_of_a_nodes_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of eight ranks needs GiB, where one of small volumes needs next to nothing."""
    config = load("train", ["configs/train.yaml", "data.shards=x", "run.out=y", "run.devices=8", "run.nodes=2"])
    assert isinstance(config, TrainConfig)
    needed = 8 * (8 + 1) * 2 * (32 // 16) * sample_bytes(config)
    assert shared_bytes(config) == needed > 2**30

    def usage(free: int) -> Callable[[Path], SimpleNamespace]:
        return lambda path: SimpleNamespace(total=2**40, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage(needed))
    check_shared_memory(config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", usage(2**30))
    told = rf"has 1\.00 GiB free, the loader processes of 8 ranks need {needed / 2**30:.2f}: .* --shm-size=\d+g"
    with pytest.raises(StartUpError, match=told):
        check_shared_memory(config, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", usage(0))
    check_shared_memory(replace(config, data=replace(config.data, workers=0)), tmp_path)


def test_ranks_started_with_other_arguments_end_in_seconds(phantom_shards: Path, tmp_path: Path) -> None:
    """Two real processes, as on two nodes: one has another seed."""
    config = train_config(phantom_shards, tmp_path / "run")
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
        assert f"error: configuration of rank 1 on {socket.gethostname()} differs from rank 0" in errors


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


def test_ranks_that_have_gloo_need_no_second_group(tmp_path: Path) -> None:
    """Another one costs each rank a connection to every other."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert host_group() is torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


TASK = {
    "SLURM_JOB_NAME": "train",
    "SLURM_JOB_ID": "7",
    "SLURM_NODELIST": "n1",
    "SLURM_NTASKS": "16",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "3",
    "SLURM_PROCID": "11",
}
"""What SLURM tells the fourth of eight tasks of the second node."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has torch see so many devices; nothing is computed on them."""

    def see(seen: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)

    for name in ("LOCAL_RANK", "NODE_RANK", *TASK):
        monkeypatch.delenv(name, raising=False)
    return see


@pytest.mark.parametrize(("seen", "device"), [(1, "cuda:0"), (8, "cuda:3")])
@pytest.mark.parametrize("strategy", [Strategy.ddp, Strategy.fsdp, Strategy.zero3])
def test_a_task_takes_its_own_gpu_whether_it_sees_all_or_that_alone(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, strategy: Strategy, seen: int, device: str
) -> None:
    """As under --gpus-per-node=8 and under --gpus-per-task=1."""
    if strategy is Strategy.zero3:
        pytest.importorskip("deepspeed")
    gpus(seen)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    run = RunConfig(out="out", strategy=strategy, devices=8, nodes=2, accelerator="cuda", precision=Precision.fp32)
    trainer = pl.Trainer(**trainer_placement(run), plugins=environments(), logger=False, enable_checkpointing=False)
    assert str(trainer.strategy.root_device) == device
    assert (trainer.world_size, trainer.global_rank) == (16, 11)
    if isinstance(trainer.strategy, ZeRO):
        monkeypatch.setenv("LOCAL_RANK", "3")
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "1")
        trainer.strategy._set_node_environment_variables()
        assert os.environ["LOCAL_RANK"] == device[-1], "DeepSpeed computes on the device of this number"


@pytest.mark.parametrize(("seen", "task"), [(4, True), (1, False), (4, False)])
def test_too_few_gpus_are_told(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, seen: int, task: bool
) -> None:
    """One visible GPU is one for each rank only where a launcher has started the ranks."""
    gpus(seen)
    if task:
        monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match=rf"run\.devices: 8 requested, but this process sees {seen} GPU"):
        trainer_placement(RunConfig(out="out", strategy=Strategy.ddp, devices=8, accelerator="cuda"))


def _places(model: torch.nn.Module) -> list[int]:
    """Where each gradient lies behind the first."""
    places = [weight.grad.data_ptr() for weight in model.parameters() if weight.grad is not None]
    return [place - min(places) for place in places]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_gradients_lie_where_they_lay_at_the_first_step(deterministic: bool) -> None:
    """A sum's last digits depend on that. A run that goes on has its first step where another has a later one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        run = RunConfig(strategy=Strategy.ddp, deterministic=deterministic)
        strategy = replicated(run, "gloo", timedelta(seconds=60))
        # The gradients do not come in the order in which the weights stand.
        parts = torch.nn.ModuleList([torch.nn.Linear(5, 3), torch.nn.Linear(3, 7), torch.nn.Linear(7, 5)])
        parts.forward = lambda x: parts[0](parts[2](parts[1](x)))  # type: ignore[method-assign]
        strategy.parallel_devices = [torch.device("cpu")]
        strategy.cluster_environment = LightningEnvironment()
        model = strategy._setup_model(parts)
        places = []
        for _ in range(3):
            model.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            places.append(_places(model))
    finally:
        torch.distributed.destroy_process_group()
    assert (places[0] == places[2]) is deterministic
