"""The configurations of the stages, from the one of `finetune`."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from segvol_pl.config import (
    CasesConfig,
    EvaluateConfig,
    FinetuneConfig,
    Method,
    PackConfig,
    RegionsConfig,
    TextConfig,
    TextSource,
    TrainConfig,
)
from segvol_pl.config.categories import load_synonyms
from segvol_pl.finetuning.division import CASES
from segvol_pl.model.checkpoint import Weights
from segvol_pl.model.text_encoder import TextBank

log = logging.getLogger(__name__)

ENCODER = "image_encoder.*"
RANK = 8
"""Of LoRA's matrices, unless optim.lora_rank is set."""
RUN, MODEL = "train", "model/model.safetensors"
"""Places within `out`."""


def shards_of(config: FinetuneConfig) -> str:
    """The folder of shards: the given one, or the one that `pack` writes."""
    return config.shards or str(Path(config.out) / "shards")


def packing(config: FinetuneConfig, weights: Weights) -> PackConfig:
    """How to pack the cases that `division` has listed: with overviews of the size that the model takes."""
    return PackConfig(
        cases=str(Path(config.out) / CASES),
        categories=config.categories,
        out=shards_of(config),
        overview_shape=list(weights.config.input_shape),
        workers=config.workers,
        regions=RegionsConfig(enabled=config.prompts.pseudo_per_volume > 0),
    )


def training(config: FinetuneConfig, weights: Weights) -> TrainConfig:
    """How to train: the checkpoint's own architecture, and all categories that it knows."""
    adapted = config.method is Method.lora
    frozen = [ENCODER] if config.method is Method.decoder else []
    return TrainConfig(
        model=weights.config,
        data=replace(config.data, shards=shards_of(config)),
        prompts=config.prompts,
        text=replace(text_of(config.text, weights), synonyms=synonyms_of(config)),
        optim=replace(config.optim, lora_rank=config.optim.lora_rank or RANK) if adapted else config.optim,
        run=replace(config.run, out=str(Path(config.out) / RUN)),
        track=config.track,
        weights=config.checkpoint,
        keep_categories=True,
        freeze=[*frozen, *config.freeze],
    )


def synonyms_of(config: FinetuneConfig) -> str | None:
    """The file of synonyms: the given one, or that of the categories if it lists any. Raises CaseError."""
    path = config.categories
    # Packed cases may be fine-tuned on without the file that they were packed with.
    if config.text.synonyms is None and path is not None and Path(path).is_file() and load_synonyms(path):
        return path
    return config.text.synonyms


def text_of(text: TextConfig, weights: Weights) -> TextConfig:
    """Where new names get their vectors: from the seed of names, if all vectors of the checkpoint come from there."""
    bank = weights.bank
    if text.source is not TextSource.auto or not bank.names or weights.tower:
        return text
    seeded_KE = TextBank.seeded(bank.texts, weights.config.text_dim).vectors_KE
    if not torch.equal(bank.vectors_KE.float().cpu(), seeded_KE):
        return text
    log.info("text bank: %s was trained with seeded names (text.source=seeded), and so are new ones", weights.path)
    return replace(text, source=TextSource.seeded)


def evaluation(config: FinetuneConfig, checkpoint: Path, name: str) -> EvaluateConfig:
    """How to evaluate a model on the validation cases, in `OUT/name`."""
    return EvaluateConfig(
        checkpoint=str(checkpoint),
        data=CasesConfig(shards=shards_of(config), split=config.data.val_split),
        out=str(Path(config.out) / name),
        modes=config.evaluation.modes,
        prompts=config.evaluation.prompts,
        pictures=config.evaluation.pictures,
        draw=config.draw,
        zoom=config.zoom,
        sliding=config.sliding,
        seed=config.data.seed,
        device=config.run.accelerator,
        precision=config.run.precision,
    )


def old_evaluation(config: FinetuneConfig, checkpoint: Path, name: str, categories: list[str]) -> EvaluateConfig:
    """How to evaluate a model on cases of what the checkpoint knew. categories: empty for all that a case has."""
    data = CasesConfig(shards=config.forgotten.shards, split=config.forgotten.split)
    return replace(evaluation(config, checkpoint, name), data=data, limit=config.forgotten.limit, categories=categories)
