"""The six calls of the interactive challenge on one category of a case: a box, then one more click each.

1. The first call gets the challenge's box, drawn from the truth, or that of the case. A category of the challenge's
   files that has no box begins with a click.
2. Each further call gets one more click, in the largest error of the answer before it, all earlier clicks, the box
   again (grown to hold the clicks inside), and that answer to refine. If nothing is wrong there is no click, and the
   call is made all the same.

The rules are in `evaluation.challenge`. Here a category is answered for itself: the challenge's map of all classes, in
which a voxel has one class, is not made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from segvol_pl.config import EvaluationProtocol, Mode
from segvol_pl.evaluation.case_runner import CaseRunner, Prediction
from segvol_pl.evaluation.challenge import CALLS, Kind, Voxel, box_of_challenge, challenge_box, next_click
from segvol_pl.evaluation.prompts import BOX_STREAM, Setting
from segvol_pl.imaging.box import Box, point_boxes, union_box
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt

SOURCE = EvaluationProtocol.cvpr25.value


def call_settings(boxed: bool = True) -> list[Setting]:
    """List the settings of the six calls, which distinguish their rows: `box(cvpr25)+points(clicks3)`.

    Without a box they are five: `points(clicks1)` and so on.
    """
    kind, box = ("box+points", SOURCE) if boxed else ("points", "")
    clicked = [Setting(Mode.zoom.value, kind, box, f"clicks{number}") for number in range(1, CALLS)]
    return [Setting(Mode.zoom.value, "box", SOURCE), *clicked] if boxed else clicked


def answer_calls(runner: CaseRunner, category: str, truth_DHW: np.ndarray) -> Iterator[tuple[Setting, Prediction]]:
    """Make the six calls, or the five with clicks. The predictions' seconds include neither the box nor the clicks.

    Args:
        runner: Of the case.
        category: Seeds the draws; its name is not part of the prompt.
        truth_DHW: Bool mask, not empty.
    """
    box = _first_box(runner, category, truth_DHW)
    prompt = None if box is None else Prompt(box=box)
    previous_DHW = np.zeros_like(truth_DHW)
    for setting in call_settings(boxed=box is not None):
        # The truth is not empty, so that without a box there is a click at once, and it lies inside.
        click = next_click(truth_DHW, previous_DHW) if setting.points else None
        prompt = prompt if click is None else with_click(prompt, *click)
        assert prompt is not None
        prediction = runner.answer(prompt, previous_DHW, category)
        yield setting, prediction
        previous_DHW = prediction.mask_DHW


def _first_box(runner: CaseRunner, category: str, truth_DHW: np.ndarray) -> Box | None:
    if runner.case.boxes is not None:
        return runner.case.boxes.get(category)
    rng = np.random.default_rng([*runner.seeds(category), BOX_STREAM])
    return box_of_challenge(challenge_box(truth_DHW, rng))


def with_click(prompt: Prompt | None, place: Voxel, kind: Kind) -> Prompt:
    """Return the prompt, if there is one, with one more point, after those that it has.

    The challenge's box is that of one slice, and often smaller than the object: it grows to hold a point inside.
    """
    points_N3, labels_N = np.array([place]), np.array([INSIDE if kind == "fg" else OUTSIDE])
    if prompt is None:
        return Prompt(points_N3=points_N3, labels_N=labels_N)
    if prompt.box is not None and kind == "fg":
        prompt = replace(prompt, box=union_box([prompt.box, *point_boxes(points_N3)]))
    return prompt.with_points(points_N3, labels_N)
