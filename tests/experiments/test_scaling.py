"""Scaling fits: parameters of known laws come back, noise gives no law, extrapolation holds what it states."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from segvol_pl.config import CompareConfig, FitConfig
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.errors import ConfigError, PointsError
from segvol_pl.experiments.compare import Comparison, compare, compare_runs
from segvol_pl.experiments.fit import fit_runs
from segvol_pl.experiments.frontier import frontier
from segvol_pl.experiments.grid import parameters, volume_flops
from segvol_pl.experiments.laws import Law, bootstrap, fit
from segvol_pl.experiments.points import Point, Points, gather
from segvol_pl.experiments.verdict import Verdict, judge, predicted
from segvol_pl.html_page import Section, write_sections
from segvol_pl.planning.flops import run_parameters

BOTH, SIZE, DATA = Law(("params", "samples")), Law(("params",)), Law(("samples",))
TRUTH = {"E": 1.7, "A": 0.8 * 3e5**0.4, "alpha": 0.4, "B": 0.9 * 1e3**0.5, "beta": 0.5}
SIZES, DATAS = np.geomspace(3e4, 3e6, 6), np.geomspace(50, 5000, 6)


def truth(logs_RT: np.ndarray) -> np.ndarray:
    """The law of `TRUTH`."""
    params, samples = np.exp(np.asarray(logs_RT)).T
    loss = TRUTH["E"] + TRUTH["A"] / params ** TRUTH["alpha"] + TRUTH["B"] / samples ** TRUTH["beta"]
    return np.asarray(loss)


def design(seeds: int = 2, sizes: np.ndarray = SIZES, datas: np.ndarray = DATAS) -> np.ndarray:
    """(R,T): every size with every amount of data, `seeds` times."""
    axes = np.meshgrid(np.log(sizes), np.log(datas), np.arange(seeds), indexing="ij")
    return np.stack([axes[0].ravel(), axes[1].ravel()], axis=1)


def noisy(loss: np.ndarray, noise: float, seed: int) -> np.ndarray:
    return np.asarray(loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss))))


# ---- laws ----


@pytest.mark.parametrize("law", [BOTH, SIZE, Law(("samples",), floor=False)])
def test_slopes_are_those_of_the_law(law: Law) -> None:
    rng = np.random.default_rng(0)
    theta, logs = rng.standard_normal(law.size), rng.standard_normal((7, len(law.variables)))
    steps = 1e-6 * np.eye(law.size)
    measured = [(law.log_loss(theta + step, logs) - law.log_loss(theta - step, logs)) / 2e-6 for step in steps]
    np.testing.assert_allclose(law.slopes(theta, logs).T, measured, atol=1e-8)


def test_an_exact_law_comes_back_exactly() -> None:
    found = fit(BOTH, design(1), truth(design(1)))
    assert found.coefficients(found.theta_P) == pytest.approx(TRUTH, rel=1e-4)


def test_a_few_broken_runs_do_not_steer_the_fit() -> None:
    logs = design()
    loss = noisy(truth(logs), 0.01, 0)
    loss[[3, 40, 60]] *= 2
    found = fit(BOTH, logs, loss)
    assert found.coefficients(found.theta_P)["alpha"] == pytest.approx(TRUTH["alpha"], abs=0.06)
    assert found.coefficients(found.theta_P)["E"] == pytest.approx(TRUTH["E"], rel=0.06)


def trials(count: int, sizes: np.ndarray, datas: np.ndarray, noise: float) -> dict[str, int]:
    """How often each coefficient, all at once, and the loss at four times size and data lay in their intervals."""
    logs = design(2, sizes, datas)
    far = np.log([[4 * sizes[-1], 4 * datas[-1]]])
    counts = dict.fromkeys([*TRUTH, "all", "far", "supported"], 0)
    for seed in range(count):
        judged = judge(BOTH, logs, noisy(truth(logs), noise, seed), 0.1, 200, seed)
        assert judged.fit is not None
        for name, value in TRUTH.items():
            counts[name] += judged.coefficients[name].low <= value <= judged.coefficients[name].high
        counts["all"] += all(judged.together[n].low <= value <= judged.together[n].high for n, value in TRUTH.items())
        (beyond,) = predicted(judged.fit, far, noise=False)
        counts["far"] += beyond.low <= truth(far)[0] <= beyond.high
        counts["supported"] += judged.supported
    return counts


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_known_laws_lie_within_their_intervals_in_ninety_of_a_hundred_trials() -> None:
    counts = trials(100, SIZES, DATAS, noise=0.01)
    assert min(counts.values()) >= 90, counts


def test_known_laws_lie_within_their_intervals_mostly() -> None:
    """The same in six trials, in seconds."""
    counts = trials(6, SIZES, DATAS, noise=0.01)
    assert min(counts.values()) >= 4, counts


@pytest.mark.parametrize("law", [BOTH, SIZE, DATA, Law(("params", "samples"), floor=False)])
def test_noise_is_no_law(law: Law) -> None:
    logs = design()[:, : len(law.variables)]
    claimed = sum(
        judge(law, logs, noisy(np.full(72, 0.5), 0.05, seed), 0.1, 100, seed).supported for seed in range(100)
    )
    assert claimed <= 2


def test_the_bootstrap_is_seeded() -> None:
    logs = design(1)
    found = fit(BOTH, logs, noisy(truth(logs), 0.01, 0))
    first, again, other = (bootstrap(found, 20, seed).samples_SP for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# ---- verdicts ----


def reasons(judged: Verdict) -> str:
    assert not judged.supported
    return "; ".join(judged.reasons)


def test_too_few_runs_give_no_law() -> None:
    few = design(1, SIZES[:3], DATAS[:3])
    said = reasons(judge(BOTH, few, truth(few), 0.1, 100, 0))
    assert "too few values of N: 3, needs 4" in said
    row = design(1)[:5, 1:]
    assert "too few runs: 5, its 3 parameters need 6" in reasons(judge(DATA, row, np.exp(-row[:, 0]), 0.1, 100, 0))


def test_a_straight_line_has_no_floor_and_the_law_without_one_is_supported() -> None:
    logs = np.repeat(np.log(DATAS), 3)[:, None]
    loss = noisy(np.exp(-0.3 * logs[:, 0]), 0.02, 0)
    assert "no curvature: the floor E is not significantly" in reasons(judge(DATA, logs, loss, 0.1, 100, 0))
    power = judge(Law(("samples",), floor=False), logs, loss, 0.1, 100, 0)
    assert power.supported and power.coefficients["beta"].low < 0.3 < power.coefficients["beta"].high


def test_an_effect_within_its_interval_is_refused() -> None:
    """A slope of three standard errors: the trend is significant, its size nearly unknown."""
    logs = np.log(np.geomspace(50, 5000, 18))[:, None]
    line = np.column_stack([np.ones(18), logs])
    rest = np.random.default_rng(0).standard_normal(18)
    rest -= line @ np.linalg.lstsq(line, rest, rcond=None)[0]
    rest *= 0.02 / np.sqrt((rest**2).sum() / 16)
    slope = 3 * 0.02 / np.sqrt(((logs - logs.mean()) ** 2).sum())
    judged = judge(Law(("samples",), floor=False), logs, np.exp(rest - slope * logs[:, 0]), 0.1, 200, 0)
    assert "the interval is wider than the effect: D changes the loss by" in reasons(judged)


def test_a_plateau_at_the_largest_runs_does_not_extrapolate() -> None:
    """A power law up to the last two sizes, which are worse than it says."""
    logs = np.repeat(np.log(np.geomspace(10, 1e4, 10)), 2)[:, None]
    loss = np.exp(-0.3 * logs[:, 0])
    loss[-2:] *= 1.5
    said = reasons(judge(Law(("samples",), floor=False), logs, noisy(loss, 0.005, 0), 0.1, 100, 0))
    assert "it does not extrapolate: 2 of the 2 largest runs" in said


def test_what_a_law_misses_beyond_the_seeds_spread_is_a_caution() -> None:
    logs = np.repeat(np.log(np.geomspace(10, 1e4, 10)), 3)[:, None]
    bumpy = np.exp(-0.3 * logs[:, 0]) * (1 + 0.04 * np.sin(5 * logs[:, 0]))
    judged = judge(Law(("samples",), floor=False), logs, noisy(bumpy, 0.002, 0), 0.1, 100, 0)
    assert any("exceeds the spread of the seeds" in caution for caution in judged.cautions)


def test_the_frontier_is_the_least_loss_of_each_budget() -> None:
    logs = design(1)
    found = bootstrap(fit(BOTH, logs, truth(logs)), 100, 0)
    points = [Point("", *np.exp(row), loss=1.0) for row in logs]
    for best in frontier(found, points, per=6.0):
        sizes = np.geomspace(1e3, 1e8, 20001)
        losses = truth(np.log(np.stack([sizes, best.flops / 6 / sizes], axis=1)))
        assert best.loss.value == pytest.approx(losses.min(), rel=1e-3)
        assert best.params.value == pytest.approx(sizes[losses.argmin()], rel=0.02)
        assert best.params.low <= best.params.value <= best.params.high


# ---- points ----


def table_of(path: Path, metric: str = "loss", turn: Callable[[float], float] = float) -> Path:
    logs = design()
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["params", "samples", metric])
        rows = zip(np.exp(logs), noisy(truth(logs) / 10, 0.01, 0), strict=True)
        writer.writerows([*row, turn(float(loss))] for row, loss in rows)
    return path


def test_a_table_is_fitted_to_json_csv_figures_and_a_page(tmp_path: Path) -> None:
    table = table_of(tmp_path / "runs.csv")
    said = fit_runs(FitConfig(table=str(table), out=str(tmp_path / "fit"), bootstraps=100))
    assert said[0].startswith("supported: L = E + A / N^alpha + B / D^beta (all runs, n = 72)")
    written = json.loads((tmp_path / "fit/fit.json").read_text())
    law = written["laws"][0]
    assert law["supported"] and law["coefficients"]["beta"]["low"] < 0.5 < law["coefficients"]["beta"]["high"]
    assert law["held_out"]["settings"] == 4 and law["held_out"]["error"] < 0.05
    assert len(written["frontier"]) == 9
    names = {path.name for path in (tmp_path / "fit").iterdir()}
    assert {"points.csv", "frontier.csv", "frontier.png", "frontier.svg", "law-0-params.png", "index.html"} <= names
    page = (tmp_path / "fit/index.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("src=") >= 4 and " href=" not in page
    svg = (tmp_path / "fit/law-0-samples.svg").read_text()
    assert all(text in svg for text in ("D, samples seen", "n = 72", "band: 95 %"))
    alone, svg = written["laws"][1], (tmp_path / "fit/law-1-params.svg").read_text()
    assert alone["runs"] < 72 and f"runs (n = {alone['runs']})" in svg, "a law of one variable shows its own runs"


def test_one_minus_dice_is_the_loss_where_the_name_says_dice(tmp_path: Path) -> None:
    table = table_of(tmp_path / "runs.csv", "liver dice", lambda loss: 1 - loss)
    points = gather(FitConfig(table=str(table), metric="liver dice"))
    np.testing.assert_allclose(points.losses, noisy(truth(design()) / 10, 0.01, 0), rtol=1e-9)
    assert points.loss == "1 - liver dice"
    identity_collate = gather(FitConfig(table=str(table), metric="liver dice", one_minus=False))
    np.testing.assert_allclose(identity_collate.losses, 1 - points.losses)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("params,loss\n1,2\n", "runs.csv:2: no samples; a table has columns params, samples, loss"),
        ("params,samples,loss\n1,2,3\n1,x,3\n", "runs.csv:3: could not convert string to float: 'x'"),
        ("params,samples,loss\n1,2,-3\n", "runs.csv:2: the loss is -3: it must be finite and above 0"),
        ("params,samples,loss\n", "no run gives a point for loss"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(PointsError) as caught:
        gather(FitConfig(table=str(tmp_path / "runs.csv")))
    assert problem in str(caught.value)


def run_folder(folder: Path, hidden: int, state: str = "finished", **places: str) -> Path:
    """A run folder as training leaves it: configuration, metrics, the grid's record, and a user's own file."""
    config = load("train", [f"model.hidden_size={hidden}", "data.shards=x", "run.out=x", "optim.max_steps=100"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = "0,val/loss,1.5\n0,data/volumes,40\n50,val/loss,0.6\n100,val/loss,0.7\n"
    (folder / "metrics.csv").write_text("step,metric,value\n" + rows + "100,val/dice/text,0.8\n100,my own,0.3\n")
    record = {"state": state, "name": folder.name, "places": {"size": str(hidden), **places}}
    (folder / "grid.json").write_text(json.dumps(record))
    (folder / "mine.json").write_text(json.dumps({"by": {"organ": [{"hd95": 4.5}]}}))
    return folder


def test_run_folders_give_size_samples_compute_and_any_metric(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "runs/a", 96)
    config = load("train", [str(folder / "config.yaml")])
    for settings, loss, samples in [
        ({}, 0.7, 3200),
        ({"take": "best"}, 0.6, 1600),
        ({"metric": "val/dice/text"}, 0.2, 3200),
        ({"metric": "my own", "samples": "volumes"}, 0.3, 40),
        ({"metric": "mine.json:by.organ.0.hd95"}, 4.5, 3200),
    ]:
        pairs = [f"{key}={value}" for key, value in settings.items()]
        (point,) = gather(load("scaling fit", [f"runs=[{tmp_path / 'runs'}]", *pairs])).used
        assert (point.loss, point.samples) == (pytest.approx(loss), samples)
        assert point.params == parameters(config) and point.places == {"size": "96"}
        steps = 50 if settings.get("take") == "best" else 100
        assert point.flops == steps * 32 * volume_flops(config)


def test_frozen_tensors_are_no_parameters_of_a_law(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "runs/a", 96)
    (whole,) = gather(FitConfig(runs=[str(tmp_path / "runs")])).used
    pairs = [str(folder / "config.yaml"), "freeze=[image_encoder.*,text_encoder.*]"]
    frozen = load("train", pairs)
    (folder / "config.yaml").write_text(to_yaml(frozen))
    (point,) = gather(FitConfig(runs=[str(tmp_path / "runs")])).used
    parts = run_parameters(frozen)
    assert point.params == whole.params - parts["image_encoder"] - parts["text_encoder"] > 0


def test_a_run_counts_the_samples_that_it_saw(tmp_path: Path) -> None:
    """Stopped before its end; continued from step 300 of another run; both with the steps that were trained."""
    stopped, branch = run_folder(tmp_path / "runs/stopped", 96), run_folder(tmp_path / "runs/branch", 96)
    (stopped / "metrics.csv").write_text("step,metric,value\n60,val/loss,0.9\n")
    config = load("train", [str(branch / "config.yaml"), "optim.max_steps=400"])
    (branch / "config.yaml").write_text(to_yaml(config))
    (branch / "metrics.csv").write_text("step,metric,value\n350,val/loss,0.6\n400,val/loss,0.5\n")
    points = gather(FitConfig(runs=[str(tmp_path / "runs")]))
    assert {point.name: point.samples for point in points.used} == {"stopped": 60 * 32, "branch": 400 * 32}
    assert points.early == ["stopped"]


def test_the_checklist_is_filled_in_from_the_runs(tmp_path: Path) -> None:
    for size in (48, 96, 144, 192, 240):
        for seed in "01":
            run_folder(tmp_path / f"runs/{size}-{seed}", size, seed=seed)
    fit_runs(FitConfig(runs=[str(tmp_path / "runs")], out=str(tmp_path / "fit"), bootstraps=100))
    written = json.loads((tmp_path / "fit/fit.json").read_text())
    answers = {item["question"]: item["answer"] for item in written["checklist"]}
    assert {item["part"] for item in written["checklist"]} == {"law", "training", "points", "fit"}
    assert "CLIP" in answers["What does N count?"] and answers["What does D count?"].startswith("samples seen until")
    assert answers["How many models were trained?"] == "10 in 5 settings: 2 for each on average"
    assert answers["Which optimizer and learning rates?"].startswith("AdamW: lr 0.0001, weight_decay 1e-05")
    assert "max_steps 100" in answers["Which optimizer and learning rates?"]
    assert answers["Which checkpoints enter?"] == "one point per run, the last value of the metric; no other checkpoint"
    assert answers["Which parts did not train?"] == "nothing" and all(answers.values())
    assert "exponential weights" in answers["Which intervals?"]


def test_runs_that_give_no_point_are_listed_with_the_reason(tmp_path: Path) -> None:
    run_folder(tmp_path / "runs/a", 96)
    run_folder(tmp_path / "runs/b", 96, state="failed")
    (run_folder(tmp_path / "runs/c", 96) / "metrics.csv").unlink()
    points = gather(FitConfig(runs=[str(tmp_path / "runs")]))
    assert [point.name for point in points.used] == ["a"]
    assert [why for _, why in sorted(points.unused.items())] == [
        "is failed, not finished",
        "metrics.csv holds no val/loss",
    ]
    with pytest.raises(PointsError, match="nowhere"):
        gather(FitConfig(runs=[str(tmp_path / "nowhere")]))


def test_a_page_escapes_names(tmp_path: Path) -> None:
    sections = [Section("<h>", [("a < b", "note")], [(b"PNG", 'the "<p>"')], [{"<run>": "<&>"}])]
    write_sections(tmp_path / "page.html", "A & B", "about <x>", sections)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for text in ("<h1>A &amp; B</h1>", "about &lt;x&gt;", "<h2>&lt;h&gt;</h2>", '<p class="note">a &lt; b</p>'):
        assert text in page
    assert 'alt="the &#34;&lt;p&gt;&#34;" src="data:image/png;base64,UE5H"' in page
    assert "<th>&lt;run&gt;</th>" in page and "<td>&lt;&amp;&gt;</td>" in page


# ---- comparisons ----


def paired(effect: float, spread: float, seeds: int = 4) -> Points:
    """Two starts at three data sizes: seeds differ by much, pairs by `spread`."""
    rng = np.random.default_rng(0)
    used = []
    for data, level in (("0.1", 0.6), ("0.5", 0.5), ("1.0", 0.4)):
        for seed in range(seeds):
            base = level + 0.1 * rng.standard_normal()
            for start, change in (("scratch", 0.0), ("simmim", effect)):
                loss = base + change + spread * rng.standard_normal()
                places = {"data": data, "start": start, "seed": str(seed)}
                used.append(Point(f"{data}-{start}-{seed}", 1e5, 100, loss, places=places))
    return Points(used, {}, "val/loss", "samples seen")


def overall(comparison: Comparison) -> str:
    return comparison.differences[-1].verdict


def test_pairs_show_an_effect_that_seeds_would_hide() -> None:
    found = compare(paired(-0.03, 0.002), "start")
    assert [each.where for each in found.differences] == ["data 0.1", "data 0.5", "data 1.0", ""]
    assert overall(found) == "better" and [each.n for each in found.differences] == [4] * 4
    low, high = found.differences[-1].low, found.differences[-1].high
    assert low is not None and high is not None and low < -0.03 < high < 0
    turned = compare(paired(-0.03, 0.002), "start", baseline="simmim")
    assert overall(turned) == "worse"


def test_no_difference_is_said_and_one_pair_has_no_interval() -> None:
    assert overall(compare(paired(0.0, 0.01), "start")) == "no difference shown"
    single = compare(paired(-0.03, 0.0, seeds=1), "start").differences[0]
    assert single.verdict == "one pair: no interval" and single.low is None


def test_runs_without_a_partner_are_named() -> None:
    points = paired(-0.03, 0.002)
    kept = [point for point in points.used if point.name != "0.5-scratch-2"]
    assert compare(Points(kept, {}, "", ""), "start").unpaired == ["0.5-simmim-2"]
    with pytest.raises(ConfigError, match="data, seed, start") as caught:
        compare(points, "size")
    assert caught.value.key == "axis"
    with pytest.raises(ConfigError, match="scratch, simmim") as caught:
        compare(points, "start", "x")
    assert caught.value.key == "baseline"


def test_a_comparison_of_run_folders_is_written(tmp_path: Path) -> None:
    for size in (48, 96):
        for seed in "01":
            run_folder(tmp_path / f"runs/{size}-{seed}", size, seed=seed)
    out = tmp_path / "compared"
    said = compare_runs(CompareConfig(runs=[str(tmp_path / "runs")], axis="size", out=str(out)))
    assert said[0].startswith("no difference shown: 96 against 48 over all: +0 (+0.0%) [+0, +0] (n = 2)")
    assert {path.name for path in out.iterdir()} == {
        "compare.json",
        "differences.csv",
        "differences.png",
        "differences.svg",
        "index.html",
    }
