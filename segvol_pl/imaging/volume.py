"""CT files in, masks out: geometry kept by the affine, never by array index.

1. `read_volume` reads NIfTI, NRRD, MHA/MHD or a DICOM folder and brings the voxels to canonical axes
   (D superior, H anterior, W right: indices grow that way) by flips and transposes alone. Only the slices of a tilted
   gantry are resampled before, for no affine without shear has them.
2. `read_label` brings a label map onto a CT's grid through both affines.
3. `to_native` undoes the reorientation; `write_mask` writes a mask on the CT's own grid.

World coordinates are RAS millimetres. SimpleITK speaks LPS; the signs are changed here and nowhere else.
Affines are 4x4 float64 and map (d, h, w, 1), or native array indices, to RAS. Letters: see data/sample.py.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import statistics
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from segvol_pl.atomic import atomic_path
from segvol_pl.errors import VolumeError
from segvol_pl.imaging.itk import sitk

log = logging.getLogger(__name__)

READABLE = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
NIFTI = (".nii", ".nii.gz")
WRITABLE = (".nii", ".nii.gz", ".nrrd", ".mha")

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CANONICAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
"""Rows: the world axis (R, A, S) along which D, H, W grow."""

SAME_GRID = 1e-2
"""Voxels by which two grids may differ and still be the same one."""
MIN_COVER = 0.5
"""Share of the CT that a label map on another grid must cover; less is another patient's."""
FORMS_APART = 0.5
"""mm by which the qform and the sform of a NIfTI may place a voxel apart and still agree."""
SPACING = (0.01, 100.0)
"""mm between voxels beyond which a spacing is no CT's, but one in another unit."""
GAP_TOLERANCE = 0.1
"""Share of the slice distance by which slices may be unevenly spaced (positions are rounded in DICOM)."""
SAME_PLANE = 1e-4
"""mm of pixel spacing, and of a unit vector of orientation, by which the slices of a series may differ."""
UNIT = 1e-3
"""By which the vectors of an orientation may miss length 1 or a right angle, being rounded."""
OFF_LINE = 0.2
"""mm in plane by which a slice may lie beside the line of the others; at half a voxel structures would be displaced."""
MOST_TILT = 35.0
"""Degrees between the line of the slices and their normal. Gantries tilt by 30 at most: what leans further is wrong."""
MOST_VOXELS = 2**32
"""More than any CT has (2048 slices of 1024 x 1024 are half of it): a header that promises more lies."""
DEFLATED = 1032
"""Bytes that gzip packs into one at most (258 into 2 bits): a smaller file cannot hold what its header promises."""

TAGS = {
    "FrameOfReferenceUID": "0020|0052",
    "ImageOrientationPatient": "0020|0037",
    "ImagePositionPatient": "0020|0032",
    "Modality": "0008|0060",
    "PatientID": "0010|0020",
    "PhotometricInterpretation": "0028|0004",
    "PixelSpacing": "0028|0030",
}

Header: TypeAlias = "sitk.Image | sitk.ImageFileReader"
"""Whatever knows size, spacing, origin and direction."""


@dataclass(frozen=True, eq=False)
class NativeGrid:
    """The grid of the file, and how canonical axes came of it. Arrays have their slowest axis first, as SimpleITK's."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """Native array index -> RAS."""
    axes: tuple[int, int, int]
    """The native axes that became D, H, W."""
    flipped: tuple[bool, bool, bool]
    """Whether D, H, W run against their native axis."""


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT in canonical axes."""

    array_DHW: np.ndarray
    """int16 HU."""
    affine: np.ndarray
    """(d, h, w, 1) -> RAS."""
    native: NativeGrid
    path: Path

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along d, h, w."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)


@dataclass(frozen=True)
class VolumeHeader:
    """What a CT or label file says of itself, its voxels unread."""

    shape: tuple[int, int, int]
    """(D,H,W), canonical axes."""
    spacing: tuple[float, float, float]
    """mm along d, h, w."""
    orientation: str
    """Where the file's own x, y, z point: three of R L A P S I."""
    dtype: str
    placed: bool
    """Whether the file states an orientation. A NIfTI may state none; the reader then makes one up."""
    missing_bytes: int = 0
    """What an uncompressed NIfTI lacks of the size that its header promises."""
    remarks: tuple[str, ...] = ()
    """What `read_volume` warns of or, for a modality, refuses."""


def read_header(path: str | Path) -> VolumeHeader:
    """The header of a CT file, or the headers of a DICOM folder's slices.

    Raises VolumeError as `read_volume` does, for what headers tell.
    """
    path = Path(path)
    shape, affine, dtype, remarks = _folder_header(path) if path.is_dir() else _file_header(path)
    _check_geometry(shape, affine, path)
    native = _native_grid(shape, affine)
    depth, height, width = native.axes
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    placed, missing = _nifti_state(path) if _ending(path) in NIFTI else (True, 0)
    return VolumeHeader(
        shape=(native.shape[depth], native.shape[height], native.shape[width]),
        spacing=(float(steps[depth]), float(steps[height]), float(steps[width])),
        orientation="".join(nibabel.aff2axcodes(affine[:, [2, 1, 0, 3]])),
        dtype=dtype,
        placed=placed,
        missing_bytes=missing,
        remarks=remarks,
    )


def read_volume(path: str | Path) -> Volume:
    """The CT in a file or a DICOM folder, HU rounded and clipped to int16.

    Raises VolumeError for what is missing or unreadable, not one 3-D scalar image, without usable geometry, promises
    more voxels than its file can hold or than MOST_VOXELS, holds NaN or infinite voxels, or is constant; for a DICOM
    folder also where it holds several series, lacks slices, is of another modality, or its slices do not lie evenly
    along one line. Slices of a tilted gantry are resampled, linearly and in their planes, to a straight grid that holds
    all of them; that is then the file's grid.
    """
    path = Path(path)
    stored, affine = _read_stored(path)
    hu = _hounsfield(stored, path)
    native = _native_grid(hu.shape, affine)
    return Volume(_to_canonical(hu, native), _canonical_affine(native), native, path)


def read_label(path: str | Path, like: Volume) -> np.ndarray:
    """The label map (D,H,W) on the grid of the CT `like`, uint8 where that holds it, else uint16.

    A map on another grid that covers the CT is resampled by nearest neighbour. Raises VolumeError for a map that
    cannot be read, does not cover the CT, or holds anything but whole numbers from 0 to 65535.
    """
    path = Path(path)
    stored, affine = _read_stored(path, label=True)
    labels = _whole_numbers(stored.values(), path)
    native = _native_grid(labels.shape, affine)
    label_DHW, label_affine = _to_canonical(labels, native), _canonical_affine(native)
    if _same_grid(label_DHW.shape, label_affine, like):
        return np.ascontiguousarray(label_DHW)
    return _resample_label(label_DHW, label_affine, like, path)


def voxels_of(world_N3: np.ndarray, volume: Volume, lps: bool = False) -> np.ndarray:
    """Places in millimetres, RAS or LPS, as (d, h, w) of the CT, not rounded: a voxel's centre is a whole number."""
    world_4N = np.concatenate([np.asarray(world_N3, float), np.ones((len(world_N3), 1))], axis=1).T
    ras_4N = RAS_FROM_LPS @ world_4N if lps else world_4N
    return np.linalg.solve(volume.affine, ras_4N)[:3].T


def world_of(voxels_N3: np.ndarray, volume: Volume, lps: bool = False) -> np.ndarray:
    """The inverse of `voxels_of`: millimetres."""
    voxels_4N = np.concatenate([np.asarray(voxels_N3, float), np.ones((len(voxels_N3), 1))], axis=1).T
    ras_4N = volume.affine @ voxels_4N
    return (RAS_FROM_LPS @ ras_4N if lps else ras_4N)[:3].T


def to_native(mask_DHW: np.ndarray, volume: Volume) -> np.ndarray:
    """The mask on the file's own grid, indexed slowest axis first: `read_volume`'s reorientation undone."""
    if mask_DHW.shape != volume.array_DHW.shape:
        raise VolumeError(f"a mask of shape {mask_DHW.shape} does not fit {volume.path}, {volume.array_DHW.shape}")
    unflipped = np.flip(mask_DHW, _flips(volume.native))
    return np.ascontiguousarray(unflipped.transpose(np.argsort(volume.native.axes)))


def write_mask(mask_DHW: np.ndarray, volume: Volume, path: str | Path) -> None:
    """The mask, bool or a label map, on the grid and in the orientation of the CT's file.

    uint8, or uint16 where it holds numbers above 255.

    Written under a temporary name in the same folder, then renamed. Raises VolumeError for an ending that is none of
    WRITABLE, a missing folder, or a mask of another shape.
    """
    path = Path(path)
    ending = _ending(path)
    if ending not in WRITABLE:
        raise VolumeError(f"{path}: a mask is written as one of {', '.join(WRITABLE)}: change the ending")
    if not path.parent.is_dir():
        raise VolumeError(f"{path}: there is no folder {path.parent}: make it first")
    kind = np.uint16 if mask_DHW.max() > np.iinfo(np.uint8).max else np.uint8
    image = _to_sitk(to_native(mask_DHW, volume).astype(kind), volume.native.affine)
    try:
        with atomic_path(path, ending) as part:
            sitk.WriteImage(image, str(part), useCompression=True)
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be written ({_reason(error)})") from error


def files_of(path: Path) -> list[Path]:
    """The files that a CT consists of: itself, or those of its DICOM folder, sorted by name."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def is_dicom(path: Path) -> bool:
    """Whether a file is named or starts as DICOM files are."""
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def source_sha256(path: Path) -> str:
    """Hex sha256 of a file, or of a DICOM folder's files by name. Raises VolumeError if it is gone."""
    digest = hashlib.sha256()
    try:
        for file in files_of(path):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise VolumeError(f"{path} cannot be read ({error.strerror}): check the path") from error
    return digest.hexdigest()


# Reading


@dataclass(frozen=True, eq=False)
class _Stored:
    """Voxels as a file holds them, slowest axis first; their values are `slope` times that and `shift`."""

    array: np.ndarray
    slope: float = 1.0
    shift: float = 0.0

    def values(self, part: slice = slice(None)) -> np.ndarray:
        """Those of some slices. A scaled NIfTI becomes float64, four times what a CT is stored in."""
        return apply_read_scaling(self.array[part], self.slope, self.shift)


def _read_stored(path: Path, label: bool = False) -> tuple[_Stored, np.ndarray]:
    """Voxels, and the affine from their indices, slowest axis first, to RAS."""
    stored, affine = _read_folder(path, label) if path.is_dir() else _read_file(path)
    _check_geometry(stored.array.shape, affine, path)
    return stored, affine


def _hounsfield(stored: _Stored, path: Path) -> np.ndarray:
    """HU rounded and clipped to int16, slice by slice: all of a large CT in floating point would not fit."""
    limits, slices = np.iinfo(np.int16), range(len(stored.array))
    hu = np.empty(stored.array.shape, np.int16)
    broken, lowest, highest = 0, np.inf, -np.inf
    for place in slices:
        values = stored.values(slice(place, place + 1))[0]
        broken += _broken(values)
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        with np.errstate(invalid="ignore"):  # told below, with their number
            hu[place] = np.clip(np.rint(values), limits.min, limits.max)
    _check_unbroken(broken, hu.size, path)
    if lowest == highest:
        raise VolumeError(f"{path}: every voxel is {lowest}: it holds no image, leave it out")
    return hu


def _read_file(path: Path) -> tuple[_Stored, np.ndarray]:
    reader = _open_file(path)
    try:
        if _ending(path) in NIFTI:
            affine, remarks = _nifti_affine(path, reader)
            for remark in remarks:
                log.warning("%s: %s", path, remark)
            return _read_nifti(path, reader.GetSize()), affine
        image = reader.Execute()
        return _Stored(sitk.GetArrayFromImage(image)), _affine_of(image)
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def _file_header(path: Path) -> tuple[tuple[int, ...], np.ndarray, str, tuple[str, ...]]:
    """Shape, slowest axis first, affine and type of the voxels, remarks."""
    reader = _open_file(path)
    affine, remarks = _nifti_affine(path, reader) if _ending(path) in NIFTI else (_affine_of(reader), ())
    return reader.GetSize()[::-1], affine, sitk.GetPixelIDValueAsString(reader.GetPixelID()), remarks


def _open_file(path: Path) -> sitk.ImageFileReader:
    """The reader with its header read, which is one of a 3-D scalar image."""
    if not path.exists():
        raise VolumeError(f"{path} does not exist: check the path")
    if path.suffix == ".npy":
        raise VolumeError(
            f"{path}: .npy carries no spacing or orientation: save the CT as NIfTI, NRRD or MHA with both"
        )
    if _ending(path) not in READABLE:
        raise VolumeError(f"{path}: not one of {', '.join(READABLE)}, or a DICOM folder: convert it")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path, error) from error
    _check_kind(reader.GetDimension(), reader.GetNumberOfComponents(), path)
    _check_voxels(reader.GetSize(), path)
    return reader


def _unreadable(path: Path, error: RuntimeError) -> VolumeError:
    return VolumeError(f"{path} cannot be read ({_reason(error)}): check or convert it")


def _nifti_state(path: Path) -> tuple[bool, int]:
    """Whether a NIfTI states its place, and how many bytes it lacks, if it is not compressed."""
    image = _nifti_image(path)
    header = image.header
    placed = bool(header["qform_code"] or header["sform_code"])
    promised = cast(ArrayProxy, image.dataobj).offset + int(np.prod(image.shape)) * header.get_data_dtype().itemsize
    return placed, max(0, promised - path.stat().st_size) if _ending(path) == ".nii" else 0


def _nifti_image(path: Path) -> nibabel.Nifti1Image:
    """The header, voxels unread."""
    try:
        return cast(nibabel.Nifti1Image, nibabel.load(path))
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise VolumeError(f"{path} cannot be read ({' '.join(str(error).split())}): copy it again") from error


def _nifti_affine(path: Path, header: Header) -> tuple[np.ndarray, tuple[str, ...]]:
    """Array index, slowest axis first, -> RAS, and what is to be said of it.

    Where the file's two forms disagree, the sform is taken, as by nibabel, unless it is sheared. ITK's choice hangs on
    codes and on what the two have in common. Raises VolumeError for lengths that are not in mm.
    """
    image = _nifti_image(path)
    unit = image.header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise VolumeError(f"{path}: its lengths are in {unit} (xyzt_units), and readers differ over them: write mm")
    try:
        (qform, qcode), (sform, scode) = image.get_qform(coded=True), image.get_sform(coded=True)
    except ValueError as error:
        raise VolumeError(f"{path}: its qform is no rotation ({error}): mend its header") from error
    apart = 0.0 if qform is None or sform is None else _apart(qform, sform, image.shape)
    if apart <= FORMS_APART:
        return _affine_of(header), ()
    taken, name = (sform, "sform") if _right_angled(sform) else (qform, "qform")
    return taken[:, [2, 1, 0, 3]], (
        f"its qform (code {qcode}) and its sform (code {scode}) place voxels up to {apart:.1f} mm apart: the {name} is "
        "taken; look which is right, and write it into both",
    )


def _right_angled(affine: np.ndarray) -> bool:
    """Whether the steps along the axes are at right angles, and none is 0."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() == 0:
        return False
    cosines = affine[:3, :3] / lengths
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() <= UNIT)


def _apart(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """mm between the places of the outermost voxels by two affines."""
    corners_4N = _lattice(shape[:3], 2)
    return float(np.linalg.norm((one - other) @ corners_4N, axis=0).max())


def _read_nifti(path: Path, size: tuple[int, ...]) -> _Stored:
    """The voxels of a NIfTI.

    Not through ITK, whose NIfTI reader gives a truncated file whatever its memory held, and 0 for NaN.
    """
    try:
        proxy = cast(ArrayProxy, cast(SpatialImage, nibabel.load(path)).dataobj)
        _check_promise(proxy, path)
        array = np.asanyarray(proxy.get_unscaled())
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split())
        raise VolumeError(f"{path} cannot be read ({reason}): it is truncated or damaged, copy it again") from error
    return _Stored(array.reshape(size, order="F").T, proxy.slope, proxy.inter)


def _check_voxels(shape: tuple[int, ...], path: Path) -> None:
    """Before memory is asked for: an absurd header must not take that of the other cases."""
    if math.prod(shape) > MOST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise VolumeError(
            f"{path}: its header promises {sizes} voxels, a volume has {MOST_VOXELS} at most: mend or leave it out"
        )


def _check_promise(proxy: ArrayProxy, path: Path) -> None:
    """Raises EOFError for a NIfTI that cannot hold the voxels that its header promises, before it is read."""
    promised = int(proxy.offset) + math.prod(proxy.shape) * proxy.dtype.itemsize
    most = path.stat().st_size * (DEFLATED if _ending(path) == ".nii.gz" else 1)
    if promised > most:
        raise EOFError(f"its header promises {promised} bytes, the file holds {most} at most")


def _ending(path: Path) -> str:
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _reason(error: RuntimeError) -> str:
    """The last sentence of ITK's several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR" in line] or lines[-1:]
    return telling[-1].partition("ERROR:")[2].strip() or telling[-1]


def _check_kind(dimension: int, components: int, path: Path) -> None:
    if dimension != 3:
        raise VolumeError(f"{path}: a {dimension}-D image: give one 3-D volume (split a series over time)")
    if components != 1:
        raise VolumeError(f"{path}: {components} values a voxel: give a scalar image")


def _check_geometry(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> None:
    if min(shape) < 2:
        raise VolumeError(f"{path}: a 2-D image, {shape[::-1]} voxels: give a volume of several slices")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        spacing = tuple(np.linalg.norm(affine[:3, 2::-1], axis=0).round(4).tolist())
        raise VolumeError(f"{path}: its affine is singular (spacing {spacing} mm): mend its header")
    steps = np.linalg.norm(affine[:3, 2::-1], axis=0)
    if steps.min() < SPACING[0] or steps.max() > SPACING[1]:
        raise VolumeError(
            f"{path}: voxels {' x '.join(f'{step:.4g}' for step in steps)} mm apart: the spacing is in another unit or "
            "wrong, mend its header"
        )


def _broken(values: np.ndarray) -> int:
    """How many are NaN or infinite."""
    return int(np.count_nonzero(~np.isfinite(values))) if np.issubdtype(values.dtype, np.floating) else 0


def _check_unbroken(broken: int, size: int, path: Path) -> None:
    if broken:
        raise VolumeError(f"{path}: {broken} of {size} voxels are NaN or infinite: mend or leave it out")


def _whole_numbers(array: np.ndarray, path: Path) -> np.ndarray:
    _check_unbroken(_broken(array), array.size, path)
    if np.issubdtype(array.dtype, np.floating) and not np.array_equal(array, np.rint(array)):
        raise VolumeError(f"{path}: holds fractions such as {_first_fraction(array)}: a label map holds whole numbers")
    lowest, highest = array.min(), array.max()
    if lowest < 0 or highest > np.iinfo(np.uint16).max:
        raise VolumeError(f"{path}: values from {lowest} to {highest}: a label map holds 0 to 65535")
    return array.astype(np.uint8 if highest <= np.iinfo(np.uint8).max else np.uint16)


def _first_fraction(array: np.ndarray) -> float:
    return float(array[array != np.rint(array)][0])


# DICOM


@dataclass(frozen=True, eq=False)
class _Slice:
    """What the header of one DICOM file says of its slice; millimetres, LPS."""

    path: Path
    position: np.ndarray
    """Of the centre of the first voxel."""
    shape: tuple[int, int]
    """Rows, columns."""
    facts: dict[str, str]
    """What all slices of a scan state alike."""
    orientation: np.ndarray
    """Unit vectors along a row and down a column."""
    spacing: np.ndarray
    """Between rows, and between columns."""
    dtype: str


@dataclass(frozen=True, eq=False)
class _Series:
    """The slices of a DICOM folder, evenly along one line, which is their normal unless the gantry was tilted."""

    files: list[Path]
    """In spatial order."""
    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    affine: np.ndarray
    """(slice, row, column, 1) -> RAS; sheared where the gantry was tilted."""
    tilt: float
    """Degrees; 0 where the affine is orthogonal."""
    modality: str
    dtype: str

    @property
    def remarks(self) -> tuple[str, ...]:
        tilted = (
            f"its slices are tilted by {self.tilt:.1f} degrees: resampled to a straight grid, that of its masks too",
        )
        foreign = (f"its Modality is {self.modality or 'not stated'}, not CT: no Hounsfield units",)
        return (tilted if self.tilt else ()) + (foreign if self.modality != "CT" else ())


def _read_folder(folder: Path, label: bool) -> tuple[_Stored, np.ndarray]:
    series = _series_of(folder)
    if series.modality != "CT" and not label:
        raise VolumeError(f"{folder}: {series.remarks[-1]}: leave it out, or state CT in (0008,0060) if it is one")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in series.files])
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise VolumeError(f"{folder} cannot be read ({_reason(error)}): check its slices") from error
    if not series.tilt:
        return _Stored(array), series.affine
    log.warning("%s: %s", folder, series.remarks[0])
    shape, affine = _straight_grid(series.shape, series.affine)
    if label:
        return _Stored(_resample(array, series.affine, shape, affine)), affine
    # Around the slices is what lies lowest within them: air, or the scanner's own padding.
    voxels = array.astype(np.float32)
    return _Stored(_resample(voxels, series.affine, shape, affine, linear=True, outside=float(array.min()))), affine


def slice_files(folder: Path) -> list[Path]:
    """The DICOM files of a CT's slices, in the order of the native grid's first axis.

    Raises VolumeError, also for a tilted gantry, whose slices are none of the straight grid's.
    """
    series = _series_of(folder)
    if series.tilt:
        raise VolumeError(
            f"{folder}: its slices are tilted by {series.tilt:.1f} degrees, and masks lie on a straight grid, not in "
            "them: write .nii.gz"
        )
    return series.files


def _folder_header(folder: Path) -> tuple[tuple[int, ...], np.ndarray, str, tuple[str, ...]]:
    """Shape, slowest axis first, affine and type of the voxels, remarks."""
    series = _series_of(folder)
    shape, affine = _straight_grid(series.shape, series.affine)
    return shape, affine, series.dtype, series.remarks


def _series_of(folder: Path) -> _Series:
    """The series, by the headers of all its slices. Raises VolumeError where they are not those of one even stack."""
    slices = [_slice_of(Path(name)) for name in _series_files(folder)]
    _check_alike(slices)
    first = slices[0]
    _check_voxels((len(slices), *first.shape), folder)
    row, column = first.orientation
    normal = np.cross(row, column)
    slices.sort(key=lambda each: float(each.position @ normal))
    step = _step(slices, normal, folder)
    along = float(step @ normal)
    aside = step - along * normal
    if np.linalg.norm(aside) * (len(slices) - 1) <= OFF_LINE:
        aside = np.zeros(3)
    tilt = float(np.degrees(np.arctan2(np.linalg.norm(aside), along)))
    if tilt > MOST_TILT:
        raise VolumeError(
            f"{folder}: its slices are staggered by {tilt:.0f} degrees, further than a gantry tilts (at most "
            f"{MOST_TILT:.0f}): export the series again"
        )
    lps = np.eye(4)
    lps[:3] = np.stack(
        [along * normal + aside, first.spacing[0] * column, first.spacing[1] * row, slices[0].position], axis=1
    )
    return _Series(
        files=[each.path for each in slices],
        shape=(len(slices), *first.shape),
        affine=RAS_FROM_LPS @ lps,
        tilt=tilt,
        modality=first.facts["Modality"],
        dtype=first.dtype,
    )


def _series_files(folder: Path) -> tuple[str, ...]:
    """The files of the one series in the folder."""
    reader = sitk.ImageSeriesReader()
    series = {uid: reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))}
    if not files_of(folder):
        raise VolumeError(f"{folder} is empty: give a folder with the slices of one DICOM series")
    if not series:
        raise VolumeError(f"{folder} holds no DICOM series: give a CT file, or a folder with the slices of one series")
    if len(series) > 1:
        counts = ", ".join(f"{uid} ({len(names)} slices)" for uid, names in sorted(series.items()))
        raise VolumeError(f"{folder} holds {len(series)} series: {counts}: move each into a folder of its own")
    names = next(iter(series.values()))
    _check_all_listed(names, folder)
    return names


def _check_all_listed(names: tuple[str, ...], folder: Path) -> None:
    # GDCM leaves a damaged file out of the series without a word; as first or last slice it would leave no gap.
    listed = {Path(name).name for name in names} | {"DICOMDIR"}
    stray = [file.name for file in files_of(folder) if file.name not in listed and is_dicom(file)]
    if stray:
        raise VolumeError(f"{folder}: {stray[0]} is damaged or no slice of the series: replace it or move it away")


def _check_alike(slices: list[_Slice]) -> None:
    """Raises VolumeError that names a slice which is not in the planes, or not of the scan, of the others."""
    for name in slices[0].facts:
        usual = Counter(each.facts[name] for each in slices).most_common(1)[0][0]
        for odd in (each for each in slices if each.facts[name] != usual):
            raise _odd(odd, name)
    for name, values in (
        ("ImageOrientationPatient", np.array([each.orientation.ravel() for each in slices])),
        ("PixelSpacing", np.array([each.spacing for each in slices])),
    ):
        apart_N = np.abs(values - np.quantile(values, 0.5, axis=0, method="lower")).max(axis=1)
        if apart_N.max() > SAME_PLANE:
            raise _odd(slices[int(apart_N.argmax())], name)


def _odd(odd: _Slice, name: str) -> VolumeError:
    return VolumeError(f"{odd.path}: its {name} is not that of the other slices: move it away, or split the series")


def _step(slices: list[_Slice], normal: np.ndarray, folder: Path) -> np.ndarray:
    """From one slice to the next, mm, LPS.

    Raises VolumeError where one is missing or there twice, and where one lies beside the line of the others.
    """
    if len(slices) < 2:
        raise VolumeError(f"{folder}: a 2-D image, one slice: give a volume of several slices")
    places_N3 = np.array([each.position for each in slices])
    steps_N3 = np.diff(places_N3, axis=0)
    gaps_N = steps_N3 @ normal
    usual = statistics.median_low(gaps_N.tolist())
    asides_N3 = steps_N3 - gaps_N[:, None] * normal
    beside_N = np.linalg.norm(asides_N3 - np.median(asides_N3, axis=0), axis=1)
    for gap, beside, (before, after) in zip(gaps_N, beside_N, itertools.pairwise(slices), strict=True):
        if abs(gap - usual) > GAP_TOLERANCE * usual or gap <= 0:
            raise VolumeError(
                f"{folder}: slices {before.path.name} and {after.path.name} lie {gap:.3f} mm apart, the others "
                f"{usual:.3f} mm: a slice is missing or there twice, complete the series"
            )
        if beside > OFF_LINE:
            raise VolumeError(
                f"{folder}: slices {before.path.name} and {after.path.name} are shifted against each other by "
                f"{beside:.1f} mm in plane, unlike the others: move what is of another series away"
            )
    return _even_step(slices, places_N3, normal, folder)


def _even_step(slices: list[_Slice], places_N3: np.ndarray, normal: np.ndarray, folder: Path) -> np.ndarray:
    """Small deviations may add up: each slice is held against its place between the first and the last."""
    step = (places_N3[-1] - places_N3[0]) / (len(slices) - 1)
    off_N3 = places_N3 - places_N3[0] - np.arange(len(slices))[:, None] * step
    along_N = off_N3 @ normal
    beside_N = np.linalg.norm(off_N3 - along_N[:, None] * normal, axis=1)
    # Half a voxel along the line, OFF_LINE across it.
    excess_N = np.maximum(np.abs(along_N) / (0.5 * float(step @ normal)), beside_N / OFF_LINE)
    worst = int(excess_N.argmax())
    if excess_N[worst] > 1:
        raise VolumeError(
            f"{folder}: slice {slices[worst].path.name} lies {np.linalg.norm(off_N3[worst]):.2f} mm from its place in "
            "an even stack: the distance or the direction of the slices changes, split the series"
        )
    return step


def _slice_of(path: Path) -> _Slice:
    header = _slice_header(path)
    width, height, frames = header.GetSize()
    if frames > 1:
        raise VolumeError(
            f"{path}: a multi-frame DICOM file ({frames} frames): convert it to NIfTI, or to one file a slice"
        )
    _check_kind(header.GetDimension(), header.GetNumberOfComponents(), path)
    if _stated(header, "PhotometricInterpretation") == "MONOCHROME1":
        raise VolumeError(f"{path}: MONOCHROME1, its values run from bright to dark: export it as MONOCHROME2")
    orientation = _numbers(header, "ImageOrientationPatient", 6, path).reshape(2, 3)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > UNIT:
        raise VolumeError(
            f"{path}: its ImageOrientationPatient is no two unit vectors at right angles: mend its header"
        )
    spacing = _numbers(header, "PixelSpacing", 2, path)
    if spacing.min() <= 0:
        raise VolumeError(f"{path}: its PixelSpacing is {spacing.tolist()} mm: mend its header")
    return _Slice(
        path=path,
        position=_numbers(header, "ImagePositionPatient", 3, path),
        shape=(height, width),
        facts={
            "number of rows and columns": f"{height} x {width}",
            **{name: _stated(header, name) for name in ("FrameOfReferenceUID", "PatientID", "Modality")},
        },
        orientation=_at_right_angles(orientation),
        spacing=spacing,
        dtype=sitk.GetPixelIDValueAsString(header.GetPixelID()),
    )


def _at_right_angles(vectors: np.ndarray) -> np.ndarray:
    """Both of length 1, and the second turned to a right angle: in DICOM they are rounded."""
    row = vectors[0] / np.linalg.norm(vectors[0])
    column = vectors[1] - (vectors[1] @ row) * row
    return np.stack([row, column / np.linalg.norm(column)])


def _stated(header: sitk.ImageFileReader, name: str) -> str:
    """A DICOM attribute without its padding, empty where it is missing."""
    return header.GetMetaData(TAGS[name]).strip(" \0") if header.HasMetaDataKey(TAGS[name]) else ""


def _numbers(header: sitk.ImageFileReader, name: str, count: int, path: Path) -> np.ndarray:
    stated = _stated(header, name)
    try:
        numbers = np.array(stated.split("\\"), float)
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeError(f"{path}: its {name} is {stated or 'missing'}, not {count} numbers: export the series again")
    return numbers


def _slice_header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be read ({_reason(error)}): replace the slice") from error
    return reader


# Geometry


def _affine_of(image: Header) -> np.ndarray:
    """Array index, slowest axis first, -> RAS."""
    affine = np.eye(4)
    steps = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3] = steps[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return RAS_FROM_LPS @ affine


def _to_sitk(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """The inverse of `_affine_of`: an image whose array lies by `affine`."""
    lps = RAS_FROM_LPS @ affine
    steps = lps[:3, :3][:, ::-1]
    spacing = np.linalg.norm(steps, axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((steps / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def _straight_grid(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """The smallest grid along a sheared one's planes and their normal that holds it; an orthogonal one is its own."""
    planes_32 = affine[:3, 1:3]
    shear_2 = planes_32.T @ affine[:3, 0] / np.sum(planes_32**2, axis=0)
    ends_2 = shear_2 * (shape[0] - 1)
    before_2 = np.floor(np.minimum(ends_2, 0) + SAME_GRID).astype(int)
    rows, columns = (np.ceil(np.maximum(ends_2, 0) - SAME_GRID).astype(int) - before_2).tolist()
    straight = affine.copy()
    straight[:3, 0] -= planes_32 @ shear_2
    straight[:3, 3] += planes_32 @ before_2
    return (shape[0], shape[1] + rows, shape[2] + columns), straight


def _resample(
    array: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    onto: np.ndarray,
    linear: bool = False,
    outside: float = 0.0,
) -> np.ndarray:
    """The array, which lies by `affine`, on the grid of `shape` that lies by `onto`."""
    method = sitk.sitkLinear if linear else sitk.sitkNearestNeighbor
    grid = _to_sitk(np.zeros(shape, np.uint8), onto)
    image = sitk.Resample(_to_sitk(array, affine), grid, sitk.Transform(), method, outside)
    return sitk.GetArrayFromImage(image)


def _native_grid(shape: tuple[int, ...], affine: np.ndarray) -> NativeGrid:
    """How the array's axes are permuted and flipped to come closest to D, H, W; an oblique affine stays oblique."""
    cosines = CANONICAL @ (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    d, h, w = max(itertools.permutations(range(3)), key=lambda axes: sum(np.abs(cosines[range(3), axes])))
    flipped = cosines[range(3), (d, h, w)] < 0
    shape_3 = (shape[0], shape[1], shape[2])
    return NativeGrid(shape_3, affine, (d, h, w), (bool(flipped[0]), bool(flipped[1]), bool(flipped[2])))


def _to_canonical(array: np.ndarray, native: NativeGrid) -> np.ndarray:
    return np.ascontiguousarray(np.flip(array.transpose(native.axes), _flips(native)))


def _flips(native: NativeGrid) -> tuple[int, ...]:
    return tuple(axis for axis, flipped in enumerate(native.flipped) if flipped)


def _canonical_affine(native: NativeGrid) -> np.ndarray:
    """(d, h, w, 1) -> RAS."""
    to_native_index = np.zeros((4, 4))
    to_native_index[3, 3] = 1
    for canonical, (axis, flipped) in enumerate(zip(native.axes, native.flipped, strict=True)):
        to_native_index[axis, canonical] = -1 if flipped else 1
        to_native_index[axis, 3] = native.shape[axis] - 1 if flipped else 0
    return native.affine @ to_native_index


# Labels


def _same_grid(shape: tuple[int, ...], affine: np.ndarray, like: Volume) -> bool:
    if shape != like.array_DHW.shape:
        return False
    corners_4N = _lattice(shape, 2)
    moved_4N = np.linalg.solve(affine, like.affine @ corners_4N)
    return bool(np.abs(moved_4N - corners_4N).max() < SAME_GRID)


def _lattice(shape: tuple[int, ...], steps: int) -> np.ndarray:
    """Homogeneous voxel indices (4, N), `steps` along each axis from the first voxel to the last."""
    axes = [np.linspace(0, size - 1, steps) for size in shape]
    points_N3 = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return np.concatenate([points_N3, np.ones((len(points_N3), 1))], axis=1).T


def _resample_label(label_DHW: np.ndarray, affine: np.ndarray, like: Volume, path: Path) -> np.ndarray:
    cover = _cover(label_DHW.shape, affine, like)
    if cover < MIN_COVER:
        raise VolumeError(
            f"{path}: label on another grid that cannot be aligned: it covers {cover:.0%} of {like.path}: "
            "give that CT's own label map, with its affine"
        )
    log.warning(
        "%s: on another grid than %s, resampled by nearest neighbour (covers %.0f %%)", path, like.path, 100 * cover
    )
    return _resample(label_DHW, affine, like.array_DHW.shape, like.affine)


def _cover(shape: tuple[int, ...], affine: np.ndarray, like: Volume) -> float:
    """Share of the CT's extent that lies within the label map's, over a lattice of 17 points an axis."""
    places_4N = np.linalg.solve(affine, like.affine @ _lattice(like.array_DHW.shape, 17))
    limits = np.array(shape)[:, None] - 0.5
    inside_N = ((places_4N[:3] >= -0.5) & (places_4N[:3] <= limits)).all(axis=0)
    return float(inside_N.mean())
