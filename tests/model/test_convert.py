"""Released weights in, work done here back out: every tensor accounted for, nothing lost, nothing unsafe."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from letters import WORDS, write_tokenizer
from published import deterministic, released_state
from ranks import Ranks
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from segvol_pl.__main__ import main
from segvol_pl.config import Convention, ImportConfig, SegVolConfig, TextConfig, TextSource
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.errors import CheckpointError, TextError, UnknownCategory
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.checkpoint import load_encoder, load_model, load_weights, read_weights
from segvol_pl.model.convert import export, import_weights
from segvol_pl.training.run import train

MODEL = tiny_model(hidden_size=32, num_layers=2, text_dim=16, coordinates=Convention.published)
TOWER = CLIPTextConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=1,
    bos_token_id=len(WORDS) - 2,
    eos_token_id=len(WORDS) - 1,
)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return released_state(MODEL, TOWER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the released files lie, their tokenizer beside them."""
    write_tokenizer(tmp_path)
    (tmp_path / "categories.yaml").write_text("liver: [1]\nspleen: [2]\n")
    return tmp_path


@pytest.fixture
def pth(state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "SegVol_v1.pth"
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 270}, path)
    return path


def importing(source: Path, out: str = "model.safetensors", **keys: object) -> ImportConfig:
    config = ImportConfig(str(source), str(source.parent / out), str(source.parent / "categories.yaml"), MODEL)
    return replace(config, **keys)  # type: ignore[arg-type]


def write(form: str, state: dict[str, Tensor], folder: Path) -> Path:
    if form == "pth":
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, folder / "released.pth")
        return folder / "released.pth"
    if form == "bin":
        torch.save({f"model.{name}": value for name, value in state.items()}, folder / "released.bin")
        return folder / "released.bin"
    save_file({f"model.{name}": value for name, value in state.items()}, folder / "released.safetensors")
    return folder / "released.safetensors"


@pytest.mark.parametrize("form", ["pth", "bin", "safetensors"])
@pytest.mark.parametrize("older", [False, True], ids=["", "older transformers"])
def test_every_released_form_is_imported_whole(form: str, older: bool, state: dict[str, Tensor], folder: Path) -> None:
    if older:
        level = {name: name.replace("clip_text_model.", "clip_text_model.text_model.") for name in state}
        state = {level[name]: value for name, value in state.items()}
        state["text_encoder.clip_text_model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    model = load_model(import_weights(importing(write(form, state, folder))))
    assert model.config == MODEL and model.bank.names == ["liver", "spleen"]
    held = model.state_dict()
    for name in held.keys() & state.keys():
        assert torch.equal(held[name], state[name]), name
    assert held.keys() - state.keys() == {"text_encoder.bank_KE"}


def test_the_bank_is_made_by_the_towers_own_weights(pth: Path, state: dict[str, Tensor], folder: Path) -> None:
    """Against transformers' own tower, loaded from a folder."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel(TOWER)
    held = tower.state_dict()
    stem = "text_encoder.clip_text_model."
    tower.load_state_dict({name: state[stem + name.removeprefix("text_model.")] for name in held})
    tower.save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder / "clip")
    want = TextBank.from_clip(["liver", "spleen"], TextConfig(clip_model=str(folder / "clip")))
    got = load_model(import_weights(importing(pth))).bank
    torch.testing.assert_close(got.vectors_KE, want.vectors_KE)


def test_an_import_knows_the_synonyms_of_its_categories(pth: Path, folder: Path) -> None:
    plain = load_model(import_weights(importing(pth))).bank
    (folder / "categories.yaml").write_text("categories: {liver: 1, spleen: 2}\nsynonyms: {spleen: [lien]}\n")
    bank = load_model(import_weights(importing(pth))).bank
    assert bank.names == plain.names and bank.synonyms == {"lien": "spleen"} and len(bank.vectors_KE) == 3
    torch.testing.assert_close(bank.vectors_KE[:2], plain.vectors_KE)


def test_a_round_trip_is_bit_equal(pth: Path, state: dict[str, Tensor]) -> None:
    back = export(import_weights(importing(pth)), pth.parent / "back.pth")
    first, second = (torch.load(path, weights_only=True)["model"] for path in (pth, back))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


def test_work_done_here_goes_back_with_the_tower_of_the_published_file(pth: Path, phantom_shards: Path) -> None:
    """Fine-tuning by one key; what it exports has the published names, with other weights."""
    imported = import_weights(importing(pth))
    last = train(load("train", [*fine_tuning(pth.parent, phantom_shards), f"weights={imported}"]))
    with pytest.raises(CheckpointError, match="third argument"):
        export(last, pth.parent / "tuned.pth")
    for published in (pth, imported):
        tuned = torch.load(export(last, pth.parent / "tuned.pth", published), weights_only=True)["model"]
        before = torch.load(pth, weights_only=True)["model"]
        assert list(tuned) == list(before)
        changed = {name for name in tuned if not torch.equal(tuned[name], before[name])}
        # Softmax is blind to what is added to all keys alike.
        kept = {name for name in set(before) - changed if not name.endswith("k_proj.bias")}
        assert "module.text_encoder.dim_align.weight" in changed
        assert "module.image_encoder.blocks.0.attn.qkv.weight" in changed
        assert {name for name in kept if "clip_text_model" not in name} == {
            name for name in before if is_never_run(name) or name.endswith("gaussian_matrix")
        }


def is_never_run(name: str) -> bool:
    parts = ("iou_prediction_head", "mask_downscaling", *(f"hypernetworks_mlps.{i}." for i in (1, 2, 3)))
    return any(part in name for part in parts)


def fine_tuning(folder: Path, shards: Path) -> list[str]:
    (folder / "model.yaml").write_text(to_yaml(MODEL))
    return [
        f"model={folder / 'model.yaml'}",
        f"data.shards={shards}",
        f"run.out={folder / 'run'}",
        "optim.max_steps=3",
        "optim.lr=1e-3",
        "optim.warmup_steps=1",
        "data.global_batch=2",
        "data.workers=0",
        "run.val_batches=1",
        "run.accelerator=cpu",
        "run.precision=fp32",
        "track.wandb=disabled",
        "prompts.pseudo_per_volume=2",
    ]


def test_fine_tuning_takes_the_released_file_itself(
    pth: Path, phantom_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [*fine_tuning(pth.parent, phantom_shards), f"weights={pth}"]
    caplog.set_level("INFO", "segvol_pl")
    assert load_model(train(load("train", keys))).bank.names
    assert "text bank: computed by the text tower" in caplog.text and "tensors from" in caplog.text


def test_two_ranks_fine_tune_without_searching_for_unused_parameters(
    pth: Path, phantom_shards: Path, ranks: dict[int, Ranks]
) -> None:
    keys = [*fine_tuning(pth.parent, phantom_shards), f"weights={pth}", "run.strategy=ddp", "run.cpu_threads=1"]
    said = ranks[2]("train", *keys)
    assert "tensors from" in said and "unused" not in said
    assert load_model(pth.parent / "run" / "checkpoints" / "last.ckpt").bank.names


def test_what_trains_gets_a_gradient_and_what_is_frozen_none(pth: Path, state: dict[str, Tensor]) -> None:
    weights = read_weights(pth, MODEL)
    model = SegVol(MODEL, TextBank.seeded(["liver"], 16))
    load_weights(model, weights)
    model.train()(torch.rand(1, 1, *MODEL.input_shape), prompt_of_every_kind()).square().mean().backward()
    without = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    # Padding stands where points come without a box; softmax is blind to what is added to all keys alike.
    assert {name for name in without if not name.endswith("k_proj.bias")} == {"prompt_encoder.not_a_point_embed.weight"}
    assert {name for name, _ in model.named_buffers() if name in model.state_dict()} == {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "text_encoder.bank_KE",
    }


def prompt_of_every_kind() -> Prompt:
    points_N3 = np.array([[1, 2, 3], [4, 9, 12]])
    return Prompt(text="liver", box=(0, 1, 2, 5, 9, 12), points_N3=points_N3, labels_N=np.array([1, 0]))


def test_weights_of_other_coordinates_are_refused(pth: Path, phantom_shards: Path) -> None:
    keys = [*fine_tuning(pth.parent, phantom_shards), f"weights={pth}", "model.coordinates=consistent"]
    with pytest.raises(ValueError, match=r"model\.coordinates: consistent, but .*set model\.coordinates=published"):
        train(load("train", keys))


def test_the_released_vit_is_an_encoder(state: dict[str, Tensor], folder: Path) -> None:
    stem = "image_encoder."
    lightning = {f"model.encoder.{n.removeprefix(stem)}": v for n, v in state.items() if n.startswith(stem)}
    head = {"model.mask_token": deterministic("mask_token", (1, 1, 32))}
    torch.save({"state_dict": {**lightning, **head}, "epoch": 1999, "hyper_parameters": {}}, folder / "ViT.ckpt")
    imported = import_weights(importing(folder / "ViT.ckpt", out="vit.safetensors"))
    for path in (folder / "ViT.ckpt", imported):
        encoder = SegVol(MODEL).image_encoder
        load_encoder(encoder, path)
        assert all(torch.equal(value, state[stem + name]) for name, value in encoder.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no mask decoder"):
        load_model(folder / "ViT.ckpt")


def test_missing_unknown_and_misshapen_tensors_are_listed_and_refused_unless_allowed(
    state: dict[str, Tensor], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {name: value for name, value in state.items() if name != "image_encoder.norm.bias"}
    changed["image_encoder.extra"] = torch.zeros(1)
    changed["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 8)
    path = write("pth", changed, folder)
    said = r"has unknown image_encoder.extra; lacks image_encoder.norm.bias; .*no_mask_embed.weight is \[1, 8\]"
    with pytest.raises(CheckpointError, match=said):
        import_weights(importing(path))
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"is of another model: .*no_mask_embed"):
        import_weights(importing(path, allow=["image_encoder.*"]))
    caplog.set_level("INFO", "segvol_pl")
    imported = import_weights(importing(path, allow=["image_encoder.*", "*.no_mask_embed.weight"]))
    assert "kept as they were: image_encoder.norm.bias" in caplog.text
    assert "not used: image_encoder.extra" in caplog.text
    assert load_model(imported).state_dict()["image_encoder.norm.bias"].eq(0).all()


def test_without_categories_an_import_answers_boxes_and_no_text(pth: Path) -> None:
    model = load_model(import_weights(importing(pth, categories=None)))
    image = torch.rand(1, 1, *MODEL.input_shape)
    assert model(image, Prompt(box=(0, 0, 0, 3, 4, 5))).shape == (1, 1, *MODEL.input_shape)
    with pytest.raises(UnknownCategory, match="categories=FILE"):
        model(image, Prompt(text="liver"))


def test_released_weights_load_into_a_model_directly(pth: Path, state: dict[str, Tensor]) -> None:
    model = SegVol(MODEL, TextBank.seeded(["liver"], 16))
    report = load_weights(model, pth)
    assert report.kept == [] and report.unused == []
    assert torch.equal(model.text_encoder.dim_align.weight, state["text_encoder.dim_align.weight"])
    assert {"iou_prediction_head", "mask_downscaling"} <= {
        name.split(".")[1] for name in read_weights(pth).extra_tensors
    }


def test_what_cannot_run_in_the_published_code_is_not_exported_to_it(pth: Path, folder: Path) -> None:
    consistent = SegVolConfig(**{**vars(MODEL), "coordinates": Convention.consistent})
    imported = import_weights(importing(pth, model=consistent))
    with pytest.raises(CheckpointError, match=r"coordinates=consistent"):
        export(imported, folder / "back.pth")
    assert not (folder / "back.pth").exists()


def test_a_tower_without_a_tokenizer_says_where_to_get_one(pth: Path, folder: Path) -> None:
    (folder / "vocab.json").unlink()
    with pytest.raises(TextError, match=r"text\.clip_model: cannot load .*nowhere.*give a local folder"):
        import_weights(importing(pth, text=TextConfig(clip_model=str(folder / "nowhere"))))


def test_text_from_weights_needs_weights(phantom_shards: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.source: weights needs weights=FILE"):
        train(load("train", [*fine_tuning(folder, phantom_shards), f"text.source={TextSource.weights.value}"]))


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/segvol_pl_was_here",)


def test_unusable_files_are_refused_in_one_line(
    pth: Path, state: dict[str, Tensor], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = folder / "cut.pth"
    cut.write_bytes(pth.read_bytes()[:-1000])
    torch.save({"model": state, "extra": Malicious()}, folder / "evil.pth")
    torch.save({"model": [1, 2]}, folder / "empty.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    files = {
        "cut.pth": "is it complete",
        "evil.pth": "refused",
        "empty.pth": "no tensors",
        "tensor.pth": "holds a Tensor",
    }
    for name, said in {**files, "none.pth": "no such checkpoint", pth.name: "is of another model"}.items():
        assert main(["import", str(folder / name), str(folder / "out.safetensors")]) == 1
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error
    assert not (folder / "out.safetensors").exists() and not Path("/tmp/segvol_pl_was_here").exists()


def test_import_and_export_by_the_command_line(pth: Path, folder: Path) -> None:
    (folder / "model.yaml").write_text(to_yaml(MODEL))
    keys = [f"model={folder / 'model.yaml'}", f"categories={folder / 'categories.yaml'}"]
    out = folder / "model.safetensors"
    assert main(["import", str(pth), str(out), *keys]) == 0
    assert main(["export", str(out), str(folder / "back.pth")]) == 0
    assert main(["import", str(out), str(folder / "again.safetensors"), *keys]) == 1
    assert main(["import", str(pth)]) == 2
    assert (folder / "back.pth").exists()


# ---- who may read what was written ----


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640)])
def test_written_weights_are_as_readable_as_other_files(
    umask: int, expected: int, pth: Path, state: dict[str, Tensor], folder: Path
) -> None:
    stem = "image_encoder."
    torch.save({f"encoder.{n.removeprefix(stem)}": v for n, v in state.items() if n.startswith(stem)}, folder / "v.bin")
    before = os.umask(umask)
    try:
        whole = import_weights(importing(pth))
        encoder = import_weights(importing(folder / "v.bin", out="vit.safetensors"))
        written = [whole, encoder, export(whole, folder / "again.safetensors"), export(whole, folder / "again.pth")]
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in written] == [expected] * 4
