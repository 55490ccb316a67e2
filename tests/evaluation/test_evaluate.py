"""Evaluation over small shards: with an oracle, whose Dice is known, and with an untrained SegVol."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from boxes import CATEGORIES, SHAPE, WINDOW, NamedOracle, evaluated, placed_affine, sample_of, write_boxes
from factories import evaluate_config, save_untrained
from holders import holding
from mlflow.tracking import MlflowClient
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segvol_pl.config import (
    CasesConfig,
    Convention,
    DrawConfig,
    Mode,
    PackConfig,
    Timing,
    TrackConfig,
    Wandb,
    ZoomConfig,
)
from segvol_pl.config.categories import load_categories
from segvol_pl.data.index_builder import build_index
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_writer import write_shard
from segvol_pl.errors import EvaluateError, LockedError, ShardError, UnknownCategory
from segvol_pl.evaluation.metrics import dice
from segvol_pl.evaluation.run import evaluate, select_examples
from segvol_pl.evaluation.summary import Row, Summary
from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.imaging.transforms import resize_label
from segvol_pl.model import TextBank
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_boxes(tmp_path_factory.mktemp("shards"))


def test_an_oracle_is_scored_as_computed_by_hand(shards: Path, tmp_path: Path) -> None:
    """It marks all that is bright, in the box: so a tumour's text finds the liver and spleen, its box the tumour."""
    config = evaluate_config(shards, tmp_path / "out", prompts=["text", "box+text"], categories=["liver tumour"])
    summary = evaluated(config, NamedOracle())
    assert summary.cases == 3 and summary.unlabelled == 1 and summary.absent == {}
    truth, liver = 3 * 4 * 5, 8 * 14 * 16
    boxed = [row for row in summary.rows if row.prompt == "box+text"]
    assert [row.case for row in boxed] == ["case00", "case01", "case02"]
    for row in boxed:
        assert row.dice == 1.0 and row.truth_voxels == row.predicted_voxels == truth and row.windows == 8
        assert row.zoom_out is not None and row.zoom_out < 1.0
    alone = next(row for row in summary.rows if (row.prompt, row.case) == ("text", "case02"))
    assert alone.predicted_voxels == liver and alone.dice == pytest.approx(2 * truth / (truth + liver))


def test_rows_summary_and_report_are_written(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kinds = ["text", "box+text", "points+text"]
    summary = evaluated(evaluate_config(shards, out, prompts=kinds, pictures=2), NamedOracle())
    assert {path.name for path in out.iterdir()} == {
        "cases",
        "report.html",
        "rows.csv",
        "settings.json",
        "summary.json",
    }
    with (out / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(summary.rows) == 3 * (3 + 3 + 2)
    told = json.loads((out / "summary.json").read_text())
    assert told["prompts_from_truth"] is True and told["cases"] == 3 and "config" in told["manifest"]
    spleen = [row for row in rows if (row["category"], row["prompt"]) == ("spleen", "box+text")]
    (cell,) = (one for one in told["categories"] if (one["category"], one["prompt"]) == ("spleen", "box+text"))
    assert (cell["mode"], cell["box"], cell["points"]) == ("zoom", "exact", "") and cell["n"] == len(spleen) == 2
    for name in ("dice", "zoom_out", "surface_dice", "hd95", "volume_error"):
        values = [float(row[name]) for row in spleen]
        assert cell[name]["median"] == pytest.approx(np.median(values), abs=1e-6)
        low, high = cell[name]["mean_interval"]
        assert min(values) - 1e-6 <= low <= cell[name]["mean"] <= high <= max(values) + 1e-6
    assert [(one["prompt"], one["categories"]) for one in told["overall"]] == [(kind, 3) for kind in kinds]
    assert all(float(row["seconds"]) > 0 and float(row["memory_mb"]) > 0 for row in rows)
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 2 * 3 and "case00" in page
    assert "liver tumour" in table_text(summary) and "all: mean" in table_text(summary)


def table_text(summary: Summary) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(summary.table())
    return captured.get()


def test_a_folder_that_another_process_evaluates_into_is_refused(shards: Path, tmp_path: Path) -> None:
    """Shares lie side by side; what would remove their results does not begin."""
    config = evaluate_config(shards, tmp_path, prompts=["text"], categories=["spleen"], limit=1, pictures=0)
    with holding(tmp_path), pytest.raises(LockedError, match=tmp_path.name):
        evaluated(config)
    with holding(tmp_path, ".lock-0-1-of-1-2.json"):
        rows = evaluated(config).rows
        with pytest.raises(LockedError, match=tmp_path.name):
            evaluated(replace(config, resume=False))
    assert [row.dice for row in evaluated(config).rows] == [row.dice for row in rows]


def test_the_same_seed_gives_the_same_rows(shards: Path, tmp_path: Path) -> None:
    runs = [
        evaluated(evaluate_config(shards, tmp_path / name, prompts=["points", "points+text"], seed=seed), NamedOracle())
        for name, seed in (("a", 3), ("b", 3))
    ]
    one, other = ([(row.case, row.category, row.prompt, row.dice) for row in run.rows] for run in runs)
    assert one == other


def test_every_kind_of_points_gets_the_same_points(shards: Path, tmp_path: Path) -> None:
    model = NamedOracle()
    kinds = ["points", "points+text"]
    evaluated(evaluate_config(shards, tmp_path, prompts=kinds, categories=["spleen"], limit=1, pictures=0), model)
    plain, named = ([prompt for prompt in model.seen if (prompt.text is not None) == flag] for flag in (False, True))
    assert len(plain) == len(named) >= 2
    for one, other in zip(plain, named, strict=True):
        np.testing.assert_array_equal(one.points_N3, other.points_N3)


def test_the_overview_is_encoded_once_a_case(shards: Path, tmp_path: Path) -> None:
    model = NamedOracle()
    kinds = ["box", "box+text", "points"]
    summary = evaluated(
        evaluate_config(shards, tmp_path, prompts=kinds, categories=["liver tumour"], limit=1, pictures=0), model
    )
    assert len(summary.rows) == 3
    assert model.encoded <= 1 + sum(row.windows for row in summary.rows[::2])


def test_absent_categories_are_counted_apart(shards: Path, tmp_path: Path) -> None:
    summary = evaluated(evaluate_config(shards, tmp_path, prompts=["box"], categories=["spleen"]), NamedOracle())
    assert summary.absent == {"spleen": 1} and len(summary.rows) == 2 and summary.cases == 3


def test_categories_that_the_model_does_not_know_get_no_text_prompt(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path, prompts=["text", "box"])
    summary = evaluated(config, NamedOracle(["liver", "liver tumour"]))
    assert summary.unknown == {"spleen": 2}
    assert {(row.category, row.prompt) for row in summary.rows if row.category == "spleen"} == {("spleen", "box")}
    assert "spleen: unknown to the model" in (tmp_path / "report.html").read_text()


def test_a_category_asked_for_that_the_model_does_not_know_is_refused(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path / "out", categories=["liver tumor"])
    with pytest.raises(UnknownCategory, match=r"'liver tumor'.*liver tumour"):
        evaluated(config, NamedOracle())
    assert not (tmp_path / "out").exists()


def test_a_split_without_cases_is_refused_before_the_model_is_read(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path / "out", split="validation")
    with pytest.raises(EvaluateError, match=r"^data\.split: .*test \(3\), train \(1\)"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"index\.json"):
        evaluate(evaluate_config(tmp_path, tmp_path / "out"))


def test_no_case_with_the_category_leaves_nothing_that_looks_whole(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path, categories=["pancreas"])
    with pytest.raises(EvaluateError, match=r"^categories:"):
        evaluated(config, NamedOracle(["pancreas"]))
    assert not list(tmp_path.glob("*.csv")) and not (tmp_path / "report.html").exists()


def test_a_synonym_is_scored_as_its_category(shards: Path, tmp_path: Path) -> None:
    """By the truth of the category, and with its own name in the rows."""
    model = NamedOracle()
    model.bank = TextBank.seeded([*CATEGORIES, "lien"], 4).rows(list(CATEGORIES), {"lien": "spleen"})
    chosen = {"prompts": ["text", "box"], "categories": ["spleen", "lien"]}
    summary = evaluated(evaluate_config(shards, tmp_path, pictures=1, **chosen), model)
    own, other = ([row for row in summary.rows if row.category == name] for name in ("spleen", "lien"))
    assert len(own) == len(other) == 5 and summary.absent.keys() == {"spleen", "lien"}
    assert [row.dice for row in other] == [row.dice for row in own] and max(row.truth_voxels for row in other) > 0


def test_all_splits_and_limit(shards: Path, tmp_path: Path) -> None:
    chosen = {"prompts": ["box"], "categories": ["liver"]}
    everything = evaluated(evaluate_config(shards, tmp_path / "a", split="all", **chosen), NamedOracle())
    limited = evaluated(evaluate_config(shards, tmp_path / "b", split="all", limit=2, **chosen), NamedOracle())
    assert everything.cases == 4 and limited.cases == 2


def test_zoom_settings_reach_the_model(shards: Path, tmp_path: Path) -> None:
    chosen = {"prompts": ["text"], "categories": ["liver"], "limit": 1}
    few = evaluated(evaluate_config(shards, tmp_path / "a", zoom=ZoomConfig(overlap=0.0), **chosen), NamedOracle())
    many = evaluated(evaluate_config(shards, tmp_path / "b", zoom=ZoomConfig(overlap=0.75), **chosen), NamedOracle())
    assert few.rows[0].windows < many.rows[0].windows


def test_published_prompts_are_drawn_from_the_shrunk_truth(shards: Path, tmp_path: Path) -> None:
    model, published = NamedOracle(), ZoomConfig(reflection=Convention.published)
    evaluated(evaluate_config(shards, tmp_path, prompts=["box"], categories=["liver"], limit=1, zoom=published), model)
    truth_DHW = np.zeros(SHAPE, bool)
    truth_DHW[5:13, 8:22, 14:30] = True
    assert model.seen[0].box == box_of(resize_label(truth_DHW, WINDOW))


def test_an_untrained_checkpoint_is_evaluated(shards: Path, tmp_path: Path) -> None:
    checkpoint = save_untrained(tmp_path / "tiny.ckpt", list(CATEGORIES))
    config = evaluate_config(CasesConfig(str(shards)), tmp_path / "out", str(checkpoint), device="cpu")
    summary = evaluate(config)
    assert summary is not None and summary.cases == 3
    assert [setting.prompt for setting in summary.settings] == ["text", "box+text", "points+text"]
    assert all(row.dice is not None and 0 <= row.dice <= 1 for row in summary.rows)
    assert all(row.seconds > 0 for row in summary.rows)
    assert "tiny.ckpt" in (tmp_path / "out" / "report.html").read_text()


def test_modes_stand_in_rows_of_their_own(shards: Path, tmp_path: Path) -> None:
    """The shape of the paper's Table 3: resizing loses what sliding and zooming find."""
    chosen = {"prompts": ["box"], "categories": ["liver tumour"], "modes": list(Mode), "timing": Timing.cold}
    summary = evaluated(evaluate_config(shards, tmp_path, **chosen))
    found = {setting.mode: overall for setting, overall in summary.overall.items()}
    assert list(found) == ["zoom", "resize", "sliding"]
    assert found["zoom"].dice == found["sliding"].dice == 1.0
    assert found["resize"].dice is not None and found["resize"].dice < 1.0
    assert found["resize"].dice == found["zoom"].zoom_out and found["resize"].zoom_out is None
    windows = {row.mode: row.windows for row in summary.rows if row.case == "case00"}
    assert windows["resize"] == 0 and windows["zoom"] < windows["sliding"]


def test_resizing_the_published_way_is_its_zoom_out(shards: Path, tmp_path: Path) -> None:
    zoom = ZoomConfig(interpolation=Convention.published, grid=Convention.published, reflection=Convention.published)
    chosen = {"prompts": ["box"], "categories": ["liver"], "modes": [Mode.zoom, Mode.resize], "zoom": zoom}
    rows = evaluated(evaluate_config(shards, tmp_path, **chosen)).rows
    for zoomed, resized in zip(rows[::2], rows[1::2], strict=True):
        assert (zoomed.mode, resized.mode) == ("zoom", "resize") and zoomed.zoom_out == resized.dice


def test_alone_every_prompt_encodes_anew(shards: Path, tmp_path: Path) -> None:
    encoded = {}
    for timing in Timing:
        model = NamedOracle()
        chosen = {"prompts": ["box", "box+text"], "categories": ["liver tumour"], "limit": 1, "pictures": 0}
        rows = evaluated(evaluate_config(shards, tmp_path / timing.value, timing=timing, **chosen), model).rows
        encoded[timing] = model.encoded
    assert encoded[Timing.cold] == 2 * encoded[Timing.shared] == 2 * (1 + rows[0].windows)


def test_worse_prompts_stand_in_rows_of_their_own_and_are_worse(shards: Path, tmp_path: Path) -> None:
    drawn = DrawConfig(boxes=["exact", "slice"], depth=6.0, points=["centre", "random3"])
    config = evaluate_config(shards, tmp_path, prompts=["box", "points"], draw=drawn, categories=["liver tumour"])
    summary = evaluated(config)
    found = {str(setting): overall.dice for setting, overall in summary.overall.items()}
    assert list(found) == ["zoom box(exact)", "zoom box(slice)", "zoom points(centre)", "zoom points(random3)"]
    # The tumour has 3 slices of 3 mm; 6 mm around the first of them is one of these and one of liver.
    assert found["zoom box(exact)"] == 1.0
    assert found["zoom box(slice)"] is not None and found["zoom box(slice)"] < 1.0


def test_components_are_prompted_apart_and_united(tmp_path: Path) -> None:
    """Two lesions in an organ that is as bright: one box around both takes in what lies between."""
    sample = sample_of(0, "test", lesions=True)
    write_shard(tmp_path / "boxes-000000.tar", [sample])
    build_index(tmp_path)
    rows = {}
    for components in (False, True):
        drawn = DrawConfig(components=components, component_voxels=2)
        config = evaluate_config(tmp_path, tmp_path / str(components), prompts=["box"], draw=drawn)
        rows[components] = next(row for row in evaluated(config).rows if row.category == "liver tumour")
    assert rows[False].components == 1 and rows[True].components == 2
    assert rows[True].dice == 1.0 and rows[False].dice is not None and rows[False].dice < 0.5


def test_empty_truths_are_counted_apart_never_averaged(shards: Path, tmp_path: Path) -> None:
    """The oracle finds something bright for any text: a false alarm in the case without a spleen."""
    summary = evaluated(evaluate_config(shards, tmp_path, prompts=["text", "box"], categories=["spleen"]))
    (empty,) = (row for row in summary.rows if row.empty)
    assert (empty.case, empty.prompt, empty.dice, empty.components) == ("case02", "text", None, 0)
    assert empty.predicted_voxels > 0
    cell, boxed = (summary.cells["spleen", setting] for setting in summary.settings)
    assert (cell.n, cell.empty, cell.false_alarms) == (2, 1, 1) and (boxed.n, boxed.empty) == (2, 0)
    assert cell.dice is not None and cell.dice.n == 2
    text, box = (summary.to_dict()["overall"][place]["false_alarm"] for place in (0, 1))
    assert (text, box) == (1.0, None)
    with (tmp_path / "rows.csv").open(newline="") as file:
        (written,) = (row for row in csv.DictReader(file) if row["truth_voxels"] == "0")
    assert written["dice"] == written["surface_dice"] == "" and "Empty truths" in (tmp_path / "report.html").read_text()
    assert "Rate of false alarms, " in (tmp_path / "report.html").read_text()


def test_an_unknown_spacing_leaves_the_surface_dice_out_and_says_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "boxes-000000.tar", [sample_of(0, "test", placed=False)])
    build_index(tmp_path)
    summary = evaluated(evaluate_config(tmp_path, tmp_path / "out", prompts=["box"], masks=True))
    assert all(
        row.surface_dice is None and row.hd95 is None and row.dice == 1.0 and row.mask == "" for row in summary.rows
    )
    assert "1 cases have no known spacing" in (tmp_path / "out" / "report.html").read_text()
    drawn = DrawConfig(boxes=["slice"], depth=6.0)
    with pytest.raises(EvaluateError, match=r"case00: .*draw\.depth"):
        evaluated(evaluate_config(tmp_path, tmp_path / "deep", prompts=["box"], draw=drawn))


def test_masks_are_written_where_the_case_lies(shards: Path, tmp_path: Path) -> None:
    config = evaluate_config(shards, tmp_path, prompts=["box"], categories=["liver tumour"], limit=1, masks=True)
    (row,) = evaluated(config).rows
    volume = read_volume(tmp_path / row.mask)
    np.testing.assert_allclose(volume.affine, placed_affine())
    assert np.array_equal(box_of(volume.array_DHW > 0), (7, 11, 18, 9, 14, 22))
    assert f'href="{row.mask}"' in (tmp_path / "report.html").read_text()


def test_a_damaged_case_is_left_out_when_allowed_and_tried_again(tmp_path: Path) -> None:
    write_shard(tmp_path / "boxes-000000.tar", [sample_of(0, "test"), sample_of(1, "test")])
    index = build_index(tmp_path)
    tar = tmp_path / "boxes-000000.tar"
    whole = tar.read_bytes()
    offset, size = index.samples[1].members[Member.CT.value]
    tar.write_bytes(whole[:offset] + bytes(size) + whole[offset + size :])
    config = evaluate_config(tmp_path, tmp_path / "out", prompts=["box"])
    with pytest.raises(EvaluateError, match=r"max_bad_fraction=0\.0 .*case01: "):
        evaluated(config)
    assert not (tmp_path / "out" / "report.html").exists()
    allowed = evaluated(replace(config, max_bad_fraction=0.5))
    assert list(allowed.unusable) == ["case01"] and {row.case for row in allowed.rows} == {"case00"}
    assert "case01 cannot be read" in (tmp_path / "out" / "report.html").read_text()
    tar.write_bytes(whole)
    mended = evaluated(config)
    assert mended.unusable == {} and {row.case for row in mended.rows} == {"case00", "case01"}


def test_matches_say_what_masks_look_like(shards: Path, tmp_path: Path) -> None:
    summary = evaluated(
        evaluate_config(shards, tmp_path, prompts=["box+text"], categories=["liver"], match_categories=True)
    )
    with (tmp_path / "category_matches.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * len(CATEGORIES) and {line["prompt"] for line in lines} == {"box(exact)"}
    for case in range(3):
        read = lines[3 * case : 3 * case + 3]
        assert [line["place"] for line in read] == ["1", "2", "3"] and {line["named"] for line in read} == set(
            CATEGORIES
        )
        # To this oracle every name means all that is bright, so all are equally like.
        assert float(read[0]["soft_dice"]) == pytest.approx(float(read[2]["soft_dice"]), abs=1e-5)
    told = json.loads((tmp_path / "summary.json").read_text())["matches"]["liver"]
    assert told["n"] == 3 and set(told["soft_dice"]) == set(CATEGORIES) == set(
        summary.matches_by_category["liver"].soft_dice
    )


def test_pictures_are_of_the_worst_median_and_best_case() -> None:
    def row(case: str, category: str, value: float | None, prompt: str = "box+text") -> Row:
        return Row(case, category, "zoom", prompt, "", "", 1, value, value, None, None, None, 1.0, None, 1, 1, 1)

    rows = [row(str(n), "liver", value) for n, value in enumerate([0.5, 0.9, 0.1, 0.7, 0.6])]
    rows += [row("0", "spleen", 0.2), row("1", "spleen", 0.3), row("0", "aorta", 0.95), row("0", "aorta", 0.0, "text")]
    chosen = [(label, each.category, each.dice) for label, each in select_examples(Summary("m", "s", "t", 5, rows), 2)]
    assert chosen[0] == ("worst", "spleen", 0.2) and chosen[1] == ("median and best", "spleen", 0.3)
    assert chosen[2:] == [("worst", "liver", 0.1), ("median", "liver", 0.6), ("best", "liver", 0.9)]


def test_files_are_evaluated_as_packed_cases_are(tmp_path: Path) -> None:
    """The same figures from NIfTI files as from shards packed of them, and masks on the files' own grid."""
    write_phantoms(tmp_path, count=2, seed=3, scale=0.35)
    files = {part: str(tmp_path / part) for part in ("images", "labels")} | {
        "categories": str(tmp_path / "categories.yaml")
    }
    pack(PackConfig(**files, out=str(tmp_path / "shards"), overview_shape=list(WINDOW), workers=1))
    model = NamedOracle(sorted(load_categories(files["categories"])))
    names = ["aorta", "bladder", "heart", "kidney left", "liver", "liver tumour", "lung right", "spine", "stomach"]
    kinds = {"prompts": ["box", "points"], "pictures": 1, "categories": names}
    packed = evaluated(evaluate_config(tmp_path / "shards", tmp_path / "packed", split="all", **kinds), model)
    config = evaluate_config(CasesConfig(**files), tmp_path / "files", masks=True, **kinds)
    found = evaluated(config, model)
    assert found.cases == 2 and len(found.rows) == len(packed.rows) > 20
    for one, other in zip(found.rows, packed.rows, strict=True):
        assert replace(one, seconds=0, memory_mb=None, mask="") == replace(other, seconds=0, memory_mb=None)
    image = next((tmp_path / "images").glob(f"{found.rows[0].case}*"))
    mask, ct = nibabel.load(tmp_path / "files" / found.rows[0].mask), nibabel.load(image)
    assert mask.shape == ct.shape and np.allclose(mask.affine, ct.affine, atol=1e-4)
    assert len({row.mask for row in found.rows}) == len(found.rows)
    assert stated_dice(tmp_path / "files", found.rows[0], files) == found.rows[0].dice


def stated_dice(out: Path, row: Row, files: dict[str, str]) -> float:
    """Dice of a written mask and the label map, brought together by their affines alone."""
    ct, label = (_file(files[part], row.case) for part in ("images", "labels"))
    volume = read_volume(ct)
    truth_DHW = np.isin(read_label(label, volume), load_categories(files["categories"])[row.category])
    return dice(read_label(out / row.mask, volume) > 0, truth_DHW)


def _file(place: str, case: str) -> Path:
    """The one that is named, or that of a case in the folder."""
    return next(Path(place).glob(f"{case}*"), Path(place))


class Filler(NamedOracle):
    """Marks all of a prompt's box, whatever it holds."""

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        return super()._one(torch.ones_like(image_DHW), prompt)


REAL = [("trunk_ct.nii.gz", "trunk_seg.nii.gz"), ("thorax_dicom", "thorax_seg.nii.gz")]


@pytest.mark.parametrize(("ct", "seg"), REAL)
def test_masks_of_real_cts_have_the_dice_that_is_stated(shared: Path, tmp_path: Path, ct: str, seg: str) -> None:
    files = {"images": str(shared / "ct" / ct), "labels": str(shared / "ct" / seg)}
    names = str(shared / "ct" / "categories.yaml")
    config = evaluate_config(
        CasesConfig(**files, categories=names),
        tmp_path,
        prompts=["box"],
        categories=["aorta"],
        masks=True,
        pictures=0,
        zoom=ZoomConfig(overlap=0.0),
    )
    (row,) = evaluated(config, Filler(["aorta"])).rows
    assert stated_dice(tmp_path, row, {**files, "categories": names}) == row.dice
    assert row.dice is not None and row.dice > 0.1 and row.surface_dice is not None


def test_a_changed_file_is_evaluated_again_and_a_label_may_be_empty(tmp_path: Path) -> None:
    write_phantoms(tmp_path, count=2, seed=3, scale=0.35)
    data = CasesConfig(
        images=str(tmp_path / "images"),
        labels=str(tmp_path / "labels"),
        categories=str(tmp_path / "categories.yaml"),
    )
    config = evaluate_config(data, tmp_path / "out", prompts=["text"], categories=["spleen"])
    before = evaluated(config, NamedOracle(["spleen"]))
    assert [row.empty for row in before.rows] == [False, False]
    label = sorted((tmp_path / "labels").iterdir())[0]
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), label)
    after = evaluated(config, NamedOracle(["spleen"]))
    assert [row.empty for row in after.rows] == [True, False] and after.absent == {"spleen": 1}
    assert after.rows[1].dice == before.rows[1].dice


def test_wandb_gets_tables_and_pictures_offline(shards: Path, tmp_path: Path) -> None:
    offline = TrackConfig(wandb=Wandb.offline, project="tests")
    config = evaluate_config(
        shards, tmp_path, prompts=["box"], categories=["spleen"], match_categories=True, track=offline
    )
    evaluated(config)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    tables = {path.name.partition("_")[0]: path for path in run.rglob("*.table.json")}
    assert set(tables) == {"rows", "categories", "matches"}
    rows = json.loads(tables["rows"].read_text())
    assert rows["columns"][:4] == ["case", "category", "mode", "prompt"] and len(rows["data"]) == 2
    assert len(list(run.rglob("pictures_*.png"))) == 2
    evaluated(config)
    # offline-run-TIME-ID, and -1 behind it where both began in one second.
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_id").read_text()}, "put together again, the run goes on"


def test_tensorboard_and_mlflow_get_figures_pictures_and_files(shards: Path, tmp_path: Path) -> None:
    """Put together twice, it is one run at MLflow, and the event files of the second take back those of the first."""
    track = TrackConfig(wandb=Wandb.disabled, mlflow="local", tensorboard=True)
    for _ in range(2):
        evaluated(evaluate_config(shards, tmp_path, prompts=["box"], categories=["spleen"], track=track))
    overall = json.loads((tmp_path / "summary.json").read_text())["overall"][0]["dice"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (key,) = [key for key in events.Tags()["scalars"] if key.startswith("dice/")]
    (scalar,) = events.Scalars(key)
    assert scalar.value == pytest.approx(overall) and len(events.Tags()["images"]) == 2
    store = MlflowClient((tmp_path / "mlflow").as_uri())
    (run,) = store.search_runs([store.get_experiment_by_name("segvol_pl").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["prompts"] == "['box']"
    assert [value for key, value in run.data.metrics.items() if key.startswith("dice/")] == [pytest.approx(overall)]
    files = {each.path for each in store.list_artifacts(run.info.run_id)}
    assert {"report.html", "summary.json", "rows.csv"} <= files
