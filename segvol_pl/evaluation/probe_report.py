"""The results of a probe as JSON, CSV, figures and a page.

Letters: W bootstrap samples; sample 0 counts every volume once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from segvol_pl.atomic import atomic_path, write_csv, write_text
from segvol_pl.config import ProbeConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.evaluation.feature_folder import INTENSITY, KINDS, TRAINED, UNTRAINED, Features
from segvol_pl.evaluation.figures import png_of
from segvol_pl.evaluation.metrics import interval
from segvol_pl.evaluation.probe_tasks import Task
from segvol_pl.html_page import Section, write_sections
from segvol_pl.run_folder import manifest

LINEAR, NEIGHBOURS = "linear", "neighbours"
COLOURS = {TRAINED: "#3b6fb6", UNTRAINED: "#e0752d", INTENSITY: "#6b7785"}
PICTURED = 12
"""Most tasks with a figure of their own."""


@dataclass(frozen=True, eq=False)
class Figures:
    """One figure: a probe of a kind of features on a task, trained with a fraction of the labels."""

    task: str
    metric: str
    features: str
    """A kind of `KINDS`."""
    probe: str
    fraction: float
    labels: float
    """Labels that a classifier was trained with, mean over folds."""
    sampled_W: np.ndarray = field(repr=False)
    """The figure of each bootstrap sample; the first is the estimate."""

    def row(self) -> dict[str, Any]:
        """As a row of probe.csv."""
        low, high = interval(self.sampled_W[1:])
        return {
            "task": self.task,
            "metric": self.metric,
            "features": KINDS[self.features],
            "probe": self.probe,
            "fraction": self.fraction,
            "labels": self.labels,
            "value": float(self.sampled_W[0]),
            "low": low,
            "high": high,
        }


def write_results(
    out: Path,
    figures: Sequence[Figures],
    compared: Sequence[dict[str, Any]],
    tasks: Sequence[Task],
    features: Features,
    config: ProbeConfig,
    notes: Sequence[str],
) -> None:
    """Write probe.json, probe.csv, figures and index.html.

    Args:
        out: The folder.
        figures: All figures.
        compared: The features of the checkpoint against the others, see `probe`.
        tasks: What was predicted.
        features: From what.
        config: The configuration.
        notes: What was left out, one line each.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [each.row() for each in figures]
    content = {
        "figures": rows,
        "compared": compared,
        "tasks": {task.name: {"metric": task.metric, "volumes": task.counts} for task in tasks},
        "notes": notes,
        "features": {key: features.index[key] for key in ("checkpoint", "volumes", "arrays")},
        "config": to_yaml(config),
        **manifest(),
    }
    write_text(out / "probe.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_csv(out / "probe.csv", rows)
    _write_page(out, figures, compared, features, config, notes)


def _write_page(
    out: Path,
    figures: Sequence[Figures],
    compared: Sequence[dict[str, Any]],
    features: Features,
    config: ProbeConfig,
    notes: Sequence[str],
) -> None:
    names = list(dict.fromkeys(each.task for each in reversed(figures)))
    sections = [Section(lines=[(note, "note") for note in notes])] if notes else []
    for number, name in enumerate(names):
        mine = [each for each in figures if each.task == name]
        lines = [(each["verdict"], _mark(each)) for each in notable(compared) if each["task"] == name]
        pictures = []
        if number < PICTURED:
            png = _picture(mine)
            with atomic_path(out / f"labels-{number}.png") as part:
                part.write_bytes(png)
            pictures = [(png, f"{name}: figure over the number of labels")]
        table = [_cells(each) for each in mine if each.fraction == 1]
        sections.append(Section(f"{name}: {mine[0].metric}", lines, pictures, table))
    how = f"{config.folds}-fold cross-validation" if config.folds else "train on the split train, test on the others"
    about = f"Frozen features of {features.index['checkpoint']}, {len(features.keys)} volumes, {how}. Intervals are "
    about += "95 % bootstrap intervals over the tested volumes. The encoder is compared with one of the same "
    about += "architecture with random weights, and with the image itself: if it is not better than both, pre-training "
    about += "has shown no worth."
    write_sections(out / "index.html", "Probes of frozen features", about, sections)


def notable(compared: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons with all labels, and of those with fewer the ones that show a difference."""
    return [each for each in compared if each["fraction"] == 1 or each["shown"]]


def _mark(compared: dict[str, Any]) -> str:
    return "yes" if compared["low"] > 0 else "no" if compared["high"] < 0 else "note"


def _cells(each: Figures) -> dict[str, str]:
    row = each.row()
    text = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return {"features": row["features"], "probe": each.probe, "labels": f"{each.labels:.0f}", each.metric: text}


def _picture(figures: Sequence[Figures]) -> bytes:
    """The label-efficiency curves of a task as PNG: one panel for each probe, one curve for each kind of features."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, (LINEAR, NEIGHBOURS), strict=True):
        for kind, colour in COLOURS.items():
            mine = [each for each in figures if (each.probe, each.features) == (name, kind)]
            rows = [each.row() for each in mine]
            at = [each.labels for each in mine]
            axes.fill_between(at, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.14)
            axes.plot(at, [row["value"] for row in rows], "o-", color=colour, markersize=3.5, label=KINDS[kind])
        axes.set(xscale="log")
        axes.set_xlabel("labels to train with", fontsize=8.5)
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(figures[0].metric, fontsize=8.5)
    panels[1].legend(fontsize=7.5, frameon=False, title="band: 95 %", title_fontsize=7.5)
    return png_of(figure, dpi=150)
