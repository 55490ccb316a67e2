"""The released weights: file formats, tensor names, and the tensors that this model does not have.

Published files differ only in their layout: `SegVol_v1.pth` has `["model"]` with prefix `module.`, the Hugging Face
files have prefix `model.`, the pre-trained ViT is a Lightning checkpoint, `["state_dict"]` with prefix
`model.encoder.`. This model's names are the same without the prefix. Three kinds of tensors are kept only so that a
model can be exported again: CLIP's text tower (its vectors are in the text bank), the decoder's parts that the
published code never runs, and the 2-D mask branch that it never calls.
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
from segvol_pl.model.sharded import open_sharded

TOWER = "text_encoder.clip_text_model."
EXTRA = re.compile(
    rf"{re.escape(TOWER)}|mask_decoder\.(output_hypernetworks_mlps\.[1-3]|iou_prediction_head)\.|prompt_encoder\.mask_downscaling\."
)
PREFIXES = ("module.", "model.", "")
ENCODERS = ("encoder.", "model.encoder.", "model.image_encoder.", "module.image_encoder.", "image_encoder.")
"""Prefixes of an image encoder: our pre-training, the released ViT, our training, the released .pth, exports."""
PTH_PREFIX = "module."

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Contents:
    """The raw content of a file of weights."""

    path: Path
    tensors: Tensors
    """In the file's order, under the file's names."""
    header: dict[str, Any]
    """Metadata of a .safetensors; otherwise everything in the file besides the tensors."""


def read_contents(path: Path, mapped: bool = False) -> Contents:
    """Read any file of weights to the CPU, without unpickling code. Raises CheckpointError, also for NaN weights.

    path: a file, or the folder of a sharded checkpoint, of which the weights alone are read.
    mapped: memory-map a .ckpt, so that tensors are read when they are used.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir() and path.suffix not in (".safetensors", ".ckpt", ".pth", ".pt", ".bin"):
        raise CheckpointError(f"{path}: unknown kind of checkpoint; give a .safetensors, .ckpt, .pth or .bin file")
    if path.is_dir():
        saved = open_sharded(path)
        besides = {key: saved.header[key] for key in saved.header.keys() - {"state_dict", "optimizer_states"}}
        contents = Contents(path, saved.weights(), besides)
    elif path.suffix == ".safetensors":
        contents = _read_safetensors(path)
    else:
        contents = _contents_of(_read_torch(path, mapped), path)
    for name, value in contents.tensors.items():
        if not is_finite(value):
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values: take an earlier checkpoint")
    return contents


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # Any non-finite value makes the sum non-finite, and a sum allocates no second tensor.
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
        raise CheckpointError(f"{path}: cannot be read ({error}): is it complete?") from error


def _read_torch(path: Path, mapped: bool) -> dict[str, Any]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than weights and plain values, and is refused: code could hide in it"
        ) from error
    except (RuntimeError, EOFError, BadZipFile, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({reason}): is it complete?") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is no checkpoint (it holds a {type(raw).__name__})")
    return raw


def without_prefix(tensors: Tensors) -> Tensors:
    """Remove the layout's prefix from released names; unchanged if not all names have one."""
    prefix = next(prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors))
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def split_extra(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Split tensors into (this model's, those it does not have)."""
    extra_tensors = {name: value for name, value in tensors.items() if EXTRA.match(name)}
    return {name: value for name, value in tensors.items() if name not in extra_tensors}, extra_tensors


def encoder_of(contents: Contents) -> Tensors:
    """The tensors of the image encoder, without prefix. Raises CheckpointError if there are none."""
    for prefix in ENCODERS:
        found = {n.removeprefix(prefix): value for n, value in contents.tensors.items() if n.startswith(prefix)}
        if found:
            return found
    raise CheckpointError(f"{contents.path}: holds no image encoder (names start with none of {', '.join(ENCODERS)})")


def tower_of(extra_tensors: Tensors) -> Tensors:
    """CLIP's text tower, under the names of `transformers.CLIPTextModel`; empty if there is none."""
    tower = {name.removeprefix(TOWER): value for name, value in extra_tensors.items() if name.startswith(TOWER)}
    return {name: value for name, value in tower.items() if not name.endswith("position_ids")}


def write_pth(tensors: Tensors, path: Path) -> None:
    """Write a file in the published `.pth` layout."""
    with atomic_path(path) as part:
        torch.save({"model": {PTH_PREFIX + name: value for name, value in tensors.items()}}, part)
