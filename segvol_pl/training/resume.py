"""Which checkpoint a run resumes from, and whether it may.

1. It resumes from `last.ckpt` if that is intact, else from the newest intact checkpoint next to it, with a warning.
2. Configuration, samples, category names and synonyms must be those of the run's first start; a difference is refused
   in one line. Folders may have moved, and a run may be made longer.
3. A change that is allowed but shows in the losses, such as the precision, is logged.
4. A branch (`run.branch_from`) begins from another run's checkpoint. It may differ in what has not had an effect until
   that step: the length, and the decay of the schedule wsd. From its own first checkpoint on it is a run as any other.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segvol_pl import run_folder
from segvol_pl.config import PretrainConfig, TrainConfig
from segvol_pl.config.loader import changes, differences, flat, plain
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.errors import CheckpointError, ConfigError
from segvol_pl.model.checkpoint import read_header
from segvol_pl.model.sharded import HEADER, check_parts
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.early_stop import why_stopped

log = logging.getLogger(__name__)

Config = PretrainConfig | TrainConfig

LOGGED = (
    "run.precision",
    "run.tf32",
    "run.deterministic",
    "run.strategy",
    "run.custom_strategy",
    "data.shards",
    "data.mix",
    "text.synonyms",
)
"""Keys that may change with a warning: losses then agree up to rounding, or files have moved."""
LENGTH = "optim.max_steps"
BRANCHES = (LENGTH, "optim.decay_share", "optim.decay_shape")
"""Keys in which a branch may differ from its trunk."""
REMEDY = "restore the original settings, choose another run.out, or set run.resume=false to start over"


@dataclass(frozen=True)
class Start:
    """The step and checkpoint that a run resumes from: 0 and None for a new run."""

    step: int = 0
    checkpoint: Path | None = None
    changed: tuple[str, ...] = ()
    """`key before -> now` for each key that differs from the previous start, or from the trunk."""
    branched: bool = False
    """Whether the checkpoint is another run's."""
    stopped: str = ""
    """Why the run has ended before its last step, see `early_stop`; empty if it continues."""


def start_of(config: Config, module: VolumeModule) -> Start:
    """Where this start of the run in `config.run.out` resumes. Raises ConfigError if it may not resume."""
    folder, trunk = Path(config.run.out) / "checkpoints", config.run.branch_from
    found = newest_intact(folder) if config.run.resume else None
    if found is None and trunk is not None:
        start = _branch_of(config, module, Path(trunk))
        if config.run.resume:
            _refuse_lost_run(config, folder, start.step)
        return start
    if found is None:
        if config.run.resume:
            _refuse_lost_run(config, folder)
        return Start()
    path, checkpoint = found
    changed = _check_configuration(config, _stated(config, checkpoint))
    _check_data(config, module, checkpoint)
    step = int(checkpoint["global_step"])
    stopped = why_stopped(config.run, checkpoint.get("callbacks", {}))
    if not stopped:
        log.info("resuming from step %d of %s", step, path)
    return Start(step, path, changed, stopped=stopped)


def _stated(config: Config, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint. A key that is newer than the checkpoint has its default."""
    stated: dict[str, Any] = checkpoint["hyper_parameters"]["config"]
    return {**flat(plain(type(config)())), **flat(stated)}


def _branch_of(config: Config, module: VolumeModule, path: Path) -> Start:
    """The start of a branch from a checkpoint of its trunk. Raises ConfigError or CheckpointError if it may not be."""
    if not path.exists():
        raise CheckpointError(f"run.branch_from: {path}: no such checkpoint: has the other run come to this step?")
    check_intact(path)
    checkpoint = read_header(path)
    step, before, now = int(checkpoint["global_step"]), _stated(config, checkpoint), plain(config)
    refused = [text for text in differences(before, now) if not text.startswith(BRANCHES)]
    if refused:
        allowed = f"only {', '.join(BRANCHES)} and run.* may differ"
        raise ConfigError(f"run.branch_from: {path} is of a run with {', '.join(refused[:5])}: {allowed}")
    shape = {key.removeprefix("optim."): before[key] for key in BRANCHES}
    for of, optim in (("its run", replace(config.optim, **shape)), ("this run", config.optim)):
        if optim.decay_start < step:
            raise ConfigError(
                f"run.branch_from: {path} is of step {step}, and the decay of {of} begins at step {optim.decay_start} "
                f"(optim.decay_share={optim.decay_share}): take an earlier checkpoint"
            )
    _check_data(config, module, checkpoint)
    log.info("branching from step %d of %s", step, path)
    return Start(step, path, _listed(changes(before, now)), branched=True)


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """`last.ckpt` or the newest other intact checkpoint, and what it holds besides tensors; None if there is none.

    Raises CheckpointError if there are checkpoints, but none is intact.
    """
    last = folder / "last.ckpt"
    intact: dict[Path, dict[str, Any]] = {}
    damage: list[CheckpointError] = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path != last, path)):
        try:
            check_intact(path)
            intact[path] = read_header(path)
        except CheckpointError as error:
            damage.append(error)
        if last in intact:
            return last, intact[last]
    if intact:
        path = max(intact, key=lambda path: int(intact[path]["global_step"]))
        log.warning("%s: resuming from %s", damage[0] if last.exists() else f"{last} is missing", path.name)
        return path, intact[path]
    if damage:
        raise CheckpointError(f"{damage[0]}; no other checkpoint is intact: put one back, or {REMEDY}")
    return None


def check_intact(path: Path) -> None:
    """Read a checkpoint completely. Raises CheckpointError if a byte differs from what was written.

    torch writes a checksum of every tensor into the file, but does not check it when loading.
    """
    file = path / HEADER if path.is_dir() else path
    if path.is_dir():
        check_parts(path)
    try:
        with zipfile.ZipFile(file) as archive:
            altered = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error or 'truncated'})") from error
    if altered:
        raise CheckpointError(f"{path}: is damaged (wrong checksum of {altered})")


def _refuse_lost_run(config: Config, folder: Path, begun: int = 0) -> None:
    """Raise ConfigError if a run has saved, but all its checkpoints are gone: its records are not overwritten.

    begun: the step that the run begins at.
    """
    metrics = folder.parent / "metrics.csv"
    logged = max((step for step, _ in read_metrics(metrics, "train/loss")), default=0) if metrics.exists() else 0
    # One interval may have passed before the first save was on the disk.
    if logged - begun >= 2 * config.run.checkpoint_every:
        raise ConfigError(
            f"run.out: {folder.parent} holds a run that came to step {logged}, and no checkpoint: put one back as "
            f"{folder / 'last.ckpt'}, or {REMEDY}"
        )


def _check_configuration(config: Config, before: dict[str, Any]) -> tuple[str, ...]:
    now = plain(config)
    changed = changes(before, now)
    longer = LENGTH in changed and changed[LENGTH][1] > changed[LENGTH][0]
    refused = [text for text in differences(before, now) if not (longer and text.startswith(LENGTH))]
    if refused:
        raise ConfigError(f"run.out: {config.run.out} holds a run with {', '.join(refused[:5])}: {REMEDY}")
    if longer:
        log.warning(
            "%s %s -> %s: the learning rate continues on the schedule of the new length",
            *(LENGTH, *changed[LENGTH]),
        )
    for key in (key for key in LOGGED if key in changed):
        log.warning("%s %s -> %s since the previous start", key, *changed[key])
    return _listed(changed)


def _listed(changed: dict[str, tuple[Any, Any]]) -> tuple[str, ...]:
    return tuple(f"{key} {old} -> {new}" for key, (old, new) in changed.items())


def _check_data(config: Config, module: VolumeModule, checkpoint: dict[str, Any]) -> None:
    held = checkpoint.get(VolumeModule.__qualname__, {})
    stated = checkpoint["hyper_parameters"]
    names = _names_that_differ("data.shards", stated.get("categories", module.categories), module.categories)
    before, now = (
        [f"{other} of {name}" for other, name in found.items()]
        for found in (stated.get("synonyms", {}), module.synonyms)
    )
    if problem := names or _names_that_differ("text.synonyms", before, now) or module.differs(held):
        raise ConfigError(
            f"run.out: {config.run.out} holds a run that was trained on different data: {problem}: {REMEDY}"
        )


def _names_that_differ(key: str, before: list[str], now: list[str]) -> str:
    """How the texts of a key differ, by name (rows of the text bank belong to names); empty if they are equal."""
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    parts = [f"{what} {', '.join(names[:5])}" for what, names in (("without", gone), ("with the new", new)) if names]
    return f"{key} is now {' and '.join(parts)}" if parts else ""


def set_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints to `folder`/earlier-N: a new run neither counts nor overwrites them."""
    found = sorted(folder.glob("*.ckpt"))
    if place := run_folder.set_aside(found, folder):
        log.warning("run.resume=false: %d checkpoints of the earlier run are now in %s", len(found), place)
