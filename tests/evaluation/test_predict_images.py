"""`segvol-pl predict images=...`: many CTs with one model, shared out, resumed, and what cannot be used left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import phantom, write_case, write_dicom
from factories import save_untrained

from segvol_pl.__main__ import main
from segvol_pl.config import PredictConfig
from segvol_pl.errors import ConfigError

NAMES = ["liver", "lung"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "tiny.ckpt", NAMES)


def write_cts(folder: Path, count: int) -> Path:
    for number in range(count):
        _, label = write_case(folder, f"case{number}", seed=number)
        label.unlink()
    return folder


def predicted(checkpoint: Path, *words: str | Path, threshold: float = 0.01) -> int:
    # An untrained model's probabilities lie about one half: a low threshold finds something, a high one nothing.
    keys = ["device=cpu", "precision=fp32", f"zoom.threshold={threshold}", f"text=[{','.join(NAMES)}]"]
    return main(["predict", f"checkpoint={checkpoint}", *keys, *map(str, words)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_each_ct_gets_its_map_and_a_broken_one_is_listed_and_tried_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_cts(tmp_path / "cts", 2), tmp_path / "masks"
    broken = images / "broken_ct.nii.gz"
    broken.write_bytes(b"no CT")
    assert predicted(checkpoint, f"images={images}", f"out={out}") == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("segvol-pl predict: error: 1 of 3 CTs were not segmented, for the reasons in")
    assert said[-1].endswith("failed.csv: broken")
    (failure,) = rows(out / "failed.csv")
    assert failure["id"] == "broken" and str(broken) in failure["problem"]
    table = rows(out / "statistics.csv")
    assert [(row["id"], row["category"]) for row in table] == [(f"case{n}", name) for n in (0, 1) for name in NAMES]
    for row in table:
        inside = array(out / f"{row['id']}.nii.gz") == int(row["value"])
        hu = phantom(int(row["id"][-1]))[0][inside]
        assert int(row["voxels"]) == inside.sum() and float(row["millilitres"]) == pytest.approx(
            inside.sum() * 0.0045, abs=1e-3
        )
        if inside.any():
            assert float(row["mean_hu"]) == pytest.approx(hu.mean(), abs=0.01)
            assert float(row["std_hu"]) == pytest.approx(hu.std(), abs=0.01)
    assert any(int(row["voxels"]) for row in table)

    before = {path: path.stat().st_mtime_ns for path in out.glob("case*.nii.gz")}
    write_case(images, "broken", seed=7)[1].unlink()
    assert predicted(checkpoint, f"images={images}", f"out={out}") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (out / "failed.csv").exists() and len(rows(out / "statistics.csv")) == 6


def test_parts_share_the_cts_and_give_what_one_ct_alone_gives(checkpoint: Path, tmp_path: Path) -> None:
    images, out = write_cts(tmp_path / "cts", 3), tmp_path / "masks"
    assert predicted(checkpoint, f"images={images / '*.nii.gz'}", f"out={out}", "part=1/2") == 0
    assert [path.name for path in out.glob("*.nii.gz")] == ["case1.nii.gz"]
    assert predicted(checkpoint, f"images={images}", f"out={out}", "part=0/2") == 0
    assert len(rows(out / "statistics.csv")) == 6
    alone = tmp_path / "alone.nii.gz"
    assert predicted(checkpoint, f"image={images / 'case2_ct.nii.gz'}", f"out={alone}") == 0
    assert np.array_equal(array(alone), array(out / "case2.nii.gz"))
    assert json.loads(alone.with_name("alone.json").read_text()) == json.loads((out / "case2.json").read_text())


def test_a_list_is_read_a_changed_ct_segmented_again_and_other_settings_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_cts(tmp_path / "cts", 2), tmp_path / "masks"
    (tmp_path / "list.csv").write_text("id,image\nA,cts/case0_ct.nii.gz\nB,cts/case1_ct.nii.gz\n")
    words = (f"images={tmp_path / 'list.csv'}", f"out={out}", "ending=.nrrd")
    assert predicted(checkpoint, *words) == 0
    assert sorted(path.name for path in out.glob("*.nrrd")) == ["A.nrrd", "B.nrrd"]
    before = {name: (out / f"{name}.nrrd").stat().st_mtime_ns for name in "AB"}
    write_case(images, "case1", seed=5)
    assert predicted(checkpoint, *words) == 0
    assert [(out / f"{name}.nrrd").stat().st_mtime_ns == before[name] for name in "AB"] == [True, False]
    capsys.readouterr()
    assert predicted(checkpoint, *words, "zoom.overlap=0") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds masks that were made with other zoom.overlap: set out to another folder" in line


@pytest.mark.parametrize("ending", [".dcm", ".rtstruct.dcm"])
def test_a_ct_in_which_nothing_is_found_is_done_without_a_dicom_object(
    ending: str, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("highdicom")
    write_dicom(tmp_path / "ct", phantom()[0])
    (tmp_path / "list.csv").write_text("id,image\nA,ct\n")
    words = (f"images={tmp_path / 'list.csv'}", f"ending={ending}")
    out, empty = tmp_path / "masks", tmp_path / "empty"
    assert predicted(checkpoint, *words, f"out={out}") == 0
    assert {row["file"] for row in rows(out / "statistics.csv")} == {f"A{ending}"}
    assert (out / f"A{ending}").exists() and (out / "A.json").exists()

    assert predicted(checkpoint, *words, f"out={empty}", threshold=0.999) == 0
    table = rows(empty / "statistics.csv")
    assert [(row["id"], row["category"], row["file"], row["voxels"]) for row in table] == [
        ("A", name, "", "0") for name in NAMES
    ]
    assert sorted(path.name for path in empty.glob("[!.]*")) == ["A.json", "cases", "settings.json", "statistics.csv"]
    before = (empty / "cases" / "A.json").stat().st_mtime_ns
    assert predicted(checkpoint, *words, f"out={empty}", threshold=0.999) == 0
    assert (empty / "cases" / "A.json").stat().st_mtime_ns == before, "not segmented again"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "cts", "image": "ct.nii.gz"}, "image: leave it out, or images"),
        ({"images": "cts", "box": [0.0, 0, 0, 1, 1, 1]}, "images: many CTs are segmented by text alone: leave box out"),
        ({"images": "cts", "ending": ".jpg"}, r"ending: '\.jpg' must be one of \.nii, "),
        ({"images": "cts", "part": "2/2"}, "part: '2/2' is not K/N"),
        ({"image": "ct.nii.gz", "part": "0/2"}, "part: needs images"),
        ({}, "image: give a CT, or images=DIR for many"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PredictConfig(checkpoint="c", out="o", text=["liver"], **changes)  # type: ignore[arg-type]
