"""A corpus of 200 cases of which 60 are broken, in twenty ways: each is listed with its reason, no good one is lost."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import phantom, to_image, write_dicom

from segvol_pl.config import PackConfig, RegionsConfig
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.store import INDEX, Store
from segvol_pl.data.verify import verify
from segvol_pl.errors import PackError
from segvol_pl.packing import stage as staging
from segvol_pl.packing.pack import pack

SHAPE = (10, 14, 12)
CASES, REPEATS = 200, 3


def image_of(folder: Path) -> Path:
    return folder / "ct.nii.gz"


def label_of(folder: Path) -> Path:
    return folder / "seg.nii.gz"


def write_good(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hu, label = phantom(seed, SHAPE)
    sitk.WriteImage(to_image(hu), str(image_of(folder)))
    sitk.WriteImage(to_image(label), str(label_of(folder)))


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def with_voxels(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    sitk.WriteImage(to_image(change(phantom(3, SHAPE)[0])), str(image_of(folder)))


def with_label(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    sitk.WriteImage(to_image(change(phantom(3, SHAPE)[1])), str(label_of(folder)))


def with_affine(folder: Path, affine: np.ndarray) -> None:
    header = nibabel.Nifti1Header()
    header.set_sform(affine, code=1)
    nibabel.save(nibabel.Nifti1Image(phantom(3, SHAPE)[0].T, None, header), image_of(folder))


def holed(hu: np.ndarray) -> np.ndarray:
    holed = hu.astype(np.float32)
    holed[2, 3, 4] = np.nan
    return holed


def endless(hu: np.ndarray) -> np.ndarray:
    endless = hu.astype(np.float32)
    endless[2, 3, 4] = np.inf
    return endless


def moved(folder: Path) -> None:
    label = to_image(phantom(3, SHAPE)[1])
    label.SetOrigin((900.0, 0.0, 0.0))
    sitk.WriteImage(label, str(label_of(folder)))


def as_series(folder: Path, skip: tuple[int, ...] = (), second: bool = False) -> None:
    """The image as a DICOM folder of the same name."""
    image_of(folder).unlink()
    write_dicom(image_of(folder), phantom(3, SHAPE)[0], skip=skip)
    if second:
        write_dicom(image_of(folder), phantom(4, SHAPE)[0], "1.2.3.9")


def four_axes(folder: Path) -> None:
    array = np.stack([phantom(3, SHAPE)[0]] * 2)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=False), str(image_of(folder)))


def colours(folder: Path) -> None:
    array = np.stack([phantom(3, SHAPE)[0].astype(np.uint8)] * 3, axis=-1)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(image_of(folder)))


BREAKS: dict[str, Callable[[Path], object]] = {
    "cut compressed file": lambda folder: cut(image_of(folder), 0.6),
    "a few bytes of a header": lambda folder: cut(image_of(folder), 0.01),
    "empty file": lambda folder: image_of(folder).write_bytes(b""),
    "text": lambda folder: image_of(folder).write_text("this is no image"),
    "compressed text": lambda folder: image_of(folder).write_bytes(gzip.compress(b"this is no image" * 40)),
    "gone": lambda folder: image_of(folder).unlink(),
    "an empty folder": lambda folder: (image_of(folder).unlink(), image_of(folder).mkdir()),
    "NaN": lambda folder: with_voxels(folder, holed),
    "infinite": lambda folder: with_voxels(folder, endless),
    "constant": lambda folder: with_voxels(folder, np.zeros_like),
    "one slice": lambda folder: sitk.WriteImage(to_image(phantom(3, SHAPE)[0])[:, :, 4], str(image_of(folder))),
    "four axes": four_axes,
    "colours": colours,
    "no affine": lambda folder: with_affine(folder, np.diag([0.0, 1.0, 1.0, 1.0])),
    "sheared": lambda folder: with_affine(folder, np.eye(4) + np.eye(4, k=1) * [[0.6], [0], [0], [0]]),
    "missing slice": lambda folder: as_series(folder, skip=(4,)),
    "two series": lambda folder: as_series(folder, second=True),
    "label cut": lambda folder: cut(label_of(folder), 0.5),
    "label gone": lambda folder: label_of(folder).unlink(),
    "label empty": lambda folder: with_label(folder, np.zeros_like),
    "label of other values": lambda folder: with_label(folder, lambda label: label * 7),
    "label with fractions": lambda folder: with_label(folder, lambda label: label.astype(np.float32) * 0.7),
    "label below 0": lambda folder: with_label(folder, lambda label: -label.astype(np.int16)),
    "label elsewhere": moved,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of 200 cases with its list, and what is wrong with which."""
    folder = tmp_path_factory.mktemp("corpus")
    broken = {f"case{7 + 2 * number:03d}": kind for number, kind in enumerate(list(BREAKS) * REPEATS)}
    for number in range(CASES):
        write_good(folder / f"case{number:03d}", number)
    for name, kind in broken.items():
        BREAKS[kind](folder / name)
    with (folder / "cases.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "image", "label"])
        for number in range(CASES):
            name = f"case{number:03d}"
            rows.writerow([name, f"{name}/ct.nii.gz", f"{name}/seg.nii.gz"])
    (folder / "categories.yaml").write_text("liver: [1]\nlung: [2]\n")
    return folder, broken


def config_of(folder: Path, out: Path, bound: float) -> PackConfig:
    return PackConfig(
        cases=str(folder / "cases.csv"),
        categories=str(folder / "categories.yaml"),
        out=str(out),
        overview_shape=[4, 8, 8],
        max_bad_fraction=bound,
        anchors=4,
        workers=1,
        regions=RegionsConfig(enabled=False),
    )


def test_a_broken_corpus_is_packed_and_repaired(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, broken = corpus
    assert len(broken) >= 60 and len(BREAKS) >= 15
    out = tmp_path / "shards"
    with pytest.raises(PackError, match=rf"{len(broken)} of {CASES} cases cannot be used"):
        pack(config_of(folder, out, 0.05))
    assert not (out / INDEX).exists()
    report = pack(config_of(folder, out, 0.5))
    assert {case.id for case in report.bad} == set(broken)
    for case in report.bad:
        assert "\n" not in case.reason and f"{case.id}/" in case.reason, (broken[case.id], case.reason)
    keys = {record.key for record in read_index(Store(out)).samples}
    assert keys == {f"case{number:03d}" for number in range(CASES)} - set(broken)
    assert verify(out) == []
    listed = json.loads((out / "pack_report.json").read_text())["bad"]
    assert {case["id"] for case in listed} == set(broken)

    packed = list[str]()
    monkeypatch.setattr(staging, "pack_case", lambda case, *rest: (packed.append(case.id), kept(case, *rest))[1])
    assert pack(config_of(folder, out, 0.5)).packed == len(keys) and not packed
    for name in broken:
        shutil.rmtree(folder / name)
        write_good(folder / name, int(name[4:]))
    assert pack(config_of(folder, out, 0.0)).packed == CASES
    assert sorted(packed) == sorted(broken)
    assert verify(out) == []
    monkeypatch.undo()
    pack(config_of(folder, tmp_path / "anew", 0.0))
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == {
        path.name: path.read_bytes() for path in (tmp_path / "anew").glob("*.tar")
    }


kept = staging.pack_case
