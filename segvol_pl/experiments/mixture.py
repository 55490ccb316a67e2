"""Laws of data mixtures: the loss on each source as a function of the shares of all sources, and what they propose.

1. The law of Ye et al. 2024 (Data Mixing Laws, arXiv 2403.16952): L_i = c_i + exp(sum_j s_ij r_j), with the shares r_j,
   which sum to 1. Their factor k_i is part of s_ij. Where there are few mixtures, or the floor c_i does not improve the
   fit, it is left out: log L_i is then linear in the shares.
2. Runs of one mixture, such as seeds, count as one: their losses are averaged.
3. A law is refused if there are too few mixtures, if shares vary only together, if an F-test finds no effect of the
   mixture on the loss, or if a mixture that was left out is predicted no better than by the mean of the others.
4. Transfer: the change of a loss if a share grows and all others shrink in proportion, at the mean of the mixtures.
5. The proposed mixture minimises the mean of the losses, each relative to its mean over the runs. It lies in the
   convex hull of the mixtures that were run: a law says nothing beyond it. The problem is convex.
6. Intervals are a wild bootstrap: the residuals, corrected for leverage, change their signs at random, for all sources
   of a mixture alike, as they come from the same runs. Student's t widens them as in `laws`.

Letters: R mixtures, M sources, I sources with a loss, P parameters of a law, S bootstrap samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from segvol_pl.experiments.verdict import Interval, tails

SPARE = 3
"""Least number of mixtures beyond the number of parameters."""
CHANCE = 0.01
"""Level of the F-test of an effect, over all sources together."""
RANGE = 0.05
"""Least difference between the smallest and the largest share of a source."""
STEP = 0.1
"""By how much a share grows in the transfer matrix: 10 percentage points."""
FLOORS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
"""Floors, as shares of the smallest loss, from which the search starts."""
STEEPEST, DEEPEST = 60.0, 12.0
"""Bounds: of the size of a slope, and of the log of the floor below the log of the smallest loss."""
REFITS = 40
"""Steps of a fit to a bootstrap sample."""
SEARCH = 400
"""Steps of the search for the best mixture."""
INSIDE = 1e-6
"""Distance from the hull at which a mixture counts as inside."""


@dataclass(frozen=True, eq=False)
class Mixtures:
    """Mixtures that were run, and the losses on each source."""

    sources: list[str]
    share_RM: np.ndarray
    """Rows sum to 1."""
    targets: list[str]
    """Sources with a loss."""
    loss_RI: np.ndarray
    """Positive; geometric means over the runs of a mixture."""
    runs_R: np.ndarray
    """Number of runs of each mixture."""

    @classmethod
    def of(cls, sources: Sequence[str], share_NM: np.ndarray, targets: Sequence[str], loss_NI: np.ndarray) -> Mixtures:
        """Put runs of one mixture together. Rows are N runs."""
        shares, which_N = np.unique(np.round(share_NM, 6), axis=0, return_inverse=True)
        which_N = which_N.reshape(-1)
        runs_R = np.bincount(which_N)
        logs = np.stack([np.bincount(which_N, column) / runs_R for column in np.log(loss_NI).T], axis=1)
        return cls(list(sources), shares, list(targets), np.exp(logs), runs_R)

    @property
    def centre_M(self) -> np.ndarray:
        """The mean of the mixtures."""
        return np.asarray(self.share_RM.mean(axis=0))


@dataclass(frozen=True, eq=False)
class MixtureLaw:
    """The law of the loss on one source, and the verdict on it."""

    target: str
    floor: bool
    theta_P: np.ndarray
    """Slopes s of all sources; then, with a floor, the log of c."""
    residual_R: np.ndarray
    """log(measured loss / fitted loss)."""
    leverage_R: np.ndarray
    error: float
    """Mean of |predicted / measured - 1| of mixtures that were left out of the fit."""
    reasons: list[str]
    """Why it is not supported; empty if it is."""

    @property
    def supported(self) -> bool:
        """Whether the data support the law."""
        return not self.reasons

    @property
    def freedom(self) -> int:
        """Degrees of freedom."""
        return max(len(self.residual_R) - len(self.theta_P), 1)

    @property
    def noise(self) -> float:
        """Standard deviation of a mixture around the law, relative to its loss."""
        return float(np.sqrt((self.residual_R**2).sum() / self.freedom))


@dataclass(frozen=True, eq=False)
class Proposal:
    """The mixture of the least mean loss."""

    share: list[Interval]
    """Of each source."""
    change: Interval
    """Of the mean relative loss, against that at the mean of the mixtures; -0.02 is 2 % less."""
    reasons: list[str]
    """Why it is not proposed; empty if it is."""
    cautions: list[str]


@dataclass(frozen=True, eq=False)
class Mixed:
    """All laws, and what follows from them."""

    mixtures: Mixtures
    laws: list[MixtureLaw]
    transfer: dict[tuple[str, str], Interval]
    """(source with the loss, source whose share grows) -> relative change of the loss. Of supported laws only."""
    proposal: Proposal | None
    reasons: list[str]
    """Why there is no law at all."""
    samples: dict[str, np.ndarray]
    """Source -> bootstrap samples of the parameters of its law, (S,P), if that is supported."""


def judge_mixtures(mixtures: Mixtures, goal: Sequence[str], count: int, seed: int) -> Mixed:
    """Fit and judge the law of each source, and propose a mixture.

    Args:
        mixtures: What was run.
        goal: Sources whose loss counts for the proposal.
        count: Number of bootstrap samples.
        seed: Of the bootstrap.
    """
    if reasons := _undecidable(mixtures):
        return Mixed(mixtures, [], {}, None, reasons, {})
    laws = [_law(mixtures, place) for place in range(len(mixtures.targets))]
    samples = _resampled(mixtures, laws, count, seed)
    transfer = {
        (law.target, source): _transfer(law, samples[law.target], mixtures, place)
        for law in laws
        if law.supported
        for place, source in enumerate(mixtures.sources)
    }
    chosen = [law for law in laws if law.supported and law.target in goal]
    proposal = _propose(mixtures, chosen, samples) if chosen else None
    return Mixed(mixtures, laws, transfer, proposal, [], samples)


def _undecidable(mixtures: Mixtures) -> list[str]:
    """Why no law can be fitted at all."""
    count, sources = mixtures.share_RM.shape
    reasons = []
    if count < sources + SPARE:
        reasons.append(f"too few mixtures: {count}, {sources} sources need {sources + SPARE} different ones")
    for name, share_R in zip(mixtures.sources, mixtures.share_RM.T, strict=True):
        if np.ptp(share_R) < RANGE:
            low, high = share_R.min(), share_R.max()
            reasons.append(f"the share of {name} hardly varies: {low:.0%} to {high:.0%}, needs {RANGE:.0%} or more")
    spread = np.linalg.svd(mixtures.share_RM - mixtures.centre_M, compute_uv=False)
    if not reasons and (spread > RANGE / 2).sum() < sources - 1:
        reasons.append("some shares vary only together: their effects cannot be separated; run mixtures between them")
    return reasons


# ---- one law ----


def predict(theta: np.ndarray, share_RM: np.ndarray) -> np.ndarray:
    """Losses (...,R) of the mixtures. theta: (...,P), see `MixtureLaw`; whether there is a floor follows from P."""
    sources = share_RM.shape[-1]
    loss = np.exp(theta[..., :sources] @ share_RM.T)
    return np.asarray(loss + np.exp(theta[..., sources:]) if theta.shape[-1] > sources else loss)


def _slopes(theta_P: np.ndarray, share_RM: np.ndarray) -> np.ndarray:
    """Derivatives of log L by each parameter, (R,P)."""
    sources = share_RM.shape[1]
    part_R = np.exp(share_RM @ theta_P[:sources])
    if len(theta_P) == sources:
        return share_RM
    floor = np.exp(theta_P[sources])
    return np.column_stack([share_RM * (part_R / (part_R + floor))[:, None], floor / (part_R + floor)])


def _fitted(share_RM: np.ndarray, log_R: np.ndarray, floor: bool, start_P: np.ndarray | None = None) -> np.ndarray:
    """The parameters of least squares on log losses. start_P: search from there alone."""
    if not floor:
        return np.asarray(np.linalg.lstsq(share_RM, log_R, rcond=None)[0])
    starts = [start_P] if start_P is not None else [_start(share_RM, log_R, share) for share in FLOORS]
    lowest, steepest = log_R.min(), np.full(share_RM.shape[1], STEEPEST)
    lower_P, upper_P = np.append(-steepest, lowest - DEEPEST), np.append(steepest, lowest)
    found = [
        optimize.least_squares(
            lambda theta_P: np.log(predict(theta_P, share_RM)) - log_R,
            np.clip(start, lower_P + INSIDE, upper_P - INSIDE),
            jac=lambda theta_P: _slopes(theta_P, share_RM),
            bounds=(lower_P, upper_P),
            method="dogbox",
            max_nfev=200,
        )
        for start in starts
    ]
    return np.asarray(min(found, key=lambda each: each.cost).x)


def _start(share_RM: np.ndarray, log_R: np.ndarray, share: float) -> np.ndarray:
    floor = share * np.exp(log_R.min())
    slopes_M = np.linalg.lstsq(share_RM, np.log(np.exp(log_R) - floor), rcond=None)[0]
    return np.append(slopes_M, np.log(floor))


def refitted(share_RM: np.ndarray, log_SR: np.ndarray, start_P: np.ndarray) -> np.ndarray:
    """The parameters (S,P) of least squares for many sets of log losses at once, by Levenberg's and Marquardt's method.

    start_P: parameters of a fit to similar losses.
    """
    sources = share_RM.shape[1]
    if len(start_P) == sources:
        return np.asarray(np.linalg.lstsq(share_RM, log_SR.T, rcond=None)[0].T)
    theta_SP, damping_S = np.tile(start_P, (len(log_SR), 1)), np.full(len(log_SR), 1e-2)
    lowest_S = log_SR.min(axis=1)

    def squares(theta: np.ndarray) -> np.ndarray:
        return np.asarray(((np.log(predict(theta, share_RM)) - log_SR) ** 2).sum(axis=1))

    cost_S = squares(theta_SP)
    for _ in range(REFITS):
        part_SR = np.exp(theta_SP[:, :sources] @ share_RM.T)
        floor_S1 = np.exp(theta_SP[:, sources:])
        weight_SR1 = (part_SR / (part_SR + floor_S1))[..., None]
        slope_SRP = np.concatenate([weight_SR1 * share_RM, 1 - weight_SR1], axis=2)
        rest_SR1 = (log_SR - np.log(part_SR + floor_S1))[..., None]
        normal_SPP = slope_SRP.transpose(0, 2, 1) @ slope_SRP
        diagonal_SP = np.diagonal(normal_SPP, axis1=1, axis2=2) + 1e-9
        damped_SPP = normal_SPP + damping_S[:, None, None] * diagonal_SP[..., None] * np.eye(len(start_P))
        tried_SP = theta_SP + np.linalg.solve(damped_SPP, slope_SRP.transpose(0, 2, 1) @ rest_SR1)[..., 0]
        tried_SP[:, :sources] = np.clip(tried_SP[:, :sources], -STEEPEST, STEEPEST)
        tried_SP[:, sources] = np.clip(tried_SP[:, sources], lowest_S - DEEPEST, lowest_S)
        tried_S = squares(tried_SP)
        better_S = tried_S < cost_S
        theta_SP[better_S], cost_S[better_S] = tried_SP[better_S], tried_S[better_S]
        damping_S = np.where(better_S, damping_S / 4, np.minimum(damping_S * 8, 1e6))
    return theta_SP


def _law(mixtures: Mixtures, place: int) -> MixtureLaw:
    share_RM, log_R = mixtures.share_RM, np.log(mixtures.loss_RI[:, place])
    count, sources = share_RM.shape
    straight = _fitted(share_RM, log_R, floor=False)
    rest = float(((log_R - share_RM @ straight) ** 2).sum())
    theta, floor = straight, False
    reasons = _no_effect(log_R, rest, sources, len(mixtures.targets))
    if not reasons and count >= sources + 1 + SPARE:
        curved = _fitted(share_RM, log_R, floor=True)
        left = float(((log_R - np.log(predict(curved, share_RM))) ** 2).sum())
        if _corrected_criterion(left, count, sources + 1) < _corrected_criterion(rest, count, sources):
            theta, floor = curved, True
    residual_R = log_R - np.log(predict(theta, share_RM))
    leverage_R = (np.linalg.qr(_slopes(theta, share_RM))[0] ** 2).sum(axis=1)
    error, gain = _left_out(share_RM, log_R, floor, theta)
    if not reasons and gain <= 0:
        reasons.append(
            f"mixtures that were left out are predicted no better than by the mean of the others (error {error:.1%})"
        )
    return MixtureLaw(mixtures.targets[place], floor, theta, residual_R, leverage_R, error, reasons)


def _corrected_criterion(squares: float, count: int, parameters: int) -> float:
    """Akaike's criterion, corrected for few observations; the noise counts as a parameter."""
    size = parameters + 1
    fit = count * math.log(max(squares, 1e-300) / count)
    return fit + 2 * size + 2 * size * (size + 1) / max(count - size - 1, 1)


def _no_effect(log_R: np.ndarray, rest: float, sources: int, targets: int) -> list[str]:
    """An F-test of the linear law of log loss against a constant."""
    total, freedom = float(((log_R - log_R.mean()) ** 2).sum()), len(log_R) - sources
    ratio = (max(total - rest, 0.0) / (sources - 1)) / max(rest / freedom, 1e-300)
    chance = float(stats.f.sf(ratio, sources - 1, freedom))
    if chance <= CHANCE / targets:
        return []
    return [f"no effect of the mixture beyond noise (F-test, p = {chance:.2g}, needs {CHANCE / targets:.2g})"]


def _left_out(share_RM: np.ndarray, log_R: np.ndarray, floor: bool, theta_P: np.ndarray) -> tuple[float, float]:
    """Leave each mixture out in turn: the mean relative error, and 1 - its squares / those of the others' mean."""
    misses, means = [], []
    for place in range(len(log_R)):
        kept = np.arange(len(log_R)) != place
        theta = _fitted(share_RM[kept], log_R[kept], floor, theta_P if floor else None)
        misses.append(float(np.log(predict(theta, share_RM[place : place + 1]))[0] - log_R[place]))
        means.append(float(log_R[kept].mean() - log_R[place]))
    error = float(np.mean(np.abs(np.expm1(misses))))
    return error, 1 - float(np.square(misses).sum() / max(np.square(means).sum(), 1e-300))


def _resampled(mixtures: Mixtures, laws: Sequence[MixtureLaw], count: int, seed: int) -> dict[str, np.ndarray]:
    """Parameters of each supported law fitted to bootstrap samples, (S,P)."""
    rng = np.random.default_rng(seed)
    sign_SR = rng.choice([-1.0, 1.0], size=(count, len(mixtures.share_RM)))
    found = {}
    for law in (each for each in laws if each.supported):
        level_R = np.log(predict(law.theta_P, mixtures.share_RM))
        # As the jackknife does, see `laws.bootstrap`.
        pool_R = law.residual_R / np.maximum(1 - law.leverage_R, 0.1)
        found[law.target] = refitted(mixtures.share_RM, level_R + pool_R * sign_SR, law.theta_P)
    return found


def _widened(estimate: float, samples_S: np.ndarray, freedom: int) -> Interval:
    """The estimate with its interval: of the samples, spread as Student's t."""
    factor = stats.t.ppf(tails()[1], freedom) / stats.norm.ppf(tails()[1])
    low, high = np.quantile(estimate + (samples_S - estimate) * factor, tails())
    return Interval(float(estimate), float(low), float(high))


# ---- what follows ----


def transfer_of(theta: np.ndarray, share_M: np.ndarray, source: int) -> np.ndarray:
    """Relative change of a loss as the share of a source grows by `STEP` and the others shrink in proportion, (...)."""
    sources = len(share_M)
    toward_M = (np.eye(sources)[source] - share_M) / (1 - share_M[source])
    part = np.exp(theta[..., :sources] @ share_M)
    loss = predict(theta, share_M[None])[..., 0]
    return np.asarray(STEP * (theta[..., :sources] @ toward_M) * part / loss)


def _transfer(law: MixtureLaw, samples_SP: np.ndarray, mixtures: Mixtures, place: int) -> Interval:
    centre = mixtures.centre_M
    estimate = float(transfer_of(law.theta_P, centre, place))
    return _widened(estimate, transfer_of(samples_SP, centre, place), law.freedom)


def _propose(mixtures: Mixtures, laws: Sequence[MixtureLaw], samples: dict[str, np.ndarray]) -> Proposal:
    mean_I = [mixtures.loss_RI[:, mixtures.targets.index(law.target)].mean() for law in laws]
    estimate = [law.theta_P[None] for law in laws]
    drawn = [samples[law.target] for law in laws]
    best_M = best_mixture(estimate, mean_I, mixtures.share_RM)[0]
    spread_SM = best_mixture(drawn, mean_I, mixtures.share_RM)
    freedom = min(law.freedom for law in laws)

    def change(thetas: Sequence[np.ndarray]) -> np.ndarray:
        at, centre = (goal_of(thetas, mean_I, share[None])[:, 0] for share in (best_M, mixtures.centre_M))
        return np.asarray(at / centre - 1)

    gain = _widened(float(change(estimate)[0]), change(drawn), freedom)
    ends = np.quantile(spread_SM, tails(), axis=0)
    shares = [Interval(float(value), float(low), float(high)) for value, low, high in zip(best_M, *ends, strict=True)]
    reasons = []
    if not gain.high < 0:
        reasons.append(
            f"no mixture is shown to be better than the mean of those that were run: {gain.value:+.2%} "
            f"[{gain.low:+.2%}, {gain.high:+.2%}]"
        )
    cautions = []
    beyond_M = best_M + 0.02 * (best_M - mixtures.centre_M)
    if not inside(beyond_M, mixtures.share_RM):
        cautions.append("it lies at the edge of the mixtures that were run: one beyond may be better, run some there")
    return Proposal(shares, gain, reasons, cautions)


def goal_of(thetas: Sequence[np.ndarray], mean_I: Sequence[float], share_RM: np.ndarray) -> np.ndarray:
    """Mean over the laws of loss / mean loss, (S,R). thetas: (S,P) of each law."""
    parts = [predict(theta, share_RM) / mean for theta, mean in zip(thetas, mean_I, strict=True)]
    return np.asarray(np.mean(parts, axis=0))


def best_mixture(thetas: Sequence[np.ndarray], mean_I: Sequence[float], share_RM: np.ndarray) -> np.ndarray:
    """The mixture of the least `goal_of` in the convex hull of the mixtures, (S,M), by Frank and Wolfe's method."""
    sources = share_RM.shape[1]
    start = goal_of(thetas, mean_I, share_RM).argmin(axis=1)
    best_SM = share_RM[start].astype(np.float64)
    for step in range(1, SEARCH + 1):
        slope_SM = np.zeros_like(best_SM)
        for theta, mean in zip(thetas, mean_I, strict=True):
            part_S = np.exp((theta[:, :sources] * best_SM).sum(axis=1)) / mean
            slope_SM += part_S[:, None] * theta[:, :sources]
        corner_SM = share_RM[(slope_SM @ share_RM.T).argmin(axis=1)]
        best_SM = best_SM + 2 / (step + 2) * (corner_SM - best_SM)
    return np.asarray(best_SM)


def inside(share_M: np.ndarray, share_RM: np.ndarray) -> bool:
    """Whether a mixture lies in the convex hull of others."""
    columns = np.vstack([share_RM.T, np.ones(len(share_RM))])
    _, distance = optimize.nnls(columns, np.append(share_M, 1.0))
    return bool(distance < INSIDE)
