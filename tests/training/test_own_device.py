"""Which GPU a process of several takes, with faked ones, and whose memory is told."""

from __future__ import annotations

import pytest
import torch

from segvol_pl.device import own_device
from segvol_pl.errors import ConfigError
from segvol_pl.evaluation.cost import CostMeter
from segvol_pl.launched import LOCAL_RANKS, local_rank
from segvol_pl.training.callbacks import peak_memory


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What was made the current device, on a node of four GPUs, in a process that nobody numbered."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    for name in LOCAL_RANKS:
        monkeypatch.delenv(name, raising=False)
    return made


def test_a_process_knows_its_number_on_its_node() -> None:
    assert local_rank({"SLURM_LOCALID": "3"}) == 3 and local_rank({"LOCAL_RANK": "2", "SLURM_LOCALID": "0"}) == 2
    assert local_rank({}) == 0


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(("rank", "visible", "index"), [("0", 4, 0), ("3", 4, 3), ("5", 4, 1), ("3", 1, 0)])
def test_processes_of_a_node_spread_over_the_gpus_that_they_see(
    name: str, rank: str, visible: int, index: int, current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("SLURM_LOCALID", rank)
    assert own_device(name) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_a_gpu_that_is_named_is_taken_by_every_process(
    current: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert own_device("cpu") == torch.device("cpu") and len(current) == 1


def test_a_gpu_that_is_not_seen_is_refused_in_one_line(current: list[torch.device]) -> None:
    with pytest.raises(ConfigError, match=r"device: cuda:4 requested, but this process sees 4 CUDA devices"):
        own_device("cuda:4")
    assert current == []


def test_on_a_machine_with_gpus_the_memory_of_work_on_the_cpu_is_the_process_s(current: list[torch.device]) -> None:
    cpu = torch.device("cpu")
    with CostMeter(cpu) as meter:
        pass
    assert meter.memory_mb is not None and meter.memory_mb > 1 and peak_memory(cpu) > 0
