"""`segvol-pl scaling fit`: runs in, laws with intervals and verdicts out.

1. Points are gathered. The variables that differ between them decide which laws are tried.
2. Each law is judged. If a law with a floor is not supported, the same law without it is tried. If both variables vary,
   laws of one variable are fitted to the runs at the largest value of the other.
3. Each law is fitted again without single sizes, without outliers, and with other widths of the Huber loss.
4. A supported law in N and D gives the compute-optimal frontier.
5. `fit.json` with the checklist of what a reader must know, `points.csv`, `frontier.csv`, figures and `index.html` are
   written to `out`.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segvol_pl import html_page
from segvol_pl.atomic import atomic_path, write_csv, write_text
from segvol_pl.config import DataCount, FitConfig
from segvol_pl.experiments import figures
from segvol_pl.experiments.checklist import Item, checklist
from segvol_pl.experiments.frontier import Optimum, cost, frontier
from segvol_pl.experiments.laws import Law
from segvol_pl.experiments.points import Points, gather
from segvol_pl.experiments.sensitivity import Refit, Sensitivity, examined
from segvol_pl.experiments.verdict import SYMBOLS, Interval, Verdict, judge, plain

log = logging.getLogger(__name__)

BOTH = ("params", "samples")
COST_SPREAD = 1.5
"""C = k N D is called rough if k differs between runs by more than this factor."""


@dataclass(frozen=True)
class Judged:
    """A verdict, the points of its law, and what its fit depends on."""

    verdict: Verdict
    points: Points
    found: Sensitivity | None


@dataclass(frozen=True)
class Results:
    """What is written."""

    points: Points
    laws: Sequence[Judged]
    optima: Sequence[Optimum]
    notes: Sequence[str]
    checklist: Sequence[Item]


def fit_runs(config: FitConfig) -> list[str]:
    """Write the results and return a summary, one string per line. Raises PointsError, ConfigError."""
    points = gather(config)
    laws = [each for law, chosen, where in _laws(points) for each in _judged(law, chosen, where, config)]
    judged = [each.verdict for each in laws]
    optima, notes = _frontier(judged, points, config)
    notes += _early(points)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(points, laws, optima, notes, checklist(points, judged, [each.found for each in laws], config))
    _write_tables(out, points, optima)
    _write_json(out, results)
    _write_page(out, results, config)
    lines = [line for each in judged for line in _summary(each)]
    return [*points.left_out, *lines, *notes, f"written to {out}: index.html, fit.json, points.csv, figures"]


def _laws(points: Points) -> list[tuple[Law, Points, str]]:
    """The laws to try, given the variables that differ between runs, each with its runs and their description."""
    varying = [name for name in BOTH if len({getattr(point, name) for point in points.used}) > 1]
    if len(varying) < 2:
        return [(Law((name,)), points, "all runs") for name in varying or BOTH]
    laws = [(Law(BOTH), points, "all runs")]
    for variable, other in (BOTH, BOTH[::-1]):
        largest = max(getattr(point, other) for point in points.used)
        chosen = [point for point in points.used if getattr(point, other) == largest]
        laws.append((Law((variable,)), replace(points, used=chosen), f"runs with {SYMBOLS[other]} = {largest:.4g}"))
    return laws


def _judged(law: Law, points: Points, where: str, config: FitConfig) -> list[Judged]:
    """Judge the law, and if it is not supported, the same law without a floor."""
    tried = []
    names = [point.name for point in points.used]
    for each in (law, replace(law, floor=False)):
        logs = points.logs(each.variables)
        verdict = judge(each, logs, points.losses, config.held_out, config.bootstraps, config.seed, where)
        verdict, found = examined(verdict, names)
        tried.append(Judged(verdict, points, found))
        if verdict.supported:
            break
    return tried


def _early(points: Points) -> list[str]:
    if not points.early:
        return []
    named = ", ".join(points.early[:5]) + (f" and {len(points.early) - 5} more" if len(points.early) > 5 else "")
    before = f"{len(points.early)} of {len(points.used)} losses were measured before the last step of their run"
    return [f"{before}, with a learning rate that had not yet decayed: {named}"]


def _frontier(judged: Sequence[Verdict], points: Points, config: FitConfig) -> tuple[list[Optimum], list[str]]:
    law = next((each for each in judged if each.supported and each.law.variables == BOTH), None)
    if law is None or law.fit is None:
        return [], ["no frontier: it needs a supported law in N and D"]
    if config.samples is DataCount.volumes:
        return [], ["no frontier: the number of training volumes does not give the training cost; use samples=seen"]
    per, spread = cost(points.used, config.flops_per)
    rough = f": rough, k differs by a factor of {spread:.1f} between runs" if spread > COST_SPREAD else ""
    return frontier(law.fit, points.used, per), [f"frontier by C = k N D, k = {per:.3g} FLOPs{rough}"]


def _summary(judged: Verdict) -> list[str]:
    head = f"{judged.law.formula} ({judged.where}, n = {judged.runs})"
    if not judged.supported:
        return [f"NOT SUPPORTED: {head}: {'; '.join(judged.reasons)}"]
    named = ", ".join(f"{name} {_interval_text(each)}" for name, each in judged.coefficients.items())
    held = judged.held_out
    error = (
        f"; largest {held.settings} settings predicted to {held.error:.1%}, {held.inside} of {held.runs} inside"
        if held
        else ""
    )
    return [f"supported: {head}: {named}{error}", *(f"  caution: {text}" for text in judged.cautions)]


def _interval_text(interval: Interval) -> str:
    return f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"


# ---- files ----


def _write_tables(out: Path, points: Points, optima: Sequence[Optimum]) -> None:
    axes = sorted({axis for point in points.used for axis in point.places})
    with atomic_path(out / "points.csv") as part, part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["name", "params", "samples", "loss", "flops", *axes])
        for point in points.used:
            places = [point.places.get(axis, "") for axis in axes]
            writer.writerow([point.name, point.params, point.samples, point.loss, point.flops or "", *places])
    if optima:
        write_csv(out / "frontier.csv", [_flat(optimum) for optimum in optima])


def _flat(optimum: Optimum) -> dict[str, Any]:
    row: dict[str, Any] = {"flops": optimum.flops}
    for name in ("params", "samples", "loss"):
        interval: Interval = getattr(optimum, name)
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**row, "outside_of_runs": optimum.beyond}


def _write_json(out: Path, results: Results) -> None:
    points = results.points
    content = {
        "loss": points.loss,
        "samples": points.samples,
        "runs": len(points.used),
        "unused": points.unused,
        "laws": [
            {**plain(each.verdict), "sensitivity": None if each.found is None else each.found.plain}
            for each in results.laws
        ],
        "frontier": [_flat(optimum) for optimum in results.optima],
        "notes": list(results.notes),
        "checklist": [asdict(item) for item in results.checklist],
    }
    write_text(out / "fit.json", json.dumps(content, indent=2) + "\n")


def _write_page(out: Path, results: Results, config: FitConfig) -> None:
    points, optima = results.points, results.optima
    about = f"{len(points.used)} runs. L is {points.loss}, N {points.params}, D {points.samples}. "
    about += f"Intervals are 95 % intervals from {config.bootstraps} bootstrap samples of seed {config.seed}."
    sections = [
        section for number, each in enumerate(results.laws) for section in _law_sections(out, number, points, each)
    ]
    if optima:
        png = figures.save(figures.frontier_figure(optima, points), out, "frontier")
        sections.append(
            html_page.Section("Compute-optimal frontier", pictures=[(png, "Frontier")], rows=_optima(optima))
        )
    sections.append(html_page.Section(lines=[(line, "note") for line in (*results.notes, *points.left_out)]))
    rows = [{"": item.part, "question": item.question, "answer": item.answer} for item in results.checklist]
    sections.append(html_page.Section("Checklist", rows=rows, texts=True))
    sections.append(html_page.Section("Runs", rows=_rows(points)))
    html_page.write_sections(out / "index.html", "Scaling fit", about, sections)


def _law_sections(out: Path, number: int, points: Points, each: Judged) -> list[html_page.Section]:
    judged = each.verdict
    lines = [(_summary(judged)[0], "yes" if judged.supported else "no"), *((text, "note") for text in judged.cautions)]
    section = html_page.Section(f"{judged.law.formula}: {judged.where}", lines)
    if judged.fit is None or each.found is None:
        return [section]
    for variable in judged.law.variables:
        png = figures.save(figures.law_figure(judged, each.points, variable), out, f"law-{number}-{variable}")
        section.pictures.append((png, f"{judged.law.formula} over {variable}"))
    if judged.held_out is not None:
        png = figures.save(figures.held_out_figure(judged, points), out, f"law-{number}-held-out")
        section.pictures.append((png, "Held-out extrapolation"))
    section.rows.extend(
        {"coefficient": name, "alone": _interval_text(alone), "all at once": _interval_text(judged.together[name])}
        for name, alone in judged.coefficients.items()
    )
    residuals = figures.save(figures.residual_figure(judged, each.points), out, f"law-{number}-residuals")
    depends = html_page.Section(
        f"{judged.law.formula}: what it depends on", pictures=[(residuals, "Residuals over N, D and the loss")]
    )
    depends.rows.extend(_refits(judged, each.found))
    return [section, depends]


def _refits(judged: Verdict, found: Sensitivity) -> list[dict[str, str]]:
    """The fit with all runs, then each changed fit. An exponent outside of its interval has a star."""
    every = Refit("all runs", judged.runs, {name: each.value for name, each in judged.coefficients.items()})
    rows = []
    for refit in (every, *found.refits):
        row = {"fit": refit.change, "runs": f"{refit.runs}"}
        for name, interval in judged.coefficients.items():
            value = refit.coefficients[name]
            row[name] = f"{value:.4g}{'' if interval.low <= value <= interval.high else ' *'}"
        rows.append(row)
    return rows


def _optima(optima: Sequence[Optimum]) -> list[dict[str, str]]:
    return [
        {
            "FLOPs": f"{optimum.flops:.3g}",
            "N": _interval_text(optimum.params),
            "D": _interval_text(optimum.samples),
            "loss": _interval_text(optimum.loss),
            "": "outside of the runs" if optimum.beyond else "",
        }
        for optimum in optima
    ]


def _rows(points: Points) -> list[dict[str, str]]:
    return [
        {"run": point.name, "N": f"{point.params:,.0f}", "D": f"{point.samples:,.0f}", "loss": f"{point.loss:.4g}"}
        for point in points.used
    ]
