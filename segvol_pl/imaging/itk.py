"""SimpleITK, imported when the first CT file is read or written, and what reading through it has in common.

Shards hold all that training and evaluation need: a cluster that receives packed data runs without SimpleITK.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from segvol_pl.errors import ConfigError, VolumeError

__all__ = ["simple_itk", "sitk"]


@functools.cache
def simple_itk() -> ModuleType:
    """Import SimpleITK. Raises ConfigError if that fails."""
    try:
        import SimpleITK
    except ImportError as error:
        raise ConfigError(
            f"SimpleITK, which reads and writes CT files, is missing ({error}): pip install SimpleITK, or pack the CTs "
            "on a machine that has it and use the shards"
        ) from error
    # ITK prints warnings to stderr about what `read.py` checks. A user gets one line per error.
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


class _AtFirstUse:
    def __getattr__(self, name: str) -> Any:
        return getattr(simple_itk(), name)


if TYPE_CHECKING:
    import SimpleITK as sitk
else:
    sitk = _AtFirstUse()

ItkHeader: TypeAlias = "sitk.Image | sitk.ImageFileReader"
"""Anything that has a size, a spacing, an origin and a direction."""


def open_header(path: Path, remedy: str, image_io: str = "") -> sitk.ImageFileReader:
    """Read the header of a file, not its voxels.

    Args:
        path: The file.
        remedy: What a user should do if the file cannot be read; it ends the error message.
        image_io: ITK's name of the format; by default ITK finds it out.

    Raises:
        VolumeError: The file cannot be read.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    if image_io:
        reader.SetImageIO(image_io)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise VolumeError(f"{path} cannot be read ({itk_reason(error)}): {remedy}") from error
    return reader


def check_scalar_3d(header: sitk.ImageFileReader, path: Path) -> None:
    """Raise VolumeError unless the file holds one 3-D image with one value per voxel."""
    if header.GetDimension() != 3:
        raise VolumeError(f"{path}: a {header.GetDimension()}-D image: give one 3-D volume (split a time series)")
    if header.GetNumberOfComponents() != 1:
        raise VolumeError(f"{path}: {header.GetNumberOfComponents()} values per voxel: give a scalar image")


def itk_reason(error: RuntimeError) -> str:
    """Return the last sentence of ITK's message, which has several lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "ERROR" in line] or lines[-1:]
    return telling[-1].partition("ERROR:")[2].strip() or telling[-1]
