"""A folder of DICOM slices as one array with an affine.

1. `_series_files` finds the files of the one series in a folder; `_slice_of` reads the header of each.
2. `read_series` checks that the slices are of one scan and lie evenly along one line, and gives the stack's affine.
   Where the gantry was tilted, that line is not the normal of the slices: the affine is sheared.
3. `read_folder` reads the voxels. A tilted stack is resampled to a straight grid: ITK has no sheared images.

Letters: N slices; 3 a point or direction in LPS millimetres.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.geometry import DIRECTION_TOLERANCE, RAS_FROM_LPS, check_voxel_count, resample, straight_grid
from segvol_pl.imaging.itk import check_scalar_3d, itk_reason, open_header, sitk

log = logging.getLogger(__name__)

GAP_TOLERANCE = 0.1
"""Share of the slice distance by which single distances may differ from it (positions are rounded in DICOM)."""
SAME_PLANE = 1e-4
"""How far the slices of a series may differ in pixel spacing (mm) and in the unit vectors of their orientation."""
OFF_LINE = 0.2
"""mm in plane that a slice may be away from the line of the others. At half a voxel, structures would be displaced."""
MOST_TILT = 35.0
"""Degrees between the line of the slices and their normal. Gantries tilt by at most 30: more than this is an error."""

REFERENCED = ("FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
"""What a DICOM object repeats of the slices that it refers to, and what old or hand-made files may lack."""
TAGS = {
    "FrameOfReferenceUID": "0020|0052",
    "ImageOrientationPatient": "0020|0037",
    "ImagePositionPatient": "0020|0032",
    "Modality": "0008|0060",
    "PatientID": "0010|0020",
    "PhotometricInterpretation": "0028|0004",
    "PixelSpacing": "0028|0030",
}


@dataclass(frozen=True, eq=False)
class _Slice:
    """The header of one DICOM file; millimetres, LPS."""

    path: Path
    position: np.ndarray
    """Centre of the first voxel."""
    shape: tuple[int, int]
    """Rows, columns."""
    shared: dict[str, str]
    """What must be equal in all slices of a scan."""
    orientation: np.ndarray
    """Unit vectors along a row and down a column."""
    spacing: np.ndarray
    """Between rows, and between columns."""
    dtype: str


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of a DICOM folder, evenly along one line: their normal, unless the gantry was tilted."""

    files: list[Path]
    """In spatial order."""
    shape: tuple[int, int, int]
    """Slices, rows, columns."""
    affine: np.ndarray
    """(slice, row, column, 1) -> RAS; sheared if the gantry was tilted."""
    tilt: float
    """Degrees; 0 if the affine is orthogonal."""
    modality: str
    dtype: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about the series."""
        tilted = (
            f"its slices are tilted by {self.tilt:.1f} degrees: the CT and its masks are resampled to a straight grid"
        )
        foreign = f"its Modality is {self.modality or 'not stated'}, not CT: no Hounsfield units"
        return ((tilted,) if self.tilt else ()) + ((foreign,) if self.modality != "CT" else ())


def read_folder(folder: Path, label: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels of a DICOM folder, and the affine from their indices (slowest axis first) to RAS.

    Args:
        folder: Holds the slices of one series.
        label: Whether the voxels are labels: then the nearest neighbour is taken, and any modality is allowed.

    Raises:
        VolumeError: The slices are not those of one even stack, cannot be read, or are not from a CT scanner.
    """
    series = read_series(folder)
    if series.modality != "CT" and not label:
        raise VolumeError(f"{folder}: {series.remarks[-1]}: leave it out, or if it is a CT, set (0008,0060) to CT")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in series.files])
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise VolumeError(f"{folder} cannot be read ({itk_reason(error)}): check its slices") from error
    if not series.tilt:
        return array, series.affine
    log.warning("%s: %s", folder, series.remarks[0])
    shape, affine = straight_grid(series.shape, series.affine)
    if label:
        return resample(array, series.affine, shape, affine), affine
    # The lowest value of the slices surrounds them: air, or the scanner's own padding.
    voxels, outside = array.astype(np.float32), float(array.min())
    return resample(voxels, series.affine, shape, affine, linear=True, outside=outside), affine


def slice_files(folder: Path) -> list[Path]:
    """Return the DICOM files of a CT's slices, in the order of the native grid's first axis.

    Raises VolumeError as `read_series`, and for a tilted gantry: its masks lie on a straight grid, not in the slices.
    """
    series = read_series(folder)
    if series.tilt:
        raise VolumeError(
            f"{folder}: its slices are tilted by {series.tilt:.1f} degrees; masks lie on a straight grid, not in the "
            "slices: write .nii.gz"
        )
    return series.files


def check_references(image: Path, kind: str) -> None:
    """Check that a DICOM object can refer to the slices of a CT.

    Args:
        image: The CT.
        kind: Of the object, for messages.

    Raises:
        VolumeError: highdicom is missing, the CT is not a DICOM folder, or its slices lack attributes.
    """
    if find_spec("highdicom") is None:
        raise VolumeError(f"out: a {kind} is written by highdicom, which is missing: pip install 'segvol_pl[dicom]'")
    if not image.is_dir():
        raise VolumeError(f"out: a {kind} refers to the slices of a DICOM folder, which {image} is not: write .nii.gz")
    import pydicom

    for file in read_series(image).files:
        stated = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(REFERENCED))
        if lacking := [name for name in REFERENCED if not stated.get(name)]:
            raise VolumeError(f"out: a {kind} needs {', '.join(lacking)} in the slices of {image}: write .nii.gz")


def files_of(path: Path) -> list[Path]:
    """Return the files of a CT: the file itself, or those of its DICOM folder, sorted by name."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def is_dicom(path: Path) -> bool:
    """Return whether a file is named or starts as DICOM files do."""
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


# A series


def read_series(folder: Path) -> Series:
    """Read the headers of all slices in a folder. Raises VolumeError if they are not those of one even stack."""
    slices = [_slice_of(Path(name)) for name in _series_files(folder)]
    _check_alike(slices)
    first = slices[0]
    check_voxel_count((len(slices), *first.shape), folder)
    row, column = first.orientation
    normal = np.cross(row, column)
    slices.sort(key=lambda each: float(each.position @ normal))
    step, tilt = _straightened(_step(slices, normal, folder), normal, len(slices))
    if tilt > MOST_TILT:
        raise VolumeError(
            f"{folder}: its slices are staggered by {tilt:.0f} degrees, but a gantry tilts by at most "
            f"{MOST_TILT:.0f}: export the series again"
        )
    lps = np.eye(4)
    lps[:3] = np.stack([step, first.spacing[0] * column, first.spacing[1] * row, slices[0].position], axis=1)
    return Series(
        files=[each.path for each in slices],
        shape=(len(slices), *first.shape),
        affine=RAS_FROM_LPS @ lps,
        tilt=tilt,
        modality=first.shared["Modality"],
        dtype=first.dtype,
    )


def _series_files(folder: Path) -> tuple[str, ...]:
    reader = sitk.ImageSeriesReader()
    series = {uid: reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))}
    if not files_of(folder):
        raise VolumeError(f"{folder} is empty: give a folder with the slices of one DICOM series")
    if not series:
        raise VolumeError(f"{folder} holds no DICOM series: give a CT file, or a folder with the slices of one series")
    if len(series) > 1:
        counts = ", ".join(f"{uid} ({len(names)} slices)" for uid, names in sorted(series.items()))
        raise VolumeError(f"{folder} holds {len(series)} series: {counts}: move each into a folder of its own")
    names: tuple[str, ...]
    (names,) = series.values()
    # GDCM leaves out a damaged file without a warning. If it is the first or last slice, there is not even a gap.
    expected = {Path(name).name for name in names} | {"DICOMDIR"}
    stray = [file.name for file in files_of(folder) if file.name not in expected and is_dicom(file)]
    if stray:
        raise VolumeError(f"{folder}: {stray[0]} is damaged or not a slice of the series: replace it or move it away")
    return names


def _check_alike(slices: list[_Slice]) -> None:
    """Raise VolumeError, naming the slice, if one is not parallel to the others or not of the same scan."""
    for name in slices[0].shared:
        usual = Counter(each.shared[name] for each in slices).most_common(1)[0][0]
        for odd in (each for each in slices if each.shared[name] != usual):
            raise _differs(odd, name)
    for name, values in (
        ("ImageOrientationPatient", np.array([each.orientation.ravel() for each in slices])),
        ("PixelSpacing", np.array([each.spacing for each in slices])),
    ):
        apart_N = np.abs(values - np.quantile(values, 0.5, axis=0, method="lower")).max(axis=1)
        if apart_N.max() > SAME_PLANE:
            raise _differs(slices[int(apart_N.argmax())], name)


def _differs(odd: _Slice, name: str) -> VolumeError:
    return VolumeError(
        f"{odd.path}: its {name} differs from that of the other slices: move it away, or split the series"
    )


def _step(slices: list[_Slice], normal: np.ndarray, folder: Path) -> np.ndarray:
    """Return the step from one slice to the next, mm in LPS.

    Raises VolumeError if a slice is missing, there twice, or away from the line of the others.
    """
    if len(slices) < 2:
        raise VolumeError(f"{folder}: a 2-D image, one slice: give a volume of several slices")
    positions_N3 = np.array([each.position for each in slices])
    steps_N3 = np.diff(positions_N3, axis=0)
    gaps_N = steps_N3 @ normal
    usual = statistics.median_low(gaps_N.tolist())
    asides_N3 = steps_N3 - gaps_N[:, None] * normal
    shifts_N = np.linalg.norm(asides_N3 - np.median(asides_N3, axis=0), axis=1)
    for gap, shift, (before, after) in zip(gaps_N, shifts_N, itertools.pairwise(slices), strict=True):
        if abs(gap - usual) > GAP_TOLERANCE * usual or gap <= 0:
            raise VolumeError(
                f"{folder}: slices {before.path.name} and {after.path.name} lie {gap:.3f} mm apart, the others "
                f"{usual:.3f} mm: a slice is missing or there twice, complete the series"
            )
        if shift > OFF_LINE:
            raise VolumeError(
                f"{folder}: slices {before.path.name} and {after.path.name} are shifted against each other by "
                f"{shift:.1f} mm in plane, unlike the others: move the slices of other series away"
            )
    return _even_step(slices, positions_N3, normal, folder)


def _even_step(slices: list[_Slice], positions_N3: np.ndarray, normal: np.ndarray, folder: Path) -> np.ndarray:
    """Compare each slice with its place between the first and the last, because small deviations may add up."""
    step: np.ndarray = (positions_N3[-1] - positions_N3[0]) / (len(slices) - 1)
    off_N3 = positions_N3 - positions_N3[0] - np.arange(len(slices))[:, None] * step
    along_N = off_N3 @ normal
    aside_N = np.linalg.norm(off_N3 - along_N[:, None] * normal, axis=1)
    # Half a voxel along the line, OFF_LINE across it.
    excess_N = np.maximum(np.abs(along_N) / (0.5 * float(step @ normal)), aside_N / OFF_LINE)
    worst = int(excess_N.argmax())
    if excess_N[worst] > 1:
        raise VolumeError(
            f"{folder}: slice {slices[worst].path.name} lies {np.linalg.norm(off_N3[worst]):.2f} mm from its place in "
            "an even stack: the distance or the direction of the slices changes, split the series"
        )
    return step


def _straightened(step: np.ndarray, normal: np.ndarray, slices: int) -> tuple[np.ndarray, float]:
    """Return the step and its tilt in degrees; what is within OFF_LINE over all slices counts as no tilt."""
    along = float(step @ normal)
    aside = step - along * normal
    if np.linalg.norm(aside) * (slices - 1) <= OFF_LINE:
        aside = np.zeros(3)
    return along * normal + aside, float(np.degrees(np.arctan2(np.linalg.norm(aside), along)))


# A slice


def _slice_of(path: Path) -> _Slice:
    header = open_header(path, "replace the slice", image_io="GDCMImageIO")
    width, height, frames = header.GetSize()
    if frames > 1:
        raise VolumeError(
            f"{path}: a multi-frame DICOM file ({frames} frames): convert it to NIfTI, or to one file per slice"
        )
    check_scalar_3d(header, path)
    if _attribute(header, "PhotometricInterpretation") == "MONOCHROME1":
        raise VolumeError(f"{path}: MONOCHROME1, low values are bright: export it as MONOCHROME2")
    orientation = _numbers(header, "ImageOrientationPatient", 6, path).reshape(2, 3)
    if np.abs(orientation @ orientation.T - np.eye(2)).max() > DIRECTION_TOLERANCE:
        raise VolumeError(
            f"{path}: its ImageOrientationPatient is not two unit vectors at right angles: repair its header"
        )
    spacing = _numbers(header, "PixelSpacing", 2, path)
    if spacing.min() <= 0:
        raise VolumeError(f"{path}: its PixelSpacing is {spacing.tolist()} mm: repair its header")
    return _Slice(
        path=path,
        position=_numbers(header, "ImagePositionPatient", 3, path),
        shape=(height, width),
        shared={
            "number of rows and columns": f"{height} x {width}",
            **{name: _attribute(header, name) for name in ("FrameOfReferenceUID", "PatientID", "Modality")},
        },
        orientation=_at_right_angles(orientation),
        spacing=spacing,
        dtype=sitk.GetPixelIDValueAsString(header.GetPixelID()),
    )


def _at_right_angles(vectors: np.ndarray) -> np.ndarray:
    """Scale both vectors to length 1 and turn the second to a right angle, because DICOM rounds them."""
    row = vectors[0] / np.linalg.norm(vectors[0])
    column = vectors[1] - (vectors[1] @ row) * row
    return np.stack([row, column / np.linalg.norm(column)])


def _attribute(header: sitk.ImageFileReader, name: str) -> str:
    """Return a DICOM attribute without its padding; empty if it is missing."""
    return header.GetMetaData(TAGS[name]).strip(" \0") if header.HasMetaDataKey(TAGS[name]) else ""


def _numbers(header: sitk.ImageFileReader, name: str, count: int, path: Path) -> np.ndarray:
    text = _attribute(header, name)
    try:
        numbers = np.array(text.split("\\"), float)
    except ValueError:
        numbers = np.empty(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise VolumeError(f"{path}: its {name} is {text or 'missing'}, not {count} numbers: export the series again")
    return numbers
