"""Slow ranks: the estimate of each rank's own step, when a rank is named, and that real slow ranks are named right."""

from __future__ import annotations

import re
import socket
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from factories import pretrain_config, train_config
from ranks import Ranks

from segvol_pl.config import Strategy
from segvol_pl.config.loader import to_yaml
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import train
from segvol_pl.training.stragglers import Compared, Measured, Slow, own_seconds


@pytest.mark.parametrize(
    ("ranks", "own"),
    [
        # The others wait half of the step for rank 1, which computes twice as long.
        ([Measured(0.01, 0, 0.1), Measured(0.02, 0, 0.1), Measured(0.01, 0, 0.1)], [0.05, 0.1, 0.05]),
        # The others wait for rank 2, which waits for its data.
        ([Measured(0.01, 0, 0.1), Measured(0.01, 0.01, 0.1), Measured(0.01, 0.06, 0.1)], [0.04, 0.05, 0.1]),
        # All wait for their data alike: nobody is slow.
        ([Measured(0.01, 0.06, 0.1)] * 2, [0.1, 0.1]),
        # The blocks are not compared.
        ([Measured(1, 0, 0.1), Measured(1, 0.05, 0.1)], [0.05, 0.1]),
    ],
)
def test_a_ranks_own_step_leaves_out_what_it_waits_for_others(ranks: list[Measured], own: list[float]) -> None:
    assert own_seconds(ranks) == pytest.approx(own)


def test_ranks_that_only_wait_for_data_have_rates_too() -> None:
    """By a GPU's clock the wait may be longer than the step by the host's."""
    assert Compared.of([Measured(0.01, 0.11, 0.1), Measured(0.01, 0.0, 0.1)]).rates()[0] < 0.01


@pytest.mark.parametrize(
    ("slow", "cause", "metrics"),
    [
        (
            Measured(0.03, 0.0, 0.12),
            "by computing: its encoder blocks take 30 ms a step, on the median rank 10",
            (3, 0),
        ),
        (Measured(0.01, 0.08, 0.12), "by data: it waits 80 ms a step, the median rank 0", (3, 2 / 3)),
    ],
)
def test_data_and_computing_are_distinguished(slow: Measured, cause: str, metrics: tuple[float, float]) -> None:
    compared = Compared.of([Measured(0.01, 0.0, 0.12), Measured(0.01, 0.0, 0.12), slow, Measured(0.01, 0.0, 0.12)])
    assert compared.cause(2) == cause
    assert compared.rates() == pytest.approx([1, 1, 1 / 3, 1])
    found = compared.metrics()
    assert found["rate/slowest_rank"] == 2
    assert (found["rate/step_spread"], found["rate/wait_spread"]) == pytest.approx(metrics)


def test_a_rank_is_named_once_and_again_only_after_it_has_recovered() -> None:
    slow, named = Slow(intervals=2), []
    for rate in (0.7, 1.0, 0.7, 0.7, 0.5, 0.9, 0.7, 0.9, 0.9, 0.9, 0.7, 0.79):
        named.append(slow.note([1.0, rate]))
    none: tuple[list[int], list[int]] = ([], [])
    assert named == [none, none, none, ([1], []), none, none, none, none, ([], [1]), none, none, ([1], [])]


SLOW = {
    "computing": (
        "import os, time\nfrom segvol_pl.model.image_encoder import Block\nbefore = Block._computed\n"
        "def slowed(*given):\n    time.sleep(0.1)\n    return before(*given)\n"
        "if os.environ['LOCAL_RANK'] == '1':\n    Block._computed = slowed\n"
    ),
    "data": (
        "import os, time\nfrom segvol_pl.data.stream import Stream\nbefore = Stream.sample\n"
        "def slowed(*given):\n    time.sleep(0.3)\n    return before(*given)\n"
        "if os.environ['LOCAL_RANK'] == '1':\n    Stream.sample = slowed\n"
    ),
}


def named(
    shards: Path, folder: Path, running: Ranks, strategy: Strategy, cause: str
) -> tuple[list[str], dict[str, list[float]]]:
    """What rank 0 says of slow ranks in a run in which rank 1 is slow, and the metrics."""
    config = pretrain_config(shards, folder / "run", steps=10)
    run = replace(config.run, strategy=strategy, log_every=2, val_every=0, val_batches=0, straggler_intervals=2)
    (folder / "run.yaml").write_text(to_yaml(replace(config, run=run)))
    said = running("pretrain", str(folder / "run.yaml"), patch=SLOW[cause])
    metrics = {
        name: [value for _, value in read_metrics(folder / "run/metrics.csv", f"rate/{name}")]
        for name in ("slowest_rank", "step_spread", "wait_spread")
    }
    return [line for line in said.splitlines() if "is slow" in line], metrics


@pytest.mark.parametrize("cause", SLOW)
def test_the_slow_rank_of_two_is_named(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], cause: str
) -> None:
    (line,), metrics = named(phantom_shards, tmp_path, ranks[2], Strategy.ddp, cause)
    expected = rf"step \d+: rank 1 on {socket.gethostname()} is slow, for 2 log intervals now: .*, by {cause}: "
    assert re.search(expected, line), line
    # Of five intervals the middle one: other processes may have a core for one of them.
    found = {name: statistics.median(values) for name, values in metrics.items()}
    assert found["slowest_rank"] == 1 and found["step_spread"] > 1.25
    assert (found["wait_spread"] > 0.2) == (cause == "data")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Strategy.fsdp, Strategy.zero2, Strategy.zero3])
@pytest.mark.parametrize("cause", SLOW)
def test_strategies_that_shard_do_not_hide_the_slow_rank(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], strategy: Strategy, cause: str
) -> None:
    """Rank 0 gathers weights from it before every block. Under zero3 only waits for data are compared."""
    if strategy is not Strategy.fsdp:
        pytest.importorskip("deepspeed")
    lines, _ = named(phantom_shards, tmp_path, ranks[2], strategy, cause)
    expected = [] if strategy is Strategy.zero3 and cause == "computing" else ["rank 1"]
    assert [re.findall(r"rank \d", line)[0] for line in lines] == expected and all(f"by {cause}" in s for s in lines)


def test_a_single_process_is_compared_with_nobody(phantom_shards: Path, tmp_path: Path) -> None:
    train(train_config(phantom_shards, tmp_path / "run", steps=1))
    assert "rate/data_wait" in (metrics := (tmp_path / "run/metrics.csv").read_text())
    assert "slowest_rank" not in metrics and "spread" not in metrics
