"""The figures of a challenge's protocol, made of the rows of an evaluation.

1. `interactions` joins the rows of the six calls on a class: scores of each call, areas, and clicks to a stated Dice.
2. `ProtocolFigures.of` takes means over the classes of a case, then statistics over cases, and over the cases of each
   class.
3. `plot_curve` draws Dice and surface Dice over clicks.

A class is a category of a case. The challenge counts the surface Dice of a case as 0 where its mean Dice is at most
`challenge.LEAST_DICE`; figures of a class do not.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from segvol_pl.config import EvaluationProtocol
from segvol_pl.evaluation.challenge import CALLS, SECONDS_A_CLASS, case_nsd, case_scores
from segvol_pl.evaluation.figures import COARSE, FINAL
from segvol_pl.evaluation.interactive import call_settings
from segvol_pl.evaluation.metrics import Stats
from segvol_pl.evaluation.summary import Row, interval_text, number

INSTANCE_COLUMNS = ("f1", "dsc_tp", "missed", "extra")
"""Columns of `evaluate instances=true`."""

Figures = dict[str, float | None]
"""Name of a figure -> its value; None if it does not exist."""


@dataclass(frozen=True)
class Interaction:
    """The six calls on one class."""

    case: str
    category: str
    clicks: int | None
    """Clicks after which the Dice first reaches the stated one, 0 if the box is enough; None if it never does."""
    seconds: float
    """Of all calls together."""
    scores: Figures
    """dsc_auc, nsd_auc, dsc_final, nsd_final."""
    calls: Figures
    """dsc_K, nsd_K and seconds_K of call K, from 1."""

    @property
    def dsc(self) -> list[float]:
        """Dice of each call."""
        return [float(self.calls[f"dsc_{call}"] or 0.0) for call in range(1, CALLS + 1)]

    @property
    def nsd(self) -> list[float] | None:
        """Surface Dice of each call; None if the spacing is unknown."""
        found = [self.calls[f"nsd_{call}"] for call in range(1, CALLS + 1)]
        return None if None in found else [float(value or 0.0) for value in found]


@dataclass(frozen=True)
class Clicks:
    """How many clicks classes needed for the stated Dice."""

    classes: int
    reached: list[int]
    """Classes that reached it after 0, 1, ... clicks."""
    never: int
    """Classes that did not reach it with all clicks."""
    median: float | None
    """Over the classes that reached it; None if none did."""

    @classmethod
    def of(cls, found: Sequence[Interaction]) -> Clicks:
        """Count them."""
        needed = [each.clicks for each in found if each.clicks is not None]
        counts = np.bincount(needed, minlength=CALLS).tolist() if needed else [0] * CALLS
        return cls(len(found), counts, len(found) - len(needed), float(np.median(needed)) if needed else None)


@dataclass(frozen=True)
class ProtocolFigures:
    """What a protocol reports."""

    protocol: str
    target_dice: float
    cases: dict[str, Stats]
    """Figure -> statistics over the cases of the mean over a case's classes."""
    categories: dict[str, dict[str, Stats]]
    """Category -> figure -> statistics over the cases that have it."""
    curve: list[dict[str, Stats]]
    """Of each call: dsc and nsd over the cases. Empty without clicks."""
    clicks: Clicks | None
    """Over all classes. None without clicks."""
    clicks_by_category: dict[str, Clicks]
    slow: int
    """Cases that took longer than the challenge allows, which scores them 0. Here they keep their scores."""

    @classmethod
    def of(cls, protocol: EvaluationProtocol, rows: Sequence[Row], target_dice: float, seed: int) -> ProtocolFigures:
        """Compute the figures.

        Args:
            protocol: Which one; not `none`.
            rows: Of the evaluation.
            target_dice: The Dice to count clicks for.
            seed: Of the bootstrap.
        """
        # Sorted, so that the bootstrap does not depend on which rank evaluated which case.
        present = sorted((row for row in rows if not row.empty), key=lambda row: (row.case, row.category))
        if protocol is EvaluationProtocol.cvpr25_text:
            return cls._of_text(protocol, present, target_dice, seed)
        found = interactions(present, target_dice)
        by_case, by_category = _grouped(found, "case"), _grouped(found, "category")
        cases = [_case_figures(classes) for classes in by_case.values()]
        curve = [
            _statistics([{name: calls[place] for name, calls in case.curve.items()} for case in cases], seed)
            for place in range(CALLS)
        ]
        return cls(
            protocol=protocol.value,
            target_dice=target_dice,
            cases=_statistics([case.figures for case in cases], seed),
            categories={
                name: _statistics([{**each.scores, "seconds": each.seconds} for each in classes], seed)
                for name, classes in sorted(by_category.items())
            },
            curve=curve,
            clicks=Clicks.of(found),
            clicks_by_category={name: Clicks.of(classes) for name, classes in sorted(by_category.items())},
            slow=sum(
                sum(each.seconds for each in classes) > SECONDS_A_CLASS * len(classes) for classes in by_case.values()
            ),
        )

    @classmethod
    def _of_text(
        cls, protocol: EvaluationProtocol, rows: Sequence[Row], target_dice: float, seed: int
    ) -> ProtocolFigures:
        by_case, by_category = _grouped(rows, "case"), _grouped(rows, "category")
        cases = [
            {**_means([_text_scores(row) for row in own]), "seconds": sum(row.seconds for row in own)}
            for own in by_case.values()
        ]
        return cls(
            protocol=protocol.value,
            target_dice=target_dice,
            cases=_statistics(cases, seed),
            categories={
                name: _statistics([{**_text_scores(row), "seconds": row.seconds} for row in own], seed)
                for name, own in sorted(by_category.items())
            },
            curve=[],
            clicks=None,
            clicks_by_category={},
            slow=sum(sum(row.seconds for row in own) > SECONDS_A_CLASS * len(own) for own in by_case.values()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `protocol` in summary.json."""
        return asdict(self)

    def table(self) -> Table:
        """Make a terminal table of the figures over cases, and of the clicks needed."""
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{self.protocol}: over cases")
        for name in ("figure", "n", "mean", "95 % interval", "quartiles"):
            table.add_column(name, justify="left" if name == "figure" else "right", no_wrap=True)
        for name, one in self.cases.items():
            quartiles = " ".join(number(value) for value in (one.q1, one.median, one.q3))
            table.add_row(name, str(one.n), number(one.mean), interval_text(one.mean_interval), quartiles)
        if self.clicks is not None:
            table.add_section()
            reached = " ".join(map(str, self.clicks.reached))
            told = f"clicks to Dice {self.target_dice:g}"
            table.add_row(told, str(self.clicks.classes), number(self.clicks.median, 1), "0 to 5 clicks", reached)
            table.add_row("never", str(self.clicks.never))
        return table


def interactions(rows: Sequence[Row], target_dice: float) -> list[Interaction]:
    """Join the rows of the six calls on each class.

    Args:
        rows: Of the protocol `cvpr25`, all of one class following another in any order of the calls.
        target_dice: The Dice to count clicks for.
    """
    place = {setting: call for call, setting in enumerate(call_settings(), start=1)}
    place |= {setting: call for call, setting in enumerate(call_settings(boxed=False), start=2)}
    groups: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        groups[row.case, row.category][place[row.setting]] = row
    return [_interaction([calls[call] for call in sorted(calls)], target_dice) for calls in groups.values()]


def _interaction(rows: Sequence[Row], target_dice: float) -> Interaction:
    # As in the challenge a call that is left out, for want of a box, scores 0.
    skipped = CALLS - len(rows)
    dsc = [0.0] * skipped + [float(row.dice or 0.0) for row in rows]
    nsd = [row.surface_dice for row in rows if row.surface_dice is not None]
    nsd = [0.0] * skipped + nsd if len(nsd) == len(rows) else []
    calls: Figures = dict.fromkeys(("dsc_1", "nsd_1", "seconds_1"), 0.0) if skipped else {}
    for call, row in enumerate(rows, start=1 + skipped):
        calls |= {f"dsc_{call}": row.dice, f"nsd_{call}": row.surface_dice, f"seconds_{call}": row.seconds}
    return Interaction(
        case=rows[0].case,
        category=rows[0].category,
        clicks=next((number for number, value in enumerate(dsc) if value >= target_dice), None),
        seconds=sum(row.seconds for row in rows),
        scores=_scores(dsc, nsd if len(nsd) == len(dsc) else None),
        calls=calls,
    )


def _scores(dsc: Sequence[float], nsd: Sequence[float] | None) -> Figures:
    """The four scores; None for those of a surface Dice that is unknown."""
    found = case_scores(dsc, dsc if nsd is None else nsd)
    return {name: None if nsd is None and name.startswith("nsd") else value for name, value in found.items()}


@dataclass(frozen=True)
class _Case:
    """Means over the classes of one case."""

    figures: Figures
    curve: dict[str, list[float | None]]


def _case_figures(classes: Sequence[Interaction]) -> _Case:
    dsc = np.mean([each.dsc for each in classes], axis=0).tolist()
    surfaces = [each.nsd for each in classes if each.nsd is not None]
    nsd: list[float] | None = None
    if len(surfaces) == len(classes):
        nsd = [case_nsd(*pair) for pair in zip(dsc, np.mean(surfaces, axis=0).tolist(), strict=True)]
    figures: Figures = {**_scores(dsc, nsd), "seconds": sum(each.seconds for each in classes)}
    return _Case(figures, {"dsc": dsc, "nsd": [None] * len(dsc) if nsd is None else [*nsd]})


def _text_scores(row: Row) -> Figures:
    return {"dsc": row.dice, "nsd": row.surface_dice, **{name: row.custom[name] for name in ("f1", "dsc_tp")}}


def _grouped(items: Sequence[Any], name: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[getattr(item, name)].append(item)
    return groups


def _means(found: Sequence[Figures]) -> Figures:
    """Means of each figure over those that have it."""
    known = {name: [each[name] for each in found if each[name] is not None] for name in found[0]}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}  # type: ignore[arg-type]


def _statistics(found: Sequence[Mapping[str, float | None]], seed: int) -> dict[str, Stats]:
    """Statistics of each figure over those that have it; without figures that nothing has."""
    names = list(dict.fromkeys(name for each in found for name in each))
    spread = {
        name: Stats.of([value for each in found if (value := each.get(name)) is not None], [seed, _seed_of(name)])
        for name in names
    }
    return {name: one for name, one in spread.items() if one is not None}


def _seed_of(name: str) -> int:
    return zlib.crc32(name.encode())


# ---- the curve ----


def curve_records(figures: ProtocolFigures) -> tuple[list[str], list[list[Any]]]:
    """Return column names and a record for each number of clicks: mean and 95 % interval of both scores."""
    head = ["clicks", *(f"{name}{part}" for name in ("dsc", "nsd") for part in ("", "_low", "_high"))]
    records = []
    for clicks, call in enumerate(figures.curve):
        spreads = [call.get(name) for name in ("dsc", "nsd")]
        ends = [(one.mean, *(one.mean_interval or (None, None))) if one else (None,) * 3 for one in spreads]
        records.append([clicks, *(value for three in ends for value in three)])
    return head, records


def plot_curve(figures: ProtocolFigures) -> Figure:
    """Draw mean Dice and surface Dice of the cases over clicks, with 95 % intervals."""
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, label, colour in (("dsc", "Dice", FINAL), ("nsd", "surface Dice", COARSE)):
        _draw_curve(axes, [call.get(name) for call in figures.curve], label, colour)
    axes.set(xlim=(-0.2, CALLS - 0.8), ylim=(-0.03, 1.03), xlabel="clicks after the box", xticks=range(CALLS))
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
    return figure


def _draw_curve(axes: Axes, calls: Sequence[Stats | None], label: str, colour: str) -> None:
    known = [(place, one) for place, one in enumerate(calls) if one is not None]
    places = [place for place, _ in known]
    axes.plot(places, [one.mean for _, one in known], "o-", color=colour, label=label, markersize=4)
    bands = [(place, one.mean_interval) for place, one in known if one.mean_interval is not None]
    if bands:
        low, high = zip(*(ends for _, ends in bands), strict=True)
        axes.fill_between([place for place, _ in bands], low, high, color=colour, alpha=0.15, linewidth=0)
