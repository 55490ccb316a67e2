"""Whether the data support a law, with the reasons in words.

1. Before the fit: there must be enough different values of each variable, enough settings, and enough runs.
2. The loss must fall with each variable: a one-sided t-test on the logs, at 1 %. It takes the mean of each setting, and
   errors that hold if noise differs between settings (HC3).
3. After the fit: each exponent must be significantly different from 0, the effect of each term larger than its
   interval, and the floor significantly different from 0. Otherwise the data show no curvature.
4. The largest settings, predicted from the others, must lie within the predicted intervals.
5. If settings were run with several seeds, the misfit of the law is compared with the spread of the seeds. A misfit is
   a caution, not a reason to refuse the law.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from segvol_pl.experiments.laws import Fit, Law, bootstrap, fit

VALUES, SPARE, SPARE_SETTINGS = 3, 3, 2
"""Least number of different values of a variable; least number of runs, and of settings, beyond that of parameters."""
TREND, MISFIT, LEVEL = 0.01, 0.01, 0.95
LEAST_FLOOR = 0.01
"""The interval of the floor must lie above this share of the smallest loss."""
MOST_LEVERAGE = 0.9
"""Settings that a trend follows more closely than this count as if it followed them so far."""
SYMBOLS = {"params": "N", "samples": "D"}
EXPONENTS = {"params": "alpha", "samples": "beta"}


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def plain(self) -> dict[str, float]:
        """Return it as a dict for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class HeldOut:
    """The largest settings, predicted from the others."""

    settings: int
    runs: int
    error: float
    """Mean of |predicted / measured - 1|."""
    inside: int
    """Runs within their predicted interval."""
    predictions: list[dict[str, float]]


@dataclass(frozen=True)
class Verdict:
    """A law, its fit if one was possible, and the verdict."""

    law: Law
    where: str
    """Which runs it was fitted to."""
    runs: int
    reasons: list[str]
    """Why it is not supported; empty if it is."""
    cautions: list[str] = field(default_factory=list)
    fit: Fit | None = None
    coefficients: dict[str, Interval] = field(default_factory=dict)
    together: dict[str, Interval] = field(default_factory=dict)
    """Wider intervals that contain all coefficients at once."""
    held_out: HeldOut | None = None

    @property
    def supported(self) -> bool:
        """Whether the data support the law."""
        return not self.reasons


def judge(
    law: Law, logs_RT: np.ndarray, loss_R: np.ndarray, share: float, count: int, seed: int, where: str = "all runs"
) -> Verdict:
    """Fit a law and judge whether the data support it.

    Args:
        law: The form.
        logs_RT: Natural logs of the law's variables.
        loss_R: Losses.
        share: Share of the settings to hold out, the largest ones.
        count: Number of bootstrap samples.
        seed: Seed of the bootstrap.
        where: Description of the runs.

    Returns:
        The verdict with fit, intervals and held-out predictions.
    """
    # Without a trend there is nothing to fit: a fitted form would be that of the noise.
    if reasons := _too_few(law, logs_RT) or _trends(law, logs_RT, loss_R):
        return Verdict(law, where, len(loss_R), reasons)
    fitted = bootstrap(fit(law, logs_RT, loss_R), count, seed)
    reasons = _doubts(fitted, loss_R)
    held_out = extrapolate(law, logs_RT, loss_R, share, count, seed)
    # Poor extrapolation follows from the reasons above: it is reported only without them.
    if not reasons and held_out is not None and held_out.inside < (held_out.runs + 1) // 2:
        outside = f"{held_out.runs - held_out.inside} of the {held_out.runs} largest runs"
        reasons.append(
            f"it does not extrapolate: {outside} lie outside the interval predicted from the others "
            f"(error {held_out.error:.1%})"
        )
    cautions = _misfit(fitted, loss_R)
    if held_out is None:
        cautions.append("too few settings to hold out the largest ones: extrapolation is untested")
    alone, together = intervals(fitted)
    return Verdict(law, where, len(loss_R), reasons, cautions, fitted, alone, together, held_out)


def _too_few(law: Law, logs_RT: np.ndarray) -> list[str]:
    reasons = []
    for variable, column in zip(law.variables, logs_RT.T, strict=True):
        values = len(np.unique(column))
        if values < VALUES + law.floor:
            reasons.append(f"too few values of {SYMBOLS[variable]}: {values}, needs {VALUES + law.floor}")
    needed = law.size + SPARE
    if len(logs_RT) < needed:
        reasons.append(f"too few runs: {len(logs_RT)}, its {law.size} parameters need {needed}")
    settings = len(np.unique(logs_RT, axis=0))
    if not reasons and settings < law.size + SPARE_SETTINGS:
        different = "different settings, since seeds of one setting may share its noise"
        needed = law.size + SPARE_SETTINGS
        reasons.append(f"too few {different}: {settings}, its {law.size} parameters need {needed}")
    return reasons


def _trends(law: Law, logs_RT: np.ndarray, loss_R: np.ndarray) -> list[str]:
    """A one-sided t-test of the slope of log loss over each log variable, in one linear model of all variables."""
    settings, setting_R = np.unique(logs_RT, axis=0, return_inverse=True)
    means_G = np.bincount(setting_R.reshape(-1), np.log(loss_R)) / np.bincount(setting_R.reshape(-1))
    design = np.column_stack([np.ones(len(settings)), settings])
    inverse = np.linalg.pinv(design)
    slopes, freedom = inverse @ means_G, len(settings) - design.shape[1]
    leverage_G = (design * inverse.T).sum(axis=1)
    rest_G = (means_G - design @ slopes) / np.maximum(1 - leverage_G, 1 - MOST_LEVERAGE)
    errors = np.sqrt(np.maximum((inverse**2) @ rest_G**2, 1e-300))
    reasons = []
    for variable, slope, error in zip(law.variables, slopes[1:], errors[1:], strict=True):
        chance = float(stats.t.cdf(slope / error, freedom))
        if chance > TREND / len(law.variables):
            measured = f"{slope:+.4f} in log loss per e-fold (p = {chance:.2g})"
            reasons.append(f"the loss does not fall with {SYMBOLS[variable]}: {measured}")
    return reasons


def _doubts(fitted: Fit, loss_R: np.ndarray) -> list[str]:
    law, alone, reasons = fitted.law, intervals(fitted)[0], []
    for place, variable in enumerate(law.variables):
        exponent = alone[EXPONENTS[variable]]
        if not exponent.low > 0:
            reasons.append(f"{EXPONENTS[variable]} is not significantly different from 0: {_shown(exponent)}")
            continue
        effect = _effect(fitted, place)
        if effect.high - effect.low > effect.value:
            change = f"{SYMBOLS[variable]} changes the loss by {effect.value:.1%} over the runs"
            reasons.append(
                f"the interval is wider than the effect: {change}, interval {effect.low:.1%} to {effect.high:.1%}"
            )
    if law.floor and alone["E"].low < LEAST_FLOOR * loss_R.min():
        reasons.append(f"no curvature: the floor E is not significantly different from 0: {_shown(alone['E'])}")
    return reasons


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3g}, interval {interval.low:.3g} to {interval.high:.3g}"


def _effect(fitted: Fit, place: int) -> Interval:
    """Loss at the smallest value of the variable / loss at its largest value - 1, the others at their means."""
    ends = np.tile(fitted.centre_T, (2, 1))
    ends[:, place] = fitted.logs_RT[:, place].min(), fitted.logs_RT[:, place].max()
    estimate, samples = (
        np.log(losses[..., 0] / losses[..., 1])
        for losses in (fitted.predict(ends), fitted.predict(ends, fitted.samples_SP))
    )
    low, high = np.quantile(fitted.widened(estimate, samples), tails())
    return Interval(*(float(np.expm1(value)) for value in (estimate, low, high)))


def tails() -> tuple[float, float]:
    """Return the quantiles at the ends of an interval of `LEVEL`."""
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return a mean with its interval by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(tails()[1], len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    mean = float(np.mean(values))
    return Interval(mean, float(mean - half), float(mean + half))


def intervals(fitted: Fit) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """Return intervals of each coefficient alone, and of all together.

    95 % of the bootstrap samples lie within all of the latter at once.
    """
    named = fitted.coefficients(fitted.theta_P)
    samples = [fitted.coefficients(theta) for theta in fitted.samples_SP]
    # E, A and B are positive and spread by factors, exponents by amounts.
    to = {name: np.log if name in ("E", "A", "B") else np.asarray for name in named}
    back = {name: np.exp if name in ("E", "A", "B") else np.asarray for name in named}
    estimate = np.array([to[name](value) for name, value in named.items()])
    spread_SP = np.array([[to[name](sample[name]) for name in named] for sample in samples])
    spread_SP = fitted.widened(estimate, spread_SP)
    alone = np.quantile(spread_SP, tails(), axis=0)
    # With few settings the quantiles lean to one side by chance: the shorter side of an exponent is half of both.
    leaning = [name in EXPONENTS.values() for name in named]
    even = estimate + np.array([[-0.5], [0.5]]) * (alone[1] - alone[0])
    wide = np.stack([np.minimum(alone[0], even[0]), np.maximum(alone[1], even[1])])
    alone = np.where(leaning, wide, alone)
    half = np.maximum(np.where(spread_SP < estimate, estimate - alone[0], alone[1] - estimate), 1e-12)
    wider = max(1.0, float(np.quantile((np.abs(spread_SP - estimate) / half).max(axis=1), LEVEL)))
    both = estimate + (alone - estimate) * wider

    def named_intervals(ends: np.ndarray) -> dict[str, Interval]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # exp of an end that no data bound
            return {
                name: Interval(named[name], float(back[name](ends[0, place])), float(back[name](ends[1, place])))
                for place, name in enumerate(named)
            }

    return named_intervals(alone), named_intervals(both)


# ---- predictions ----


def predicted(fitted: Fit, logs_RT: np.ndarray, noise: bool, seed: int = 0) -> list[Interval]:
    """Return losses with intervals: of the law, or with `noise`, of a single run."""
    estimate = np.log(fitted.predict(logs_RT))
    samples_SR = np.log(fitted.predict(logs_RT, fitted.samples_SP))
    samples_SR = fitted.widened(estimate, samples_SR)
    if noise:
        rng = np.random.default_rng(seed)
        samples_SR = samples_SR + fitted.noise * rng.standard_t(max(fitted.freedom, 1), samples_SR.shape)
    low, high = np.quantile(samples_SR, tails(), axis=0)
    return [Interval(*row) for row in np.exp(np.stack([estimate, low, high], axis=1)).tolist()]


def extrapolate(
    law: Law, logs_RT: np.ndarray, loss_R: np.ndarray, share: float, count: int, seed: int
) -> HeldOut | None:
    """Predict the largest settings (by N x D) from the others. None if the others are too few for the law."""
    settings, setting_R = np.unique(logs_RT, axis=0, return_inverse=True)
    largest = np.argsort(settings.sum(axis=1), kind="stable")[::-1][: max(1, round(share * len(settings)))]
    held_R = np.isin(setting_R.reshape(-1), largest)
    if _too_few(replace(law, floor=False), logs_RT[~held_R]) or (~held_R).sum() < law.size + SPARE:
        return None
    fitted = bootstrap(fit(law, logs_RT[~held_R], loss_R[~held_R]), count, seed)
    expected = predicted(fitted, logs_RT[held_R], noise=True, seed=seed)
    pairs = list(zip(expected, loss_R[held_R].tolist(), strict=True))
    return HeldOut(
        settings=len(largest),
        runs=len(pairs),
        error=float(np.mean([abs(interval.value / loss - 1) for interval, loss in pairs])),
        inside=sum(interval.low <= loss <= interval.high for interval, loss in pairs),
        predictions=[{"measured": loss, **interval.plain} for interval, loss in pairs],
    )


def _misfit(fitted: Fit, loss_R: np.ndarray) -> list[str]:
    """F-test of lack of fit: misfit of the settings' means, compared with the spread of seeds."""
    settings, setting_R = np.unique(fitted.logs_RT, axis=0, return_inverse=True)
    y, count = np.log(loss_R), np.bincount(setting_R.reshape(-1))
    inner, outer = len(y) - len(settings), len(settings) - fitted.law.size
    if inner < 1 or outer < 1:
        return ["no setting was run with several seeds: misfit and noise cannot be separated"] if inner < 1 else []
    means = np.bincount(setting_R.reshape(-1), y) / count
    pure = float(((y - means[setting_R.reshape(-1)]) ** 2).sum()) / inner
    missed = float((count * (means - np.log(fitted.predict(settings))) ** 2).sum()) / outer
    chance = float(stats.f.sf(missed / max(pure, 1e-300), outer, inner))
    if chance > MISFIT:
        return []
    return [f"the misfit of the settings' means exceeds the spread of the seeds (F-test, p = {chance:.2g})"]


def plain(judged: Verdict) -> dict[str, Any]:
    """Return a verdict as a dict for JSON."""
    return {
        "law": judged.law.formula,
        "where": judged.where,
        "runs": judged.runs,
        "supported": judged.supported,
        "reasons": judged.reasons,
        "cautions": judged.cautions,
        "coefficients": {name: interval.plain for name, interval in judged.coefficients.items()},
        "together": {name: interval.plain for name, interval in judged.together.items()},
        "noise": judged.fit.noise if judged.fit else None,
        "held_out": vars(judged.held_out) if judged.held_out else None,
    }
