"""Before and after, case by case: what fine-tuning gained, what it lost, and what so few cases can show.

Both models answer the same prompts on the same cases, so differences are taken within a case. The interval of a mean
difference is Student's t, which holds for few cases if the differences are roughly normal. A bootstrap of a handful of
cases would be too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from segvol_pl.evaluation.metrics import Interval
from segvol_pl.evaluation.results import CASES, CaseResult
from segvol_pl.evaluation.summary import Row

COVERED = 0.95
"""What an interval covers."""
FEW = 10
"""Cases below which the report says that they are few."""


@dataclass(frozen=True)
class Figure:
    """A mean over cases."""

    mean: float
    interval: Interval | None
    """95 %, Student's t, within the possible values; None for one case."""

    @classmethod
    def of(cls, values: Sequence[float], least: float = 0.0) -> Figure | None:
        """The mean of these values, from `least` to 1; None if there are none."""
        if not values:
            return None
        mean, count = float(np.mean(values)), len(values)
        if count == 1:
            return cls(mean, None)
        half = float(stats.t.ppf((1 + COVERED) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
        return cls(mean, (max(mean - half, least), min(mean + half, 1.0)))

    @property
    def half_width(self) -> float | None:
        """Half of the interval."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


@dataclass(frozen=True)
class Gain:
    """One category, or the mean of all, by one kind of prompt."""

    category: str
    """Empty for the mean over the categories."""
    prompt: str
    mode: str
    n: int
    """Cases."""
    before: Figure | None
    """Mean Dice of the checkpoint; None if it does not know the category's name, and the prompt is text."""
    after: Figure
    difference: Figure | None
    """After - before, within each case."""


Place = tuple[str, str]
"""Prompt and mode."""


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of a finished evaluation that have a Dice."""
    results = (CaseResult.from_json(path.read_text(encoding="utf-8")) for path in sorted((folder / CASES).glob("*")))
    return [row for result in results for row in result.rows if row.dice is not None]


def gains(before: Sequence[Row], after: Sequence[Row]) -> list[Gain]:
    """Compare two evaluations of the same cases: first the mean over categories of each prompt, then each category."""
    old, new = (_by_place(rows) for rows in (before, after))
    return [_mean(old.get(place, {}), cells, place) for place, cells in new.items()] + [
        _gain(name, old.get(place, {}).get(name, {}), new[place][name], place)
        for name in sorted({name for cells in new.values() for name in cells})
        for place in new
        if name in new[place]
    ]


Cells = dict[str, dict[str, float]]
"""Category -> case -> Dice."""


def _by_place(rows: Sequence[Row]) -> dict[Place, Cells]:
    found: dict[Place, Cells] = {}
    for row in rows:
        drawn = " ".join(name for name in (row.box, row.points) if name)
        place = f"{row.prompt} ({drawn})" if drawn else row.prompt, row.mode
        assert row.dice is not None
        found.setdefault(place, {}).setdefault(row.category, {})[row.case] = row.dice
    return found


def _gain(category: str, before: dict[str, float], after: dict[str, float], place: Place) -> Gain:
    both = [case for case in after if case in before]
    return Gain(
        category,
        *place,
        n=len(after),
        before=Figure.of([before[case] for case in both]),
        after=_known(Figure.of(list(after.values()))),
        difference=Figure.of([after[case] - before[case] for case in both], least=-1.0),
    )


def _mean(before: Cells, after: Cells, place: Place) -> Gain:
    """Means over the categories of each case. What the checkpoint could not answer counts only if nothing could be."""
    known = {name: cells for name, cells in after.items() if name in before}
    return _gain("", _over_categories(before, known), _over_categories(known or after, known or after), place)


def _over_categories(cells: Cells, among: Cells) -> dict[str, float]:
    """Case -> mean Dice over those of its categories that are in `among`."""
    found: dict[str, list[float]] = {}
    for name in among:
        for case, dice in cells.get(name, {}).items():
            found.setdefault(case, []).append(dice)
    return {case: float(np.mean(dice)) for case, dice in found.items()}


def _known(figure: Figure | None) -> Figure:
    assert figure is not None, "a category in the rows has cases"
    return figure


def what_cases_show(found: Sequence[Gain], cases: int) -> str:
    """What so many validation cases can show, in a sentence or two. found: the gains on them."""
    if cases == 1:
        return (
            "One validation case has no spread, hence no interval: a gain may be chance, and other patients may "
            "differ. Hold out more cases (held_out), or add cases."
        )
    widths = [each.half_width for gain in found if gain.category and (each := gain.difference or gain.after)]
    known = [width for width in widths if width is not None]
    wide = f" of ±{100 * float(np.median(known)):.0f} points" if known else ""
    text = (
        f"{cases} validation cases give a category an interval{wide} (95 %, Student's t, the median over categories "
        "and prompts): a smaller gain cannot be distinguished from chance."
    )
    if cases < FEW:
        text += (
            " With so few cases the interval rests on the differences being roughly normal, and one odd case moves it."
        )
    return text
