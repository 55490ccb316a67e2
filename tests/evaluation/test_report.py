"""The report is one file that shows what was run and every figure; looked at in a real browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from segvol_pl.evaluation.figures import Picture, plot_picture, slice_planes
from segvol_pl.evaluation.mask_category import CategoryMatch
from segvol_pl.evaluation.report import write_report
from segvol_pl.evaluation.summary import Row, Summary
from segvol_pl.imaging.prompts import Prompt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABOUT = {"config": "split: <test>\n", "commit": "unknown", "python": "3.11.0", "packages": {"torch": "2.13.0"}}


def row(case: str, category: str, prompt: str, zoom_out: float, dice: float) -> Row:
    box = "exact" if "box" in prompt else ""
    return Row(case, category, "zoom", prompt, box, "", 1, dice, zoom_out, 0.9, 3.5, -0.1, 0.25, 100.0, 100, 90, 2)


def small_summary() -> Summary:
    rows = [
        row(case, category, prompt, 0.5, value)
        for category in ("liver", "kidney <left>")
        for prompt in ("text", "box+text")
        for case, value in (("a", 0.6), ("b", 0.7), ("c", 0.9))
    ]
    rows.append(Row("d", "liver", "zoom", "text", "", "", 0, None, None, None, None, None, 0.25, None, 0, 40, 2))
    matches = [
        CategoryMatch("a", "liver", "box(exact)", 1, "liver", 0.8),
        CategoryMatch("a", "liver", "box(exact)", 2, "spleen", 0.1),
    ]
    return Summary(
        "model.ckpt",
        "shards/x",
        "test",
        4,
        rows,
        absent={"spleen": 2},
        unlabelled=1,
        unusable={"bad": "shard x.tar is cut"},
        matches=matches,
        seconds=4.0,
    )


def case_volume() -> tuple[np.ndarray, np.ndarray]:
    hu_DHW = np.full((6, 20, 30), -1000, np.int16)
    truth_DHW = np.zeros(hu_DHW.shape, bool)
    truth_DHW[2:5, 4:9, 18:28] = True
    truth_DHW[3, 4:12, 16:28] = True
    hu_DHW[truth_DHW] = 60
    return hu_DHW, truth_DHW


def picture() -> Picture:
    hu_DHW, truth_DHW = case_volume()
    masks = {"zoom-out": np.zeros_like(truth_DHW), "prediction": np.roll(truth_DHW, 2, axis=2)}
    prompt = Prompt(box=(2, 4, 16, 4, 11, 27), points_N3=np.array([[3, 5, 20], [0, 1, 1]]), labels_N=np.array([1, 0]))
    planes = slice_planes(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, masks, [prompt])
    return Picture("a", "liver", "liver, worst: a, zoom box+text: Dice 0.500 → 0.600", plot_picture(planes))


def test_planes_are_cut_where_the_truth_is_largest_and_shown_upright() -> None:
    hu_DHW, truth_DHW = case_volume()
    hu_DHW[3, 19, 29] = 3000  # anterior right
    axial, coronal, sagittal = slice_planes(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, {"prediction": truth_DHW})
    assert [plane.grey_RC.shape for plane in (axial, coronal, sagittal)] == [(20, 30), (6, 30), (6, 20)]
    assert [plane.aspect for plane in (axial, coronal, sagittal)] == [2.0, 5.0, 2.5]
    assert axial.masks["truth"].sum() == truth_DHW[3].sum()
    assert axial.grey_RC[0, 0] == 1.0  # anterior is up, the patient's right on the left


def test_boxes_and_points_of_a_prompt_lie_where_the_planes_show_them() -> None:
    hu_DHW, truth_DHW = case_volume()
    prompt = Prompt(box=(3, 4, 16, 3, 11, 27), points_N3=np.array([[3, 5, 20], [0, 1, 1]]), labels_N=np.array([1, 0]))
    axial, coronal, _ = slice_planes(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, {}, [prompt])
    ((top, left, bottom, right), through) = axial.boxes[0]
    rows, columns = np.nonzero(axial.masks["truth"])
    assert (top, left, bottom, right) == (rows.min(), columns.min(), rows.max(), columns.max()) and through
    (inside, outside) = axial.points
    assert axial.masks["truth"][inside[0], inside[1]] and inside[2:] == (True, True)
    assert not axial.masks["truth"][outside[0], outside[1]] and outside[2:] == (False, False)
    assert coronal.boxes[0][0][0] == coronal.boxes[0][0][2] == 6 - 1 - 3


def test_a_picture_shows_the_prompt() -> None:
    hu_DHW, truth_DHW = case_volume()
    plain = imread(io.BytesIO(plot_picture(slice_planes(hu_DHW, (5.0, 2.0, 1.0), truth_DHW, {}))))
    given = imread(io.BytesIO(picture().png))
    yellow = [(image[..., 0] > 0.7) & (image[..., 1] > 0.6) & (image[..., 2] < 0.4) for image in (plain, given)]
    assert not yellow[0].any() and yellow[1].sum() > 50


def test_a_slab_of_few_slices_leaves_room_for_its_axial_plane() -> None:
    hu_DHW = np.zeros((4, 90, 120), np.int16)
    image = imread(io.BytesIO(plot_picture(slice_planes(hu_DHW, (2.0, 1.0, 1.0), hu_DHW == 0, {}))))
    assert image.shape[1] < 6 * image.shape[0]


def test_report_is_self_contained_and_says_what_was_run(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, small_summary(), [picture()], ABOUT)
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!data:)", page) and "http" not in page and "@import" not in page
    for text in (
        "model.ckpt",
        "shards/x",
        "ground truth",
        "spleen: requested but absent in 2",
        "1 more without labels",
        "bad cannot be read and is in no figure: shard x.tar is cut",
        "What masks of liver look like",
    ):
        assert text in page, text
    assert "kidney &lt;left&gt;" in page and "<left>" not in page
    assert "0.700 <small>[0.650, 0.800]</small>" in page
    assert "split: &lt;test&gt;" in page and "<td>torch</td><td>2.13.0</td>" in page
    images = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(images) == 4  # two box plots, a reading, a case
    for image in images:
        assert imread(io.BytesIO(base64.b64decode(image))).std() > 0
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_empty_truths_stand_apart(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, small_summary(), [], ABOUT)
    page = path.read_text(encoding="utf-8")
    section = page[page.index("Empty truths") : page.index("Spread")]
    assert "<td>liver</td><td>text</td><td>zoom</td><td>1</td><td>1</td>" in section
    write_report(path, replace(small_summary(), rows=small_summary().rows[:-1]), [], ABOUT)
    assert "Empty truths" not in path.read_text(encoding="utf-8")


def test_masks_are_linked_where_they_were_written(tmp_path: Path) -> None:
    path, mask = tmp_path / "report.html", "masks/a/kidney left.nii.gz"
    summary = small_summary()
    write_report(path, replace(summary, rows=[replace(summary.rows[0], mask=mask), *summary.rows[1:]]), [], ABOUT)
    assert re.findall(r'href="([^"]+)"', path.read_text(encoding="utf-8")) == ["masks/a/kidney%20left.nii.gz"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt-get install chromium)")
def test_a_browser_shows_the_report(tmp_path: Path) -> None:
    """Every picture is decoded, nothing is fetched from elsewhere, and the page is drawn."""
    path = tmp_path / "report.html"
    write_report(path, small_summary(), [picture()], ABOUT)
    probe = tmp_path / "probe.html"
    probe.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = _browse(tmp_path, "--dump-dom", probe)
    assert re.findall(r'id="probe">([^<]*)', dom) == ["images 4 of 4, tables 4, requests 0"]
    _browse(tmp_path, f"--screenshot={tmp_path / 'page.png'}", path)
    shown = imread(tmp_path / "page.png")[..., :3]
    assert shown.shape[:2] == (2400, 1200)
    dark, orange = shown.sum(axis=2) < 0.3, (shown[..., 0] > 0.8) & (shown[..., 2] < 0.3)
    assert 0.005 < dark.mean() < 0.5, "text and pictures on white"
    assert orange.sum() > 200, "box plots, matches and outlines"


PROBE = """<p id="probe"></p><script>
addEventListener("load", () => {
  const images = [...document.images], drawn = images.filter(one => one.complete && one.naturalWidth > 0);
  const asked = performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:"));
  const tables = document.querySelectorAll("table").length;
  document.getElementById("probe").textContent =
    `images ${drawn.length} of ${images.length}, tables ${tables}, requests ${asked.length}`;
});
</script>"""


def _browse(folder: Path, action: str, page: Path) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    places = [f"--user-data-dir={folder / 'profile'}", "--window-size=1200,2400", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *flags, *places, action, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
