"""Geometry is kept by the affine: in whatever orientation a file lies, and back."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import phantom, write_case, write_dicom, write_image, write_promise

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.geometry import to_native
from segvol_pl.imaging.read import read_header, read_label, read_volume, source_sha256
from segvol_pl.imaging.write import write_mask

ORIENTATIONS = [
    np.eye(3)[:, list(order)] * signs
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
"""All 48 ways in which array axes can run along the axes of the body."""


def _array(seed: int = 0, shape: tuple[int, int, int] = (3, 4, 5)) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, size=shape).astype(np.int16)


@pytest.mark.parametrize("direction", ORIENTATIONS, ids=lambda direction: str(direction.astype(int).tolist()))
@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_every_orientation_comes_back(tmp_path: Path, direction: np.ndarray, ending: str) -> None:
    native = _array()
    volume = read_volume(write_image(native, tmp_path / f"ct{ending}", direction))
    assert (np.diag(volume.affine[[2, 1, 0], :3]) > 0).all(), "D, H, W grow to superior, anterior, right"
    assert np.allclose(volume.affine[:3, :3] * (1 - np.eye(3)[::-1]), 0)
    assert np.array_equal(to_native(volume.array_DHW, volume), native)
    mask_DHW = volume.array_DHW > 0
    write_mask(mask_DHW, volume, tmp_path / f"mask{ending}")
    image, mask = sitk.ReadImage(tmp_path / f"ct{ending}"), sitk.ReadImage(tmp_path / f"mask{ending}")
    assert np.array_equal(sitk.GetArrayFromImage(mask), native > 0)
    for geometry in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(image, geometry)(), getattr(mask, geometry)(), atol=1e-4), geometry
    assert np.array_equal(read_label(tmp_path / f"mask{ending}", volume), mask_DHW)


def test_axes_and_spacing_agree_with_nibabel(tmp_path: Path) -> None:
    path = write_image(_array(), tmp_path / "ct.nii.gz", ORIENTATIONS[13])
    volume, other = read_volume(path), nibabel.as_closest_canonical(nibabel.load(path))
    assert np.array_equal(volume.array_DHW, np.asarray(other.dataobj).transpose(2, 1, 0))
    assert np.allclose(volume.spacing, other.header.get_zooms()[::-1])
    assert np.allclose(volume.affine[:, [2, 1, 0, 3]], other.affine, atol=1e-4)


def test_an_oblique_affine_stays_exact(tmp_path: Path) -> None:
    cos, sin = np.cos(0.3), np.sin(0.3)
    direction = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ ORIENTATIONS[22]
    native = _array()
    volume = read_volume(write_image(native, tmp_path / "ct.nrrd", direction))
    image = sitk.ReadImage(tmp_path / "ct.nrrd")
    place = np.argwhere(volume.array_DHW == native[2, 1, 3])[0]
    x, y, z = image.TransformIndexToPhysicalPoint((3, 1, 2))
    assert np.allclose(volume.affine @ [*place, 1], [-x, -y, z, 1])
    write_mask(volume.array_DHW > 0, volume, tmp_path / "mask.nrrd")
    assert np.allclose(sitk.ReadImage(tmp_path / "mask.nrrd").GetDirection(), image.GetDirection())


def test_hu_are_rounded_and_clipped(tmp_path: Path) -> None:
    native = np.full((2, 2, 2), -1000.6, np.float32)
    native[0, 0, 0], native[1, 1, 1] = 1e6, -1e6
    volume = read_volume(write_image(native, tmp_path / "ct.mha"))
    assert volume.array_DHW.dtype == np.int16
    assert sorted(set(volume.array_DHW.ravel().tolist())) == [-32768, -1001, 32767]


def test_a_label_the_other_way_round_is_aligned_by_its_affine(tmp_path: Path) -> None:
    image, seg = write_case(tmp_path, "a")
    volume = read_volume(image)
    expected_DHW = read_label(seg, volume)
    sitk.WriteImage(sitk.Flip(sitk.ReadImage(seg), (True, True, False)), str(tmp_path / "flipped.nii.gz"))
    assert np.array_equal(read_label(tmp_path / "flipped.nii.gz", volume), expected_DHW)
    assert volume.array_DHW[expected_DHW == 2].mean() == pytest.approx(-800, abs=5)


def test_a_label_on_a_larger_grid_is_resampled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, seg = write_case(tmp_path, "a")
    volume = read_volume(image)
    padded = sitk.ConstantPad(sitk.ReadImage(seg), (3, 2, 1), (1, 2, 3), 0)
    sitk.WriteImage(padded, str(tmp_path / "padded.nii.gz"))
    assert np.array_equal(read_label(tmp_path / "padded.nii.gz", volume), read_label(seg, volume))
    assert "resampled" in caplog.text


@pytest.mark.parametrize("shift", [20.0, 500.0])
def test_a_label_of_another_place_is_refused(tmp_path: Path, shift: float) -> None:
    image, seg = write_case(tmp_path, "a")
    moved = sitk.ReadImage(seg)
    moved.SetOrigin([coordinate + shift for coordinate in moved.GetOrigin()])
    sitk.WriteImage(moved, str(tmp_path / "moved.nii.gz"))
    with pytest.raises(VolumeError, match=r"moved\.nii\.gz: label on another grid that cannot be aligned: it covers"):
        read_label(tmp_path / "moved.nii.gz", read_volume(image))


@pytest.mark.parametrize(
    ("value", "message"), [(0.5, "fractions such as 0.5"), (-1.0, "from -1.0 to"), (70000.0, "holds 0 to 65535")]
)
def test_a_label_holds_whole_numbers(tmp_path: Path, value: float, message: str) -> None:
    image, _ = write_case(tmp_path, "a")
    label = phantom()[1].astype(np.float32)
    label[0, 0, 0] = value
    with pytest.raises(VolumeError, match=message):
        read_label(write_image(label, tmp_path / "seg.mha"), read_volume(image))


@pytest.mark.parametrize(("highest", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_labels_take_the_smallest_dtype(tmp_path: Path, highest: int, dtype: type) -> None:
    image, _ = write_case(tmp_path, "a")
    label = phantom()[1].astype(np.float32)
    label[0, 0, 0] = highest
    assert read_label(write_image(label, tmp_path / "seg.mha"), read_volume(image)).dtype == dtype


# NIfTI: two forms, and units

MIRRORED = np.diag([-1.0, 1.0, 2.0, 1.0])
PLAIN = np.diag([1.0, 1.0, 2.0, 1.0])
SHEARED = PLAIN + np.outer([1, 0, 0, 0], [0, 0.3, 0, 0])


def _two_forms(path: Path, qform: np.ndarray, qcode: int, sform: np.ndarray, scode: int, unit: str = "mm") -> Path:
    image = nibabel.Nifti1Image(_array().T, None)
    image.set_qform(qform, qcode)
    image.set_sform(sform, scode)
    image.header.set_xyzt_units(xyz=unit)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize(
    ("qcode", "sform", "scode", "taken"),
    [
        (1, MIRRORED, 1, "sform"),
        (2, MIRRORED, 1, "sform"),
        (1, MIRRORED, 2, "sform"),
        (1, MIRRORED + np.outer([5, 0, 0, 0], [0, 0, 0, 1]), 4, "sform"),
        (2, MIRRORED + np.outer([5, 0, 0, 0], [0, 0, 0, 1]), 2, "sform"),
        (1, SHEARED, 1, "qform"),
        (1, SHEARED, 4, "qform"),
        (1, np.diag([0.0, 1.0, 2.0, 1.0]), 4, "qform"),
        (1, PLAIN + np.outer([0, 0, 1, 0], [0, 0, 0, 0.6]), 1, "sform"),
    ],
)
def test_forms_that_disagree_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, qcode: int, sform: np.ndarray, scode: int, taken: str
) -> None:
    path = _two_forms(tmp_path / "ct.nii.gz", PLAIN, qcode, sform, scode)
    volume = read_volume(path)
    assert np.allclose(volume.native.affine[:, [2, 1, 0, 3]], PLAIN if taken == "qform" else sform, atol=1e-5)
    if taken == "sform":
        assert np.allclose(volume.native.affine[:, [2, 1, 0, 3]], nibabel.load(path).affine)
    assert f"ct.nii.gz: its qform (code {qcode}) and its sform (code {scode}) place voxels up to" in caplog.text
    assert f"the {taken} is taken" in caplog.text
    assert [remark in caplog.text for remark in read_header(path).remarks] == [True]


@pytest.mark.parametrize(
    ("qcode", "sform", "scode"),
    [(1, PLAIN, 1), (1, PLAIN, 4), (0, MIRRORED, 2), (1, MIRRORED, 0), (1, PLAIN + 1e-4 * np.eye(4, k=3), 2)],
)
def test_forms_that_agree_or_stand_alone_are_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, qcode: int, sform: np.ndarray, scode: int
) -> None:
    path = _two_forms(tmp_path / "ct.nii", PLAIN, qcode, sform, scode)
    volume = read_volume(path)
    assert np.allclose(volume.native.affine[:, [2, 1, 0, 3]], sform if scode and not qcode else PLAIN, atol=1e-3)
    assert not caplog.text and not read_header(path).remarks


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_lengths_in_metres_are_refused(tmp_path: Path, size: float) -> None:
    affine = np.diag([size, size, 2 * size, 1.0])
    path = _two_forms(tmp_path / "ct.nii.gz", affine, 1, affine, 1, "meter")
    for read in (read_volume, read_header):
        with pytest.raises(VolumeError, match=r"ct\.nii\.gz: its lengths are in meter \(xyzt_units\).*write mm"):
            read(path)


def test_a_qform_that_is_no_rotation_is_refused(tmp_path: Path) -> None:
    path = _two_forms(tmp_path / "ct.nii", PLAIN, 1, PLAIN, 1)
    image = nibabel.load(path)
    image.header["quatern_b"], image.header["quatern_c"] = 2.0, 2.0
    path.write_bytes(image.header.binaryblock + path.read_bytes()[348:])
    with pytest.raises(VolumeError, match=r"ct\.nii: its qform is not a rotation \(.+\): repair its header"):
        read_volume(path)


# Bad input


def _nan(path: Path, ending: str) -> Path:
    array = phantom()[0].astype(np.float32)
    array[0, 0, :3] = np.nan, np.inf, -np.inf
    return write_image(array, path / f"nan{ending}")


def _cut(path: Path, ending: str) -> Path:
    whole = write_image(phantom()[0], path / f"cut{ending}")
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 9 // 10])
    return whole


def _file(path: Path, name: str, content: bytes) -> Path:
    (path / name).write_bytes(content)
    return path / name


def _four_axes(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6, 2), np.float32), np.eye(4)), path / "four.nii.gz")
    return path / "four.nii.gz"


def _vector(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5, 2), np.float32), isVector=True), str(path / "vector.mha"))
    return path / "vector.mha"


def _two_axes(path: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.float32)), str(path / "two.nii.gz"))
    return path / "two.nii.gz"


def _mha(path: Path, spacing: str, matrix: str) -> Path:
    header = (
        f"ObjectType = Image\nNDims = 3\nBinaryData = True\nTransformMatrix = {matrix}\nElementSpacing = {spacing}\n"
        "DimSize = 2 2 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    )
    return _file(path, "grid.mha", header.encode() + bytes(16))


def _two_series(path: Path) -> Path:
    write_dicom(path / "mixed", phantom()[0], "1.2.3.4")
    return write_dicom(path / "mixed", phantom()[0][:10], "1.2.3.5")


def _cut_slice(path: Path) -> Path:
    folder = write_dicom(path / "cut", phantom()[0])
    file = max(folder.iterdir())
    file.write_bytes(file.read_bytes()[:-700])
    return folder


def _folder(path: Path, name: str) -> Path:
    (path / name).mkdir()
    return path / name


def _notes(path: Path) -> Path:
    _file(_folder(path, "notes"), "notes.txt", b"no CT")
    return path / "notes"


def _promising_nrrd(path: Path) -> Path:
    sizes = "type: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: raw\nendian: little\n"
    return _file(path, "huge.nrrd", f"NRRD0004\n{sizes}\n".encode() + bytes(11_000))


BAD = {
    "huge nii": (
        lambda path: write_promise(path / "huge.nii", 30000),
        r"huge\.nii: its header promises 30000 x 30000 x",
    ),
    "huge gz": (lambda path: write_promise(path / "huge.nii.gz", 30000), r"huge\.nii\.gz: its header promises 30000 x"),
    "huge nrrd": (_promising_nrrd, r"huge\.nrrd: its header promises 30000 x 30000 x 30000 voxels; a volume has"),
    "more than a nii holds": (
        lambda path: write_promise(path / "large.nii", 1500),
        r"large\.nii cannot be read \(its header promises 6750000352 bytes, the file holds at most 11348\): it",
    ),
    "more than a gz can hold": (
        lambda path: write_promise(path / "large.nii.gz", 1500),
        r"large\.nii\.gz cannot be read \(its header promises 6750000352 bytes, the file holds at most \d+\): it",
    ),
    "missing": (lambda path: path / "gone.nii.gz", r"gone\.nii\.gz does not exist: check the path"),
    "missing folder": (lambda path: path / "gone", "gone does not exist"),
    "no image": (lambda path: _file(path, "bad.nii.gz", b"hello"), r"bad\.nii\.gz cannot be read \(.+\): check"),
    "cut gz": (lambda path: _cut(path, ".nii.gz"), r"cut\.nii\.gz cannot be read \(.*truncated"),
    "cut nii": (lambda path: _cut(path, ".nii"), r"cut\.nii cannot be read \(.*truncated"),
    "cut nrrd": (lambda path: _cut(path, ".nrrd"), r"cut\.nrrd cannot be read"),
    "cut mha": (lambda path: _cut(path, ".mha"), r"cut\.mha cannot be read"),
    "unknown ending": (lambda path: _file(path, "ct.jpg", b""), r"ct\.jpg: not one of \.nii.*convert it"),
    "npy": (lambda path: _file(path, "ct.npy", b""), r"ct\.npy: \.npy carries no spacing or orientation"),
    "NaN nrrd": (lambda path: _nan(path, ".nrrd"), r"nan\.nrrd: 3 of 17472 voxels are NaN or infinite"),
    "NaN": (lambda path: _nan(path, ".nii.gz"), r"nan\.nii\.gz: 3 of 17472 voxels are NaN or infinite"),
    "constant": (
        lambda path: write_image(np.full((3, 4, 5), 7, np.int16), path / "c.nii"),
        r"c\.nii: every voxel is 7",
    ),
    "2-D": (_two_axes, r"two\.nii\.gz: a 2-D image"),
    "one slice": (lambda path: write_image(_array(shape=(1, 4, 5)), path / "one.nii"), r"one\.nii: a 2-D image"),
    "4-D": (_four_axes, r"four\.nii\.gz: a 4-D image"),
    "vector": (_vector, r"vector\.mha: 2 values per voxel"),
    "no spacing": (lambda path: _mha(path, "0 1 1", "1 0 0 0 1 0 0 0 1"), r"grid\.mha cannot be read \(.*spacing"),
    "metres": (
        lambda path: _mha(path, "0.001 0.001 0.002", "1 0 0 0 1 0 0 0 1"),
        r"grid\.mha: spacing 0\.001 x",
    ),
    "2 m": (lambda path: _mha(path, "1 1 2000", "1 0 0 0 1 0 0 0 1"), r"grid\.mha: spacing 1 x 1 x 2000 mm"),
    "singular": (lambda path: _mha(path, "1 1 1", "1 0 0 1 0 0 0 0 1"), r"grid\.mha cannot be read \(.*determinant"),
    "empty folder": (lambda path: _folder(path, "empty"), "empty is empty: give a folder with the slices"),
    "no DICOM": (_notes, "notes holds no DICOM series"),
    "two series": (_two_series, r"mixed holds 2 series: 1\.2\.3\.4 \(24 slices\), 1\.2\.3\.5 \(10 slices\)"),
    "cut slice": (_cut_slice, r"cut: 1\.2\.3\.4_023\.dcm is damaged or not a slice"),
    "missing slice": (
        lambda path: write_dicom(path / "holed", phantom()[0], skip=(7,)),
        r"holed: slices 1\.2\.3\.4_006\.dcm and 1\.2\.3\.4_008\.dcm lie 6\.000 mm apart, the others 3\.000 mm",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_hash_of_a_source_follows_its_bytes(tmp_path: Path) -> None:
    hu, _ = phantom()
    first, second = write_dicom(tmp_path / "a", hu), write_dicom(tmp_path / "b", hu)
    assert source_sha256(first) == source_sha256(first)
    file = next(iter(second.iterdir()))
    file.write_bytes(file.read_bytes() + b"\0")
    assert source_sha256(first) != source_sha256(second)


def test_the_real_thorax_is_aligned(shared: Path) -> None:
    volume = read_volume(shared / "ct" / "thorax_dicom")
    label_DHW = read_label(shared / "ct" / "thorax_seg.nii.gz", volume)
    liver = label_DHW == 5
    assert 50 < volume.array_DHW[liver].mean() < 140
    assert volume.array_DHW[liver].std() < 60
    by_array_index = volume.array_DHW[liver[:, ::-1]]
    assert by_array_index.std() > 100, "the label's y axis runs the other way: without its affine it misses the liver"
