"""Scaling laws and their fit: L = E + A / N^alpha + B / D^beta, either term alone, with the floor E or without.

1. A law is fitted to the logs of the losses: residuals are shares, and a Huber loss keeps single bad runs from
   steering. Its width follows the residuals' own spread (1.345 robust standard deviations).
2. For a net of exponents the other coefficients follow by non-negative least squares; MINPACK descends from the best.
3. Intervals are a seeded bootstrap: the fit's residuals, widened by each run's leverage, are dealt anew to the runs,
   which keeps the design, and the law is fitted again. Student's t over the degrees of freedom widens them further:
   with few runs the spread itself is not well known.

Hoffmann et al. 2022 (Approach 3) is the model. Letters: R runs, T terms, P parameters, S bootstrap samples.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

NET = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Exponents from which the search starts."""
STARTS = 4
"""How many of the net's best points are descended from."""
HUBER = 1.345
"""Residuals beyond this many standard deviations count by their size, not their square: 95 % efficient on Gaussians."""
MAD = 1.4826
"""From the median absolute deviation to the standard deviation of a Gaussian."""
LEAST_WIDTH = 1e-9
STEEPEST, SMALLEST = 8.0, 20.0
"""Bounds of an exponent's size, and of a coefficient's log beside the losses': beyond, nothing changes."""


@dataclass(frozen=True)
class Law:
    """The form: which variables have a term, and whether there is a floor."""

    variables: tuple[str, ...]
    floor: bool = True

    @property
    def size(self) -> int:
        """Parameters."""
        return 2 * len(self.variables) + self.floor

    @property
    def formula(self) -> str:
        """As text: `L = E + A / N^alpha`."""
        letters = {"params": ("A", "N", "alpha"), "samples": ("B", "D", "beta")}
        terms = ["{} / {}^{}".format(*letters[variable]) for variable in self.variables]
        return "L = " + " + ".join((["E"] if self.floor else []) + terms)

    def log_loss(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """log L of each run."""
        mixed_RT: np.ndarray = np.logaddexp.reduce(self._parts(theta_P, logs_RT), axis=1)
        return mixed_RT

    def slopes(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """(R,P): derivative of log L by each parameter. A part's share of the loss is all there is to it."""
        parts = self._parts(theta_P, logs_RT)
        shares = np.exp(parts - np.logaddexp.reduce(parts, axis=1, keepdims=True))
        terms = shares[:, int(self.floor) :]
        pairs = np.stack([terms, -terms * logs_RT], axis=2).reshape(len(logs_RT), -1)
        return np.concatenate([shares[:, : int(self.floor)], pairs], axis=1)

    def _parts(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Logs of floor and terms. theta: log E, then log coefficient and exponent of each term."""
        pairs_T2 = theta_P[int(self.floor) :].reshape(-1, 2)
        terms = pairs_T2[:, 0] - pairs_T2[:, 1] * logs_RT
        floor = np.full((len(logs_RT), int(self.floor)), theta_P[0])
        return np.concatenate([floor, terms], axis=1)


@dataclass(frozen=True)
class Fit:
    """A fitted law. Parameters belong to variables over their geometric mean: so they hardly depend on each other."""

    law: Law
    theta_P: np.ndarray
    centre_T: np.ndarray
    """Logs of the variables' geometric means."""
    logs_RT: np.ndarray
    residuals_R: np.ndarray
    """log of measured over fitted loss."""
    width: float
    """Huber's, in log loss."""
    samples_SP: np.ndarray
    """Parameters fitted to bootstrap samples; none before `bootstrap`."""

    @property
    def freedom(self) -> int:
        """Degrees of freedom: runs less parameters."""
        return len(self.residuals_R) - self.law.size

    @property
    def noise(self) -> float:
        """Standard deviation of a run around the law, as a share of its loss."""
        return float(np.sqrt((self.residuals_R**2).sum() / max(self.freedom, 1)))

    def coefficients(self, theta_P: np.ndarray) -> dict[str, float]:
        """E, A, alpha, B, beta as the formula has them."""
        named = {"E": float(np.exp(theta_P[0]))} if self.law.floor else {}
        names = {"params": ("A", "alpha"), "samples": ("B", "beta")}
        pairs = theta_P[int(self.law.floor) :].reshape(-1, 2)
        for variable, (log_size, exponent), centre in zip(self.law.variables, pairs, self.centre_T, strict=True):
            size, name = names[variable]
            named |= {size: float(np.exp(min(log_size + exponent * centre, 700))), name: float(exponent)}
        return named

    def predict(self, logs_RT: np.ndarray, theta_P: np.ndarray | None = None) -> np.ndarray:
        """Losses where the variables' logs are as given."""
        theta = self.theta_P if theta_P is None else theta_P
        loss_RT: np.ndarray = np.exp(self.law.log_loss(theta, np.atleast_2d(logs_RT) - self.centre_T))
        return loss_RT

    def widened(self, estimate: float | np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Samples around an estimate, spread as Student's t instead of a Gaussian."""
        factor = stats.t.ppf(0.975, max(self.freedom, 1)) / stats.norm.ppf(0.975)
        return np.asarray(estimate + (samples - estimate) * factor)


def fit(law: Law, logs_RT: np.ndarray, loss_R: np.ndarray) -> Fit:
    """The law that fits best. logs: of the law's variables, natural; loss: positive."""
    centre = logs_RT.mean(axis=0)
    x, y = logs_RT - centre, np.log(loss_R)
    theta, width = _search(law, x, y)
    residuals = y - law.log_loss(theta, x)
    return Fit(law, theta, centre, logs_RT, residuals, width, np.empty((0, law.size)))


def bootstrap(fitted: Fit, count: int, seed: int) -> Fit:
    """The same with `samples_SP`: `count` fits to what the runs might have given."""
    rng = np.random.default_rng(seed)
    law, x = fitted.law, fitted.logs_RT - fitted.centre_T
    level = law.log_loss(fitted.theta_P, x)
    # As the jackknife does: the root of it would make them as wide as the noise, and intervals of few runs too narrow.
    pool = fitted.residuals_R / np.maximum(1 - _leverage(law, fitted.theta_P, x), 0.1)
    pool = pool - pool.mean()
    samples = [
        _descend(law, fitted.theta_P, x, level + rng.choice(pool, len(pool)), fitted.width)[0] for _ in range(count)
    ]
    return Fit(**{**vars(fitted), "samples_SP": np.array(samples)})


def _leverage(law: Law, theta_P: np.ndarray, x_RT: np.ndarray) -> np.ndarray:
    """How much of each run's own residual the fit swallows."""
    q, _ = np.linalg.qr(law.slopes(theta_P, x_RT))
    return np.asarray((q**2).sum(axis=1))


def _search(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> tuple[np.ndarray, float]:
    starts = _starts(law, x_RT, y_R)
    found = [_descend(law, start, x_RT, y_R, np.inf) for start in starts]
    theta, width = min(found, key=lambda each: each[1])[0], np.inf
    for _ in range(3):
        width = max(HUBER * MAD * float(np.median(np.abs(y_R - law.log_loss(theta, x_RT)))), LEAST_WIDTH)
        found = [_descend(law, start, x_RT, y_R, width) for start in (theta, *starts)]
        theta = min(found, key=lambda each: each[1])[0]
    return theta, width


def _starts(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> list[np.ndarray]:
    """The best of the net of exponents, coefficients by non-negative least squares on the losses themselves."""
    loss = np.exp(y_R)
    scored = []
    for exponents in itertools.product(NET, repeat=x_RT.shape[1]):
        columns = np.concatenate([np.ones((len(loss), int(law.floor))), np.exp(-x_RT * exponents)], axis=1)
        sizes, rest = optimize.nnls(columns / loss[:, None], np.ones(len(loss)))
        logs = np.log(np.maximum(sizes, 1e-4 * loss.min()))
        pairs = np.stack([logs[int(law.floor) :], exponents], axis=1).reshape(-1)
        scored.append((rest, np.concatenate([logs[: int(law.floor)], pairs])))
    return [start for _, start in sorted(scored, key=lambda each: each[0])[:STARTS]]


def _descend(
    law: Law, start_P: np.ndarray, x_RT: np.ndarray, y_R: np.ndarray, width: float
) -> tuple[np.ndarray, float]:
    """Parameters and Huber loss from one start. MINPACK descends squares: Huber's loss is that of bent residuals."""

    def bent(theta_P: np.ndarray) -> np.ndarray:
        return _bend(y_R - law.log_loss(theta_P, x_RT), width)[0]

    def slopes(theta_P: np.ndarray) -> np.ndarray:
        _, slope = _bend(y_R - law.log_loss(theta_P, x_RT), width)
        slopes: np.ndarray = -slope[:, None] * law.slopes(theta_P, x_RT)
        return slopes

    with np.errstate(all="ignore"), warnings.catch_warnings():
        # A term that vanishes runs off to minus infinity, which `_bounded` takes back.
        warnings.simplefilter("ignore", RuntimeWarning)
        theta, _ = optimize.leastsq(bent, start_P, Dfun=slopes, xtol=1e-7, ftol=1e-9, maxfev=100)
    theta = _bounded(law, theta, y_R)
    return theta, float((bent(theta) ** 2).sum())


def _bounded(law: Law, theta_P: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """Stopped where a floor or a term no longer counts."""
    lower = np.full(law.size, y_R.min() - SMALLEST)
    upper = np.full(law.size, y_R.max() + SMALLEST)
    lower[int(law.floor) + 1 :: 2], upper[int(law.floor) + 1 :: 2] = -STEEPEST, STEEPEST
    within_P: np.ndarray = np.clip(np.nan_to_num(theta_P, nan=0.0), lower, upper)
    return within_P


def _bend(residuals_R: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Residuals whose squares are twice Huber's loss, and their derivative."""
    size = np.abs(residuals_R)
    if not np.isfinite(width) or (size <= width).all():
        return residuals_R, np.ones_like(residuals_R)
    outer = np.sqrt(np.maximum(2 * width * size - width**2, width**2))
    inside = size <= width
    return np.where(inside, residuals_R, np.sign(residuals_R) * outer), np.where(inside, 1.0, width / outer)
