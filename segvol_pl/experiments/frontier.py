"""The compute-optimal frontier of a law in N and D: the best model size and number of samples for a FLOPs budget.

Training costs C = k N D, k FLOPs per parameter and sample. Where dL/dlogN = dL/dlogD along N D = C / k:
N = G (C/k)^(beta / (alpha + beta)), D = (C/k) / N, G = (alpha A / (beta B))^(1 / (alpha + beta)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segvol_pl.experiments.laws import Fit
from segvol_pl.experiments.points import Point
from segvol_pl.experiments.verdict import Interval, tails

BUDGETS, BEYOND = 9, 10.0
"""Number of budgets, from that of the smallest run to `BEYOND` times that of the largest."""


@dataclass(frozen=True)
class Optimum:
    """The best model for a budget."""

    flops: float
    params: Interval
    samples: Interval
    loss: Interval
    beyond: bool
    """Whether the budget, the model or the samples lie outside the range of the runs."""


def cost(points: Sequence[Point], otherwise: float) -> tuple[float, float]:
    """Return FLOPs per parameter and sample: the geometric mean over runs with known FLOPs, and largest / smallest."""
    stated = [point.flops / (point.params * point.samples) for point in points if point.flops]
    if not stated:
        return otherwise, 1.0
    return float(np.exp(np.mean(np.log(stated)))), float(max(stated) / min(stated))


def frontier(fitted: Fit, points: Sequence[Point], per: float) -> list[Optimum]:
    """Return the best models for budgets from that of the smallest run to ten times that of the largest."""
    spent = [per * point.params * point.samples for point in points]
    budgets = np.geomspace(min(spent), BEYOND * max(spent), BUDGETS)
    best = _best(fitted, fitted.theta_P[None], budgets / per)
    samples = _best(fitted, fitted.samples_SP, budgets / per)
    low, high = np.quantile(fitted.widened(best, samples), tails(), axis=0)
    ends = np.exp(np.stack([best[0], low, high], axis=-1))
    reached = {name: [getattr(point, name) for point in points] for name in ("params", "samples")}
    optima = []
    for budget, (params, seen, loss) in zip(budgets.tolist(), ends.tolist(), strict=True):
        outside = budget > max(spent) or any(
            not min(reached[name]) <= value[0] <= max(reached[name])
            for name, value in (("params", params), ("samples", seen))
        )
        optima.append(Optimum(budget, Interval(*params), Interval(*seen), Interval(*loss), outside))
    return optima


def _best(fitted: Fit, theta_SP: np.ndarray, products: np.ndarray) -> np.ndarray:
    """(S, budgets, 3): logs of N, D and the loss there. Samples whose loss rises with N or D have no optimum."""
    found = []
    first = int(fitted.law.floor)
    for theta in theta_SP:
        (log_a, alpha), (log_b, beta) = theta[first:].reshape(-1, 2)
        if alpha <= 0 or beta <= 0:
            continue
        size, data = fitted.centre_T
        log_g = (np.log(alpha) + log_a + alpha * size - np.log(beta) - log_b - beta * data) / (alpha + beta)
        log_n = log_g + np.log(products) * beta / (alpha + beta)
        logs = np.stack([log_n, np.log(products) - log_n], axis=1)
        found.append(np.column_stack([logs, np.log(fitted.predict(logs, theta))]))
    return np.array(found)
