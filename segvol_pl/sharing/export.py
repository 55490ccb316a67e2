"""Writes a model for others (command `export`).

1. A file is written by `model.convert`.
2. A folder is made under another name, part after part, and renamed when it is complete.
3. The folder is uploaded to the hub, if one is named. That this is allowed is tried before any other work.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from segvol_pl.atomic import part_name
from segvol_pl.config import ExportConfig, ExportFormat, ExportWeights
from segvol_pl.config.sharing import FILES
from segvol_pl.errors import CheckpointError, ExportError
from segvol_pl.hub import local, make_repository, upload
from segvol_pl.model import convert
from segvol_pl.model.checkpoint import Weights, model_of, read_weights, with_averages, write_weights
from segvol_pl.model.released import read_contents
from segvol_pl.sharing.card import Evaluated, write_card
from segvol_pl.sharing.monai_bundle import write_bundle

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


def export(config: ExportConfig) -> Path:
    """Write the file or folder `config.out`.

    Returns:
        What was written.

    Raises:
        CheckpointError: a file cannot be read, or the model does not fit the published layout.
        ConfigError: a package that the format needs is not installed.
        ExportError: the folder is not empty, or the files are not what the model is.
        HubError: the folder cannot be uploaded; it is complete nevertheless.
    """
    averaged, target = config.weights is ExportWeights.ema, Path(config.out)
    if target.name.endswith(FILES):
        return convert.export(config.source, target, config.published, averaged)
    if target.suffix and config.format is ExportFormat.auto:
        raise CheckpointError(f"{target}: must end in {' or '.join(FILES)}, or be a folder with format=safetensors")
    _refuse_taken(target)
    contents = read_contents(local(config.source))
    weights = read_weights(with_averages(contents) if averaged else contents)
    evaluated = Evaluated.read(Path(str(config.evaluation)), contents.path) if config.card else None
    if config.hub is not None:
        make_repository(config.hub, config.private)
    part = part_name(target)
    try:
        part.mkdir(parents=True)
        _fill(part, weights, config)
        if evaluated is not None:
            write_card(part, weights, contents, evaluated, str(config.license))
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.info("%s: %s", target, ", ".join(sorted(path.name for path in target.iterdir())))
    if config.hub is not None:
        log.info("uploaded: %s", upload(target, config.hub))
    return target


def _refuse_taken(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already: give a new folder, or remove it")


def _fill(folder: Path, weights: Weights, config: ExportConfig) -> None:
    """Write everything into a folder that exists."""
    if config.format is ExportFormat.onnx:
        from segvol_pl.sharing.onnx_files import write_onnx

        write_onnx(model_of(weights), folder)
    elif config.format is ExportFormat.monai:
        write_bundle(weights, folder)
    else:
        write_weights(weights, folder / WEIGHTS)
