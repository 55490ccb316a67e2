"""Masks as files, on the grid and in the orientation of their CT's file. DICOM SEG: see `dicom_seg.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segvol_pl.atomic import atomic_path
from segvol_pl.config import WRITABLE
from segvol_pl.errors import VolumeError
from segvol_pl.imaging.geometry import Volume, to_itk_image, to_native
from segvol_pl.imaging.itk import itk_reason, sitk
from segvol_pl.imaging.read import ending_of


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
