"""Converts released weights to this package's format and back (command `import`).

1. `import_weights` reads the published file, accounts for every tensor and writes a .safetensors with the
   configuration, a text bank computed by the file's own CLIP tower, and the tensors that this model does not use.
2. `export` writes a model to .safetensors, or to the published `.pth` layout, so that it runs in the published
   code. `sharing.export` is the command.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from segvol_pl.config import Convention, ImportConfig, SegVolConfig
from segvol_pl.config.categories import load_categories, synonyms_among
from segvol_pl.errors import CheckpointError, listed
from segvol_pl.hub import local
from segvol_pl.model.checkpoint import (
    BANK,
    Weights,
    differences,
    is_exported,
    is_trained,
    load_exactly,
    read_weights,
    with_averages,
    write_safetensors,
    write_weights,
)
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.model.released import Contents, encoder_of, read_contents, write_pth
from segvol_pl.model.segvol import SegVol
from segvol_pl.model.text_encoder import TextBank

log = logging.getLogger(__name__)


def import_weights(config: ImportConfig) -> Path:
    """Convert released weights to a .safetensors for `train`, `evaluate` and `predict`.

    A released image encoder alone becomes a file for `train pretrained=FILE`.

    Returns:
        The written file.

    Raises:
        CheckpointError: the file cannot be read, or is not the configured model.
        CaseError: the categories cannot be read.
        TextError: the tokenizer cannot be loaded.
    """
    target = _checked_target(config.out, (".safetensors",))
    contents = read_contents(local(config.source))
    if is_exported(contents) or is_trained(contents):
        raise CheckpointError(f"{config.source}: was written by segvol-pl; import reads released weights")
    if not any("mask_decoder." in name for name in contents.tensors):
        return _import_encoder(contents, config.model, target)
    weights = read_weights(contents, config.model)
    bank = _bank_of(config, weights)
    model = SegVol(config.model, bank)
    report = load_exactly(model, {**weights.tensors, BANK: bank.vectors_KE}, weights.path, config.allow)
    log.info("%s; %d carried along (text tower, parts never run)", report, len(weights.extra_tensors))
    return write_weights(
        replace(weights, categories=bank.names, synonyms=bank.synonyms, tensors=model.state_dict()), target
    )


def _bank_of(config: ImportConfig, weights: Weights) -> TextBank:
    if config.categories is None:
        log.warning("no categories=FILE: the imported model supports points and boxes, but no text")
        return TextBank.empty(config.model.text_dim)
    names = sorted(load_categories(config.categories))
    synonyms = synonyms_among(config.text.synonyms or config.categories, names)
    bank = TextBank.of_tower([*names, *synonyms], weights.tower, config.text, weights.path)
    return bank.rows(names, synonyms)


def _import_encoder(contents: Contents, config: SegVolConfig, target: Path) -> Path:
    encoder = ImageEncoder(config)
    log.info("image encoder alone: %s", load_exactly(encoder, encoder_of(contents), contents.path))
    return write_safetensors({f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}, target)


def export(source: str | Path, target: str | Path, published: str | Path | None = None, averaged: bool = False) -> Path:
    """Export a model to a self-contained .safetensors, or to the published `.pth` layout.

    Args:
        source: a checkpoint or exported model.
        target: the file to write, .safetensors or .pth.
        published: released weights, or their import, with the parts of the published layout that this model does not
            have: CLIP's text tower, and modules that never run. Not needed if `source` is an import itself.
        averaged: whether to write the averaged weights of a checkpoint (`optim.ema`).

    Returns:
        The written file.

    Raises:
        CheckpointError: a file cannot be read, or the model does not fit the published layout.
    """
    target = _checked_target(target, (".safetensors", ".pth"))
    contents = read_contents(local(source))
    weights = read_weights(with_averages(contents) if averaged else contents)
    extras = weights if published is None else read_weights(local(published), weights.config)
    if target.suffix == ".safetensors":
        return write_weights(replace(weights, extra_tensors=extras.extra_tensors, order=extras.order), target)
    return _export_published(weights, extras, target)


def _export_published(weights: Weights, extras: Weights, target: Path) -> Path:
    if weights.config.coordinates is not Convention.published:
        raise CheckpointError(
            f"{weights.path}: has model.coordinates=consistent; the published code computes the others"
        )
    if not extras.order:
        raise CheckpointError(f"{extras.path}: lacks CLIP's text tower: give the published weights as third argument")
    tensors = {name: value for name, value in {**weights.tensors, **extras.extra_tensors}.items() if name != BANK}
    wanted = {name: value for name, value in {**extras.tensors, **extras.extra_tensors}.items() if name != BANK}
    if lost := [name for name in extras.order if name not in tensors]:
        raise CheckpointError(f"{weights.path}: lacks {listed(lost)}, which {extras.path} has: import that again")
    if problems := differences(wanted, tensors):
        raise CheckpointError(
            f"{weights.path} is of another model than {extras.path}: {listed(problems.values(), '; ')}"
        )
    write_pth({name: tensors[name] for name in extras.order}, target)
    return target


def _checked_target(target: str | Path, endings: tuple[str, ...]) -> Path:
    target = Path(target)
    if target.suffix not in endings:
        raise CheckpointError(f"{target}: must end in {' or '.join(endings)}")
    return target
