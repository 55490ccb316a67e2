"""How much a fit depends on single runs, on single sizes, and on the width of the Huber loss.

1. Outliers are runs farther from the fitted law than `FAR` robust standard deviations of the residuals. They are named
   and stay in the fit. The same fit without them is shown next to it. The rule is applied once.
2. Each value of each variable is left out in turn. If a variable has many values, neighbours are left out together.
3. The width of the Huber loss is made smaller and larger, up to plain squares.

Each of these fits starts from the fit with all runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from segvol_pl.experiments.laws import HUBER, Fit, minimise
from segvol_pl.experiments.verdict import EXPONENTS, SYMBOLS, Interval, Verdict

FAR = 4.0
"""Robust standard deviations beyond which a run is an outlier: 1 of 16,000 runs with Gaussian noise."""
GROUPS = 8
"""Most groups in which the values of a variable are left out."""
WIDTHS = (0.25, 0.5, 1.0, HUBER, 2.0, 4.0, float("inf"))
"""Widths of the Huber loss that are tried, in robust standard deviations."""


@dataclass(frozen=True)
class Outlier:
    """A run far from the law."""

    name: str
    residual: float
    """log(measured loss / fitted loss)."""
    deviations: float
    """The same in robust standard deviations."""


@dataclass(frozen=True)
class Refit:
    """The coefficients after one change to the fit."""

    change: str
    runs: int
    coefficients: dict[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """What the fit depends on."""

    outliers: list[Outlier]
    without_outliers: Refit | None
    """None if there are no outliers, or if too few runs would be left."""
    left_out: list[Refit]
    widths: list[Refit]

    @property
    def refits(self) -> list[Refit]:
        """All changed fits."""
        return [*([self.without_outliers] if self.without_outliers else []), *self.left_out, *self.widths]

    @property
    def plain(self) -> dict[str, Any]:
        """Return it as a dict for JSON."""
        rule = f"farther from the law than {FAR:g} robust standard deviations of the residuals; they stay in the fit"
        return {"outlier_rule": rule, **asdict(self)}


def examine(fitted: Fit, names: Sequence[str]) -> Sensitivity:
    """Change the fit in all ways listed above. names: of the runs, in the order of the fit."""
    deviations_R = fitted.residuals_R / fitted.spread
    far_R = np.abs(deviations_R) > FAR
    outliers = [
        Outlier(names[run], float(fitted.residuals_R[run]), float(deviations_R[run]))
        for run in np.flatnonzero(far_R).tolist()
    ]
    changes = [("without the outliers", ~far_R)] if outliers and _enough(fitted, ~far_R) else []
    changes += _leaving_out(fitted)
    everything_R = np.ones(len(far_R), dtype=bool)
    kept_SR = np.array([kept_R for _, kept_R in changes] + [everything_R] * len(WIDTHS))
    widths_S = np.array([fitted.width] * len(changes) + [each * fitted.spread for each in WIDTHS])
    x, y = fitted.logs_RT - fitted.centre_T, fitted.log_losses_R
    starts_SP = np.tile(fitted.theta_P, (len(kept_SR), 1))
    theta_SP, _ = minimise(fitted.law, starts_SP, x, y, widths_S, kept_SR)
    named = [change for change, _ in changes] + [_width_text(each) for each in WIDTHS]
    refits = [
        Refit(change, int(kept_R.sum()), fitted.coefficients(theta_P))
        for change, kept_R, theta_P in zip(named, kept_SR, theta_SP, strict=True)
    ]
    first, last = int(named[0] == "without the outliers"), len(changes)
    return Sensitivity(outliers, refits[0] if first else None, refits[first:last], refits[last:])


def _width_text(width: float) -> str:
    if not np.isfinite(width):
        return "plain squares"
    return f"Huber width {width:g} standard deviations{' (used)' if width == HUBER else ''}"


def _enough(fitted: Fit, kept_R: np.ndarray) -> bool:
    """Whether the runs that are left can determine the law."""
    values = [len(np.unique(column)) for column in fitted.logs_RT[kept_R].T]
    settings = len(np.unique(fitted.logs_RT[kept_R], axis=0))
    return settings > fitted.law.size and min(values) > 1 + fitted.law.floor


def _leaving_out(fitted: Fit) -> list[tuple[str, np.ndarray]]:
    """Description of what is left out, and the runs that are kept."""
    changes = []
    for variable, column in zip(fitted.law.variables, fitted.logs_RT.T, strict=True):
        for values in np.array_split(np.unique(column), min(GROUPS, len(np.unique(column)))):
            kept_R = ~np.isin(column, values)
            ends = [f"{value:,.4g}" for value in np.exp(values[[0, -1]])]
            text = ends[0] if len(values) == 1 else f"{ends[0]} to {ends[1]}"
            if _enough(fitted, kept_R):
                changes.append((f"without {SYMBOLS[variable]} = {text}", kept_R))
    return changes


def examined(judged: Verdict, names: Sequence[str]) -> tuple[Verdict, Sensitivity | None]:
    """Return the verdict with cautions about what its exponents depend on, and the changed fits."""
    if judged.fit is None:
        return judged, None
    found = examine(judged.fit, names)
    cautions = [*judged.cautions, *_outlier_cautions(judged, found), *_moved(judged, found)]
    return replace(judged, cautions=cautions), found


def _outlier_cautions(judged: Verdict, found: Sensitivity) -> list[str]:
    if not found.outliers:
        return []
    named = [f"{each.name} ({each.residual:+.1%})" for each in found.outliers[:5]]
    more = f" and {len(found.outliers) - 5} more" if len(found.outliers) > 5 else ""
    head = f"{len(found.outliers)} of {judged.runs} runs are outliers, beyond {FAR:g} robust standard deviations"
    text = f"{head}: {', '.join(named)}{more}"
    if found.without_outliers is None:
        return [f"{text}; without them too few runs would be left"]
    without = found.without_outliers.coefficients
    changes = [f"{name} is {without[name]:.3g} instead of {each.value:.3g}" for name, each in _exponents(judged)]
    return [f"{text}; without them {' and '.join(changes)}"]


def _moved(judged: Verdict, found: Sensitivity) -> list[str]:
    """For each exponent: the change that takes it farthest out of its interval."""
    cautions = []
    for name, interval in _exponents(judged):
        beyond = [
            (max(interval.low - each.coefficients[name], each.coefficients[name] - interval.high), each)
            for each in found.refits
        ]
        distance, farthest = max(beyond, key=lambda pair: pair[0])
        if distance > 0:
            value = f"{name} is {farthest.coefficients[name]:.3g}"
            cautions.append(
                f"{farthest.change} {value}, outside of its interval {interval.low:.3g} to {interval.high:.3g}"
            )
    return cautions


def _exponents(judged: Verdict) -> list[tuple[str, Interval]]:
    names = [EXPONENTS[variable] for variable in judged.law.variables]
    return [(name, judged.coefficients[name]) for name in names]
