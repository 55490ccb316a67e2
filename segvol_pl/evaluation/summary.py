"""From rows to tables.

1. A `Row` is one prompt on one case, scored; rows.csv holds all of them.
2. A `GroupStats` puts the rows of one category and one setting together over the cases; empty truths are counted apart.
3. `Summary` holds the cells of an evaluation, the overall figures of each setting, and how masks were read.
"""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from segvol_pl.evaluation.mask_category import READ, CategoryMatch
from segvol_pl.evaluation.metrics import Interval, Stats, macro_interval
from segvol_pl.evaluation.prompts import Setting

DIGITS = 6


@dataclass(frozen=True)
class Row:
    """One prompt on one case. An empty cell in rows.csv is None: the figure does not exist."""

    case: str
    category: str
    mode: str
    prompt: str
    box: str
    """Where its box came from, see config.DrawConfig; empty where it had none."""
    points: str
    components: int
    """Prompts whose masks were united; 0 where the truth is empty."""
    dice: float | None
    """None where the truth is empty."""
    zoom_out: float | None
    """Dice of the coarse mask; None likewise, and in other modes than zoom."""
    surface_dice: float | None
    """Share of surface within the tolerance. None also where the spacing is unknown."""
    volume_error: float | None
    """(predicted - true) / true."""
    seconds: float
    """From prompt to mask, see config.EvaluateConfig.timing."""
    memory_mb: float | None
    """Peak meanwhile: of the GPU's memory, else of the process."""
    truth_voxels: int
    predicted_voxels: int
    windows: int
    """Windows at native resolution that were asked."""
    mask: str = ""
    """The mask's file below the folder of the evaluation."""
    custom: dict[str, float | None] = field(default_factory=dict)
    """The figures of config.EvaluateConfig.metrics, by the functions' names; None where the truth is empty."""

    @property
    def setting(self) -> Setting:
        """What was asked for, without the case."""
        return Setting(self.mode, self.prompt, self.box, self.points)

    @property
    def empty(self) -> bool:
        """Whether the truth is empty."""
        return self.truth_voxels == 0


@dataclass(frozen=True)
class GroupStats:
    """One category in one setting. Spreads are over the cases that hold the category; None where there are none."""

    n: int
    """Cases that hold the category."""
    empty: int
    """Cases asked for it all the same whose truth is empty; in none of the spreads."""
    false_alarms: int
    """Of those, the ones where something was found."""
    dice: Stats | None
    zoom_out: Stats | None
    surface_dice: Stats | None
    volume_error: Stats | None
    seconds: float
    """Mean over all its rows."""
    memory_mb: float | None
    """Most of all its rows."""
    custom: dict[str, Stats | None]


@dataclass(frozen=True)
class Overall:
    """One setting: means over the categories of their means over cases; seconds are a mean over rows."""

    categories: int
    dice: float | None
    dice_interval: Interval | None
    """95 %, the cases resampled."""
    zoom_out: float | None
    surface_dice: float | None
    seconds: float
    memory_mb: float | None
    custom: dict[str, float | None]


@dataclass(frozen=True)
class MatchSummary:
    """How the masks of one category's spatial prompts were read."""

    n: int
    first: float
    """Share of cases in which the category itself came first."""
    soft_dice: dict[str, float]
    """Category -> mean soft_dice over the cases, the eight largest; a case that names it nowhere counts 0."""


@dataclass(frozen=True)
class Summary:
    """An evaluation put together; `rows` are its particulars."""

    checkpoint: str
    source: str
    """Folder of shards, or of files."""
    split: str
    cases: int
    """Cases that were read."""
    rows: list[Row]
    absent: dict[str, int] = field(default_factory=dict)
    """Category asked for -> cases that do not hold it."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Category that a case holds and the model's text bank does not -> cases; left out of text prompts."""
    unlabelled: int = 0
    """Cases without a label map."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Case that cannot be read -> why."""
    matches: list[CategoryMatch] = field(default_factory=list)
    seconds: float = 0.0
    """All cases' together, reading and encoding included; ranks work side by side."""
    seed: int = 0

    @property
    def settings(self) -> list[Setting]:
        """Those that have rows, in the order of the rows."""
        return list(dict.fromkeys(row.setting for row in self.rows))

    @property
    def categories(self) -> list[str]:
        """Those that have rows, by name."""
        return sorted({row.category for row in self.rows})

    @property
    def custom(self) -> list[str]:
        """Names of the user's own figures."""
        return list(self.rows[0].custom) if self.rows else []

    @cached_property
    def cells(self) -> dict[tuple[str, Setting], GroupStats]:
        """(category, setting) -> cell, for all that have rows."""
        groups: dict[tuple[str, Setting], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.category):
            groups.setdefault((row.category, row.setting), []).append(row)
        return {key: _cell(rows, [self.seed, _number(*map(str, key))]) for key, rows in groups.items()}

    @cached_property
    def overall(self) -> dict[Setting, Overall]:
        """Setting -> overall figures."""
        return {setting: self._overall(setting) for setting in self.settings}

    def _overall(self, setting: Setting) -> Overall:
        rows = [row for row in self.rows if row.setting == setting]
        cells = [cell for (_, where), cell in self.cells.items() if where == setting and cell.n]
        return Overall(
            categories=len(cells),
            dice=_mean([cell.dice.mean for cell in cells if cell.dice]),
            dice_interval=macro_interval(_table(rows), [self.seed, _number(str(setting))]),
            zoom_out=_mean([cell.zoom_out.mean for cell in cells if cell.zoom_out]),
            surface_dice=_mean([cell.surface_dice.mean for cell in cells if cell.surface_dice]),
            seconds=float(np.mean([row.seconds for row in rows])),
            memory_mb=_most(rows),
            custom={name: _mean([mean.mean for cell in cells if (mean := cell.custom[name])]) for name in self.custom},
        )

    @cached_property
    def matches_by_category(self) -> dict[str, MatchSummary]:
        """Category -> how its masks were read."""
        groups: dict[str, list[CategoryMatch]] = {}
        for match in sorted(self.matches, key=lambda match: match.category):
            groups.setdefault(match.category, []).append(match)
        return {category: _match_summary(category, found) for category, found in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """summary.json, without the rows and matches."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("rows", "matches")}
        return {
            **plain,
            "prompts_from_truth": True,
            "overall": [{**asdict(setting), **asdict(figures)} for setting, figures in self.overall.items()],
            "categories": [
                {"category": category, **asdict(setting), **asdict(cell)}
                for (category, setting), cell in self.cells.items()
            ],
            "matches": {category: asdict(read) for category, read in self.matches_by_category.items()},
        }

    def table(self) -> Table:
        """Means by category and setting, then over the categories, for a terminal."""
        table = Table(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"Means over cases: {self.split} split, {self.cases} cases"
        )
        for name in ("category", "prompt"):
            table.add_column(name, overflow="fold")
        for name in ("mode", "n", "Dice", "zoom-out", "surface", "seconds"):
            table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
        for (category, setting), cell in self.cells.items():
            spreads = (cell.dice, cell.zoom_out, cell.surface_dice)
            figures = (number(None if spread is None else spread.mean) for spread in spreads)
            table.add_row(category, *setting.named, str(cell.n), *figures, number(cell.seconds))
        table.add_section()
        for setting, overall in self.overall.items():
            figures = (number(value) for value in (overall.dice, overall.zoom_out, overall.surface_dice))
            table.add_row("all: mean", *setting.named, "", *figures, number(overall.seconds))
            if overall.dice_interval:
                table.add_row("95 % interval", interval_text(overall.dice_interval))
        return table


def number(value: float | None, digits: int = 3) -> str:
    """For tables; empty for a figure that does not exist."""
    return "" if value is None else f"{value:.{digits}f}"


def interval_text(interval: Interval | None) -> str:
    """`0.712 to 0.798`."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _number(*texts: str) -> int:
    """A seed of its own for each cell, so that a cell's intervals do not depend on the others."""
    return zlib.crc32("\n".join(texts).encode())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _most(rows: Sequence[Row]) -> float | None:
    return max((row.memory_mb for row in rows if row.memory_mb is not None), default=None)


def _cell(rows: list[Row], seed: list[int]) -> GroupStats:
    # In the order of the cases, whichever rank had which.
    rows = sorted(rows, key=lambda row: row.case)
    held, empty = ([row for row in rows if row.empty is flag] for flag in (False, True))

    def spread(values: Iterable[float | None]) -> Stats | None:
        return Stats.of([value for value in values if value is not None], seed)

    return GroupStats(
        n=len(held),
        empty=len(empty),
        false_alarms=sum(row.predicted_voxels > 0 for row in empty),
        dice=spread(row.dice for row in held),
        zoom_out=spread(row.zoom_out for row in held),
        surface_dice=spread(row.surface_dice for row in held),
        volume_error=spread(row.volume_error for row in held),
        seconds=float(np.mean([row.seconds for row in rows])),
        memory_mb=_most(rows),
        custom={name: spread(row.custom[name] for row in held) for name in rows[0].custom},
    )


def _table(rows: Sequence[Row]) -> np.ndarray:
    """Dice by case and category (N,K), NaN where there is none."""
    place = {case: number for number, case in enumerate(sorted({row.case for row in rows}))}
    column = {name: number for number, name in enumerate(sorted({row.category for row in rows if not row.empty}))}
    table_NK = np.full((len(place), len(column)), np.nan)
    for row in rows:
        if row.dice is not None:
            table_NK[place[row.case], column[row.category]] = row.dice
    return table_NK


def _match_summary(category: str, matches: list[CategoryMatch]) -> MatchSummary:
    cases = len({match.case for match in matches})
    totals: dict[str, float] = {}
    for match in sorted(matches, key=lambda match: (match.case, match.place)):
        totals[match.named] = totals.get(match.named, 0.0) + match.soft_dice
    ranked = sorted(totals.items(), key=lambda item: -item[1])[:READ]
    first = sum(match.place == 1 and match.named == category for match in matches)
    return MatchSummary(cases, first / cases, {name: total / cases for name, total in ranked})


def csv_text(kind: type, items: Sequence[Any]) -> str:
    """Instances of a dataclass as CSV, see `columns`; floats rounded, None empty."""
    head, records = columns(kind, items)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(head)
    writer.writerows([_plain(value) for value in record] for record in records)
    return stream.getvalue()


def columns(kind: type, items: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    """Names and values of the instances of a dataclass; a field that is a dict gives a column for each of its keys."""
    records = [_columns(item) for item in items]
    return list(records[0]) if records else [one.name for one in fields(kind)], [list(one.values()) for one in records]


def _columns(item: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in asdict(item).items():
        found.update(value if isinstance(value, dict) else {name: value})
    return found


def _plain(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
