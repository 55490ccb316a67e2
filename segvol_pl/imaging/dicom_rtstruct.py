"""A label map as a DICOM RTSTRUCT (RT structure set): contours in the slices of its CT. Needs the extra `dicom`.

1. `_polygons` traces a structure in a slice by contourpy, half-way between the voxels inside and those outside: of the
   voxels' centres, a polygon holds exactly those of the mask. Its corners are cut, so its area is smaller than that of
   the voxels by half a voxel, whatever its size. A hole is joined to its outer contour by a channel without width
   (`_joined`, the keyhole of DICOM PS3.3 C.8.8.6.3).
2. `_Placement` brings points into millimetres by the position and orientation of the slice itself.
3. `write_dicom_rtstruct` makes each category that was found one ROI, whose number is its value in the label map.

Why keyholes: readers combine several contours of a slice by "inside any" or by "inside an odd number of them", and many
refuse the type CLOSEDPLANAR_XOR. With keyholes the polygons of a slice do not overlap, and all readers agree.

Why our own code: no kept library writes contours from a mask. rt-utils (last release in 2023) traces through the
centres of the outermost voxels, so that readers lose them, and needs OpenCV. highdicom has no RTSTRUCT, but its
`SOPClass` gives the patient, the study, the series and the equipment.

Letters: see data/schema.py; P points of a polygon, 2 and 3 their column and row, or x, y, z in LPS millimetres.
"""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from scipy import ndimage

from segvol_pl import __version__
from segvol_pl.atomic import atomic_path
from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom import check_references, read_series
from segvol_pl.imaging.geometry import Volume, to_native

if TYPE_CHECKING:
    from pydicom import Dataset

KIND = "DICOM RTSTRUCT"
STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
"""Detached Study Management: retired, but the class by which structure sets refer to their study."""
DECIMALS = 4
"""Of a millimetre. A number in DICOM text has at most 16 characters."""
GOLDEN = 0.618034
"""Step around the colour wheel that keeps the colours of many structures apart."""


def check_dicom_rtstruct(image: Path) -> None:
    """Raise VolumeError as `check_references`."""
    check_references(image, KIND)


def write_dicom_rtstruct(label_DHW: np.ndarray, names: Sequence[str], volume: Volume, path: Path) -> None:
    """Write a label map as contours.

    Args:
        label_DHW: Label values, or a bool mask.
        names: Of the categories; the first belongs to value 1.
        volume: The CT. Its gantry may have been tilted.
        path: The file to write.

    Raises:
        VolumeError: As `check_dicom_rtstruct`, or the map is empty.
    """
    check_dicom_rtstruct(volume.path)
    label = to_native(label_DHW, volume).astype(np.uint16)
    boxes = ndimage.find_objects(label)
    found = [value for value, box in enumerate(boxes, start=1) if box is not None]
    if not found:
        raise VolumeError(f"{path}: nothing was found, and a {KIND} cannot be empty: write .nii.gz")
    placement = _Placement(volume)
    written = _empty_set(placement.slices)
    written.StructureSetROISequence = [_roi(value, names[value - 1], written.FrameOfReferenceUID) for value in found]
    written.ROIContourSequence = [_contours(label, value, boxes[value - 1], placement) for value in found]
    written.RTROIObservationsSequence = [_observation(value) for value in found]
    with atomic_path(path) as part:
        written.save_as(part)


# Polygons


def _polygons(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Trace a mask of (row, column), which may touch the border; yields polygons P2 without a repeated first point."""
    from contourpy import FillType, contour_generator

    # Voxels that touch at a corner alone belong to two polygons: contourpy takes the middle of the four as outside.
    generator = contour_generator(z=np.pad(mask, 1).astype(float), fill_type=FillType.OuterOffset)
    # For this fill_type: the points of each outer contour and its holes, and where each of these begins.
    parts = cast("tuple[list[np.ndarray], list[np.ndarray]]", generator.filled(0.5, 2.0))
    for points_P2, offsets in zip(*parts, strict=True):
        rings = [points_P2[start : end - 1] - 1 for start, end in itertools.pairwise(offsets)]
        yield _joined(rings[0], rings[1:])


def _joined(outer_P2: np.ndarray, holes: Sequence[np.ndarray]) -> np.ndarray:
    """Make one polygon of an outer contour and its holes.

    From the leftmost point of each hole, a channel leads left to the next contour. It passes the voxels'
    centres at a quarter of a voxel, so that a reader's rounding decides nothing.
    """
    # By their leftmost points: the contour that a channel leads to is a part of the polygon already.
    for hole_P2 in sorted(holes, key=lambda ring_P2: float(ring_P2[:, 0].min())):
        # The leftmost point lies between two voxels of one row, so this line meets no other point of a contour.
        line = hole_P2[hole_P2[:, 0].argmin(), 1] + 0.25
        starts, at_N = _crossings(hole_P2, line)
        first = int(at_N.argmin())
        ends, reached_N = _crossings(outer_P2, line)
        last = int(np.where(reached_N < at_N[first], reached_N, -np.inf).argmax())
        near, far = np.array([[at_N[first], line]]), np.array([[reached_N[last], line]])
        around_P2 = np.roll(hole_P2, -starts[first] - 1, axis=0)
        before, after = outer_P2[: ends[last] + 1], outer_P2[ends[last] + 1 :]
        outer_P2 = np.concatenate([before, far, near, around_P2, near, far, after])
    return outer_P2


def _crossings(ring_P2: np.ndarray, line: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a closed polygon crosses a row: the points from which its edges start, and the columns of the crossings."""
    next_P2 = np.roll(ring_P2, -1, axis=0)
    crossing = np.flatnonzero((ring_P2[:, 1] < line) != (next_P2[:, 1] < line))
    (x, y), (next_x, next_y) = ring_P2[crossing].T, next_P2[crossing].T
    return crossing, x + (line - y) / (next_y - y) * (next_x - x)


# Places


class _Placement:
    """The slices of a CT, and where the voxels of its native grid lie in them."""

    def __init__(self, volume: Volume) -> None:
        import pydicom

        series = read_series(volume.path)
        self.slices = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
        # The straight grid of a tilted CT has the planes of the slices, with other rows and columns.
        self._slice_from_native = np.linalg.solve(series.affine, volume.native.affine)

    def millimetres(self, number: int, points_P2: np.ndarray) -> np.ndarray:
        """Return the points of a slice of the native grid, P3 in LPS, by DICOM's equation of the image plane."""
        native_P4 = np.insert(points_P2[:, ::-1], [0, 2], [number, 1], axis=1)
        rows_columns_P2 = (native_P4 @ self._slice_from_native.T)[:, 1:3]
        source = self.slices[number]
        along_row, down_column = np.array(source.ImageOrientationPatient, float).reshape(2, 3)
        between_rows, between_columns = np.array(source.PixelSpacing, float)
        steps_23 = np.stack([between_rows * down_column, between_columns * along_row])
        points_P3: np.ndarray = np.array(source.ImagePositionPatient, float) + rows_columns_P2 @ steps_23
        return points_P3


# Parts of the object


def _empty_set(slices: Sequence[Dataset]) -> Dataset:
    """Return a structure set without structures, which refers to all slices."""
    import highdicom
    from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

    source, now = slices[0], datetime.now()
    made = highdicom.SOPClass(
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=highdicom.UID(),
        series_number=int(source.get("SeriesNumber") or 0) + 2000,
        sop_instance_uid=highdicom.UID(),
        sop_class_uid=RTStructureSetStorage,
        instance_number=1,
        modality="RTSTRUCT",
        # With explicit types, no contour could take more than 64 KB: some 2000 points.
        transfer_syntax_uid=ImplicitVRLittleEndian,
        manufacturer="segvol_pl",
        manufacturer_model_name="SegVol",
        software_versions=__version__,
        series_description="SegVol",
    )
    made.copy_patient_and_study_information(source)
    made.SpecificCharacterSet = "ISO_IR 192"  # names of patients and categories may have any letters
    made.OperatorsName = ""
    made.FrameOfReferenceUID = source.FrameOfReferenceUID
    made.PositionReferenceIndicator = source.get("PositionReferenceIndicator", "")
    made.StructureSetLabel = "SegVol"
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.ApprovalStatus = "UNAPPROVED"
    study = _dataset(
        ReferencedSOPClassUID=STUDY_CLASS,
        ReferencedSOPInstanceUID=source.StudyInstanceUID,
        RTReferencedSeriesSequence=[
            _dataset(
                SeriesInstanceUID=source.SeriesInstanceUID,
                ContourImageSequence=[_reference(each) for each in slices],
            )
        ],
    )
    made.ReferencedFrameOfReferenceSequence = [
        _dataset(FrameOfReferenceUID=source.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    ]
    return made


def _roi(value: int, name: str, frame: str) -> Dataset:
    return _dataset(
        ROINumber=value,
        ReferencedFrameOfReferenceUID=frame,
        ROIName=name[:64],
        ROIGenerationAlgorithm="AUTOMATIC",
    )


def _observation(value: int) -> Dataset:
    # Whether a structure is an organ, a target or something else is for the reader to say.
    return _dataset(ObservationNumber=value, ReferencedROINumber=value, RTROIInterpretedType="", ROIInterpreter="")


def _contours(label: np.ndarray, value: int, box: tuple[slice, ...], placement: _Placement) -> Dataset:
    """Return the contours of one value, slice by slice. box: what holds all its voxels."""
    contours: list[Dataset] = []
    slices, rows, columns = box
    for number in range(slices.start, slices.stop):
        for points_P2 in _polygons(label[number, rows, columns] == value):
            points_P3 = placement.millimetres(number, points_P2 + np.array([columns.start, rows.start]))
            contours.append(
                _dataset(
                    ContourNumber=len(contours) + 1,
                    ContourImageSequence=[_reference(placement.slices[number])],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points_P3),
                    ContourData=[f"{coordinate:.{DECIMALS}f}" for coordinate in points_P3.ravel().tolist()],
                )
            )
    return _dataset(
        ROIDisplayColor=[round(255 * part) for part in colorsys.hsv_to_rgb(value * GOLDEN % 1, 0.75, 0.95)],
        ReferencedROINumber=value,
        ContourSequence=contours,
    )


def _reference(source: Dataset) -> Dataset:
    return _dataset(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)


def _dataset(**attributes: object) -> Dataset:
    from pydicom import Dataset

    made = Dataset()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made
