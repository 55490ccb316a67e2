"""Runs in bf16 autocast, forced, so that every CPU tries what GPUs and CPUs with AMX take by themselves.

Sums of bf16 products depend on the hardware and on how a batch is split: tolerances are those of bf16, not of float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import train_config
from ranks import Ranks

from segvol_pl import device as device_module
from segvol_pl.config import Precision, TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.device import uses_bf16
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import train

STEPS = 4
RELATIVE = 1e-2
"""Of a loss: bf16 keeps 8 bits, so a product is off by 0.4 %."""


def _config(shards: Path, out: Path, precision: Precision = Precision.bf16) -> TrainConfig:
    config = train_config(shards, out, steps=STEPS)
    assert config.optim.clip_norm > 0
    return replace(config, run=replace(config.run, precision=precision))


def _losses(out: Path) -> list[float]:
    losses = [loss for _, loss in read_metrics(out / "metrics.csv", "train/loss")]
    assert len(losses) == STEPS
    return losses


@pytest.fixture(scope="module")
def alone(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    config = _config(phantom_shards, tmp_path_factory.mktemp("alone"))
    train(config)
    return _losses(Path(config.run.out))


@pytest.mark.parametrize("amx", [True, False])
def test_auto_is_bf16_on_cpus_with_amx_alone(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(device_module, "has_amx", lambda: amx)
    cpu = torch.device("cpu")
    assert uses_bf16(cpu, Precision.auto) is amx
    assert uses_bf16(cpu, Precision.bf16) and not uses_bf16(cpu, Precision.fp32)


def test_bf16_trains_with_clipped_gradients(phantom_shards: Path, tmp_path: Path, alone: list[float]) -> None:
    """Lightning refuses to clip for a fused optimizer under autocast; GPUs take bf16 by themselves."""
    config = _config(phantom_shards, tmp_path, Precision.fp32)
    train(config)
    float32 = _losses(tmp_path)
    assert float32 != alone
    np.testing.assert_allclose(alone, float32, rtol=RELATIVE)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero2", "zero3"))]
)
def test_two_ranks_train_like_one_in_bf16(
    phantom_shards: Path, tmp_path: Path, alone: list[float], strategy: str, ranks: dict[int, Ranks]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(_config(phantom_shards, tmp_path / "run")))
    ranks[2]("train", str(tmp_path / "config.yaml"), f"run.strategy={strategy}")
    np.testing.assert_allclose(_losses(tmp_path / "run"), alone, rtol=RELATIVE)
