"""Weights in and out: what is not whole, not ours or not safe is refused in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from segvol_pl.config import SegVolConfig, TrainConfig
from segvol_pl.data.prompts import Prompt
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.checkpoint import CheckpointError, load_encoder, load_model, load_weights
from segvol_pl.release import export
from segvol_pl.tasks.segment import SegVolTask

SMALL = {"layers": 1, "heads": 2, "mlp": 32, "decoder_heads": 2, "decoder_mlp": 32, "text_dim": 8}
MODEL = SegVolConfig(input_shape=[8, 16, 16], patch=[4, 8, 8], hidden=32, **SMALL)
WIDER = SegVolConfig(input_shape=[8, 16, 16], patch=[4, 8, 8], hidden=64, **SMALL)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What Lightning writes of a task, less the trainer's own state."""
    task = SegVolTask(TrainConfig(model=MODEL), TextBank.seeded(["liver", "spleen"], 8))
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "global_step": 3}, path)
    return path


def test_an_exported_model_stands_alone(checkpoint: Path, tmp_path: Path) -> None:
    exported = export(checkpoint, tmp_path / "model.safetensors")
    image = torch.rand(1, 1, 8, 16, 16)
    first, second = load_model(checkpoint), load_model(exported)
    assert second.bank.names == ["liver", "spleen"] and second.config == MODEL
    prompt = Prompt(text="spleen", box=(0, 0, 0, 3, 4, 5))
    with torch.inference_mode():
        assert torch.equal(first(image, prompt), second(image, prompt))


def test_weights_load_into_a_model_with_another_bank(checkpoint: Path) -> None:
    model = SegVol(MODEL, TextBank.seeded(["kidney"], 8))
    load_weights(model, checkpoint)
    source = load_model(checkpoint)
    assert torch.equal(model.text_encoder.dim_align.weight, source.text_encoder.dim_align.weight)
    assert model.text_encoder.bank_KE.shape == (1, 8)


def test_a_model_of_another_size_is_refused_with_names(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"of another model: .* is \[32.*the model's is \[64.*more"):
        load_weights(SegVol(WIDER), checkpoint)
    with pytest.raises(CheckpointError, match="of another model"):
        load_encoder(SegVol(WIDER).image_encoder, checkpoint)


def test_the_encoder_of_a_checkpoint_loads(checkpoint: Path) -> None:
    encoder = SegVol(MODEL).image_encoder
    assert load_encoder(encoder, checkpoint).loaded == len(encoder.state_dict())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_missing_and_truncated_files(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_model(tmp_path / f"none{suffix}")
    whole = checkpoint if suffix == ".ckpt" else export(checkpoint, tmp_path / "model.safetensors")
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(cut)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/segvol_pl_was_here",)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_checkpoint_is_refused(tmp_path: Path, plain_pickle: bool) -> None:
    path = tmp_path / "bad.ckpt"
    content = {"state_dict": {}, "extra": Malicious()}
    if plain_pickle:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match="refused"):
        load_model(path)
    assert not Path("/tmp/segvol_pl_was_here").exists()


def test_foreign_files_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = tmp_path / "weights.npz"
    other.touch()
    with pytest.raises(CheckpointError, match="unknown kind"):
        load_model(other)
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors or \.pth"):
        export(checkpoint, tmp_path / "model.onnx")
    state = {"mask_token": torch.zeros(8)}
    torch.save({"state_dict": state, "hyper_parameters": {"task": "pretrain"}}, tmp_path / "pre.ckpt")
    with pytest.raises(CheckpointError, match="checkpoint of pretrain"):
        load_model(tmp_path / "pre.ckpt")
