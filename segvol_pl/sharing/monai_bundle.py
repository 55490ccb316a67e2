"""Writes a model as a MONAI bundle (`export format=monai`), which `python -m monai.bundle run` executes.

    models/model.safetensors    the weights; MONAI's usual model.pt would be a pickle
    configs/inference.json      what to run: `predict` over a folder of CTs
    configs/metadata.json       versions, and what goes in and comes out

The bundle calls segvol_pl, which must be installed: zooming out and in is no network that a configuration could state.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from segvol_pl import __version__
from segvol_pl.atomic import write_text
from segvol_pl.errors import ExportError
from segvol_pl.model.checkpoint import Weights, write_weights

WEIGHTS = "models/model.safetensors"
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
VERSIONS = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}
"""Key of the metadata -> package."""


def write_bundle(weights: Weights, folder: Path) -> None:
    """Write the bundle into a folder that exists. Raises ExportError for a model without a text bank."""
    if not weights.categories:
        raise ExportError(f"{weights.path}: holds no text bank, and a bundle segments by text: import its categories")
    for name in ("models", "configs"):
        (folder / name).mkdir()
    write_weights(weights, folder / WEIGHTS)
    for name, content in (("inference", _inference()), ("metadata", _metadata(weights))):
        text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
        write_text(folder / "configs" / f"{name}.json", text)


def _inference() -> dict[str, Any]:
    weights = f"$@bundle_root + '/{WEIGHTS}'"
    return {
        "imports": [
            "$from segvol_pl.config import Precision",
            "$from segvol_pl.evaluation.predict_images import predict_images",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/ct'",
        "output_dir": "$@bundle_root + '/eval'",
        "text": "all",
        "device": "auto",
        "precision": "auto",
        "network_def": {"_target_": "segvol_pl.model.checkpoint.load_model", "path": weights},
        "predict": {
            "_target_": "segvol_pl.config.PredictConfig",
            "checkpoint": weights,
            "images": "@dataset_dir",
            "out": "@output_dir",
            "text": "$@text if isinstance(@text, list) else [@text]",
            "device": "@device",
            "precision": "$Precision(@precision)",
        },
        "run": ["$predict_images(@predict)"],
    }


def _metadata(weights: Weights) -> dict[str, Any]:
    channels = {str(value): name for value, name in enumerate(["background", *weights.categories])}
    image = {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1, "dtype": "int16"}
    label = {"type": "image", "format": "segmentation", "num_channels": 1, "dtype": "uint8"}
    size = list(weights.config.input_shape)
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by segvol-pl"},
        **{key: importlib.metadata.version(package) for key, package in VERSIONS.items()},
        "required_packages_version": {"segvol-pl": __version__},
        "name": "SegVol",
        "task": "Segmentation of CT by text prompts",
        "description": "SegVol with zoom-out-zoom-in: a label map of each CT on the grid of its file",
        "authors": "as stated in the model card",
        "copyright": "as stated in the model card",
        "intended_use": "research; not a medical device",
        "network_data_format": {
            "inputs": {
                "image": {
                    **image,
                    "spatial_shape": size,
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {"0": "CT"},
                }
            },
            "outputs": {
                "pred": {**label, "spatial_shape": size, "value_range": [0, len(channels) - 1], "channel_def": channels}
            },
        },
    }
