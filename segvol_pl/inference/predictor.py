"""From a CT file and prompts to masks on the CT's own grid.

1. `Predictor.from_checkpoint` loads the model.
2. `Predictor.open` reads a CT, measures its intensity, crops it to the body and encodes it once;
   `Predictor.open_normalised` takes an image that is normalised already.
3. `Session.segment` segments by a prompt, with zoom-out-zoom-in, or refines a mask found before;
   `Session.segment_all` puts many categories into one label map, `Session.segment_prompts` structures by any prompts.
4. `Mask.save` and `LabelMap.save` write on the grid of the CT's file.

`predict` is the command.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segvol_pl.atomic import write_text
from segvol_pl.config import Overlaps, Precision, PredictConfig, TextConfig, ZoomConfig, mask_ending
from segvol_pl.device import autocast, own_device
from segvol_pl.errors import ConfigError, PromptError, SampleError, TextError, UnknownCategory
from segvol_pl.imaging.box import Box, box_or_none, box_slices, union_box, whole_box
from segvol_pl.imaging.geometry import Volume, to_native
from segvol_pl.imaging.intensity import Intensity, Normalised, body_box, intensity_of, intensity_of_normalised
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.imaging.write import check_out, write_labels
from segvol_pl.inference.prompt_coordinates import check_prompt, into_crop, prompt_of
from segvol_pl.inference.zoom import Progress, Promptable, Zoomer, ZoomRequest
from segvol_pl.inference.zoom_result import ZoomResult
from segvol_pl.model.checkpoint import load_model
from segvol_pl.model.text_encoder import TextBank

__all__ = ["LabelMap", "Mask", "Predictor", "PromptError", "Score", "Session", "into_crop", "predict", "prompt_of"]

log = logging.getLogger(__name__)

AIR_BELOW = -200
"""HU. Every CT holds air, in the lungs, the bowel or around the body; an MR has no values this low."""

LOG_PERIOD = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A structure found in a CT. numpy takes a Mask as its `array_DHW`.

    Args:
        array_DHW: bool, on the CT's grid in canonical axes (superior, anterior, right).
        volume: the CT.
        roi: region that was zoomed into, in the CT's voxels, inclusive; None if zooming out found nothing.
        prompt: the prompt, in the CT's voxels.
        probability: the model's mean probability over the mask, not calibrated; 0 for an empty mask.
    """

    array_DHW: np.ndarray
    volume: Volume
    roi: Box | None
    prompt: Prompt
    probability: float

    @property
    def voxels(self) -> int:
        """Number of voxels inside."""
        return int(np.count_nonzero(self.array_DHW))

    @property
    def millilitres(self) -> float:
        """Volume inside, by the CT's spacing."""
        return self.voxels * float(np.prod(self.volume.spacing)) / 1000

    def native(self) -> np.ndarray:
        """The mask on the grid of the CT's file: a bool array, slowest axis first, as in SimpleITK."""
        return to_native(self.array_DHW, self.volume)

    def save(self, path: str | Path) -> None:
        """Write the mask (uint8, 0 and 1) on the grid of the CT's file.

        As a DICOM SEG if the name ends in .dcm, as a DICOM RTSTRUCT if it ends in .rtstruct.dcm.

        Raises:
            VolumeError: the file name has an unknown ending.
        """
        write_labels(self.array_DHW, [self.prompt.text or "structure"], self.volume, Path(path))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array_DHW, dtype=dtype, copy=copy)


@dataclass(frozen=True)
class Score:
    """One category of a label map."""

    category: str
    value: int
    """In the label map."""
    voxels: int
    """In the label map."""
    millilitres: float
    found: int
    """Voxels of its own mask, before voxels were assigned to other categories."""
    probability: float
    """The model's mean probability over its own mask, not calibrated; 0 if nothing was found."""
    roi: Box | None
    """Region that was zoomed into, in the CT's voxels (canonical axes, inclusive); None if nothing was found."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Several categories found in a CT. numpy takes a LabelMap as its `array_DHW`.

    Args:
        array_DHW: uint8, or uint16 if there are more than 255 categories; 0 is background.
        volume: the CT.
        scores: one per category.
        overlaps: how voxels claimed by several categories were assigned.
    """

    array_DHW: np.ndarray
    volume: Volume
    scores: list[Score]
    overlaps: Overlaps

    def save(self, path: str | Path) -> Path:
        """Write the map on the grid of the CT's file, and a JSON file of names and scores next to it.

        Returns:
            The path of the JSON file.

        Raises:
            VolumeError: the file name has an unknown ending.
        """
        write_labels(self.array_DHW, [score.category for score in self.scores], self.volume, Path(path))
        return self.save_scores(path)

    def save_scores(self, path: str | Path) -> Path:
        """Write only the JSON file that belongs to the map `path`, and return its path."""
        scores_path = scores_file(Path(path))
        content = {
            "image": self.volume.path.name,
            "overlaps": self.overlaps.value,
            "categories": [asdict(score) for score in self.scores],
        }
        write_text(scores_path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return scores_path

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array_DHW, dtype=dtype, copy=copy)


def scores_file(path: Path) -> Path:
    """The JSON file of a label map: `organs.json` for `organs.nii.gz`."""
    return path.with_name(path.name[: len(path.name) - len(mask_ending(path.name))] + ".json")


class Predictor:
    """A loaded model, ready to segment CTs.

    Args:
        model: in eval mode.
        zoom: how to zoom; the defaults if None.
        precision: what to compute in.
        seed: draws the points in zoom-in windows. Every prompt starts from it, so results do not depend on the order.
    """

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
        """Load a training checkpoint (.ckpt) or an exported model (.safetensors).

        Args:
            path: the file.
            device: `auto`, `cpu`, `cuda` or `cuda:N`. On a node with several GPUs, `auto` and `cuda` choose by this
                process's number on the node, see `own_device`.
            zoom: how to zoom; the defaults if None.
            precision: what to compute in.
            seed: draws the points in zoom-in windows.

        Raises:
            CheckpointError: the file cannot be read or holds no model.
            ConfigError: there is no such device.
        """
        return cls(load_model(path, own_device(device)), zoom, precision, seed)

    def open(self, source: str | Path | Volume, progress: Progress | None = None) -> Session:
        """Read a CT and encode it once.

        Args:
            source: a NIfTI, NRRD or MHA file, a DICOM folder, or a volume that was read before.
            progress: called with the windows decoded so far and those to decode, for the current group of prompts.

        Raises:
            VolumeError: the file cannot be read.
            SampleError: it holds nothing to segment, such as air alone.
        """
        volume = source if isinstance(source, Volume) else read_volume(source)
        try:
            return Session(self, volume, progress)
        except SampleError as error:
            raise SampleError(f"{volume.path}: {error}") from error

    def open_normalised(
        self, image: Volume, highest: float, within: Sequence[Box] = (), progress: Progress | None = None
    ) -> Session:
        """Encode an image whose values are normalised already: 0 is the darkest, `highest` the brightest.

        It is cropped to the voxels above 0. Nothing is measured, and no warning says that it is no CT in HU.

        Args:
            image: see `geometry.unplaced_volume`.
            highest: the value that the model sees as 1.
            within: boxes that the crop must hold, such as those of the prompts.
            progress: as in `open`.
        """
        lit = box_or_none(image.array_DHW > 0) or whole_box(image.array_DHW.shape)
        body = union_box([lit, *within])
        return Session(self, image, progress, (intensity_of_normalised(image.array_DHW, highest), body))

    @property
    def categories(self) -> list[str]:
        """The categories that a text prompt may name, without synonyms.

        Raises UnknownCategory if the model has no text bank.
        """
        bank: TextBank | None = getattr(self.model, "bank", None)
        if bank is None or not bank.names:
            raise UnknownCategory("this model holds no text bank: import its weights with categories=FILE")
        return bank.names

    @property
    def synonyms(self) -> dict[str, str]:
        """Synonym -> category: what else a text prompt may name."""
        bank: TextBank | None = getattr(self.model, "bank", None)
        return {} if bank is None else bank.synonyms

    def check(self, prompt: Prompt) -> None:
        """Raise UnknownCategory, with the nearest names, if the model does not know the prompt's text.

        Raises ConfigError for landmarks that it does not have.
        """
        self.model.prompts([[prompt]])

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the model computes in the configured precision."""
        return autocast(self.device, self.precision)


class Session:
    """One CT and one model. Prompts are in voxels of the CT in canonical axes (superior, anterior, right).

    Args:
        predictor: the model.
        volume: the CT.
        progress: called as windows are decoded, see `Predictor.open`.
        measured: intensity and body crop; measured from the CT if None.
    """

    def __init__(
        self,
        predictor: Predictor,
        volume: Volume,
        progress: Progress | None = None,
        measured: tuple[Intensity, Box] | None = None,
    ) -> None:
        self.predictor, self.volume = predictor, volume
        intensity, self.body = measured or _measured(volume)
        image_DHW = Normalised(volume.array_DHW[box_slices(self.body)], intensity)
        self.zoomer = Zoomer(predictor.model, image_DHW, predictor.zoom, progress)
        with predictor.autocast():
            self.zoomer.encode_overview()

    def segment(self, prompt: Prompt, previous: Mask | np.ndarray | None = None, everywhere: bool = False) -> Mask:
        """Segment one structure, or refine a mask of it.

        To refine, the previous mask takes the place of the zoom-out: it decides which windows are decoded, and gives
        them points and boxes. The windows' logits replace it. A model with `mask_prompt` sees the mask itself; clicks
        then change the mask around them, and all else stays.

        Args:
            prompt: in the CT's voxels.
            previous: a mask to refine, bool on the CT's grid. The text, points and landmarks of a Mask's own prompt are
                used again. An empty mask is ignored.
            everywhere: let clicks change more than what is around them: for a prompt whose box or text is new.

        Raises:
            PromptError: the prompt does not fit the CT.
            UnknownCategory: the model does not know the text; the message lists the nearest names.
        """
        return next(self.segment_each([prompt])) if previous is None else self._refined(prompt, previous, everywhere)

    def segment_each(self, prompts: Sequence[Prompt]) -> Iterator[Mask]:
        """Segment several structures. A window that several prompts need is encoded once.

        Args:
            prompts: in the CT's voxels.

        Returns:
            An iterator over one mask per prompt, in their order.

        Raises:
            PromptError, UnknownCategory: as `segment`, when it is called.
        """
        return (self._mask(result, prompt) for prompt, result in self._results(prompts))

    def segment_all(
        self, categories: Sequence[str] | None = None, overlaps: Overlaps = Overlaps.probability
    ) -> LabelMap:
        """Segment many categories, by text alone, into one label map.

        Args:
            categories: the first gets value 1. None: all that the model knows.
            overlaps: how to assign voxels that several categories claim.

        Raises:
            UnknownCategory: the model does not know a category; the message lists the nearest names.
        """
        names = list(self.predictor.categories if categories is None else categories)
        return self.segment_prompts(
            {value: Prompt(text=name) for value, name in enumerate(names, start=1)}, overlaps=overlaps
        )

    def segment_prompts(
        self,
        prompts: Mapping[int, Prompt],
        previous_DHW: np.ndarray | None = None,
        overlaps: Overlaps = Overlaps.probability,
    ) -> LabelMap:
        """Segment many structures, each by a prompt of any kind, into one label map.

        Args:
            prompts: value in the label map, from 1 to 65535 -> prompt, in the CT's voxels.
            previous_DHW: a label map to refine, of the same values. Structures that it does not hold are segmented
                without it.
            overlaps: how to assign voxels that several structures claim.

        Raises:
            PromptError, UnknownCategory: as `segment`.
        """
        highest = max(prompts, default=0)
        label_DHW = np.zeros(self.volume.array_DHW.shape, np.uint8 if highest < 256 else np.uint16)
        inside_DHW = label_DHW[box_slices(self.body)]
        best_DHW = np.full(inside_DHW.shape, -np.inf, np.float16) if overlaps is Overlaps.probability else None
        found: list[tuple[int, float, Box | None]] = []
        for value, result in self._results_of_values(prompts, previous_DHW):
            own_DHW, logits_N = result.found(self.predictor.zoom.threshold)
            if result.roi is not None:
                self._claim(value, own_DHW, logits_N, box_slices(result.roi), inside_DHW, best_DHW)
            found.append((logits_N.size, _probability(logits_N), result.roi))
        # Slice by slice: of the complete volume bincount would make an int64 copy.
        counts = np.sum([np.bincount(label_HW.reshape(-1), minlength=highest + 1) for label_HW in inside_DHW], 0)
        litres = float(np.prod(self.volume.spacing)) / 1000
        scores = [
            Score(
                *(prompt.text or f"structure {value}", value, int(counts[value]), int(counts[value]) * litres),
                *(own, probability, self._in_ct(roi)),
            )
            for (value, prompt), (own, probability, roi) in zip(prompts.items(), found, strict=True)
        ]
        return LabelMap(label_DHW, self.volume, scores, overlaps)

    @staticmethod
    def _claim(
        value: int,
        own_DHW: np.ndarray,
        logits_N: np.ndarray,
        place: tuple[slice, ...],
        label_DHW: np.ndarray,
        best_DHW: np.ndarray | None,
    ) -> None:
        """Assign a category's voxels to it, slice by slice to save memory. logits_N: of the voxels of `own_DHW`."""
        labels, best = label_DHW[place], None if best_DHW is None else best_DHW[place]
        ends = np.cumsum([np.count_nonzero(own_HW) for own_HW in own_DHW])[:-1]
        for depth, (own_HW, sure_N) in enumerate(zip(own_DHW, np.split(logits_N, ends), strict=True)):
            claimed_HW = own_HW
            if best is not None:
                higher_N = sure_N > best[depth][own_HW]
                claimed_HW = np.zeros_like(own_HW)
                claimed_HW[own_HW] = higher_N
                best[depth][claimed_HW] = sure_N[higher_N]
            labels[depth][claimed_HW] = value

    def _results_of_values(
        self, prompts: Mapping[int, Prompt], previous_DHW: np.ndarray | None
    ) -> Iterator[tuple[int, ZoomResult]]:
        """In the prompts' order. Those without a mask to refine are zoomed together."""
        inside_DHW = np.zeros(0) if previous_DHW is None else self._in_body(previous_DHW)
        refined = {value for value in prompts if np.any(inside_DHW == value)}
        zoomed = self._results([prompt for value, prompt in prompts.items() if value not in refined])
        for value, prompt in prompts.items():
            if value in refined:
                yield value, self._refined_from(prompt, np.asarray(inside_DHW == value))
            else:
                yield value, next(zoomed)[1]

    def _results(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, ZoomResult]]:
        for prompt in prompts:
            self.predictor.check(prompt)
        local = [into_crop(prompt, self.volume.array_DHW.shape, self.body) for prompt in prompts]
        requests = [self.zoomer.request(prompt, np.random.default_rng(self.predictor.seed)) for prompt in local]
        return zip(prompts, self._zoomed(requests), strict=True)

    def _zoomed(self, requests: list[ZoomRequest]) -> Iterator[ZoomResult]:
        results = self.zoomer.zoom_all(requests)
        while True:
            # Entered for each result: open across `yield`, it would apply to the caller's code, and never end if two
            # such iterators overlap.
            with self.predictor.autocast():
                result = next(results, None)
            if result is None:
                return
            yield result

    def _refined(self, prompt: Prompt, previous: Mask | np.ndarray, everywhere: bool) -> Mask:
        inside_DHW = self._in_body(np.asarray(previous, dtype=bool))
        if isinstance(previous, Mask):
            prompt = _continued(previous.prompt, prompt)
        if not inside_DHW.any():
            return self.segment(prompt)
        return self._mask(self._refined_from(prompt, inside_DHW, everywhere), prompt)

    def _in_body(self, array_DHW: np.ndarray) -> np.ndarray:
        """The part of a mask or label map of the CT that is inside the body. Raises PromptError for another shape."""
        shape = self.volume.array_DHW.shape
        if array_DHW.shape != shape:
            raise PromptError(f"previous: the mask has {list(array_DHW.shape)} voxels, the CT has {list(shape)}")
        inside_DHW: np.ndarray = array_DHW[box_slices(self.body)]
        return inside_DHW

    def _refined_from(self, prompt: Prompt, inside_DHW: np.ndarray, everywhere: bool = False) -> ZoomResult:
        self.predictor.check(prompt)
        local = into_crop(prompt, self.volume.array_DHW.shape, self.body, refining=True)
        with self.predictor.autocast():
            return self.zoomer.refine(local, inside_DHW, np.random.default_rng(self.predictor.seed), everywhere)

    def _mask(self, result: ZoomResult, prompt: Prompt) -> Mask:
        array_DHW = np.zeros(self.volume.array_DHW.shape, bool)
        own_DHW, logits_N = result.found(self.predictor.zoom.threshold)
        if result.roi is not None:
            array_DHW[box_slices(self.body)][box_slices(result.roi)] = own_DHW
        return Mask(array_DHW, self.volume, self._in_ct(result.roi), prompt, _probability(logits_N))

    def _in_ct(self, roi: Box | None) -> Box | None:
        if roi is None:
            return None
        d, h, w = self.body[:3]
        return roi[0] + d, roi[1] + h, roi[2] + w, roi[3] + d, roi[4] + h, roi[5] + w


def _measured(volume: Volume) -> tuple[Intensity, Box]:
    """Intensity and body crop of a CT, with a warning if it is no CT."""
    intensity = intensity_of(volume.array_DHW)
    _warn_unless_ct(intensity, volume.path)
    return intensity, body_box(volume.array_DHW, intensity)


def _probability(logits_N: np.ndarray) -> float:
    """Mean probability over a mask, from the logits inside it; 0 for an empty mask."""
    return float(np.mean(1 / (1 + np.exp(-logits_N)))) if logits_N.size else 0.0


def _continued(earlier: Prompt, later: Prompt) -> Prompt:
    """The later prompt with the earlier one's points and landmarks, and its text where it has none."""
    text = earlier.text if later.text is None else later.text
    joined = replace(later, text=text, landmarks={**earlier.landmarks, **later.landmarks})
    if earlier.points_N3 is None or earlier.labels_N is None:
        return joined
    joined = replace(joined, points_N3=earlier.points_N3, labels_N=earlier.labels_N)
    if later.points_N3 is None or later.labels_N is None:
        return joined
    return joined.with_points(later.points_N3, later.labels_N)


def _warn_unless_ct(intensity: Intensity, path: Path) -> None:
    if intensity.minimum > AIR_BELOW:
        log.warning(
            "%s: values from %d to %d, no air: not a CT in Hounsfield units, perhaps an MR; do not trust its masks",
            *(path, intensity.minimum, intensity.maximum),
        )


# ---- the command ----


def predict(config: PredictConfig) -> Mask | LabelMap:
    """Segment `config.image`, write the mask or label map to `config.out`, and log its size.

    Raises:
        PromptError, UnknownCategory, TextError, CheckpointError, VolumeError, SampleError, ConfigError (landmarks that
            the model does not have): each in one line.
    """
    if config.image is None:
        raise ConfigError("image: give a CT; many are segmented by evaluation.predict_images", "image")
    check_prompt(config)
    # Fail before the work, not at its end.
    check_out(Path(config.out), Path(config.image))
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    names = category_names(predictor, config)
    rows = config.landmark_rows
    if rows:
        predictor.check(Prompt(landmarks={name: np.zeros((len(each), 3), np.int64) for name, each in rows.items()}))
    start = time.perf_counter()
    session = predictor.open(config.image, _log_progress())
    log.info("%s: read and encoded in %.1f s", config.image, time.perf_counter() - start)
    if len(names) > 1 or config.everything:
        return _predict_all(session, names, config)
    return _predict_one(session, names[0] if names else None, config)


def _predict_one(session: Session, name: str | None, config: PredictConfig) -> Mask:
    start = time.perf_counter()
    previous = None if config.previous is None else read_label(config.previous, session.volume) > 0
    if previous is not None and not previous.any():
        log.warning("%s: the mask to refine is empty and is ignored", config.previous)
    mask = session.segment(prompt_of(config, name, session.volume), previous)
    mask.save(config.out)
    if mask.roi is None:
        log.warning("%s: zooming out found nothing for this prompt; the mask is empty", config.image)
    log.info(
        "%s: %d voxels, %.1f ml; segmented in %.1f s",
        *(config.out, mask.voxels, mask.millilitres, time.perf_counter() - start),
    )
    return mask


def _predict_all(session: Session, names: list[str], config: PredictConfig) -> LabelMap:
    start = time.perf_counter()
    labels = session.segment_all(names, config.overlaps)
    scores_path = labels.save(config.out)
    for score in labels.scores:
        log.info("%5d  %-30s %10.1f ml  %.2f", score.value, score.category, score.millilitres, score.probability)
    missing = [score.category for score in labels.scores if score.roi is None]
    if missing:
        log.warning("%s: zooming out found nothing of %s", config.image, ", ".join(missing))
    log.info(
        "%s: %d categories in %.1f s, scores in %s", config.out, len(names), time.perf_counter() - start, scores_path
    )
    return labels


def category_names(predictor: Predictor, config: PredictConfig) -> list[str]:
    """The configured categories; unknown ones are added to the text bank if `clip_model` is set.

    Raises UnknownCategory, TextError.
    """
    if config.everything:
        return predictor.categories
    admit(predictor, config.text, config.clip_model)
    return config.text


def admit(predictor: Predictor, names: Sequence[str], clip_model: str | None) -> None:
    """Make sure that text prompts may hold these names: unknown ones are added to the text bank with `clip_model`.

    Raises UnknownCategory, TextError.
    """
    if not names:
        return
    bank: TextBank = predictor.model.bank  # type: ignore[attr-defined]
    unknown = [name for name in dict.fromkeys(names) if name not in bank.texts]
    if unknown and clip_model is not None:
        extend_bank(predictor.model, unknown, clip_model)
    elif unknown:
        try:
            bank.index(unknown[0])
        except UnknownCategory as error:
            raise UnknownCategory(
                f"{error}; for other names set clip_model=FOLDER, with the CLIP model that made the text bank"
            ) from error


def extend_bank(model: Any, names: Sequence[str], clip: str) -> None:
    """Add names to the model's text bank.

    Args:
        model: a SegVol; its bank is replaced.
        names: to add.
        clip: folder, or hub name, of the CLIP model that made the bank.

    Raises:
        TextError: CLIP cannot be loaded, or did not make the bank, so that its vectors would be meaningless.
    """
    held: TextBank = model.bank
    try:
        made = TextBank.from_clip([*held.names[:1], *names], TextConfig(clip_model=clip))
    except TextError as error:
        raise TextError(f"clip_model: cannot load {clip}: give a folder with CLIP's files, or a hub name") from error
    fits = made.vectors_KE.shape[1] == held.vectors_KE.shape[1]
    if not held.names or not fits or not made.vectors_KE[:1].allclose(held.vectors_KE[:1].cpu(), atol=1e-3):
        raise TextError(
            f"clip_model: {clip} did not make this model's text bank: give the one that did, or leave it out"
        )
    vectors_KE = made.vectors_KE[1:].to(model.text_encoder.bank_KE)
    both_KE = torch.cat([model.text_encoder.bank_KE, vectors_KE])
    model.bank = TextBank([*held.texts, *names], both_KE).rows([*held.names, *names], held.synonyms)
    model.text_encoder.bank_KE = model.bank.vectors_KE


def _log_progress() -> Progress:
    """Log how many windows are decoded, and how fast, at most every few seconds."""
    started = logged = time.perf_counter()

    def report(done: int, wanted: int) -> None:
        nonlocal logged
        now = time.perf_counter()
        if now - logged > LOG_PERIOD:
            logged = now
            log.info("%d of %d windows (%.2f per second)", done, wanted, done / (now - started))

    return report
