"""`segvol-pl scaling mix`: runs over mixture weights in, laws of mixtures, a transfer matrix and a proposal out.

1. A run folder of several sources holds the share of each (`data/share/SOURCE`) and its validation losses
   (`val/loss/SOURCE`). A CSV file may hold the same. A source that a run leaves out has the share 0.
2. The runs must be alike in all but `data.mix` and seeds: a law of mixtures holds for one size and length of training.
3. `mixture` fits and judges the laws.
4. `mix.json`, `transfer.csv`, `mixtures.csv`, a figure and `index.html` are written to `out`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.config import MetricPick, MixConfig, loader
from segvol_pl.errors import ConfigError, PointsError, listed
from segvol_pl.experiments.mix_report import change_text, share_text, write_results
from segvol_pl.experiments.mixture import Mixed, Mixtures, inside, judge_mixtures, predict
from segvol_pl.experiments.points import run_folders
from segvol_pl.experiments.verdict import tails
from segvol_pl.run_folder import SHARE, read_every_metric, read_grid_entry

FREE = ("data.mix", "data.seed", "run.", "track.")
"""Keys, and beginnings of keys, in which the runs may differ."""
SUM = 0.01
"""How far the shares of a mixture may be from 1 together."""


@dataclass(frozen=True)
class MixRun:
    """One run: its mixture and what it came to."""

    name: str
    shares: dict[str, float]
    losses: dict[str, float]
    weights: dict[str, float]
    """Source -> weight in `data.mix`; empty for a row of a table."""
    settings: dict[str, Any]
    """What must be equal in all runs."""


def mix_runs(config: MixConfig) -> list[str]:
    """Write the results and return a summary, one string per line. Raises PointsError, ConfigError."""
    runs, unused = _gathered(config)
    mixtures = _mixtures(runs)
    goal = config.goal or mixtures.targets
    if unknown := [name for name in goal if name not in mixtures.targets]:
        known = listed(mixtures.targets)
        raise ConfigError(f"goal: no run has a loss on {unknown[0]!r}; there are {known}", "goal")
    asked = _asked(config.predict, mixtures)
    mixed = judge_mixtures(mixtures, goal, config.bootstraps, config.seed)
    expected = _expected(mixed, asked) if asked is not None else []
    notes = [f"left out {name}: {why}" for name, why in unused.items()]
    notes += _as_keys(mixed, runs)
    write_results(Path(config.out), mixed, runs, expected, notes, config)
    written = f"written to {config.out}: index.html, mix.json, transfer.csv, mixtures.csv"
    return [*_summary(mixed), *expected, *notes, written]


# ---- runs ----


def _gathered(config: MixConfig) -> tuple[list[MixRun], dict[str, str]]:
    """The runs, and those that cannot be used with the reason. Raises PointsError if they are not alike."""
    if config.table is not None:
        return _table(Path(config.table)), {}
    runs, unused = list[MixRun](), dict[str, str]()
    for folder in run_folders(config.runs):
        try:
            runs.append(_run(folder, config))
        except PointsError as error:
            unused[str(folder)] = str(error)
    if not runs:
        first = "; ".join(f"{name}: {why}" for name, why in list(unused.items())[:3])
        raise PointsError(f"no run can be used: {first}")
    for run in runs[1:]:
        for key in sorted({*run.settings, *runs[0].settings}):
            mine, theirs = run.settings.get(key), runs[0].settings.get(key)
            if mine != theirs:
                raise PointsError(
                    f"{run.name} and {runs[0].name} differ in {key} ({mine}, {theirs}): give runs that differ in "
                    "data.mix and seeds alone"
                )
    return runs, unused


def _run(folder: Path, config: MixConfig) -> MixRun:
    """The run in a folder. Raises PointsError if it cannot be used."""
    record = read_grid_entry(folder)
    if record and record["state"] != "finished":
        raise PointsError(f"is {record['state']}, not finished")
    try:
        run = loader.load_run([str(folder / "config.yaml")])
    except ConfigError as error:
        raise PointsError(str(error)) from None
    metrics = folder / "metrics.csv"
    logged = read_every_metric(metrics) if metrics.exists() else {}
    shares = {name.removeprefix(SHARE): rows[-1][1] for name, rows in logged.items() if name.startswith(SHARE)}
    if not shares:
        raise PointsError(f"metrics.csv holds no {SHARE}SOURCE: it was trained on one source, or by an older version")
    losses = {
        source: _loss(logged[name], config) for source in shares if (name := f"{config.metric}/{source}") in logged
    }
    if not losses:
        raise PointsError(f"metrics.csv holds no {config.metric}/SOURCE")
    reached = max(step for source in losses for step, _ in logged[f"{config.metric}/{source}"])
    if reached < run.optim.max_steps:
        raise PointsError(f"was validated last at step {reached} of {run.optim.max_steps}")
    weights = [1.0, *(float(entry.partition("*")[0]) if "*" in entry else 1.0 for entry in run.data.mix)]
    settings = {key: value for key, value in loader.flat(loader.plain(run)).items() if not key.startswith(FREE)}
    # Metrics are in the order of the folders.
    named = dict(zip(shares, weights, strict=True)) if len(weights) == len(shares) else {}
    return MixRun(record["name"] if record else folder.name, shares, losses, named, settings)


def _loss(rows: Sequence[tuple[int, float]], config: MixConfig) -> float:
    turned = config.metric == "val/dice"
    losses = [1 - value if turned else value for _, value in rows]
    loss = min(losses) if config.take is MetricPick.best else losses[-1]
    if not (math.isfinite(loss) and loss > 0):
        raise PointsError(f"a loss is {loss:g}: it must be finite and above 0")
    return loss


def _table(path: Path) -> list[MixRun]:
    """The rows of a table. Raises PointsError naming file, line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise PointsError(f"{path}: no such file") from None
    runs = []
    for line, row in enumerate(rows, start=2):
        try:
            shares, losses = (
                {name.removeprefix(start): float(value) for name, value in row.items() if name.startswith(start)}
                for start in ("share/", "loss/")
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise PointsError(f"{path}:{line}: {error}: every share/SOURCE and loss/SOURCE needs a number") from None
        sum_of = sum(shares.values())
        if not losses or abs(sum_of - 1) > SUM or min(shares.values()) < 0:
            raise PointsError(
                f"{path}:{line}: needs loss/SOURCE, and share/SOURCE that sum to 1 (they sum to {sum_of:g})"
            )
        if not all(math.isfinite(loss) and loss > 0 for loss in losses.values()):
            raise PointsError(f"{path}:{line}: a loss is not above 0")
        runs.append(MixRun(f"{path.name}:{line}", shares, losses, {}, {}))
    if not runs:
        raise PointsError(f"{path}: no rows; it needs the columns share/SOURCE and loss/SOURCE")
    return runs


def _mixtures(runs: Sequence[MixRun]) -> Mixtures:
    """The mixtures of the runs. Raises PointsError if they share no loss."""
    sources = list(dict.fromkeys(source for run in runs for source in run.shares))
    targets = [name for name in dict.fromkeys(runs[0].losses) if all(name in run.losses for run in runs)]
    if not targets:
        raise PointsError("no source has a loss in every run: give runs whose data.mix names the same folders")
    share_NM = np.array([[run.shares.get(source, 0.0) for source in sources] for run in runs])
    share_NM /= share_NM.sum(axis=1, keepdims=True)
    return Mixtures.of(sources, share_NM, targets, np.array([[run.losses[name] for name in targets] for run in runs]))


# ---- a mixture to predict ----


def _asked(entries: Sequence[str], mixtures: Mixtures) -> np.ndarray | None:
    """The mixture to predict, (M,). Raises ConfigError for anything else, PointsError outside of the runs."""
    if not entries:
        return None
    given = dict(entry.rpartition("=")[::2] for entry in entries)
    try:
        shares = {name: float(text) for name, text in given.items()}
    except ValueError:
        shares = {}
    if set(shares) != set(mixtures.sources) or abs(sum(shares.values()) - 1) > SUM:
        names = ", ".join(f"{name}=SHARE" for name in mixtures.sources)
        raise ConfigError(f"predict: needs {names}, which sum to 1", "predict")
    share_M = np.array([shares[name] for name in mixtures.sources])
    share_M /= share_M.sum()
    if not inside(share_M, mixtures.share_RM):
        raise PointsError("predict: this mixture lies outside of those that were run, where a law says nothing: run it")
    return share_M


def _expected(mixed: Mixed, share_M: np.ndarray) -> list[str]:
    lines = []
    for law in mixed.laws:
        if not law.supported:
            continue
        value = float(predict(law.theta_P, share_M[None])[0])
        low, high = np.quantile(predict(mixed.samples[law.target], share_M[None])[:, 0], tails())
        lines.append(f"predicted loss on {law.target}: {value:.4g} [{low:.4g}, {high:.4g}]")
    return lines or ["nothing can be predicted: no law is supported"]


# ---- the summary ----


def _summary(mixed: Mixed) -> list[str]:
    if mixed.reasons:
        return [f"NO LAW: {reason}" for reason in mixed.reasons]
    lines = []
    for law in mixed.laws:
        form = "c + exp(s r)" if law.floor else "exp(s r)"
        head = f"loss on {law.target} = {form} (n = {len(law.residual_R)} mixtures)"
        detail = f"noise {law.noise:.2%}, error on mixtures left out {law.error:.2%}"
        lines.append(f"supported: {head}: {detail}" if law.supported else f"NOT SUPPORTED: {head}: {law.reasons[0]}")
    for (target, source), effect in mixed.transfer.items():
        lines.append(f"10 points more of {source}: loss on {target} {change_text(effect)}")
    if mixed.proposal is None:
        return [*lines, "no proposal: no law of a source in goal is supported"]
    proposal = mixed.proposal
    if proposal.reasons:
        return [*lines, *(f"no proposal: {reason}" for reason in proposal.reasons)]
    named = zip(mixed.mixtures.sources, proposal.share, strict=True)
    shares = ", ".join(f"{name} {share_text(share)}" for name, share in named)
    change = change_text(proposal.change)
    lines.append(f"proposed mixture: {shares}: mean loss {change} against the mean of the mixtures")
    return [*lines, *(f"caution: {each}" for each in proposal.cautions)]


def _as_keys(mixed: Mixed, runs: Sequence[MixRun]) -> list[str]:
    """The proposed mixture as weights of `data.mix`, if the runs state theirs: one line, or none."""
    proposal, sources = mixed.proposal, mixed.mixtures.sources
    run = next((each for each in runs if set(each.weights) == set(sources)), None)
    if proposal is None or proposal.reasons or run is None or proposal.share[0].value <= 0:
        return []
    # A share is proportional to weight x volumes.
    weight = [
        share.value * run.weights[name] / run.shares[name] for name, share in zip(sources, proposal.share, strict=True)
    ]
    named = ", ".join(f"{name} {each / weight[0]:.3g}" for name, each in zip(sources, weight, strict=True))
    return [f"as weights of data.mix, with {sources[0]} at 1: {named}"]
