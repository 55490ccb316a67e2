"""Planted laws of data mixtures, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segvol_pl.experiments.mixture import Mixtures, best_mixture, goal_of, judge_mixtures, predict, transfer_of

SOURCES = ["abdomen", "chest", "head"]
SLOPES = np.array([[-3.0, -1.0, 0.3], [0.1, -4.0, 0.2], [0.2, -1.0, -3.0]])
"""Rows: sources with a loss; columns: sources of the mixture."""
FLOORS = np.array([0.25, 0.3, 0.2])
"""Losses are floor + exp(slopes x shares)."""
GRID = [
    [0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.45, 0.45, 0.1], [0.45, 0.1, 0.45], [0.1, 0.45, 0.45],
    [0.34, 0.33, 0.33], [0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2], [0.2, 0.5, 0.3],
]  # fmt: skip
"""Shares of the mixtures that are run."""
NEAR = 0.01
"""A proposal counts as found if its true mean loss is within this share of the least one."""


def thetas() -> list[np.ndarray]:
    """Parameters of each planted law, see `mixture.predict`."""
    return [np.append(slopes, np.log(floor)) for slopes, floor in zip(SLOPES, FLOORS, strict=True)]


def planted(noise: float, seed: int, seeds: int = 1, effect: bool = True, grid: list[list[float]] = GRID) -> Mixtures:
    """Mixtures with losses of the planted law, times log-normal noise. effect: if not, all have the same losses."""
    rng = np.random.default_rng(seed)
    share = np.repeat(np.array(grid), seeds, axis=0)
    loss = np.stack([predict(theta, share) for theta in thetas()], axis=1)
    if not effect:
        loss = np.tile(loss.mean(axis=0), (len(share), 1))
    return Mixtures.of(SOURCES, share, SOURCES, loss * np.exp(noise * rng.standard_normal(loss.shape)))


@dataclass
class Tally:
    """What trials on planted mixtures came to."""

    trials: int = 0
    supported: int = 0
    """Trials in which the laws of all sources are supported."""
    proposed: int = 0
    """Trials with a proposal whose true mean loss is within `NEAR` of the least."""
    recovered: int = 0
    """Both."""
    any_law: int = 0
    any_proposal: int = 0
    covered: np.ndarray | None = None
    """Trials in which each entry of the transfer matrix lies in its interval, among those that give it, (3,3)."""
    given: np.ndarray | None = None
    """Trials that give each entry."""


def trials(count: int, noise: float, bootstraps: int = 200, effect: bool = True, seeds: int = 1) -> Tally:
    """Judge `count` sets of planted mixtures, each with noise of its own."""
    tally = Tally(covered=np.zeros((3, 3), int), given=np.zeros((3, 3), int))
    for seed in range(count):
        mixtures = planted(noise, seed, seeds, effect)
        mixed = judge_mixtures(mixtures, SOURCES, bootstraps, seed)
        supported = [law.supported for law in mixed.laws]
        proposal = mixed.proposal if mixed.proposal and not mixed.proposal.reasons else None
        near = False
        if proposal is not None:
            truth, means = [theta[None] for theta in thetas()], list(mixtures.loss_RI.mean(axis=0))
            least = best_mixture(truth, means, mixtures.share_RM)
            found = np.array([[share.value for share in proposal.share]])
            at, best = (float(goal_of(truth, means, share)[0, 0]) for share in (found, least))
            near = at / best - 1 < NEAR
        tally.trials += 1
        tally.supported += all(supported)
        tally.proposed += near
        tally.recovered += near and all(supported)
        tally.any_law += any(supported)
        tally.any_proposal += proposal is not None
        assert tally.covered is not None and tally.given is not None
        for (target, source), effect_of in mixed.transfer.items():
            row, column = SOURCES.index(target), SOURCES.index(source)
            true = float(transfer_of(thetas()[row], mixtures.centre_M, column))
            tally.given[row, column] += 1
            tally.covered[row, column] += effect_of.low <= true <= effect_of.high
    return tally
