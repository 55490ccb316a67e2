"""A model card states what the run, the checkpoint and the evaluation state, and is refused without figures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from factories import evaluate_config, save_untrained, train_config

from segvol_pl.__main__ import main
from segvol_pl.config import Mode
from segvol_pl.evaluation.run import evaluate
from segvol_pl.model import TextBank
from segvol_pl.model.checkpoint import read_weights
from segvol_pl.sharing.card import _model_lines
from segvol_pl.training.run import train


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """A trained checkpoint and its evaluation, in `run` and `results`."""
    folder = tmp_path_factory.mktemp("shared")
    last = train(train_config(phantom_shards, folder / "run", steps=3))
    prompts = {"modes": [Mode.resize], "prompts": ["box", "text"], "pictures": 0, "device": "cpu"}
    evaluate(evaluate_config(phantom_shards, folder / "results", str(last), **prompts))
    return folder


def export(folder: Path, out: Path, *keys: str, source: str = "run/checkpoints/last.ckpt") -> int:
    given = [f"evaluation={folder / 'results'}", "license=apache-2.0", "card=true", *keys]
    return main(["export", str(folder / source), str(out), *given])


def test_the_card_states_what_is_known(shared: Path, tmp_path: Path, phantom_shards: Path) -> None:
    assert export(shared, tmp_path / "model") == 0
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "apache-2.0" and about["library_name"] == "segvol_pl" and "ct" in about["tags"]
    summary = json.loads((shared / "results/summary.json").read_text(encoding="utf-8"))
    for cell in summary["categories"]:
        dice = cell["dice"]
        start = f"| {cell['category']} | {cell['n']}\\* | {dice['mean']:.3f} | "
        quartiles = f"{dice['q1']:.3f}, {dice['median']:.3f}, {dice['q3']:.3f} |"
        assert any(line.startswith(start) and line.endswith(quartiles) for line in body.splitlines())
    assert len(re.findall(r"sha256 (?:of the cases )?`[0-9a-f]{64}`", body)) == 3
    assert "### mode resize, prompt text" in body
    assert "drawn from the ground truth (boxes `" in body
    assert "| steps | 3 of 2 volumes |" in body and re.search(r"\| compute \| [\d.]+ h on 1 x cpu", body)
    commits = json.loads((shared / "run/manifest.json").read_text(encoding="utf-8"))["starts"][0]["commit"]
    assert f"| commit of segvol_pl | `{commits}` |" in body
    assert str(phantom_shards.parent) not in text
    assert "trained on**" not in body and "Synonyms" not in body


def test_the_card_lists_synonyms(tmp_path: Path) -> None:
    bank = TextBank.seeded(["liver", "hepar"], 16).rows(["liver"], {"hepar": "liver"})
    lines = _model_lines(read_weights(save_untrained(tmp_path / "model.ckpt", ["liver"], bank)))
    assert lines[-2:] == ["Categories for text prompts: liver.", "Synonyms: hepar (liver)."]


@pytest.mark.slow
def test_what_an_exported_file_does_not_state_is_unknown(shared: Path, tmp_path: Path, phantom_shards: Path) -> None:
    assert main(["export", str(shared / "run/checkpoints/last.ckpt"), str(tmp_path / "model.safetensors")]) == 0
    config = evaluate_config(phantom_shards, tmp_path / "results", str(tmp_path / "model.safetensors"), split="train")
    config.modes, config.prompts, config.pictures, config.device = [Mode.resize], ["text"], 0, "cpu"
    evaluate(config)
    assert export(tmp_path, tmp_path / "model", source="model.safetensors") == 0
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "unknown: the exported file does not state it" in text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["card=true", "license=mit"], "card (command line): needs evaluation="),
        (["card=true", "evaluation=RESULTS"], "card (command line): needs license="),
        (["evaluation=RESULTS"], "evaluation (command line): is for a card: add card=true"),
        (["card=true", "license=mit", "evaluation=EMPTY"], "is no finished folder of segvol-pl evaluate"),
        (["card=true", "license=mit", "evaluation=OTHER"], "other.ckpt: evaluate this file"),
        (["card=true", "license=mit", "evaluation=RESULTS", "weights=ema"], "the averaged weights were not evaluated"),
    ],
)
def test_a_card_without_its_figures_is_refused(
    keys: list[str], said: str, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_untrained(tmp_path / "other.ckpt", ["liver"])
    source = other if "evaluation=OTHER" in keys else shared / "run/checkpoints/last.ckpt"
    (tmp_path / "empty").mkdir()
    places = {"RESULTS": shared / "results", "OTHER": shared / "results", "EMPTY": tmp_path / "empty"}
    for name, place in places.items():
        keys = [key.replace(name, str(place)) for key in keys]
    assert main(["export", str(source), str(tmp_path / "model"), *keys]) != 0
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()


def test_figures_of_the_training_cases_are_marked(shared: Path, tmp_path: Path, phantom_shards: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(shared, folder)
    summary = folder / "results/summary.json"
    content = json.loads(summary.read_text(encoding="utf-8"))
    summary.write_text(json.dumps({**content, "split": "train"}), encoding="utf-8")
    assert export(folder, tmp_path / "model") == 0
    assert "cases that the model was trained on**" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
