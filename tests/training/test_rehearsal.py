"""A rehearsal of many ranks on one machine: it passes where a run would start, and refuses what its start refuses."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from factories import pretrain_config, train_config
from ranks import Ranks

from segvol_pl.__main__ import main
from segvol_pl.config import LastBatch, Strategy
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.locality import Locality
from segvol_pl.data.stream import BatchPlan, World
from segvol_pl.errors import MISUSED, ConfigError, StartUpError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.model import SegVol
from segvol_pl.training.rehearsal import check_rows, deal, lines, spread
from segvol_pl.training.run import train

SCALAR = """
import torch
from segvol_pl.model import SegVol
made = SegVol.__init__
def with_a_number(self, *given):
    made(self, *given)
    self.scale = torch.nn.Parameter(torch.tensor(1.0))
SegVol.__init__ = with_a_number
"""
"""A weight that FSDP2 cannot split."""
FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
FREE = re.compile(r"[\d.]+ (GB|GiB) free")


def test_ranks_become_nodes(tmp_path: Path) -> None:
    config = train_config(tmp_path, tmp_path)

    def of(devices: int, nodes: int, ranks: int) -> tuple[int, int]:
        run = spread(replace(config, run=replace(config.run, devices=devices, nodes=nodes, rehearse=ranks))).run
        return run.nodes, run.devices

    assert of(8, 1, 512) == of(8, 64, 512) == (64, 8)
    assert of(1, 1, 16) == (16, 1)
    with pytest.raises(ConfigError, match=r"run\.rehearse: 512 ranks are no multiple of run\.devices=7"):
        of(7, 1, 512)
    with pytest.raises(ConfigError, match=r"run\.rehearse: 512 ranks are not run\.nodes=3 x run\.devices=8"):
        of(8, 3, 512)


# ---- samples ----


class Uneven(BatchPlan):
    """A plan by which rank 2 takes the samples of rank 1."""

    def _local(self, index: int | np.ndarray, micro: int, world: World) -> np.ndarray:
        return super()._local(index, micro, replace(world, rank=1) if world.rank == 2 else world)


@pytest.mark.parametrize("last_batch", LastBatch)
@pytest.mark.parametrize(("ranks", "accumulate", "shares"), [(1, 1, 1), (16, 2, 1), (16, 1, 8), (4, 2, 32)])
def test_each_sample_comes_once(ranks: int, accumulate: int, shares: int, last_batch: LastBatch) -> None:
    plan = BatchPlan(1000, 64, accumulate, 3, last_batch, Locality(shares, 2))
    dealt = deal(plan, ranks, workers=3)
    assert dealt.shape == (ranks, plan.usable // 64 * accumulate, 64 // accumulate // ranks)
    assert sorted(dealt.ravel()) == list(range(plan.usable))
    rows = plan.locality.arranged(np.arange(1000, dtype=np.int32), 3, 0)
    taken = rows[plan.locality.located(dealt, 64, 1000)[0]]
    check_rows(plan, rows, taken)
    if last_batch is LastBatch.drop:
        assert len(set(taken.ravel())) == taken.size
        taken.ravel()[0] = taken.ravel()[1]
        with pytest.raises(StartUpError, match="is taken 2 times in an epoch that has it 1 times"):
            check_rows(plan, rows, taken)
    else:
        assert set(taken.ravel()) == set(range(1000))


def test_a_sample_that_comes_twice_is_found() -> None:
    with pytest.raises(StartUpError, match="position 16 of an epoch of 960 is dealt to 2 of 4 ranks"):
        deal(Uneven(1000, 64), 4, workers=1)


# ---- a start ----


@pytest.mark.parametrize("strategy", [Strategy.auto, Strategy.fsdp, Strategy.zero2])
def test_a_run_of_512_ranks_is_rehearsed(phantom_shards: Path, tmp_path: Path, strategy: Strategy) -> None:
    config = train_config(phantom_shards, tmp_path / "run")
    run = replace(config.run, devices=8, rehearse=512, strategy=strategy, accelerator="cuda")
    data = replace(config.data, global_batch=1024, samples_per_volume=300, locality=64)
    said = list(lines(replace(config, run=run, data=data)))
    assert not dist.is_initialized() and not (tmp_path / "run").exists()
    facts = {line[2:18].strip(): line[18:] for line in said if line.startswith("  ")}
    assert said[0] == f"rehearsal of 64 x 8 ranks, strategy {'ddp' if strategy is Strategy.auto else strategy.value}"
    assert facts["batch"] == "1024 = 512 ranks x 2 at once x run.accumulate=1"
    assert facts["epoch"].startswith("1024 samples in 1 steps, each taken by one rank (176 left out)")
    assert facts["shares"] == "a node reads 1 of 64"
    weights = {
        Strategy.auto: r"0\.0 M on each rank, in one group of 512",
        Strategy.fsdp: r"all of 0\.0 M are split: .* on rank 0 and .* on rank 511",
        Strategy.zero2: r"0\.0 M; how zero2 splits them is not rehearsed",
    }[strategy]
    assert re.fullmatch(weights, facts["weights"])
    assert all(re.match(r"phantom_\d+, phantom_\d+: ", facts[f"rank {rank} reads"]) for rank in (0, 511))
    assert said[-1].startswith("would start ")


def test_pretraining_and_one_rank_are_rehearsed(phantom_shards: Path, tmp_path: Path) -> None:
    config = pretrain_config(phantom_shards, tmp_path / "run")
    said = "\n".join(lines(replace(config, run=replace(config.run, rehearse=1))))
    assert "rehearsal of 1 x 1 ranks, strategy auto" in said and "would start" in said


def test_only_the_two_commands_rehearse(phantom_shards: Path, tmp_path: Path) -> None:
    """A grid would take a rehearsed run for a finished one."""
    config = train_config(phantom_shards, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run\.rehearse: only the commands train and pretrain"):
        train(replace(config, run=replace(config.run, rehearse=2)))


@dataclass(frozen=True)
class Broken:
    """A run that cannot start."""

    line: str
    """How it is refused."""
    keys: tuple[str, ...] = ()
    patch: str = ""
    """Python that each of its ranks runs before."""


BROKEN = {
    "batch": Broken(r"data\.global_batch: 3 cannot be shared by 2 ranks", ("data.global_batch=3",)),
    "disk": Broken(r"run\.out: \S+ has .* checkpoints need", ("run.save_every=1", "run.keep_last=10000000000")),
    "shared memory": Broken(r"data\.workers: /dev/shm has ", ("data.workers=1", "data.prefetch=1000000000")),
    "locality": Broken(
        r"data\.locality: an epoch of 4 samples cannot be divided into 8 shares",
        ("data.locality=8", "data.global_batch=8", "data.samples_per_volume=1", "data.last_batch=repeat"),
    ),
    "epoch": Broken(r"data\.samples_per_volume: an epoch of 16 samples is smaller", ("data.global_batch=64",)),
    "split": Broken(r"data\.split, data\.val_split: .* has no labelled samples in 'tset'", ("data.val_split=tset",)),
    "frozen": Broken(r"freeze: nothing is left to train", ('freeze=["*"]',)),
    "weight": Broken(r".*fully_shard doesn't support scalar parameters", ("run.strategy=fsdp",), SCALAR),
    "open files": Broken(r"open files: this process may open 400, a run of 2 ranks needs 516", (), FEW_FILES),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_rehearsal_refuses_what_a_start_refuses_in_the_same_line(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], name: str
) -> None:
    broken = BROKEN[name]
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run")))
    arguments = ["train", str(tmp_path / "run.yaml"), *broken.keys]
    # One process, as on two nodes of one rank each.
    (status,), (rehearsed,) = ranks[1].ended(*arguments, "run.rehearse=2", patch=broken.patch)
    statuses, started = ranks[2].ended(*arguments, patch=broken.patch)
    line = _error(rehearsed)
    assert re.match(broken.line, line), line
    # Once the ranks have met, one of them reports for all.
    assert {_error(said) for said in started if "error: " in said} == {line}
    assert statuses == [status, status] and status


def _error(said: str) -> str:
    """The message of the last line, without amounts: free space changes, and ranks of one node share its memory."""
    line = said.strip().splitlines()[-1]
    found = re.fullmatch(r"segvol-pl train: error: (.*)", line)
    assert found, said[-2000:]
    shared = re.compile(r"of \d ranks need [\d.]+: start the container with --shm-size=\d+g")
    return shared.sub("need MORE", FREE.sub("SOME free", found[1]))


def test_a_folder_that_is_in_use_is_refused(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run")))
    with FolderLock(tmp_path / "run"):
        statuses, said = ranks[1].ended("train", str(tmp_path / "run.yaml"), "run.rehearse=2")
    assert statuses == [1] and "is being written by" in said[0].splitlines()[-1]


def test_the_command_prints_each_check_that_has_passed(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run")))
    command = ["train", str(tmp_path / "run.yaml"), "run.rehearse=4", "data.global_batch=4", "run.strategy=fsdp"]
    assert main(command) == 0
    assert "rehearsal of 4 x 1 ranks, strategy fsdp" in capsys.readouterr().out
    monkeypatch.setattr(SegVol, "__init__", SegVol.__init__)
    exec(SCALAR, {})
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "checkpoints" in shown.out and "would start" not in shown.out
    assert "fully_shard doesn't support scalar parameters. Change scale" in shown.err
    assert main([*command, "run.strategy=ddp", "data.global_batch=6"]) == MISUSED
