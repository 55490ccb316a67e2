"""Where a start of a run goes on from, and whether it may.

1. `last.ckpt`, where it is whole; else the newest whole checkpoint beside it, which is said.
2. Configuration, samples and category names must be those that the run began on; what differs is refused in one line.
   Folders may have moved; a run may be made longer.
3. What may differ but shows in the losses, such as the precision, is said.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segvol_pl.config import PretrainConfig, TrainConfig
from segvol_pl.config.loader import changes, differences, plain
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.errors import CheckpointError, ConfigError
from segvol_pl.model.checkpoint import read_checkpoint
from segvol_pl.run_folder import read_metrics

log = logging.getLogger(__name__)

Config = PretrainConfig | TrainConfig

SAID = (
    "run.precision",
    "run.tf32",
    "run.deterministic",
    "run.strategy",
    "run.custom_strategy",
    "data.shards",
    "data.mix",
)
"""Keys that may change, and whose change is said: losses then agree to rounding, or folders have moved."""
LENGTH = "optim.max_steps"
REMEDY = "give what the run began with, another run.out, or run.resume=false to begin anew"


@dataclass(frozen=True)
class Start:
    """From which step, and which checkpoint, a run goes on: 0 and none where it begins."""

    step: int = 0
    checkpoint: Path | None = None
    changed: tuple[str, ...] = ()
    """`key before -> now` of what differs from the start before."""


def start_of(config: Config, module: VolumeModule) -> Start:
    """How this start of `config.run.out` begins. Raises ConfigError where the run may not go on so."""
    folder = Path(config.run.out) / "checkpoints"
    if not config.run.resume:
        return Start()
    found = newest_whole(folder)
    if found is None:
        _refuse_lost_run(config, folder)
        return Start()
    path, checkpoint = found
    changed = _check_configuration(config, checkpoint["hyper_parameters"]["config"])
    _check_data(config, module, checkpoint)
    step = int(checkpoint["global_step"])
    log.info("going on from step %d of %s", step, path)
    return Start(step, path, changed)


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """`last.ckpt` and what it holds, or the newest whole one of the others; none where there is no checkpoint.

    Raises CheckpointError where there are some, but none is whole.
    """
    last = folder / "last.ckpt"
    whole: dict[Path, dict[str, Any]] = {}
    damage: list[CheckpointError] = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path != last, path)):
        try:
            check_whole(path)
            whole[path] = read_checkpoint(path, mapped=True)
        except CheckpointError as error:
            damage.append(error)
        if last in whole:
            return last, whole[last]
    if whole:
        path = max(whole, key=lambda path: int(whole[path]["global_step"]))
        log.warning("%s: going on from %s", damage[0] if last.exists() else f"{last} is not there", path.name)
        return path, whole[path]
    if damage:
        raise CheckpointError(f"{damage[0]}; no other checkpoint beside it is whole: put one back, or {REMEDY}")
    return None


def check_whole(path: Path) -> None:
    """Reads a checkpoint through once. Raises CheckpointError where a byte is not what was written.

    torch writes a checksum of every tensor into the file, and does not look at it when it loads.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error or 'cut short'})") from error
    if altered:
        raise CheckpointError(f"{path}: is damaged (its checksum of {altered} does not hold)")


def _refuse_lost_run(config: Config, folder: Path) -> None:
    """A run that has saved, and whose checkpoints are all gone, is not begun again over its own records."""
    metrics = folder.parent / "metrics.csv"
    logged = max((step for step, _ in read_metrics(metrics, "train/loss")), default=0) if metrics.exists() else 0
    # One interval may have passed before the first save was on the disk.
    if logged >= 2 * config.run.checkpoint_every:
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
            "%s %s -> %s: the learning rate goes on as the schedule of the new length has it at this step",
            *(LENGTH, *changed[LENGTH]),
        )
    for key in (key for key in SAID if key in changed):
        log.warning("%s %s -> %s since the start before", key, *changed[key])
    return tuple(f"{key} {old} -> {new}" for key, (old, new) in changed.items())


def _check_data(config: Config, module: VolumeModule, checkpoint: dict[str, Any]) -> None:
    held = checkpoint.get(VolumeModule.__qualname__, {})
    before = checkpoint["hyper_parameters"].get("categories", module.categories)
    if problem := _names_that_differ(before, module.categories) or module.differs(held):
        raise ConfigError(f"run.out: {config.run.out} holds a run that was trained on other data: {problem}: {REMEDY}")


def _names_that_differ(before: list[str], now: list[str]) -> str:
    """What became of the categories, by name: rows of the text bank belong to names."""
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    parts = [f"{what} {', '.join(names[:5])}" for what, names in (("without", gone), ("with the new", new)) if names]
    return f"data.shards is now {' and '.join(parts)}" if parts else ""


def set_aside(folder: Path) -> None:
    """Moves an earlier run's checkpoints to `folder`/earlier-N: a new run neither counts nor overwrites them."""
    found = sorted(folder.glob("*.ckpt"))
    if not found:
        return
    number = 1 + len(list(folder.glob("earlier-*")))
    place = folder / f"earlier-{number}"
    place.mkdir()
    for path in found:
        path.rename(place / path.name)
    log.warning("run.resume=false: %d checkpoints of the earlier run are now in %s", len(found), place)
