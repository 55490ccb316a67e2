"""The report is one file that shows what was run and every figure."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
from matplotlib.image import imread

from segvol_pl.evaluate import Row, Summary
from segvol_pl.report import Outlined, Picture, cut, write_report


def row(case: str, category: str, prompt: str, zoom_out: float, zoom_in: float) -> Row:
    return Row(case, category, prompt, zoom_out, zoom_in, 0.25, 100, 90, 2)


def small_summary() -> Summary:
    rows = [
        row(case, category, prompt, 0.5, value)
        for category in ("liver", "kidney <left>")
        for prompt in ("text", "box+text")
        for case, value in (("a", 0.6), ("b", 0.7), ("c", 0.9))
    ]
    return Summary("model.ckpt", "shards/x", "test", 3, rows, absent={"spleen": 2}, unlabelled=1, seconds=4.0)


def case_volume() -> tuple[np.ndarray, np.ndarray]:
    hu_DHW = np.full((6, 20, 30), -1000, np.int16)
    truth_DHW = np.zeros(hu_DHW.shape, bool)
    truth_DHW[2:5, 4:9, 18:28] = True
    truth_DHW[3, 4:12, 16:28] = True
    hu_DHW[truth_DHW] = 60
    return hu_DHW, truth_DHW


def test_planes_are_cut_where_the_truth_is_largest_and_shown_upright() -> None:
    hu_DHW, truth_DHW = case_volume()
    hu_DHW[3, 19, 29] = 3000  # anterior right
    axial, coronal, sagittal = cut(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, truth_DHW, truth_DHW)
    assert [plane.grey_RC.shape for plane in (axial, coronal, sagittal)] == [(20, 30), (6, 30), (6, 20)]
    assert [plane.aspect for plane in (axial, coronal, sagittal)] == [2.0, 5.0, 2.5]
    assert axial.truth_RC.sum() == truth_DHW[3].sum()
    assert axial.grey_RC[0, 0] == 1.0  # anterior is up, the patient's right on the left


def test_report_is_self_contained_and_says_what_was_run(tmp_path: Path) -> None:
    hu_DHW, truth_DHW = case_volume()
    empty_DHW = np.zeros_like(truth_DHW)
    planes = cut(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, empty_DHW, np.roll(truth_DHW, 2, axis=2))
    about = {"config": "split: <test>\n", "commit": "unknown", "python": "3.11.0", "packages": {"torch": "2.13.0"}}
    path = tmp_path / "report.html"
    pictures = [Picture("a", [Outlined("liver, box+text: Dice 0.500 → 0.600", 0.6, planes)])]
    write_report(path, small_summary(), pictures, about)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:)", page) and "http" not in page and "@import" not in page
    for told in (
        "model.ckpt",
        "shards/x",
        "ground truth",
        "spleen: asked for but absent in 2",
        "1 more without labels",
    ):
        assert told in page
    assert "kidney &lt;left&gt;" in page and "<left>" not in page
    assert "0.700 <small>[0.650, 0.800]</small>" in page
    assert "split: &lt;test&gt;" in page and "<td>torch</td><td>2.13.0</td>" in page
    images = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(images) == 3  # two box plots and one case
    for image in images:
        assert imread(io.BytesIO(base64.b64decode(image))).std() > 0
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]
