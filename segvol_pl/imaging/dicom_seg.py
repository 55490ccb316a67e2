"""A label map as a DICOM Segmentation object that refers to the slices of its CT. Needs highdicom (extra `dicom`).

1. The CT must be a DICOM folder: a segmentation object copies patient, study and geometry from its slices.
2. Each category becomes one segment. Category names are not standard codes, so the coding scheme is a local one,
   "99SEGVOL".

Letters: see data/schema.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from segvol_pl import __version__
from segvol_pl.atomic import atomic_path
from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom import check_references, slice_files
from segvol_pl.imaging.geometry import Volume, to_native

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

SCHEME = "99SEGVOL"
"""A scheme that begins with 99 is a local one."""


def check_dicom_seg(image: Path) -> None:
    """Raise VolumeError as `check_references`, or if the gantry of the CT was tilted."""
    check_references(image, "DICOM SEG")
    slice_files(image)


def write_dicom_seg(label_DHW: np.ndarray, names: Sequence[str], volume: Volume, path: Path) -> None:
    """Write a label map as binary segments.

    Args:
        label_DHW: Label values, or a bool mask.
        names: Of the categories; the first belongs to value 1.
        volume: The CT.
        path: The file to write.

    Raises:
        VolumeError: As `check_dicom_seg`, or the map is empty.
    """
    check_dicom_seg(volume.path)
    import highdicom
    import pydicom

    sources = [pydicom.dcmread(file) for file in slice_files(volume.path)]
    for source in sources:
        # From the slices' positions: readers place the frames by this attribute, which may be missing or wrong.
        source.SpacingBetweenSlices = f"{np.linalg.norm(volume.native.affine[:3, 0]):.10g}"
    found = np.unique(label_DHW).astype(np.uint16)
    values = found[found > 0]
    if not values.size:
        raise VolumeError(f"{path}: nothing was found, and a DICOM SEG cannot be empty: write .nii.gz")
    # Segments are numbered without gaps.
    number_of = np.zeros(values[-1] + 1, np.uint16)
    number_of[values] = np.arange(1, len(values) + 1)
    written = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=number_of[to_native(label_DHW, volume).astype(np.uint16)],
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_segment(number, names[int(value) - 1]) for number, value in enumerate(values, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=int(sources[0].get("SeriesNumber") or 0) + 1000,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="segvol_pl",
        manufacturer_model_name="SegVol",
        software_versions=__version__,
        device_serial_number="0",
        series_description="SegVol",
    )
    with atomic_path(path) as part:
        written.save_as(part)


def _segment(number: int, name: str) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    # The value of a code has at most 16 characters; a name may have more.
    code = Code(hashlib.sha256(name.encode()).hexdigest()[:16], SCHEME, name[:64])
    return SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=code,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name="SegVol", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
