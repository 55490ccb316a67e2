"""DICOM series: where slices lie, a tilted gantry, and slices that do not make one straight stack."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import SHAPE, SPACING, phantom, restate, write_dicom, write_enhanced, write_image

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom import slice_files
from segvol_pl.imaging.geometry import to_native, world_of
from segvol_pl.imaging.read import read_header, read_label, read_volume
from segvol_pl.imaging.write import write_mask


def test_dicom_and_nifti_of_one_ct_are_equal(tmp_path: Path) -> None:
    hu, _ = phantom()
    dicom, nifti = read_volume(write_dicom(tmp_path / "series", hu)), read_volume(write_image(hu, tmp_path / "ct.nii"))
    assert np.array_equal(dicom.array_DHW, nifti.array_DHW)
    assert np.allclose(dicom.affine, nifti.affine, atol=1e-4)
    assert np.allclose(dicom.spacing, SPACING[::-1])


def test_a_mask_for_a_dicom_folder_lies_on_its_grid(tmp_path: Path) -> None:
    hu, label = phantom()
    volume = read_volume(write_dicom(tmp_path / "series", hu))
    label_DHW = read_label(write_image(label, tmp_path / "seg.nii.gz"), volume)
    write_mask(label_DHW, volume, tmp_path / "mask.nii.gz")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "mask.nii.gz")), label)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.nii.gz", "seg.nii.gz", "series"]


NORMAL = np.array([0.0, 0.0, 1.0])
OBLIQUE = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]]) @ np.array(
    [[1.0, 0.0, 0.0], [0.0, 0.8, -0.6], [0.0, 0.6, 0.8]]
)
RAMP = np.array([4.0, -6.0, 5.0])
"""HU per mm along x, y, z, LPS: half a voxel of displacement shows as 3 HU or more."""
TILTS = {
    "gantry forward": (np.eye(3), (0.0, -3.0 * np.sin(np.radians(20)), 3.0 * np.cos(np.radians(20)))),
    "gantry back": (np.eye(3), (0.0, 0.9, 3.0)),
    "along the rows": (np.eye(3), (1.1, 0.0, 2.2)),
    "along both, oblique": (OBLIQUE, tuple((OBLIQUE @ np.array([0.4, -1.0, 3.0])).tolist())),
}


def _place(index_N3: np.ndarray, direction: np.ndarray, step: tuple[float, ...]) -> np.ndarray:
    """LPS millimetres of (slice, row, column), by the definition in DICOM's Image Plane module."""
    return np.array([10.0, -20.0, 30.0]) + index_N3 @ _steps(direction, step)


def _steps(direction: np.ndarray, step: tuple[float, ...]) -> np.ndarray:
    """Rows: mm from one slice, row and column to the next."""
    return np.stack([np.array(step), direction[:, 1] * SPACING[1], direction[:, 0] * SPACING[0]])


def _ramp(direction: np.ndarray, step: tuple[float, ...]) -> np.ndarray:
    places_N3 = _place(np.argwhere(np.ones(SHAPE)), direction, step)
    return np.rint(places_N3 @ RAMP).astype(np.int16).reshape(SHAPE)


@pytest.mark.parametrize("tilt", TILTS)
def test_a_tilted_gantry_is_straightened(tmp_path: Path, tilt: str, caplog: pytest.LogCaptureFixture) -> None:
    direction, step = TILTS[tilt]
    hu = _ramp(direction, step)
    series = write_dicom(tmp_path / "tilted", hu, direction=direction, step=np.array(step))
    volume, header = read_volume(series), read_header(series)
    axes = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    # A ramp in the world is a ramp in the voxels again: each voxel holds what lies where its affine puts it.
    inside_N3 = np.argwhere(volume.array_DHW > hu.min())
    world_N3 = world_of(inside_N3, volume, lps=True)
    off_N = np.abs(volume.array_DHW[tuple(inside_N3.T)] - world_N3 @ RAMP)
    index_N3 = (world_N3 - _place(np.zeros(3), direction, step)) @ np.linalg.inv(_steps(direction, step))
    beyond_N3 = np.maximum(np.maximum(-index_N3, index_N3 - np.array(SHAPE) + 1), 0)
    interior_N = beyond_N3.max(axis=1) < 1e-3
    assert len(inside_N3) > 0.9 * hu.size and interior_N.mean() > 0.9
    assert off_N[interior_N].max() <= 1, "0.5 HU of rounding before and after"
    # A slice ends half a voxel beyond the centres of its outermost rows and columns, and is constant there.
    assert beyond_N3.max() < 0.501
    assert (off_N <= 1.01 + beyond_N3 @ np.abs(_steps(direction, step) @ RAMP)).all()
    # All voxels of the slices lie within the grid.
    corners_N3 = np.array(list(itertools.product(*((0, size - 1) for size in SHAPE))))
    corners_4N = np.concatenate([_place(corners_N3, direction, step) * [-1, -1, 1], np.ones((8, 1))], axis=1).T
    corners_3N = np.linalg.solve(volume.affine, corners_4N)[:3]
    beyond_3N = corners_3N - np.array(volume.array_DHW.shape)[:, None] + 1
    assert corners_3N.min() > -0.02 and beyond_3N.max() < 0.02
    assert volume.array_DHW.min() == hu.min()
    assert header.shape == volume.array_DHW.shape and header.spacing == pytest.approx(volume.spacing)
    assert "tilted by" in header.remarks[0] and header.remarks[0] in caplog.text


def test_masks_of_a_tilted_gantry_lie_on_the_straight_grid(tmp_path: Path) -> None:
    hu, label = phantom()
    step = np.array(TILTS["gantry forward"][1])
    volume = read_volume(write_dicom(tmp_path / "ct", hu, step=step))
    labels = restate(write_dicom(tmp_path / "seg", label.astype(np.int16), step=step), range(24), Modality="OT")
    label_DHW = read_label(labels, volume)
    assert np.bincount(label_DHW.ravel())[1:] == pytest.approx(np.bincount(label.ravel())[1:], rel=0.02)
    assert volume.array_DHW[label_DHW == 2].mean() == pytest.approx(-800, abs=60)
    write_mask(label_DHW, volume, tmp_path / "mask.nii.gz")
    assert np.array_equal(read_label(tmp_path / "mask.nii.gz", volume), label_DHW)
    with pytest.raises(VolumeError, match=r"ct: its slices are tilted by 20\.0 degrees.*write \.nii\.gz"):
        slice_files(tmp_path / "ct")


def test_rounded_positions_make_no_tilt(tmp_path: Path) -> None:
    hu, _ = phantom()
    exact, rounded = write_dicom(tmp_path / "exact", hu), write_dicom(tmp_path / "rounded", hu)
    for number in range(24):
        place = [10.0 + 0.04 * (-1) ** number, -20.0 + 0.004 * number, 30.0 + 3 * number]
        restate(rounded, [number], ImagePositionPatient=place)
    volume = read_volume(rounded)
    assert np.array_equal(volume.array_DHW, read_volume(exact).array_DHW)
    assert np.allclose(volume.affine, read_volume(exact).affine, atol=0.2)


def _stack(**changes: object) -> Callable[[Path], Path]:
    """A series of 24 slices of which one states something else."""
    return lambda path: restate(write_dicom(path / "ct", phantom()[0]), [9], **changes)


def _all(**changes: object) -> Callable[[Path], Path]:
    return lambda path: restate(write_dicom(path / "ct", phantom()[0]), range(24), **changes)


def _second_half(path: Path) -> Path:
    return restate(write_dicom(path / "ct", phantom()[0]), range(13, 24), PixelSpacing=[0.5, 0.75])


def _smaller(path: Path) -> Path:
    whole, small = write_dicom(path / "ct", phantom()[0]), write_dicom(path / "small", phantom()[0][:, :20, :20])
    (small / "1.2.3.4_009.dcm").replace(whole / "1.2.3.4_009.dcm")
    return whole


def _bent(path: Path) -> Path:
    """Each step is within the tolerance of the others; together they lead 10 mm away."""
    folder = write_dicom(path / "ct", phantom(shape=(60, 8, 8))[0])
    for number in range(60):
        restate(folder, [number], ImagePositionPatient=[10.0, -20.0 + 0.003 * number**2, 30.0 + 3.0 * number])
    return folder


def _stretched(path: Path) -> Path:
    """The second half lies 8 % wider apart."""
    folder = write_dicom(path / "ct", phantom(shape=(60, 8, 8))[0])
    for number in range(60):
        restate(folder, [number], ImagePositionPatient=[10.0, -20.0, 30.0 + 3 * number + 0.24 * max(0, number - 30)])
    return folder


STACKS = {
    "one slice moved": (
        _stack(ImagePositionPatient=[50, -20, 57]),
        r"ct: slices .*_008\.dcm and .*_009\.dcm are shifted against each other by 40\.0 mm in plane",
    ),
    "last slice moved": (
        lambda path: restate(_stack()(path), [23], ImagePositionPatient=[10, 20, 99]),
        r"ct: slices .*_022\.dcm and .*_023\.dcm are shifted against each other by 40\.0 mm",
    ),
    "one slice rotated": (
        _stack(ImageOrientationPatient=[0, 1, 0, -1, 0, 0]),
        r"_009\.dcm: its ImageOrientationPatient differs",
    ),
    "one slice finer": (_stack(PixelSpacing=[0.5, 0.75]), r"_009\.dcm: its PixelSpacing differs"),
    "half of them finer": (_second_half, r"ct/.*\.dcm: its PixelSpacing differs"),
    "one slice smaller": (_smaller, r"_009\.dcm: its number of rows and columns differs"),
    "another patient": (_stack(PatientID="other"), r"_009\.dcm: its PatientID differs"),
    "another frame": (_stack(FrameOfReferenceUID="1.2.3.8"), r"_009\.dcm: its FrameOfReferenceUID differs"),
    "one MR among them": (_stack(Modality="MR"), r"_009\.dcm: its Modality differs"),
    "no orientation": (_all(ImageOrientationPatient=None), r"\.dcm: its ImageOrientationPatient is missing, not 6 num"),
    "one without orientation": (_stack(ImageOrientationPatient=None), r"_009\.dcm: its ImageOrientationPatient is mis"),
    "no right angle": (
        _all(ImageOrientationPatient=[1, 0, 0, 0.5, 0.5, 0]),
        r"\.dcm: its ImageOrientationP",
    ),
    "no position": (_all(ImagePositionPatient=None), r"\.dcm: its ImagePositionPatient is missing, not 3 numbers"),
    "no spacing": (_all(PixelSpacing=None), r"\.dcm: its PixelSpacing is missing, not 2 numbers"),
    "spacing of 0": (_all(PixelSpacing=[0, 1]), r"\.dcm: its PixelSpacing is \[0\.0, 1\.0\] mm"),
    "inverted": (_all(PhotometricInterpretation="MONOCHROME1"), r"\.dcm: MONOCHROME1"),
    "bent": (_bent, r"ct: slice .* lies \d\.\d\d mm from its place in an even stack"),
    "stretched": (_stretched, r"ct: slice .*_030\.dcm lies 3\.54 mm from its place in an even stack"),
    "staggered": (
        lambda path: write_dicom(path / "ct", phantom()[0], step=np.array([3.0, 0.0, 3.0])),
        r"ct: its slices are staggered by 45 degrees",
    ),
    "multi-frame": (lambda path: write_enhanced(path / "ct", phantom()[0]), r"a multi-frame DICOM file \(24 frames\)"),
}


@pytest.mark.parametrize("name", STACKS)
def test_slices_that_make_no_straight_stack_are_refused(tmp_path: Path, name: str) -> None:
    make, message = STACKS[name]
    folder = make(tmp_path)
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(VolumeError, match=message):
        read_header(folder)


@pytest.mark.parametrize("modality", ["MR", None])
def test_another_modality_is_no_ct_but_may_be_a_label_map(tmp_path: Path, modality: str | None) -> None:
    folder = _all(Modality=modality)(tmp_path)
    stated = modality or "not stated"
    with pytest.raises(
        VolumeError, match=rf"ct: its Modality is {stated}, not CT: no Hounsfield units: .*\(0008,0060\)"
    ):
        read_volume(folder)
    assert read_header(folder).remarks == (f"its Modality is {stated}, not CT: no Hounsfield units",)
    hu, label = phantom()
    volume = read_volume(write_dicom(tmp_path / "sound", hu))
    labels = restate(write_dicom(tmp_path / "seg", label.astype(np.int16)), range(24), Modality=modality)
    assert np.array_equal(to_native(read_label(labels, volume), volume), label)
