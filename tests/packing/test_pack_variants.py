"""Real CTs in many orientations, as NIfTI and as DICOM: they pack to the same voxels, whatever they came in."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from segvol_pl.config import PackConfig, RegionsConfig
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_facts, read_member
from segvol_pl.data.store import Store
from segvol_pl.packing.pack import pack

BLOCK = (40, 36, 18)
"""Voxels x, y, z cut from each CT."""
FLIPS = [np.array(flip) for flip in itertools.product((False, True), repeat=3)]
ORDERS = list(itertools.permutations(range(3)))


@dataclass(frozen=True)
class Variant:
    """One of a block's files: the axes in another order and direction, the geometry following."""

    order: tuple[int, int, int]
    flip: np.ndarray

    def of(self, image: sitk.Image) -> sitk.Image:
        return sitk.Flip(sitk.PermuteAxes(image, self.order), self.flip.tolist(), False)

    @property
    def right_handed(self) -> bool:
        """Slices of a DICOM series are ordered along the normal of their rows and columns."""
        return bool((round(float(np.linalg.det(np.eye(3)[list(self.order)]))) == 1) == (self.flip.sum() % 2 == 0))


NIFTI = [Variant(order, flip) for order in ORDERS for flip in FLIPS][::3]
DICOM = [Variant(order, flip) for order in ORDERS for flip in FLIPS if Variant(order, flip).right_handed][::4]


BLOCKS = {
    "a": ("trunk", (40, 30, 40)),
    "b": ("trunk", (60, 40, 70)),
    "c": ("thorax", (150, 250, 1)),
    "d": ("thorax", (300, 200, 1)),
}
"""The CT, and the first voxel of the block."""


def block_of(folder: Path, name: str, start: tuple[int, int, int]) -> tuple[sitk.Image, sitk.Image]:
    """A block of a real CT and of its label map, which may lie on the CT's grid the other way round."""
    if name == "thorax":
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder / "thorax_dicom"))
        whole = sitk.ReadImage(files)
    else:
        whole = sitk.ReadImage(str(folder / f"{name}_ct.nii.gz"))
    image = sitk.RegionOfInterest(sitk.Cast(whole, sitk.sitkInt16), BLOCK, start)
    label = sitk.ReadImage(str(folder / f"{name}_seg.nii.gz"))
    return image, sitk.Resample(label, image, sitk.Transform(), sitk.sitkNearestNeighbor)


def write_series(image: sitk.Image, folder: Path) -> Path:
    """A DICOM series of the image, one file a slice."""
    folder.mkdir()
    direction = np.array(image.GetDirection()).reshape(3, 3)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(image.GetSize()[2]):
        piece = image[:, :, number]
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.3.5.{number + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.5",
            "0020|0013": str(number),
            "0020|0032": written(image.TransformIndexToPhysicalPoint((0, 0, number))),
            "0020|0037": written([*direction[:, 0], *direction[:, 1]]),
            "0018|0050": f"{image.GetSpacing()[2]:.8g}",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{number:03d}.dcm"))
        writer.Execute(piece)
    return folder


def written(numbers: object) -> str:
    return "\\".join(f"{number:.8g}" for number in numbers)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def corpus(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of each real CT, each in 16 variants as NIfTI and 6 as DICOM, and one resampled: 89 cases."""
    folder = tmp_path_factory.mktemp("variants")
    rows = []
    for name, (source, start) in BLOCKS.items():
        image, label = block_of(shared / "ct", source, start)
        for kind, variants in (("nifti", NIFTI), ("dicom", DICOM)):
            for number, variant in enumerate(variants):
                id = f"{name}_{kind}_{number:02d}"
                sitk.WriteImage(variant.of(label), str(folder / f"{id}_seg.nii.gz"))
                path = folder / (f"{id}.nii.gz" if kind == "nifti" else id)
                if kind == "nifti":
                    sitk.WriteImage(variant.of(image), str(path))
                else:
                    write_series(variant.of(image), path)
                rows.append({"id": id, "image": path.name, "label": f"{id}_seg.nii.gz"})
    coarse = sitk.Resample(image, [size // 2 for size in BLOCK], sitk.Transform(), sitk.sitkLinear, image.GetOrigin(),
                           [2 * step for step in image.GetSpacing()], image.GetDirection())  # fmt: skip
    sitk.WriteImage(coarse, str(folder / "d_resampled.nii.gz"))
    rows.append({"id": "d_resampled", "image": "d_resampled.nii.gz", "label": "d_nifti_00_seg.nii.gz"})
    (folder / "cases.json").write_text(json.dumps(rows))
    (folder / "categories.yaml").write_text("".join(f"s{value}: [{value}]\n" for value in range(1, 118)))
    return folder


def packed(folder: Path, out: Path, ids: list[str] | None = None) -> Store:
    rows = json.loads((folder / "cases.json").read_text())
    chosen = folder / f"{out.name}.json"
    chosen.write_text(json.dumps([row for row in rows if ids is None or row["id"] in ids]))
    config = PackConfig(
        cases=str(chosen),
        categories=str(folder / "categories.yaml"),
        out=str(out),
        overview_shape=[8, 16, 16],
        workers=1,
        anchors=8,
        regions=RegionsConfig(enabled=False),
    )
    pack(config)
    return Store(out)


def test_variants_are_copies_of_one(corpus: Path, tmp_path: Path) -> None:
    """One of each block is packed, the 84 others are named as its copies; another resolution is another volume."""
    store = packed(corpus, tmp_path / "all")
    report = json.loads((tmp_path / "all/pack_report.json").read_text())
    assert report["cases"] == 89 and not report["bad"]
    assert sorted(record.key for record in read_index(store).samples) == [
        "a_dicom_00",
        "b_dicom_00",
        "c_dicom_00",
        "d_dicom_00",
        "d_resampled",
    ]
    assert len(report["duplicates"]) == 84
    assert all(left_out[0] == kept[0] for left_out, kept in report["duplicates"].items())


@pytest.mark.parametrize("block", BLOCKS)
def test_variants_pack_to_the_same_bytes(corpus: Path, tmp_path: Path, block: str) -> None:
    """Voxels, label map, overview, geometry, split: packed one by one, so that none is left out as a copy."""
    ids = [f"{block}_{kind}_{number:02d}" for kind, variants in (("nifti", NIFTI), ("dicom", DICOM))
           for number in range(len(variants))]  # fmt: skip
    assert len(ids) >= 20
    found = []
    for id in ids:
        store = packed(corpus, tmp_path / id, [id])
        (record,) = read_index(store).samples
        found.append((store, record))
    first = arrays_of(*found[0])
    facts = read_facts(*found[0])
    for store, record in found[1:]:
        assert arrays_of(store, record) == first, record.key
        other = read_facts(store, record)
        assert (other.shape, other.split, other.categories) == (facts.shape, facts.split, facts.categories)
        assert other.source["content_sha256"] == facts.source["content_sha256"]
        np.testing.assert_allclose(other.spacing, facts.spacing, rtol=1e-5)
        np.testing.assert_allclose(other.affine, facts.affine, atol=1e-3)


def arrays_of(store: Store, record: SampleRecord) -> dict[Member, bytes]:
    stored = [member for member in Member if member.value in record.members and member is not Member.FACTS]
    return {member: read_member(store, record, member) for member in stored}
