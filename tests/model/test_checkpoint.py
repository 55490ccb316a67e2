"""Weights in and out: what is not whole, not ours or not safe is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segvol_pl.__main__ import main
from segvol_pl.config import TrainConfig
from segvol_pl.errors import CheckpointError
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.checkpoint import load_encoder, load_model, load_weights
from segvol_pl.model.convert import export
from segvol_pl.training.segment import SegVolTask

MODEL = tiny_model(hidden_size=32, text_dim=8)
WIDER = tiny_model(hidden_size=64, text_dim=8)


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


def test_synonyms_travel_with_the_weights(tmp_path: Path) -> None:
    """From training to an exported file, and on. A file without them is as it was before there were any."""
    names, synonyms = ["liver", "spleen"], {"hepar": "liver", "lien": "spleen"}
    none: dict[str, str] = {}
    bank = TextBank.seeded([*names, *synonyms], 8)
    for given in (synonyms, none):
        task = SegVolTask(TrainConfig(model=MODEL), bank.rows(names, given))
        path = tmp_path / "last.ckpt"
        torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}, path)
        assert ("synonyms" in task.hparams) == bool(given)
        exported = export(path, tmp_path / "model.safetensors")
        with safe_open(exported, framework="pt") as opened:
            assert opened.metadata().keys() == {"format", "config", "categories", "order"} | (
                {"synonyms"} if given else set()
            )
        again = load_model(export(exported, tmp_path / "again.safetensors"))
        assert again.bank.names == names and again.bank.synonyms == given
        assert torch.equal(again.bank.vectors_KE, bank.vectors_KE[: 2 + len(given)])


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


# ---- what a file states of itself ----


WHOLE = ("categories", "config", "order", "synonyms")


def stating(exported: Path, target: Path, **changes: Any) -> Path:
    """The exported model with other keys of its model's section, or another text under `WHOLE`."""
    with safe_open(exported, framework="pt") as opened:
        header = dict(opened.metadata())
    whole = {name: changes.pop(name) for name in WHOLE if name in changes}
    header["config"] = json.dumps({**json.loads(header["config"]), **changes})
    save_file(load_file(exported), target, metadata={**header, **whole})
    return target


STATED: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_heads": 0}, r"states no model .* model\.num_heads: must be at least 1"),
    "no decoder heads": ({"decoder_heads": 0}, r"states no model .* model\.decoder_heads: must be at least 1"),
    "a flat patch": ({"patch_size": [4, 0, 8]}, r"states no model .* model\.patch_size: must be"),
    "no whole number": ({"mlp_dim": 32.5}, r"states no model .*32\.5.* mlp"),
    "heads that do not divide": ({"num_heads": 3}, "states no model .* model.hidden_size: 32 is not a multiple"),
    "an unknown key": ({"depth": 3}, "states no model .*'depth'"),
    "keys for a list": ({"patch_size": {"d": 4}}, "states no model"),
    "an unknown rule": ({"coordinates": "own"}, r"states no model .*'own'.* coordinates"),
    "the environment": ({"input_shape": "${oc.env:SECRET}"}, "refers to values outside"),
    "the environment in landmarks": ({"landmarks": ["1*m.${oc.env:SECRET}:x"]}, "refers to values outside"),
    "landmarks without end": ({"landmarks": [f"{'9' * 5000}*m:x"]}, "states no model"),
    "landmarks that it lacks": (
        {"landmarks": ["99999999999*m:x"]},
        r"than it states: lacks prompt_encoder\.landmark_embeddings",
    ),
    "wide": ({"hidden_size": 80000}, r"than it states: .* is \[32.*the model's is \[80000"),
    "wider than memory": ({"hidden_size": 8 * 10**18}, "states a model that cannot be made"),
    "wider than numbers": ({"mlp_dim": 10**30}, "states a model that cannot be made"),
    "deep": ({"num_layers": 10**6}, r"states model\.num_layers=1000000, and holds 1 of them"),
    "a deep decoder": ({"decoder_layers": 10**6}, r"states model\.decoder_layers=1000000, and holds 2 of them"),
    "a large input": ({"input_shape": [8, 1 << 20, 1 << 20]}, "than it states: .*position_embeddings"),
    "too few names": ({"categories": '["x"]'}, r"bank_KE is \[2, 8\], the model's is \[1, 8\]"),
    "no names": ({"categories": "[]"}, r"bank_KE is \[2, 8\], the model's is \[1, 8\]"),
    "a name twice": ({"categories": '["x", "x"]'}, "its categories are no list of different names"),
    "names that are none": ({"categories": '{"x": 1}'}, "its categories are no list"),
    "more synonyms than rows": ({"synonyms": '{"hepar": "liver"}'}, r"bank_KE is \[2, 8\], the model's is \[3, 8\]"),
    "a synonym of nothing": ({"synonyms": '{"hepar": "livr"}'}, "its synonyms are no other names of its categories"),
    "a synonym that is a name": ({"synonyms": '{"spleen": "liver"}'}, "its synonyms are no other names"),
    "synonyms that are none": ({"synonyms": '["hepar"]'}, "its synonyms are no other names"),
    "an order that is none": ({"order": "[1]"}, "its order are no list"),
    "no JSON": ({"config": "{"}, "'config' in its header is no JSON"),
    "nothing": ({"config": "null"}, "states no configuration"),
    "nested JSON": ({"config": "[" * 10**6}, "'config' in its header is no JSON"),
    "nested keys": ({"landmarks": json.loads("[" * 900 + "]" * 900)}, "states no model"),
}


@pytest.mark.parametrize("fault", STATED)
def test_a_header_that_is_not_its_models_is_refused_in_one_line(
    fault: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "8")
    changes, said = STATED[fault]
    stated = stating(export(checkpoint, tmp_path / "model.safetensors"), tmp_path / "stated.safetensors", **changes)
    with pytest.raises(CheckpointError, match=rf"stated\.safetensors:? .*{said}"):
        load_model(stated)
    assert main(["export", str(stated), str(tmp_path / "again.safetensors")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "unexpected" not in lines[0] and not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [{"config": None}, {"config": {"model": {"num_heads": 0}}}, {"categories": ["x"]}, {"synonyms": {"x": "y"}}],
)
def test_a_training_checkpoint_that_states_no_model_is_refused(
    changes: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= changes
    torch.save(content, tmp_path / "stated.ckpt")
    with pytest.raises(CheckpointError, match=r"stated\.ckpt.* (states|than it states|its synonyms)"):
        load_model(tmp_path / "stated.ckpt")


def test_an_older_header_lacks_keys(checkpoint: Path, tmp_path: Path) -> None:
    """What a later version adds to the model's section has its default."""
    exported = export(checkpoint, tmp_path / "model.safetensors")
    with safe_open(exported, framework="pt") as opened:
        config = json.loads(opened.metadata()["config"])
    del config["landmarks"], config["coordinates"]
    assert load_model(stating(exported, tmp_path / "old.safetensors", config=json.dumps(config))).config == MODEL


# ---- weights that are no numbers ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_that_are_not_finite_are_refused_by_name(
    suffix: str, value: float, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint if suffix == ".ckpt" else export(checkpoint, tmp_path / "model.safetensors")
    bad = tmp_path / f"bad{suffix}"
    if suffix == ".ckpt":
        content = torch.load(source, weights_only=True)
        content["state_dict"]["model.image_encoder.norm.weight"][3] = value
        torch.save(content, bad)
    else:
        tensors = load_file(source)
        tensors["image_encoder.norm.weight"][3] = value
        with safe_open(source, framework="pt") as opened:
            save_file(tensors, bad, metadata=opened.metadata())
    said = r"bad\.\w+: (model\.)?image_encoder\.norm\.weight holds NaN or infinite values"
    for load in (load_model, lambda path: load_encoder(SegVol(MODEL).image_encoder, path)):
        with pytest.raises(CheckpointError, match=said):
            load(bad)
    assert main(["export", str(bad), str(tmp_path / "out.safetensors")]) == 1
    assert "norm.weight holds NaN" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_finite_weights_may_be_large(checkpoint: Path, tmp_path: Path) -> None:
    """Their sum is not finite; they are."""
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["model.image_encoder.norm.weight"][:] = 3e38
    torch.save(content, tmp_path / "large.ckpt")
    assert load_model(tmp_path / "large.ckpt").image_encoder.norm.weight[0] > 1e38
