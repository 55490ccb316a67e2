"""`segvol-pl scaling compare`: the effect of one axis of a grid, from pairs of runs that differ in nothing else.

1. Each run is paired with the baseline run that has the same place on all other axes, including the seed.
2. For each combination of the other axes, and over all of them, the mean difference and its interval (Student's t) are
   computed. Over all combinations, the pairs of one seed count once: they share initial weights and batches.
3. If the interval contains 0, the verdict is "no difference shown". One pair has no interval.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from segvol_pl import html_page
from segvol_pl.atomic import write_csv, write_text
from segvol_pl.config import CompareConfig
from segvol_pl.errors import ConfigError, PointsError
from segvol_pl.experiments import figures
from segvol_pl.experiments.grid import SEED
from segvol_pl.experiments.points import Point, Points, gather
from segvol_pl.experiments.verdict import mean_interval


@dataclass(frozen=True)
class Difference:
    """Loss of a point minus loss of the baseline, over pairs."""

    point: str
    where: str
    """Places on the other axes; empty for all of them together."""
    n: int
    mean: float
    low: float | None
    high: float | None
    """Ends of the interval; None for one pair."""
    baseline: float
    """Mean loss of the baseline."""
    pairs: list[float]

    @property
    def verdict(self) -> str:
        """One of: better, worse, no difference shown, one pair: no interval."""
        if self.low is None or self.high is None:
            return "one pair: no interval"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "better" if self.high < 0 else "worse"


@dataclass(frozen=True)
class Comparison:
    """All differences along one axis."""

    axis: str
    baseline: str
    points: list[str]
    loss: str
    differences: list[Difference]
    unpaired: list[str]


def compare_runs(config: CompareConfig) -> list[str]:
    """Write the results and return a summary, one string per line. Raises PointsError, ConfigError."""
    points = gather(config)
    comparison = compare(points, config.axis, config.baseline)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    _write(out, comparison, points)
    lines = [
        f"{each.verdict}: {each.point} against {comparison.baseline}{', ' if each.where else ' over all'}{each.where}: "
        f"{_difference_text(each)} (n = {each.n})"
        for each in comparison.differences
    ]
    left = [*points.left_out, *(f"left out {name}: has no partner" for name in comparison.unpaired)]
    return [*left, *lines, f"written to {out}: index.html, compare.json, differences.csv, figures"]


def compare(points: Points, axis: str, baseline: str | None = None) -> Comparison:
    """Compare the points of an axis in pairs of runs.

    Args:
        points: The runs.
        axis: Name of the axis.
        baseline: Label of the point that the others are compared with; default the first.

    Raises:
        ConfigError: No run has a place on the axis, or none is at the baseline.
        PointsError: No run has a partner.
    """
    along = [point for point in points.used if axis in point.places]
    if not along:
        known = sorted({name for point in points.used for name in point.places})
        raise ConfigError(f"axis: no run has a place on {axis!r}; there are {', '.join(known)}", "axis")
    labels = list(dict.fromkeys(point.places[axis] for point in along))
    base = baseline or labels[0]
    if base not in labels:
        raise ConfigError(f"baseline: no run is {axis} = {base}; there are {', '.join(labels)}", "baseline")
    reference = {_others(point, axis): point for point in along if point.places[axis] == base}
    differences, unpaired = [], []
    for label in labels:
        if label == base:
            continue
        mine = [point for point in along if point.places[axis] == label]
        unpaired += [point.name for point in mine if _others(point, axis) not in reference]
        pairs = [(point, reference[_others(point, axis)]) for point in mine if _others(point, axis) in reference]
        differences += _differences(label, axis, pairs)
    if not differences:
        raise PointsError(f"no run along {axis} has a partner: a run at {axis} = {base} with all other places equal")
    return Comparison(axis, base, labels, points.loss, differences, unpaired)


def _others(point: Point, axis: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, label) for name, label in point.places.items() if name != axis))


def _differences(label: str, axis: str, pairs: Sequence[tuple[Point, Point]]) -> list[Difference]:
    """The differences for each combination of the other axes, and if there are several, over all of them."""
    groups: dict[str, list[tuple[Point, Point]]] = defaultdict(list)
    for pair in pairs:
        places = [f"{name} {place}" for name, place in _others(pair[0], axis) if name != SEED]
        groups[", ".join(places)].append(pair)
    found = [_difference(label, where, [[pair] for pair in members]) for where, members in groups.items()]
    if len(groups) > 1:
        seeds: dict[str, list[tuple[Point, Point]]] = defaultdict(list)
        for pair in pairs:
            seeds[pair[0].places.get(SEED, "")].append(pair)
        found.append(_difference(label, "", list(seeds.values())))
    return found


def _difference(label: str, where: str, clusters: Sequence[Sequence[tuple[Point, Point]]]) -> Difference:
    """The mean difference. clusters: groups of pairs, each of which counts once."""
    values = [float(np.mean([one.loss - other.loss for one, other in cluster])) for cluster in clusters]
    interval = mean_interval(values)
    low, high = (interval.low, interval.high) if interval else (None, None)
    base = float(np.mean([other.loss for cluster in clusters for _, other in cluster]))
    return Difference(label, where, len(values), float(np.mean(values)), low, high, base, values)


def _difference_text(each: Difference) -> str:
    share = f"{each.mean:+.4g} ({each.mean / each.baseline:+.1%})"
    return share if each.low is None else f"{share} [{each.low:+.4g}, {each.high:+.4g}]"


def _write(out: Path, comparison: Comparison, points: Points) -> None:
    rows = [{**asdict(each), "verdict": each.verdict} for each in comparison.differences]
    content = {**asdict(comparison), "differences": rows, "unused": points.unused}
    write_text(out / "compare.json", json.dumps(content, indent=2) + "\n")
    write_csv(out / "differences.csv", rows, [name for name in rows[0] if name != "pairs"])
    png = figures.save(figures.comparison_figure(comparison), out, "differences")
    table = [
        {
            "point": each.point,
            "where": each.where or "over all",
            "n": str(each.n),
            "difference": _difference_text(each),
            "": each.verdict,
        }
        for each in comparison.differences
    ]
    about = f"{comparison.loss} against {comparison.axis} = {comparison.baseline}, in pairs of runs that differ in "
    about += "nothing else. Intervals are 95 % intervals."
    sections = [html_page.Section(pictures=[(png, "Paired differences")], rows=table)]
    html_page.write_sections(out / "index.html", f"Comparison along {comparison.axis}", about, sections)
