"""What a probe predicts (the labels of a CSV file, or which categories a volume holds), and what it learns from.

1. `find_tasks` gives each volume of a task its class and its group, and refuses tasks with too few volumes.
2. `divided` deals the volumes to folds, or trains on the shards' split `train` and tests on the others.
3. `drawn` chooses a fraction of the training volumes, the same share of each class; smaller fractions are parts of
   larger ones.

Letters: N volumes, G groups.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segvol_pl.config import ProbeConfig
from segvol_pl.data.schema import Split
from segvol_pl.errors import EvaluateError, listed
from segvol_pl.evaluation.feature_folder import Features
from segvol_pl.evaluation.probe_models import stratified_folds

UNKNOWN = -1
"""Class of a volume without a label, and fold of a volume that is not tested."""
LEAST = 2
"""Groups of each class that every fold must have, and each side of a split."""
CLASSES = ("absent", "present")


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to predict."""

    name: str
    classes: list[str]
    label_N: np.ndarray
    """Index of each volume's class, int64; `UNKNOWN` for volumes that the task leaves out."""
    group_N: np.ndarray
    """Number of each volume's group, int64."""

    @property
    def binary(self) -> bool:
        """Whether it is measured by the area under the ROC curve; otherwise by the balanced accuracy."""
        return len(self.classes) == 2

    @property
    def metric(self) -> str:
        """Name of the figure."""
        return "AUC" if self.binary else "balanced accuracy"

    @property
    def counts(self) -> dict[str, int]:
        """Class -> number of volumes."""
        count_C = np.bincount(self.label_N[self.label_N != UNKNOWN], minlength=len(self.classes))
        return dict(zip(self.classes, count_C.tolist(), strict=True))


def find_tasks(features: Features, config: ProbeConfig) -> tuple[list[Task], list[str]]:
    """The tasks of a configuration, and what was left out, one line each.

    Raises EvaluateError if the labels cannot be used, or are too few.
    """
    if config.labels is not None:
        task, notes = _of_table(features, Path(config.labels))
        if problem := _too_few(task, features, config.folds):
            raise EvaluateError(f"labels: {problem}")
        return [task], notes
    return _of_categories(features, config)


def _of_categories(features: Features, config: ProbeConfig) -> tuple[list[Task], list[str]]:
    known = sorted({name for held in features.categories for name in held})
    unknown = [name for name in config.categories if name not in known]
    if unknown:
        raise EvaluateError(f"categories: no volume has {unknown[0]!r}; there are {listed(known) or 'none'}")
    tasks, problems = list[Task](), dict[str, str]()
    for name in config.categories or known:
        present_N = np.array([name in held for held in features.categories], np.int64)
        label_N = np.where(features.labelled_N, present_N, UNKNOWN)
        task = Task(name, list(CLASSES), label_N, np.arange(len(label_N)))
        if problem := _too_few(task, features, config.folds):
            problems[name] = problem
        else:
            tasks.append(task)
    first = next(iter(problems.values()), "no volume is labelled")
    if not tasks:
        raise EvaluateError(f"categories: none can be predicted: {first}")
    return tasks, [f"left out {len(problems)} categories ({listed(problems)}): {first}"] if problems else []


def _of_table(features: Features, path: Path) -> tuple[Task, list[str]]:
    """The task of a CSV file. Raises EvaluateError naming file and line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
    except FileNotFoundError:
        raise EvaluateError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise EvaluateError(f"{path}: is no CSV file in UTF-8 ({error})") from error
    lacking = [column for column in ("key", "label") if column not in (reader.fieldnames or ())]
    if lacking:
        raise EvaluateError(f"{path}:1: no column {lacking[0]}; it needs key and label, and may have group")
    places = {key: place for place, key in enumerate(features.keys)}
    named, grouped = dict[str, str](), dict[str, str]()
    for line, row in enumerate(rows, start=2):
        key, label = (row["key"] or "").strip(), (row["label"] or "").strip()
        if key in named:
            raise EvaluateError(f"{path}:{line}: {key} has a label already: remove one of them")
        if key and label:
            named[key], grouped[key] = label, (row.get("group") or "").strip() or key
    held = [key for key in named if key in places]
    if not held:
        first = next(iter(named), "none")
        raise EvaluateError(f"{path}: none of its {len(named)} keys (first: {first}) is in {features.folder}")
    classes, groups = sorted({named[key] for key in held}), sorted({grouped[key] for key in held})
    label_N, group_N = np.full(len(places), UNKNOWN), np.full(len(places), UNKNOWN)
    for key in held:
        label_N[places[key]] = classes.index(named[key])
        group_N[places[key]] = groups.index(grouped[key])
    # Volumes without a label belong to no group: each counts for itself.
    alone = group_N == UNKNOWN
    group_N[alone] = len(groups) + np.arange(alone.sum())
    missing = len(named) - len(held)
    notes = [f"left out: {missing} of {len(named)} keys of {path.name} are not among the features"] if missing else []
    return Task(path.stem, classes, label_N, group_N), notes


def _too_few(task: Task, features: Features, folds: int) -> str:
    """What is missing for the task, in words; empty if nothing is."""
    if len(task.classes) < 2:
        return f"all labels are {task.classes[0]!r}: needs two or more different ones"
    if folds:
        sides = {f"for folds={folds}": (task.label_N != UNKNOWN, LEAST * folds)}
    else:
        trained_N = features.split_N == Split.TRAIN.value
        sides = {"in the split train": (trained_N, LEAST), "in the other splits": (~trained_N, LEAST)}
        both = np.intersect1d(task.group_N[trained_N], task.group_N[~trained_N])
        if len(both):
            key = features.keys[int(np.flatnonzero(task.group_N == both[0])[0])]
            return f"the group of {key} is in the split train and in another: use folds=5"
    for where, (mine_N, least) in sides.items():
        for number, name in enumerate(task.classes):
            groups = len(np.unique(task.group_N[mine_N & (task.label_N == number)]))
            if groups < least:
                needed = f"each of the {len(task.classes)} classes needs at least {least} volumes or groups {where}"
                return f"{task.name}: {groups} in class {name!r}: {needed}"
    return ""


def divided(task: Task, features: Features, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold in which each volume is tested, (N,); `UNKNOWN` for those that are only trained on, or left out."""
    fold_N = np.full(len(task.label_N), UNKNOWN)
    known = task.label_N != UNKNOWN
    if folds:
        fold_N[known] = stratified_folds(task.label_N[known], task.group_N[known], folds, rng)
    else:
        fold_N[known & (features.split_N != Split.TRAIN.value)] = 0
    return fold_N


def trained_on(task: Task, fold_N: np.ndarray, fold: int) -> np.ndarray:
    """The labelled volumes that are not tested in a fold: indices."""
    return np.flatnonzero((task.label_N != UNKNOWN) & (fold_N != fold))


def drawn(label_R: np.ndarray, fraction: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of a fraction of the volumes, at least one of each class. The same rng gives nested fractions."""
    order_R = rng.permutation(len(label_R))
    chosen = []
    for number in range(classes):
        mine = order_R[label_R[order_R] == number]
        chosen.append(mine[: max(1, round(fraction * len(mine)))])
    return np.sort(np.concatenate(chosen))


def usable_fractions(fractions: Sequence[float], task: Task, smallest: int) -> tuple[list[float], list[str]]:
    """The fractions that give a label per class, of `smallest` training volumes; and those left out, in words."""
    used = [fraction for fraction in sorted(set(fractions)) if fraction * smallest >= len(task.classes)]
    left = [fraction for fraction in sorted(set(fractions)) if fraction not in used]
    if not left:
        return used, []
    shares, needed = ", ".join(f"{fraction:.0%}" for fraction in left), int(np.ceil(len(task.classes) / left[0]))
    text = f"left out {shares} of the {smallest} labels of {task.name}: fewer than one of each class"
    return used, [f"{text}; {left[0]:.0%} needs {needed} labels"]
