"""The released weights: their files, their names, and what of them this model does not hold.

Published files differ in wrapping alone: `SegVol_v1.pth` keeps `["model"]` with prefix `module.`, the Hugging Face
files have prefix `model.`, the pre-trained ViT is a Lightning checkpoint, `["state_dict"]` with prefix
`model.encoder.`. This model's own names are theirs without the prefix. Three kinds of tensors are only carried along,
so that work done here can be written back: CLIP's text tower (its vectors are in the text bank), the decoder's parts
that the published code never runs, and the 2-D mask branch that it never calls.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from segvol_pl.atomic import atomic_path
from segvol_pl.errors import CheckpointError

TOWER = "text_encoder.clip_text_model."
EXTRA = re.compile(
    rf"{re.escape(TOWER)}|mask_decoder\.(output_hypernetworks_mlps\.[1-3]|iou_prediction_head)\.|prompt_encoder\.mask_downscaling\."
)
PREFIXES = ("module.", "model.", "")
ENCODERS = ("encoder.", "model.encoder.", "model.image_encoder.", "module.image_encoder.", "image_encoder.")
"""Where an image encoder stands: own pre-training, the released ViT, own training, released .pth, exports."""
PTH_PREFIX = "module."

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds, before anything is made of it."""

    path: Path
    tensors: Tensors
    """In the file's order, under the file's names."""
    header: dict[str, Any]
    """safetensors: its metadata; otherwise everything that stands beside the tensors."""


def read_contents(path: Path, mapped: bool = False) -> Contents:
    """Any file of weights, on the CPU, without unpickling code. Raises CheckpointError, also for NaN in the weights.

    mapped: a .ckpt's tensors stay in the file until they are used.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.suffix not in (".safetensors", ".ckpt", ".pth", ".pt", ".bin"):
        raise CheckpointError(f"{path}: unknown kind of checkpoint; give a .safetensors, .ckpt, .pth or .bin file")
    if path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    else:
        contents = _contents_of(_read_torch(path, mapped), path)
    for name, value in contents.tensors.items():
        if not is_finite(value):
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values: take an earlier checkpoint")
    return contents


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # One that is not finite leaves no finite sum, and summing makes no second tensor.
    return bool(value.float().sum().isfinite()) or bool(value.isfinite().all())


def _contents_of(raw: dict[str, Any], path: Path) -> Contents:
    inner = next((raw[key] for key in ("state_dict", "model") if isinstance(raw.get(key), dict)), raw)
    tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: is no checkpoint (no tensors at the top, in 'state_dict' or in 'model')")
    return Contents(path, tensors, {} if inner is raw else {key: raw[key] for key in raw if raw[key] is not inner})


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            return Contents(path, {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {}))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): is it whole?") from error


def _read_torch(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights and plain values, and is refused: code could hide in it"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}): is it whole?") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is no checkpoint (it holds a {type(raw).__name__})")
    return raw


def without_prefix(tensors: Tensors) -> Tensors:
    """The released names without the wrapping's prefix; unchanged where not all names have one."""
    prefix = next(prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors))
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def split_extra(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """(this model's, carried along)."""
    extra_tensors = {name: value for name, value in tensors.items() if EXTRA.match(name)}
    return {name: value for name, value in tensors.items() if name not in extra_tensors}, extra_tensors


def encoder_of(contents: Contents) -> Tensors:
    """The tensors of the image encoder, under its own names. Raises CheckpointError where there is none."""
    for prefix in ENCODERS:
        found = {n.removeprefix(prefix): value for n, value in contents.tensors.items() if n.startswith(prefix)}
        if found:
            return found
    raise CheckpointError(f"{contents.path}: holds no image encoder (names start with none of {', '.join(ENCODERS)})")


def tower_of(extra_tensors: Tensors) -> Tensors:
    """CLIP's text tower, under the names of `transformers.CLIPTextModel`; empty where none is extra_tensors."""
    tower = {name.removeprefix(TOWER): value for name, value in extra_tensors.items() if name.startswith(TOWER)}
    return {name: value for name, value in tower.items() if not name.endswith("position_ids")}


def write_pth(tensors: Tensors, path: Path) -> None:
    """The published `.pth` layout."""
    with atomic_path(path) as part:
        torch.save({"model": {PTH_PREFIX + name: value for name, value in tensors.items()}}, part)
