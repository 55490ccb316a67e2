"""CT files and label maps into canonical axes: D superior, H anterior, W right.

1. `read_volume` reads NIfTI, NRRD, MHA/MHD or a DICOM folder (`dicom.py`) and brings the voxels to canonical axes by
   flips and transposes alone. Geometry comes from the affine, never from the order of the array's axes (`geometry.py`).
2. `read_label` brings a label map onto the grid of its CT, through both affines.
3. `read_header` reads all but the voxels.

NIfTI voxels are read by nibabel: ITK fills what a truncated file lacks with old memory, and replaces NaN with 0.
"""

from __future__ import annotations

import hashlib
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom import files_of, read_folder, read_series
from segvol_pl.imaging.geometry import (
    NativeGrid,
    Volume,
    affine_of,
    check_grid,
    check_voxel_count,
    covered_share,
    is_on_grid_of,
    lattice,
    resample,
    right_angled,
    straight_grid,
)
from segvol_pl.imaging.itk import ItkHeader, check_scalar_3d, itk_reason, open_header, sitk

log = logging.getLogger(__name__)

NIFTI = (".nii", ".nii.gz")
READABLE = (*NIFTI, ".nrrd", ".mha", ".mhd")

MIN_COVER = 0.5
"""Share of the CT that a label map on another grid must cover; one that covers less is another patient's."""
FORMS_APART = 0.5
"""mm between the places of a voxel by the qform and by the sform of a NIfTI, up to which the two agree."""
DEFLATED = 1032
"""gzip's highest ratio (258 bytes into 2 bits): a smaller file cannot hold what its header promises."""
DAMAGED = (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError)
"""What nibabel raises for a file that is no NIfTI, truncated or damaged."""


@dataclass(frozen=True)
class VolumeHeader:
    """All that a CT or label file states apart from its voxels."""

    shape: tuple[int, int, int]
    """(D,H,W), canonical axes."""
    spacing: tuple[float, float, float]
    """mm along d, h, w."""
    orientation: str
    """Where the file's own x, y, z point: three of R L A P S I."""
    dtype: str
    placed: bool
    """Whether the file states an orientation. A NIfTI may have none; the reader then assumes one."""
    missing_bytes: int = 0
    """How many bytes an uncompressed NIfTI is shorter than its header promises."""
    remarks: tuple[str, ...] = ()
    """What `read_volume` logs as a warning or, for a modality, refuses."""


@dataclass(frozen=True, eq=False)
class _Stored:
    """Voxels as a file holds them, slowest axis first. A value is `slope` times the stored number, plus `shift`."""

    array: np.ndarray
    slope: float = 1.0
    shift: float = 0.0

    def values(self, part: slice = slice(None)) -> np.ndarray:
        """The values of some slices. Those of a scaled NIfTI are float64, four times as large as a stored CT."""
        return apply_read_scaling(self.array[part], self.slope, self.shift)


def read_volume(path: str | Path) -> Volume:
    """Read a CT, HU rounded and clipped to int16.

    The slices of a tilted gantry are resampled, linearly and in their planes, to a straight grid that holds all of
    them. That grid is then the file's grid.

    Args:
        path: A CT file, or a folder with the slices of one DICOM series.

    Raises:
        VolumeError: The file is missing or damaged, holds more or less than one 3-D scalar image, has no usable
            geometry, promises more voxels than it can hold or than MOST_VOXELS, holds NaN or infinite voxels, or is
            constant; or a DICOM folder is not one complete, even CT series.
    """
    path = Path(path)
    stored, affine = _read_stored(path)
    hu = _hounsfield(stored, path)
    native = NativeGrid.of(hu.shape, affine)
    return Volume(native.to_canonical(hu), native.canonical_affine, native, path)


def read_label(path: str | Path, like: Volume) -> np.ndarray:
    """Read a label map (D,H,W) on the grid of its CT: uint8 if that holds all values, else uint16.

    A map on another grid that covers the CT is resampled by nearest neighbour.

    Args:
        path: A label file, or a DICOM folder.
        like: The CT.

    Raises:
        VolumeError: The map cannot be read, does not cover the CT, or holds anything but whole numbers from 0 to 65535.
    """
    path = Path(path)
    stored, affine = _read_stored(path, label=True)
    labels = _whole_numbers(stored.values(), path)
    native = NativeGrid.of(labels.shape, affine)
    label_DHW, label_affine = native.to_canonical(labels), native.canonical_affine
    if is_on_grid_of(label_DHW.shape, label_affine, like):
        return label_DHW
    cover = covered_share(label_DHW.shape, label_affine, like)
    if cover < MIN_COVER:
        raise VolumeError(
            f"{path}: label on another grid that cannot be aligned: it covers {cover:.0%} of {like.path}: "
            "give that CT's own label map, with its affine"
        )
    log.warning(
        "%s: not on the grid of %s: resampled by nearest neighbour (covers %.0f %%)", path, like.path, 100 * cover
    )
    return resample(label_DHW, label_affine, like.array_DHW.shape, like.affine)


def read_header(path: str | Path) -> VolumeHeader:
    """Read the header of a CT file, or the headers of a DICOM folder's slices.

    Raises VolumeError as `read_volume`, for faults that headers show.
    """
    path = Path(path)
    shape, affine, dtype, remarks = _folder_header(path) if path.is_dir() else _file_header(path)
    check_grid(shape, affine, path)
    native = NativeGrid.of(shape, affine)
    depth, height, width = native.axes
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    placed, missing = _nifti_state(path) if ending_of(path) in NIFTI else (True, 0)
    return VolumeHeader(
        shape=(native.shape[depth], native.shape[height], native.shape[width]),
        spacing=(float(steps[depth]), float(steps[height]), float(steps[width])),
        orientation="".join(nibabel.aff2axcodes(affine[:, [2, 1, 0, 3]])),
        dtype=dtype,
        placed=placed,
        missing_bytes=missing,
        remarks=remarks,
    )


def source_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, or of a DICOM folder's files by name. Raises VolumeError if it is gone."""
    digest = hashlib.sha256()
    try:
        for file in files_of(path):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise VolumeError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return digest.hexdigest()


def ending_of(path: Path) -> str:
    """Return the ending of a file's name in small letters, `.nii.gz` as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


# Files


def _read_stored(path: Path, label: bool = False) -> tuple[_Stored, np.ndarray]:
    """Read the voxels, and the affine from their indices (slowest axis first) to RAS."""
    if path.is_dir():
        array, affine = read_folder(path, label)
        stored = _Stored(array)
    else:
        stored, affine = _read_file(path)
    check_grid(stored.array.shape, affine, path)
    return stored, affine


def _read_file(path: Path) -> tuple[_Stored, np.ndarray]:
    reader = _open_file(path)
    if ending_of(path) in NIFTI:
        affine, remarks = _nifti_affine(path, reader)
        for remark in remarks:
            log.warning("%s: %s", path, remark)
        return _read_nifti(path, reader.GetSize()), affine
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be read ({itk_reason(error)}): check or convert it") from error
    return _Stored(sitk.GetArrayFromImage(image)), affine_of(image)


def _file_header(path: Path) -> tuple[tuple[int, ...], np.ndarray, str, tuple[str, ...]]:
    """Return shape (slowest axis first), affine, type of the voxels, and remarks."""
    reader = _open_file(path)
    affine, remarks = _nifti_affine(path, reader) if ending_of(path) in NIFTI else (affine_of(reader), ())
    return reader.GetSize()[::-1], affine, sitk.GetPixelIDValueAsString(reader.GetPixelID()), remarks


def _folder_header(folder: Path) -> tuple[tuple[int, ...], np.ndarray, str, tuple[str, ...]]:
    """As `_file_header`, of a DICOM folder."""
    series = read_series(folder)
    shape, affine = straight_grid(series.shape, series.affine)
    return shape, affine, series.dtype, series.remarks


def _open_file(path: Path) -> sitk.ImageFileReader:
    """Return the reader of a 3-D scalar image, its header read."""
    if not path.exists():
        raise VolumeError(f"{path} does not exist: check the path")
    if path.suffix == ".npy":
        raise VolumeError(
            f"{path}: .npy carries no spacing or orientation: save the CT as NIfTI, NRRD or MHA with both"
        )
    if ending_of(path) not in READABLE:
        raise VolumeError(f"{path}: not one of {', '.join(READABLE)}, or a DICOM folder: convert it")
    reader = open_header(path, "check or convert it")
    check_scalar_3d(reader, path)
    check_voxel_count(reader.GetSize(), path)
    return reader


# NIfTI


def _nifti_image(path: Path) -> nibabel.Nifti1Image:
    """Return the image with its header, voxels unread."""
    try:
        return cast(nibabel.Nifti1Image, nibabel.load(path))
    except DAMAGED as error:
        raise VolumeError(f"{path} cannot be read ({' '.join(str(error).split())}): copy it again") from error


def _nifti_state(path: Path) -> tuple[bool, int]:
    """Return whether a NIfTI states an orientation, and how many bytes it is too short, if it is not compressed."""
    image = _nifti_image(path)
    header = image.header
    placed = bool(header["qform_code"] or header["sform_code"])
    promised = cast(ArrayProxy, image.dataobj).offset + int(np.prod(image.shape)) * header.get_data_dtype().itemsize
    return placed, max(0, promised - path.stat().st_size) if ending_of(path) == ".nii" else 0


def _nifti_affine(path: Path, header: ItkHeader) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return native array index -> RAS, and remarks.

    If qform and sform disagree, the sform is taken, as nibabel does, unless it is sheared. ITK's choice depends on
    their codes and on what the two have in common. Raises VolumeError for lengths that are not in mm.
    """
    image = _nifti_image(path)
    unit = image.header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise VolumeError(f"{path}: its lengths are in {unit} (xyzt_units), which readers treat differently: write mm")
    try:
        (qform, qcode), (sform, scode) = image.get_qform(coded=True), image.get_sform(coded=True)
    except ValueError as error:
        raise VolumeError(f"{path}: its qform is not a rotation ({error}): repair its header") from error
    if qform is None or sform is None:
        return affine_of(header), ()
    apart = float(np.linalg.norm((qform - sform) @ lattice(image.shape[:3], 2), axis=0).max())
    if apart <= FORMS_APART:
        return affine_of(header), ()
    taken, name = (sform, "sform") if right_angled(sform) else (qform, "qform")
    return taken[:, [2, 1, 0, 3]], (
        f"its qform (code {qcode}) and its sform (code {scode}) place voxels up to {apart:.1f} mm apart: the {name} is "
        "taken; check which one is right, and write it into both",
    )


def _read_nifti(path: Path, size: tuple[int, ...]) -> _Stored:
    try:
        proxy = cast(ArrayProxy, cast(SpatialImage, nibabel.load(path)).dataobj)
        promised = int(proxy.offset) + math.prod(proxy.shape) * proxy.dtype.itemsize
        most = path.stat().st_size * (DEFLATED if ending_of(path) == ".nii.gz" else 1)
        if promised > most:
            raise EOFError(f"its header promises {promised} bytes, the file holds at most {most}")
        array = np.asanyarray(proxy.get_unscaled())
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        raise VolumeError(f"{path} cannot be read ({reason}): it is truncated or damaged, copy it again") from error
    return _Stored(array.reshape(size, order="F").T, proxy.slope, proxy.inter)


# Values


def _hounsfield(stored: _Stored, path: Path) -> np.ndarray:
    """Round and clip to int16 slice by slice: all of a large CT in floating point would not fit in memory."""
    limits = np.iinfo(np.int16)
    hu = np.empty(stored.array.shape, np.int16)
    invalid, lowest, highest = 0, np.inf, -np.inf
    for place in range(len(stored.array)):
        values = stored.values(slice(place, place + 1))[0]
        invalid += _count_invalid(values)
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        with np.errstate(invalid="ignore"):  # reported below, with their number
            hu[place] = np.clip(np.rint(values), limits.min, limits.max)
    _check_finite(invalid, hu.size, path)
    if lowest == highest:
        raise VolumeError(f"{path}: every voxel is {lowest}: it holds no image, leave it out")
    return hu


def _whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    _check_finite(_count_invalid(array), array.size, path)
    if np.issubdtype(array.dtype, np.floating) and not np.array_equal(array, np.rint(array)):
        fraction = float(array[array != np.rint(array)][0])
        raise VolumeError(f"{path}: holds fractions such as {fraction}: a label map holds whole numbers")
    lowest, highest = array.min(), array.max()
    if lowest < 0 or highest > np.iinfo(np.uint16).max:
        raise VolumeError(f"{path}: values from {lowest} to {highest}: a label map holds 0 to 65535")
    return array.astype(np.uint8 if highest <= np.iinfo(np.uint8).max else np.uint16)


def _count_invalid(values: np.ndarray) -> int:
    """Count the values that are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(values))) if np.issubdtype(values.dtype, np.floating) else 0


def _check_finite(invalid: int, size: int, path: Path) -> None:
    if invalid:
        raise VolumeError(f"{path}: {invalid} of {size} voxels are NaN or infinite: repair it or leave it out")
