"""Whether the paper's claims hold here: our figures with intervals over seeds, the paper's next to them, a verdict.

1. `measured` reads a figure of one run from the summary.json of its evaluation.
2. `judge` compares the figures of a claim in pairs of equal seed. A claim holds if the interval of every expected
   difference (Student's t, 95 %) lies above 0. It does not hold if one lies below 0. Otherwise it is not shown.
3. `write` makes paper.json and the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl import html_page
from segvol_pl.atomic import write_text
from segvol_pl.errors import PointsError
from segvol_pl.experiments import figures, launch
from segvol_pl.experiments.claims import Claim, Expectation, Figure, as_number
from segvol_pl.experiments.study import Study
from segvol_pl.experiments.verdict import Interval, mean_interval
from segvol_pl.run_folder import manifest

HOLDS, FAILS, OPEN = "holds", "does not hold", "not shown"
KINDS = {HOLDS: "yes", FAILS: "no", OPEN: "note"}
"""Verdict -> kind of the line on the page."""
PAGE, RESULTS = "index.html", "paper.json"


@dataclass(frozen=True)
class Measured:
    """A figure of ours."""

    figure: Figure
    values: dict[int, float]
    """Seed -> value, for the seeds that have been evaluated."""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None if there is no value yet."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def interval(self) -> Interval | None:
        """Interval of the mean; None for fewer than two seeds."""
        return mean_interval(list(self.values.values()))


@dataclass(frozen=True)
class Judged:
    """One expectation, with the differences of pairs of equal seed."""

    expectation: Expectation
    differences: list[float]

    @property
    def interval(self) -> Interval | None:
        """Interval of the mean difference; None for fewer than two pairs."""
        return mean_interval(self.differences)

    @property
    def verdict(self) -> str:
        """Whether the difference is above 0, below, or neither is shown."""
        if self.interval is None or self.interval.low <= 0 <= self.interval.high:
            return OPEN
        return HOLDS if self.interval.low > 0 else FAILS


@dataclass(frozen=True)
class Result:
    """A claim with our figures."""

    claim: Claim
    measured: list[Measured]
    judged: list[Judged]

    @property
    def verdict(self) -> str:
        """Holds if all expectations do; does not hold if one does not."""
        verdicts = {each.verdict for each in self.judged}
        return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


# ---- figures ----


def judge(study: Study, claim: Claim) -> Result:
    """Read the figures of a claim and compare them. Raises PointsError for a summary that lacks a figure."""
    found = {figure.name: _measured(study, claim, figure) for figure in claim.figures.values()}
    judged = [
        Judged(each, _differences(_values(found, each.larger), _values(found, each.smaller), study.seeds))
        for each in claim.expect
    ]
    return Result(claim, list(found.values()), judged)


def _measured(study: Study, claim: Claim, figure: Figure) -> Measured:
    values = {}
    for seed in study.seeds:
        path = study.evaluation(figure.run, seed, figure.evaluation) / "summary.json"
        if path.exists():
            values[seed] = measured(json.loads(path.read_text(encoding="utf-8")), figure, claim.categories, path)
    return Measured(figure, values)


def measured(summary: Mapping[str, Any], figure: Figure, categories: Sequence[str], path: Path) -> float:
    """Return a figure of one evaluation, as a mean over categories.

    Args:
        summary: Content of summary.json.
        figure: What to read.
        categories: Categories to average over; all that have the figure if empty.
        path: The file, for the error.

    Raises:
        PointsError: A category, or the figure, is not in the summary.
    """
    if figure.of == "first":
        found = {name: match["first"] for name, match in summary["matches"].items()}
    else:
        cells = [cell for cell in summary["categories"] if _is_of(cell, figure)]
        values = {cell["category"]: cell[figure.of] for cell in cells}
        found = {
            name: value["mean"] if isinstance(value, dict) else value
            for name, value in values.items()
            if value is not None
        }
    missing = [name for name in categories if name not in found]
    if missing or not found:
        raise PointsError(f"{path}: has no {figure.name} ({figure.of}) for {', '.join(missing) or 'any category'}")
    return float(np.mean([found[name] for name in categories or found]))


def _is_of(cell: Mapping[str, Any], figure: Figure) -> bool:
    return all(cell[key] == getattr(figure, key) for key in ("mode", "prompt", "box", "points"))


def _values(found: Mapping[str, Measured], name: str) -> dict[int, float] | float:
    """The values of a figure by seed, or the number that the name is."""
    return found[name].values if name in found else as_number(name)


def _differences(
    larger: dict[int, float] | float, smaller: dict[int, float] | float, seeds: Sequence[int]
) -> list[float]:
    def value(of: dict[int, float] | float, seed: int) -> float:
        return of.get(seed, math.nan) if isinstance(of, dict) else of

    pairs = [value(larger, seed) - value(smaller, seed) for seed in seeds]
    return [difference for difference in pairs if not math.isnan(difference)]


# ---- the page ----


def write(study: Study) -> list[str]:
    """Write paper.json and the page; return a summary, one string per claim."""
    results = [judge(study, claim) for claim in study.claims]
    unfinished = [job.name for job in study.jobs if launch.state(job.run).name != launch.FINISHED]
    content = {
        "size": study.size.name,
        "about": study.size.about,
        "seeds": study.seeds,
        "claims": [_plain(result) for result in results],
        "unfinished": unfinished,
        "manifest": manifest(),
    }
    study.out.mkdir(parents=True, exist_ok=True)
    write_text(study.out / RESULTS, json.dumps(content, indent=2) + "\n")
    sections = [_overview(results, unfinished), *(part for result in results for part in _sections(result, study))]
    about = f"Size {study.size.name}; seeds: {', '.join(map(str, study.seeds))}. {study.size.about}"
    html_page.write_sections(study.out / PAGE, "The claims of the SegVol paper", about.strip(), sections)
    lines = [f"{result.verdict}: {result.claim.name} ({result.claim.source})" for result in results]
    return [*lines, f"written to {study.out}: {PAGE}, {RESULTS}"]


def _overview(results: Sequence[Result], unfinished: Sequence[str]) -> html_page.Section:
    """Every claim with its verdict, and how a verdict is reached."""
    lines = [(f"{each.claim.source}, {each.verdict}: {each.claim.claim}", KINDS[each.verdict]) for each in results]
    rule = "A claim holds if the 95 % interval of every expected difference, over pairs of runs of equal seed, lies "
    rule += "above 0. It does not hold if one lies below 0. Otherwise it is not shown."
    lines.append((rule, ""))
    if unfinished:
        lines.append((f"{len(unfinished)} jobs are not finished. The figures are those of the others.", "no"))
    return html_page.Section(lines=lines)


def _sections(result: Result, study: Study) -> list[html_page.Section]:
    claim = result.claim
    lines = [(f"{result.verdict}: {claim.claim}", KINDS[result.verdict])]
    if claim.about:
        lines.append((claim.about, ""))
    if claim.categories:
        lines.append((f"Means over {', '.join(claim.categories)}.", ""))
    picture = figures.save(figures.claim_figure(result), study.out, f"claim-{claim.name}")
    rows = [
        {
            "figure": each.figure.name,
            "paper": _number(each.figure.paper),
            "here": _number(each.mean),
            "95 % interval": f"{each.interval.low:.4f} to {each.interval.high:.4f}" if each.interval else "",
            "seeds": str(len(each.values)),
        }
        for each in result.measured
    ]
    compared = [
        {
            "expected": str(each.expectation),
            "difference": f"{np.mean(each.differences):+.4f}" if each.differences else "",
            "95 % interval": f"{each.interval.low:+.4f} to {each.interval.high:+.4f}" if each.interval else "",
            "pairs": str(len(each.differences)),
            "": each.verdict,
        }
        for each in result.judged
    ]
    pictures = [(picture, f"{claim.name}: the paper's figures and ours")]
    return [html_page.Section(f"{claim.source}: {claim.name}", lines, pictures, rows), html_page.Section(rows=compared)]


def _number(value: float | None) -> str:
    """Four digits, as in the paper's tables."""
    return "" if value is None else f"{value:.4f}"


def _plain(result: Result) -> dict[str, Any]:
    return {
        "name": result.claim.name,
        "claim": result.claim.claim,
        "source": result.claim.source,
        "verdict": result.verdict,
        "categories": result.claim.categories,
        "figures": [
            {
                "name": each.figure.name,
                "paper": each.figure.paper,
                "mean": each.mean,
                "interval": each.interval.plain if each.interval else None,
                "values": each.values,
            }
            for each in result.measured
        ],
        "expected": [
            {
                "expectation": str(each.expectation),
                "differences": each.differences,
                "interval": each.interval.plain if each.interval else None,
                "verdict": each.verdict,
            }
            for each in result.judged
        ],
    }
