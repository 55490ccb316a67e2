"""The planner: its promise on the command line, and what its figures must obey."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from segvol_pl.config import PretrainConfig, Strategy, TrainConfig
from segvol_pl.errors import ConfigError
from segvol_pl.planning import flops, memory
from segvol_pl.planning.devices import ACCELERATORS
from segvol_pl.planning.node_cache import NodeCache
from segvol_pl.planning.plan import REACHED, RECORDED, Plan, lines, plan, strategies

ROOT = Path(__file__).parents[2]
TRAIN, PRETRAIN = str(ROOT / "configs" / "train.yaml"), str(ROOT / "configs" / "pretrain.yaml")
PLACE = ["nodes=4", "gpus=8", "device=h100"]


def test_the_promised_command_states_all_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "segvol_pl", "plan", TRAIN, *PLACE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for stated in ("parameters: 113.682 M", "TFLOP", "weights", "gradients", "optimizer", "activations", "volumes/s"):
        assert stated in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in ("ddp", "fsdp", "zero1", "zero2", "zero3"))
    assert not {"torch", "lightning", "numpy"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


def test_place_and_kind_of_run_are_read() -> None:
    made = plan([TRAIN, *PLACE])
    assert isinstance(made.config, TrainConfig) and (made.ranks, made.micro_batch) == (32, 1)
    assert isinstance(plan([PRETRAIN]).config, PretrainConfig)
    assert strategies(plan([TRAIN]).config.run) == [Strategy.auto]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TRAIN, "nodes=3"], r"data\.global_batch: 32 cannot be shared by 3 devices"),
        ([TRAIN, "device=abacus"], "device: 'abacus' is none of h100"),
        ([TRAIN, "optim.lrr=1"], r"unknown key optim\.lrr .*did you mean optim\.lr"),
        ([TRAIN, "gpus=two"], r"run\.devices"),
        ([TRAIN, "volumes=10"], "volumes: give volumes=N and corpus_gb=GB together"),
        ([TRAIN, "volumes=many", "corpus_gb=1"], "volumes: 'many' is not a number of at least 1"),
        ([TRAIN, "volumes=10", "corpus_gb=0"], "corpus_gb: '0' is not a number"),
        ([TRAIN, *PLACE, "data.locality=3"], r"data\.locality .*: 3 shares are not possible: data\.global_batch=32"),
    ],
)
def test_misuse_names_the_key(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(arguments)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("file", [TRAIN, PRETRAIN])
def test_the_largest_micro_batch_is_the_last_that_fits(file: str, strategy: str) -> None:
    made = plan([file, *PLACE, "device=a30"])
    most, room = made.largest(Strategy(strategy)), (24 - 2) * 2**30
    assert most > 0
    assert made.peak(Strategy(strategy), most).total <= room < made.peak(Strategy(strategy), most + 1).total
    huge = plan([file, *PLACE, "device=l4", f"model={ROOT / 'configs' / 'model' / 'huge.yaml'}"])
    assert huge.largest(Strategy.fsdp) > huge.largest(Strategy.ddp)


def test_memory_falls_with_what_is_split_and_computed_again() -> None:
    made = plan([TRAIN, *PLACE])

    def fixed(strategy: str) -> float:
        peak = made.peak(Strategy(strategy), 1)
        return peak.weights + peak.gradients + peak.optimizer

    assert fixed("fsdp") < fixed("zero2") < fixed("zero1") < fixed("ddp")
    kept = [
        plan([TRAIN, *PLACE, f"run.recompute={name}"]).peak(Strategy.ddp, 4) for name in ("none", "cheap", "blocks")
    ]
    assert all(after.activations < before.activations for before, after in pairwise(kept))
    groups = [plan([TRAIN, *PLACE, f"run.prompts_at_once={size}"]).peak(Strategy.ddp, 4).total for size in (30, 6, 1)]
    assert groups == sorted(groups, reverse=True)


def test_copies_of_sharded_weights_take_the_share_of_their_ranks() -> None:
    one = plan([TRAIN, "gpus=8", "run.strategy=fsdp"])
    split = plan([TRAIN, *PLACE, "run.strategy=fsdp"])
    copies = plan([TRAIN, *PLACE, "run.strategy=fsdp", "run.shard_degree=8"])
    assert copies.peak(Strategy.fsdp, 1) == one.peak(Strategy.fsdp, 1)
    assert copies.peak(Strategy.fsdp, 1).optimizer == pytest.approx(4 * split.peak(Strategy.fsdp, 1).optimizer)
    assert copies.peak(Strategy.zero2, 1) == split.peak(Strategy.zero2, 1), "the other strategies know no copies"
    assert "fsdp shards over 8 ranks, 4 copies" in "\n".join(lines(copies))


@pytest.mark.parametrize("gib", [6, 10, 22, 78])
@pytest.mark.parametrize("volumes", [1, 4, 16])
def test_as_many_prompts_are_decoded_together_as_memory_holds(volumes: int, gib: int) -> None:
    config = plan([TRAIN]).config
    assert isinstance(config, TrainConfig)
    room = gib * 2.0**30
    sizes = memory.prompt_groups(config, 30, volumes, True, room)
    assert sum(sizes) == 30 and max(sizes) - min(sizes) <= 1
    taken = memory.moments(config, volumes, True, max(sizes), True)[0].total
    assert taken <= memory.MARGIN * room or max(sizes) == 1
    # One group less would not do.
    fewer = math.ceil(30 / max(1, len(sizes) - 1))
    assert len(sizes) == 1 or memory.moments(config, volumes, True, fewer, True)[0].total > memory.MARGIN * room


def test_a_stated_number_of_prompts_is_kept_and_a_cpu_takes_six() -> None:
    stated, free = plan([TRAIN, "run.prompts_at_once=8"]).config, plan([TRAIN]).config
    assert isinstance(stated, TrainConfig) and isinstance(free, TrainConfig)
    for room in (None, 2.0**30, 2.0**37):
        assert memory.prompt_groups(stated, 30, 4, True, room) == [8, 8, 8, 6]
    assert memory.prompt_groups(free, 32, 4, False, None) == [6, 6, 6, 6, 6, 2]


def test_the_plan_says_how_many_prompts_are_decoded_together() -> None:
    large = plan([TRAIN, "gpus=8", "device=l4", "data.global_batch=64"])
    assert large.groups() == [15, 15] and any(
        "at once: 15 of 30 (run.prompts_at_once=0)" in line for line in lines(large)
    )
    assert large.peak(Strategy.ddp, 8).total < large.room
    assert plan([PRETRAIN]).groups() == []


def test_rates_are_the_peaks_share_over_the_operations() -> None:
    made = plan([PRETRAIN, "gpus=2", "device=a100"])
    operations = flops.total(flops.pretrain_work(made.config.model, 0.6)).total
    low, high = REACHED["pretrain"]
    assert made.rates() == pytest.approx((2 * low * 312e12 / operations, 2 * high * 312e12 / operations))
    assert any(f"{made.rates()[0]:.1f} to {made.rates()[1]:.1f}" in line for line in lines(made))
    # A single process records its step.
    alone = plan([PRETRAIN, "gpus=1", "device=a100"])
    assert alone.rates() == pytest.approx((low * 312e12 / operations, RECORDED["pretrain"] * 312e12 / operations))
    # A strategy of ranks does not, even with one rank.
    rank = plan([PRETRAIN, "gpus=1", "device=a100", "run.strategy=ddp"])
    assert rank.rates() == pytest.approx((low * 312e12 / operations, high * 312e12 / operations))


@pytest.mark.parametrize("device", [one.name for one in ACCELERATORS])
def test_fp32_takes_longer_than_bf16(device: str) -> None:
    """And is stated so; `auto` is bf16 on every device."""
    auto, bf16, fp32 = (plan([TRAIN, f"device={device}", f"run.precision={name}"]) for name in ("auto", "bf16", "fp32"))
    assert auto.rates() == bf16.rates() and "bf16 (auto takes it on this device)" in next(lines(auto))
    assert all(slow < 0.5 * fast for slow, fast in zip(fp32.rates(), bf16.rates(), strict=True))
    assert any(f"{fp32.device.fp32_tflops:.0f} TFLOP/s in fp32" in line for line in lines(fp32))
    assert not any("bf16" in line for line in lines(fp32))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_planned_memory_is_what_a_process_takes() -> None:
    """Within 15 %, for both kinds of run."""
    for row in ("train mini", "pretrain mini"):
        command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--row", row, "fp32"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        measured, planned = json.loads(done.stdout)
        assert planned == pytest.approx(measured, rel=0.15), row


def test_a_fault_in_a_pretraining_file_is_named_not_the_keys_that_training_lacks() -> None:
    with pytest.raises(ConfigError, match=r"data\.locality .*64 shares are not possible"):
        plan(["configs/pretrain.yaml", "data.locality=64", "data.global_batch=96"])


def test_a_plan_needs_bf16_only_where_the_run_has_it() -> None:
    assert isinstance(plan([TRAIN]), Plan) and plan([TRAIN]).bf16 and not plan([TRAIN, "run.precision=fp32"]).bf16


# ---- what nodes read ----

CLUSTER = ["nodes=16", "gpus=2", "device=h100", "volumes=100000", "corpus_gb=1600", "data.samples_per_volume=2"]


def test_the_plan_says_what_nodes_read_and_open() -> None:
    made = plan([PRETRAIN, *CLUSTER, "data.cache=/local", "data.cache_gb=400", "data.locality=16"])
    rate, printed = made.rates()[1], "\n".join(lines(made))
    assert f"a node                {rate / 16 * 16e-3:.2f} GB/s" in printed
    assert "from its cache        100 % in epochs 2 to 4" in printed
    assert f"opens of shards       {rate * (1 - 256 / 3125):.0f} /s" in printed
    without = "\n".join(lines(plan([PRETRAIN, *CLUSTER])))
    assert "nothing (data.cache is not set)" in without
    assert f"from the store        {rate * 1e-3:.2f} GB/s a node, {rate * 16e-3:.2f} GB/s together" in without
    assert "opens of shards" not in "\n".join(lines(plan([PRETRAIN])))


def test_a_cache_holds_a_share_for_its_period() -> None:
    hits = NodeCache(nodes=16, cached=1 / 8, locality=16, locality_epochs=4).hits(12)
    assert hits[0] == 0 and all(hits[epoch] == (epoch % 4 > 0) for epoch in (1, 2, 3, 5, 6, 7, 9, 10, 11))
    # Two shares each, or a share for two nodes: as much of the corpus is read by a node, or twice as much.
    assert NodeCache(8, 1 / 4, 16, 4).hits(4) == [0, 1, 1, 1]
    shared = NodeCache(16, 1 / 4, 8, 4).hits(4)
    assert 0 == shared[0] < shared[1] < shared[2] < shared[3] < 1
    # Both draws of a volume are on one node.
    assert NodeCache(16, 1 / 8, 16, 4, samples_per_volume=2).hits(2) == [0.5, 1]


def test_without_locality_a_cache_holds_its_part_of_the_corpus_in_the_long_run() -> None:
    hits = NodeCache(nodes=32, cached=0.5).hits(64)
    assert hits[1] < 0.1 and sum(hits[-10:]) / 10 == pytest.approx(7 / 8 * 0.5, abs=0.05)
