"""The fit and its intervals: the best objective, intervals that hold under any noise, what a fit depends on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize

from segvol_pl.config import FitConfig
from segvol_pl.experiments.fit import fit_runs
from segvol_pl.experiments.laws import HUBER, Fit, Law, bootstrap, fit, minimise
from segvol_pl.experiments.sensitivity import FAR, examine
from segvol_pl.experiments.verdict import judge

BOTH, SIZE = Law(("params", "samples")), Law(("params",))
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def coverage() -> Iterator[Any]:
    """benchmarks/interval_coverage.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import interval_coverage

        yield interval_coverage
    sys.modules.pop("interval_coverage", None)


# ---- the objective ----


def objective(law: Law, theta_P: np.ndarray, fitted: Fit) -> float:
    """The Huber loss that the fit minimises."""
    rest = np.abs(law.log_loss(theta_P, fitted.logs_RT - fitted.centre_T) - fitted.log_losses_R)
    within = np.minimum(rest, fitted.width)
    return float((within * (rest - within / 2)).sum())


def data_set(number: int) -> tuple[Law, np.ndarray, np.ndarray]:
    """Logs and losses: a grid, noise that falls with D, outliers, budgets of equal FLOPs, and a law without a floor."""
    rng = np.random.default_rng(number)
    params, samples = np.log(np.geomspace(3e4, 3e6, 6)), np.log(np.geomspace(50, 5000, 6))
    logs = np.stack([axis.ravel() for axis in np.meshgrid(params, samples, indexing="ij")], axis=1)
    noise = 0.01 * rng.standard_normal(len(logs))
    if number == 1:
        noise *= np.geomspace(5, 0.5, 6)[np.searchsorted(samples, logs[:, 1] - 1e-9)]
    if number == 2:
        noise[rng.choice(len(logs), 4, replace=False)] += 0.5
    if number == 3:
        budgets = np.repeat(np.log(np.geomspace(1e18, 1e22, 6)), 6)
        logs[:, 0] = 0.5 * budgets - 4 + rng.uniform(-1.5, 1.5, len(logs))
        logs[:, 1] = budgets - np.log(6) - logs[:, 0]
        return BOTH, logs, (1.8 + 480 * np.exp(-0.35 * logs[:, 0]) + 2000 * np.exp(-0.37 * logs[:, 1])) * np.exp(noise)
    if number == 4:
        return SIZE, logs[:, :1], 30 * np.exp(-0.3 * logs[:, 0] + noise)
    terms = 0.8 * np.exp(-0.4 * (logs[:, 0] - np.log(3e5))) + 0.9 * np.exp(-0.5 * (logs[:, 1] - np.log(1e3)))
    return BOTH, logs, (1.7 + terms) * np.exp(noise)


def variable_projection(fitted: Fit) -> np.ndarray:
    """Exponents outside, linear coefficients inside: reweighted non-negative least squares, for the same objective."""
    law, x, y = fitted.law, fitted.logs_RT - fitted.centre_T, fitted.log_losses_R
    loss = np.exp(y)

    def inner(exponents: np.ndarray) -> np.ndarray:
        columns = np.concatenate([np.ones((len(x), int(law.floor))), np.exp(-x * exponents)], axis=1)
        weights = 1 / loss**2
        for _ in range(60):
            sizes, _ = optimize.nnls(columns * np.sqrt(weights)[:, None], loss * np.sqrt(weights))
            level = np.maximum(columns @ sizes, 1e-9)
            rest, missing = y - np.log(level), loss - level
            # Equal slopes: squares of losses with these weights, and the Huber loss of logs.
            slope = np.clip(rest, -fitted.width, fitted.width) / level
            weights = np.where(np.abs(missing) > 1e-12, slope / np.where(missing == 0, 1, missing), 1 / level**2)
        logs = np.log(np.maximum(sizes, 1e-12))
        pairs = np.stack([logs[int(law.floor) :], exponents], axis=1).reshape(-1)
        return np.concatenate([logs[: int(law.floor)], pairs])

    found = [
        optimize.minimize(
            lambda exponents: objective(law, inner(exponents), fitted),
            np.full(x.shape[1], start),
            method="Nelder-Mead",
            options={"xatol": 1e-7, "fatol": 1e-13, "maxfev": 200},
        )
        for start in (0.15, 0.5)
    ]
    return inner(min(found, key=lambda each: float(each.fun)).x)


def many_starts(fitted: Fit) -> np.ndarray:
    """scipy's own robust least squares from forty random starts."""
    law, x, y = fitted.law, fitted.logs_RT - fitted.centre_T, fitted.log_losses_R
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        start = y.mean() + rng.uniform(-3, 0.5, law.size)
        start[int(law.floor) + 1 :: 2] = rng.uniform(0.05, 1.5, len(law.variables))
        found.append(
            optimize.least_squares(
                lambda theta: law.log_loss(theta, x) - y,
                start,
                jac=lambda theta: law.slopes(theta, x),
                loss="huber",
                f_scale=fitted.width,
                xtol=1e-12,
                ftol=1e-13,
                max_nfev=300,
            )
        )
    return np.asarray(min(found, key=lambda each: float(each.cost)).x)


@pytest.mark.parametrize("number", range(5))
def test_no_other_solver_finds_a_lower_objective(number: int) -> None:
    law, logs, loss = data_set(number)
    fitted = fit(law, logs, loss)
    ours = objective(law, fitted.theta_P, fitted)
    for other in (variable_projection, many_starts):
        theirs = objective(law, other(fitted), fitted)
        assert ours <= theirs * (1 + 1e-9), other.__name__
        assert theirs < 2 * ours, f"{other.__name__} solves the same problem"


def test_many_problems_at_once_are_solved_as_one_by_one() -> None:
    law, logs, loss = data_set(1)
    fitted = fit(law, logs, loss)
    x, rng = fitted.logs_RT - fitted.centre_T, np.random.default_rng(0)
    y_SR = law.log_loss(fitted.theta_P, x) + 0.02 * rng.standard_normal((12, len(x)))
    theta_SP, cost_S = minimise(law, np.tile(fitted.theta_P, (12, 1)), x, y_SR, 0.02)
    for theta, cost, y in zip(theta_SP, cost_S, y_SR, strict=True):
        alone = optimize.least_squares(
            lambda theta, y=y: law.log_loss(theta, x) - y, fitted.theta_P, loss="huber", f_scale=0.02, xtol=1e-12
        )
        assert cost <= alone.cost * (1 + 1e-8)
        np.testing.assert_allclose(theta[2::2], alone.x[2::2], atol=2e-3)


def test_a_run_of_weight_0_is_left_out() -> None:
    law, logs, loss = data_set(0)
    fitted, kept = fit(law, logs, loss), np.arange(len(logs)) % 7 != 3
    x, y = fitted.logs_RT - fitted.centre_T, fitted.log_losses_R
    (with_zero,), _ = minimise(law, fitted.theta_P[None], x, y, fitted.width, kept[None])
    (without,), _ = minimise(law, fitted.theta_P[None], x[kept], y[kept], fitted.width)
    np.testing.assert_allclose(with_zero, without, atol=1e-6)


# ---- intervals ----


def worst(counts: dict[str, int]) -> int:
    return min(counts["alpha"], counts["beta"])


@pytest.mark.parametrize(("kind", "seeds"), [("falls with D", 1), ("grows with N", 1), ("shared by seeds", 3)])
def test_intervals_hold_mostly_where_noise_is_not_alike(coverage: Any, kind: str, seeds: int) -> None:
    assert worst(coverage.held(coverage.NOISES[kind], 5, seeds, trials=8, bootstraps=100)) >= 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["equal", "falls with D", "grows with D", "falls with N", "grows with N"])
def test_intervals_hold_in_ninety_of_a_hundred_trials(coverage: Any, kind: str) -> None:
    counts = coverage.held(coverage.NOISES[kind], 5, 1, trials=100, bootstraps=200)
    assert worst(counts) >= 90, counts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_intervals_hold_where_the_seeds_of_a_setting_share_its_noise(coverage: Any) -> None:
    counts = coverage.held(coverage.NOISES["shared by seeds"], 5, 3, trials=100, bootstraps=200)
    assert worst(counts) >= 90, counts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_true_laws_are_seldom_refused(coverage: Any) -> None:
    assert coverage.supported(coverage.NOISES["equal"], 5, 1, trials=40, bootstraps=200) >= 36


@pytest.mark.parametrize("kind", ["equal", "falls with D", "shared by seeds"])
def test_noise_of_any_kind_is_no_law(coverage: Any, kind: str) -> None:
    assert coverage.claimed(coverage.NOISES[kind], 5, 2, trials=50, bootstraps=100) <= 1


def test_seeds_that_share_the_noise_of_their_setting_add_nothing() -> None:
    """Runs written down three times: intervals as wide as with each run once."""
    law, logs, loss = data_set(0)
    once, thrice = (
        bootstrap(fit(law, np.repeat(logs, count, axis=0), np.repeat(loss, count)), 300, 0) for count in (1, 3)
    )
    assert thrice.freedom == once.freedom == 31
    np.testing.assert_allclose(thrice.samples_SP.std(axis=0), once.samples_SP.std(axis=0), rtol=1e-3)


def test_few_settings_of_many_seeds_give_no_law() -> None:
    logs = np.repeat(np.log(np.geomspace(10, 1e4, 4)), 5)[:, None]
    loss = 0.5 + np.exp(-0.3 * logs[:, 0])
    judged = judge(Law(("samples",)), logs, loss * (1 + 0.001 * np.sin(np.arange(20))), 0.1, 100, 0)
    assert "too few different settings, since seeds of one setting may share its noise: 4" in judged.reasons[0]


# ---- what a fit depends on ----


def test_outliers_are_named_and_the_fit_is_shown_without_them() -> None:
    law, logs, loss = data_set(2)
    fitted = fit(law, logs, loss)
    names = [f"run {number}" for number in range(len(loss))]
    found = examine(fitted, names)
    clean = loss < 1.3 * np.exp(law.log_loss(fitted.theta_P, fitted.logs_RT - fitted.centre_T))
    assert [each.name for each in found.outliers] == [name for name, good in zip(names, clean, strict=True) if not good]
    assert all(each.deviations > FAR and each.residual > 0.3 for each in found.outliers)
    assert found.without_outliers is not None and found.without_outliers.runs == 32
    x, y = fitted.logs_RT - fitted.centre_T, np.log(loss)
    (theta,), _ = minimise(law, fitted.theta_P[None], x[clean], y[clean], fitted.width)
    assert found.without_outliers.coefficients["beta"] == pytest.approx(fitted.coefficients(theta)["beta"], abs=1e-5)


def test_each_size_is_left_out_and_each_width_is_tried() -> None:
    law, logs, loss = data_set(0)
    fitted = fit(law, logs, loss)
    found = examine(fitted, [""] * len(loss))
    assert [each.change for each in found.left_out][:2] == ["without N = 3e+04", "without N = 7.536e+04"]
    assert len(found.left_out) == 12 and {each.runs for each in found.left_out} == {30}
    used = [each for each in found.widths if "used" in each.change]
    assert used[0].coefficients["alpha"] == pytest.approx(fitted.coefficients(fitted.theta_P)["alpha"], abs=1e-5)
    plain, _ = minimise(law, fitted.theta_P[None], fitted.logs_RT - fitted.centre_T, np.log(loss), np.inf)
    assert found.widths[-1].coefficients == pytest.approx(fitted.coefficients(plain[0]), rel=1e-5)
    assert found.widths[-1].change == "plain squares"


def test_values_that_are_all_different_are_left_out_in_groups() -> None:
    law, logs, loss = data_set(3)
    found = examine(fit(law, logs, loss), [""] * len(loss))
    assert len(found.left_out) == 16 and " to " in found.left_out[0].change


def test_what_a_fit_depends_on_is_written(tmp_path: Path) -> None:
    _, logs, loss = data_set(2)
    rows = [f"{params},{samples},{each}" for (params, samples), each in zip(np.exp(logs), loss, strict=True)]
    (tmp_path / "runs.csv").write_text("\n".join(["params,samples,loss", *rows]) + "\n")
    config = FitConfig(table=str(tmp_path / "runs.csv"), out=str(tmp_path / "fit"), bootstraps=100)
    lines = fit_runs(config)
    (said,) = [line for line in lines if "are outliers" in line and "4 of 36" in line]
    assert "runs.csv:" in said and "without them alpha is" in said and "beta is" in said
    first = json.loads((tmp_path / "fit/fit.json").read_text())["laws"][0]["sensitivity"]
    assert f"{FAR:g} robust standard deviations" in first["outlier_rule"] and len(first["outliers"]) == 4
    assert first["without_outliers"]["runs"] == 32 and len(first["left_out"]) == 12 and len(first["widths"]) == 7
    svg = (tmp_path / "fit/law-0-residuals.svg").read_text()
    assert all(text in svg for text in ("N, parameters", "D, samples seen", "loss", "4 outliers beyond 4 robust"))
    page = (tmp_path / "fit/index.html").read_text()
    assert all(text in page for text in ("what it depends on", "without the outliers", "plain squares", "Checklist"))


def test_the_width_of_the_huber_loss_follows_from_the_residuals() -> None:
    law, logs, loss = data_set(0)
    fitted = fit(law, logs, loss)
    robust = 1.4826 * np.median(np.abs(fitted.residuals_R))
    assert fitted.width == pytest.approx(HUBER * fitted.spread) == pytest.approx(HUBER * robust, rel=0.02)
    assert replace(fitted, width=2.0).spread == 2.0 / HUBER
