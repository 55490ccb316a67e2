"""What makes training fast and says how fast it is: compiled blocks, rates, profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import TINY, pretrain_config, train_config

from segvol_pl.config import PretrainConfig, Recompute
from segvol_pl.planning import flops
from segvol_pl.planning.devices import ACCELERATORS, accelerator
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.callbacks import Load, Throughput, peak_rate
from segvol_pl.training.run import pretrain, train

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_train_alike_and_are_not_compiled_again(phantom_shards: Path, tmp_path: Path) -> None:
    """After the first steps and the first validation in between, through a second one."""
    plain = train_config(phantom_shards, tmp_path / "plain", steps=10)
    compiled = replace(plain, run=replace(plain.run, compile=True, out=str(tmp_path / "compiled")))
    train(plain)
    counted: list[int] = []
    torch._dynamo.reset()
    counter = torch._dynamo.utils.counters["stats"]
    end = Throughput.on_train_batch_end

    def note(self: Throughput, *rest: object) -> None:
        counted.append(counter["unique_graphs"])
        end(self, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Throughput, "on_train_batch_end", note)
        train(compiled)
    assert 0 < counted[0] == counted[3] and counted[5:] == [counted[5]] * 5
    curves = [dict(read_metrics(tmp_path / name / "metrics.csv", "train/loss")) for name in ("plain", "compiled")]
    np.testing.assert_allclose(list(curves[1].values()), list(curves[0].values()), rtol=1e-5)


@pytest.mark.parametrize("recompute", [Recompute.cheap, Recompute.blocks])
def test_computing_again_does_not_change_a_run(phantom_shards: Path, tmp_path: Path, recompute: Recompute) -> None:
    plain = pretrain_config(phantom_shards, tmp_path / "plain", steps=3)
    again = replace(plain, run=replace(plain.run, recompute=recompute, out=str(tmp_path / "again")))
    pretrain(plain), pretrain(again)
    curves = [read_metrics(tmp_path / name / "metrics.csv", "train/loss") for name in ("plain", "again")]
    assert curves[0] == curves[1]


def test_rates_are_counted_and_what_is_not_known_is_left_out(phantom_shards: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "run", steps=4)
    train(replace(config, run=replace(config.run, peak_tflops=0.001, log_every=2)))
    metrics = tmp_path / "run" / "metrics.csv"
    rates = {name: dict(read_metrics(metrics, f"rate/{name}")) for name in ("volumes_per_s", "tflops", "mfu")}
    operations = flops.total(flops.train_work(config.model, config.prompts)).total
    for step in (2, 4):
        assert rates["tflops"][step] == pytest.approx(rates["volumes_per_s"][step] * operations / 1e12)
        assert rates["mfu"][step] == pytest.approx(rates["tflops"][step] / 0.001)
        assert (
            0
            < dict(read_metrics(metrics, "rate/step_p50_s"))[step]
            <= dict(read_metrics(metrics, "rate/step_p95_s"))[step]
        )
    pretrain(pretrain_config(phantom_shards, tmp_path / "pre", steps=1))
    names = {line.split(",")[1] for line in (tmp_path / "pre" / "metrics.csv").read_text().splitlines()}
    assert "rate/tflops" in names and not names & {"rate/mfu", "rate/pairs_per_s"}


def test_rates_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is that of the device that trains, whatever else the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    watch = Throughput(1, Load(volumes=8, pairs=4, operations=10**12, peak=1e13))
    rates = watch.rates([1.0, 1.0, 1.0, 2.0], elapsed=5.0, waited=1.0, ranks=2)
    assert rates["volumes_per_s"] == pytest.approx(6.4) and rates["pairs_per_s"] == pytest.approx(25.6)
    assert rates["data_wait"] == pytest.approx(0.2) and rates["step_p50_s"] == 1.0
    assert rates["tflops"] == pytest.approx(3.2) and rates["mfu"] == pytest.approx(0.32)
    assert rates["memory_gib"] > 0


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L40S", "l40s"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_accelerators_are_known_by_the_name_that_torch_gives(given: str, name: str | None) -> None:
    found = accelerator(given)
    assert (found and found.name) == name
    assert all(accelerator(one.name) == one for one in ACCELERATORS)


def test_a_cpu_has_no_peak_unless_it_is_stated() -> None:
    config = PretrainConfig(model=TINY)
    assert peak_rate(config.run, CPU) == 0
    assert peak_rate(replace(config.run, peak_tflops=0.2), CPU) == 2e11


def test_a_profile_is_a_chrome_trace(phantom_shards: Path, tmp_path: Path) -> None:
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=8)
    pretrain(replace(config, run=replace(config.run, profile=1)))
    trace = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert any(event["name"] == "aten::addmm" for event in trace["traceEvents"])
