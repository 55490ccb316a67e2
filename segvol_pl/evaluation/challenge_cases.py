"""Cases of the interactive challenge as cases of an evaluation: CASE.npz with image, truth, and boxes or texts.

The image is taken as it is, 0 to 255, and cropped to what is above 0, to the truth and to the boxes, much as `challenge
predict` crops it. A class is a category: by its text if the file has one, else by its number. With `instance_label` all
instances of the truth are one category, the text's. Entry i of `boxes` is the i-th of the truth's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segvol_pl.config import CasesConfig
from segvol_pl.data.schema import CategoryFacts, Facts
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.cases import EvalCase
from segvol_pl.evaluation.challenge_files import MOST, ChallengeCase, case_files, read_case, read_labels
from segvol_pl.imaging.box import Box, box_of, box_or_none, box_slices, union_box
from segvol_pl.imaging.geometry import unplaced_volume
from segvol_pl.imaging.intensity import intensity_of_normalised

TRUTH = "gts"


class NpzCases:
    """The cases of a folder that have a truth. Raises ChallengeError or EvaluateError if there are none."""

    def __init__(self, data: CasesConfig) -> None:
        self.source, self.split = str(data.npz), "all"
        truths = Path(data.truths or self.source)
        paths = {path.stem: path for path in case_files(Path(self.source))}
        self._paths = {key: (path, truths / path.name) for key, path in sorted(paths.items())}
        self._paths = {key: both for key, both in self._paths.items() if both[1].is_file()}
        if not self._paths:
            raise EvaluateError(f"data.truths: {truths} has no truth of the cases of {self.source}: set data.truths")
        self.unlabelled = len(paths) - len(self._paths)
        self.fingerprints = {key: "-".join(map(_stamp, both)) for key, both in self._paths.items()}

    def read(self, key: str) -> EvalCase:
        """Read a case. Raises ChallengeError, in one line, if it is damaged or has no truth."""
        path, truth_path = self._paths[key]
        case = read_case(path)
        label_DHW = read_labels(truth_path, TRUTH, case.image_DHW.shape)
        values = [int(value) for value in np.unique(label_DHW) if value]
        boxes = {value: case.boxes[place] for place, value in enumerate(values, start=1) if place in case.boxes}
        around = [found for array in (case.image_DHW > 0, label_DHW > 0) if (found := box_or_none(array))]
        body = union_box([*around, *boxes.values()]) if around else (0, 0, 0, *(size - 1 for size in label_DHW.shape))
        image_DHW, label_DHW = case.image_DHW[box_slices(body)], label_DHW[box_slices(body)]
        named = _categories(case, values)
        intensity = intensity_of_normalised(case.image_DHW, MOST)
        facts = Facts(
            key=key,
            shape=list(image_DHW.shape),
            spacing=list(case.spacing),
            affine=None,
            source={"image": path.name},
            dataset="challenge",
            split=self.split,
            modality="",
            intensity=intensity,
            categories={name: _facts_of(np.isin(label_DHW, held), held) for name, held in named.items()},
            labelled=True,
            overview_shape=[],
        )
        names = {held[0]: name for name, held in named.items()}
        given = {names[value]: _moved(box, body) for value, box in boxes.items() if value in names}
        grid = unplaced_volume(case.image_DHW, case.spacing, path)
        return EvalCase(facts, image_DHW, label_DHW, grid, body, given, label_DHW if case.instances else None)


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size:x}.{found.st_mtime_ns:x}"


def _categories(case: ChallengeCase, values: list[int]) -> Mapping[str, list[int]]:
    if case.instances:
        return {next(iter(case.texts.values()), "1"): values} if values else {}
    return {case.texts.get(value, str(value)): [value] for value in values}


def _facts_of(mask_DHW: np.ndarray, values: list[int]) -> CategoryFacts:
    return CategoryFacts(values, int(np.count_nonzero(mask_DHW)), list(box_of(mask_DHW)), [])


def _moved(box: Box, body: Box) -> Box:
    d, h, w = body[:3]
    return box[0] - d, box[1] - h, box[2] - w, box[3] - d, box[4] - h, box[5] - w
