"""A MONAI bundle segments a folder of CTs when MONAI runs it, as `predict` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from ct_files import write_case
from factories import save_untrained

from segvol_pl.__main__ import main
from segvol_pl.errors import ExportError
from segvol_pl.model.checkpoint import read_weights
from segvol_pl.sharing.monai_bundle import write_bundle

RUN = "import sys, json; from monai.bundle import run; run(**json.loads(sys.argv[1]))"
"""What `python -m monai.bundle run` calls once the package fire has read its arguments."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("untrained") / "last.ckpt", ["liver", "spleen"])


@pytest.mark.slow
def test_monai_runs_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    bundle, masks = tmp_path / "bundle", tmp_path / "masks"
    assert main(["export", str(checkpoint), str(bundle), "format=monai"]) == 0
    ct, label = write_case(tmp_path / "cts", "a")
    label.unlink()
    keys = {"config_file": "configs/inference.json", "meta_file": "configs/metadata.json", "bundle_root": str(bundle)}
    keys |= {"dataset_dir": str(tmp_path / "cts"), "output_dir": str(masks), "device": "cpu", "precision": "fp32"}
    subprocess.run([sys.executable, "-c", RUN, json.dumps(keys)], cwd=bundle, check=True, timeout=200)
    shared = [f"checkpoint={checkpoint}", f"image={ct}", "text=all", "precision=fp32", "device=cpu"]
    assert main(["predict", *shared, f"out={tmp_path / 'own.nii.gz'}"]) == 0
    (theirs,) = masks.glob("*.nii.gz")
    found, own = (np.asarray(nibabel.load(path).dataobj) for path in (theirs, tmp_path / "own.nii.gz"))
    assert set(np.unique(own)) >= {0, 1} and np.array_equal(found, own)


def test_a_bundle_holds_no_pickle_and_states_its_classes(checkpoint: Path, tmp_path: Path) -> None:
    write_bundle(read_weights(checkpoint), tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["configs/inference.json", "configs/metadata.json", "models/model.safetensors"]
    about = json.loads((tmp_path / "configs/metadata.json").read_text(encoding="utf-8"))
    channels = about["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {"0": "background", "1": "liver", "2": "spleen"}


def test_a_model_without_texts_makes_no_bundle(tmp_path: Path) -> None:
    weights = read_weights(save_untrained(tmp_path / "last.ckpt", []))
    with pytest.raises(ExportError, match="holds no text bank, and a bundle segments by text"):
        write_bundle(weights, tmp_path)
