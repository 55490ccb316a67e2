"""Waiting for data on a GPU: what the host waits while the GPU still computes does not count."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segvol_pl.training.callbacks import Load, Throughput

pytestmark = pytest.mark.gpu

STEPS, HOST = 4, 0.1
"""Steps, and seconds that the host waits for each batch."""


@pytest.mark.parametrize(("busy", "idle"), [(0.3, 0.0), (0.02, HOST - 0.02)])
def test_the_wait_for_data_is_the_idle_time_of_the_gpu(busy: float, idle: float) -> None:
    """busy: seconds that the GPU computes a step; idle: seconds a step for which it has nothing to do."""
    device = torch.device("cuda")
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, global_step=1)
    module: Any = SimpleNamespace(device=device)
    throughput = Throughput(1000, Load(volumes=1))
    cycles = int(busy * _cycles_a_second())
    throughput.on_train_start(trainer, module)
    for index in range(STEPS):
        time.sleep(HOST)
        throughput.on_train_batch_start(trainer, module, None, index)
        torch.cuda._sleep(cycles)
        throughput.on_train_batch_end(trainer, module, None, None, index)
    waits = throughput.arrivals.seconds()[::2]
    # The first step has no other before it, that the GPU could still compute.
    assert waits[1:] == pytest.approx([idle] * (STEPS - 1), abs=0.3 * HOST)


def _cycles_a_second() -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    began.record()
    torch.cuda._sleep(10**8)
    ended.record()
    ended.synchronize()
    return 1e11 / began.elapsed_time(ended)
