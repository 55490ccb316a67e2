"""The report of a fine-tuning: `report.json` and `report.html`, and the table that the command prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Plot
from rich.box import SIMPLE_HEAD
from rich.table import Table

from segvol_pl import html_page
from segvol_pl.atomic import write_text
from segvol_pl.evaluation.figures import png_of
from segvol_pl.evaluation.summary import interval_text, number
from segvol_pl.finetuning.gains import Figure, Gain
from segvol_pl.finetuning.stages import Done
from segvol_pl.run_folder import manifest, read_every_metric

CURVES = ("text", "box+text", "points+text", "box", "points")
"""Prompts whose validation Dice is plotted, if they are trained."""


@dataclass(frozen=True)
class Findings:
    """What a fine-tuning has found."""

    facts: dict[str, str]
    """What was done, for the top of the page."""
    plan: list[str]
    """What was estimated before training."""
    gained: list[Gain]
    """On the validation cases."""
    forgotten: list[Gain] | None
    """On cases of what the checkpoint knew; None if that was not measured."""
    about_forgetting: str
    """What was measured, or why nothing was and how to measure it."""
    few: str
    """What so many cases can show."""
    config: str
    """As YAML."""
    stages: dict[str, Done]


def lost(found: Sequence[Gain] | None) -> str:
    """Say in a line what was forgotten: the mean over categories by each prompt, and the worst category."""
    if not found:
        return ""
    means = [f"{gain.prompt} {_points(gain.difference)}" for gain in found if not gain.category and gain.difference]
    single = [(gain.difference.mean, gain) for gain in found if gain.category and gain.difference]
    worst = min(single, key=lambda pair: pair[0], default=None)
    named = f"; the worst is {worst[1].category} by {worst[1].prompt}, {_points(worst[1].difference)}" if worst else ""
    return f"Dice on the old categories, in points: {', '.join(means)}{named}"


def gained(found: Sequence[Gain]) -> str:
    """Say in a line what was gained: the mean over the new data's categories by each prompt."""
    parts = []
    for gain in (gain for gain in found if not gain.category):
        known = f" ({_points(gain.difference)} points)" if gain.difference else ", a name that was unknown before"
        parts.append(f"{gain.prompt} {number(gain.after.mean)}{known}")
    return f"Dice on the validation cases: {', '.join(parts)}"


def _points(figure: Figure | None) -> str:
    return "" if figure is None else f"{100 * figure.mean:+.1f}"


def _points_interval(figure: Figure | None) -> str:
    if figure is None or figure.interval is None:
        return ""
    low, high = figure.interval
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def write_report(out: Path, findings: Findings) -> None:
    """Write `report.json` and `report.html` into the folder of the fine-tuning."""
    made = manifest()
    content: dict[str, Any] = {
        **asdict(findings),
        "summary": {"gained": gained(findings.gained), "forgotten": lost(findings.forgotten)},
        "manifest": made,
    }
    write_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    html_page.write_page(
        out / "report.html",
        "finetuning.html.j2",
        title="Fine-tuning",
        findings=findings,
        gained=gained(findings.gained),
        lost=lost(findings.forgotten),
        curves=_curves(out / "train" / "metrics.csv"),
        links=[
            name for name in ("before", "after", "before-old", "after-old") if (out / name / "report.html").exists()
        ],
        about=made,
        number=number,
        interval_text=interval_text,
        points=_points,
        points_interval=_points_interval,
    )


def _curves(metrics: Path) -> bytes | None:
    """Plot the training loss and the validation Dice of each prompt over the steps; None without a run's metrics."""
    if not metrics.exists():
        return None
    found = read_every_metric(metrics)
    plot = Plot(figsize=(9, 2.8), layout="constrained")
    loss, dice = plot.subplots(1, 2)
    for name, axes, label in (("train/loss", loss, "training"), ("val/loss", loss, "validation")):
        if name in found:
            axes.plot(*zip(*found[name], strict=True), label=label, linewidth=1)
    for prompt in CURVES:
        if f"val/dice/{prompt}" in found:
            dice.plot(*zip(*found[f"val/dice/{prompt}"], strict=True), ".-", label=prompt, linewidth=1)
    for axes, title in ((loss, "loss"), (dice, "Dice of the validation batches")):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(fontsize=7)
    return png_of(plot)


def table(title: str, found: Sequence[Gain]) -> Table:
    """Make a terminal table of before and after."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for name in ("category", "prompt", "mode"):
        made.add_column(name, overflow="fold")
    for name in ("n", "before", "after", "points", "95 % interval"):
        made.add_column(name, justify="right", no_wrap=True)
    for gain in found:
        before = "unknown" if gain.before is None else number(gain.before.mean)
        change = (_points(gain.difference), _points_interval(gain.difference))
        name = gain.category or "all: mean"
        made.add_row(name, gain.prompt, gain.mode, str(gain.n), before, number(gain.after.mean), *change)
    return made
