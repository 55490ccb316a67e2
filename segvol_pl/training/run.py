"""A training run: data, task, trainer, run folder.

1. The configuration and the manifest are written to the run folder.
2. Where the folder holds a checkpoint of the same configuration and data, the run goes on from it, see `resume`.
3. Validation comes before the first step too, so that every curve has its start (but with DeepSpeed).
4. `checkpoints/last.ckpt` is the newest state, see `checkpoints`.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from segvol_pl.config import Convention, PretrainConfig, Strategy, TextSource, TrainConfig
from segvol_pl.config.loader import custom_function, plain, to_yaml
from segvol_pl.data import sampling
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.schema import Member
from segvol_pl.errors import ConfigError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.launched import rank_named
from segvol_pl.model.checkpoint import Weights, load_encoder, load_weights, read_weights
from segvol_pl.model.text_encoder import TextBank
from segvol_pl.run_folder import write_manifest
from segvol_pl.training import loggers, strategies
from segvol_pl.training.callbacks import DataHealth, Load, Profile, StreamPosition, Throughput, ValidationLine
from segvol_pl.training.checkpoints import AtomicCheckpointIO, Checkpoints, writer
from segvol_pl.training.gradients import FiniteSteps, GradientNorm
from segvol_pl.training.module import Sharding, Task
from segvol_pl.training.preemption import Preemption, StopSignal
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.resume import Start, set_aside, start_of
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.startup import StartUp
from segvol_pl.training.validation import CorpusSize, ValidationDice
from segvol_pl.training.watchdog import Watchdog

log = logging.getLogger(__name__)

Config = PretrainConfig | TrainConfig


def pretrain(config: PretrainConfig) -> Path:
    """Runs SimMIM pre-training; returns the last checkpoint. Raises ConfigError, ShardError."""
    draw = functools.partial(sampling.sample_simmim, model=config.model, mask_ratio=config.mask_ratio)
    module = _module(config, draw, labelled=False)
    _seed(config)
    return _fit(config, SimMIMTask(config), module)


def train(config: TrainConfig) -> Path:
    """Runs supervised training; returns the last checkpoint. Raises ConfigError, ShardError, CheckpointError."""
    for name in config.model.landmark_counts:
        custom_function(name, "model.landmarks")
    rows: dict[str, int] = {}
    draw = functools.partial(sampling.sample_segmentation, model=config.model, prompts=config.prompts, row_of=rows)
    module = _module(config, draw, labelled=True)
    _check_regions(module, config)
    names = module.categories
    rows.update({name: row for row, name in enumerate(names)})
    weights = _starting_weights(config)
    bank = _bank(names, config, weights)
    _seed(config)
    task = SegVolTask(config, bank)
    if weights is not None:
        log.info("model: %s", load_weights(task.model, weights, config.allow))
    if config.pretrained is not None:
        log.info("image encoder: %s", load_encoder(task.model.image_encoder, config.pretrained))
    _freeze(task.model, config.freeze)
    return _fit(config, task, module)


def _freeze(model: torch.nn.Module, patterns: list[str]) -> None:
    """Raises ConfigError where a pattern names no tensor, or nothing is left to train."""
    named = dict(model.named_parameters())
    for pattern in patterns:
        frozen = fnmatch.filter(named, pattern)
        if not frozen:
            parts = ", ".join(f"{name}.*" for name, _ in model.named_children())
            raise ConfigError(f"freeze: {pattern!r} matches no tensor of the model: {parts}")
        for name in frozen:
            named[name].requires_grad_(False)
    trained = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)
    if not trained:
        raise ConfigError("freeze: nothing is left to train")
    if patterns:
        log.info("frozen: all but %.1f of %.1f M", trained / 1e6, sum(map(torch.numel, named.values())) / 1e6)


def _starting_weights(config: TrainConfig) -> Weights | None:
    """What fine-tuning starts from. Raises ConfigError where it is of an architecture whose tensors look alike."""
    if config.weights is None:
        return None
    # A released file does not state its architecture; its coordinates alone are known, and its tensors' shapes.
    weights = read_weights(Path(config.weights), replace(config.model, coordinates=Convention.published))
    for key in ("coordinates", "patch_size", "num_heads", "decoder_heads"):
        theirs, ours = plain(getattr(weights.config, key)), plain(getattr(config.model, key))
        if theirs != ours:
            raise ConfigError(f"model.{key}: is {ours}, that of {config.weights} is {theirs}: set model.{key}={theirs}")
    return weights


def _bank(names: list[str], config: TrainConfig, weights: Weights | None) -> TextBank:
    """By `text.source`: rows of the weights' own bank, or made by their text tower, or else by CLIP or seeds."""
    source = config.text.source
    if weights is None or source in (TextSource.clip, TextSource.seeded):
        if source is TextSource.weights:
            raise ConfigError("text.source: weights needs weights=FILE")
        return TextBank.build(names, config.text, config.model.text_dim)
    if set(names) <= set(weights.bank.names):
        log.info("text bank: rows of that of %s", weights.path)
        return weights.bank.rows(names)
    if weights.tower or source is TextSource.weights:
        log.info("text bank: made by the text tower of %s", weights.path)
        return TextBank.of_tower(names, weights.tower, config.text, weights.path)
    return TextBank.build(names, config.text, config.model.text_dim)


def _module(config: Config, draw: Any, labelled: bool) -> VolumeModule:
    plain_data = replace(config.data, flip=0.0, intensity=0.0)
    return VolumeModule(
        config.data,
        config.run,
        draw=functools.partial(draw, data=config.data),
        val_draw=functools.partial(draw, data=plain_data),
        labelled=labelled,
    )


def _check_regions(module: VolumeModule, config: TrainConfig) -> None:
    lacking = [record.key for record in module.train_corpus.records if Member.REGIONS.value not in record.members]
    if config.prompts.pseudo_per_volume and lacking:
        raise ConfigError(
            f"prompts.pseudo_per_volume: {len(lacking)} samples (first: {lacking[0]}) have no pseudo-label regions: "
            "pack with regions.enabled=true, or set prompts.pseudo_per_volume=0"
        )


def _seed(config: Config) -> None:
    """Seeds the initial weights; everything later is drawn from the samples' own rngs."""
    # Lightning's own lines (devices found, advice) repeat what the configuration says.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.run.cpu_threads:
        torch.set_num_threads(config.run.cpu_threads)
        # Lightning's launcher sets a number of its own where it does not find one here.
        os.environ["OMP_NUM_THREADS"] = str(config.run.cpu_threads)
    torch.manual_seed(config.data.seed)


def _fit(config: Config, task: Task, module: VolumeModule) -> Path:
    """Raises LockedError where another process writes to the run folder."""
    # Until there is a trainer, Lightning takes the first rank of every node for rank 0.
    setattr(rank_zero_only, "rank", 1 if rank_named() else 0)  # noqa: B010, it is declared as a function
    # The other ranks of the job are started by, or beside, the one that holds the folder.
    with nullcontext() if rank_named() else FolderLock(Path(config.run.out)):
        return _fitted(config, task, module)


def _fitted(config: Config, task: Task, module: VolumeModule) -> Path:
    out = Path(config.run.out)
    last = out / "checkpoints" / "last.ckpt"
    start = start_of(config, module)
    if start.checkpoint is not None and start.step >= config.optim.max_steps:
        log.info("%s: already at step %d of %d, nothing to do", out, start.step, config.optim.max_steps)
        return start.checkpoint
    last.parent.mkdir(parents=True, exist_ok=True)
    _write_records(config, start)
    if strategies.run_device(config.run).type == "cpu":
        strategies.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.run.tf32 else "highest")
    if config.run.compile:
        strategies.compile_parts(task, config.run)
    with StopSignal() as stop, _quiet():
        trainer = _trainer(config, out, start.step, stop)
        task.sharding = getattr(trainer.strategy, "sharding", Sharding())
        # DeepSpeed would hook the modules once for validation and again for training.
        if start.checkpoint is None and config.run.strategy not in strategies.STAGES:
            trainer.validate(task, datamodule=module, verbose=False, weights_only=True)
        trainer.fit(task, datamodule=module, ckpt_path=start.checkpoint, weights_only=True)
        writer(trainer).wait()
    loggers.finish(trainer.loggers)
    return last


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning advises for other programs than this."""
    with warnings.catch_warnings():
        # It advises on loaders of map-style data sets; ours is a stream whose workers are set by config.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # A resumed run's folder is not empty, and should not be.
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # Lightning's own use of torch.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        # Outside of a job, on a machine that has SLURM, the ranks are started without srun.
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
        yield


@rank_zero_only
def _write_records(config: Config, start: Start) -> None:
    out = Path(config.run.out)
    if not config.run.resume:
        set_aside(out / "checkpoints")
    write_manifest(out, to_yaml(config), start.step, start.changed)


def _trainer(config: Config, out: Path, done: int, stop: StopSignal) -> pl.Trainer:
    run = config.run
    return pl.Trainer(
        **strategies.trainer_placement(run),
        precision=strategies.trainer_precision(run),
        deterministic=run.deterministic,
        max_steps=config.optim.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=config.optim.clip_norm or None,
        val_check_interval=(run.val_every or config.optim.max_steps) * run.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=run.val_batches * run.accumulate,
        num_sanity_val_steps=0,
        # FSDP2 landmarks the weights that it gathers, which tensors of the inference mode do not let it.
        inference_mode=run.strategy is not Strategy.fsdp,
        log_every_n_steps=run.log_every,
        logger=loggers.loggers(out, config.track, done),
        callbacks=[StartUp(config), *_callbacks(config, out, stop)],
        plugins=[AtomicCheckpointIO(), *strategies.environments()],
        default_root_dir=str(out),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _callbacks(config: Config, out: Path, stop: StopSignal) -> list[Callback]:
    run = config.run
    checkpoints = Checkpoints(out / "checkpoints", run)
    watching = [Throughput(run.log_every, Load.of(config, strategies.run_device(run))), ValidationLine()]
    watching += [ValidationDice(), GradientNorm(run.log_every), CorpusSize()]
    if run.profile:
        watching.append(Profile(run.profile, out))
    # Before what saves: a run that ends for NaN saves nothing more.
    surviving = [
        FiniteSteps(run.max_bad_steps),
        Watchdog(out / "ranks", run.hang_timeout),
        Preemption(stop, checkpoints, run.requeue),
        checkpoints,
    ]
    return [StreamPosition(), DataHealth(run.log_every, config.data.max_bad_fraction), *watching, *surviving]
