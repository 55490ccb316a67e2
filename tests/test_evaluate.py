"""Evaluation over small shards: with an oracle, whose Dice is known, and with an untrained SegVol."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle, save_untrained
from rich.console import Console

from segvol_pl.config import CasesConfig, EvaluateConfig, Rule, ZoomConfig
from segvol_pl.data.frames import encode_array
from segvol_pl.data.prompts import box_of
from segvol_pl.data.sample import CategoryFacts, Facts, Member
from segvol_pl.data.shards import Sample, ShardError, build_index, write_shard
from segvol_pl.data.transforms import intensity_of, resize_label
from segvol_pl.evaluate import EvaluateError, Quartiles, Row, Summary, dice, draw_prompt, evaluate, evaluate_model
from segvol_pl.model.text_encoder import TextBank, UnknownCategory

WINDOW = (8, 16, 16)
SHAPE = (20, 40, 36)
CATEGORIES = {"liver": [1, 2], "liver tumour": [2], "spleen": [3]}


class NamedOracle(Oracle):
    """An oracle that knows the phantom's category names."""

    def __init__(self, names: list[str] | None = None) -> None:
        super().__init__(WINDOW)
        self.bank = TextBank.seeded(names or list(CATEGORIES), 4)


def sample_of(number: int, split: str, labelled: bool = True, spleen: bool = True) -> Sample:
    label_DHW = np.zeros(SHAPE, np.uint8)
    label_DHW[5:13, 8:22, 14:30] = 1
    label_DHW[7:10, 11:15, 18:23] = 2
    if spleen:
        label_DHW[6:12, 24 + number % 3 : 34, 4:11] = 3
    hu_DHW = np.random.default_rng(number).normal(-200, 10, SHAPE).astype(np.int16)
    hu_DHW[label_DHW > 0] = 100
    key = f"case{number:02d}"
    present = {name: values for name, values in CATEGORIES.items() if labelled and np.isin(label_DHW, values).any()}
    masks = {name: np.isin(label_DHW, values) for name, values in present.items()}
    facts = Facts(
        key=key,
        shape=list(SHAPE),
        spacing=[3.0, 1.0, 1.0],
        affine=np.eye(4).tolist(),
        source={"image": f"{key}.nii.gz"},
        dataset="boxes",
        split=split,
        modality="CT",
        intensity=intensity_of(hu_DHW),
        categories={
            name: CategoryFacts(present[name], int(mask.sum()), list(box_of(mask)), []) for name, mask in masks.items()
        },
        labelled=labelled,
        overview_shape=list(WINDOW),
    )
    members = {Member.FACTS: facts.to_json().encode(), Member.CT: encode_array(hu_DHW)}
    return Sample(key, {**members, Member.LABEL: encode_array(label_DHW)} if labelled else members)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Test split: three labelled cases, one without a spleen, and an unlabelled one; train split: one case."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [sample_of(0, "test"), sample_of(1, "test"), sample_of(2, "test", spleen=False)]
    samples += [sample_of(3, "test", labelled=False), sample_of(4, "train")]
    write_shard(folder / "boxes-000000.tar", samples)
    build_index(folder)
    return folder


def config_for(shards: Path, out: Path, split: str = "test", **changes: object) -> EvaluateConfig:
    data = CasesConfig(str(shards), split)
    return EvaluateConfig(checkpoint="oracle", data=data, out=str(out), **changes)  # type: ignore[arg-type]


def test_dice() -> None:
    one, other = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    one[0], other[:, 0] = True, True
    assert dice(one, other) == pytest.approx(2 * 4 / (12 + 8))
    assert dice(one, np.zeros_like(one)) == 0.0 and dice(one, one) == 1.0
    with pytest.raises(ValueError, match="undefined"):
        dice(np.zeros_like(one), np.zeros_like(one))


def test_prompts_are_drawn_from_the_truth() -> None:
    truth_DHW = np.zeros(SHAPE, bool)
    truth_DHW[5:13, 8:22, 14:30] = True
    prompt = draw_prompt("points+text", "liver", truth_DHW, np.random.default_rng(0))
    assert prompt.text == "liver" and prompt.box is None and prompt.points_N3 is not None
    inside = truth_DHW[tuple(prompt.points_N3.T)]
    np.testing.assert_array_equal(prompt.labels_N, [1] * 5 + [0] * 2)
    np.testing.assert_array_equal(inside, [True] * 5 + [False] * 2)
    boxed = draw_prompt("box", "liver", truth_DHW, np.random.default_rng(0))
    assert boxed.text is None and boxed.box == (5, 8, 14, 12, 21, 29)


def test_an_oracle_is_scored_as_computed_by_hand(shards: Path, tmp_path: Path) -> None:
    """It marks all that is bright, in the box: so a tumour's text finds the liver and spleen, its box the tumour."""
    config = config_for(shards, tmp_path / "out", prompts=["text", "box+text"], categories=["liver tumour"])
    summary = evaluate_model(config, NamedOracle())
    assert summary.cases == 3 and summary.unlabelled == 1 and summary.absent == {}
    truth, liver = 3 * 4 * 5, 8 * 14 * 16
    boxed = [row for row in summary.rows if row.prompt == "box+text"]
    assert [row.case for row in boxed] == ["case00", "case01", "case02"]
    for row in boxed:
        assert row.zoom_in == 1.0 and row.truth_voxels == row.predicted_voxels == truth and row.windows == 1
        assert row.zoom_out < 1.0
    alone = next(row for row in summary.rows if (row.prompt, row.case) == ("text", "case02"))
    assert alone.predicted_voxels == liver and alone.zoom_in == pytest.approx(2 * truth / (truth + liver))


def test_rows_summary_and_report_are_written(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kinds = ["text", "box+text", "points+text"]
    summary = evaluate_model(config_for(shards, out, prompts=kinds, pictures=2), NamedOracle())
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "rows.csv", "summary.json"]
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary.rows) == 3 * (3 + 3 + 2)
    told = json.loads((out / "summary.json").read_text())
    assert told["prompts_from_truth"] is True and told["cases"] == 3 and "config" in told["manifest"]
    spleen = [float(row["zoom_in"]) for row in rows if (row["category"], row["prompt"]) == ("spleen", "box+text")]
    cell = told["categories"]["spleen"]["box+text"]
    assert cell["n"] == len(spleen) == 2
    assert cell["zoom_in"]["median"] == pytest.approx(np.median(spleen), abs=1e-6)
    assert told["overall"]["box+text"]["categories"] == 3
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 2 * 3 and "case00" in page
    assert "liver tumour" in table_text(summary) and "mean of categories" in table_text(summary)


def table_text(summary: Summary) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary.table())
    return captured.get()


def test_the_same_seed_gives_the_same_rows(shards: Path, tmp_path: Path) -> None:
    runs = [
        evaluate_model(config_for(shards, tmp_path / name, prompts=["points", "points+text"], seed=seed), NamedOracle())
        for name, seed in (("a", 3), ("b", 3))
    ]
    one, other = ([(row.case, row.category, row.prompt, row.zoom_in) for row in run.rows] for run in runs)
    assert one == other


def test_every_kind_of_points_gets_the_same_points(shards: Path, tmp_path: Path) -> None:
    model = NamedOracle()
    kinds = ["points", "points+text"]
    evaluate_model(config_for(shards, tmp_path, prompts=kinds, categories=["spleen"], limit=1), model)
    plain, named = ([prompt for prompt in model.seen if (prompt.text is not None) == flag] for flag in (False, True))
    assert len(plain) == len(named) >= 2
    for one, other in zip(plain, named, strict=True):
        np.testing.assert_array_equal(one.points_N3, other.points_N3)


def test_the_overview_is_encoded_once_a_case(shards: Path, tmp_path: Path) -> None:
    model = NamedOracle()
    kinds = ["box", "box+text", "points"]
    summary = evaluate_model(config_for(shards, tmp_path, prompts=kinds, categories=["liver tumour"], limit=1), model)
    assert len(summary.rows) == 3
    assert model.encoded <= 1 + sum(row.windows for row in summary.rows[::2])


def test_absent_categories_are_counted_apart(shards: Path, tmp_path: Path) -> None:
    summary = evaluate_model(config_for(shards, tmp_path, prompts=["box"], categories=["spleen"]), NamedOracle())
    assert summary.absent == {"spleen": 1} and len(summary.rows) == 2 and summary.cases == 2


def test_categories_that_the_model_does_not_know_get_no_text_prompt(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, prompts=["text", "box"])
    summary = evaluate_model(config, NamedOracle(["liver", "liver tumour"]))
    assert summary.unknown == {"spleen": 2}
    assert {(row.category, row.prompt) for row in summary.rows if row.category == "spleen"} == {("spleen", "box")}
    assert "spleen: unknown to the model" in (tmp_path / "report.html").read_text()


def test_a_category_asked_for_that_the_model_does_not_know_is_refused(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path / "out", categories=["liver tumor"])
    with pytest.raises(UnknownCategory, match=r"'liver tumor'.*liver tumour"):
        evaluate_model(config, NamedOracle())
    assert not (tmp_path / "out").exists()


def test_a_split_without_cases_is_refused_before_the_model_is_read(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path / "out", split="validation")
    with pytest.raises(
        EvaluateError, match=r"no labelled case of split 'validation'; it holds test \(3\), train \(1\)"
    ):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"index\.json"):
        evaluate(config_for(tmp_path, tmp_path / "out"))


def test_no_case_with_the_category_leaves_nothing_that_looks_whole(shards: Path, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, categories=["pancreas"])
    with pytest.raises(EvaluateError, match="categories"):
        evaluate_model(config, NamedOracle(["pancreas"]))
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "report.html").exists()


def test_all_splits_and_limit(shards: Path, tmp_path: Path) -> None:
    chosen = {"prompts": ["box"], "categories": ["liver"]}
    everything = evaluate_model(config_for(shards, tmp_path / "a", split="all", **chosen), NamedOracle())
    limited = evaluate_model(config_for(shards, tmp_path / "b", split="all", limit=2, **chosen), NamedOracle())
    assert everything.cases == 4 and limited.cases == 2


def test_summary_statistics() -> None:
    rows = [Row(str(n), "liver", "text", value / 2, value, 1.0, 1, 1, 1) for n, value in enumerate([0.2, 0.4, 0.9])]
    rows += [Row("0", "spleen", "text", 0.0, 1.0, 3.0, 1, 1, 1)]
    summary = Summary("m", "s", "test", 3, rows)
    cell = summary.cells()["liver", "text"]
    assert cell.zoom_in == Quartiles(mean=pytest.approx(0.5), q1=pytest.approx(0.3), median=0.4, q3=pytest.approx(0.65))
    overall = summary.overall()["text"]
    assert overall.zoom_in == pytest.approx(0.75) and overall.zoom_out == pytest.approx(0.125)
    assert overall.seconds == pytest.approx(1.5) and overall.categories == 2


def test_zoom_settings_reach_the_model(shards: Path, tmp_path: Path) -> None:
    chosen = {"prompts": ["text"], "categories": ["liver"], "limit": 1}
    few = evaluate_model(config_for(shards, tmp_path / "a", zoom=ZoomConfig(overlap=0.0), **chosen), NamedOracle())
    many = evaluate_model(config_for(shards, tmp_path / "b", zoom=ZoomConfig(overlap=0.75), **chosen), NamedOracle())
    assert few.rows[0].windows < many.rows[0].windows


def test_published_prompts_are_drawn_from_the_shrunk_truth(shards: Path, tmp_path: Path) -> None:
    model, published = NamedOracle(), ZoomConfig(reflection=Rule.published)
    evaluate_model(config_for(shards, tmp_path, prompts=["box"], categories=["liver"], limit=1, zoom=published), model)
    truth_DHW = np.zeros(SHAPE, bool)
    truth_DHW[5:13, 8:22, 14:30] = True
    assert model.seen[0].box == box_of(resize_label(truth_DHW, WINDOW))


def test_an_untrained_checkpoint_is_evaluated(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_untrained(tmp_path / "tiny.ckpt", list(CATEGORIES))
    config = EvaluateConfig(str(checkpoint), CasesConfig(str(shards)), out=str(tmp_path / "out"), device="cpu")
    summary = evaluate(config)
    assert summary.prompts == ["text", "box+text", "points+text"] and summary.cases == 3
    assert all(0 <= dice <= 1 for row in summary.rows for dice in (row.zoom_out, row.zoom_in))
    assert all(row.seconds > 0 for row in summary.rows)
    assert "tiny.ckpt" in (tmp_path / "out" / "report.html").read_text()
