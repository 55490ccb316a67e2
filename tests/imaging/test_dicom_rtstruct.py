"""DICOM RTSTRUCT: its contours, filled at the centres of the voxels, give back the label map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ct_files import phantom, restate, write_dicom, write_image

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom import read_series
from segvol_pl.imaging.dicom_rtstruct import check_dicom_rtstruct, write_dicom_rtstruct
from segvol_pl.imaging.geometry import Volume
from segvol_pl.imaging.read import read_volume

if TYPE_CHECKING:
    from pydicom import Dataset

pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

COSINE, SINE = np.cos(0.5), np.sin(0.5)
OBLIQUE = np.array([[COSINE, -SINE, 0], [SINE, COSINE, 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
)


def organs() -> np.ndarray:
    """A shell with a rod inside, two parts that touch the border, and single voxels, two of which meet at a corner."""
    label = np.zeros((24, 28, 26), np.uint8)
    z, y, x = np.indices(label.shape)
    from_centre = np.sqrt((z - 11) ** 2 + (y - 14) ** 2 + (x - 12) ** 2)
    label[(from_centre < 9) & (from_centre > 5)] = 1
    label[(abs(y - 14) < 2) & (abs(x - 12) < 2) & (abs(z - 11) < 3)] = 1
    label[2:9, :4, :5] = label[4:6, 20:, 20:] = 2
    label[0, 0, 25] = label[20, 5, 5] = label[20, 6, 6] = label[20, 5, 20] = 4
    return label


def noise() -> np.ndarray:
    """Holes in parts in holes, and voxels that meet at corners, at random."""
    return np.random.default_rng(0).choice([0, 1, 2], size=(3, 20, 18), p=[0.3, 0.6, 0.1]).astype(np.uint8)


def sieve() -> np.ndarray:
    """Some 500 holes in one slice: a contour of more than 64 KB."""
    label = np.ones((2, 46, 46), np.uint8)
    label[0, 1:-1:2, 1:-1:2] = 0
    return label


def write(label: np.ndarray, ct: Path, out: Path) -> tuple[Volume, Dataset]:
    """The CT of a folder, and the RTSTRUCT that was written of a native label map."""
    volume = read_volume(ct)
    names = ["liver", "Niere", "absent", "печень" + "a" * 70]
    write_dicom_rtstruct(volume.native.to_canonical(label), names, volume, out)
    return volume, pydicom.dcmread(out)


def inside(points_N2: np.ndarray, polygon_P2: np.ndarray) -> np.ndarray:
    """Which points (column, row) an odd number of edges lies to the right of."""
    ends_P2 = np.roll(polygon_P2, -1, axis=0)
    odd_N = np.zeros(len(points_N2), bool)
    for (x, y), (end_x, end_y) in zip(polygon_P2, ends_P2, strict=True):
        if y != end_y:
            crosses_N = (y <= points_N2[:, 1]) != (end_y <= points_N2[:, 1])
            odd_N ^= crosses_N & (points_N2[:, 0] < x + (points_N2[:, 1] - y) / (end_y - y) * (end_x - x))
    return odd_N


def filled(read: Dataset, volume: Volume) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """ROI number -> native voxels inside any contour of their slice, and inside an odd number of them.

    Both contours and voxels are brought into the plane of the slice that a contour refers to, by its own header.
    """
    slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in read_series(volume.path).files]
    number_of = {each.SOPInstanceUID: number for number, each in enumerate(slices)}
    shape = volume.native.shape
    native_N3 = np.argwhere(np.ones(shape))
    places_N3 = (np.insert(native_N3, 3, 1, axis=1) @ volume.native.affine.T)[:, :3] * [-1, -1, 1]
    places = places_N3.reshape(*shape, 3)
    found = {}
    for roi in read.ROIContourSequence:
        some, odd = np.zeros(shape, bool), np.zeros(shape, bool)
        for contour in roi.ContourSequence:
            (reference,) = contour.ContourImageSequence
            number = number_of[reference.ReferencedSOPInstanceUID]
            header = slices[number]
            along, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
            axes_33 = np.stack([along, down, np.cross(along, down)])
            origin = np.array(header.ImagePositionPatient, float)
            polygon_P3 = (np.array(contour.ContourData, float).reshape(-1, 3) - origin) @ axes_33.T
            assert np.abs(polygon_P3[:, 2]).max() < 1e-3, "in the plane of the slice"
            assert contour.NumberOfContourPoints == len(polygon_P3) > 3
            points_N3 = (places[number].reshape(-1, 3) - origin) @ axes_33.T
            assert np.abs(points_N3[:, 2]).max() < 0.05
            hits = inside(points_N3[:, :2], polygon_P3[:, :2]).reshape(shape[1:])
            some[number] |= hits
            odd[number] ^= hits
        found[int(roi.ReferencedROINumber)] = some, odd
    return found


DOWNWARDS = {"direction": OBLIQUE, "step": -3.0 * OBLIQUE[:, 2]}
"""The first file is the uppermost slice."""


@pytest.mark.parametrize(
    ("label", "way"),
    [(organs, {}), (noise, {}), (sieve, {}), (organs, DOWNWARDS), (noise, {"direction": np.diag([-1.0, 1.0, -1.0])})],
    ids=["organs", "noise", "sieve", "oblique, downwards", "feet first"],
)
def test_the_filled_contours_are_the_label_map(
    label: Callable[[], np.ndarray], way: dict[str, np.ndarray], tmp_path: Path
) -> None:
    values = label()
    ct = write_dicom(tmp_path / "ct", np.where(values, 40, -1000).astype(np.int16), **way)
    volume, read = write(values, ct, tmp_path / "out.rtstruct.dcm")
    found = filled(read, volume)
    assert sorted(found) == np.unique(values[values > 0]).tolist()
    for value, (some, odd) in found.items():
        assert np.array_equal(some, values == value) and np.array_equal(odd, values == value)


def test_contours_of_a_tilted_gantry_lie_where_the_mask_lies(tmp_path: Path) -> None:
    ct = write_dicom(tmp_path / "ct", phantom()[0], step=np.array([0.0, -1.1, 2.8]))
    straight = np.zeros(read_volume(ct).native.shape, np.uint8)
    straight[:, 5:33] = organs()
    volume, read = write(straight, ct, tmp_path / "out.rtstruct.dcm")
    assert volume.native.shape[1] > 33, "the straight grid has more rows than the slices"
    for value, (some, odd) in filled(read, volume).items():
        assert np.array_equal(some, straight == value) and np.array_equal(odd, straight == value)


def test_the_object_states_what_the_standard_demands(tmp_path: Path) -> None:
    hu, _ = phantom()
    ct = restate(write_dicom(tmp_path / "ct", hu), range(24), SpecificCharacterSet="ISO_IR 100", PatientName="Müller")
    _, read = write(organs(), ct, tmp_path / "out.rtstruct.dcm")
    source = pydicom.dcmread(read_series(ct).files[0])
    assert (read.Modality, read.SOPClassUID.name) == ("RTSTRUCT", "RT Structure Set Storage")
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID
    assert str(read.PatientName) == "Müller"
    assert read.StudyInstanceUID == source.StudyInstanceUID and read.SeriesInstanceUID != source.SeriesInstanceUID
    empty = {"PatientID", "StudyDate", "StudyID", "AccessionNumber", "ReferringPhysicianName", "OperatorsName"}
    for name in (*empty, "StructureSetLabel", "StructureSetDate", "StructureSetTime", "SeriesNumber", "Manufacturer"):
        assert name in read and (name in empty or read.get(name))

    (frame,) = read.ReferencedFrameOfReferenceSequence
    (study,) = frame.RTReferencedStudySequence
    (series,) = study.RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == read.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert study.ReferencedSOPInstanceUID == source.StudyInstanceUID and study.ReferencedSOPClassUID
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    slices = [each.ReferencedSOPInstanceUID for each in series.ContourImageSequence]
    assert slices == [f"1.2.3.4.{number}" for number in range(1, 25)]

    rois, shown, observed = read.StructureSetROISequence, read.ROIContourSequence, read.RTROIObservationsSequence
    assert [roi.ROIName for roi in rois] == ["liver", "Niere", ("печень" + "a" * 70)[:64]]
    assert [roi.ROINumber for roi in rois] == [each.ReferencedROINumber for each in shown] == [1, 2, 4]
    assert [each.ReferencedROINumber for each in observed] == [1, 2, 4]
    assert {roi.ROIGenerationAlgorithm for roi in rois} == {"AUTOMATIC"}
    assert {roi.ReferencedFrameOfReferenceUID for roi in rois} == {source.FrameOfReferenceUID}
    assert len({tuple(each.ROIDisplayColor) for each in shown}) == 3
    assert all("RTROIInterpretedType" in each and "ROIInterpreter" in each for each in observed)
    for contour in (contour for each in shown for contour in each.ContourSequence):
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        (reference,) = contour.ContourImageSequence
        assert reference.ReferencedSOPClassUID == source.SOPClassUID


def test_what_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    hu, _ = phantom()
    nifti, ct = write_image(hu, tmp_path / "ct.nii.gz"), write_dicom(tmp_path / "ct", hu)
    out = tmp_path / "out.rtstruct.dcm"
    with pytest.raises(VolumeError, match=r"a DICOM RTSTRUCT refers to the slices of a DICOM folder, .*ct\.nii\.gz"):
        check_dicom_rtstruct(nifti)
    with pytest.raises(VolumeError, match=r"out\.rtstruct\.dcm: nothing was found.*cannot be empty: write \.nii\.gz"):
        write(np.zeros(hu.shape, np.uint8), ct, out)
    restate(ct, range(24), FrameOfReferenceUID=None)
    with pytest.raises(VolumeError, match=r"needs FrameOfReferenceUID in the slices of .*ct: write \.nii\.gz"):
        write(organs(), ct, out)
    assert not out.exists()
