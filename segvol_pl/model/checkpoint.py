"""Weights in and out: training checkpoints (.ckpt) and exported models (.safetensors). Nothing is unpickled.

An exported model holds the weights, and in its header the model's configuration and its category names, so that it
stands alone. Training checkpoints hold the same under Lightning's names.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from segvol_pl.config import SegVolConfig
from segvol_pl.configure import plain
from segvol_pl.data.whole import replacing
from segvol_pl.model.segvol import SegVol
from segvol_pl.model.text_encoder import TextBank

BANK = "text_encoder.bank_KE"
FORMAT = "segvol_pl/1"
LISTED = 5


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong."""


@dataclass(frozen=True)
class Weights:
    """What a file holds: the model's configuration, category names, and its weights by name."""

    path: Path
    config: SegVolConfig
    categories: list[str]
    tensors: dict[str, Tensor]


def load_model(path: str | Path, device: torch.device | str = "cpu") -> SegVol:
    """The model of a segmentation checkpoint, in evaluation mode. Raises CheckpointError."""
    weights = read_weights(Path(path))
    bank = TextBank(weights.categories, weights.tensors[BANK])
    model = SegVol(weights.config, bank)
    load_exactly(model, weights.tensors, weights.path)
    return model.to(device).eval()


def load_weights(model: SegVol, path: str | Path) -> None:
    """Every weight of a segmentation checkpoint into `model`, the text bank excepted. Raises CheckpointError."""
    weights = read_weights(Path(path))
    kept = {name: tensor for name, tensor in weights.tensors.items() if name != BANK}
    load_exactly(model, {**kept, BANK: model.text_encoder.bank_KE}, weights.path)


def load_encoder(encoder: nn.Module, path: str | Path) -> int:
    """The image encoder of a pre-training or segmentation checkpoint; returns the number of tensors loaded."""
    state = read_checkpoint(Path(path))["state_dict"]
    for prefix in ("encoder.", "model.image_encoder."):
        tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if tensors:
            load_exactly(encoder, tensors, Path(path))
            return len(tensors)
    raise CheckpointError(f"{path}: holds no image encoder")


def load_exactly(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Loads, or raises CheckpointError listing missing, unexpected and wrongly shaped names."""
    own = module.state_dict()
    problems = [f"lacks {name}" for name in own if name not in tensors]
    problems += [f"has unknown {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model's is {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(problems[:LISTED])}{more}: check the model section"
        )
    module.load_state_dict(tensors)


def read_weights(path: Path) -> Weights:
    """A segmentation model from .ckpt or .safetensors. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".ckpt":
        return _read_lightning(path)
    raise CheckpointError(f"{path}: unknown kind of checkpoint; give a .ckpt or .safetensors file")


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): is it whole?") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: was not written by segvol-pl export (no {FORMAT} header)")
    config = _model_config(json.loads(header["config"]))
    return Weights(path, config, json.loads(header["categories"]), tensors)


def _read_lightning(path: Path) -> Weights:
    checkpoint = read_checkpoint(path)
    parameters = checkpoint.get("hyper_parameters", {})
    if parameters.get("task") != "segment":
        raise CheckpointError(
            f"{path}: is a checkpoint of {parameters.get('task', 'something else')}, not of segvol-pl train"
        )
    tensors = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    config = _model_config(parameters["config"]["model"])
    return Weights(path, config, list(parameters["categories"]), tensors)


def _model_config(plain_values: dict[str, Any]) -> SegVolConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SegVolConfig), plain_values))
    assert isinstance(config, SegVolConfig)
    return config


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU, without unpickling code. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights and plain values, and is refused: code could hide in it"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({str(error).splitlines()[0]}): is it whole?") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path}: is no training checkpoint (no state_dict)")
    return checkpoint


def export(source: str | Path, target: str | Path) -> Path:
    """A training checkpoint -> .safetensors with configuration and categories in its header."""
    target = Path(target)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: export writes .safetensors files")
    weights = read_weights(Path(source))
    header = {
        "format": FORMAT,
        "config": json.dumps(plain(weights.config)),
        "categories": json.dumps(weights.categories),
    }
    with replacing(target) as part:
        save_file({name: tensor.contiguous() for name, tensor in weights.tensors.items()}, part, metadata=header)
    return target
