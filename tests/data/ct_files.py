"""Small CT files for the tests: made, not mocked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (24, 28, 26)
"""Slices, rows, columns, as SimpleITK holds them."""
SPACING = (1.5, 1.0, 3.0)
"""x, y, z, mm."""


def phantom(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """A noisy body with two organs in air: int16 HU and the label map (1 below in y, 2 above), slowest axis z."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    wobble = rng.uniform(-0.05, 0.05, size=3)
    body = x**2 + y**2 < 0.8
    lung = (x - wobble[0]) ** 2 + (y - 0.4) ** 2 + (z * 0.8) ** 2 < 0.1
    liver = (x - wobble[1]) ** 2 + (y + 0.4) ** 2 + (z * 0.8 - wobble[2]) ** 2 < 0.12
    hu = np.where(body, 20, -1000).astype(np.float64)
    hu[lung], hu[liver] = -800, 110
    hu += rng.normal(0, 5, size=shape)
    return hu.astype(np.int16), (lung * 2 + liver * 1).astype(np.uint8)


def to_image(array: np.ndarray, direction: np.ndarray | None = None) -> sitk.Image:
    """An image with a direction of cosines x, y, z in LPS (identity where none is given)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    return image


def write_case(folder: Path, name: str, seed: int = 0) -> tuple[Path, Path]:
    """`<name>_ct.nii.gz` and `<name>_seg.nii.gz` of a phantom."""
    folder.mkdir(parents=True, exist_ok=True)
    hu, label = phantom(seed)
    image, mask = folder / f"{name}_ct.nii.gz", folder / f"{name}_seg.nii.gz"
    sitk.WriteImage(to_image(hu), str(image))
    sitk.WriteImage(to_image(label), str(mask))
    return image, mask


def write_dicom(folder: Path, hu: np.ndarray, series: str = "1.2.3.4", skip: tuple[int, ...] = ()) -> Path:
    """A DICOM series with one file a slice, those of `skip` left out."""
    folder.mkdir(parents=True, exist_ok=True)
    image = to_image(hu)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in set(range(image.GetSize()[2])) - set(skip):
        piece = image[:, :, number]
        place = image.TransformIndexToPhysicalPoint((0, 0, number))
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{number + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(number),
            "0020|0032": "\\".join(str(coordinate) for coordinate in place),
            "0020|0052": "1.2.3.9",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": str(SPACING[2]),
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{number:03d}.dcm"))
        writer.Execute(piece)
    return folder
