"""Fine-tuning from files to the report: interrupted and continued, refused, and what it says of few cases."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import save_untrained, train_config
from ranks import Ranks

from segvol_pl.__main__ import main
from segvol_pl.config.loader import load
from segvol_pl.errors import FAILED, MISUSED, CaseError
from segvol_pl.evaluation.summary import Row
from segvol_pl.finetuning import run
from segvol_pl.finetuning.division import divided, held_out, same_cases, write_cases
from segvol_pl.finetuning.gains import Figure, gains, what_cases_show
from segvol_pl.finetuning.settings import training
from segvol_pl.model import TextBank
from segvol_pl.model.checkpoint import read_weights
from segvol_pl.packing.cases import Case, read_cases
from segvol_pl.training.run import prepared

INTERRUPTED = 130
KNOWN = ["liver", "spleen"]
"""What the checkpoint knows."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_untrained(tmp_path / "old.ckpt", KNOWN)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small phantoms, of which only organs that the checkpoint does not know have names."""
    from segvol_pl.packing.phantom import write_phantoms

    folder = tmp_path_factory.mktemp("own")
    return write_phantoms(folder, count=5, seed=3, scale=0.4, variation=0.1, categories=["heart", "lung left"])


def settings(out: Path, checkpoint: Path, *more: str) -> list[str]:
    brief = ["optim.max_steps=3", "run.val_batches=1", "run.val_every=0", "optim.warmup_steps=1", "data.workers=0"]
    small = [
        "prompts.categories_per_volume=1",
        "data.global_batch=2",
        "run.cpu_threads=1",
        "workers=1",
        "evaluation.modes=[resize]",
    ]
    asked = ["evaluation.prompts=[text, box]", "evaluation.pictures=0", "run.accelerator=cpu", "run.precision=fp32"]
    return ["finetune", f"from={checkpoint}", f"out={out}", *brief, *small, *asked, "track.wandb=disabled", *more]


def own(folder: Path) -> list[str]:
    return [f"{part}={folder / part}" for part in ("images", "labels")] + [f"categories={folder / 'categories.yaml'}"]


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def test_five_cases_are_fine_tuned_interrupted_and_continued(
    files: Path,
    checkpoint: Path,
    phantom_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = settings(out, checkpoint, *own(files))

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for stage, done in (("train", ["pack", "evaluate before"]), ("export", ["pack", "evaluate before", "train"])):
        with monkeypatch.context() as patch:
            patch.setattr(run, stage, stop)
            assert main(command) == INTERRUPTED
        assert list(json.loads((out / "stages.json").read_text())) == done
    trained = (out / "train" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0, capsys.readouterr().err
    assert (out / "train" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == trained
    said = capsys.readouterr().out
    assert "What was forgotten was not measured" in said and "forgotten.shards=DIR" in said

    found = report(out)
    assert found["facts"]["cases"].startswith("3 to train on, 2 to validate with")
    assert "2 validation cases give a category an interval" in found["few"]
    by_text = [gain for gain in found["gained"] if gain["prompt"] == "text"]
    assert {gain["category"] for gain in by_text} == {"", "heart", "lung left"}
    assert [gain["before"] for gain in by_text] == [None] * 3 and all(gain["n"] == 2 for gain in by_text)
    assert all(gain["difference"] for gain in found["gained"] if gain["prompt"].startswith("box"))
    assert "unknown" in (out / "report.html").read_text(encoding="utf-8") and found["forgotten"] is None

    # The model answers to the old names too, by the vectors that it had.
    before, after = read_weights(checkpoint), read_weights(out / "model" / "model.safetensors")
    assert after.categories == ["heart", "liver", "lung left", "spleen"]
    assert torch.equal(after.bank.rows(KNOWN).vectors_KE, before.bank.rows(KNOWN).vectors_KE)

    # Forgetting is measured afterwards, and nothing else is done again.
    stages = json.loads((out / "stages.json").read_text())
    measured = [f"forgotten.shards={phantom_shards}", "forgotten.limit=1"]
    assert main([*command, *measured]) == 0, capsys.readouterr().err
    later = json.loads((out / "stages.json").read_text())
    assert {name: later[name] for name in stages} == stages
    assert later.keys() - stages.keys() == {"evaluate before-old", "evaluate after-old"}
    assert {gain["category"] for gain in report(out)["forgotten"]} <= {"", *KNOWN}
    assert "Dice on the old categories, in points: text" in report(out)["summary"]["forgotten"]

    # Other settings are refused in one line; a longer run continues, and its model is evaluated again.
    capsys.readouterr()
    assert main([*command, "optim.lr=0.5", "held_out=0.5"]) == MISUSED
    assert "held_out 0.2 -> 0.5, optim.lr 1e-05 -> 0.5: restore that" in capsys.readouterr().err
    longer = ["optim.max_steps=4", "run.early_stop=2", "run.val_every=1"]
    assert main([*command, *longer]) == 0, capsys.readouterr().err
    assert report(out)["facts"]["steps"].startswith("4 of 4, of 2 volumes each; chosen by the validation cases")
    assert later["export"]["inputs"] != json.loads((out / "stages.json").read_text())["export"]["inputs"]


def test_cases_that_were_added_are_refused(files: Path, tmp_path: Path, checkpoint: Path) -> None:
    cases = divided([Case(name, Path(f"{name}.nii"), Path(f"{name}_seg.nii")) for name in "abcde"], 0.2, 0)
    write_cases(tmp_path / "cases.json", cases)
    read = read_cases(tmp_path / "cases.json")
    assert [(case.id, case.split) for case in read] == [(case.id, case.split) for case in cases]
    assert same_cases(read, cases) == ""
    assert same_cases(read, [*cases[1:], Case("f", Path("f.nii"))]) == "new: f; gone: a"


def test_a_division_depends_on_the_seed_and_the_names_alone() -> None:
    cases = [Case(f"case_{number}", Path("a")) for number in range(20)]
    shuffled = random.Random(0).sample(cases, len(cases))

    def held(found: list[Case]) -> set[str]:
        return {case.id for case in found if case.split == "test"}

    assert held(divided(cases, 0.25, 1)) == held(divided(shuffled, 0.25, 1)) != held(divided(cases, 0.25, 2))
    assert [held_out(number, 0.2) for number in (2, 3, 4, 5, 10, 20, 100)] == [1, 1, 2, 2, 2, 4, 20]
    listed = [*cases[:3], Case("mine", Path("a"), split="test")]
    assert held(divided(listed, 0.9, 0)) == {"mine"}
    with pytest.raises(CaseError, match=r"of 1 cases none is left to (train on|validate with)"):
        divided(cases[:1], 0.2, 0)


def row(case: str, category: str, dice: float, prompt: str = "box") -> Row:
    rest: dict[str, Any] = dict.fromkeys(("zoom_out", "surface_dice", "hd95", "volume_error", "memory_mb"))
    counted: dict[str, Any] = {"truth_voxels": 9, "predicted_voxels": 9, "windows": 1}
    return Row(case, category, "zoom", prompt, "", "", 1, dice, seconds=0, **counted, **rest)


def test_gains_are_differences_within_a_case() -> None:
    before = [row("a", "liver", 0.5), row("b", "liver", 0.9)]
    after = [row("a", "liver", 0.6), row("b", "liver", 1.0), row("a", "heart", 0.7, "text")]
    mean, by_text, heart, liver = gains(before, after)
    assert (liver.category, liver.n, mean.category) == ("liver", 2, "")
    assert liver.difference is not None and liver.difference.mean == pytest.approx(0.1)
    # Both cases gain the same: no spread, however different the cases are.
    assert liver.difference.interval == pytest.approx((0.1, 0.1)) and liver.after.interval == pytest.approx((0, 1))
    assert heart.before is None and heart.difference is None and by_text.after.mean == 0.7


def test_the_interval_is_students_t() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.02, 5).tolist()
    figure = Figure.of(values)
    assert figure is not None and figure.interval is not None
    half = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    assert figure.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert Figure.of([0.5]) == Figure(0.5, None) and Figure.of([]) is None


def test_what_few_cases_show_is_said() -> None:
    one = gains([row("a", "liver", 0.5)], [row("a", "liver", 0.6)])
    assert what_cases_show(one, 1).startswith("One validation case has no spread, hence no interval")
    five = gains(
        [row(case, "liver", 0.5) for case in "abcde"],
        [row(case, "liver", 0.5 + place / 10) for place, case in enumerate("abcde")],
    )
    # 2.776 x 0.158 / sqrt(5)
    assert "5 validation cases give a category an interval of ±20 points" in what_cases_show(five, 5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["images=ct"], "labels: images=DIR needs labels=DIR"),
        (["images=ct", "labels=seg"], "categories: label maps need categories=FILE"),
        (["shards=a", "cases=b.csv"], "shards .* give one of images=DIR"),
        (["shards=a", "data.shards=b"], "data.shards .* is set by shards=DIR"),
        (["shards=a", "run.out=b"], "run.out .* is set by out"),
        (["shards=a", "run.resume=false"], "finetune always resumes"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "from=a.ckpt", "out=out", *wrong]) == MISUSED
    assert re.search(message, capsys.readouterr().err)


def test_shards_without_a_case_to_validate_with_are_refused(
    phantom_shards: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = settings(tmp_path / "out", checkpoint, f"shards={phantom_shards}")
    assert main([*command, "data.val_split=none"]) in (FAILED, MISUSED)
    assert "data.val_split" in (said := capsys.readouterr().err) and "no labelled sample in 'none'" in said
    brain = save_untrained(tmp_path / "brain.ckpt", ["brain"])
    both = [f"shards={phantom_shards}", f"forgotten.shards={phantom_shards}"]
    assert main(settings(tmp_path / "other", brain, *both)) == MISUSED
    assert "none of which the checkpoint knows: it knows brain" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_take_part_in_evaluating_and_training(
    phantom_shards: Path, checkpoint: Path, tmp_path: Path, ranks: dict[int, Ranks]
) -> None:
    more = [f"shards={phantom_shards}", "run.devices=2", "run.checkpoint_format=sharded"]
    command = settings(tmp_path / "out", checkpoint, *more)
    # As torchrun names ranks: Lightning's own variables do not say how many there are before training.
    launched = "import os; os.environ |= {'RANK': os.environ['LOCAL_RANK'], 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}"
    elastic = "; os.environ |= {'TORCHELASTIC_RUN_ID': 'x', 'GROUP_RANK': '0'}"
    ranks[2](*command, patch=launched + elastic)
    assert list(report(tmp_path / "out")["stages"]) == ["evaluate before", "train", "export", "evaluate after"]
    # What the ranks wrote together can be fine-tuned too.
    sharded = tmp_path / "out" / "train" / "checkpoints" / "last.ckpt"
    assert sharded.is_dir()
    assert main(settings(tmp_path / "again", sharded, f"shards={phantom_shards}")) == 0


def test_synonyms_of_the_file_join_those_of_the_checkpoint(phantom_shards: Path, tmp_path: Path) -> None:
    """Rows that the checkpoint has are taken, and others made: the categories' own are as without synonyms."""
    bank = TextBank.seeded(["liver", "hepar", "brain", "cerebrum"], 16)
    bank = bank.rows(["liver", "brain"], {"hepar": "liver", "cerebrum": "brain"})
    start = save_untrained(tmp_path / "old.ckpt", bank.names, TextBank(bank.names, bank.vectors_KE + 1, bank.synonyms))
    file = tmp_path / "categories.yaml"
    file.write_text("categories: {liver: [1], aorta: [2]}\nsynonyms: {aorta: [main artery], liver: [jecur]}\n")
    command = settings(tmp_path / "out", start, "images=ct", "labels=seg", f"categories={file}", "text.source=seeded")
    weights = read_weights(start)
    config = training(load("finetune", [f"checkpoint={start}", *command[2:]]), weights)
    assert config.text.synonyms == str(file)
    config = replace(config, data=replace(config.data, shards=str(phantom_shards)))
    config = replace(config, prompts=replace(config.prompts, pseudo_per_volume=0))
    task, module = prepared(config)
    assert module.synonyms == {"cerebrum": "brain", "hepar": "liver", "jecur": "liver", "main artery": "aorta"}
    assert task.hparams["synonyms"] == module.synonyms and task.hparams["categories"] == module.categories
    found = dict(
        zip([*module.categories, *module.synonyms], task.state_dict()["model.text_encoder.bank_KE"], strict=True)
    )
    seeded = TextBank.seeded(list(found), 16)
    for text, vector_E in found.items():
        held = text in weights.bank.texts
        assert torch.equal(vector_E, seeded.vectors_KE[seeded.index(text)] + held), text
    unkept = prepared(replace(config, keep_categories=False, text=replace(config.text, synonyms=None)))[1]
    assert unkept.synonyms == {"hepar": "liver"}


def test_the_old_names_are_kept_only_if_that_is_set(phantom_shards: Path, checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(phantom_shards, tmp_path / "run")
    brain = save_untrained(tmp_path / "brain.ckpt", ["brain"])
    weights = read_weights(brain)
    config = replace(config, model=weights.config, weights=str(brain))
    config = replace(config, prompts=replace(config.prompts, pseudo_per_volume=0))
    with_it = prepared(replace(config, keep_categories=True))
    assert "brain" not in prepared(config)[1].categories and "brain" in with_it[1].categories
    assert with_it[0].hparams["categories"] == with_it[1].categories
    vectors_KE = with_it[0].state_dict()["model.text_encoder.bank_KE"]
    assert torch.equal(vectors_KE[with_it[1].categories.index("brain")], weights.bank.vectors_KE[0])
