"""How often 95 % intervals hold a known law, true laws are refused, and noise is claimed as a law.

    python benchmarks/interval_coverage.py [--trials N] [--bootstraps N] [--only WORD]

Each row is a kind of noise on a design of sizes x amounts of data x seeds. Trial k uses seed k, so a row is the same
whenever it is computed. One process, no training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from segvol_pl.experiments.laws import Law, bootstrap, fit
from segvol_pl.experiments.verdict import intervals, judge

BOTH = Law(("params", "samples"))
TRUTH = {"E": 1.7, "A": 0.8 * 3e5**0.4, "alpha": 0.4, "B": 0.9 * 1e3**0.5, "beta": 0.5}
LOUD, QUIET = 0.055, 0.006
"""Noise, relative to the loss, at the two ends of a variable where it is not equal."""
Noise = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(logs_RT, generator) -> noise in log loss, (R,)."""


def design(sizes: int, seeds: int) -> np.ndarray:
    """(R,T): logs of every size with every amount of data, over two decades each, `seeds` times."""
    params, samples = np.log(np.geomspace(3e4, 3e6, sizes)), np.log(np.geomspace(50, 5000, sizes))
    axes = np.meshgrid(params, samples, np.arange(seeds), indexing="ij")
    return np.stack([axes[0].ravel(), axes[1].ravel()], axis=1)


def true_loss(logs_RT: np.ndarray) -> np.ndarray:
    """The law of `TRUTH`."""
    params, samples = np.exp(logs_RT).T
    loss = TRUTH["E"] + TRUTH["A"] / params ** TRUTH["alpha"] + TRUTH["B"] / samples ** TRUTH["beta"]
    return np.asarray(loss)


def equal(logs_RT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 % everywhere."""
    return 0.01 * rng.standard_normal(len(logs_RT))


def unequal(place: int, falls: bool) -> Noise:
    """Noise that falls, or grows, with a variable."""

    def noise(logs_RT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        column = logs_RT[:, place]
        way = (column - column.min()) / np.ptp(column)
        level = LOUD * (QUIET / LOUD) ** (way if falls else 1 - way)
        return np.asarray(level * rng.standard_normal(len(column)))

    return noise


def shared(logs_RT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1 % that all seeds of a setting share, and 0.3 % of their own."""
    settings, setting_R = np.unique(logs_RT, axis=0, return_inverse=True)
    common_G = 0.01 * rng.standard_normal(len(settings))
    return np.asarray(common_G[setting_R.reshape(-1)] + 0.003 * rng.standard_normal(len(logs_RT)))


NOISES: dict[str, Noise] = {
    "equal": equal,
    "falls with D": unequal(1, falls=True),
    "grows with D": unequal(1, falls=False),
    "falls with N": unequal(0, falls=True),
    "grows with N": unequal(0, falls=False),
    "shared by seeds": shared,
}
DESIGNS = ((5, 1), (5, 3))
"""Values of N, and of D; seeds."""


def held(noise: Noise, sizes: int, seeds: int, trials: int, bootstraps: int) -> dict[str, int]:
    """How many trials' intervals hold each coefficient, and all at once."""
    logs = design(sizes, seeds)
    counts = dict.fromkeys([*TRUTH, "all"], 0)
    for trial in range(trials):
        loss = true_loss(logs) * np.exp(noise(logs, np.random.default_rng(trial)))
        alone, together = intervals(bootstrap(fit(BOTH, logs, loss), bootstraps, trial))
        for name, value in TRUTH.items():
            counts[name] += alone[name].low <= value <= alone[name].high
        counts["all"] += all(together[name].low <= value <= together[name].high for name, value in TRUTH.items())
    return counts


def supported(noise: Noise, sizes: int, seeds: int, trials: int, bootstraps: int) -> int:
    """How many trials of the true law are supported."""
    logs = design(sizes, seeds)
    found = 0
    for trial in range(trials):
        loss = true_loss(logs) * np.exp(noise(logs, np.random.default_rng(trial)))
        found += judge(BOTH, logs, loss, 0.1, bootstraps, trial).supported
    return found


def claimed(noise: Noise, sizes: int, seeds: int, trials: int, bootstraps: int) -> int:
    """How many trials of noise, five times as large, around a constant loss are claimed as a law."""
    logs = design(sizes, seeds)
    found = 0
    for trial in range(trials):
        loss = 0.5 * np.exp(5 * noise(logs, np.random.default_rng(trial)))
        found += judge(BOTH, logs, loss, 0.1, bootstraps, trial).supported
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=100, help="trials of each row")
    parser.add_argument("--bootstraps", type=int, default=200, help="bootstrap samples of each trial")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose noise contains this word")
    given, started = parser.parse_args(), time.perf_counter()
    true, pure = max(1, given.trials * 2 // 5), max(1, given.trials // 2)
    print(f"| noise | settings, seeds | {' | '.join(TRUTH)} | all at once | supported | noise claimed |")
    print(f"|---|---|{'---|' * (len(TRUTH) + 3)}")
    for name, noise in NOISES.items():
        for sizes, seeds in DESIGNS:
            if given.only not in name or (noise is shared and seeds == 1):
                continue
            counts = held(noise, sizes, seeds, given.trials, given.bootstraps)
            right = supported(noise, sizes, seeds, true, given.bootstraps)
            wrong = claimed(noise, sizes, seeds, pure, given.bootstraps)
            cells = " | ".join(str(count) for count in counts.values())
            print(f"| {name} | {sizes} x {sizes}, {seeds} | {cells} | {right} | {wrong} |", flush=True)
    seconds = time.perf_counter() - started
    print(f"\nof {given.trials} trials; supported: of {true}; claimed: of {pure}; {given.bootstraps} bootstrap samples")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
