"""Masks as files, on the grid and in the orientation of their CT's file, or as DICOM objects that refer to its slices.

1. `check_out` checks, before the work, that a file can be written.
2. `write_labels` writes the kind of file that the ending names: `write_mask`, `dicom_seg.py` or `dicom_rtstruct.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segvol_pl.atomic import atomic_path
from segvol_pl.config import DICOM_RTSTRUCT, DICOM_SEG, WRITABLE, mask_ending
from segvol_pl.errors import VolumeError
from segvol_pl.imaging.dicom_rtstruct import check_dicom_rtstruct, write_dicom_rtstruct
from segvol_pl.imaging.dicom_seg import check_dicom_seg, write_dicom_seg
from segvol_pl.imaging.geometry import Volume, to_itk_image, to_native
from segvol_pl.imaging.itk import itk_reason, sitk
from segvol_pl.imaging.read import ending_of

DICOM_CHECKS = {DICOM_SEG: check_dicom_seg, DICOM_RTSTRUCT: check_dicom_rtstruct}
"""By the endings of DICOM objects: what checks that one can refer to a CT."""


def check_out(path: Path, image: Path) -> None:
    """Raise VolumeError if the ending is unknown, the folder is missing, or a DICOM object cannot refer to the CT."""
    ending = mask_ending(path.name)
    if not ending:
        raise VolumeError(
            f"out: {path} must end in one of {', '.join(WRITABLE)}, {DICOM_SEG} for a DICOM SEG or {DICOM_RTSTRUCT} "
            "for a DICOM RTSTRUCT"
        )
    if not path.parent.is_dir():
        raise VolumeError(f"out: folder {path.parent} does not exist: create it first")
    if ending in DICOM_CHECKS:
        DICOM_CHECKS[ending](image)


def write_labels(label_DHW: np.ndarray, names: Sequence[str], volume: Volume, path: Path) -> None:
    """Write a label map, or a bool mask, as the kind of file that the ending names.

    Args:
        label_DHW: Label values, or a bool mask.
        names: Of the categories; the first belongs to value 1. Only DICOM objects hold them.
        volume: The CT.
        path: The file to write.

    Raises:
        VolumeError: As `write_mask`, `write_dicom_seg` and `write_dicom_rtstruct`.
    """
    ending = mask_ending(path.name)
    if ending == DICOM_SEG:
        write_dicom_seg(label_DHW, names, volume, path)
    elif ending == DICOM_RTSTRUCT:
        write_dicom_rtstruct(label_DHW, names, volume, path)
    else:
        write_mask(label_DHW, volume, path)


def write_mask(mask_DHW: np.ndarray, volume: Volume, path: str | Path) -> None:
    """Write a mask or label map on the grid of the CT's file. The file is complete or not there.

    Args:
        mask_DHW: bool or whole numbers, of the CT's shape. Stored as uint8, or as uint16 if a number exceeds 255.
        volume: The CT.
        path: The file to write.

    Raises:
        VolumeError: The ending is not in WRITABLE, the folder is missing, or the mask has another shape.
    """
    path = Path(path)
    ending = ending_of(path)
    if ending not in WRITABLE:
        raise VolumeError(f"{path}: a mask is written as one of {', '.join(WRITABLE)}: change the ending")
    if not path.parent.is_dir():
        raise VolumeError(f"{path}: there is no folder {path.parent}: make it first")
    kind = np.uint16 if mask_DHW.max() > np.iinfo(np.uint8).max else np.uint8
    image = to_itk_image(to_native(mask_DHW, volume).astype(kind), volume.native.affine)
    try:
        with atomic_path(path, ending) as part:
            sitk.WriteImage(image, str(part), useCompression=True)
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be written ({itk_reason(error)})") from error
