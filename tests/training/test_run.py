"""Training runs with the real trainer: run folder, resume to the bit, two ranks equal one."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import pretrain_config, train_config
from ranks import Ranks
from weights import moved_alike, weights_of

from segvol_pl.config import (
    Balance,
    TrackConfig,
    TrainConfig,
)
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.data.batch import Batch
from segvol_pl.data.corpus import Corpus
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import Store
from segvol_pl.errors import CheckpointError, ConfigError, ShardError
from segvol_pl.journal import Journal
from segvol_pl.model.checkpoint import load_model
from segvol_pl.run_folder import read_metrics
from segvol_pl.training import run as training_run
from segvol_pl.training.callbacks import StreamPosition
from segvol_pl.training.preemption import SIGNALLED, SIGNALS, StopSignal
from segvol_pl.training.recorder import Recorder
from segvol_pl.training.resume import Start
from segvol_pl.training.run import _trainer, check_categories, prepared, pretrain, train
from segvol_pl.training.segment import SegVolTask


def test_a_run_folder_holds_what_is_needed_to_trust_and_repeat_it(phantom_shards: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "run")
    model = load_model(train(config))
    assert "liver" in model.bank.names
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    # A CUDA build's own name of its version has +cu128 and the like behind it, which its package's has not.
    assert manifest["packages"]["torch"] == importlib.metadata.version("torch")
    assert load("train", [str(tmp_path / "run" / "config.yaml")]) == config
    metrics = tmp_path / "run" / "metrics.csv"
    assert [step for step, _ in read_metrics(metrics, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in read_metrics(metrics, "val/loss")] == [0, 4]
    assert [step for step, _ in read_metrics(metrics, "rate/volumes_per_s")] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= share <= 1 for _, share in read_metrics(metrics, "rate/data_wait"))


@pytest.mark.parametrize("kind", ["pretrain", "train"])
def test_a_stopped_run_goes_on_to_the_bit(phantom_shards: Path, tmp_path: Path, kind: str) -> None:
    make, start = (pretrain_config, pretrain) if kind == "pretrain" else (train_config, train)
    whole = start(make(phantom_shards, tmp_path / "whole"))  # type: ignore[operator]
    config = make(phantom_shards, tmp_path / "stopped")
    program = (
        "import sys, segvol_pl.training.callbacks as c\n"
        "from segvol_pl.config.loader import load\n"
        f"from segvol_pl.training.run import {kind}\n"
        "import os\n"
        "end = c.StreamPosition.on_train_batch_end\n"
        "def stop(self, trainer, *rest):\n"
        "    end(self, trainer, *rest)\n"
        "    if trainer.global_step == 5: os._exit(9)\n"
        "c.StreamPosition.on_train_batch_end = stop\n"
        f"{kind}(load('{kind}', sys.argv[1:]))\n"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "config.yaml")], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    assert torch.load(tmp_path / "stopped/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    resumed = start(config)  # type: ignore[operator]
    first, second = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for metric in ("train/loss", "val/loss"):
        curves = [read_metrics(tmp_path / name / "metrics.csv", metric) for name in ("whole", "stopped")]
        assert curves[0] == curves[1]


def test_how_products_are_taken_is_as_the_run_says(phantom_shards: Path, tmp_path: Path) -> None:
    """Of this run, not of one that the process has done before."""
    config = pretrain_config(phantom_shards, tmp_path / "first", steps=1)
    pretrain(replace(config, run=replace(config.run, tf32=True, deterministic=True)))
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    pretrain(pretrain_config(phantom_shards, tmp_path / "second", steps=1))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.are_deterministic_algorithms_enabled()


def test_a_finished_run_is_left_alone_and_another_configuration_refused(phantom_shards: Path, tmp_path: Path) -> None:
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=2)
    checkpoint = pretrain(config)
    written = checkpoint.stat().st_mtime_ns
    assert pretrain(config) == checkpoint and checkpoint.stat().st_mtime_ns == written
    other = replace(config, optim=replace(config.optim, lr=5e-4))
    with pytest.raises(ConfigError, match=r"run\.out: .* optim\.lr 0\.001 -> 0\.0005"):
        pretrain(other)


def test_training_starts_from_a_pretrained_encoder(phantom_shards: Path, tmp_path: Path) -> None:
    encoder = pretrain(pretrain_config(phantom_shards, tmp_path / "pre", steps=2))
    config = replace(train_config(phantom_shards, tmp_path / "run", steps=1), pretrained=str(encoder))
    frozen = replace(config, optim=replace(config.optim, lr=0.0))
    trained = weights_of(train(frozen))
    for name, value in weights_of(encoder).items():
        if name.startswith("encoder."):
            assert torch.equal(value, trained[f"model.image_encoder.{name.removeprefix('encoder.')}"])
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(replace(config, pretrained=str(tmp_path / "none.ckpt"), run=replace(config.run, out=str(tmp_path / "x"))))


def test_what_is_frozen_stays_and_has_no_moments(phantom_shards: Path, tmp_path: Path) -> None:
    config = replace(train_config(phantom_shards, tmp_path / "run", steps=2), freeze=["image_encoder.*"])
    train(replace(config, run=replace(config.run, checkpoint_every=1, save_every=1)))
    first, last = (
        torch.load(tmp_path / "run/checkpoints" / name, weights_only=True) for name in ("step-1.ckpt", "last.ckpt")
    )
    names = [f"model.{name}" for name, _ in load_model(tmp_path / "run/checkpoints/last.ckpt").named_parameters()]
    encoder = [name for name in names if name.startswith("model.image_encoder.")]
    moved = {name for name in names if not torch.equal(first["state_dict"][name], last["state_dict"][name])}
    assert moved and moved.isdisjoint(encoder)
    assert len(last["optimizer_states"][0]["state"]) == len(names) - len(encoder)
    for patterns, message in ((["encoder.*"], "matches no tensor.*image_encoder"), (["*"], "nothing is left")):
        with pytest.raises(ConfigError, match=f"freeze: .*{message}"):
            train(replace(config, freeze=patterns, run=replace(config.run, out=str(tmp_path / "none"))))


def test_volumes_that_bring_no_prompt_are_named(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = train_config(phantom_shards, tmp_path)
    config = replace(config, prompts=replace(config.prompts, pseudo_per_volume=0, balance=Balance.inverse))
    _, module = prepared(config, "meta")
    (part,) = module.train_corpus.parts
    held = [part.records[place] for place in range(len(part.records))]
    counted = {name: sum(name in record.categories for record in held) for name in held[0].categories}
    frequency = module.train_corpus.per_category()
    assert {name: frequency[name] for name in counted} == {n: part.times * count for n, count in counted.items()}
    for emptied in (1, len(held)):
        records = [replace(record, categories=[]) for record in held[:emptied]] + held[emptied:]
        module.train_corpus = Corpus([replace(part, records=SampleTable.of(records))])
        found = rf"{emptied} of {len(held)} labelled volumes hold no category \({held[0].key}"
        if emptied < len(held):
            check_categories(module, config)
            assert re.search(found, caplog.text)
        else:
            with pytest.raises(ConfigError, match=found):
                check_categories(module, config)


def test_accumulation_does_not_change_the_first_step(phantom_shards: Path, tmp_path: Path) -> None:
    one = pretrain_config(phantom_shards, tmp_path / "one", steps=1)
    two = pretrain_config(phantom_shards, tmp_path / "two", steps=1)
    two = replace(two, run=replace(two.run, accumulate=2))
    assert moved_alike(weights_of(pretrain(one)), weights_of(pretrain(two)))
    before, after = (dict(read_metrics(tmp_path / name / "metrics.csv", "val/loss")) for name in ("one", "two"))
    assert before[0] == pytest.approx(after[0], rel=1e-6), "validation sees the same volumes"


def test_two_ranks_train_like_one(phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]) -> None:
    one = train_config(phantom_shards, tmp_path / "one", steps=4)
    (tmp_path / "two.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "two", steps=4)))
    ranks[2]("train", str(tmp_path / "two.yaml"))
    assert moved_alike(weights_of(train(one)), weights_of(tmp_path / "two/checkpoints/last.ckpt"))
    losses = [dict(read_metrics(tmp_path / name / "metrics.csv", "val/loss")) for name in ("one", "two")]
    assert losses[0][4] == pytest.approx(losses[1][4], rel=1e-3)
    # The first step starts from equal weights: what differs is rounding alone.
    losses = [dict(read_metrics(tmp_path / name / "metrics.csv", "train/loss")) for name in ("one", "two")]
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-6)
    assert list(losses[0].values()) == pytest.approx(list(losses[1].values()), rel=1e-3)


def test_ranks_keep_to_their_threads(phantom_shards: Path, tmp_path: Path) -> None:
    """Lightning's launcher would set the cores by the processes of a node: one each, and under SLURM far too many."""
    config = pretrain_config(phantom_shards, tmp_path / "run", steps=1)
    (tmp_path / "config.yaml").write_text(to_yaml(replace(config, run=replace(config.run, devices=2, cpu_threads=3))))
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from segvol_pl.config.loader import load\n"
        "from segvol_pl.training.run import pretrain\n"
        "pretrain(load('pretrain', sys.argv[1:]))\n"
        "told = Path(sys.argv[1]).with_name(f'threads-{torch.distributed.get_rank()}')\n"
        "told.write_text(str(torch.get_num_threads()))\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, tmp_path / "program.py", tmp_path / "config.yaml"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in (0, 1)] == ["3", "3"]


def test_wandb_writes_an_offline_run_without_a_key(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replace(pretrain_config(phantom_shards, tmp_path / "run", steps=1), track=TrackConfig())
    pretrain(config)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 500}, r"data\.samples_per_volume: .* set data\.samples_per_volume="),
        ({"split": "nowhere"}, r"data\.split, .* has no samples in 'nowhere'"),
    ],
)
def test_data_that_cannot_fill_a_batch_is_refused(
    phantom_shards: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = pretrain_config(phantom_shards, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        pretrain(replace(config, data=replace(config.data, **change)))
    assert not (tmp_path / "run").exists()


# ---- damage, and being killed ----


def _flipped(shards: Path, folder: Path) -> tuple[Path, SampleRecord]:
    """A copy of the shards in which one sample of the train split has a wrong byte."""
    copy = Path(shutil.copytree(shards, folder))
    record = next(one for one in read_index(Store(copy)).samples if one.split == "train")
    offset, size = record.members[Member.OVERVIEW.value]
    content = bytearray((copy / record.shard).read_bytes())
    content[offset + size // 2] ^= 0xFF
    (copy / record.shard).write_bytes(content)
    return copy, record


def test_a_damaged_sample_is_replaced_counted_and_beyond_the_bound_fatal(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards, record = _flipped(phantom_shards, tmp_path / "shards")
    config = train_config(shards, tmp_path / "run", steps=6)
    config = replace(config, run=replace(config.run, checkpoint_every=1))
    data = replace(config.data, overview_fraction=1.0)
    with pytest.raises(ShardError, match=rf"1 of \d samples are damaged.*{record.shard}: 1 altered"):
        train(replace(config, data=data))
    borne = replace(
        config, data=replace(data, max_bad_fraction=0.5), run=replace(config.run, out=str(tmp_path / "borne"))
    )
    train(borne)
    # A run that the bound ended goes on under another bound.
    assert train(replace(borne, run=config.run)) == tmp_path / "run/checkpoints/last.ckpt"
    damaged = dict(read_metrics(tmp_path / "borne/metrics.csv", "data/damaged"))
    assert damaged[6] == 1
    assert f"sample {record.key} of" in caplog.text


def test_a_sample_that_two_ranks_find_damaged_counts_once(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    """And once more over a resume: the bound is on samples, whoever met them."""
    shards, record = _flipped(phantom_shards, tmp_path / "shards")
    config = train_config(shards, tmp_path / "run", steps=8)
    samples = len([one for one in read_index(Store(shards)).samples if one.split == "train"])
    data = replace(config.data, overview_fraction=1.0, max_bad_fraction=1 / samples)
    (tmp_path / "run.yaml").write_text(to_yaml(replace(config, data=data)))
    for steps in ("8", "12"):
        said = ranks[2]("train", str(tmp_path / "run.yaml"), f"optim.max_steps={steps}")
    metrics = tmp_path / "run/metrics.csv"
    assert dict(read_metrics(metrics, "data/damaged"))[12] == 1
    assert dict(read_metrics(metrics, "data/replaced"))[8] >= 2 and said.count(record.key) <= 1


KILLS = int(os.environ.get("SEGVOL_KILLS", "20"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_killed_again_and_again_end_as_if_nothing_had_happened(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    """SIGKILL at random moments, often while saving, of one rank or of all; each start goes on from the last save."""
    steps, rng = 2 * KILLS + 20, np.random.default_rng(0)
    config = train_config(phantom_shards, tmp_path / "whole", steps=steps)
    run = replace(config.run, checkpoint_every=1, val_every=0, val_batches=1)
    config = replace(config, run=run, data=replace(config.data, workers=1, samples_per_volume=5))
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(replace(config, run=replace(run, out=str(tmp_path / name)))))
    ranks[2]("train", str(tmp_path / "whole.yaml"))
    metrics = tmp_path / "killed/metrics.csv"
    for step in sorted(rng.choice(np.arange(1, 2 * KILLS), size=KILLS, replace=False).tolist()):
        killed, delay = [[1], [0, 1]][rng.integers(2)], rng.uniform(0, 0.05)
        ranks[2].begin("train", str(tmp_path / "killed.yaml"))
        _kill_after(ranks[2], metrics, step, killed, delay)
        assert read_metrics(metrics, "train/loss")[-1][0] < steps, "killed before its end"
    said = ranks[2]("train", str(tmp_path / "killed.yaml"))
    assert "resuming from step" in said or "nothing to do" in said, said
    first, second = (weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [dict(read_metrics(tmp_path / name / "metrics.csv", "train/loss")) for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == steps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_on_one_world_goes_on_on_another(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    """Two ranks, one, two with other workers and accumulation, one: the losses are those of an unbroken run."""
    steps, base = 24, train_config(phantom_shards, tmp_path / "whole", steps=24)
    run = replace(base.run, checkpoint_every=1, val_every=0, val_batches=1)
    config = replace(base, run=run, data=replace(base.data, workers=1, samples_per_volume=5, global_batch=4))
    for name in ("whole", "moved"):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(replace(config, run=replace(run, out=str(tmp_path / name)))))
    worlds = [(2, []), (1, ["data.workers=0"]), (2, ["run.accumulate=2", "data.workers=2"])]
    for (number, keys), stop in zip(worlds, (5, 11, 17), strict=True):
        ranks[number].begin("train", str(tmp_path / "moved.yaml"), *keys)
        _kill_after(ranks[number], tmp_path / "moved/metrics.csv", stop)
    for name in ("whole", "moved"):
        ranks[1]("train", str(tmp_path / f"{name}.yaml"))
    whole, other = (dict(read_metrics(tmp_path / name / "metrics.csv", "train/loss")) for name in ("whole", "moved"))
    assert list(whole) == list(other) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(other.values()), list(whole.values()), rtol=1e-3)


def _kill_after(running: Ranks, metrics: Path, step: int, killed: Sequence[int] = (), delay: float = 0.0) -> None:
    """Kills the ranks named, or all, `delay` seconds after the run has logged `step`; the others then end too."""
    deadline = time.monotonic() + 120
    while not metrics.exists() or max((at for at, _ in read_metrics(metrics, "train/loss")), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)
    time.sleep(delay)
    running.kill(*killed)
    running.end()


def test_a_share_of_the_data_is_held_against_the_whole_held_out_set(phantom_shards: Path) -> None:
    config = train_config(phantom_shards, Path("run"))
    whole, half = (
        VolumeModule(replace(config.data, fraction=share), config.run, None, None, labelled=True)  # type: ignore[arg-type]
        for share in (1.0, 0.5)
    )
    assert half.train_corpus.num_volumes < whole.train_corpus.num_volumes
    assert half.val_corpus == whole.val_corpus


@pytest.mark.parametrize("number", [1, 2])
def test_a_signal_saves_at_a_steps_end_and_the_same_command_goes_on(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], number: int
) -> None:
    """SIGUSR1 to all processes, SIGTERM to the first, thrice each: losses and weights are those of an unbroken run."""
    steps, base = 12, train_config(phantom_shards, tmp_path / "whole", steps=12)
    run = replace(base.run, checkpoint_every=1000, val_every=0, val_batches=1)
    config = replace(base, run=run, data=replace(base.data, workers=1, samples_per_volume=5))
    for name in ("whole", "signalled"):
        (tmp_path / f"{name}.yaml").write_text(to_yaml(replace(config, run=replace(run, out=str(tmp_path / name)))))
    ranks[number]("train", str(tmp_path / "whole.yaml"))
    for step, signalled, everyone in ((3, signal.SIGUSR1, True), (6, signal.SIGTERM, False)):
        ranks[number].begin("train", str(tmp_path / "signalled.yaml"))
        _signal_after(ranks[number], tmp_path / "signalled", step, signalled, everyone)
    ranks[number]("train", str(tmp_path / "signalled.yaml"))
    first, second = (weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "signalled"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = [dict(read_metrics(tmp_path / name / "metrics.csv", "train/loss")) for name in ("whole", "signalled")]
    assert losses[0] == losses[1] and len(losses[0]) == steps


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(phantom_shards: Path, tmp_path: Path) -> None:
    """To all processes, as a terminal sends it."""
    config, log = train_config(phantom_shards, tmp_path / "run", steps=60), tmp_path / "log"
    run = replace(config.run, checkpoint_every=2, val_every=0, val_batches=1)
    config = replace(config, run=run, data=replace(config.data, workers=1))
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "segvol_pl", "train", str(tmp_path / "run.yaml")]
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, start_new_session=True)
    while len(_losses_so_far(tmp_path / "run")) < 3:
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == SIGNALLED + signal.SIGINT
    said = log.read_text()
    assert said.splitlines()[-1] == "segvol-pl train: interrupted" and "Traceback" not in said
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming from step" in again.stderr and len(_losses_so_far(tmp_path / "run")) == 60


def test_a_signal_before_the_first_step_ends_the_first_validation_between_two_batches(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nothing to save, and the same command starts from the beginning."""
    config = train_config(phantom_shards, tmp_path / "run", steps=2)
    config = replace(config, run=replace(config.run, val_batches=5))
    validate, seen = SegVolTask.validation_step, []

    def interrupted(self: SegVolTask, batch: Any, index: int) -> Any:
        seen.append(index)
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(SegVolTask, "validation_step", interrupted)
        with caplog.at_level("INFO"), pytest.raises(SystemExit) as ended:
            train(config)
    assert ended.value.code == SIGNALLED + signal.SIGUSR1 and seen == [0]
    assert "SIGUSR1: nothing to save yet" in caplog.text
    assert not list((tmp_path / "run/checkpoints").glob("*.ckpt"))
    train(config)
    assert [step for step, _ in _losses_so_far(tmp_path / "run")] == [1, 2]


def test_a_signal_in_a_validation_ends_it_between_two_batches(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the averaged weights are being validated: it saves the others."""
    base = train_config(phantom_shards, tmp_path / "whole", steps=6)
    run = replace(base.run, val_every=4, val_batches=5, checkpoint_every=1000)
    whole = replace(base, run=run, optim=replace(base.optim, ema=0.9))
    signalled = replace(whole, run=replace(whole.run, out=str(tmp_path / "signalled")))
    train(whole)
    validate, seen = SegVolTask.validation_step, []

    def interrupted(self: SegVolTask, batch: Any, index: int) -> Any:
        if self.global_step == 4:
            seen.append(index)
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(SegVolTask, "validation_step", interrupted)
        with pytest.raises(SystemExit) as ended:
            train(signalled)
    assert ended.value.code == SIGNALLED + signal.SIGTERM and seen == [0]
    train(signalled)
    first, second = (weights_of(tmp_path / name / "checkpoints/last.ckpt") for name in ("whole", "signalled"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert _losses_so_far(tmp_path / "whole") == _losses_so_far(tmp_path / "signalled")


def _signal_after(running: Ranks, out: Path, step: int, number: signal.Signals, everyone: bool) -> None:
    """Signals a run, several times, once it has logged `step`: all processes, or rank 0 alone."""
    deadline = time.monotonic() + 120
    while max((at for at, _ in _losses_so_far(out)), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.02)
    for _ in range(3):
        for pid in running.pids if everyone else running.pids[:1]:
            (os.killpg if everyone else os.kill)(pid, number)
        time.sleep(0.01)
    statuses = running.end()
    assert set(statuses) == {SIGNALLED + number}, running.said()
    assert f"{number.name}: saved step" in running.said()[0]


def _losses_so_far(out: Path) -> list[tuple[int, float]]:
    path = out / "metrics.csv"
    return read_metrics(path, "train/loss") if path.exists() else []


def test_handlers_of_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGUSR1
    assert [signal.getsignal(number) for number in SIGNALS] == before


class _Following:
    """Keeps what the trainer says of each batch when its step is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[int, int, list[str]]] = []
        end = StreamPosition.on_train_batch_end

        def noted(callback: StreamPosition, trainer: Any, *rest: Any) -> None:
            end(callback, trainer, *rest)
            data = trainer.datamodule
            self.told.append((trainer.global_step, data.seen, data.batch_keys()))

        monkeypatch.setattr(StreamPosition, "on_train_batch_end", noted)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_copied_ahead_change_nothing(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """As on a GPU: the copy of a batch has begun before the batch in front of it is trained on."""
    following, begun = _Following(monkeypatch), []

    def begin(batch: Batch) -> Callable[[], Batch]:
        begun.append((int(batch["seen"]), len(following.told)))
        return lambda: {name: value.clone() for name, value in batch.items()}

    def configured(name: str) -> TrainConfig:
        config = train_config(phantom_shards, tmp_path / name)
        config = replace(config, data=replace(config.data, workers=workers))
        return replace(config, run=replace(config.run, save_every=3))

    plain = train(configured("plain"))
    expected, following.told = following.told, []
    assert [(step, seen) for step, seen, _ in expected] == [(step, 2 * step) for step in range(1, 7)]
    monkeypatch.setattr(VolumeModule, "_copying", lambda self: begin)
    ahead = train(configured("ahead"))
    assert following.told == expected
    assert max(seen - 2 * steps for seen, steps in begun) >= 4, "a batch beyond the one that is trained on"
    kept = tmp_path / "ahead" / "checkpoints" / "step-3.ckpt"
    assert torch.load(kept, weights_only=True)["VolumeModule"]["seen"] == 6
    resumed_folder = tmp_path / "resumed" / "checkpoints"
    resumed_folder.mkdir(parents=True)
    shutil.copy(kept, resumed_folder / "last.ckpt")
    following.told = []
    resumed = train(configured("resumed"))
    assert following.told == expected[3:]
    for other in (ahead, resumed):
        first, second = weights_of(plain), weights_of(other)
        assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the order of the callbacks ----

AFTER = {
    "StreamPosition": ["StartUp"],
    "DataHealth": ["StreamPosition"],
    "Throughput": ["StreamPosition", "DataHealth"],
    "Stragglers": ["Throughput"],
    "FiniteSteps": ["Throughput", "Stragglers", "GradientNorm", "Profile"],
    "ValidationBySource": ["ValidationDice"],
    "AveragedValidation": ["ValidationDice"],
    "Recorder": ["ValidationDice", "GradientNorm", "FiniteSteps", "AveragedValidation"],
    "Watchdog": ["FiniteSteps"],
    "Preemption": ["FiniteSteps", "Watchdog", "Throughput", "AveragedValidation"],
    "Checkpoints": ["Preemption", "FiniteSteps", "ValidationDice", "ValidationLine", "CorpusSize", "Recorder"],
}
"""Callback -> those that Lightning must call before it; `_callbacks` says why."""


def test_callbacks_are_called_in_the_order_that_correctness_needs(tmp_path: Path) -> None:
    config = train_config(tmp_path, tmp_path / "run")
    optional = {"run": replace(config.run, profile=1), "data": replace(config.data, mix=["more"])}
    config = replace(config, optim=replace(config.optim, ema=0.5), **optional)
    (tmp_path / "run").mkdir()
    recorder = Recorder(Journal(tmp_path / "run", rank=0), every=1)
    trainer = _trainer(config, Start(), StopSignal(), recorder)
    names = [type(each).__name__ for each in trainer.callbacks]  # type: ignore[attr-defined]
    ours = [name for name in names if hasattr(training_run, name)]
    assert ours[:2] == ["StartUp", "StreamPosition"] and ours[-1] == "Checkpoints"
    assert {*AFTER, *(name for earlier in AFTER.values() for name in earlier)} == set(ours)
    for later, earlier in AFTER.items():
        assert all(ours.index(name) < ours.index(later) for name in earlier), later
