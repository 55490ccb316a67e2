"""Scaling laws and their fit: L = E + A / N^alpha + B / D^beta, either term alone, with or without the floor E.

1. A law is fitted to the logs of the losses, so that residuals are relative errors. A Huber loss limits the influence
   of single bad runs. Its width follows the spread of the residuals (1.345 robust standard deviations).
2. For each point of a grid of exponents, the other coefficients follow by non-negative least squares. A descent starts
   from every point of the grid, all of them at once (`minimise`). The best one is polished by scipy.
3. Intervals are a seeded bootstrap by settings with random weights: every setting, with all its runs, gets a weight
   drawn from an exponential distribution, and the law is fitted again. Noise may differ between settings and be shared
   by the seeds of one. No setting is ever lost, as it is where runs are drawn.
   The intervals are widened by what the fit takes of the residuals (settings / degrees of freedom), and by Student's t
   over the degrees of freedom: with few settings the spread itself is not well known.

Hoffmann et al. 2022 (Approach 3) is the model. Letters: R runs, T terms, P parameters, S bootstrap samples or other
problems solved at once, G settings (different values of the variables).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Grid of exponents from which the search starts."""
STARTS = 8
"""Number of the best results of the first round from which the next rounds start."""
HUBER = 1.345
"""Beyond this many standard deviations the loss is linear in the residual: 95 % efficient on Gaussian noise."""
MAD = 1.4826
"""Standard deviation of a Gaussian divided by its median absolute deviation."""
LEAST_WIDTH = 1e-9
STEEPEST, MARGIN = 8.0, 20.0
"""Bounds: of the size of an exponent, and of the log of a coefficient below and above the logs of the losses."""
EVALUATIONS = 300
"""Most evaluations of one local search. Searches along flat valleys need more than 100."""
ROUNDS = 3
"""How often the width of the Huber loss follows from the residuals."""
FIRST_EVALUATIONS = 30
"""The same of the first round, which only finds the starts of the next ones."""
DAMPING, DAMPED, STILL, STRIDE = 1e-3, 1e9, 1e-10, 2.0
"""First damping of a search; it ends with the second one, or if the objective falls by less than the share `STILL`.
`STRIDE`: longest step of a parameter."""


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
        """Return log L of each run, (R,), or (S,R) for parameters (S,P). Arguments as in `_parts`."""
        return self.log_loss_and_slopes(theta_P, logs_RT)[0]

    def slopes(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Return the derivative of log L by each parameter, (R,P) or (S,R,P): the share of each part in the loss."""
        return self.log_loss_and_slopes(theta_P, logs_RT)[1]

    def log_loss_and_slopes(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return both at the price of one."""
        parts, terms = self._parts(theta_P, logs_RT), int(self.floor)
        largest = parts.max(axis=-1, keepdims=True)
        shares = np.exp(parts - largest)
        total = shares.sum(axis=-1, keepdims=True)
        shares /= total
        slopes_RP = np.empty((*parts.shape[:-1], self.size))
        slopes_RP[..., :terms] = shares[..., :terms]
        slopes_RP[..., terms::2] = shares[..., terms:]
        slopes_RP[..., terms + 1 :: 2] = -shares[..., terms:] * logs_RT
        return (largest + np.log(total))[..., 0], slopes_RP

    def _parts(self, theta_P: np.ndarray, logs_RT: np.ndarray) -> np.ndarray:
        """Logs of floor and terms. theta_P: log E, then log coefficient and exponent of each term; (P,) or (S,P)."""
        terms, theta = int(self.floor), theta_P[..., None, :]
        parts = np.empty((*theta_P.shape[:-1], len(logs_RT), terms + logs_RT.shape[1]))
        parts[..., :terms] = theta[..., :terms]
        parts[..., terms:] = theta[..., terms::2] - theta[..., terms + 1 :: 2] * logs_RT
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
    """Parameters fitted to bootstrap samples; empty before `bootstrap`. They spread too little: see `widened`."""

    @property
    def setting_R(self) -> np.ndarray:
        """Number of each run's setting, from 0: runs with the same values of all variables, such as seeds."""
        return np.unique(self.logs_RT, axis=0, return_inverse=True)[1].reshape(-1)

    @property
    def freedom(self) -> int:
        """Degrees of freedom: settings minus parameters. The seeds of a setting may share its noise."""
        return len(np.unique(self.setting_R)) - self.law.size

    @property
    def log_losses_R(self) -> np.ndarray:
        """Logs of the measured losses."""
        level_R = self.law.log_loss(self.theta_P, self.logs_RT - self.centre_T)
        return np.asarray(level_R + self.residuals_R)

    @property
    def spread(self) -> float:
        """Robust standard deviation of the residuals: outliers do not raise it."""
        return self.width / HUBER

    @property
    def noise(self) -> float:
        """Standard deviation of a run around the law, relative to its loss."""
        return float(np.sqrt((self.residuals_R**2).sum() / max(len(self.residuals_R) - self.law.size, 1)))

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
        """Return the losses at the given logs of the variables, (R,), or (S,R) for parameters (S,P).

        theta_P: default the fitted parameters."""
        theta = self.theta_P if theta_P is None else theta_P
        loss_RT: np.ndarray = np.exp(self.law.log_loss(theta, np.atleast_2d(logs_RT) - self.centre_T))
        return loss_RT

    def widened(self, estimate: float | np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the samples, spread around the estimate as far as their fits lacked, and as Student's t."""
        freedom = max(self.freedom, 1)
        # As the jackknife does. With its square root intervals of few settings would be too narrow.
        factor = (freedom + self.law.size) / freedom * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
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
    """Return the same fit with `samples_SP`: parameters fitted with `count` sets of random weights of the settings."""
    setting_R, x = fitted.setting_R, fitted.logs_RT - fitted.centre_T
    weight_SG = np.random.default_rng(seed).exponential(size=(count, setting_R.max() + 1))
    starts_SP = np.tile(fitted.theta_P, (count, 1))
    weight_SR = weight_SG[:, setting_R]
    return replace(
        fitted, samples_SP=minimise(fitted.law, starts_SP, x, fitted.log_losses_R, fitted.width, weight_SR)[0]
    )


def _search(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> tuple[np.ndarray, float]:
    """Parameters and the width of the Huber loss, in turn; the first round with the Huber loss tries all starts."""
    grid_SP = starts_SP = _starts(law, x_RT, y_R)
    theta_SP, cost_S = minimise(law, grid_SP, x_RT, y_R, np.inf, evaluations=FIRST_EVALUATIONS)
    theta = theta_SP[cost_S.argmin()]
    for each in range(ROUNDS):
        width = max(HUBER * MAD * float(np.median(np.abs(y_R - law.log_loss(theta, x_RT)))), LEAST_WIDTH)
        tried_SP, most = (starts_SP, EVALUATIONS) if each else (grid_SP, FIRST_EVALUATIONS)
        tried_SP = np.concatenate([theta[None], tried_SP])
        theta_SP, cost_S = minimise(law, tried_SP, x_RT, y_R, width, evaluations=most)
        starts_SP, theta = theta_SP[np.argsort(cost_S)[:STARTS]], theta_SP[cost_S.argmin()]
    polished = _descend(law, theta, x_RT, y_R, width)
    return (np.asarray(polished.x) if polished.cost < cost_S.min() else theta), width


def minimise(
    law: Law,
    start_SP: np.ndarray,
    x_RT: np.ndarray,
    y_SR: np.ndarray,
    width: float | np.ndarray,
    weight_SR: np.ndarray | None = None,
    evaluations: int = EVALUATIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the Huber loss of many problems at once (damped Newton steps, without second derivatives of the law).

    scipy solves one problem at a time, which takes minutes where this takes seconds.

    Args:
        law: The form.
        start_SP: Where to start.
        x_RT: Logs of the variables, centred.
        y_SR: Logs of the losses, (S,R) or (R,).
        width: Of the Huber loss, one or (S,); infinity for plain squares.
        weight_SR: Weight of each run; 0 leaves it out. Default 1.
        evaluations: Most evaluations of each problem.

    Returns:
        The parameters, (S,P), and the objectives, (S,).
    """
    count, runs = len(start_SP), len(x_RT)
    bounds = _bounds(law, y_SR)
    theta_SP, step_SP = np.clip(start_SP, *bounds), np.zeros_like(start_SP)
    y_SR = np.broadcast_to(y_SR, (count, runs))
    weight_SR = np.broadcast_to(1.0 if weight_SR is None else weight_SR, (count, runs))
    width_S1 = np.broadcast_to(width, (count,))[:, None]
    cost_S, damping_S, active = np.full(count, np.inf), np.full(count, DAMPING), np.arange(count)
    square_SPP = np.zeros((count, law.size, law.size))
    slope_SP, scale_SP = np.zeros((count, law.size)), np.zeros((count, law.size))
    for _ in range(evaluations):
        tried = np.clip(theta_SP[active] - step_SP[active], *bounds)
        level, slopes = law.log_loss_and_slopes(tried, x_RT)
        rest = level - y_SR[active]
        within = np.minimum(np.abs(rest), width_S1[active])
        cost = (weight_SR[active] * within * (np.abs(rest) - within / 2)).sum(axis=1)
        better, still = cost <= cost_S[active], cost_S[active] - cost <= STILL * cost
        taken = active[better]
        theta_SP[taken], cost_S[taken] = tried[better], cost[better]
        weights = (weight_SR[active] * _huber_weights(rest, width_S1[active]))[better, :, None]
        slopes = slopes[better]
        square_SPP[taken] = (slopes * _curvature(rest[better], width_S1[taken], weights)).swapaxes(1, 2) @ slopes
        scale_SP[taken] = (slopes**2 * weights).sum(axis=1)
        slope_SP[taken] = ((slopes * weights).swapaxes(1, 2) @ rest[better, :, None])[..., 0]
        damping_S[active] *= np.where(better, 0.25, 5.0)
        active = active[~(better & still) & (damping_S[active] < DAMPED)]
        if not len(active):
            break
        damped_SP = damping_S[active, None] * scale_SP[active]
        step_SP[active] = _steps(square_SPP[active], slope_SP[active], damped_SP, theta_SP[active], bounds)
    return theta_SP, cost_S


def _steps(
    square_SPP: np.ndarray,
    slope_SP: np.ndarray,
    damped_SP: np.ndarray,
    theta_SP: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Newton steps with damping (S,P). A parameter that would leave its bounds stays; the others step without it."""
    lower_P, upper_P = bounds
    free_SP = ~(((theta_SP <= lower_P) & (slope_SP > 0)) | ((theta_SP >= upper_P) & (slope_SP < 0)))
    square_SPP = square_SPP * (free_SP[:, :, None] & free_SP[:, None, :])
    least_S1 = np.maximum(1e-12 * damped_SP.max(axis=1, keepdims=True), 1e-300)
    places = np.arange(square_SPP.shape[-1])
    square_SPP[:, places, places] += np.where(free_SP, damped_SP + least_S1, 1.0)
    steps_SP = np.linalg.solve(square_SPP, (slope_SP * free_SP)[..., None])[..., 0]
    return np.clip(steps_SP, -STRIDE, STRIDE)


def _huber_weights(rest: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Weights of squares that have the Huber loss's slope at the residuals."""
    return np.asarray(np.minimum(1.0, width / np.maximum(np.abs(rest), 1e-300)))


def _curvature(rest_SR: np.ndarray, width_S1: np.ndarray, weights_SR1: np.ndarray) -> np.ndarray:
    """Second derivative of the Huber loss by the residuals; its weights where most residuals are beyond its width."""
    inside_SR = np.abs(rest_SR) <= width_S1
    near_S = inside_SR.mean(axis=1) > 0.5
    return np.asarray(weights_SR1 * (inside_SR | ~near_S[:, None])[..., None])


def _bounds(law: Law, y_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lower_P, upper_P = np.full(law.size, y_R.min() - MARGIN), np.full(law.size, y_R.max() + MARGIN)
    lower_P[int(law.floor) + 1 :: 2], upper_P[int(law.floor) + 1 :: 2] = -STEEPEST, STEEPEST
    return lower_P, upper_P


def _starts(law: Law, x_RT: np.ndarray, y_R: np.ndarray) -> np.ndarray:
    """The grid of exponents, (S,P); coefficients by non-negative least squares on the losses."""
    loss, found = np.exp(y_R), []
    for exponents in itertools.product(EXPONENTS, repeat=x_RT.shape[1]):
        columns = np.concatenate([np.ones((len(loss), int(law.floor))), np.exp(-x_RT * exponents)], axis=1)
        sizes, _ = optimize.nnls(columns / loss[:, None], np.ones(len(loss)))
        logs = np.log(np.maximum(sizes, 1e-4 * loss.min()))
        pairs = np.stack([logs[int(law.floor) :], exponents], axis=1).reshape(-1)
        found.append(np.concatenate([logs[: int(law.floor)], pairs]))
    return np.array(found)


def _descend(law: Law, start_P: np.ndarray, x_RT: np.ndarray, y_R: np.ndarray, width: float) -> optimize.OptimizeResult:
    """Minimise from one start, to the last digits."""
    bounds = _bounds(law, y_R)
    return optimize.least_squares(
        lambda theta_P: law.log_loss(theta_P, x_RT) - y_R,
        np.clip(start_P, *bounds),
        jac=lambda theta_P: law.slopes(theta_P, x_RT),
        bounds=bounds,
        method="dogbox",  # faster here than `trf`, with the same minima
        loss="huber",
        f_scale=width,
        xtol=1e-10,
        ftol=1e-12,
        max_nfev=EVALUATIONS,
    )
