"""Writes a model as ONNX files, for programs without torch (`export format=onnx`).

    encoder.onnx      image (B,1,D,H,W) in [0, 1]              -> tokens (B,T,E)
    decoder.onnx      tokens (1,T,E), prompts of that image    -> logits (P,D,H,W) at the input's resolution
    text_bank.npy     the vectors of the categories and then of their synonyms, float32 (K,E)
    model.json        sizes, category names and synonyms in the bank's order, and how zooming is done by default

One encoding serves any number of prompts. Values say which parts a prompt has, so that there are no further
inputs: a part that a prompt lacks is a box, landmarks or a mask of -1, a text vector of zeros, points with label -2.

`examples/onnx_predict.py` zooms out and in with these files. Letters: P prompts, N points, M landmarks, T tokens, E
width.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segvol_pl.atomic import write_text
from segvol_pl.config import SegVolConfig, ZoomConfig
from segvol_pl.errors import ConfigError, ExportError
from segvol_pl.imaging.prompts import ABSENT
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.model.segvol import SegVol

log = logging.getLogger(__name__)

FORMAT = "segvol_pl onnx/1"
ENCODER, DECODER, BANK, ABOUT = "encoder.onnx", "decoder.onnx", "text_bank.npy", "model.json"
OPSET = 18
"""Read by ONNX Runtime from 1.14 on."""
IN_ONE_FILE = 1.9e9
"""Bytes of weights that an .onnx file holds at most; larger ones lie next to it, in .onnx.data."""
TOLERANCE = 1e-3
"""Largest difference from torch's logits with which a file is kept. A usual one is 1e-5."""
NOT_GIVEN = -1.0
"""Value of a box, of landmarks and of a mask that a prompt lacks."""


class Encoder(nn.Module):
    """image (B,1,D,H,W) -> tokens (B,T,E)."""

    def __init__(self, model: SegVol) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        """Encode images."""
        return self.model.encode(image)


class Decoder(nn.Module):
    """tokens (1,T,E) and the prompts of that image -> logits (P,D,H,W)."""

    def __init__(self, model: SegVol) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        points: Tensor,
        labels: Tensor,
        box: Tensor,
        text: Tensor,
        landmarks: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Decode prompts.

        Args:
            tokens: of one image.
            points: float32 (P,N,3), voxels of the model's input.
            labels: int64 (P,N): 1 inside, 0 outside, -2 no point.
            box: float32 (P,6), inclusive maximum; -1 for a prompt without a box.
            text: float32 (P,E), a row of the text bank or a vector of the same CLIP; zeros for a prompt without text.
            landmarks: float32 (P,M,3), if the model has any; -1 for those that a prompt lacks.
            mask: float32 (P,d,h,w) at the decoder's resolution, if the model takes masks; -1 for a prompt without.
        """
        marks = points.new_zeros(points.shape[0], 0, 3) if landmarks is None else landmarks
        prompts = PromptTensors(
            points_BPN3=points[None],
            labels_BPN=labels[None],
            boxes_BP6=box[None],
            text_BP=labels[None, :, 0],  # only its shape is used
            landmarks_BPM3=marks[None],
            has_points_BP=(labels != ABSENT).any(dim=-1)[None],
            has_box_BP=(box >= 0).all(dim=-1)[None],
            has_text_BP=(text != 0).any(dim=-1)[None],
            has_landmarks_BPM=(marks >= 0).all(dim=-1)[None],
            masks_BPDHW=None if mask is None else mask[None],
            has_mask_BP=None if mask is None else (mask >= 0).flatten(1).all(dim=-1)[None],
        )
        model = self.model
        low = model.decode_embedded(model.image_context(tokens), prompts, model.text_encoder.project(text[None]))
        return model.upsample(low)[0]


def write_onnx(model: SegVol, folder: Path) -> None:
    """Write the model's files into a folder, and check them against the model.

    Args:
        model: on the CPU, in eval mode.
        folder: exists.

    Raises:
        ConfigError: the packages of the extra `onnx` are not installed.
        ExportError: the files compute other logits than the model.
    """
    _check_packages()
    given = example_inputs(model.config, prompts=2, points=3)
    image = torch.rand(2, 1, *model.config.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.encode(image[:1])
    _write(Encoder(model), {"image": image}, "tokens", {"image": {0: "images"}}, folder / ENCODER)
    shapes = {name: {0: "prompts"} for name in given} | {"tokens": {}}
    shapes |= {name: {0: "prompts", 1: "points"} for name in ("points", "labels")}
    _write(Decoder(model), {"tokens": tokens, **given}, "logits", shapes, folder / DECODER)
    np.save(folder / BANK, model.bank.vectors_KE.float().numpy()[: len(model.bank.texts)], allow_pickle=False)
    write_text(folder / ABOUT, json.dumps(_about(model), indent=2, ensure_ascii=False) + "\n")
    _check(model, folder)


def example_inputs(config: SegVolConfig, prompts: int, points: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the decoder besides the tokens, drawn at random: every second prompt has all of its parts."""
    rng = torch.Generator().manual_seed(seed)
    extent_3 = torch.tensor(config.input_shape, dtype=torch.float32)

    def places(*shape: int) -> Tensor:
        return (torch.rand(*shape, 3, generator=rng) * extent_3).floor()

    corners = places(prompts, 2)
    inputs = {
        "points": places(prompts, points),
        "labels": torch.randint(0, 2, (prompts, points), generator=rng),
        "box": torch.cat([corners.amin(1), corners.amax(1)], dim=-1),
        "text": torch.randn(prompts, config.text_dim, generator=rng),
    }
    if config.landmark_counts:
        inputs["landmarks"] = places(prompts, sum(config.landmark_counts.values()))
    if config.mask_prompt:
        inputs["mask"] = torch.rand(prompts, *config.mask_shape, generator=rng)
    for name, absent in (("box", NOT_GIVEN), ("text", 0.0), ("landmarks", NOT_GIVEN), ("mask", NOT_GIVEN)):
        if name in inputs:
            inputs[name][1::2] = absent
    return inputs


def _write(
    module: nn.Module, given: dict[str, Tensor], output: str, shapes: dict[str, dict[int, str]], path: Path
) -> None:
    size = sum(parameter.nbytes for parameter in module.parameters())
    with _quiet():
        torch.onnx.export(
            module.eval(),
            (),
            path,
            kwargs=given,
            input_names=list(given),
            output_names=[output],
            dynamic_shapes=_dynamic(shapes, given),
            opset_version=OPSET,
            dynamo=True,
            external_data=size > IN_ONE_FILE,
            verbose=False,
        )


def _dynamic(shapes: dict[str, dict[int, str]], given: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    dims = {name: torch.export.Dim(name, min=1) for axes in shapes.values() for name in axes.values()}
    return {name: {axis: dims[dim] for axis, dim in shapes[name].items()} for name in given}


@contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxscript warn and log about their own internals; a user cannot do anything about it."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in noisy]
    for each in noisy:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)


def _about(model: SegVol) -> dict[str, Any]:
    config, zoom = model.config, ZoomConfig()
    return {
        "format": FORMAT,
        "input_shape": list(config.input_shape),
        "mask_shape": list(config.mask_shape),
        "mask_prompt": config.mask_prompt,
        "landmarks": config.landmark_counts,
        "text_dim": config.text_dim,
        "categories": model.bank.names,
        "synonyms": model.bank.synonyms,
        "zoom": {"threshold": zoom.threshold, "overlap": zoom.overlap, "reach": zoom.reach},
    }


def _check_packages() -> None:
    import importlib.util

    lacking = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"format: onnx needs {', '.join(lacking)}: pip install 'segvol-pl[onnx]'", "format")


def logits_of(folder: Path, image: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """What the files of a folder compute of one image (1,1,D,H,W) and the prompts of `example_inputs`."""
    import onnxruntime

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])

    (tokens,) = session(ENCODER).run(None, {"image": image.numpy()})
    (logits,) = session(DECODER).run(None, {"tokens": tokens, **{name: each.numpy() for name, each in given.items()}})
    return torch.from_numpy(logits)


def _check(model: SegVol, folder: Path) -> None:
    given = example_inputs(model.config, prompts=3, points=4, seed=1)
    image = torch.rand(1, 1, *model.config.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = Decoder(model)(model.encode(image), **given)
    largest = float((logits_of(folder, image, given) - own).abs().max())
    if not largest <= TOLERANCE:
        raise ExportError(f"{folder}: the ONNX files compute other logits than the model (by up to {largest:.1e})")
    log.info("onnx: logits differ from torch's by at most %.1e", largest)
