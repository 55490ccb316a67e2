"""What a start goes on from: whole checkpoints alone, and only on what the run began on."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from factories import train_config

from segvol_pl.config import PackConfig, Precision, TrainConfig
from segvol_pl.data.corpus import category_names, open_folders
from segvol_pl.errors import CheckpointError, ConfigError
from segvol_pl.model import TextBank
from segvol_pl.model.checkpoint import read_weights
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.resume import check_intact, newest_intact
from segvol_pl.training.run import train

HALF, STEPS = 4, 8
ZIP_HEADER, ZIP_LENGTHS = 30, 26
"""Bytes of a local file header, and where in it the lengths of the name and of what follows it stand."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_phantoms(folder, count=6, seed=0, scale=0.45)
    return folder


def _packed(phantoms: Path, out: Path, names: dict[str, str] | None = None, leave_out: int = 0) -> Path:
    """The phantoms as `phantom_shards` has them, but for the names of categories and the first volumes."""
    categories = yaml.safe_load((phantoms / "categories.yaml").read_text())
    listed = categories.get("categories", categories)
    renamed = {(names or {}).get(name, name): values for name, values in listed.items()}
    out.mkdir(parents=True)
    (out / "categories.yaml").write_text(yaml.safe_dump(renamed))
    for part in ("images", "labels"):
        shutil.copytree(phantoms / part, out / part)
        for path in sorted((out / part).iterdir())[:leave_out]:
            path.unlink()
    files = {part: str(out / part) for part in ("images", "labels")} | {"categories": str(out / "categories.yaml")}
    shape = {"overview_shape": [8, 16, 16], "samples_per_shard": 2, "test_fraction": 0.4, "workers": 1}
    pack(PackConfig(**files, out=str(out / "shards"), dataset="phantoms", **shape))  # type: ignore[arg-type]
    return out / "shards"


def _config(shards: Path, out: Path, steps: int = STEPS) -> TrainConfig:
    config = train_config(shards, out, steps=STEPS)
    run = replace(config.run, checkpoint_every=HALF, save_every=2, keep_last=2, val_every=HALF)
    return replace(config, run=run)


def _stopped(config: TrainConfig) -> Path:
    """Trains whole, then takes the run folder back to its middle; returns its checkpoints."""
    train(config)
    folder = Path(config.run.out) / "checkpoints"
    last = torch.load(folder / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS
    shutil.copy(folder / "step-6.ckpt", folder / "last.ckpt")
    (folder / "best.ckpt").unlink(missing_ok=True)  # perhaps of the last step
    return folder


@pytest.fixture(scope="module")
def begun(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that stands at step 6 of 8."""
    config = _config(phantom_shards, tmp_path_factory.mktemp("begun") / "run")
    _stopped(config)
    return config


def _copy(begun: TrainConfig, tmp_path: Path, shards: Path | None = None) -> TrainConfig:
    out = Path(shutil.copytree(begun.run.out, tmp_path / "run"))
    data = replace(begun.data, shards=str(shards or begun.data.shards))
    return replace(begun, run=replace(begun.run, out=str(out)), data=data)


def _losses(config: TrainConfig) -> dict[int, float]:
    return dict(read_metrics(Path(config.run.out) / "metrics.csv", "train/loss"))


# ---- on what the run began on ----


def test_other_category_names_are_refused_by_name(begun: TrainConfig, phantoms: Path, tmp_path: Path) -> None:
    shards = _packed(phantoms, tmp_path / "renamed", {"aorta": "vessel"})
    with pytest.raises(ConfigError, match=r"run\.out: .* different data: .* without aorta and with the new vessel: "):
        train(_copy(begun, tmp_path, shards))


def test_other_samples_are_refused(begun: TrainConfig, phantoms: Path, tmp_path: Path) -> None:
    shards = _packed(phantoms, tmp_path / "fewer", leave_out=1)
    with pytest.raises(ConfigError, match=r"run\.out: .* different data: .*run\.resume=false"):
        train(_copy(begun, tmp_path, shards))


def test_a_folder_may_move(begun: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved = Path(shutil.copytree(begun.data.shards, tmp_path / "elsewhere"))
    config = _copy(begun, tmp_path, moved)
    with caplog.at_level(logging.WARNING):
        train(config)
    assert f"data.shards {begun.data.shards} -> {moved} since the previous start" in caplog.text
    assert _losses(config) == _losses(begun)


def test_another_precision_is_said(begun: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = _copy(begun, tmp_path)
    with caplog.at_level(logging.WARNING):
        train(replace(config, run=replace(config.run, precision=Precision.bf16)))
    assert "run.precision fp32 -> bf16 since the previous start" in caplog.text


def test_a_finished_run_can_be_made_longer(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(phantom_shards, tmp_path / "run")
    train(config)
    longer = replace(config, optim=replace(config.optim, max_steps=STEPS + 2))
    with caplog.at_level(logging.WARNING):
        train(longer)
    assert "optim.max_steps 8 -> 10: the learning rate continues on the schedule of the new length" in caplog.text
    assert list(_losses(config)) == list(range(1, STEPS + 3))
    shorter = replace(config, optim=replace(config.optim, max_steps=STEPS))
    with pytest.raises(ConfigError, match=r"optim\.max_steps 10 -> 8"):
        train(shorter)


def test_a_checkpoint_older_than_a_key_goes_on_with_its_default(begun: TrainConfig, tmp_path: Path) -> None:
    config = _copy(begun, tmp_path)
    last = Path(config.run.out) / "checkpoints/last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    del checkpoint["hyper_parameters"]["config"]["optim"]["weight_decay_all"]
    torch.save(checkpoint, last)
    with pytest.raises(ConfigError, match=r"optim\.weight_decay_all True -> False"):
        train(replace(config, optim=replace(config.optim, weight_decay_all=False)))
    train(config)
    assert _losses(config) == _losses(begun)


def test_every_start_is_recorded(begun: TrainConfig, tmp_path: Path) -> None:
    config = _copy(begun, tmp_path)
    train(replace(config, run=replace(config.run, log_every=2)))
    starts = json.loads((Path(config.run.out) / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]
    assert "run.log_every 1 -> 2" in starts[1]["changed"] and starts[0]["packages"]["torch"]


# ---- whole checkpoints ----


def _flip(path: Path) -> None:
    """Flips a bit of the largest tensor: between tensors lie bytes of no meaning, which nothing protects."""
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(path.read_bytes())
    name, extra = struct.unpack_from("<HH", content, tensor.header_offset + ZIP_LENGTHS)
    content[tensor.header_offset + ZIP_HEADER + name + extra + tensor.file_size // 2] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_of_a_checkpoint_is_found(begun: TrainConfig, tmp_path: Path) -> None:
    path = Path(shutil.copy(Path(begun.run.out) / "checkpoints/last.ckpt", tmp_path))
    check_intact(path)
    _flip(path)
    with pytest.raises(ValueError, match=r"last\.ckpt: is damaged"):
        check_intact(path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_newest_intact_one(
    begun: TrainConfig, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = _copy(begun, tmp_path)
    folder = Path(config.run.out) / "checkpoints"
    last = folder / "last.ckpt"
    if damage == "flipped":
        _flip(last)
    elif damage == "missing":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:1000] if damage == "cut" else b"")
    with caplog.at_level(logging.WARNING):
        train(config)
    gone = " is missing: " if damage == "missing" else ": is damaged "
    assert f"{last}{gone}" in caplog.text and "resuming from step-6.ckpt" in caplog.text
    assert _losses(config) == _losses(begun)


def test_a_run_without_a_whole_checkpoint_is_not_begun_again(begun: TrainConfig, tmp_path: Path) -> None:
    config = _copy(begun, tmp_path)
    folder = Path(config.run.out) / "checkpoints"
    for path in folder.glob("*.ckpt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: is damaged .* no other .* is intact: .*run\.resume=false"):
        train(config)
    for path in folder.glob("*.ckpt"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"holds a run that came to step 8, and no checkpoint"):
        train(config)
    assert len(_losses(config)) == STEPS


def test_a_new_run_in_an_old_folder_sets_its_checkpoints_aside(begun: TrainConfig, tmp_path: Path) -> None:
    config = _copy(begun, tmp_path)
    folder = Path(config.run.out) / "checkpoints"
    old = {path.name for path in folder.glob("*.ckpt")}
    train(replace(config, run=replace(config.run, resume=False)))
    assert {path.name for path in (folder / "earlier-1").iterdir()} == old
    assert {path.name for path in folder.glob("step-*.ckpt")} == {"step-4.ckpt", "step-6.ckpt"}


def test_nothing_is_found_in_a_new_folder(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None


# ---- synonyms ----


def test_training_draws_among_synonyms_and_resumes_with_the_same_alone(
    begun: TrainConfig, phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file may move. Other synonyms are other rows of the text bank."""
    names = tmp_path / "names.yaml"
    # Of all categories, since a few steps show only some of them.
    others = {name: f"{name} of Latin" for name in category_names(open_folders(begun.data)) if name != "liver"}
    rest = "".join(f", {name}: [{other}]" for name, other in others.items())
    names.write_text(f"synonyms: {{liver: [jecur, hepar], tail: [cauda]{rest}}}\n")
    config = _config(phantom_shards, tmp_path / "run")
    config = replace(config, text=replace(config.text, synonyms=str(names)))
    with caplog.at_level(logging.INFO):
        folder = _stopped(config)
    assert "left out those of tail" in caplog.text
    weights = read_weights(folder / "last.ckpt")
    assert weights.synonyms == {"hepar": "liver", "jecur": "liver"} | {other: name for name, other in others.items()}
    count = len(weights.synonyms)
    assert torch.equal(weights.bank.vectors_KE[-count:], TextBank.seeded(list(weights.synonyms), 512).vectors_KE)
    assert _losses(config) != _losses(begun)
    names.write_text(f"synonyms: {{liver: [hepar, iecur]{rest}}}\n")
    with pytest.raises(
        ConfigError, match=r"text\.synonyms is now without jecur of liver and with the new iecur of liver: "
    ):
        train(config)
    moved = tmp_path / "moved.yaml"
    moved.write_text(f"synonyms: {{liver: [hepar, jecur]{rest}}}\n")
    train(replace(config, text=replace(config.text, synonyms=str(moved))))
    assert f"text.synonyms {names} -> {moved} since the previous start" in caplog.text
    with pytest.raises(ConfigError, match=r"text\.synonyms is now without .* of .*: "):
        train(replace(config, text=replace(config.text, synonyms=None)))
