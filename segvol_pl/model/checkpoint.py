"""Weights: training checkpoints (.ckpt), exported models (.safetensors), released weights. Nothing is unpickled.

1. `read_weights` reads any of these files into a `Weights`: this model's tensors, and extra ones of released files. The
   configuration in the file is checked against its tensors before a model is created. Adapters of a run with
   `optim.lora_rank` are added to the weights here.
2. `load_exactly` accounts for every tensor: mismatches are listed and refused, unless allowed by name.
3. `write_weights` writes an exported model.

An exported model is self-contained: its header holds the model's configuration, category names and synonyms. Training
checkpoints hold the same under Lightning's names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from reprlib import repr as shortened
from textwrap import shorten
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import save_file
from torch import nn

from segvol_pl.atomic import atomic_path
from segvol_pl.config import Convention, SegVolConfig
from segvol_pl.config.loader import plain
from segvol_pl.data.index_builder import sha256_of
from segvol_pl.errors import CheckpointError, listed
from segvol_pl.hub import local
from segvol_pl.model import lora
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.model.released import (
    Contents,
    Tensors,
    encoder_of,
    is_finite,
    read_contents,
    split_extra,
    tower_of,
    without_prefix,
)
from segvol_pl.model.segvol import SegVol
from segvol_pl.model.sharded import HEADER, open_sharded
from segvol_pl.model.text_encoder import TextBank

__all__ = [
    "CheckpointError",
    "LoadReport",
    "Weights",
    "load_encoder",
    "load_model",
    "load_weights",
    "read_encoder",
    "read_weights",
]

BANK = "text_encoder.bank_KE"
MASK_EMBEDDING = "prompt_encoder.mask_embedding."
"""Prefix of tensors that a model with `mask_prompt` adds: without training they change nothing."""
FORMAT = "segvol_pl/1"
EMA, EMA_NAMES = "ema", "ema_names"
"""Of a training checkpoint: a weight's average in the optimizer's state, and the names of the optimizer's weights."""
STACKS = {"num_layers": "image_encoder.blocks.", "decoder_layers": "mask_decoder.transformer.layers."}
"""Keys of the model that count blocks -> prefix of the blocks' tensors."""


@dataclass(frozen=True)
class Weights:
    """The content of a file: the model's configuration, category names, and weights by name."""

    path: Path
    config: SegVolConfig
    categories: list[str]
    tensors: Tensors
    extra_tensors: Tensors = field(default_factory=dict)
    """Released tensors that this model does not hold, see `released`."""
    order: list[str] = field(default_factory=list)
    """Names in the order of the released file; empty if the weights do not come from one."""
    synonyms: dict[str, str] = field(default_factory=dict)
    """Synonym -> category, in the order of the text bank's rows after the categories."""

    @property
    def tower(self) -> Tensors:
        """CLIP's text tower; empty if the file has none."""
        return tower_of(self.extra_tensors)

    @property
    def bank(self) -> TextBank:
        """The text bank; empty if the file has none."""
        held = self.tensors.get(BANK)
        return TextBank.empty(self.config.text_dim) if held is None else TextBank(self.categories, held, self.synonyms)


@dataclass(frozen=True)
class LoadReport:
    """The result of loading weights; `str()` gives one line."""

    path: Path
    loaded: int
    kept: list[str]
    """The model's tensors that are missing in the file or have another shape; they keep their values."""
    unused: list[str]
    """The file's tensors that the model does not have."""

    def __str__(self) -> str:
        text = f"{self.loaded} tensors from {self.path}"
        for what, names in (("kept as they were", self.kept), ("not used", self.unused)):
            text += f"; {what}: {listed(names)}" if names else ""
        return text


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SegVol:
    """Load the model of a segmentation checkpoint, in evaluation mode. Raises CheckpointError, HubError.

    path: a file, a folder of a sharded checkpoint, or `hub:OWNER/NAME`.
    """
    return model_of(read_weights(local(path))).to(device)


def model_of(weights: Weights) -> SegVol:
    """Make the model of weights that were read, on the CPU, in evaluation mode. Raises CheckpointError."""
    model = SegVol(weights.config, weights.bank)
    load_weights(model, weights)
    return model.eval()


def load_weights(model: SegVol, source: str | Path | Weights, allow: Sequence[str] = ()) -> LoadReport:
    """Load all weights of a segmentation model into `model`, except the text bank.

    Args:
        model: the model, which keeps its own text bank.
        source: a file of this package or a released one, or its content.
        allow: patterns (`image_encoder.*`) of names that may be missing, unexpected or of another shape. The mask
            embedding may always be missing.

    Raises:
        CheckpointError: the file cannot be read, or tensors do not match, which are listed.
    """
    weights = source if isinstance(source, Weights) else read_weights(local(source), model.config)
    if not any(name.startswith(MASK_EMBEDDING) for name in weights.tensors):
        allow = [*allow, f"{MASK_EMBEDDING}*"]
    return load_exactly(model, {**weights.tensors, BANK: model.text_encoder.bank_KE}, weights.path, allow)


def load_encoder(encoder: nn.Module, path: str | Path) -> LoadReport:
    """Load the image encoder of a pre-training or segmentation checkpoint or released file. Raises CheckpointError."""
    contents = without_adapters(read_contents(local(path)))
    return load_exactly(encoder, encoder_of(contents), contents.path)


def read_encoder(path: str | Path) -> tuple[ImageEncoder, SegVolConfig]:
    """Make the image encoder of any file of weights on the CPU, in evaluation mode, and the model that it belongs to.

    A released file does not state its architecture: it has the published one. Raises CheckpointError.
    """
    contents = without_adapters(read_contents(local(path)))
    if is_exported(contents):
        config = _model_config(_header_json(contents, "config"), contents.path)
    elif is_trained(contents):
        stated = contents.header["hyper_parameters"].get("config")
        config = _model_config(stated.get("model") if isinstance(stated, dict) else None, contents.path)
    else:
        config = SegVolConfig(coordinates=Convention.published)
    encoder = ImageEncoder(config)
    load_exactly(encoder, encoder_of(contents), contents.path)
    return encoder.eval(), config


def load_exactly(module: nn.Module, tensors: Tensors, path: Path, allow: Sequence[str] = ()) -> LoadReport:
    """Load tensors. Raises CheckpointError listing missing, unexpected and misshapen names that are not allowed."""
    own = module.state_dict()
    problems = differences(own, tensors)
    refused = [text for name, text in problems.items() if not any(fnmatchcase(name, pattern) for pattern in allow)]
    if refused:
        raise CheckpointError(f"{path} is of another model: {listed(refused, '; ')}: check the model section")
    fitting = {name: value for name, value in tensors.items() if name in own and name not in problems}
    module.load_state_dict(fitting, strict=False)
    kept = [name for name in own if name not in fitting]
    return LoadReport(path, len(fitting), kept, [name for name in tensors if name not in own])


def differences(own: Tensors, given: Tensors) -> dict[str, str]:
    """Name of each tensor that does not match -> what is wrong with it."""
    problems = {name: f"lacks {name}" for name in own if name not in given}
    problems |= {name: f"has unknown {name}" for name in given if name not in own}
    for name in own.keys() & given.keys():
        if given[name].shape != own[name].shape:
            problems[name] = f"{name} is {list(given[name].shape)}, the model's is {list(own[name].shape)}"
    return dict(sorted(problems.items()))


def read_weights(source: Path | Contents, released: SegVolConfig | None = None) -> Weights:
    """Read a segmentation model from any file of weights.

    Args:
        source: the file, or its content.
        released: the architecture of a released file, which does not state it (default: the published one).

    Raises:
        CheckpointError: the file cannot be read, or contradicts itself.
    """
    contents = source if isinstance(source, Contents) else read_contents(source)
    if is_exported(contents):
        return _exported(contents)
    if is_trained(contents):
        return _trained(contents)
    return _released(contents, released or SegVolConfig(coordinates=Convention.published))


def is_exported(contents: Contents) -> bool:
    """Whether `export` or `import` wrote the file."""
    return contents.header.get("format") == FORMAT


def is_trained(contents: Contents) -> bool:
    """Whether `train` or `pretrain` wrote the file."""
    parameters = contents.header.get("hyper_parameters")
    return isinstance(parameters, dict) and isinstance(parameters.get("task"), str)


def _exported(contents: Contents) -> Weights:
    config = _model_config(_header_json(contents, "config"), contents.path)
    categories = _names(_header_json(contents, "categories"), "categories", contents.path)
    order = _names(_header_json(contents, "order", "[]"), "order", contents.path)
    synonyms = _synonyms(_header_json(contents, "synonyms", "{}"), categories, contents.path)
    tensors, extra_tensors = split_extra(contents.tensors)
    return _as_stated(Weights(contents.path, config, categories, tensors, extra_tensors, order, synonyms))


def with_averages(contents: Contents) -> Contents:
    """A training checkpoint with the averages of its weights (`optim.ema`) in their place. Raises CheckpointError."""
    path, names = contents.path, contents.header.get(EMA_NAMES)
    if not is_trained(contents) or not isinstance(names, list):
        raise CheckpointError(f"{path}: holds no averaged weights: train with optim.ema, or leave out weights=ema")
    sharded = open_sharded(path) if path.is_dir() else None
    (state,) = (sharded.header if sharded else contents.header)["optimizer_states"]
    averages: Tensors = {}
    for number, name in enumerate(names):
        # A weight that never had a gradient has no average: it has not moved.
        if EMA in state["state"].get(number, {}):
            at = f"optimizer_states.0.state.{number}.{EMA}"
            held = state["state"][number][EMA]
            averages[name] = sharded.read([at])[at] if sharded and held is None else held
    for name, value in averages.items():
        if not is_finite(value):
            raise CheckpointError(f"{path}: the average of {name} holds NaN or infinite values: take an earlier one")
    return replace(contents, tensors={**contents.tensors, **averages})


def without_adapters(contents: Contents) -> Contents:
    """A checkpoint of a run with `optim.lora_rank`, with each adapter added to the weight of its layer.

    Others as they are. Raises CheckpointError.
    """
    if not lora.is_adapted(contents.tensors):
        return contents
    try:
        alpha = float(contents.header["hyper_parameters"]["config"]["optim"]["lora_alpha"])
        return replace(contents, tensors=lora.merged(contents.tensors, alpha))
    except (KeyError, TypeError, ValueError) as error:
        reason = shorten(str(error), 100)
        raise CheckpointError(
            f"{contents.path}: its adapters do not fit ({reason}): only checkpoints of segvol-pl train can have them"
        ) from error


def _header_json(contents: Contents, name: str, default: str | None = None) -> Any:
    try:
        return json.loads(str(contents.header.get(name, default)))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{contents.path}: {name!r} in its header is no JSON: export the model again") from error


def _trained(contents: Contents) -> Weights:
    contents = without_adapters(contents)
    path, parameters = contents.path, contents.header["hyper_parameters"]
    if parameters["task"] != "segment":
        raise CheckpointError(f"{path}: is a checkpoint of {parameters['task']}, not of segvol-pl train")
    stated = parameters.get("config")
    config = _model_config(stated.get("model") if isinstance(stated, dict) else None, path)
    tensors = {name.removeprefix("model."): value for name, value in contents.tensors.items()}
    categories = _names(parameters.get("categories"), "categories", path)
    synonyms = _synonyms(parameters.get("synonyms", {}), categories, path)
    return _as_stated(Weights(path, config, categories, tensors, synonyms=synonyms))


def _released(contents: Contents, config: SegVolConfig) -> Weights:
    named = without_prefix(contents.tensors)
    if not any(name.startswith("mask_decoder.") for name in named):
        raise CheckpointError(f"{contents.path}: holds no mask decoder; for an image encoder alone use pretrained=FILE")
    tensors, extra_tensors = split_extra(named)
    return Weights(contents.path, config, [], tensors, extra_tensors, list(named))


def _model_config(stated: Any, path: Path) -> SegVolConfig:
    """The model's section as `plain` wrote it."""
    if not isinstance(stated, dict):
        raise CheckpointError(f"{path}: states no configuration of its model: export it again")
    # OmegaConf would resolve such references, even to environment variables; the file may not be trustworthy.
    if "${" in str(stated):
        raise CheckpointError(f"{path}: its configuration refers to values outside of the file: export it again")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SegVolConfig), stated))
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: states no model of this version: {shorten(str(error), 300)}") from error
    return cast(SegVolConfig, config)


def _names(stated: Any, what: str, path: Path) -> list[str]:
    texts = isinstance(stated, list) and all(isinstance(name, str) for name in stated)
    if not texts or len(set(stated)) < len(stated):
        raise CheckpointError(f"{path}: its {what} are no list of different names: {shortened(stated)}")
    return list(stated)


def _synonyms(stated: Any, categories: list[str], path: Path) -> dict[str, str]:
    mapping = isinstance(stated, dict) and all(isinstance(other, str) for other in stated)
    if not mapping or set(stated) & set(categories) or any(name not in categories for name in stated.values()):
        raise CheckpointError(f"{path}: its synonyms are no other names of its categories: {shortened(stated)}")
    return dict(stated)


def _as_stated(weights: Weights) -> Weights:
    """Raise CheckpointError if the tensors contradict configuration or categories, before a model uses memory."""
    path, config, tensors = weights.path, weights.config, weights.tensors
    for key, start in STACKS.items():
        held = len({name.removeprefix(start).split(".")[0] for name in tensors if name.startswith(start)})
        if getattr(config, key) != held:
            raise CheckpointError(f"{path}: states model.{key}={getattr(config, key)}, and holds {held} of them")
    try:
        with torch.device("meta"):
            own = SegVol(config).state_dict()
            rows = len(weights.categories) + len(weights.synonyms)
            own[BANK] = torch.empty(max(rows, 1), config.text_dim)  # without names a row of zeros
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: states a model that cannot be made ({str(error).splitlines()[0]})") from error
    problems = differences(own, tensors if weights.categories else {BANK: own[BANK], **tensors})
    if problems:
        raise CheckpointError(f"{path} is of another model than it states: {listed(problems.values(), '; ')}")
    return weights


def digest_of(checkpoint: Path) -> str:
    """Hex sha256 of the file, or of a sharded checkpoint's header, which holds the checksums of its parts."""
    return sha256_of(checkpoint / HEADER if checkpoint.is_dir() else checkpoint)


def read_header(path: Path) -> dict[str, Any]:
    """Read what a training checkpoint holds besides weights, without unpickling code. Raises CheckpointError.

    The weights of a file are checked for NaN. A sharded one was checked when it was written, and is not read.
    """
    whole = not path.is_dir()
    contents = read_contents(path, mapped=True) if whole else Contents(path, {}, open_sharded(path).header)
    if not is_trained(contents):
        raise CheckpointError(f"{path}: is no training checkpoint of segvol-pl")
    return contents.header


def write_weights(weights: Weights, target: Path) -> Path:
    """Write a self-contained .safetensors file; return its path."""
    header = {
        "format": FORMAT,
        "config": json.dumps(plain(weights.config)),
        "categories": json.dumps(weights.categories),
        "order": json.dumps(weights.order),
    }
    if weights.synonyms:
        header["synonyms"] = json.dumps(weights.synonyms)
    return write_safetensors({**weights.tensors, **weights.extra_tensors}, target, header)


def write_safetensors(tensors: Tensors, target: Path, header: dict[str, str] | None = None) -> Path:
    """Write a .safetensors file with the usual permissions; return its path."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_path(target) as part:
        part.touch()
        usual = part.stat().st_mode
        save_file(contiguous, part, metadata=header)
        part.chmod(usual)  # safetensors makes its files readable only for the owner
    return target
