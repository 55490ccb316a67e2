"""Small CT files for the tests: made, not mocked."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

if TYPE_CHECKING:
    import pydicom

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


def write_image(array: np.ndarray, path: Path, direction: np.ndarray | None = None) -> Path:
    """The array as a file of the path's format, with a direction as for `to_image`."""
    sitk.WriteImage(to_image(array, direction), str(path))
    return path


def write_case(folder: Path, name: str, seed: int = 0) -> tuple[Path, Path]:
    """`<name>_ct.nii.gz` and `<name>_seg.nii.gz` of a phantom."""
    folder.mkdir(parents=True, exist_ok=True)
    hu, label = phantom(seed)
    image, mask = folder / f"{name}_ct.nii.gz", folder / f"{name}_seg.nii.gz"
    sitk.WriteImage(to_image(hu), str(image))
    sitk.WriteImage(to_image(label), str(mask))
    return image, mask


def write_dicom(
    folder: Path,
    hu: np.ndarray,
    series: str = "1.2.3.4",
    skip: tuple[int, ...] = (),
    direction: np.ndarray | None = None,
    step: np.ndarray | None = None,
) -> Path:
    """A DICOM series with one file a slice, those of `skip` left out.

    `direction` as in `to_image`. `step` is the way from slice to slice in mm, LPS: along their normal, where none is
    given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = to_image(hu, direction)
    cosines = np.array(image.GetDirection()).reshape(3, 3)
    step = cosines[:, 2] * SPACING[2] if step is None else step
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in set(range(image.GetSize()[2])) - set(skip):
        piece = image[:, :, number]
        place = image.GetOrigin() + number * step
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{number + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{coordinate:.8g}" for coordinate in place),
            "0020|0052": "1.2.3.9",
            "0020|0037": "\\".join(f"{cosine:.8g}" for cosine in cosines[:, :2].T.ravel()),
            "0018|0050": str(SPACING[2]),
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}_{number:03d}.dcm"))
        writer.Execute(piece)
    return folder


def restate(folder: Path, numbers: Iterable[int], **attributes: object) -> Path:
    """Changes what some slices of a DICOM series state; None takes an attribute away."""
    pydicom = pytest.importorskip("pydicom")
    files = sorted(folder.iterdir())
    for file in (files[number] for number in numbers):
        dataset = pydicom.dcmread(file)
        for name, value in attributes.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)
        dataset.save_as(file)
    return folder


def write_enhanced(folder: Path, hu: np.ndarray) -> Path:
    """An Enhanced CT: all slices as the frames of one file, their places in sequences."""
    pydicom = pytest.importorskip("pydicom")
    folder.mkdir(parents=True, exist_ok=True)
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2.1", "1.2.3.4.1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.9"
    dataset.Modality, dataset.PatientID, dataset.NumberOfFrames = "CT", "", len(hu)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *hu.shape[1:], 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = [_dataset(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=SPACING[2])]
    shared.PlaneOrientationSequence = [_dataset(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.PixelValueTransformationSequence = [_dataset(RescaleIntercept=0, RescaleSlope=1, RescaleType="HU")]
    dataset.SharedFunctionalGroupsSequence = [shared]
    places = ([10.0, -20.0, 30.0 + number * SPACING[2]] for number in range(len(hu)))
    dataset.PerFrameFunctionalGroupsSequence = [
        _dataset(PlanePositionSequence=[_dataset(ImagePositionPatient=place)]) for place in places
    ]
    dataset.PixelData = hu.astype("<i2").tobytes()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return folder


def _dataset(**attributes: object) -> pydicom.Dataset:
    import pydicom

    dataset = pydicom.Dataset()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    return dataset


def cube_header(side: int) -> bytes:
    """The header of a NIfTI of `side` voxels along each axis, int16; 4 bytes stand between it and the voxels."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((side, side, side))
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return bytes(header.binaryblock)


def write_promise(path: Path, side: int) -> Path:
    """A NIfTI of 11 KB whose header promises `side` voxels along each axis, int16."""
    content = cube_header(side) + bytes(11_000)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
