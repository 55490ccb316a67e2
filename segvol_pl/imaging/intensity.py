"""From Hounsfield units to [0, 1]: `intensity_of` measures a CT once, `normalise` maps its voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from segvol_pl.errors import SampleError
from segvol_pl.imaging.box import Box, box_of


@dataclass(frozen=True)
class Intensity:
    """HU statistics of a CT before the crop to the body.

    `low` and `high` are the 0.05 and 99.95 percentiles of the foreground, the voxels above the volume's mean. The
    published foreground normalisation ("ForegroundNorm") clips to them.
    """

    mean: float
    low: float
    high: float
    minimum: int
    maximum: int


FOREGROUND_PERCENTILES = (0.05, 99.95)


def intensity_of(hu_DHW: np.ndarray) -> Intensity:
    """Measure a CT before it is cropped. Raises SampleError for a constant volume."""
    minimum, maximum = int(hu_DHW.min()), int(hu_DHW.max())
    if minimum == maximum:
        raise SampleError(f"the volume is constant ({minimum} HU everywhere): it holds no image")
    mean = float(hu_DHW.mean(dtype=np.float64))
    low, high = np.percentile(hu_DHW[hu_DHW > mean], FOREGROUND_PERCENTILES)
    if low >= high:
        low, high = float(minimum), float(maximum)
    return Intensity(mean=mean, low=float(low), high=float(high), minimum=minimum, maximum=maximum)


def intensity_of_normalised(image_DHW: np.ndarray, highest: float) -> Intensity:
    """The statistics by which `normalise` maps 0 to 0 and `highest` to 1: for an image that is no CT in HU any more."""
    minimum, maximum = int(image_DHW.min()), int(image_DHW.max())
    return Intensity(float(image_DHW.mean(dtype=np.float64)), 0.0, highest, minimum, maximum)


def normalise(hu_DHW: np.ndarray, intensity: Intensity) -> np.ndarray:
    """Clip HU to the foreground's percentiles and scale them to float32 in [0, 1].

    The published code has a z-score between the two steps; the scaling cancels it, so it is left out.
    """
    image_DHW = (hu_DHW.astype(np.float32) - intensity.low) / (intensity.high - intensity.low)
    return np.clip(image_DHW, 0.0, 1.0, out=image_DHW)


class Normalised:
    """A CT that is normalised when a part of it is read: in memory it stays int16."""

    dtype = np.dtype(np.float32)

    def __init__(self, hu_DHW: np.ndarray, intensity: Intensity) -> None:
        self._hu_DHW, self._intensity, self.shape = hu_DHW, intensity, hu_DHW.shape

    def __getitem__(self, key: Any) -> np.ndarray:
        return normalise(self._hu_DHW[key], self._intensity)


def body_box(hu_DHW: np.ndarray, intensity: Intensity) -> Box:
    """Return the bounding box of the voxels above the foreground's lower percentile."""
    return box_of(hu_DHW > intensity.low)
