"""CT files in, masks out: geometry kept by the affine, never by array index.

1. `read_volume` reads NIfTI, NRRD, MHA/MHD or a DICOM folder and brings the voxels to canonical axes
   (D superior, H anterior, W right: indices grow that way) by flips and transposes alone.
2. `read_label` brings a label map onto a CT's grid through both affines.
3. `to_native` undoes the reorientation; `write_mask` writes a mask on the CT's own grid.

World coordinates are RAS millimetres. SimpleITK speaks LPS; the signs are changed here and nowhere else.
Affines are 4x4 float64 and map (d, h, w, 1), or native array indices, to RAS. Letters: see data/sample.py.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import statistics
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import SpatialImage
from nibabel.volumeutils import apply_read_scaling

from segvol_pl.data.whole import replacing

log = logging.getLogger(__name__)

# ITK warns on stderr of what is checked below, and would break the promise of one line an error.
sitk.ProcessObject.SetGlobalWarningDisplay(False)

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
GAP_TOLERANCE = 0.1
"""Share of the slice distance by which slices may be unevenly spaced (positions are rounded in DICOM)."""


Header = sitk.Image | sitk.ImageFileReader
"""Whatever knows size, spacing, origin and direction."""


class VolumeError(ValueError):
    """A CT or label file that cannot be used. The message names the file and the remedy."""


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


def read_header(path: str | Path) -> VolumeHeader:
    """The header of a CT file, or the headers of a DICOM folder's slices.

    Raises VolumeError as `read_volume` does, for what headers tell.
    """
    path = Path(path)
    shape, affine, dtype = _folder_header(path) if path.is_dir() else _file_header(path)
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
    )


def read_volume(path: str | Path) -> Volume:
    """The CT in a file or a DICOM folder, HU rounded and clipped to int16.

    Raises VolumeError for what is missing or unreadable, not one 3-D scalar image, without usable geometry,
    holds NaN or infinite voxels, or is constant; for a DICOM folder also where it holds several series or lacks slices.
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
    stored, affine = _read_stored(path)
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
        with replacing(path, ending) as part:
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


def _read_stored(path: Path) -> tuple[_Stored, np.ndarray]:
    """Voxels, and the affine from their indices, slowest axis first, to RAS."""
    stored, header = _read_folder(path) if path.is_dir() else _read_file(path)
    affine = _affine_of(header)
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


def _read_file(path: Path) -> tuple[_Stored, Header]:
    reader = _open_file(path)
    try:
        if _ending(path) in NIFTI:
            return _read_nifti(path, reader.GetSize()), reader
        image = reader.Execute()
        return _Stored(sitk.GetArrayFromImage(image)), image
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def _file_header(path: Path) -> tuple[tuple[int, ...], np.ndarray, str]:
    """Shape, slowest axis first, affine and type of the voxels."""
    reader = _open_file(path)
    return reader.GetSize()[::-1], _affine_of(reader), sitk.GetPixelIDValueAsString(reader.GetPixelID())


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
    return reader


def _unreadable(path: Path, error: RuntimeError) -> VolumeError:
    return VolumeError(f"{path} cannot be read ({_reason(error)}): check or convert it")


def _nifti_state(path: Path) -> tuple[bool, int]:
    """Whether a NIfTI states its place, and how many bytes it lacks, if it is not compressed."""
    try:
        image = cast(nibabel.Nifti1Image, nibabel.load(path))
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise VolumeError(f"{path} cannot be read ({' '.join(str(error).split())}): copy it again") from error
    header = image.header
    placed = bool(header["qform_code"] or header["sform_code"])
    promised = cast(ArrayProxy, image.dataobj).offset + int(np.prod(image.shape)) * header.get_data_dtype().itemsize
    return placed, max(0, promised - path.stat().st_size) if _ending(path) == ".nii" else 0


def _read_nifti(path: Path, size: tuple[int, ...]) -> _Stored:
    """The voxels of a NIfTI.

    Not through ITK, whose NIfTI reader gives a truncated file whatever its memory held, and 0 for NaN.
    """
    try:
        proxy = cast(ArrayProxy, cast(SpatialImage, nibabel.load(path)).dataobj)
        array = np.asanyarray(proxy.get_unscaled())
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        reason = " ".join(str(error).split())
        raise VolumeError(f"{path} cannot be read ({reason}): it is truncated or damaged, copy it again") from error
    return _Stored(array.reshape(size, order="F").T, proxy.slope, proxy.inter)


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


def _read_folder(folder: Path) -> tuple[_Stored, Header]:
    reader = sitk.ImageSeriesReader()
    names = _series_files(reader, folder)
    _check_slices(names, folder)
    reader.SetFileNames(names)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise VolumeError(f"{folder} cannot be read ({_reason(error)}): check its slices") from error
    _check_kind(image.GetDimension(), image.GetNumberOfComponentsPerPixel(), folder)
    return _Stored(sitk.GetArrayFromImage(image)), image


def slice_files(folder: Path) -> list[Path]:
    """The DICOM files of a CT's slices, in the order of the native grid's first axis. Raises VolumeError."""
    return [Path(name) for name in _series_files(sitk.ImageSeriesReader(), folder)]


def _folder_header(folder: Path) -> tuple[tuple[int, ...], np.ndarray, str]:
    """Shape, slowest axis first, affine and type of the voxels of a series, by its first and its last slice."""
    names = _series_files(sitk.ImageSeriesReader(), folder)
    _check_slices(names, folder)
    first, last = _slice_header(Path(names[0])), _slice_header(Path(names[-1]))
    affine, step = _affine_of(first), (_affine_of(last) - _affine_of(first))[:, 3] / (len(names) - 1)
    affine[:, 0] = step
    width, height = first.GetSize()[:2]
    return (len(names), height, width), affine, sitk.GetPixelIDValueAsString(first.GetPixelID())


def _series_files(reader: sitk.ImageSeriesReader, folder: Path) -> tuple[str, ...]:
    """The slices of the one series in the folder, in spatial order."""
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


def _check_slices(names: tuple[str, ...], folder: Path) -> None:
    """Raises VolumeError where neighbouring slices are not evenly spaced: one is missing, or there twice."""
    places = sorted((_slice_position(Path(name)), Path(name).name) for name in names)
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(places)]
    if not gaps:
        raise VolumeError(f"{folder}: a 2-D image, one slice: give a volume of several slices")
    step = statistics.median_low(gaps)
    for gap, (before, after) in zip(gaps, itertools.pairwise(places), strict=True):
        if abs(gap - step) > GAP_TOLERANCE * step or gap <= 0:
            raise VolumeError(
                f"{folder}: slices {before[1]} and {after[1]} lie {gap:.3f} mm apart, the others {step:.3f} mm: "
                "a slice is missing or there twice, complete the series"
            )


def _slice_position(path: Path) -> float:
    """mm along the normal of the slice."""
    reader = _slice_header(path)
    origin, direction = np.array(reader.GetOrigin()), np.array(reader.GetDirection())
    if origin.size != 3:
        raise VolumeError(f"{path} says not where its slice lies: export the series again")
    return float(origin @ direction.reshape(3, 3)[:, 2])


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
    grid = _to_sitk(np.zeros(like.array_DHW.shape, np.uint8), like.affine)
    image = _to_sitk(label_DHW, affine)
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0))


def _cover(shape: tuple[int, ...], affine: np.ndarray, like: Volume) -> float:
    """Share of the CT's extent that lies within the label map's, over a lattice of 17 points an axis."""
    places_4N = np.linalg.solve(affine, like.affine @ _lattice(like.array_DHW.shape, 17))
    limits = np.array(shape)[:, None] - 0.5
    inside_N = ((places_4N[:3] >= -0.5) & (places_4N[:3] <= limits)).all(axis=0)
    return float(inside_N.mean())
