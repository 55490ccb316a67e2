"""What a reader needs to reproduce a scaling law, answered from the runs and the fit.

The questions are those that the survey "(Mis)Fitting" (Li et al. 2025, arXiv 2502.18969) found unanswered in most of
the papers on scaling laws: the form, the training, how the points were made, and how the law was fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from segvol_pl.config import FitConfig, MetricPick
from segvol_pl.experiments.laws import EXPONENTS, HUBER, ROUNDS, STEEPEST
from segvol_pl.experiments.points import Points
from segvol_pl.experiments.sensitivity import FAR, Sensitivity
from segvol_pl.experiments.verdict import Verdict

UNKNOWN = "not recorded: the points come from a table"


@dataclass(frozen=True)
class Item:
    """One question and its answer."""

    part: str
    question: str
    answer: str


def checklist(
    points: Points, judged: Sequence[Verdict], found: Sequence[Sensitivity | None], config: FitConfig
) -> list[Item]:
    """Answer all questions. found: of each verdict, in the same order."""
    parts = {
        "law": _law(points, judged),
        "training": _training(points),
        "points": _points(points, config),
        "fit": _fit(judged, found, config),
    }
    return [Item(part, question, answer) for part, rows in parts.items() for question, answer in rows]


def _law(points: Points, judged: Sequence[Verdict]) -> list[tuple[str, str]]:
    forms = dict.fromkeys(f"{each.law.formula} ({each.law.size} parameters)" for each in judged)
    return [
        ("Which form has the law?", "; ".join(forms)),
        ("What does N count?", points.params),
        ("What does D count?", points.counted),
        ("What is L?", f"{points.loss}, {points.measured}"),
    ]


def _training(points: Points) -> list[tuple[str, str]]:
    settings = len({(point.params, point.samples) for point in points.used})
    count = f"{len(points.used)} in {settings} settings: {len(points.used) / settings:.3g} for each on average"
    return [
        ("How many models were trained?", count),
        ("Over which range?", "; ".join(_ranges(points))),
        ("Which command trained them?", _values(points, "command", "")),
        ("Which shapes have the models?", _values(points, "model.", "")),
        ("Which data, and how many volumes per step?", _values(points, "data.", "")),
        ("Which optimizer and learning rates?", _values(points, "optim.", "AdamW: ")),
        ("Which schedule?", _schedule(points)),
        ("Which parts did not train?", _values(points, "freeze", "")),
    ]


def _ranges(points: Points) -> list[str]:
    columns = {
        "N": [point.params for point in points.used],
        "D": [point.samples for point in points.used],
        "training FLOPs": [point.flops for point in points.used if point.flops],
    }
    return [f"{name} {min(column):.4g} to {max(column):.4g}" for name, column in columns.items() if column]


def _values(points: Points, prefix: str, head: str) -> str:
    """The values of the keys that start so: one if all runs have the same, else all of them or the ends."""
    setups = [point.setup for point in points.used if point.setup]
    if not setups:
        return UNKNOWN
    named = []
    for key in dict.fromkeys(key for setup in setups for key in setup if key.startswith(prefix)):
        values = list(dict.fromkeys(setup[key] for setup in setups if key in setup))
        name = "" if key == prefix else f"{key.removeprefix(prefix)} "
        named.append(f"{name}{_several(values)}")
    return head + ", ".join(named)


def _several(values: list[Any]) -> str:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(values) > 4 and len(numbers) == len(values):
        return f"{min(numbers):g} to {max(numbers):g} ({len(values)} values)"
    return " / ".join(str(value) for value in values)


def _schedule(points: Points) -> str:
    if not any(point.setup for point in points.used):
        return UNKNOWN
    shape = _values(points, "optim.schedule", "") or "cosine"
    return f"linear warm-up over optim.warmup_steps, then {shape} to the end at optim.max_steps of each run"


def _points(points: Points, config: FitConfig) -> list[tuple[str, str]]:
    chosen = "the best value" if config.take is MetricPick.best else "the last value"
    entered = f"one point per run, {chosen} of the metric; no other checkpoint"
    early = points.early
    if early:
        entered += f"; {len(early)} of {len(points.used)} are from before the run's last step: {', '.join(early[:5])}"
    left_out = f"{len(points.unused)} runs, listed as left out with the reason" if points.unused else "no run"
    return [
        ("Which checkpoints enter?", entered if any(point.setup for point in points.used) else "one point per row"),
        ("Which runs are left out?", left_out),
        ("How are FLOPs counted?", _flops(points)),
        ("Are losses changed before the fit?", "1 - metric" if points.loss.startswith("1 - ") else "no"),
    ]


def _flops(points: Points) -> str:
    if not any(point.flops for point in points.used):
        return "not known"
    if not any(point.setup for point in points.used):
        return "as the table states"
    frozen = any(point.setup.get("freeze", "nothing") != "nothing" for point in points.used)
    upper = ": an upper bound, since frozen parts are counted as if they trained" if frozen else ""
    return f"matrix products and attention from the architecture, forward and backward, without recomputation{upper}"


def _fit(judged: Sequence[Verdict], found: Sequence[Sensitivity | None], config: FitConfig) -> list[tuple[str, str]]:
    starts = len(EXPONENTS)
    outliers = sum(len(each.outliers) for each in found[:1] if each is not None)
    return [
        (
            "Which objective?",
            f"Huber loss of log(measured / fitted), of {HUBER} robust standard deviations, which follow from the "
            f"residuals in {ROUNDS} rounds; every run counts once",
        ),
        (
            "Which starts?",
            f"a grid of {starts} exponents per variable from {EXPONENTS[0]:g} to {EXPONENTS[-1]:g}, the other "
            f"coefficients by non-negative least squares: {starts} starts, {starts**2} with two variables",
        ),
        (
            "Which optimizer?",
            f"damped Newton steps from all starts, then scipy least_squares (dogbox); exponents within -{STEEPEST:g} "
            f"and {STEEPEST:g}",
        ),
        (
            "What happens to outliers?",
            f"runs beyond {FAR:g} robust standard deviations are named and stay in the fit; {outliers} in the law "
            "listed first",
        ),
        (
            "How was the final fit chosen?",
            "the lowest objective of all starts; if a law with a floor is not supported, the one without it is tried",
        ),
        (
            "Which intervals?",
            f"95 %, {config.bootstraps} bootstrap samples of seed {config.seed}, exponential weights of the settings, "
            "the seeds of a setting together; widened by settings / degrees of freedom and Student's t",
        ),
        ("Is the law validated?", _validated(judged)),
    ]


def _validated(judged: Sequence[Verdict]) -> str:
    held = [each.held_out for each in judged if each.held_out is not None]
    if not held:
        return "no: too few settings to hold out the largest ones"
    first = held[0]
    return (
        f"the {first.settings} largest settings are predicted from the others: mean error {first.error:.1%}, "
        f"{first.inside} of {first.runs} runs within their intervals"
    )
