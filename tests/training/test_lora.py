"""Low-rank adapters of the image encoder: their start, their training, and how they become weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import TINY, train_config
from weights import weights_of

from segvol_pl.config import OptimConfig, SegVolConfig, TrainConfig, Transfer
from segvol_pl.config.fields import ConfigError
from segvol_pl.errors import CheckpointError
from segvol_pl.experiments.grid import parameters
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.model import SegVol, TextBank, lora
from segvol_pl.model.checkpoint import load_encoder, load_model, read_encoder, read_weights
from segvol_pl.model.convert import export
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.planning import flops, memory
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.parameter_groups import parameter_groups
from segvol_pl.training.run import train

STEPS, HALF = 4, 2
DEEP = replace(TINY, num_layers=2)


def _adapted(config: TrainConfig) -> tuple[SegVol, SegVol]:
    """A model before, and the same with adapters that have trained."""
    torch.manual_seed(0)
    before = SegVol(config.model, TextBank.seeded(["liver"], config.model.text_dim)).eval()
    model = SegVol(config.model, before.bank).eval()
    model.load_state_dict(before.state_dict())
    lora.adapt(model, config.adapted, config.optim.lora_rank, config.optim.lora_alpha)
    return before, model


def _config(targets: list[str] | None = None, model: SegVolConfig = DEEP, rank: int = 3) -> TrainConfig:
    optim = OptimConfig(max_steps=1, lora_rank=rank, lora_alpha=2.0)
    return TrainConfig(model=model, optim=replace(optim, **({"lora_targets": targets} if targets else {})))


@torch.no_grad()
def test_training_starts_from_the_models_function_and_merging_keeps_what_was_learnt() -> None:
    config = _config()
    before, model = _adapted(config)
    image, prompt = torch.rand(2, 1, *config.model.input_shape), Prompt(text="liver", box=(1, 2, 2, 6, 12, 12))
    first = before(image, prompt)
    assert torch.equal(model(image, prompt), first)
    for name, parameter in model.named_parameters():
        if name.endswith(lora.B):
            torch.nn.init.normal_(parameter, std=0.3)
    learnt = model(image, prompt)
    before.load_state_dict(lora.merged(model.state_dict(), config.optim.lora_alpha))
    assert (learnt - first).abs().max() > 1e-2
    torch.testing.assert_close(before(image, prompt), learnt, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [None, ["*.blocks.1.*"], ["*.attn.qkv", "*.linear2"]])
@pytest.mark.parametrize("freeze", [[], ["mask_decoder.*", "image_encoder.*"]])
def test_what_trains_is_counted(targets: list[str] | None, freeze: list[str]) -> None:
    config = replace(_config(targets), freeze=freeze)
    _, model = _adapted(config)
    if freeze:
        model.mask_decoder.requires_grad_(False)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    encoder = {name.rpartition(".")[0] for name in trained if name.startswith("image_encoder.")}
    assert encoder == set(config.adapted) and len(config.adapted) == (8 if targets is None else 4)
    size = sum(model.get_parameter(name).numel() for name in trained)
    assert parameters(config) == size
    assert sum(flops.run_parameters(config).values()) == sum(map(torch.numel, model.parameters()))
    if not freeze:
        assert sum(flops.trained_parameters(config).values()) == size


def test_frozen_weights_need_neither_gradients_nor_moments() -> None:
    base = SegVolConfig()
    whole = memory.peak(_config(model=base, rank=0), 1, False)
    thin = memory.peak(_config(model=base, rank=8), 1, False)
    added = 4 * flops.adapter_parameters(_config(model=base, rank=8))
    encoder = 4 * flops.parameters(base)["image_encoder"]
    assert thin.weights == whole.weights + added
    assert thin.optimizer == whole.optimizer + 2 * (added - encoder)


def test_adapters_decay_as_matrices_do() -> None:
    config = _config()
    _, model = _adapted(config)
    decays, others = parameter_groups(model, replace(config.optim, weight_decay_all=False))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[each] for each in decays["params"]} >= {f"{layer}.{lora.A}" for layer in config.adapted}
    assert not any("lora" in names[each] for each in others["params"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transfer": Transfer.mup}, r"optim\.lora_rank: .*optim\.transfer=mup"),
        ({"lora_targets": ["*.qvk"]}, r"optim\.lora_targets: '\*\.qvk' matches none of image_encoder\.blocks\.0"),
        ({"lora_targets": []}, r"optim\.lora_targets: names no layer"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(model=TINY, optim=OptimConfig(**{"max_steps": 1, "lora_rank": 2, **changes}))  # type: ignore[arg-type]


# ---- in a run ----


@pytest.fixture(scope="module")
def adapting(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run with adapters and averages."""
    config = train_config(phantom_shards, tmp_path_factory.mktemp("adapting") / "run", steps=STEPS)
    optim = replace(config.optim, lora_rank=2, ema=0.5)
    run = replace(config.run, checkpoint_every=HALF, save_every=HALF, val_every=HALF)
    config = replace(config, optim=optim, run=run)
    train(config)
    return config


def test_a_run_trains_adapters_alone_and_resumes_bit_for_bit(adapting: TrainConfig, tmp_path: Path) -> None:
    folder = Path(adapting.run.out) / "checkpoints"
    first, last = weights_of(folder / f"step-{HALF}.ckpt"), weights_of(folder / "last.ckpt")
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    encoder = {name for name in moved if name.startswith("model.image_encoder.")}
    assert encoder == {f"model.{layer}.{leaf}" for layer in adapting.adapted for leaf in lora.MATRICES}
    assert any(name.startswith("model.mask_decoder.") for name in moved)
    again = tmp_path / "again/checkpoints/last.ckpt"
    again.parent.mkdir(parents=True)
    shutil.copy(folder / f"step-{HALF}.ckpt", again)
    train(replace(adapting, run=replace(adapting.run, out=str(tmp_path / "again"))))
    resumed = weights_of(again)
    assert all(torch.equal(resumed[name], last[name]) for name in last)


def test_every_reader_gets_an_ordinary_model(adapting: TrainConfig, tmp_path: Path) -> None:
    last = Path(adapting.run.out) / "checkpoints/last.ckpt"
    state = {name.removeprefix("model."): value for name, value in weights_of(last).items()}
    expected = lora.merged(state, adapting.optim.lora_alpha)
    model = load_model(last)
    assert model.state_dict().keys() == expected.keys() != state.keys()
    found = {
        "read": read_weights(last).tensors,
        "exported": read_weights(export(last, tmp_path / "model.safetensors")).tensors,
        "loaded": dict(model.state_dict()),
    }
    encoder = ImageEncoder(adapting.model)
    load_encoder(encoder, last)
    alone = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    frozen = {f"image_encoder.{name}": value for name, value in read_encoder(last)[0].state_dict().items()}
    for name, tensors in (found | {"encoder": alone, "frozen": frozen}).items():
        assert all(torch.equal(value, expected[key]) for key, value in tensors.items()), name
    layer = f"{adapting.adapted[0]}.weight"
    assert not torch.equal(expected[layer], state[layer])


def test_the_exported_averages_are_what_was_validated(
    adapting: TrainConfig, phantom_shards: Path, tmp_path: Path
) -> None:
    """Also as the weights that another run with adapters starts from."""
    last = Path(adapting.run.out) / "checkpoints/last.ckpt"
    exported = export(last, tmp_path / "ema.safetensors", averaged=True)
    validated = dict(read_metrics(Path(adapting.run.out) / "metrics.csv", "val/loss"))[STEPS]
    config = train_config(phantom_shards, tmp_path / "next", steps=1)
    train(replace(config, weights=str(exported), optim=replace(config.optim, lora_rank=1)))
    began = dict(read_metrics(tmp_path / "next/metrics.csv", "val/loss"))[0]
    assert began == pytest.approx(validated, rel=1e-5)


def test_adapters_that_do_not_fit_are_named(adapting: TrainConfig, tmp_path: Path) -> None:
    checkpoint = torch.load(Path(adapting.run.out) / "checkpoints/last.ckpt", weights_only=True)
    layer = f"model.{adapting.adapted[0]}"
    checkpoint["state_dict"][f"{layer}.{lora.B}"] = torch.zeros(3, 2)
    torch.save(checkpoint, tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match=rf"wrong\.ckpt: its adapters do not fit \({layer}\)"):
        read_weights(tmp_path / "wrong.ckpt")
