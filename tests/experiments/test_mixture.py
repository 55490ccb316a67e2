"""Laws of mixtures: planted ones come back, noise gives none, and nothing is said beyond the mixtures that were run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mixtures import SOURCES, planted, thetas, trials

from segvol_pl.config import MixConfig
from segvol_pl.config.loader import load, to_yaml
from segvol_pl.errors import ConfigError, PointsError
from segvol_pl.experiments.mix import mix_runs
from segvol_pl.experiments.mixture import (
    Mixtures,
    _fitted,
    best_mixture,
    goal_of,
    inside,
    judge_mixtures,
    predict,
    refitted,
    transfer_of,
)

# ---- the law ----


def test_an_exact_law_comes_back_exactly() -> None:
    mixtures = planted(noise=0, seed=0)
    for place, theta in enumerate(thetas()):
        found = _fitted(mixtures.share_RM, np.log(mixtures.loss_RI[:, place]), floor=True)
        np.testing.assert_allclose(found, theta, rtol=1e-4, atol=1e-4)


def test_many_fits_at_once_are_those_one_by_one() -> None:
    mixtures = planted(noise=0.02, seed=1)
    logs = np.log(planted(0.02, 2).loss_RI.T)[:1] + 0.02 * np.random.default_rng(0).standard_normal((5, 12))
    for floor in (True, False):
        start = thetas()[0] if floor else thetas()[0][:3]
        alone = np.array([_fitted(mixtures.share_RM, log_R, floor) for log_R in logs])
        np.testing.assert_allclose(refitted(mixtures.share_RM, logs, start), alone, rtol=1e-3, atol=1e-3)


def test_transfer_is_the_slope_along_a_growing_share() -> None:
    share, step = np.array([0.2, 0.5, 0.3]), 1e-5
    for theta in thetas():
        for source in range(3):
            moved = share + step * (np.eye(3)[source] - share) / (1 - share[source])
            before, after = predict(theta, np.stack([share, moved]))
            assert transfer_of(theta, share, source) == pytest.approx(0.1 * (after / before - 1) / step, rel=1e-3)


def test_the_best_mixture_is_the_best_within_the_hull() -> None:
    mixtures, truth = planted(0, 0), [theta[None] for theta in thetas()]
    (best,) = best_mixture(truth, [1.0] * 3, mixtures.share_RM)
    assert inside(best, mixtures.share_RM)
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.full(12, 0.3), 2000) @ mixtures.share_RM
    assert goal_of(truth, [1.0] * 3, best[None])[0, 0] < goal_of(truth, [1.0] * 3, others).min() * (1 + 1e-4)


def test_runs_of_one_mixture_count_as_one() -> None:
    mixtures = Mixtures.of(
        ["a", "b"], np.array([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8]]), ["a"], np.array([[1.0], [4.0], [3.0]])
    )
    assert mixtures.runs_R.tolist() == [1, 2]
    np.testing.assert_allclose(mixtures.loss_RI[:, 0], [3, 2])


# ---- the verdict ----


def test_planted_laws_are_recovered_and_noise_is_refused() -> None:
    """`benchmarks/mixtures.py` has 100 trials of each."""
    found = trials(10, noise=0.01, bootstraps=100)
    assert found.recovered >= 9
    assert found.covered is not None and found.covered.sum() >= 0.9 * 90
    pure = trials(10, noise=0.01, bootstraps=100, effect=False)
    assert pure.any_law <= 1 and pure.any_proposal == 0


def reasons(mixtures: Mixtures) -> str:
    return " ".join(judge_mixtures(mixtures, SOURCES, 100, 0).reasons)


def test_too_few_mixtures_give_no_law() -> None:
    assert "too few mixtures: 5, 3 sources need 6" in reasons(planted(0.01, 0, grid=planted_grid()[:5]))


def planted_grid() -> list[list[float]]:
    return planted(0, 0).share_RM.tolist()


def test_shares_that_hardly_vary_or_only_together_give_no_law() -> None:
    narrow = [[0.3 + 0.001 * n, 0.3, 0.4 - 0.001 * n] for n in range(8)]
    assert "the share of chest hardly varies: 30% to 30%" in reasons(planted(0.01, 0, grid=narrow))
    line = [[0.1 * n, 0.05 * n, 1 - 0.15 * n] for n in range(6)]
    assert "some shares vary only together" in reasons(planted(0.01, 0, grid=line))


def test_with_few_mixtures_the_law_has_no_floor() -> None:
    mixed = judge_mixtures(planted(0.01, 0, grid=planted_grid()[:6]), SOURCES, 100, 0)
    assert not mixed.reasons and not any(law.floor for law in mixed.laws)


def test_a_best_mixture_at_the_edge_is_a_caution() -> None:
    """The best one, with two thirds of the chest, is not among those that were run."""
    grid = [[share[0], 0.5 * share[1], 1 - share[0] - 0.5 * share[1]] for share in planted_grid()]
    proposal = judge_mixtures(planted(0.005, 0, grid=grid), SOURCES, 100, 0).proposal
    assert proposal is not None and "at the edge" in proposal.cautions[0]


# ---- the command ----


def table(path: Path, mixtures: Mixtures) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([f"share/{name}" for name in SOURCES] + [f"loss/{name}" for name in SOURCES])
        writer.writerows(np.hstack([mixtures.share_RM, mixtures.loss_RI]).tolist())
    return path


def test_a_table_gives_a_matrix_a_proposal_and_a_page(tmp_path: Path) -> None:
    config = MixConfig(
        table=str(table(tmp_path / "runs.csv", planted(0.01, 0))), out=str(tmp_path / "mix"), bootstraps=100
    )
    said = mix_runs(replace(config, predict=["abdomen=0.3", "chest=0.4", "head=0.3"]))
    assert sum(line.startswith("supported: loss on") for line in said) == 3
    assert any(line.startswith("proposed mixture: abdomen ") for line in said)
    assert sum(line.startswith("predicted loss on") for line in said) == 3
    found = json.loads((tmp_path / "mix/mix.json").read_text())
    assert found["proposal"]["supported"] and 0.5 < found["proposal"]["shares"]["chest"]["value"] < 0.8
    with (tmp_path / "mix/transfer.csv").open(newline="") as stream:
        shown = {(row["loss_on"], row["more_of"]): row["shown"] for row in csv.DictReader(stream)}
    assert shown["chest", "chest"] == "helps" and shown["chest", "head"] == "hurts" and len(shown) == 9
    page = (tmp_path / "mix/index.html").read_text()
    assert "Proposed mixture" in page and "<img" in page
    with pytest.raises(PointsError, match="lies outside of those that were run"):
        mix_runs(replace(config, predict=["abdomen=0", "chest=0", "head=1"]))
    with pytest.raises(ConfigError, match="predict: needs abdomen=SHARE, chest=SHARE, head=SHARE"):
        mix_runs(replace(config, predict=["abdomen=0.3"]))
    with pytest.raises(ConfigError, match="goal: no run has a loss on 'pelvis'"):
        mix_runs(replace(config, goal=["pelvis"]))


def test_noise_is_refused_in_words(tmp_path: Path) -> None:
    path = table(tmp_path / "runs.csv", planted(0.01, 3, effect=False))
    said = mix_runs(MixConfig(table=str(path), out=str(tmp_path / "mix"), bootstraps=100))
    assert sum("no effect of the mixture beyond noise" in line for line in said) == 3
    assert "no proposal: no law of a source in goal is supported" in said
    assert "follows no law" in (tmp_path / "mix/index.html").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("share/a,loss/a\n", "no rows"),
        ("share/a,share/b,loss/a\n0.5,0.2,1\n", r":2: .*sum to 1 \(they sum to 0\.7\)"),
        ("share/a,share/b,loss/a\n0.5,x,1\n", ":2: .*needs a number"),
        ("share/a,share/b,loss/a\n0.5,0.5,0\n", ":2: a loss is not above 0"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(PointsError, match=problem):
        mix_runs(MixConfig(table=str(tmp_path / "runs.csv"), out=str(tmp_path / "mix")))


def run_folder(folder: Path, shares: list[float], losses: list[float], *keys: str, step: int = 10) -> Path:
    folder.mkdir(parents=True)
    # Three folders of equally many volumes.
    mix = [f"{share / shares[0]!r}*{name}" for share, name in zip(shares[1:], ("chest", "head"), strict=True)]
    given = ["data.shards=abdomen", f"data.mix={json.dumps(mix)}", f"run.out={folder}", "optim.max_steps=10", *keys]
    (folder / "config.yaml").write_text(to_yaml(load("pretrain", given)))
    rows = [[0, f"data/share/{name}", share] for name, share in zip(SOURCES, shares, strict=True)]
    rows += [
        [at, f"val/loss/{name}", loss + step - at]
        for at in (0, step)
        for name, loss in zip(SOURCES, losses, strict=True)
    ]
    with (folder / "metrics.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["step", "metric", "value"], *rows])
    return folder


def test_run_folders_give_shares_and_losses(tmp_path: Path) -> None:
    mixtures = planted(0.01, 0)
    for number, (shares, losses) in enumerate(zip(mixtures.share_RM.tolist(), mixtures.loss_RI.tolist(), strict=True)):
        run_folder(tmp_path / f"runs/{number:02d}", shares, losses)
    run_folder(tmp_path / "runs/stopped", [0.2, 0.4, 0.4], [1, 1, 1], step=5)
    config = MixConfig(runs=[str(tmp_path / "runs")], out=str(tmp_path / "mix"), bootstraps=100)
    said = mix_runs(config)
    assert any("stopped: was validated last at step 5 of 10" in line for line in said)
    with (tmp_path / "mix/mixtures.csv").open(newline="") as stream:
        assert [float(row["loss/head"]) for row in csv.DictReader(stream)] == pytest.approx(
            mixtures.loss_RI[:, 2].tolist()
        )
    proposal = json.loads((tmp_path / "mix/mix.json").read_text())["proposal"]["shares"]
    ratio = proposal["chest"]["value"] / proposal["abdomen"]["value"]
    assert any(f"with abdomen at 1: abdomen 1, chest {ratio:.3g}, head" in line for line in said)
    run_folder(tmp_path / "runs/larger", [0.2, 0.4, 0.4], [1, 1, 1], "model.num_layers=2")
    with pytest.raises(PointsError, match=r"differ in model\.num_layers \(2, 12\)"):
        mix_runs(config)
