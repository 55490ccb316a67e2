"""Pairs by name, or as stated; what cannot be paired is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ct_files import phantom, write_case, write_dicom

from segvol_pl.config.categories import load_categories
from segvol_pl.errors import CaseError
from segvol_pl.packing.cases import Case, case_id, pair_cases, read_cases


def _touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_ct.nii.gz", "a"),
        ("a_CT.NII.GZ", "a"),
        ("a_b_image.mha", "a_b"),
        ("case_001_0000.nii", "case_001"),
        ("a_seg.nrrd", "a"),
        ("a_Label.nii.gz", "a"),
        ("thorax_dicom", "thorax"),
        ("plain.nii.gz", "plain"),
        ("1.2.840", "1.2.840"),
        ("a_ct_2.nii", "a_ct_2"),
    ],
)
def test_case_id(name: str, expected: str) -> None:
    assert case_id(Path("folder") / name) == expected


def test_one_image_and_one_label_are_paired_as_given(tmp_path: Path) -> None:
    _touch(tmp_path, "scan.nii.gz", "truth.nii.gz")
    image, label = tmp_path / "scan.nii.gz", tmp_path / "truth.nii.gz"
    assert pair_cases(str(image), str(label)) == [Case("scan", image, label)]


def test_folders_are_paired_by_id_with_dicom_among_them(tmp_path: Path) -> None:
    _touch(tmp_path / "images", "b_0000.nii.gz", "notes.txt")
    write_dicom(tmp_path / "images" / "a", phantom()[0][:3])
    _touch(tmp_path / "labels", "a.nii.gz", "b.nii.gz")
    cases = pair_cases(str(tmp_path / "images"), str(tmp_path / "labels"))
    assert [(case.id, case.image.name, case.label.name) for case in cases if case.label] == [
        ("a", "a", "a.nii.gz"),
        ("b", "b_0000.nii.gz", "b.nii.gz"),
    ]


def test_one_folder_may_hold_both_told_apart_by_their_endings(tmp_path: Path) -> None:
    write_case(tmp_path, "a")
    write_case(tmp_path, "b")
    cases = pair_cases(str(tmp_path), str(tmp_path))
    assert [(case.image.name, case.label and case.label.name) for case in cases] == [
        ("a_ct.nii.gz", "a_seg.nii.gz"),
        ("b_ct.nii.gz", "b_seg.nii.gz"),
    ]
    assert [case.image.name for case in pair_cases(str(tmp_path / "*_ct.nii.gz"))] == ["a_ct.nii.gz", "b_ct.nii.gz"]


def test_a_dicom_folder_is_one_case(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "scan_dicom", phantom()[0][:3])
    assert pair_cases(str(folder)) == [Case("scan", folder)]


def test_what_cannot_be_paired_is_listed(tmp_path: Path) -> None:
    _touch(tmp_path / "images", "a.nii", "b.nii", "c.nii")
    _touch(tmp_path / "labels", "b.nii", "c.nii", "d.nii")
    with pytest.raises(CaseError, match=r"a\.nii \(no label\), .*d\.nii \(no image\)"):
        pair_cases(str(tmp_path / "images"), str(tmp_path / "labels"))


def test_ambiguous_names_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "twice", "a_ct.nii", "a_image.nii")
    with pytest.raises(CaseError, match=r"several files have one case id: .*a_ct\.nii, .*a_image\.nii"):
        pair_cases(str(tmp_path / "twice"))
    _touch(tmp_path / "plain", "a.nii", "b.nii")
    with pytest.raises(CaseError, match="both image and label"):
        pair_cases(str(tmp_path / "plain"), str(tmp_path / "plain"))


@pytest.mark.parametrize("pattern", ["gone", "gone/*.nii.gz", "empty", "notes"])
def test_nothing_found_is_an_error_that_names_the_path(tmp_path: Path, pattern: str) -> None:
    _touch(tmp_path / "empty")
    _touch(tmp_path / "notes", "notes.txt")
    with pytest.raises(CaseError, match=f"images: .*{pattern.partition('/')[0]}.*check the path"):
        pair_cases(str(tmp_path / pattern))


def test_stated_pairs_are_relative_to_their_file(tmp_path: Path) -> None:
    expected = [Case("a", tmp_path / "x/1.nii"), Case("b", tmp_path / "2.nii", tmp_path / "3.nii")]
    (tmp_path / "cases.csv").write_text("id,image,label\nb,2.nii,3.nii\na,x/1.nii,\n")
    rows = [{"id": "b", "image": "2.nii", "label": "3.nii"}, {"id": "a", "image": "x/1.nii"}]
    (tmp_path / "cases.json").write_text(json.dumps(rows))
    assert read_cases(tmp_path / "cases.csv") == expected
    assert read_cases(tmp_path / "cases.json") == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "id,image,lable\na,b,c\n", "case 1: unknown column 'lable'"),
        ("c.csv", "id,image\na,\n", "case 1: needs an id and an image"),
        ("c.csv", "id,image\na,b\na,c\n", "lists a twice"),
        ("c.csv", "id,image\n", "lists no case"),
        ("c.csv", "id,image\na,b,c\n", "case 1: has more cells than the file has columns"),
        ("c.json", "{}", "is not a list"),
        ("c.json", "[1]", "case 1: is not an object"),
        ("c.json", "[", "is not JSON"),
        ("c.json", '[{"id": 1, "image": "b"}]', "case 1: needs an id"),
    ],
)
def test_bad_stated_pairs(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CaseError, match=message):
        read_cases(tmp_path / name)


def test_missing_files_of_cases_and_categories(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"cases: .*does not exist"):
        read_cases(tmp_path / "gone.csv")
    with pytest.raises(CaseError, match=r"categories: .*does not exist"):
        load_categories(tmp_path / "gone.yaml")


@pytest.mark.parametrize("text", ["categories:\n  liver: [2, 1]\n  tumour: 2\n", "liver: [1, 2]\ntumour: [2]\n"])
def test_categories_with_or_without_a_heading(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert load_categories(tmp_path / "c.yaml") == {"liver": [1, 2], "tumour": [2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names none"),
        ("categories: {}", "names none"),
        ("- liver", "names none"),
        ("liver: []", "liver: .* are no label values"),
        ("liver: [0]", "from 1 to 65535"),
        ("liver: [1.5]", "are no label values"),
        ("liver: [yes]", "are no label values"),
        ("liver: one", "are no label values"),
        ("liver: [1]\nliver: [2]", "liver is given twice"),
        ("1: [1]", "1 is no name"),
        ("liver: [", "is no YAML"),
        ("liver: !!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_bad_categories(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(CaseError, match=message) as caught:
        load_categories(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)


def test_a_list_may_name_the_split(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("id,image,label,split\na,a.nii,a_seg.nii,test\nb,b.nii,b_seg.nii,\n")
    assert [case.split for case in read_cases(path)] == ["test", ""]
    path.write_text("id,image,label,split\na,a.nii,a_seg.nii,val\n")
    with pytest.raises(CaseError, match="case 1: split is 'val': write train or test, or leave it empty"):
        read_cases(path)
