"""From a CT file and a prompt to a mask on the CT's own grid.

1. `Predictor.from_checkpoint` loads the model once.
2. `Predictor.open` reads a CT, measures its intensity, crops it to the body and encodes it once.
3. `Session.segment` answers any number of prompts about it, each a zoom-out-zoom-in.
4. `Mask.save` writes on the grid of the file that the CT came from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.config import Precision, PredictConfig, ZoomConfig
from segvol_pl.data.prompts import INSIDE, Prompt
from segvol_pl.data.sample import Box, SampleError
from segvol_pl.data.transforms import body_box, box_slices, intensity_of, normalise
from segvol_pl.data.volume import WRITABLE, Volume, VolumeError, read_volume, to_native, write_mask
from segvol_pl.model.checkpoint import load_model
from segvol_pl.run.strategies import autocast, resolve_device
from segvol_pl.zoom import Promptable, Zoomer, binary, clip_box

log = logging.getLogger(__name__)


class PromptError(ValueError):
    """A prompt that does not fit the CT. The message names the prompt's part and the CT's shape."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A structure found in a CT.

    array_DHW: bool, on the CT's grid in canonical axes (superior, anterior, right). numpy takes a Mask as this array.
    roi: region that was zoomed into, in the CT's voxels; None where zooming out found nothing.
    """

    array_DHW: np.ndarray
    volume: Volume
    roi: Box | None

    @property
    def voxels(self) -> int:
        return int(np.count_nonzero(self.array_DHW))

    @property
    def millilitres(self) -> float:
        return self.voxels * float(np.prod(self.volume.spacing)) / 1000

    def native(self) -> np.ndarray:
        """The mask as bool array on the grid of the CT's file, indexed slowest axis first, as in SimpleITK."""
        return to_native(self.array_DHW, self.volume)

    def save(self, path: str | Path) -> None:
        """Write the mask (uint8, 0 and 1) on the grid of the CT's file. Raises VolumeError for an unknown ending."""
        write_mask(self.array_DHW, self.volume, path)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array_DHW, dtype=dtype, copy=copy)


class Predictor:
    """A loaded model. `seed` draws the points of zoom-in windows, afresh for every prompt."""

    def __init__(
        self,
        model: Promptable,
        zoom: ZoomConfig | None = None,
        precision: Precision = Precision.auto,
        seed: int = 0,
    ) -> None:
        self.model, self.zoom, self.precision, self.seed = model, zoom or ZoomConfig(), precision, seed
        self.device = next(model.parameters()).device

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        zoom: ZoomConfig | None = None,
        precision: Precision = Precision.auto,
        seed: int = 0,
    ) -> Predictor:
        """From a training checkpoint (.ckpt) or an exported model (.safetensors). Raises CheckpointError."""
        return cls(load_model(path, resolve_device(device)), zoom, precision, seed)

    def open(self, source: str | Path | Volume) -> Session:
        """Read a CT (NIfTI, NRRD, MHA, DICOM folder) and encode it once. Raises VolumeError or SampleError."""
        volume = source if isinstance(source, Volume) else read_volume(source)
        try:
            return Session(self, volume)
        except SampleError as error:
            raise SampleError(f"{volume.path}: {error}") from error

    def check(self, prompt: Prompt) -> None:
        """Raises UnknownCategory, with the nearest names, where the model does not know the prompt's text."""
        self.model.prompts([[prompt]])

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.precision)


class Session:
    """One CT before one model; prompts are in voxels of the CT in canonical axes (superior, anterior, right)."""

    def __init__(self, predictor: Predictor, volume: Volume) -> None:
        self.predictor, self.volume = predictor, volume
        intensity = intensity_of(volume.array_DHW)
        self.body = body_box(volume.array_DHW, intensity)
        image_DHW = normalise(volume.array_DHW[box_slices(self.body)], intensity)
        self.zoomer = Zoomer(predictor.model, image_DHW, predictor.zoom)
        with predictor.autocast():
            self.zoomer.encode_overview()

    def segment(self, prompt: Prompt) -> Mask:
        """The structure that the prompt means. Raises PromptError, or UnknownCategory with the nearest names."""
        self.predictor.check(prompt)
        local = into_crop(prompt, self.volume.array_DHW.shape, self.body)
        with self.predictor.autocast():
            result = self.zoomer.zoom(local, np.random.default_rng(self.predictor.seed))
        array_DHW = np.zeros(self.volume.array_DHW.shape, bool)
        array_DHW[box_slices(self.body)] = binary(result.final_DHW, self.predictor.zoom.threshold)
        return Mask(array_DHW, self.volume, self._in_ct(result.roi))

    def _in_ct(self, roi: Box | None) -> Box | None:
        if roi is None:
            return None
        d, h, w = self.body[:3]
        return roi[0] + d, roi[1] + h, roi[2] + w, roi[3] + d, roi[4] + h, roi[5] + w


def into_crop(prompt: Prompt, shape: Sequence[int], body: Box) -> Prompt:
    """A prompt in the CT's voxels as one in the body crop's: its box clipped, points in the air around left out.

    Raises PromptError where box or points lie outside the CT of `shape`, or where nothing of them lies in the crop.
    """
    extent = [high - low + 1 for low, high in zip(body[:3], body[3:], strict=True)]
    box = None if prompt.box is None else _box_into_crop(prompt.box, shape, body, extent)
    if prompt.points_N3 is None or prompt.labels_N is None:
        return replace(prompt, box=box)
    _check_points(prompt.points_N3, shape)
    local_N3, labels_N = prompt.points_N3 - np.array(body[:3]), np.asarray(prompt.labels_N)
    kept_N = ((local_N3 >= 0) & (local_N3 < extent)).all(axis=1)
    if not (labels_N[kept_N] == INSIDE).any():
        raise PromptError(f"points: none with label 1 lies inside the body {list(body)} of the CT {list(shape)}")
    return replace(prompt, points_N3=local_N3[kept_N], labels_N=labels_N[kept_N], box=box)


def _box_into_crop(box: Box, shape: Sequence[int], body: Box, extent: Sequence[int]) -> Box:
    if any(low < 0 or high >= size for low, high, size in zip(box[:3], box[3:], shape, strict=True)):
        raise PromptError(f"box {list(box)} reaches outside the CT, whose voxels (d h w) are 0 0 0 to {_last(shape)}")
    local = clip_box(box, body[:3], extent)
    if local is None:
        raise PromptError(f"box {list(box)} lies in the air: the body of this CT is {list(body)}")
    return local


def _check_points(points_N3: np.ndarray, shape: Sequence[int]) -> None:
    outside_N = ((points_N3 < 0) | (points_N3 >= np.array(shape))).any(axis=1)
    if outside_N.any():
        point = points_N3[outside_N][0].tolist()
        raise PromptError(f"point {point} lies outside the CT, whose voxels (d h w) are 0 0 0 to {_last(shape)}")


def _last(shape: Sequence[int]) -> str:
    return " ".join(str(size - 1) for size in shape)


def prompt_of(config: PredictConfig) -> Prompt:
    """The prompt that the configuration states. Raises PromptError for an inverted box or a wrong point label."""
    rows_N4 = None if config.points is None else np.array(config.points, np.int64).reshape(-1, 4)
    if rows_N4 is not None and not np.isin(rows_N4[:, 3], (0, 1)).all():
        raise PromptError("points: the label of each row is 1 (inside) or 0 (outside)")
    try:
        return Prompt(
            text=config.text,
            points_N3=None if rows_N4 is None else rows_N4[:, :3],
            labels_N=None if rows_N4 is None else rows_N4[:, 3],
            box=None if config.box is None else tuple(config.box),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise PromptError(str(error)) from error


def _check_out(path: Path) -> None:
    # What would fail at the end must fail before the work.
    if not path.name.lower().endswith(WRITABLE):
        raise VolumeError(f"out: {path} must end in one of {', '.join(WRITABLE)}")
    if not path.parent.is_dir():
        raise VolumeError(f"out: there is no folder {path.parent}: make it first")


def predict(config: PredictConfig) -> Mask:
    """Write the mask of `config.image` to `config.out` and say what was found.

    Raises PromptError, UnknownCategory, CheckpointError, VolumeError or SampleError, each in one line.
    """
    prompt = prompt_of(config)
    _check_out(Path(config.out))
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    predictor.check(prompt)
    start = time.perf_counter()
    session = predictor.open(config.image)
    opened = time.perf_counter()
    mask = session.segment(prompt)
    segmented = time.perf_counter()
    mask.save(config.out)
    if mask.roi is None:
        log.warning("%s: zooming out found nothing for this prompt; the mask is empty", config.image)
    log.info(
        "%s: %d voxels, %.1f ml; read and encoded in %.1f s, segmented in %.1f s",
        *(config.out, mask.voxels, mask.millilitres, opened - start, segmented - opened),
    )
    return mask
