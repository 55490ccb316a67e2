"""Summarise rows in tables.

1. A `Row` holds the scores of one prompt on one case; rows.csv lists all rows.
2. A `GroupStats` summarises the rows of one category and one setting over the cases. It counts empty truths separately.
3. A `Summary` holds these cells, the overall figures of each setting, and the categories that the masks resemble.
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

from segvol_pl.evaluation.mask_category import TOP, CategoryMatch
from segvol_pl.evaluation.metrics import Interval, Stats, macro_interval
from segvol_pl.evaluation.prompts import Setting

DIGITS = 6


@dataclass(frozen=True)
class Row:
    """One prompt on one case. None, an empty cell in rows.csv, is a figure that does not exist."""

    case: str
    category: str
    mode: str
    prompt: str
    box: str
    """Source of the box, see config.DrawConfig; empty without a box."""
    points: str
    """Source of the points; empty without points."""
    components: int
    """Number of prompts whose masks were united; 0 if the truth is empty."""
    dice: float | None
    """None if the truth is empty."""
    zoom_out: float | None
    """Dice of the coarse mask. None if the truth is empty, and in modes other than zoom."""
    surface_dice: float | None
    """Fraction of the surface, by area, within the tolerance. None if the truth is empty or the spacing unknown."""
    hd95: float | None
    """95th percentile of the surface distance, in mm. None also if nothing was predicted."""
    volume_error: float | None
    """(predicted - true) / true volume. None if the truth is empty."""
    seconds: float
    """From prompt to mask, see config.EvaluateConfig.timing."""
    memory_mb: float | None
    """Peak during that time, in MiB: of the GPU's memory, without a GPU of the process."""
    truth_voxels: int
    predicted_voxels: int
    windows: int
    """Windows at native resolution that the model decoded."""
    mask: str = ""
    """Path of the mask's file, relative to the folder of the evaluation; empty if not written."""
    custom: dict[str, float | None] = field(default_factory=dict)
    """Values of config.EvaluateConfig.metrics by function name; None if the truth is empty."""

    @property
    def setting(self) -> Setting:
        """Mode and prompt of the row."""
        return Setting(self.mode, self.prompt, self.box, self.points)

    @property
    def empty(self) -> bool:
        """Whether the truth is empty."""
        return self.truth_voxels == 0


@dataclass(frozen=True)
class GroupStats:
    """One category in one setting. Statistics are over the cases that have the category; None without such cases."""

    n: int
    """Cases that have the category."""
    empty: int
    """Cases with an empty truth that were prompted for the category; not in the statistics."""
    false_alarms: int
    """Cases with an empty truth in which the model found something."""
    dice: Stats | None
    zoom_out: Stats | None
    surface_dice: Stats | None
    hd95: Stats | None
    """Only over the cases in which something was predicted."""
    volume_error: Stats | None
    seconds: float
    """Mean over all rows."""
    memory_mb: float | None
    """Maximum over all rows."""
    custom: dict[str, Stats | None]


@dataclass(frozen=True)
class Overall:
    """One setting: means over categories of the means over cases; `seconds` is the mean over rows."""

    categories: int
    false_alarm: float | None
    """Share of the rows with an empty truth in which the model found something; None without such rows."""
    dice: float | None
    dice_interval: Interval | None
    """95 % bootstrap interval over the cases."""
    zoom_out: float | None
    surface_dice: float | None
    hd95: float | None
    seconds: float
    memory_mb: float | None
    custom: dict[str, float | None]


@dataclass(frozen=True)
class MatchSummary:
    """The categories that the masks of one category's spatial prompts resemble."""

    n: int
    first: float
    """Fraction of cases in which the category itself ranks first."""
    soft_dice: dict[str, float]
    """Category -> mean soft Dice over the cases, the eight largest. A case that does not list it counts as 0."""


@dataclass(frozen=True)
class Summary:
    """All results of an evaluation."""

    checkpoint: str
    source: str
    """Folder of shards, or of files."""
    split: str
    cases: int
    """Number of readable cases."""
    rows: list[Row]
    absent: dict[str, int] = field(default_factory=dict)
    """Configured category -> number of cases that do not have it."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Category that the model's text bank lacks -> number of cases that have it; not prompted by text."""
    unlabelled: int = 0
    """Number of cases without a label map."""
    unusable: dict[str, str] = field(default_factory=dict)
    """Unreadable case -> reason."""
    matches: list[CategoryMatch] = field(default_factory=list)
    seconds: float = 0.0
    """Sum over the cases, reading and encoding included. Ranks work in parallel, so it exceeds the elapsed time."""
    seed: int = 0

    @property
    def settings(self) -> list[Setting]:
        """Settings in the order of the rows."""
        return list(dict.fromkeys(row.setting for row in self.rows))

    @property
    def categories(self) -> list[str]:
        """Categories that have rows, sorted."""
        return sorted({row.category for row in self.rows})

    @property
    def custom(self) -> list[str]:
        """Names of the custom metrics."""
        return list(self.rows[0].custom) if self.rows else []

    @cached_property
    def cells(self) -> dict[tuple[str, Setting], GroupStats]:
        """(category, setting) -> statistics, for all pairs that have rows."""
        groups: dict[tuple[str, Setting], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.category):
            groups.setdefault((row.category, row.setting), []).append(row)
        return {key: _group_stats(rows, [self.seed, _seed_of(*map(str, key))]) for key, rows in groups.items()}

    @cached_property
    def overall(self) -> dict[Setting, Overall]:
        """Setting -> overall figures."""
        return {setting: self._overall(setting) for setting in self.settings}

    def _overall(self, setting: Setting) -> Overall:
        rows = [row for row in self.rows if row.setting == setting]
        cells = [cell for (_, where), cell in self.cells.items() if where == setting and cell.n]
        return Overall(
            categories=len(cells),
            false_alarm=_mean([float(row.predicted_voxels > 0) for row in rows if row.empty]),
            dice=_mean([cell.dice.mean for cell in cells if cell.dice]),
            dice_interval=macro_interval(_dice_table(rows), [self.seed, _seed_of(str(setting))]),
            zoom_out=_mean([cell.zoom_out.mean for cell in cells if cell.zoom_out]),
            surface_dice=_mean([cell.surface_dice.mean for cell in cells if cell.surface_dice]),
            hd95=_mean([cell.hd95.mean for cell in cells if cell.hd95]),
            seconds=float(np.mean([row.seconds for row in rows])),
            memory_mb=_peak_memory(rows),
            custom={name: _mean([mean.mean for cell in cells if (mean := cell.custom[name])]) for name in self.custom},
        )

    @cached_property
    def matches_by_category(self) -> dict[str, MatchSummary]:
        """Category -> the categories that its masks resemble."""
        groups: dict[str, list[CategoryMatch]] = {}
        for match in sorted(self.matches, key=lambda match: match.category):
            groups.setdefault(match.category, []).append(match)
        return {category: _match_summary(category, found) for category, found in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the content of summary.json, without rows and matches."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("rows", "matches")}
        return {
            **plain,
            "prompts_from_truth": True,
            "overall": [{**asdict(setting), **asdict(figures)} for setting, figures in self.overall.items()],
            "categories": [
                {"category": category, **asdict(setting), **asdict(cell)}
                for (category, setting), cell in self.cells.items()
            ],
            "matches": {category: asdict(match) for category, match in self.matches_by_category.items()},
        }

    def table(self) -> Table:
        """Make a terminal table of the means by category and setting, then over the categories."""
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
    """Format a figure for a table; None is empty."""
    return "" if value is None else f"{value:.{digits}f}"


def interval_text(interval: Interval | None) -> str:
    """Format an interval, as `0.712 to 0.798`; None is empty."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _seed_of(*texts: str) -> int:
    """Make a seed of a cell's name, so that its intervals do not depend on the other cells."""
    return zlib.crc32("\n".join(texts).encode())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _peak_memory(rows: Sequence[Row]) -> float | None:
    return max((row.memory_mb for row in rows if row.memory_mb is not None), default=None)


def _group_stats(rows: list[Row], seed: list[int]) -> GroupStats:
    # Sorted, so that the bootstrap does not depend on which rank evaluated which case.
    rows = sorted(rows, key=lambda row: row.case)
    present, empty = ([row for row in rows if row.empty is flag] for flag in (False, True))

    def stats(values: Iterable[float | None]) -> Stats | None:
        return Stats.of([value for value in values if value is not None], seed)

    return GroupStats(
        n=len(present),
        empty=len(empty),
        false_alarms=sum(row.predicted_voxels > 0 for row in empty),
        dice=stats(row.dice for row in present),
        zoom_out=stats(row.zoom_out for row in present),
        surface_dice=stats(row.surface_dice for row in present),
        hd95=stats(row.hd95 for row in present),
        volume_error=stats(row.volume_error for row in present),
        seconds=float(np.mean([row.seconds for row in rows])),
        memory_mb=_peak_memory(rows),
        custom={name: stats(row.custom[name] for row in present) for name in rows[0].custom},
    )


def _dice_table(rows: Sequence[Row]) -> np.ndarray:
    """Make the table of Dice by case and category (N,K); NaN for a missing row."""
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
    ranked = sorted(totals.items(), key=lambda item: -item[1])[:TOP]
    first = sum(match.place == 1 and match.named == category for match in matches)
    return MatchSummary(cases, first / cases, {name: total / cases for name, total in ranked})


def csv_text(kind: type, items: Sequence[Any]) -> str:
    """Write instances of a dataclass as CSV, see `columns`. Floats are rounded; None is empty."""
    head, records = columns(kind, items)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(head)
    writer.writerows([_plain(value) for value in record] for record in records)
    return stream.getvalue()


def columns(kind: type, items: Sequence[Any]) -> tuple[list[str], list[list[Any]]]:
    """Return column names and records of instances of a dataclass. A dict field becomes one column per key."""
    records = [_columns(item) for item in items]
    return list(records[0]) if records else [one.name for one in fields(kind)], [list(one.values()) for one in records]


def _columns(item: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in asdict(item).items():
        found.update(value if isinstance(value, dict) else {name: value})
    return found


def _plain(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value
