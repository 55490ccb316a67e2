"""A model as ONNX files computes what it computed in torch, and the example segments with nothing else."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import onnxruntime
import pytest
import torch
from ct_files import phantom, write_image
from factories import save_untrained

from segvol_pl.__main__ import main
from segvol_pl.config import ExportConfig, ExportFormat, SegVolConfig
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.model.checkpoint import load_model
from segvol_pl.model.mask_decoder import Upscaling
from segvol_pl.model.segvol import SegVol
from segvol_pl.model.text_encoder import TextBank
from segvol_pl.sharing.export import export
from segvol_pl.sharing.onnx_files import OPSET, Decoder, example_inputs, logits_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
CLOSE = 1e-4
"""Largest difference of logits."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with every part, whose masks count though it has not been trained."""
    path = save_untrained(
        tmp_path_factory.mktemp("untrained") / "last.ckpt",
        ["liver", "spleen"],
        TextBank.seeded(["liver", "spleen", "higado"], 16).rows(["liver", "spleen"], {"higado": "liver"}),
        mask_prompt=True,
        point_maps=True,
        landmarks=["line"],
    )
    content = torch.load(path, weights_only=True)
    for name, value in content["state_dict"].items():
        if "mask_embedding" in name:
            value.normal_(std=0.1)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    folder = checkpoint.with_name("onnx")
    assert main(["export", str(checkpoint), f"out={folder}", "format=onnx"]) == 0
    return folder


def differing(model: SegVol, folder: Path, prompts: int, points: int) -> float:
    given = example_inputs(model.config, prompts, points, seed=prompts)
    image = torch.rand(1, 1, *model.config.input_shape, generator=torch.Generator().manual_seed(points))
    with torch.no_grad():
        own = Decoder(model)(model.encode(image), **given)
    assert own.shape == (prompts, *model.config.input_shape)
    return float((logits_of(folder, image, given) - own).abs().max())


@pytest.mark.slow
def test_logits_are_torchs_for_any_number_of_prompts_and_points(checkpoint: Path, exported: Path) -> None:
    model = load_model(checkpoint)
    assert max(differing(model, exported, *shape) for shape in [(1, 1), (1, 6), (5, 1), (3, 4)]) < CLOSE


@pytest.mark.slow
def test_the_decoder_reads_a_prompt_as_the_model_does(checkpoint: Path, exported: Path) -> None:
    """What a prompt lacks is said by its values: each combination of parts gives the model's own logits."""
    model = load_model(checkpoint)
    image = torch.rand(1, 1, *model.config.input_shape)
    points_23, line_23 = np.array([[1, 4, 5], [6, 20, 9]]), np.array([[2, 3, 4], [2, 9, 30]])
    prompts = [
        Prompt(text="spleen"),
        Prompt(points_N3=points_23, labels_N=np.array([1, 0])),
        Prompt(box=(0, 1, 2, 6, 20, 30)),
        Prompt(text="liver", box=(0, 1, 2, 6, 20, 30), landmarks={"line": line_23}),
        Prompt(box=(0, 0, 0, 0, 0, 0), mask_DHW=np.random.default_rng(0).random(model.config.mask_shape, np.float32)),
    ]
    given = example_inputs(model.config, len(prompts), 2)
    given["labels"][:] = -2
    given["points"][1], given["labels"][1] = torch.tensor(points_23), torch.tensor([1, 0])
    for name in ("box", "landmarks", "mask"):
        given[name][:] = -1
    given["text"][:] = 0
    given["text"][0], given["text"][3] = model.bank.vectors_KE[1], model.bank.vectors_KE[0]
    for place in (2, 3, 4):
        given["box"][place] = torch.tensor(prompts[place].box)
    given["landmarks"][3] = torch.tensor(line_23)
    given["mask"][4] = torch.from_numpy(prompts[4].mask_DHW)
    with torch.no_grad():
        own_PDHW = model.decode(model.encode(image), model.prompts([prompts]))[0]
    assert float((logits_of(exported, image, given) - own_PDHW).abs().max()) < CLOSE


@pytest.mark.slow
def test_the_example_segments_as_predict_does(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    """Voxel by voxel, on a CT in another orientation that is smaller than a window along two axes."""
    turned = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])
    ct = write_image(phantom()[0], tmp_path / "ct.nii.gz", turned)
    command = [sys.executable, str(EXAMPLE), str(exported), str(ct), str(tmp_path / "onnx.nii.gz"), "higado"]
    subprocess.run(command, check=True)
    keys = [f"checkpoint={checkpoint}", f"image={ct}", "text=higado", "precision=fp32", "device=cpu"]
    assert main(["predict", *keys, f"out={tmp_path / 'torch.nii.gz'}"]) == 0
    theirs, ours = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("onnx", "torch"))
    assert np.allclose(theirs.affine, ours.affine) and theirs.shape == ours.shape
    mask, other = (np.asarray(image.dataobj) > 0 for image in (theirs, ours))
    assert 0.05 < mask.mean() < 0.95
    assert (mask != other).sum() <= 2  # voxels whose logit is nearer to 0 than rounding


@pytest.mark.slow
def test_the_folder_says_what_its_files_are(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "decoder.onnx",
        "encoder.onnx",
        "model.json",
        "text_bank.npy",
    ]
    about = json.loads((exported / "model.json").read_text(encoding="utf-8"))
    assert about["categories"] == ["liver", "spleen"] and about["synonyms"] == {"higado": "liver"}
    assert about["landmarks"] == {"line": 2}
    assert np.load(exported / "text_bank.npy", allow_pickle=False).shape == (3, about["text_dim"])


def test_the_example_is_short_and_needs_no_torch() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert imported <= {"json", "sys", "itertools", "pathlib", "nibabel", "numpy", "onnxruntime"}


def test_without_the_packages_it_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    config = ExportConfig(str(checkpoint), str(tmp_path / "model"), format=ExportFormat.onnx)
    with pytest.raises(ConfigError, match=r"format: onnx needs onnxscript: pip install 'segvol-pl\[onnx\]'"):
        export(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sums_over_the_published_number_of_values_are_as_near(tmp_path: Path) -> None:
    """The decoder normalises 3 million values of each prompt: ONNX Runtime's own norm is wrong by 5e-4 there."""
    torch.manual_seed(0)
    upscaling, path = Upscaling(768, SegVolConfig().grid).eval(), tmp_path / "upscaling.onnx"
    given = (3 * torch.randn(2, 2048, 768), torch.randn(2, 96) / 10)
    torch.onnx.export(upscaling, given, path, dynamo=True, external_data=False, opset_version=OPSET, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    with torch.no_grad():
        assert float((torch.from_numpy(found) - upscaling(*given)).abs().max()) < CLOSE
