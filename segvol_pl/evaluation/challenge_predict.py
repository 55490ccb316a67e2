"""`segvol-pl challenge predict`: the challenge's cases of a folder, segmented in one process.

1. The model is loaded once. With `clip_model` it learns the texts of all cases first.
2. Each case is read and encoded once; its classes are prompted, and its answer is written.
3. A case that cannot be used is named in one line, and the next one follows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from segvol_pl.config import ChallengePredictConfig
from segvol_pl.errors import ChallengeError, SegVolError, listed
from segvol_pl.evaluation.challenge_files import MOST, ChallengeCase, case_files, read_case, read_texts, write_answer
from segvol_pl.imaging.box import Box, point_boxes
from segvol_pl.imaging.geometry import unplaced_volume
from segvol_pl.imaging.prompts import INSIDE, Prompt
from segvol_pl.inference.predictor import Predictor, admit

log = logging.getLogger(__name__)


def challenge_predict(config: ChallengePredictConfig) -> list[Path]:
    """Segment every case of the folder `config.cases`, and write the answers to `config.out`.

    Returns:
        The files written, in the order of their names.

    Raises:
        ChallengeError: the folder holds no case, or is that of the answers; or some cases could not be used, after all
            others were segmented.
        CheckpointError, TextError: the model or CLIP cannot be loaded.
    """
    paths, out = case_files(Path(config.cases)), Path(config.out)
    if out.resolve() == Path(config.cases).resolve():
        raise ChallengeError(f"{out} holds the cases, which the answers would replace: give another folder for OUT")
    out.mkdir(parents=True, exist_ok=True)
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    if config.clip_model is not None:
        admit(predictor, list(_all_texts(paths)), config.clip_model)
    written, failed = [], []
    for path in paths:
        started = time.perf_counter()
        try:
            case = read_case(path)
            labels_DHW = answer(case, predictor)
        except SegVolError as error:
            failed.append(path.name)
            log.error("%s", error if str(path) in str(error) else f"{path}: {error}")
            continue
        write_answer(labels_DHW, out / path.name)
        written.append(out / path.name)
        # Slice by slice: of the complete volume bincount would make an int64 copy.
        counts = np.sum([np.bincount(labels_HW.reshape(-1), minlength=MOST + 1) for labels_HW in labels_DHW], axis=0)
        log.info(
            "%s: found %d of %d classes in %.1f s",
            *(out / path.name, np.count_nonzero(counts[1:]), len(case.classes), time.perf_counter() - started),
        )
    if failed:
        raise ChallengeError(
            f"{len(failed)} of {len(paths)} cases were not segmented, for the reasons logged: {listed(failed)}"
        )
    return written


def _all_texts(paths: list[Path]) -> Iterator[str]:
    """The texts of all cases that can be read; the others are reported when it is their turn."""
    for path in paths:
        try:
            yield from read_texts(path).values()
        except ChallengeError as error:
            log.debug("%s", error)


def answer(case: ChallengeCase, predictor: Predictor) -> np.ndarray:
    """Segment the classes of one case.

    Each class is one prompt of its box, clicks and text, and refines its own mask in the answer before, if there is
    one. A voxel that several classes claim goes to the most probable.

    Returns:
        uint8 label map (D,H,W); all 0 if the case has no prompt.

    Raises:
        PromptError, UnknownCategory: a prompt does not fit the image or the model.
    """
    prompts = case.prompts()
    admit(predictor, [prompt.text for prompt in prompts.values() if prompt.text is not None], None)
    missing = [str(value) for value in case.classes if value not in prompts]
    if missing or not prompts:
        log.warning("%s: no prompt says where class %s is: background", case.path, listed(missing) or "1 or any other")
    if not prompts:
        return np.zeros(case.image_DHW.shape, np.uint8)
    image = unplaced_volume(case.image_DHW, case.spacing, case.path)
    session = predictor.open_normalised(image, MOST, [box for prompt in prompts.values() for box in _places(prompt)])
    return session.segment_prompts(prompts, case.previous_DHW).array_DHW


def _places(prompt: Prompt) -> Iterator[Box]:
    """The prompt's box and the boxes of its clicks inside the structure."""
    if prompt.box is not None:
        yield prompt.box
    if prompt.points_N3 is not None and prompt.labels_N is not None:
        yield from point_boxes(prompt.points_N3[prompt.labels_N == INSIDE])
