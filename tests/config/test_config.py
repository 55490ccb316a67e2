"""Configuration: every file loads, every fault is told with key, origin and remedy, every key is used and explained."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from segvol_pl.config import MISSING, SCHEMAS, Convention, OptimConfig, Range, RunConfig, SegVolConfig, ZoomConfig
from segvol_pl.config.fields import Field
from segvol_pl.config.loader import fields_help, load, resolved, to_yaml
from segvol_pl.errors import ConfigError
from segvol_pl.model import SegVol

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
TRAINING = ["data.shards=shards", "run.out=run", "optim.max_steps=10"]
REQUIRED = {
    "demo": [],
    "phantoms": ["out=phantoms"],
    "inventory": ["images=ct"],
    "repack": ["folder=shards"],
    "pack": ["images=ct", "out=shards"],
    "pretrain": TRAINING,
    "train": TRAINING,
    "finetune": ["checkpoint=last.ckpt", "shards=shards", "out=tuned"],
    "runs": ["folders=[runs]"],
    "evaluate": ["checkpoint=last.ckpt", "data.shards=shards", "out=report"],
    "embed": ["checkpoint=last.ckpt", "shards=shards", "out=features"],
    "probe": ["features=features", "out=probe"],
    "predict": ["checkpoint=last.ckpt", "image=ct.nii.gz", "out=mask.nii.gz", "text=liver"],
    "view": ["checkpoint=last.ckpt", "image=ct.nii.gz"],
    "challenge predict": ["checkpoint=last.ckpt", "cases=inputs", "out=outputs"],
    "serve": ["checkpoint=last.ckpt"],
    "import": ["source=SegVol_v1.pth", "out=segvol.safetensors"],
    "export": ["source=last.ckpt", "out=model.safetensors"],
    "scaling fit": ["table=runs.csv"],
    "scaling compare": ["runs=[runs]", "axis=size"],
    "scaling mix": ["table=mixtures.csv"],
    "paper": [],
}
# Grids are expanded in test_grid.py, claims are read in test_paper.py.
FILES = sorted(
    path for path in CONFIGS.rglob("*.yaml") if not {"ablations", "paper"} & {*path.relative_to(CONFIGS).parts}
)
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
ZOOMS = sorted((CONFIGS / "zoom").glob("*.yaml"))


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def written(folder: Path, text: str, name: str = "given.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def fault(command: str, *arguments: str | Path) -> ConfigError:
    """What loading complains of, in one line."""
    with pytest.raises(ConfigError) as caught:
        load(command, [str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return caught.value


# ---- the files ----


@pytest.mark.parametrize("path", [path for path in FILES if path not in (*MODELS, *ZOOMS)], ids=named)
def test_every_configuration_loads_for_its_verb(path: Path) -> None:
    config = load(path.stem, [str(path), *REQUIRED[path.stem]])
    assert isinstance(config, SCHEMAS[path.stem])


@pytest.mark.parametrize("path", MODELS, ids=named)
def test_every_model_loads_as_a_section(path: Path) -> None:
    for command in ("pretrain", "train"):
        assert isinstance(load(command, [f"model={path}", *REQUIRED[command]]).model, SegVolConfig)


@pytest.mark.parametrize("path", ZOOMS, ids=named)
def test_every_zoom_loads_as_a_section(path: Path) -> None:
    for command in ("evaluate", "predict"):
        assert isinstance(load(command, [f"zoom={path}", *REQUIRED[command]]).zoom, ZoomConfig)


def test_the_preset_sets_every_switch_to_published() -> None:
    """Whatever is added as a switch later belongs to the preset too."""
    preset = {"model": MODELS[0].with_name("published.yaml"), "zoom": ZOOMS[0].with_name("published.yaml")}
    config = load("import", [f"model={preset['model']}", *REQUIRED["import"]]).model
    zoom = load("predict", [f"zoom={preset['zoom']}", *REQUIRED["predict"]]).zoom
    switches = [value for value in (*vars(config).values(), *vars(zoom).values()) if isinstance(value, Convention)]
    assert switches == [Convention.published] * 4
    assert load("import", REQUIRED["import"]).model == config


def test_the_full_scale_models_have_the_parameters_that_they_state() -> None:
    for size in ("small", "base", "large", "huge"):
        path = CONFIGS / "model" / f"{size}.yaml"
        config = load("train", [f"model={path}", *TRAINING]).model
        with torch.device("meta"):
            model = SegVol(config)
        counts = [sum(part.numel() for part in module.parameters()) for module in (model, model.image_encoder)]
        stated = re.findall(r"\d{1,3}(?:,\d{3})+", path.read_text())
        assert stated == [f"{count:,}" for count in counts], path


def test_the_base_model_is_the_published_one() -> None:
    assert load("train", [f"model={CONFIGS / 'model' / 'base.yaml'}", *TRAINING]).model == SegVolConfig()


# ---- faults ----


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("data.shard=x", "data.shards"),
        ("lr=1e-3", "optim.lr"),
        ("model.hiden=8", "model.hidden_size"),
        ("model.lr=1", "optim.lr"),
    ],
)
def test_an_unknown_key_on_the_command_line(wrong: str, right: str) -> None:
    key = wrong.partition("=")[0]
    error = fault("train", wrong, *TRAINING)
    assert str(error) == f"unknown key {key} (command line): did you mean {right}?"
    assert error.key == key


def test_an_unknown_key_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = written(tmp_path, "optim:\n  lr: 1.0e-3\n  warmup_step: 3\n")
    expected = f"unknown key optim.warmup_step ({path}:3): did you mean optim.warmup_steps?"
    assert str(fault("train", path, *TRAINING)) == expected


def test_an_unknown_key_in_a_section_file_names_that_file(tmp_path: Path) -> None:
    section = written(tmp_path, "hidden_size: 64\nlayer: 2\n", "odd.yaml")
    path = written(tmp_path, "model: odd.yaml\n")
    assert (
        str(fault("train", path, *TRAINING)) == f"unknown key model.layer ({section}:2): did you mean model.num_layers?"
    )


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ("optim.lr=fast", "'fast' is not float"),
        ("data.workers=1.5", "'1.5' is not int"),
        ("data.workers=true", "'true' is not int"),
        ("run.resume=1", "'1' is not bool"),
        ("optim.betas=0.9", "'0.9' is not list of float"),
        ("model.patch_size=[4, x, 16]", "is not list of int"),
        ("run.precision=fp8", "'fp8' is none of auto, fp32, bf16"),
        ("text.source=bert", "'bert' is none of auto, weights, clip, seeded"),
        ("model.patch_size=[4, 16]", "needs 3 numbers (d, h, w), got 2"),
        ("model.input_shape=[32, 256, 256, 1]", "needs 3 numbers (d, h, w), got 4"),
        ("optim.betas=[0.9]", "needs 2 numbers, got 1"),
        ("optim.max_steps=0", "must be at least 1, got 0"),
        ("data.flip=1.5", "must be at least 0 and at most 1, got 1.5"),
        ("optim.betas=[0.9, 1]", "must be at least 0 and below 1, got 1.0"),
        ("prompts.combinations=[text, mouse]", "'mouse' is none of points+text"),
    ],
)
def test_a_wrong_value_names_key_origin_and_what_is_wanted(tmp_path: Path, pair: str, problem: str) -> None:
    key, _, value = pair.partition("=")
    given = str(fault("train", *TRAINING, pair))
    assert given.startswith(f"{key} (command line): ") and problem in given
    section, _, leaf = key.partition(".")
    path = written(tmp_path, f"{section}:\n  {leaf}: {value}\n")
    in_file = str(fault("train", *TRAINING, path))
    assert in_file.startswith(f"{key} ({path}:2): ") and problem in in_file


def number_keys(command: str) -> dict[str, Field]:
    """The keys whose values are numbers or lists of them, by key."""
    return {field.key: field for field in fields_help(command) if re.search(r"\b(int|float)\b", field.type_name)}


NUMBERS = [(command, key) for command in SCHEMAS for key in number_keys(command)]


def shaped(field: Field, number: float) -> str:
    """YAML of a value as long as the key wants it, every number of which is `number`."""
    if field.key == "points":
        return f"[[{number}, 1, 1, 1]]"
    size = 6 if field.key == "box" else max(1, len(field.default)) if isinstance(field.default, list) else 0
    return f"[{', '.join([str(number)] * size)}]" if size else str(number)


def outside(limits: Range) -> list[float]:
    """Numbers just beyond its bounds."""
    beyond = {"least": -1, "above": 0, "most": 1, "below": 0}
    bounds = {name: getattr(limits, name) for name in beyond}
    return [bound + beyond[name] for name, bound in bounds.items() if bound is not None]


@pytest.mark.parametrize(("command", "key"), NUMBERS)
def test_a_number_outside_of_its_range_is_refused(command: str, key: str, tmp_path: Path) -> None:
    field = number_keys(command)[key]
    limits = field.range
    assert limits is not None, f"{key} states no range"
    for number in outside(limits):
        problem = str(fault(command, *REQUIRED[command], f"{key}={shaped(field, number)}"))
        stated = f"{key} (command line): must be {limits}, got "
        assert problem.startswith(stated) and float(problem.removeprefix(stated)) == number
    for word in ("nan", "inf"):
        problem = str(
            fault(command, *REQUIRED[command], f"{key}={shaped(field, float(word))}".replace(word, f".{word}"))
        )
        assert problem.startswith(f"{key} (command line): "), problem


def test_a_range_is_checked_in_python_too() -> None:
    for make, key in ((lambda: RunConfig(log_every=0), "run.log_every"), (lambda: ZoomConfig(reach=math.nan), "zoom")):
        with pytest.raises(ConfigError, match=key):
            make()
    assert (RunConfig().out, OptimConfig().max_steps) == (MISSING, MISSING)


@pytest.mark.parametrize(
    ("pairs", "key"),
    [
        (("run.strategy=zero3", "run.recompute=cheap"), "run.recompute"),
        (("run.strategy=zero3", "run.compile=true"), "run.compile"),
        (("run.strategy=ddp", "run.offload=true"), "run.offload"),
        (("run.strategy=ddp", "run.devices=4", "run.shard_degree=2"), "run.shard_degree"),
        (("run.custom_strategy=mine:make", "run.checkpoint_format=sharded"), "run.checkpoint_format"),
        (("run.strategy=fsdp", "run.devices=4", "run.nodes=2", "run.shard_degree=3"), "run.shard_degree"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(pairs: tuple[str, ...], key: str) -> None:
    assert str(fault("train", *TRAINING, *pairs)).startswith(f"{key} (command line): ")
    load("train", [*TRAINING, *pairs[:1]])


@pytest.mark.parametrize(("box", "points"), [("[1, 2, 3]", "null"), ("null", "[[1, 2, 3]]")])
def test_prompts_of_a_wrong_length(box: str, points: str) -> None:
    required = [pair for pair in REQUIRED["predict"] if not pair.startswith("text")]
    message = str(fault("predict", f"box={box}", f"points={points}", *required))
    assert re.match(r"(box|points) \(command line\): .*needs", message)


MANDATORY = {command: [field.key for field in fields_help(command) if field.default == MISSING] for command in SCHEMAS}


@pytest.mark.parametrize("command", [command for command, mandatory in MANDATORY.items() if mandatory])
def test_missing_keys_are_named(command: str) -> None:
    message = str(fault(command))
    assert all(f"{key}=..." in message for key in MANDATORY[command])


def test_an_inventory_needs_one_source() -> None:
    assert "give one of images=FOLDER and cases=FILE" in str(fault("inventory"))


def test_a_prediction_needs_a_prompt() -> None:
    assert "at least one of text, box, points" in str(fault("predict", *REQUIRED["predict"][:3]))


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    right = written(tmp_path, "mask_ratio: 0.5\n", "pretrain.yaml")
    wrong = tmp_path / "pretrian.yaml"
    assert str(fault("pretrain", wrong)) == f"{wrong}: no such file: did you mean {right}?"


def test_a_missing_base_names_the_file_that_wants_it(tmp_path: Path) -> None:
    path = written(tmp_path, "base: nowhere.yaml\n")
    assert str(fault("train", path)).startswith(f"{tmp_path / 'nowhere.yaml'}: no such file, named by {path}")


def test_files_that_build_on_each_other_are_refused(tmp_path: Path) -> None:
    first = written(tmp_path, "base: second.yaml\n", "first.yaml")
    written(tmp_path, "base: first.yaml\n", "second.yaml")
    error = fault("train", first, *TRAINING)
    assert "first.yaml -> second.yaml -> first.yaml" in str(error) and error.key == "base"


@pytest.mark.parametrize("text", ["optim: [\n", "- 1\n", "optim:\n  lr: 1\n  lr: 2\n", "optim: 3\n"])
def test_files_that_are_no_configuration_are_named(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    assert str(path) in str(fault("train", path, *TRAINING))


# ---- merging ----


def test_the_rightmost_wins(tmp_path: Path) -> None:
    written(tmp_path, "optim:\n  lr: 1\n  weight_decay: 1\n  clip_norm: 1\n  warmup_steps: 7\n", "ground.yaml")
    first = written(tmp_path, "optim:\n  lr: 2\n  weight_decay: 2\n  clip_norm: 2\nbase: ground.yaml\n", "first.yaml")
    second = written(tmp_path, "optim:\n  lr: 3\n  weight_decay: 3\n", "second.yaml")
    optim = load("train", [*TRAINING, str(first), str(second), "optim.lr=4"]).optim
    assert (optim.lr, optim.weight_decay, optim.clip_norm, optim.warmup_steps) == (4, 3, 2, 7)
    assert load("train", [*TRAINING, "optim.lr=4", str(first)]).optim.lr == 2


@pytest.mark.parametrize("command", SCHEMAS)
def test_what_is_written_loads_again_as_the_same(command: str, tmp_path: Path) -> None:
    config = load(command, [*REQUIRED[command]])
    assert load(command, [str(written(tmp_path, to_yaml(config)))]) == config


@pytest.mark.parametrize("text", ["null and void", "a: b # c", "007", "no", "1e-4", "[1]", "  ", "Leber, groß"])
def test_texts_survive_being_written(tmp_path: Path, text: str) -> None:
    config = dataclasses.replace(
        load("predict", REQUIRED["predict"]), text=[text], clip_model=text, box=[0, 0, 0, 1, 2, 3]
    )
    assert load("predict", [str(written(tmp_path, to_yaml(config)))]) == config
    assert load("predict", [*REQUIRED["predict"], f"clip_model={text}"]).clip_model == text


@pytest.mark.parametrize(
    ("given", "want"),
    [("liver", ["liver"]), ("a: b # c", ["a: b # c"]), ("[liver, left lung]", ["liver", "left lung"]), ("no", ["no"])],
)
def test_a_list_of_texts_may_be_one_text(tmp_path: Path, given: str, want: list[str]) -> None:
    assert load("predict", [*REQUIRED["predict"], f"text={given}"]).text == want
    path = written(tmp_path, f"text: {json.dumps(want[0])}\n")
    assert load("predict", [*REQUIRED["predict"], str(path)]).text == want[:1]


def test_an_incomplete_configuration_can_be_shown() -> None:
    shown = resolved("train", ["optim.lr=0.5", "run.out=runs/${data.seed}"])
    assert "lr: 0.5\n" in shown and "shards: ???\n" in shown and "out: runs/${data.seed}\n" in shown


# ---- references ----


def test_a_reference_stands_for_the_value_of_a_key(tmp_path: Path) -> None:
    path = written(tmp_path, "optim: {warmup_steps: '${run.log_every}'}\ndata:\n  mix: ['2*${data.shards}/more']\n")
    references = ["run.out=runs/${run.strategy}-${data.seed}", "optim.lr=${optim.weight_decay}", "data.seed=7"]
    config = load("train", [*TRAINING, str(path), *references, "run.log_every=20"])
    assert (config.optim.warmup_steps, config.optim.lr, config.data.mix) == (20, 1e-5, ["2*shards/more"])
    assert config.run.out == "runs/auto-7" and "out: runs/auto-7\n" in to_yaml(config)


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        ("run.out=${oc.env:HOME}", "${oc.env:HOME} looks outside of the configuration: refer to a key"),
        ("optim.lr=${optim.decay}", "${optim.decay} refers to no key: did you mean "),
        ("optim.lr=${data.seed", "${data.seed refers to no key: did you mean data.seed?"),
        ("run.out=${run.${data.split}}", "${run.${data.split} refers to no key"),
        ("run.out=runs/${optim.betas}", "${optim.betas} refers to a list"),
        ("run.out=runs/${track.name}", "${track.name} is null"),
        ("run.log_every=${optim.lr}", "${optim.lr} gives no int: "),
        ("run.log_every=${run.log_every}", "${run.log_every} gives no int: Recursive"),
        ("run.out=runs/${run.out}", "runs/${run.out} gives no str: Recursive"),
        ("optim.betas=['${data.split}', 0]", "gives no list of float: "),
        ("data.flip=${run.log_every}", "must be at least 0 and at most 1, got 10.0"),
    ],
)
def test_a_reference_without_a_value_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: str, problem: str
) -> None:
    monkeypatch.setenv("HOME", "secret")
    key, _, value = pair.partition("=")
    given = str(fault("train", *TRAINING, pair))
    assert given.startswith(f"{key} (command line): ") and problem in given and "secret" not in given
    section, _, leaf = key.partition(".")
    path = written(tmp_path, f"{section}:\n  {leaf}: {value}\n")
    assert str(fault("train", *TRAINING, path)).startswith(f"{key} ({path}:2): ")


@pytest.mark.parametrize("text", ["pipe:cat ${ROOT}/{file}", "\\${a}", "\\\\${data.seed}", "a\\b", "${"])
def test_a_text_with_a_dollar_survives_being_written(tmp_path: Path, text: str) -> None:
    config = dataclasses.replace(load("predict", REQUIRED["predict"]), text=[text], clip_model=text)
    assert load("predict", [str(written(tmp_path, to_yaml(config)))]) == config


# ---- the schema ----


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_explains_itself(command: str) -> None:
    assert [field.key for field in fields_help(command) if not field.help.strip()] == []


def unread(names: Iterable[str]) -> list[str]:
    """Those of `names` that no code of the package reads as an attribute."""
    package = ROOT / "segvol_pl"
    sources = [path for path in package.rglob("*.py") if not path.is_relative_to(package / "config")]
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return [name for name in names if name not in read]


def test_every_key_is_read_somewhere() -> None:
    leaves = {field.key.rpartition(".")[2] for command in SCHEMAS for field in fields_help(command)}
    assert unread(sorted(leaves)) == []
    assert unread(["max_steps", "a_key_that_nobody_reads"]) == ["a_key_that_nobody_reads"]
