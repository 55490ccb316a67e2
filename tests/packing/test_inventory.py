"""A folder tree is listed by its headers alone: what is there, what is wrong with it, what is a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import phantom, restate, to_image, write_case, write_dicom

from segvol_pl.__main__ import main
from segvol_pl.config import InventoryConfig
from segvol_pl.errors import CaseError
from segvol_pl.imaging import read as reading
from segvol_pl.imaging.read import read_header, read_volume
from segvol_pl.packing.inventory import Entry, Inventory, inventory


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound cases in folders of their own, a DICOM series, and one of each fault."""
    root = tmp_path_factory.mktemp("tree")
    image, _ = write_case(root / "a", "one", 1)
    write_case(root / "b" / "deep", "two", 2)
    shutil.copy(image, root / "b" / "again.nii.gz")
    write_dicom(root / "series", phantom(3)[0])
    write_dicom(root / "gap", phantom(4)[0], skip=(5,))
    (root / "broken.nii.gz").write_bytes(b"no image")
    (root / "notes.txt").write_text("no CT")
    hu, _ = phantom(5)
    nibabel.save(nibabel.Nifti1Image(hu, None), root / "unplaced.nii")
    bare = nibabel.load(root / "unplaced.nii")
    bare.header["sform_code"] = bare.header["qform_code"] = 0
    nibabel.save(nibabel.Nifti1Image(hu, None, bare.header), root / "unplaced.nii")
    whole = root / "short.nii"
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([40.0, 1.0, 1.0, 1.0])), whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def found(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    return inventory(InventoryConfig(images=str(tree), out=str(tmp_path_factory.mktemp("out") / "inventory.json")))


def _entry(found: Inventory, ending: str) -> Entry:
    return next(entry for entry in found.entries if entry.path.endswith(ending))


def test_all_of_a_tree_is_found(found: Inventory) -> None:
    names = {Path(entry.path).name for entry in found.entries}
    cases = {"one_ct.nii.gz", "one_seg.nii.gz", "two_ct.nii.gz", "two_seg.nii.gz", "again.nii.gz", "series"}
    assert names == cases | {"gap", "broken.nii.gz", "unplaced.nii", "short.nii"}
    assert found.ignored == {".txt": 1}


def test_what_cannot_be_used_says_why(found: Inventory) -> None:
    assert "a slice is missing" in _entry(found, "gap").problem
    assert "broken.nii.gz cannot be read" in _entry(found, "broken.nii.gz").problem
    assert sum(bool(entry.problem) for entry in found.entries) == 2


def test_what_looks_wrong_is_named(found: Inventory) -> None:
    assert any("states no orientation" in doubt for doubt in _entry(found, "unplaced.nii").doubts)
    doubts = " ".join(_entry(found, "short.nii").doubts)
    assert "100 bytes shorter" in doubts and "spacing 1 x 1 x 40 mm" in doubts
    assert not _entry(found, "two_ct.nii.gz").doubts and not _entry(found, "one_seg.nii.gz").doubts


def test_a_series_is_looked_at_slice_by_slice(tmp_path: Path) -> None:
    hu, _ = phantom()
    write_dicom(tmp_path / "tilted", hu, step=np.array([0.0, -0.8, 2.9]))
    restate(write_dicom(tmp_path / "mr", hu), range(24), Modality="MR")
    restate(write_dicom(tmp_path / "moved", hu), [9], ImagePositionPatient=[50, -20, 57])
    restate(write_dicom(tmp_path / "unturned", hu), range(24), ImageOrientationPatient=None)
    listed = inventory(InventoryConfig(images=str(tmp_path), out=""))
    assert any("tilted by 15.4 degrees" in doubt for doubt in _entry(listed, "tilted").doubts)
    assert any("its Modality is MR, not CT" in doubt for doubt in _entry(listed, "mr").doubts)
    assert "shifted against each other by 40.0 mm" in _entry(listed, "moved").problem
    assert "its ImageOrientationPatient is missing" in _entry(listed, "unturned").problem


def test_forms_that_disagree_are_a_doubt(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(phantom()[0].T, np.diag([-1.0, 1.0, 2.0, 1.0]))
    image.set_qform(np.diag([1.0, 1.0, 2.0, 1.0]), 1)
    nibabel.save(image, tmp_path / "ct.nii")
    listed = inventory(InventoryConfig(images=str(tmp_path), out=""))
    assert any("the sform is taken" in doubt for doubt in _entry(listed, "ct.nii").doubts)
    assert listed.usable[0][1].orientation == "LAS" == "".join(nibabel.aff2axcodes(image.affine))


def test_copies_are_named(found: Inventory) -> None:
    assert [[Path(path).name for path in paths] for paths in found.copies] == [["one_ct.nii.gz", "again.nii.gz"]]


@pytest.mark.parametrize("name", ["a/one_ct.nii.gz", "series"])
def test_a_header_says_what_the_voxels_say(tree: Path, name: str) -> None:
    header, volume = read_header(tree / name), read_volume(tree / name)
    assert header.shape == volume.array_DHW.shape
    assert header.spacing == pytest.approx(volume.spacing)
    assert header.orientation == "LPS"


def test_orientation_is_that_of_the_file(tmp_path: Path) -> None:
    direction = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    sitk.WriteImage(to_image(phantom(0)[0], direction), str(tmp_path / "turned.nrrd"))
    header = read_header(tmp_path / "turned.nrrd")
    assert header.orientation == "PRI"
    assert header.shape == read_volume(tmp_path / "turned.nrrd").array_DHW.shape


def test_voxels_are_not_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_read_stored", None)
    monkeypatch.setattr(sitk.ImageFileReader, "Execute", None)
    assert len(inventory(InventoryConfig(images=str(tree), out="")).entries) == 10


def test_a_list_of_cases_is_looked_at(tree: Path, tmp_path: Path) -> None:
    rows = [{"id": "one", "image": str(tree / "a/one_ct.nii.gz"), "label": str(tree / "a/one_seg.nii.gz")}]
    rows.append({"id": "gone", "image": str(tree / "gone.nii.gz")})
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    listed = inventory(InventoryConfig(cases=str(tmp_path / "cases.json"), out=""))
    assert [bool(entry.problem) for entry in listed.entries] == [False, False, True]


def test_an_empty_tree_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="holds no CT file"):
        inventory(InventoryConfig(images=str(tmp_path)))


def test_the_verb_prints_and_writes(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inventory", f"images={tree}", f"out={tmp_path / 'inventory.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "10 volumes" in printed and "8 usable" in printed and "2 not usable; 1 copies" in printed
    written = json.loads((tmp_path / "inventory.json").read_text())
    assert len(written["entries"]) == 10
    assert main(["inventory"]) == 2
