"""A training run: data, task, trainer, run folder.

1. The configuration and the manifest are written to the run folder.
2. If the folder holds a checkpoint of the same configuration and data, the run continues from it, see `resume`; with
   `run.branch_from` it otherwise continues from a checkpoint of another run.
3. Validation also runs before the first step, so that every curve has its start (except with DeepSpeed).
4. `checkpoints/last.ckpt` is the newest state, see `checkpoints`.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from segvol_pl.config import Balance, CheckpointFormat, Convention, PretrainConfig, Strategy, TextSource, TrainConfig
from segvol_pl.config.categories import synonyms_among
from segvol_pl.config.loader import plain, to_yaml
from segvol_pl.data import sampling
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import Folder, category_names, labelled_by, open_folders, training_corpus
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.schema import Member
from segvol_pl.errors import ConfigError
from segvol_pl.folder_lock import FolderLock
from segvol_pl.hub import local
from segvol_pl.imaging.prompts import landmark_function
from segvol_pl.journal import Journal
from segvol_pl.launched import rank_named
from segvol_pl.model import lora
from segvol_pl.model.checkpoint import Weights, load_encoder, load_weights, read_weights
from segvol_pl.model.text_encoder import TextBank
from segvol_pl.run_folder import write_manifest
from segvol_pl.training import loggers, peers, postmortem, strategies, watchdog
from segvol_pl.training.averages import AveragedValidation
from segvol_pl.training.callbacks import DataHealth, Load, Profile, StreamPosition, Throughput, ValidationLine
from segvol_pl.training.checkpoints import AtomicCheckpointIO, Checkpoints, writer
from segvol_pl.training.early_stop import EarlyStop, end_of
from segvol_pl.training.gradients import FiniteSteps, GradientNorm
from segvol_pl.training.module import Sharding, Task
from segvol_pl.training.out_of_memory import MemorySnapshot, OutOfMemoryNamed, check_snapshots
from segvol_pl.training.preemption import Preemption, StopSignal
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.recorder import Recorder, RecordingTrainer
from segvol_pl.training.resume import Start, set_aside, start_of
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.startup import StartUp, check_open_files
from segvol_pl.training.stragglers import Stragglers
from segvol_pl.training.validation import CorpusSize, ValidationBySource, ValidationDice
from segvol_pl.training.watchdog import Watchdog, watched

log = logging.getLogger(__name__)

Config = PretrainConfig | TrainConfig

NAMED = 5
"""Volumes that a message names."""


def pretrain(config: PretrainConfig) -> Path:
    """Run SimMIM pre-training.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: a key does not fit the data or the machine.
        ShardError: the shards cannot be read, or too many samples are damaged.
    """
    return _fit(config, *prepared(config))


def train(config: TrainConfig) -> Path:
    """Run supervised training.

    Returns:
        The last checkpoint.

    Raises:
        ConfigError: a key does not fit the data, the weights or the machine.
        ShardError: the shards cannot be read, or too many samples are damaged.
        CheckpointError: the weights or the checkpoint cannot be read.
    """
    return _fit(config, *prepared(config))


def prepared(config: Config, device: str = "cpu") -> tuple[Task, VolumeModule]:
    """Make the task and the data of a run, with its starting weights. Raises as `pretrain` and `train`.

    device: of the weights; on `meta` they have neither values nor memory.
    """
    if isinstance(config, TrainConfig):
        return _prepared_train(config, device)
    folders = open_folders(config.data)
    sample = functools.partial(sampling.sample_simmim, model=config.model, mask_ratio=config.mask_ratio)
    module = _module(config, folders, sample, sample, labelled=False)
    _seed(config)
    with torch.device(device):
        return SimMIMTask(config), module


def _prepared_train(config: TrainConfig, device: str) -> tuple[Task, VolumeModule]:
    for name in config.model.landmark_counts:
        landmark_function(name)
    folders = open_folders(config.data)
    weights = _starting_weights(config)
    kept = weights.categories if weights is not None and config.keep_categories else []
    categories = sorted({*category_names(folders), *kept})
    synonyms = _synonyms(categories, config, weights)
    sample = functools.partial(
        sampling.sample_segmentation,
        model=config.model,
        row_of={name: row for row, name in enumerate(categories)},
    )
    balance = config.prompts.balance
    counts = training_corpus(folders, config.data, labelled=True).per_category() if balance is not Balance.none else {}
    weights_of = sampling.category_weights(counts, balance)
    # Validation compares runs that train differently: all combinations, categories that are there, by their own name,
    # no masks.
    all_prompts = replace(config.prompts, per_category=0, absent_fraction=0.0, absent=0.0, mask_fraction=0.0)
    module = _module(
        config,
        folders,
        functools.partial(
            sample,
            prompts=config.prompts,
            weights=weights_of,
            labelled_by=labelled_by(folders),
            synonym_rows=_synonym_rows(categories, synonyms),
        ),
        functools.partial(sample, prompts=all_prompts),
        labelled=True,
    )
    module.categories, module.synonyms = categories, synonyms
    _check_regions(module, config)
    check_categories(module, config)
    bank = _bank(categories, synonyms, config, weights)
    _seed(config)
    with torch.device(device):
        task = SegVolTask(config, bank)
    if weights is not None:
        log.info("model: %s", load_weights(task.model, weights, config.allow))
    if config.pretrained is not None:
        log.info("image encoder: %s", load_encoder(task.model.image_encoder, config.pretrained))
    _freeze(task.model, config)
    return task, module


def _freeze(model: torch.nn.Module, config: TrainConfig) -> None:
    """Freeze what does not train, and add adapters (`optim.lora_rank`).

    Raises ConfigError if a pattern of `freeze` matches no tensor, or if nothing is left to train.
    """
    patterns = config.freeze
    named = dict(model.named_parameters())
    for pattern in patterns:
        frozen = fnmatch.filter(named, pattern)
        if not frozen:
            parts = ", ".join(f"{name}.*" for name, _ in model.named_children())
            raise ConfigError(f"freeze: {pattern!r} matches no tensor of the model; try {parts}")
        for name in frozen:
            named[name].requires_grad_(False)
    # After the patterns: adapters train whatever of the encoder is frozen.
    if config.adapted:
        optim = config.optim
        lora.adapt(model, config.adapted, optim.lora_rank, optim.lora_alpha)
        layers = f"{len(config.adapted)} layers of the image encoder ({', '.join(optim.lora_targets)})"
        log.info("adapters: rank %d, on %s", optim.lora_rank, layers)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    if not trained:
        raise ConfigError("freeze: nothing is left to train")
    if patterns or config.adapted:
        log.info("frozen: all but %.1f of %.1f M", trained / 1e6, sum(size for size, _ in sizes) / 1e6)


def _starting_weights(config: TrainConfig) -> Weights | None:
    """The weights to fine-tune. Raises ConfigError if their architecture differs in what tensor shapes do not show."""
    if config.weights is None:
        return None
    # A released file does not state its architecture: only its coordinates and the shapes of its tensors are known.
    weights = read_weights(local(config.weights), replace(config.model, coordinates=Convention.published))
    for key in ("coordinates", "patch_size", "num_heads", "decoder_heads"):
        theirs, ours = plain(getattr(weights.config, key)), plain(getattr(config.model, key))
        if theirs != ours:
            raise ConfigError(f"model.{key}: {ours}, but {config.weights} has {theirs}: set model.{key}={theirs}")
    return weights


def _synonyms(categories: list[str], config: TrainConfig, weights: Weights | None) -> dict[str, str]:
    """Synonym -> category, sorted: those of `text.synonyms`, and those of the weights for the same categories.

    Raises CaseError for a file that cannot be read, or that lists a category of this run as a synonym.
    """
    listed = {} if config.text.synonyms is None else synonyms_among(config.text.synonyms, categories)
    held = {} if weights is None else weights.synonyms
    kept = {other: name for other, name in held.items() if name in categories and other not in categories}
    return dict(sorted({**kept, **listed}.items()))


def _synonym_rows(categories: list[str], synonyms: Mapping[str, str]) -> dict[str, list[int]]:
    """Category -> rows of its synonyms in the text bank, where they come after all categories."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(synonyms.values(), start=len(categories)):
        found.setdefault(name, []).append(row)
    return found


def _bank(names: list[str], synonyms: Mapping[str, str], config: TrainConfig, weights: Weights | None) -> TextBank:
    """By `text.source`: rows of the weights' text bank, or embeddings of their text tower, of CLIP, or by seed.

    With `keep_categories`, or if the weights have all categories, texts that the weights have keep their rows, and only
    the others are made.
    """
    texts = [*names, *synonyms]
    if weights is None or not (config.keep_categories or _has_all(names, config, weights)):
        return _made(texts, config, weights).rows(names, synonyms)
    held = weights.bank
    new = [text for text in texts if text not in held.texts]
    if not new:
        log.info("text bank: from %s", weights.path)
        return held.rows(names, synonyms)
    made = _made(new, config, weights)
    vectors_KE = torch.cat([held.vectors_KE[: len(held.texts)], made.vectors_KE.to(held.vectors_KE.dtype)])
    return TextBank([*held.texts, *new], vectors_KE).rows(names, synonyms)


def _has_all(names: list[str], config: TrainConfig, weights: Weights) -> bool:
    """Whether `text.source` lets the weights' text bank be used, and it has all these names."""
    return config.text.source not in (TextSource.clip, TextSource.seeded) and set(names) <= set(weights.bank.texts)


def _made(texts: list[str], config: TrainConfig, weights: Weights | None) -> TextBank:
    """Vectors of these texts by the weights' text tower, by CLIP, or by seed."""
    source = config.text.source
    if weights is None and source is TextSource.weights:
        raise ConfigError("text.source: weights needs weights=FILE")
    has_tower = weights is not None and bool(weights.tower) and source is TextSource.auto
    if weights is not None and (has_tower or source is TextSource.weights):
        log.info("text bank: computed by the text tower of %s", weights.path)
        return TextBank.of_tower(texts, weights.tower, config.text, weights.path)
    return TextBank.build(texts, config.text, config.model.text_dim)


def _module(
    config: Config,
    folders: list[Folder],
    sample: Callable[..., Arrays],
    val_sample: Callable[..., Arrays],
    labelled: bool,
) -> VolumeModule:
    unaugmented = replace(config.data, flip=0.0, intensity=0.0)
    return VolumeModule(
        config.data,
        config.run,
        draw=functools.partial(sample, data=config.data),
        val_draw=functools.partial(val_sample, data=unaugmented),
        labelled=labelled,
        folders=folders,
    )


def _check_regions(module: VolumeModule, config: TrainConfig) -> None:
    parts = [part.records.lacking(Member.REGIONS.value) for part in module.train_corpus.parts]
    lacking = [part for part in parts if len(part)]
    if config.prompts.pseudo_per_volume and lacking:
        raise ConfigError(
            f"prompts.pseudo_per_volume: {sum(map(len, lacking))} samples (first: {lacking[0][0].key}) have no "
            "pseudo-label regions: pack with regions.enabled=true, or set prompts.pseudo_per_volume=0"
        )


def check_categories(module: VolumeModule, config: TrainConfig) -> None:
    """Name the labelled volumes that hold no category. Without pseudo-labels they bring no prompt: their loss is 0.

    Raises ConfigError if no volume brings a prompt.
    """
    if config.prompts.pseudo_per_volume or config.prompts.absent:
        return
    parts = [part.records for part in module.train_corpus.parts]
    empty = [part.where(part.column("categories").sum(axis=1) == 0) for part in parts]
    count, volumes = sum(map(len, empty)), sum(map(len, parts))
    if not count:
        return
    keys = [record.key for part in empty for record in part[:NAMED]][:NAMED]
    found = f"{count} of {volumes} labelled volumes hold no category ({', '.join(keys)}{', ...' * (count > NAMED)})"
    if count == volumes:
        raise ConfigError(
            f"data.shards: {found}, so that no batch has a prompt: check the values of the categories they were packed "
            "with, or set prompts.pseudo_per_volume"
        )
    log.warning("data.shards: %s: without pseudo-labels, a batch of them has no prompt and trains nothing", found)


def _seed(config: Config) -> None:
    """Seed the initial weights. All later randomness comes from the random generator of each sample."""
    # Lightning's own log lines (devices found, advice) repeat the configuration.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.run.cpu_threads:
        torch.set_num_threads(config.run.cpu_threads)
        # If this is not set, Lightning's launcher sets a number of its own.
        os.environ["OMP_NUM_THREADS"] = str(config.run.cpu_threads)
    torch.manual_seed(config.data.seed)


def _fit(config: Config, task: Task, module: VolumeModule) -> Path:
    """Hold the run folder, and train. Raises LockedError if another process writes to the run folder."""
    if config.run.rehearse:
        raise ConfigError("run.rehearse: only the commands train and pretrain rehearse: leave it out here")
    # Until there is a trainer, Lightning assumes that the first rank of every node is rank 0.
    setattr(rank_zero_only, "rank", 1 if rank_named() else 0)  # noqa: B010, it is declared as a function
    # Only rank 0 takes the lock: the other ranks belong to the same job.
    with nullcontext() if rank_named() else FolderLock(Path(config.run.out)):
        return _fitted(config, task, module)


def _fitted(config: Config, task: Task, module: VolumeModule) -> Path:
    out = Path(config.run.out)
    start = start_of(config, module)
    if start.checkpoint is not None and start.step >= config.optim.max_steps:
        log.info("%s: already at step %d of %d, nothing to do", out, start.step, config.optim.max_steps)
        return start.checkpoint
    if start.checkpoint is not None and start.stopped:
        log.info("%s: at step %d, %s: nothing to do (run.early_stop=0 trains on)", out, start.step, start.stopped)
        return start.checkpoint
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    journal = Journal(out, rank=1 if rank_named() else 0)
    _write_records(config, start, journal)
    recorder = Recorder(journal, config.run.log_every)
    with recorder.watched(), peers.one_voice(out):
        return _trained(config, task, module, start, recorder)


def _trained(config: Config, task: Task, module: VolumeModule, start: Start, recorder: Recorder) -> Path:
    if strategies.run_device(config.run).type == "cpu":
        strategies.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if config.run.tf32 else "highest")
    if config.run.compile:
        strategies.compile_parts(task, config.run)
    if config.run.devices * config.run.nodes > 1:
        check_open_files(config.run.devices * config.run.nodes)
    check_snapshots(config.run, strategies.run_device(config.run))
    with StopSignal() as stop, _quiet(), OutOfMemoryNamed(config, task):
        postmortem.record_collectives()
        trainer = _trainer(config, start, stop, recorder)
        task.sharding = getattr(trainer.strategy, "sharding", Sharding())
        with watched(trainer), _interruptions():
            # DeepSpeed would add its hooks to the modules twice: for validation, and again for training.
            if start.checkpoint is None and config.run.strategy not in strategies.STAGES:
                trainer.validate(task, datamodule=module, verbose=False, weights_only=True)
            trainer.fit(task, datamodule=module, ckpt_path=start.checkpoint, weights_only=True)
            with recorder.saving():
                writer(trainer).wait()
    why = end_of(trainer, config.run)
    if why:
        log.info("step %d of %d: %s", trainer.global_step, config.optim.max_steps, why)
    recorder.done(why)
    loggers.finish(trainer.loggers)
    return Path(config.run.out) / "checkpoints" / "last.ckpt"


@contextmanager
def _interruptions() -> Iterator[None]:
    """Let Ctrl-C end training as it ends every other command: Lightning would end the process with status 1."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings of Lightning that do not apply here."""
    with warnings.catch_warnings():
        # The number of loader processes is set by data.workers.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # The folder of a resumed run is not empty.
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        # A run may continue without run.early_stop, whose state is in its checkpoints.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")
        # Lightning itself uses the deprecated class.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        # Outside a SLURM job the ranks are started without srun, even if SLURM is installed.
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
        # A single process writes and reads sharded checkpoints too.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@rank_zero_only
def _write_records(config: Config, start: Start, journal: Journal) -> None:
    out = Path(config.run.out)
    if not config.run.resume:
        set_aside(out / "checkpoints")
    peers.begin(out)
    watchdog.begin(out)
    write_manifest(out, to_yaml(config), start.step, start.changed)
    journal.start(start.step, config.optim.max_steps, config.run.resume)


def _trainer(config: Config, start: Start, stop: StopSignal, recorder: Recorder) -> pl.Trainer:
    run, out = config.run, Path(config.run.out)
    return RecordingTrainer(
        recorder,
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
        # FSDP2 sets attributes on the weights that it gathers, which inference mode forbids.
        inference_mode=run.strategy is not Strategy.fsdp,
        log_every_n_steps=run.log_every,
        logger=loggers.loggers(out, config.track, start.step),
        callbacks=_callbacks(config, start, stop, recorder),
        plugins=[
            AtomicCheckpointIO(run.checkpoint_format is CheckpointFormat.sharded, strategies.waiting_time(run)),
            *strategies.environments(),
        ],
        default_root_dir=str(out),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _callbacks(config: Config, start: Start, stop: StopSignal, recorder: Recorder) -> list[Callback]:
    """All callbacks. Lightning calls them in this order, on which the run's correctness depends."""
    run, out = config.run, Path(config.run.out)
    checkpoints = Checkpoints(out / "checkpoints", run, start.branched)
    dice = ValidationDice()
    throughput = Throughput(run.log_every, Load.of(config, strategies.run_device(run)))
    return [
        # First: ranks that differ must end before any other callback communicates.
        StartUp(config),
        # Before everything that may save or end the run after a batch: a checkpoint holds this position in the data.
        StreamPosition(),
        # Before the loggers: a step on too much damaged data ends the run and is not reported.
        DataHealth(run.log_every, config.data.max_bad_fraction),
        # Before the callbacks that communicate or save when a batch starts: that time is not waiting for data.
        throughput,
        # After Throughput: it compares what that has just measured.
        Stragglers(throughput, run),
        # The next ones only log: their place among each other is free.
        ValidationLine(averaged=config.optim.ema > 0),
        dice,
        *([EarlyStop(run, dice)] if run.early_stop else []),
        # After ValidationDice, whose figures it divides.
        *([ValidationBySource(dice)] if config.data.mix else []),
        GradientNorm(run.log_every),
        CorpusSize(),
        *([Profile(run.profile, out)] if run.profile else []),
        *([MemorySnapshot(out)] if run.memory_snapshot else []),
        # Before Preemption and Checkpoints: a run that ends because of NaN must save nothing more.
        FiniteSteps(run.max_bad_steps),
        # Before what saves when a validation ends: it puts the weights back.
        *([AveragedValidation()] if config.optim.ema else []),
        # After all that communicates or reads results when a validation ends, and before what saves then.
        recorder,
        # Before Preemption and Checkpoints: a rank that hangs in them has already reported its batch.
        Watchdog(out, run.hang_timeout, recorder.hung),
        # Before Checkpoints: all ranks agree here whether the checkpoint is due that Checkpoints then saves.
        Preemption(stop, checkpoints, run.requeue, recorder),
        # Last: it saves the state after all other callbacks have updated theirs.
        checkpoints,
    ]
