"""Scaling laws and their fit: L = E + A / N^alpha + B / D^beta, either term alone, with or without the floor E.

1. A law is fitted to the logs of the losses, so that residuals are relative errors. A Huber loss limits the influence
   of single bad runs. Its width follows the spread of the residuals (1.345 robust standard deviations).
2. For each point of a grid of exponents, the other coefficients follow by non-negative least squares. Bounded least
   squares (scipy) starts from the best of these points.
3. Intervals are a seeded bootstrap of residuals, which keeps the design: the residuals, corrected for the leverage of
   each run, are drawn with replacement and the law is fitted again. Student's t over the degrees of freedom widens the
   intervals further: with few runs the spread itself is not well known.

Hoffmann et al. 2022 (Approach 3) is the model. Letters: R runs, T terms, P parameters, S bootstrap samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Grid of exponents from which the search starts."""
STARTS = 4
"""Number of the best grid points from which a local search starts."""
HUBER = 1.345
"""Beyond this many standard deviations the loss is linear in the residual: 95 % efficient on Gaussian noise."""
MAD = 1.4826
"""Standard deviation of a Gaussian divided by its median absolute deviation."""
LEAST_WIDTH = 1e-9
STEEPEST, MARGIN = 8.0, 20.0
"""Bounds: of the size of an exponent, and of the log of a coefficient below and above the logs of the losses."""
EVALUATIONS = 300
"""Most evaluations of one local search. Searches along flat valleys need more than 100."""


@dataclass(frozen=True)
class Law:
    """The form of a law: which variables have a term, and whether there is a floor."""

    variables: tuple[str, ...]
    floor: bool = True

    @property
    def size(self) -> int:
        """Number of parameters."""
        return 2 * len(self.variables) + self.floor

    @property
    def formula(self) -> str:
        """The law as text, such as `L = E + A / N^alpha`."""
        letters = {"params": ("A", "N", "alpha"), "samples": ("B", "D", "beta")}
        terms = ["{} / {}^{}".format(*letters[variable]) for variable in self.variables]
        return "L = " + " + ".join((["E"] if self.floor else []) + terms)

    def log_loss(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Return log L of each run, (R,). Arguments as in `_parts`."""
        losses_R: np.ndarray = np.logaddexp.reduce(self._parts(theta_P, logs_RT), axis=1)
        return losses_R

    def slopes(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Return the derivative of log L by each parameter, (R,P): the share of each part in the loss."""
        parts, terms = self._parts(theta_P, logs_RT), int(self.floor)
        shares = np.exp(parts - np.logaddexp.reduce(parts, axis=1, keepdims=True))
        slopes_RP = np.empty((len(logs_RT), self.size))
        slopes_RP[:, :terms] = shares[:, :terms]
        slopes_RP[:, terms::2] = shares[:, terms:]
        slopes_RP[:, terms + 1 :: 2] = -shares[:, terms:] * logs_RT
        return slopes_RP

    def _parts(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Logs of floor and terms. theta_P: log E, then log coefficient and exponent of each term."""
        terms = int(self.floor)
        parts = np.empty((len(logs_RT), terms + logs_RT.shape[1]))
        parts[:, :terms] = theta_P[:terms]
        parts[:, terms:] = theta_P[terms::2] - theta_P[terms + 1 :: 2] * logs_RT
        return parts


@dataclass(frozen=True)
class Fit:
    """A fitted law. Variables are divided by their geometric mean, so that parameters are nearly uncorrelated."""

    law: Law
    theta_P: np.ndarray
    centre_T: np.ndarray
    """Logs of the variables' geometric means."""
    logs_RT: np.ndarray
    residuals_R: np.ndarray
    """log(measured loss / fitted loss)."""
    width: float
    """Width of the Huber loss, in log loss."""
    samples_SP: np.ndarray
    """Parameters fitted to bootstrap samples; empty before `bootstrap`."""

    @property
    def freedom(self) -> int:
        """Degrees of freedom: runs minus parameters."""
        return len(self.residuals_R) - self.law.size

    @property
    def noise(self) -> float:
        """Standard deviation of a run around the law, relative to its loss."""
        return float(np.sqrt((self.residuals_R**2).sum() / max(self.freedom, 1)))

    def coefficients(self, theta_P: np.ndarray) -> dict[str, float]:
        """Return E, A, alpha, B, beta as in the formula."""
        named = {"E": float(np.exp(theta_P[0]))} if self.law.floor else {}
        names = {"params": ("A", "alpha"), "samples": ("B", "beta")}
        pairs = theta_P[int(self.law.floor) :].reshape(-1, 2)
        for variable, (log_size, exponent), centre in zip(self.law.variables, pairs, self.centre_T, strict=True):
            size, name = names[variable]
            named |= {size: float(np.exp(min(log_size + exponent * centre, 700))), name: float(exponent)}
        return named

    def predict(self, logs_RT: np.ndarray, theta_P: np.ndarray | None = None) -> np.ndarray:
        """Return the losses at the given logs of the variables. theta_P: default the fitted parameters."""
        theta = self.theta_P if theta_P is None else theta_P
        loss_RT: np.ndarray = np.exp(self.law.log_loss(theta, np.atleast_2d(logs_RT) - self.centre_T))
        return loss_RT

    def widened(self, estimate: float | np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the samples, spread around the estimate as Student's t instead of a Gaussian."""
        factor = stats.t.ppf(0.975, max(self.freedom, 1)) / stats.norm.ppf(0.975)
        return np.asarray(estimate + (samples - estimate) * factor)


def fit(law: Law, logs_RT: np.ndarray, loss_R: np.ndarray) -> Fit:
    """Fit a law to runs.

    Args:
        law: The form.
        logs_RT: Natural logs of the law's variables.
        loss_R: Losses, positive.

    Returns:
        The best fit found, without bootstrap samples.
    """
    centre = logs_RT.mean(axis=0)
    x, y = logs_RT - centre, np.log(loss_R)
    theta, width = _search(law, x, y)
    return Fit(law, theta, centre, logs_RT, y - law.log_loss(theta, x), width, np.empty((0, law.size)))


def bootstrap(fitted: Fit, count: int, seed: int) -> Fit:
    """Return the same fit with `samples_SP`: parameters fitted to `count` resampled sets of losses."""
    rng = np.random.default_rng(seed)
    law, x = fitted.law, fitted.logs_RT - fitted.centre_T
    level = law.log_loss(fitted.theta_P, x)
    # How much of each run's own residual the fit absorbs.
    leverage_R = (np.linalg.qr(law.slopes(fitted.theta_P, x))[0] ** 2).sum(axis=1)
    # As the jackknife does. With its square root the intervals of few runs would be too narrow.
    pool = fitted.residuals_R / np.maximum(1 - leverage_R, 0.1)
    pool = pool - pool.mean()
    found = [_descend(law, fitted.theta_P, x, level + rng.choice(pool, len(pool)), fitted.width) for _ in range(count)]
    return replace(fitted, samples_SP=np.array([each.x for each in found]))


def _search(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> tuple[np.ndarray, float]:
    """Parameters and the width of the Huber loss, in turn; the first round with the Huber loss tries all starts."""
    starts = _starts(law, x_RT, y_R)
    theta = _best(_descend(law, start, x_RT, y_R, None) for start in starts)
    for tried in (starts, [], []):
        width = max(HUBER * MAD * float(np.median(np.abs(y_R - law.log_loss(theta, x_RT)))), LEAST_WIDTH)
        theta = _best(_descend(law, start, x_RT, y_R, width) for start in (theta, *tried))
    return theta, width


def _best(found: Iterable[optimize.OptimizeResult]) -> np.ndarray:
    return np.asarray(min(found, key=lambda each: each.cost).x)


def _starts(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> list[np.ndarray]:
    """The best points of the grid of exponents; coefficients by non-negative least squares on the losses."""
    loss = np.exp(y_R)
    scored = []
    for exponents in itertools.product(EXPONENTS, repeat=x_RT.shape[1]):
        columns = np.concatenate([np.ones((len(loss), int(law.floor))), np.exp(-x_RT * exponents)], axis=1)
        sizes, rest = optimize.nnls(columns / loss[:, None], np.ones(len(loss)))
        logs = np.log(np.maximum(sizes, 1e-4 * loss.min()))
        pairs = np.stack([logs[int(law.floor) :], exponents], axis=1).reshape(-1)
        scored.append((rest, np.concatenate([logs[: int(law.floor)], pairs])))
    return [start for _, start in sorted(scored, key=lambda each: each[0])[:STARTS]]


def _descend(
    law: Law, start_P: np.ndarray, x_RT: np.ndarray, y_R: np.ndarray, width: float | None
) -> optimize.OptimizeResult:
    """Minimise from one start. width: of the Huber loss; None for plain squares."""
    lower_P, upper_P = np.full(law.size, y_R.min() - MARGIN), np.full(law.size, y_R.max() + MARGIN)
    lower_P[int(law.floor) + 1 :: 2], upper_P[int(law.floor) + 1 :: 2] = -STEEPEST, STEEPEST
    return optimize.least_squares(
        lambda theta_P: law.log_loss(theta_P, x_RT) - y_R,
        np.clip(start_P, lower_P, upper_P),
        jac=lambda theta_P: law.slopes(theta_P, x_RT),
        bounds=(lower_P, upper_P),
        method="dogbox",  # faster here than `trf`, with the same minima
        loss="linear" if width is None else "huber",
        f_scale=width or 1.0,
        xtol=1e-7,
        ftol=1e-9,
        max_nfev=EVALUATIONS,
    )
