"""Zoom-out-zoom-in over a split of shards: rows, tables, report.

1. Every labelled case of the split is read from its shard: CT, label map, facts.
2. For each of its categories and each prompt kind a prompt is drawn from the truth, seeded by case and category.
3. The model answers; Dice of zoom-out and of zoom-in, and the time, are a `Row`, written down at once.
4. `Summary` puts the rows together by category and prompt kind; the report adds figures and pictures.

Spatial prompts come from the truth, as in the paper: the figures say how well a prompt is obeyed, not how well a
structure is found without one. Only `text` is free of the truth.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.table import Table

from segvol_pl.config import EvaluateConfig, Rule
from segvol_pl.configure import to_yaml
from segvol_pl.data.prompts import Prompt, box_of, draw_points
from segvol_pl.data.sample import Facts, Member
from segvol_pl.data.shards import SampleRecord, read_array, read_facts, read_index
from segvol_pl.data.store import Store
from segvol_pl.data.transforms import normalise, resize_label
from segvol_pl.data.whole import write_text
from segvol_pl.model.checkpoint import load_model
from segvol_pl.model.text_encoder import TextBank
from segvol_pl.report import Outlined, Picture, cut, write_report
from segvol_pl.run.strategies import autocast, resolve_device
from segvol_pl.run.tracking import manifest
from segvol_pl.zoom import Promptable, Zoomer, ZoomResult, binary, scale_prompt

log = logging.getLogger(__name__)

POSITIVE_POINTS, NEGATIVE_POINTS = 5, 2
"""Points drawn from the truth for a points prompt: 1 + 4 inside, 2 outside."""

PICTURED = 3
"""Categories pictured in a case: those of worst, middle and best Dice."""


class EvaluateError(ValueError):
    """Shards or categories that cannot be evaluated. The message names the key and the remedy."""


@dataclass(frozen=True)
class Row:
    """One prompt on one case."""

    case: str
    category: str
    prompt: str
    zoom_out: float
    """Dice of the coarse mask."""
    zoom_in: float
    """Dice of the final mask."""
    seconds: float
    """Zoom-out-zoom-in of this prompt; windows already encoded for an earlier prompt of the case come free."""
    truth_voxels: int
    predicted_voxels: int
    windows: int


@dataclass(frozen=True)
class Quartiles:
    """Of Dice over the cases of one category and prompt kind."""

    mean: float
    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        q1, median, q3 = np.percentile(values, (25, 50, 75))
        return cls(float(np.mean(values)), float(q1), float(median), float(q3))


@dataclass(frozen=True)
class Cell:
    """One category with one prompt kind."""

    n: int
    zoom_out: Quartiles
    zoom_in: Quartiles
    seconds: float
    """Mean over the cases."""


@dataclass(frozen=True)
class Overall:
    """One prompt kind: means over the categories of their mean Dice, and over all rows of their seconds."""

    categories: int
    zoom_out: float
    zoom_in: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """An evaluation put together; `rows` are its particulars."""

    checkpoint: str
    shards: str
    split: str
    cases: int
    rows: list[Row]
    absent: dict[str, int] = field(default_factory=dict)
    """Category asked for -> cases that do not hold it."""
    unknown: dict[str, int] = field(default_factory=dict)
    """Category that a case holds and the model's text bank does not -> cases; left out of text prompts."""
    unlabelled: int = 0
    """Cases without a label map."""
    seconds: float = 0.0
    """Wall time of all cases, reading and encoding included."""

    @property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(row.prompt for row in self.rows))

    @property
    def categories(self) -> list[str]:
        return sorted({row.category for row in self.rows})

    def cells(self) -> dict[tuple[str, str], Cell]:
        """(category, prompt kind) -> cell, for all that have rows."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.category):
            groups.setdefault((row.category, row.prompt), []).append(row)
        return {key: _cell(rows) for key, rows in groups.items()}

    def overall(self) -> dict[str, Overall]:
        """Prompt kind -> overall figures."""
        cells = self.cells()
        return {
            prompt: Overall(
                categories=len(chosen := [cell for (_, kind), cell in cells.items() if kind == prompt]),
                zoom_out=float(np.mean([cell.zoom_out.mean for cell in chosen])),
                zoom_in=float(np.mean([cell.zoom_in.mean for cell in chosen])),
                seconds=float(np.mean([row.seconds for row in self.rows if row.prompt == prompt])),
            )
            for prompt in self.prompts
        }

    def to_dict(self) -> dict[str, Any]:
        """summary.json, without the rows."""
        categories: dict[str, dict[str, Any]] = {}
        for (category, prompt), cell in self.cells().items():
            categories.setdefault(category, {})[prompt] = asdict(cell)
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rows"}
        overall = {prompt: asdict(figures) for prompt, figures in self.overall().items()}
        return {**plain, "prompts_from_truth": True, "overall": overall, "categories": categories}

    def table(self) -> Table:
        """Mean Dice by category and prompt kind, `zoom-out -> zoom-in`, for a terminal."""
        table = Table(title=f"Dice, zoom-out → zoom-in: {self.split} split, {self.cases} cases")
        table.add_column("category")
        table.add_column("n", justify="right")
        for prompt in self.prompts:
            table.add_column(prompt, justify="right")
        cells = self.cells()
        for category in self.categories:
            table.add_row(category, *_table_cells([cells.get((category, prompt)) for prompt in self.prompts]))
        means = [f"{figures.zoom_out:.3f} → {figures.zoom_in:.3f}" for figures in self.overall().values()]
        table.add_section()
        table.add_row("mean of categories", "", *means)
        return table


def _cell(rows: list[Row]) -> Cell:
    return Cell(
        n=len(rows),
        zoom_out=Quartiles.of([row.zoom_out for row in rows]),
        zoom_in=Quartiles.of([row.zoom_in for row in rows]),
        seconds=float(np.mean([row.seconds for row in rows])),
    )


def _table_cells(cells: Sequence[Cell | None]) -> list[str]:
    count = max(cell.n for cell in cells if cell is not None)
    figures = ["" if cell is None else f"{cell.zoom_out.mean:.3f} → {cell.zoom_in.mean:.3f}" for cell in cells]
    return [str(count), *figures]


@dataclass(frozen=True, eq=False)
class Case:
    """One labelled sample, decoded."""

    facts: Facts
    hu_DHW: np.ndarray
    label_DHW: np.ndarray

    def truth(self, category: str) -> np.ndarray:
        """Bool mask of a category that the case holds."""
        return np.isin(self.label_DHW, self.facts.categories[category].values)


def dice(prediction_DHW: np.ndarray, truth_DHW: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool masks. Raises ValueError where both are empty: it is undefined."""
    total = int(np.count_nonzero(prediction_DHW)) + int(np.count_nonzero(truth_DHW))
    if total == 0:
        raise ValueError("Dice of two empty masks is undefined")
    return 2 * int(np.count_nonzero(prediction_DHW & truth_DHW)) / total


def draw_prompt(kind: str, category: str, truth_DHW: np.ndarray, rng: np.random.Generator) -> Prompt:
    """A prompt of one of config.COMBINATIONS for a non-empty mask."""
    parts = kind.split("+")
    points_N3, labels_N = None, None
    if "points" in parts:
        points_N3, labels_N = draw_points(truth_DHW, rng, POSITIVE_POINTS, NEGATIVE_POINTS)
    box = box_of(truth_DHW) if "box" in parts else None
    return Prompt(text=category if "text" in parts else None, points_N3=points_N3, labels_N=labels_N, box=box)


class Evaluable(Promptable, Protocol):
    """What evaluating needs of a model; SegVol satisfies it."""

    bank: TextBank


def evaluate(config: EvaluateConfig) -> Summary:
    """Evaluate and write rows.csv, summary.json and report.html into `config.out`.

    Raises EvaluateError where the split holds no labelled case or none of the categories, UnknownCategory for a
    category that the model does not know, CheckpointError and ShardError for files that cannot be used.
    """
    selected = _selected(config)
    return _Evaluation(config, selected, load_model(config.checkpoint, resolve_device(config.device))).run()


def evaluate_model(config: EvaluateConfig, model: Evaluable) -> Summary:
    """`evaluate` with a model at hand (in eval mode); `config.checkpoint` is only its name, `config.device` unused."""
    return _Evaluation(config, _selected(config), model).run()


@dataclass(frozen=True)
class _Selected:
    """Samples of the split: the labelled ones, sorted by key, and how many have no labels."""

    records: list[SampleRecord]
    unlabelled: int


def _selected(config: EvaluateConfig) -> _Selected:
    samples = read_index(Store(config.data.shards)).samples
    chosen = [record for record in samples if config.data.split in ("all", record.split)]
    labelled = sorted((record for record in chosen if record.labelled), key=lambda record: record.key)
    if not labelled:
        splits = Counter(record.split for record in samples if record.labelled)
        found = ", ".join(f"{split} ({count})" for split, count in sorted(splits.items())) or "none at all"
        raise EvaluateError(
            f"data.split: {config.data.shards} holds no labelled case of split {config.data.split!r}; it holds {found}"
        )
    return _Selected(labelled[: config.limit or None], len(chosen) - len(labelled))


class _Evaluation:
    """The state of one evaluation: what is read, and what was found so far."""

    def __init__(self, config: EvaluateConfig, selected: _Selected, model: Evaluable) -> None:
        self.config, self.model = config, model
        self.records, self.unlabelled = selected.records, selected.unlabelled
        self.store = Store(config.data.shards)
        self.device = next(model.parameters()).device
        for category in config.categories:
            model.bank.index(category)
        self.absent: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.rows: list[Row] = []
        self.pictures: list[Picture] = []

    def run(self) -> Summary:
        start = time.perf_counter()
        out = Path(self.config.out)
        out.mkdir(parents=True, exist_ok=True)
        with rows_file(out / "rows.csv") as write:
            for number, record in enumerate(self.records, start=1):
                self._case(read_case(self.store, record), write)
                rate = len(self.rows) / (time.perf_counter() - start)
                log.info("case %d/%d %s (%.2f prompts/s)", number, len(self.records), record.key, rate)
            if not self.rows:
                raise EvaluateError(f"categories: no case of {self.config.data.shards} holds any that can be evaluated")
        summary = self._summary(time.perf_counter() - start)
        about = {"config": to_yaml(self.config), **manifest()}
        text = json.dumps({**summary.to_dict(), "manifest": about}, indent=2, ensure_ascii=False)
        write_text(out / "summary.json", text + "\n")
        write_report(out / "report.html", summary, self.pictures, about)
        return summary

    def _case(self, case: Case, write: Callable[[Iterable[Row]], None]) -> None:
        zoomer = Zoomer(self.model, normalise(case.hu_DHW, case.facts.intensity), self.config.zoom)
        with autocast(self.device, self.config.precision):
            zoomer.encode_overview()
        rows: list[Row] = []
        outlined: list[Outlined] = []
        for category in self._categories(case):
            truth_DHW = case.truth(category)
            for kind in self._kinds(category):
                row, result = self._prompt(zoomer, case.facts.key, category, kind, truth_DHW)
                rows.append(row)
                if kind == self._pictured_kind() and len(self.pictures) < self.config.pictures:
                    outlined.append(self._outline(case, row, truth_DHW, result))
        write(rows)
        self.rows += rows
        if outlined:
            self.pictures.append(Picture(case.facts.key, _spread(outlined)))

    def _categories(self, case: Case) -> list[str]:
        present = set(case.facts.categories)
        self.absent.update(category for category in self.config.categories if category not in present)
        self.unknown.update(category for category in present if category not in self.model.bank.names)
        return [category for category in self.config.categories or sorted(present) if category in present]

    def _kinds(self, category: str) -> list[str]:
        known = category in self.model.bank.names
        return [kind for kind in self.config.prompts if known or "text" not in kind.split("+")]

    def _pictured_kind(self) -> str:
        return "box+text" if "box+text" in self.config.prompts else self.config.prompts[0]

    def _prompt(
        self, zoomer: Zoomer, key: str, category: str, kind: str, truth_DHW: np.ndarray
    ) -> tuple[Row, ZoomResult]:
        seeds = [self.config.seed, zlib.crc32(key.encode()), zlib.crc32(category.encode())]
        prompt, shrunk = self._drawn(kind, category, truth_DHW, zoomer.window, seeds)
        start = time.perf_counter()
        with autocast(self.device, self.config.precision):
            result = zoomer.zoom_in(prompt, shrunk, np.random.default_rng([*seeds, 1]))
        seconds = time.perf_counter() - start
        coarse_DHW, final_DHW = self._masks(result)
        row = Row(
            case=key,
            category=category,
            prompt=kind,
            zoom_out=dice(coarse_DHW, truth_DHW),
            zoom_in=dice(final_DHW, truth_DHW),
            seconds=seconds,
            truth_voxels=int(np.count_nonzero(truth_DHW)),
            predicted_voxels=int(np.count_nonzero(final_DHW)),
            windows=result.windows,
        )
        return row, result

    def _drawn(
        self, kind: str, category: str, truth_DHW: np.ndarray, window: Sequence[int], seeds: list[int]
    ) -> tuple[Prompt, Prompt]:
        """The prompt, and the same in voxels of the model's input; the published one is drawn from the shrunk truth."""
        # Every kind with points gets the same ones, so that kinds are compared, not draws.
        rng = np.random.default_rng([*seeds, 0])
        if self.config.zoom.reflection is Rule.published:
            shrunk_DHW = resize_label(truth_DHW, window)
            if shrunk_DHW.any():
                drawn = draw_prompt(kind, category, shrunk_DHW, rng)
                return drawn, drawn
        drawn = draw_prompt(kind, category, truth_DHW, rng)
        return drawn, scale_prompt(drawn, truth_DHW.shape, window)

    def _masks(self, result: ZoomResult) -> tuple[np.ndarray, np.ndarray]:
        threshold = self.config.zoom.threshold
        return binary(result.coarse_DHW, threshold), binary(result.final_DHW, threshold)

    def _outline(self, case: Case, row: Row, truth_DHW: np.ndarray, result: ZoomResult) -> Outlined:
        coarse_DHW, final_DHW = self._masks(result)
        caption = f"{row.category}, {row.prompt}: Dice {row.zoom_out:.3f} → {row.zoom_in:.3f}"
        planes = cut(case.hu_DHW, case.facts.spacing, truth_DHW, coarse_DHW, final_DHW)
        return Outlined(caption, row.zoom_in, planes)

    def _summary(self, seconds: float) -> Summary:
        return Summary(
            checkpoint=str(self.config.checkpoint),
            shards=str(self.config.data.shards),
            split=self.config.data.split,
            cases=len({row.case for row in self.rows}),
            rows=self.rows,
            absent=dict(self.absent),
            unknown=dict(self.unknown),
            unlabelled=self.unlabelled,
            seconds=seconds,
        )


def read_case(store: Store, record: SampleRecord) -> Case:
    """A labelled sample of the shards, decoded. Raises ShardError where it cannot be read."""
    facts = read_facts(store, record)
    hu_DHW, label_DHW = (read_array(store, record, facts, member)[:] for member in (Member.CT, Member.LABEL))
    return Case(facts, np.asarray(hu_DHW), np.asarray(label_DHW))


def _spread(outlined: list[Outlined]) -> list[Outlined]:
    """Worst, middle and best by Dice."""
    ranked = sorted(outlined, key=lambda one: one.dice)
    places = np.linspace(0, len(ranked) - 1, min(PICTURED, len(ranked))).round()
    return [ranked[int(place)] for place in places]


@contextmanager
def rows_file(path: Path) -> Iterator[Callable[[Iterable[Row]], None]]:
    """A function that appends rows to a CSV at once; the file gets its name when all are written."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Row)])
        writer.writeheader()

        def write(rows: Iterable[Row]) -> None:
            writer.writerows(_plain(row) for row in rows)
            file.flush()

        yield write
    os.replace(partial, path)


def _plain(row: Row) -> dict[str, Any]:
    rounded = {name: round(getattr(row, name), 6) for name in ("zoom_out", "zoom_in", "seconds")}
    return {**asdict(row), **rounded}
