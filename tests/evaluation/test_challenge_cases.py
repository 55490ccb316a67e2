"""The challenge's npz files, evaluated by its protocol."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boxes import NamedOracle, evaluated
from factories import evaluate_config

from segvol_pl.config import CasesConfig, EvaluateConfig, EvaluationProtocol
from segvol_pl.errors import ConfigError, EvaluateError

SHAPE, FIRST, SECOND = (
    (12, 30, 34),
    (slice(3, 8), slice(5, 15), slice(6, 18)),
    (slice(5, 9), slice(20, 26), slice(22, 30)),
)
BOX = {"z_min": 3, "z_max": 7, "z_mid": 5, "z_mid_x_min": 6, "z_mid_y_min": 5, "z_mid_x_max": 17, "z_mid_y_max": 14}


def write_case(path: Path, **changes: Any) -> Path:
    """Two bright blocks, of classes 2 and 5, in a dim body with a black margin."""
    image_DHW, truth_DHW = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    image_DHW[1:11, 2:28, 2:32] = 40
    for place, value in ((FIRST, 2), (SECOND, 5)):
        image_DHW[place], truth_DHW[place] = 220, value
    arrays = {"imgs": image_DHW, "gts": truth_DHW, "spacing": np.array([3.0, 1.0, 1.0]), **changes}
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def config_for(folder: Path, out: Path, protocol: EvaluationProtocol, **data: str) -> EvaluateConfig:
    return evaluate_config(CasesConfig(npz=str(folder), **data), out, protocol=protocol, pictures=0)


def test_a_case_begins_with_its_box_or_with_a_click(tmp_path: Path) -> None:
    write_case(tmp_path / "in" / "one.npz", boxes=np.array([BOX, None], dtype=object))
    model = NamedOracle()
    summary = evaluated(config_for(tmp_path / "in", tmp_path / "out", EvaluationProtocol.cvpr25), model)
    boxed, clicked = ([row for row in summary.rows if row.category == name] for name in ("2", "5"))
    assert [row.dice for row in boxed] == [1.0] * 6 and [row.hd95 for row in boxed] == [0.0] * 6
    assert len(clicked) == 5 and {row.prompt for row in clicked} == {"points"} and clicked[0].truth_voxels == 4 * 6 * 8
    with (tmp_path / "out" / "interactions.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["dsc_auc"], first["nsd_auc"], first["clicks"]) == ("4.0", "4.0", "0")
    assert second["dsc_1"] == second["nsd_1"] == second["seconds_1"] == "0.0" and float(second["dsc_2"]) > 0
    prompt = next(prompt for prompt in model.seen if prompt.box is not None)
    assert model.seen[0] is prompt or prompt.points_N3 is None


def test_texts_name_the_classes_and_truths_may_be_in_a_folder_of_their_own(tmp_path: Path) -> None:
    texts = np.array({"2": "liver", "5": "spleen", "instance_label": 0}, dtype=object)
    whole = write_case(tmp_path / "truths" / "one.npz")
    write_case(tmp_path / "in" / "one.npz", gts=None, text_prompts=texts)
    write_case(tmp_path / "in" / "two.npz", gts=None)
    assert whole.exists()
    config = config_for(tmp_path / "in", tmp_path / "out", EvaluationProtocol.cvpr25_text, truths=str(whole.parent))
    summary = evaluated(config)
    assert [(row.case, row.category) for row in summary.rows] == [("one", "liver"), ("one", "spleen")]
    assert summary.unlabelled == 1 and summary.rows[0].custom["extra"] == 1.0


def test_instances_of_the_truth_are_one_category(tmp_path: Path) -> None:
    """Two that touch: split by faces they would be one."""
    truth_DHW = np.zeros(SHAPE, np.uint8)
    truth_DHW[FIRST], truth_DHW[SECOND] = 1, 2
    truth_DHW[3:8, 5:15, 12:18] = 3
    texts = np.array({"1": "liver", "instance_label": 1}, dtype=object)
    write_case(tmp_path / "in" / "one.npz", gts=truth_DHW, text_prompts=texts)
    (row,) = evaluated(config_for(tmp_path / "in", tmp_path / "out", EvaluationProtocol.cvpr25_text)).rows
    assert row.dice == 1.0 and row.custom["missed"] == 1.0 and row.custom["extra"] == 0.0
    assert row.custom["f1"] == pytest.approx(2 * 2 / (2 + 3)) and row.custom["dsc_tp"] == pytest.approx((2 / 3 + 1) / 2)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    write_case(tmp_path / "in" / "one.npz", gts=None)
    config = config_for(tmp_path / "in", tmp_path / "out", EvaluationProtocol.cvpr25)
    with pytest.raises(EvaluateError, match=r"one: .*one\.npz: has no array gts"):
        evaluated(config)
    with pytest.raises(EvaluateError, match=r"^data\.truths: .*has no truth"):
        evaluated(config_for(tmp_path / "in", tmp_path / "out", EvaluationProtocol.cvpr25, truths=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^data\.npz: excludes"):
        CasesConfig(shards="x", npz="y")
