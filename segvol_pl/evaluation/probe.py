"""`segvol-pl probe`: what frozen features are worth, measured by simple classifiers and the number of labels.

1. The features that `embed` wrote are read, and the tasks found (`probe_tasks`).
2. In each fold, each probe (`probe_models`) is trained on a fraction of the other folds' labels, and scores the fold's
   volumes. Three kinds of features take part: the checkpoint's, those of random weights, and the image itself.
3. A figure is measured over all tested volumes. Its interval is a bootstrap: volumes (or their groups) are drawn with
   replacement, together with one of the draws of labels. All kinds of features share the bootstrap samples, so that the
   intervals of their differences are those of pairs.
4. probe.json, probe.csv, figures and index.html are written.

The intervals contain what the choice of tested volumes and of labels changes. They do not contain what other weights of
the checkpoint, from another pre-training, would change.

Letters: N volumes, C classes, L draws of labels, W bootstrap samples; sample 0 counts every volume once.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.config import ProbeConfig
from segvol_pl.evaluation.feature_folder import INTENSITY, KINDS, TRAINED, UNTRAINED, Features, load_features
from segvol_pl.evaluation.metrics import interval
from segvol_pl.evaluation.probe_models import auc, balanced_accuracy, chosen_penalty, linear_scores, neighbour_scores
from segvol_pl.evaluation.probe_report import LINEAR, NEIGHBOURS, Figures, notable, write_results
from segvol_pl.evaluation.probe_tasks import UNKNOWN, Task, divided, drawn, find_tasks, trained_on, usable_fractions

log = logging.getLogger(__name__)

MEAN = "mean over tasks"


def probe(config: ProbeConfig) -> list[str]:
    """Write the results and return a summary, one string per line.

    Raises EvaluateError if the features or the labels cannot be used, or the labels are too few.
    """
    features = load_features(Path(config.features))
    tasks, notes = find_tasks(features, config)
    figures = list[Figures]()
    for task in tasks:
        log.info("%s: %s", task.name, ", ".join(f"{count} {name}" for name, count in task.counts.items()))
        found, left_out = _probed(task, features, config)
        figures += found
        notes += left_out
    if len(tasks) > 1:
        figures += list(_means(figures, len(tasks)))
    out = Path(config.out)
    compared = _compared(figures)
    write_results(out, figures, compared, tasks, features, config, notes)
    shown = [each for each in figures if each.fraction == 1 and each.task == figures[-1].task]
    lines = [f"{_headline(each)} ({tasks[0].metric if len(tasks) == 1 else each.metric})" for each in shown]
    lines += [each["verdict"] for each in notable(compared) if each["task"] == figures[-1].task]
    return [*lines, *notes, f"written to {out}: index.html, probe.json, probe.csv, figures"]


def _headline(each: Figures) -> str:
    row = each.row()
    return f"{each.task}, {each.probe}, {row['features']}: {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


# ---- probing ----


def _probed(task: Task, features: Features, config: ProbeConfig) -> tuple[list[Figures], list[str]]:
    """The figures of a task, and the fractions that were left out."""
    fold_N = divided(task, features, config.folds, _rng(config, task, "folds"))
    folds = [int(fold) for fold in np.unique(fold_N) if fold != UNKNOWN]
    smallest = min(len(trained_on(task, fold_N, fold)) for fold in folds)
    fractions, notes = usable_fractions(config.fractions, task, smallest)
    weight_WN = _weights(task, config)
    figures = []
    for fraction in fractions:
        draws = range(_draws(fraction, config))
        labels = [len(_trained(task, fold_N, fold, fraction, draw, config)) for fold in folds for draw in draws]
        for kind in features.arrays:
            for name in (LINEAR, NEIGHBOURS):
                scores = _scores(task, features.arrays[kind], fold_N, fraction, name, config)
                sampled_W = _measured(task, fold_N, scores, weight_WN)
                figures.append(Figures(task.name, task.metric, kind, name, fraction, float(np.mean(labels)), sampled_W))
    return figures, notes


def _rng(config: ProbeConfig, task: Task, *key: str | int) -> np.random.Generator:
    words = (zlib.crc32(str(part).encode()) for part in (task.name, *key))
    return np.random.default_rng([config.seed, *words])


def _trained(task: Task, fold_N: np.ndarray, fold: int, fraction: float, draw: int, config: ProbeConfig) -> np.ndarray:
    """Indices of the volumes to train on for a fold."""
    rows = trained_on(task, fold_N, fold)
    chosen: np.ndarray = rows[
        drawn(task.label_N[rows], fraction, len(task.classes), _rng(config, task, "draw", fold, draw))
    ]
    return chosen


def _scores(
    task: Task, array_NE: np.ndarray, fold_N: np.ndarray, fraction: float, name: str, config: ProbeConfig
) -> list[np.ndarray]:
    """Scores (N,C) of the tested volumes, for each draw of labels; 0 for the other volumes."""
    features_NE, classes = array_NE.astype(np.float64), len(task.classes)
    score_LNC = [np.zeros((len(fold_N), classes)) for _ in range(_draws(fraction, config))]
    for fold in (int(fold) for fold in np.unique(fold_N) if fold != UNKNOWN):
        tested, penalty = fold_N == fold, None
        for draw, score_NC in enumerate(score_LNC):
            train = _trained(task, fold_N, fold, fraction, draw, config)
            given = features_NE[train], task.label_N[train], features_NE[tested], classes
            if name == NEIGHBOURS:
                score_NC[tested] = neighbour_scores(*given, config.neighbours)
                continue
            if penalty is None:  # chosen by the first draw: choosing takes most of the time
                penalty = chosen_penalty(*given[:2], classes, _rng(config, task, "penalty", fold))
            score_NC[tested] = linear_scores(*given, penalty)
    return score_LNC


def _draws(fraction: float, config: ProbeConfig) -> int:
    return 1 if fraction == 1 else config.draws


def _weights(task: Task, config: ProbeConfig) -> np.ndarray:
    """How often each volume counts in each bootstrap sample, (W,N). Groups are drawn, of all volumes alike."""
    # The same for tasks of the same groups, so that the mean over tasks has an interval.
    rng = np.random.default_rng([config.seed, zlib.crc32(b"bootstrap")])
    groups, which_N = np.unique(task.group_N, return_inverse=True)
    times = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=config.bootstraps)
    drawn_WG = np.vstack([np.ones((1, len(groups))), times]).astype(np.float32)
    return drawn_WG[:, which_N.reshape(-1)]


def _measured(task: Task, fold_N: np.ndarray, scores: Sequence[np.ndarray], weight_WN: np.ndarray) -> np.ndarray:
    """The figure of each bootstrap sample, (W,). scores: of each draw; the estimate is the mean over the draws."""
    tested = fold_N != UNKNOWN
    of_draws = []
    for draw, score_NC in enumerate(scores):
        # Sample w belongs to one draw.
        mine_WN = np.vstack([weight_WN[:1], weight_WN[1:][draw :: len(scores)]])[:, tested]
        if task.binary:
            # float64 holds many probabilities as exactly 1; the difference of their logs still orders them.
            order_N = score_NC[tested, 1] - score_NC[tested, 0]
            of_draws.append(auc(order_N, task.label_N[tested] == 1, fold_N[tested], mine_WN))
        else:
            of_draws.append(balanced_accuracy(score_NC[tested], task.label_N[tested], mine_WN))
    sampled_W = np.empty(len(weight_WN))
    sampled_W[0] = np.mean([found[0] for found in of_draws])
    for draw, found in enumerate(of_draws):
        sampled_W[1:][draw :: len(scores)] = found[1:]
    # A sample without any pair says nothing.
    sampled_W[np.isnan(sampled_W)] = sampled_W[0]
    return sampled_W


def _means(figures: Sequence[Figures], tasks: int) -> Iterator[Figures]:
    """The means over the tasks, of the fractions that all of them have."""
    settings = dict.fromkeys((each.features, each.probe, each.fraction) for each in figures)
    for setting in settings:
        mine = [each for each in figures if (each.features, each.probe, each.fraction) == setting]
        if len(mine) == tasks:
            sampled_W = np.mean([each.sampled_W for each in mine], axis=0)
            yield Figures(MEAN, mine[0].metric, *setting, float(np.mean([each.labels for each in mine])), sampled_W)


def _compared(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """The features of the checkpoint against the others at each number of labels: differences of pairs, in words."""
    every = {(each.task, each.probe, each.fraction, each.features): each for each in figures}
    found = []
    for (*setting, kind), mine in every.items():
        for other in (UNTRAINED, INTENSITY) if kind == TRAINED else ():
            theirs = every.get((mine.task, mine.probe, mine.fraction, other))
            if theirs is None:
                continue
            difference_W = mine.sampled_W - theirs.sampled_W
            low, high = interval(difference_W[1:])
            words = "better than" if low > 0 else "worse than" if high < 0 else ""
            verdict = f"the encoder is {words} {KINDS[other]}"
            text = verdict if words else f"no difference shown between the encoder and {KINDS[other]}"
            found.append(
                {
                    **dict(zip(("task", "probe", "fraction"), setting, strict=True)),
                    "against": KINDS[other],
                    "difference": float(difference_W[0]),
                    "low": low,
                    "high": high,
                    "shown": bool(words),
                    "verdict": f"{mine.task}, {mine.probe}, {mine.labels:.0f} labels: {text}: "
                    f"{difference_W[0]:+.3f} [{low:+.3f}, {high:+.3f}]",
                }
            )
    return found
