"""The demo takes the GPU where there is one, and learns on it what it learns on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from segvol_pl.config import DemoConfig
from segvol_pl.demo import run

STEPS = 5
BESIDE = 2e-3
"""By which losses of a few steps may differ between devices, relative: both compute in float32."""


@pytest.mark.gpu
def test_the_demo_runs_on_the_gpu_as_on_a_cpu(tmp_path: Path) -> None:
    losses = {}
    for device in ("cpu", "auto"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        out = tmp_path / device
        run(DemoConfig(out=str(out), volumes=6, pretrain_steps=STEPS, train_steps=STEPS, device=device))
        assert (torch.cuda.max_memory_allocated() > before) == (device == "auto")
        losses[device] = json.loads((out / "demo.json").read_text())["pretrain_val_loss_last"]
    assert losses["auto"] == pytest.approx(losses["cpu"], rel=BESIDE)
