"""The challenge's protocols over small shards: with an oracle that follows clicks, whose Dice is known."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import WINDOW, NamedOracle, evaluated, sample_of
from factories import evaluate_config
from rich.console import Console

from segvol_pl.config import CasesConfig, EvaluateConfig, EvaluationProtocol, TrackConfig, Wandb
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.errors import ConfigError
from segvol_pl.evaluation.challenge import case_nsd, case_scores, instance_counts
from segvol_pl.evaluation.interactive import call_settings, with_click
from segvol_pl.evaluation.protocol import Clicks, ProtocolFigures, curve_records, interactions
from segvol_pl.evaluation.run import evaluate_model
from segvol_pl.evaluation.summary import Row
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt

TUMOUR, LIVER = "liver tumour", "liver"
CVPR25, TEXT = EvaluationProtocol.cvpr25, EvaluationProtocol.cvpr25_text


class Clicked(NamedOracle):
    """Marks what is bright in the box. A mask before it keeps, and corrects it at each click."""

    def __init__(self) -> None:
        super().__init__()
        self.config.mask_prompt, self.config.mask_shape = True, WINDOW

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        logits_DHW, mask_DHW = super()._one(image_DHW, prompt), prompt.mask_DHW
        if mask_DHW is None or not np.isin(mask_DHW, (0, 1)).all():  # a coarse mask, of probabilities
            return logits_DHW
        logits_DHW = torch.where(torch.from_numpy(mask_DHW) > 0.5, 5.0, -5.0)
        if prompt.points_N3 is None or prompt.labels_N is None:
            return logits_DHW
        for point, label in zip(prompt.points_N3, prompt.labels_N, strict=True):
            logits_DHW[tuple(point)] = 5.0 if label == INSIDE else -5.0
        return logits_DHW


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases: two small tumours far apart, in a liver as bright; one tumour; spacing unknown."""
    folder = tmp_path_factory.mktemp("lesions")
    samples = [sample_of(0, "test", lesions=True), sample_of(1, "test"), sample_of(2, "train", placed=False)]
    write_shard(folder / "boxes-000000.tar", samples)
    build_index(folder)
    return folder


def config_for(shards: Path, out: Path, protocol: EvaluationProtocol = CVPR25, **changes: Any) -> EvaluateConfig:
    return evaluate_config(shards, out, protocol=protocol, **{"pictures": 0, **changes})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_six_calls_with_one_more_click_each(shards: Path, tmp_path: Path) -> None:
    model = Clicked()
    summary = evaluated(config_for(shards, tmp_path, categories=[TUMOUR], limit=1, masks=True), model)
    assert [row.setting for row in summary.rows] == call_settings() and len(summary.rows) == 6
    assert [str(row.setting) for row in summary.rows[:2]] == [
        "zoom box(cvpr25)",
        "zoom box(cvpr25)+points(clicks1)",
    ]
    dice = [row.dice or 0.0 for row in summary.rows]
    sizes = [row.predicted_voxels for row in summary.rows]
    assert sizes == list(range(sizes[0], sizes[0] - 6, -1)), "the box takes in what lies between: clicks take it away"
    assert dice == sorted(set(dice)), "each answer is better than the one before"
    assert all(prompt.text is None for prompt in model.seen) and model.seen[0].points_N3 is None
    seen = [prompt.labels_N.tolist() for prompt in model.seen if prompt.labels_N is not None]
    assert any(OUTSIDE in labels for labels in seen), "background clicks reach the model"
    assert all(prompt.mask_DHW is not None for prompt in model.seen if prompt.labels_N is not None)
    assert len(list((tmp_path / "masks" / "case00").glob("*.nii.gz"))) == 6


def test_areas_finals_and_clicks_needed_stand_in_the_files(shards: Path, tmp_path: Path) -> None:
    summary = evaluated(config_for(shards, tmp_path, pictures=1, target_dice=0.9), Clicked())
    rows, found = read(tmp_path / "rows.csv"), read(tmp_path / "interactions.csv")
    assert len(rows) == 6 * 6 and len(found) == 6
    for one in found:
        own = [row for row in rows if (row["case"], row["category"]) == (one["case"], one["category"])]
        dsc, nsd = ([float(row[name]) for row in own] for name in ("dice", "surface_dice"))
        wanted = case_scores(dsc, nsd)
        assert {name: float(one[name]) for name in wanted} == pytest.approx(wanted, abs=1e-5)
        reached = [call for call, value in enumerate(dsc) if value >= 0.9]
        assert one["clicks"] == (str(reached[0]) if reached else "")
        assert float(one["seconds"]) == pytest.approx(sum(float(row["seconds"]) for row in own), abs=1e-4)
        assert [float(one[f"dsc_{call}"]) for call in range(1, 7)] == dsc
    told = json.loads((tmp_path / "summary.json").read_text())["protocol"]
    by_case = {case: [one for one in found if one["case"] == case] for case in ("case00", "case01")}
    areas = [np.mean([float(one["dsc_auc"]) for one in own]) for own in by_case.values()]
    assert told["protocol"] == "cvpr25" and told["cases"]["dsc_auc"]["mean"] == pytest.approx(np.mean(areas), abs=1e-5)
    assert told["cases"]["dsc_auc"]["n"] == 2 and told["cases"]["dsc_auc"]["mean_interval"] is not None
    assert set(told["categories"]) == {LIVER, TUMOUR, "spleen"} and len(told["curve"]) == 6
    assert told["clicks"]["never"] == sum(one["clicks"] == "" for one in found)
    assert sum(told["clicks"]["reached"]) + told["clicks"]["never"] == told["clicks"]["classes"] == 6
    page = (tmp_path / "report.html").read_text()
    assert "Protocol cvpr25" in page and "Dice over clicks" in page and "Clicks until Dice first reaches 0.9" in page
    assert page.count("<figure>") == 3 and "points(clicks5)" in page  # the curve, and the best and worst case
    console = Console(width=120)
    with console.capture() as captured:
        console.print(ProtocolFigures.of(CVPR25, summary.rows, 0.9, 0).table())
    assert "dsc_auc" in captured.get() and "clicks to Dice 0.9" in captured.get()


def test_parts_give_the_figures_of_one_run(shards: Path, tmp_path: Path) -> None:
    def figures(rows: list[Row]) -> list[Row]:
        return [replace(row, seconds=0, memory_mb=None) for row in rows]

    whole = evaluated(config_for(shards, tmp_path / "whole", categories=[TUMOUR]), Clicked())
    parted = config_for(shards, tmp_path / "parts", categories=[TUMOUR])
    for part in ("1/2", "0/2"):
        assert evaluate_model(replace(parted, part=part), Clicked()) is None  # type: ignore[arg-type]
    model = Clicked()
    assert figures(evaluated(parted, model).rows) == figures(whole.rows) and not model.seen
    other = replace(parted, target_dice=0.5)
    assert figures(evaluated(other, model).rows) == figures(whole.rows) and not model.seen, "it decides no row"


def test_an_unknown_spacing_leaves_out_what_needs_it(shards: Path, tmp_path: Path) -> None:
    data = CasesConfig(str(shards), "train")
    config = evaluate_config(data, tmp_path, protocol=CVPR25, categories=[LIVER], pictures=0)
    evaluated(config, Clicked())
    (one,) = read(tmp_path / "interactions.csv")
    assert one["nsd_auc"] == one["nsd_1"] == "" and float(one["dsc_auc"]) > 0
    cases = json.loads((tmp_path / "summary.json").read_text())["protocol"]["cases"]
    assert set(cases) == {"dsc_auc", "dsc_final", "seconds"}


def test_text_scores_instances_too(shards: Path, tmp_path: Path) -> None:
    """The oracle marks all that is bright for any text: liver and spleen, whose tumours are missed."""
    summary = evaluated(config_for(shards, tmp_path, TEXT), NamedOracle())
    assert {str(row.setting) for row in summary.rows} == {"zoom text"} and len(summary.rows) == 6
    liver = [row for row in summary.rows if row.category == LIVER]
    assert [row.custom for row in liver] == 2 * [
        {"f1": pytest.approx(2 / 3), "dsc_tp": 1.0, "missed": 0.0, "extra": 1.0}
    ]
    tumours = next(row for row in summary.rows if (row.case, row.category) == ("case00", TUMOUR))
    assert tumours.custom == {"f1": 0.0, "dsc_tp": 0.0, "missed": 2.0, "extra": 2.0}
    told = json.loads((tmp_path / "summary.json").read_text())["protocol"]
    assert set(told["cases"]) == {"dsc", "nsd", "f1", "dsc_tp", "seconds"} and told["clicks"] is None
    assert told["cases"]["f1"]["mean"] == pytest.approx(np.mean([row.custom["f1"] for row in summary.rows]))
    page = (tmp_path / "report.html").read_text()
    assert "Protocol cvpr25-text" in page and "Dice over clicks" not in page
    assert not (tmp_path / "interactions.csv").exists()


def test_instances_are_columns_of_any_evaluation(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path, prompts=["box"], instances=True, categories=[TUMOUR], pictures=0)
    summary = evaluated(config)
    several, single = summary.rows
    assert several.custom == {"f1": 0.0, "dsc_tp": 0.0, "missed": 2.0, "extra": 1.0}, "one box around two"
    assert single.custom == {"f1": 1.0, "dsc_tp": 1.0, "missed": 0.0, "extra": 0.0}
    assert [row["missed"] for row in read(tmp_path / "rows.csv")] == ["2.0", "0.0"]
    cell = summary.cells[TUMOUR, several.setting]
    assert cell.custom["f1"] is not None and cell.custom["f1"].mean == 0.5
    assert "<th>dsc_tp</th>" in (tmp_path / "report.html").read_text()


def test_a_metric_may_not_take_the_name_of_a_column_of_instances(shards: Path, tmp_path: Path) -> None:
    taken = {"metrics": ["toys:missed"], "prompts": ["box"]}
    with pytest.raises(ConfigError, match="already has a column 'missed'"):
        evaluated(evaluate_config(shards, tmp_path, instances=True, **taken))


def test_an_empty_answer_misses_every_instance() -> None:
    truth_DHW = np.zeros((3, 5, 5), bool)
    truth_DHW[0, 0, 0] = truth_DHW[2, 4, 4] = True
    nothing_DHW = np.zeros_like(truth_DHW)
    assert instance_counts(truth_DHW, nothing_DHW) == {"f1": 0.0, "dsc_tp": 0.0, "missed": 2, "extra": 0}
    assert instance_counts(truth_DHW, truth_DHW) == {"f1": 1.0, "dsc_tp": 1.0, "missed": 0, "extra": 0}


def test_clicks_are_kept_in_order_beside_the_box() -> None:
    prompt = with_click(with_click(Prompt(box=(0, 0, 0, 5, 5, 5)), (9, 9, 9), "bg"), (4, 7, 4), "fg")
    assert prompt.points_N3 is not None and prompt.points_N3.tolist() == [[9, 9, 9], [4, 7, 4]]
    assert prompt.labels_N is not None and prompt.labels_N.tolist() == [OUTSIDE, INSIDE]
    assert prompt.box == (0, 0, 0, 5, 7, 5), "it grows to hold what is inside"


# ---- figures of rows ----


def rows_of(case: str, category: str, dice: list[float], nsd: float | None = 0.9, seconds: float = 1.0) -> list[Row]:
    return [
        Row(
            *(case, category, one.mode, one.prompt, one.box, one.points),
            *(1, value, None, nsd, None, None, seconds, None, 9, 9, 1),
        )
        for one, value in zip(call_settings(), dice, strict=True)
    ]


def test_the_surface_dice_of_a_poor_case_is_0_and_that_of_its_classes_is_not() -> None:
    rows = rows_of("a", "liver", [0.3] * 6) + rows_of("a", "spleen", [0.0] * 5 + [0.5]) + rows_of("b", "liver", [1] * 6)
    figures = ProtocolFigures.of(CVPR25, rows[::-1], 0.8, 0)
    poor = case_scores([0.15] * 5 + [0.4], [*(case_nsd(0.15, 0.9),) * 5, 0.9])
    assert poor["nsd_auc"] == pytest.approx(0.45)
    assert figures.cases["nsd_auc"].mean == pytest.approx((0.45 + 3.6) / 2) and figures.cases["nsd_auc"].n == 2
    assert figures.categories["spleen"]["nsd_auc"].mean == pytest.approx(3.6)
    assert [round(call["nsd"].mean, 6) for call in figures.curve] == [0.45] * 5 + [0.9]
    assert figures.clicks == Clicks(3, [1, 0, 0, 0, 0, 0], 2, 0.0)
    assert figures.clicks_by_category["liver"] == Clicks(2, [1, 0, 0, 0, 0, 0], 1, 0.0)


def test_clicks_are_counted_until_the_dice_is_reached_first() -> None:
    rows = rows_of("a", "liver", [0.1, 0.85, 0.7, 0.9, 0.9, 0.9]) + rows_of("b", "liver", [0.1] * 6)
    assert [one.clicks for one in interactions(rows, 0.8)] == [1, None]
    assert [one.clicks for one in interactions(rows, 0.86)] == [3, None]


def test_slow_cases_are_counted_and_keep_their_scores() -> None:
    rows = rows_of("a", "liver", [1.0] * 6, seconds=16.0) + rows_of("b", "liver", [1.0] * 6, seconds=14.0)
    figures = ProtocolFigures.of(CVPR25, rows, 0.8, 0)
    assert figures.slow == 1 and figures.cases["dsc_auc"].mean == 4.0
    together = rows_of("a", "liver", [1.0] * 6, seconds=16.0) + rows_of("a", "spleen", [1.0] * 6, seconds=10.0)
    assert ProtocolFigures.of(CVPR25, together, 0.8, 0).slow == 0


def test_the_curve_has_a_record_for_each_number_of_clicks() -> None:
    rows = rows_of("a", "liver", [0.5] * 6, nsd=None) + rows_of("b", "liver", [0.7] * 6, nsd=None)
    head, records = curve_records(ProtocolFigures.of(CVPR25, rows, 0.8, 0))
    assert head == ["clicks", "dsc", "dsc_low", "dsc_high", "nsd", "nsd_low", "nsd_high"]
    assert [record[0] for record in records] == list(range(6)) and records[0][4:] == [None] * 3
    assert records[0][1] == pytest.approx(0.6) and records[0][2] >= 0.5 and records[0][3] <= 0.7


def test_wandb_gets_the_curve_offline(shards: Path, tmp_path: Path) -> None:
    offline = TrackConfig(wandb=Wandb.offline, project="tests")
    evaluated(config_for(shards, tmp_path, categories=[TUMOUR], limit=1, track=offline), Clicked())
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    tables = {path.name.partition("_")[0]: json.loads(path.read_text()) for path in run.rglob("*.table.json")}
    assert set(tables) == {"rows", "categories", "interactions", "curve"}
    assert tables["curve"]["columns"][:2] == ["clicks", "dsc"] and len(tables["curve"]["data"]) == 6
    assert len(list(run.rglob("curve_picture_*.png"))) == 1
