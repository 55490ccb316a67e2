"""What differs between ranks, or is not there, is said before the first step."""

from __future__ import annotations

import json
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
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from factories import train_config
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.torch_version import TorchVersion

from segvol_pl.config import OptimConfig, Precision, PretrainConfig, RunConfig, Strategy, TrainConfig
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.errors import ConfigError, StartUpError
from segvol_pl.planning.plan import sample_bytes
from segvol_pl.training.deepspeed import ZeRO
from segvol_pl.training.ranks import host_group
from segvol_pl.training.startup import check_room, check_shared_memory, shared_bytes
from segvol_pl.training.strategies import FullyShard, environments, replicated, trainer_placement

COMPARING = """
import json, logging, os, socket, sys
from datetime import timedelta
import torch.distributed as dist
from segvol_pl.errors import StartUpError
from segvol_pl.training import startup
place, nodes, per_node, cases = sys.argv[1], 3, 2, json.loads(sys.argv[2])
for rank in range(nodes * per_node):
    if os.fork():
        continue
    socket.gethostname = lambda: f"n{rank // per_node + 1}"
    store = dist.FileStore(f"{place}/store", nodes * per_node)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=nodes * per_node, timeout=timedelta(seconds=60))
    logging.basicConfig(level=logging.INFO, format="%(message)s", filename=f"{place}/log-{rank}")
    found = []
    for case in cases:
        own, clocks = {"packages": "torch 2", "samples": "3"}, iter(case["clocks"].get(str(rank), [0.0, 0.0]))
        startup._milliseconds = lambda: int(1000 * (1.7e9 + next(clocks)))
        own |= case["differ"].get(str(rank), {})
        node = rank // per_node if rank % per_node == 0 else None
        try:
            found.append(startup.compare(own, node, nodes))
        except StartUpError as error:
            found.append(str(error))
        dist.barrier()
    with open(f"{place}/found-{rank}", "w") as file:
        json.dump(found, file)
    os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[Any], list[str]]]:
    """Name of a case -> what six ranks on three hosts found, rank by rank, and what each logged."""
    cases = {
        "alike": {"differ": {}, "clocks": {}},
        "two differ": {"differ": {"4": {"samples": "5"}, "3": {"packages": "torch 3", "samples": "9"}}, "clocks": {}},
        "all but rank 0": {"differ": {str(rank): {"samples": "4"} for rank in range(1, 6)}, "clocks": {}},
        "clocks": {"differ": {}, "clocks": {"5": [0.0, 90.0], "2": [0.0, -0.25]}},
        "late": {"differ": {}, "clocks": {"3": [44.0, 0.0]}},
    }
    folder = tmp_path_factory.mktemp("compared")
    subprocess.run([sys.executable, "-c", COMPARING, str(folder), json.dumps(list(cases.values()))], check=True)
    found = [json.loads((folder / f"found-{rank}").read_text()) for rank in range(6)]
    logs = [(folder / f"log-{rank}").read_text() for rank in range(6)]
    return lambda case: ([each[list(cases).index(case)] for each in found], logs)


def test_ranks_that_agree_may_start(compared: Callable[[str], tuple[list[Any], list[str]]]) -> None:
    """And every one of them knows the hosts of all nodes."""
    assert compared("alike")[0] == [["n1", "n2", "n3"]] * 6


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("two differ", "packages of rank 3 on n2 differs from rank 0 on n1 (torch 3; torch 2): "),
        ("all but rank 0", "samples of rank 1 on n1 differs from rank 0 on n1 (4; 3): "),
    ],
)
def test_the_lowest_rank_that_differs_is_named_on_every_rank(
    compared: Callable[[str], tuple[list[Any], list[str]]], case: str, line: str
) -> None:
    advice = "use the same environment, arguments and shards on all nodes"
    assert compared(case)[0] == [line + advice] * 6


def test_clocks_apart_and_a_late_rank_are_said_once(compared: Callable[[str], tuple[list[Any], list[str]]]) -> None:
    found, logs = compared("clocks")
    assert found == [["n1", "n2", "n3"]] * 6
    first = logs[0].splitlines()
    assert first[0] == "the clocks of n3 and n2 differ by 90 s"
    assert first[1] == "rank 3 on n2 was the last to start, 44 s after the first"
    assert len(first) == 2 and all("clocks" not in log for log in logs[1:])


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(out=str(tmp_path), save_every=0, keep_last=5)
    config = PretrainConfig(run=run)
    check_room(config, weights=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 3 checkpoints need 3.6"):
        check_room(config, weights=10**8)
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 8 checkpoints need 9.6"):
        check_room(replace(config, run=replace(run, save_every=10)), weights=10**8)
    averaged = replace(config, run=replace(run, keep_steps=[3, 5]), optim=OptimConfig(ema=0.9))
    with pytest.raises(StartUpError, match=r"has 1.0 GB free, 5 checkpoints need 8.0"):
        check_room(averaged, weights=10**8)


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


def test_the_limit_of_open_files_is_raised_to_what_connections_need() -> None:
    """A process may raise its own limit, up to the hard one; beyond that the run is refused."""
    before = """
import resource
from segvol_pl.errors import StartUpError
from segvol_pl.training.startup import check_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 3000))
check_open_files(ranks=64)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
check_open_files(ranks=2)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
try:
    check_open_files(ranks=2048)
except StartUpError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True)
    raised, kept, refused = done.stdout.splitlines()
    assert raised == kept == "(640, 3000)"
    assert refused.startswith("open files: this process may open 3000, a run of 2048 ranks needs 4608 ")


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
    # A trainer sets it for the whole process.
    monkeypatch.setattr(rank_zero_only, "rank", 0)
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
