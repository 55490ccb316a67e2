"""The report of an evaluation: one HTML file that needs no other.

`write_report` draws the plots and fills `templates/evaluation.html.j2` with figures, plots and pictures. Masks, if the
evaluation wrote any, are files of their own, to which the page links.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segvol_pl import html_page
from segvol_pl.evaluation.challenge import SECONDS_A_CLASS
from segvol_pl.evaluation.figures import COARSE, FINAL, GIVEN, TRUTH, Picture, png_of
from segvol_pl.evaluation.protocol import ProtocolFigures, plot_curve
from segvol_pl.evaluation.summary import MatchSummary, Row, Summary, interval_text, number

INCHES_A_CHARACTER = 0.046
"""Width of the settings' names below a plot; they are rotated where there is no room."""


def write_report(
    path: Path,
    summary: Summary,
    pictures: Sequence[Picture],
    about: dict[str, Any],
    protocol: ProtocolFigures | None = None,
) -> None:
    """Write the page of an evaluation.

    Args:
        path: The file to write.
        summary: The figures.
        pictures: Cases with their masks, in the order of the page.
        about: config (YAML), commit, python, packages (name -> version).
        protocol: The figures of a challenge's protocol.
    """
    facts = {
        "checkpoint": summary.checkpoint,
        "data": summary.source,
        "split": summary.split,
        "cases": f"{summary.cases}" + (f" ({summary.unlabelled} more without labels)" if summary.unlabelled else ""),
        "prompts": f"{len(summary.rows)}: {', '.join(map(str, summary.settings))}",
        "time": f"{summary.seconds:.0f} s for all cases together",
        "commit": about["commit"],
    }
    masks: dict[str, list[Row]] = defaultdict(list)
    for row in summary.rows:
        if row.mask:
            masks[row.case].append(row)
    html_page.write_page(
        path,
        "evaluation.html.j2",
        title="Evaluation",
        facts=facts,
        cautions=_cautions(summary),
        summary=summary,
        custom=list(summary.custom),
        box_plots={
            category: png_of(_box_plot(summary, category))
            for category in summary.categories
            if any(row.category == category and not row.empty for row in summary.rows)
        },
        match_plots={
            category: png_of(_match_plot(category, match)) for category, match in summary.matches_by_category.items()
        },
        protocol=protocol,
        curve=png_of(plot_curve(protocol)) if protocol and protocol.curve else None,
        seconds_a_class=SECONDS_A_CLASS,
        pictures=pictures,
        masks=masks,
        about=about,
        number=number,
        interval_text=interval_text,
        colours={"coarse": COARSE, "final": FINAL, "given": GIVEN, "truth": TRUTH},
    )


def _cautions(summary: Summary) -> list[str]:
    lines = [
        "Boxes and points are drawn from the ground truth: their figures measure how well the model follows a prompt. "
        "Only the prompt kind “text” is independent of the truth"
    ]
    lines += [f"{case} cannot be read and is in no figure: {why}" for case, why in summary.unusable.items()]
    lines += [f"{name}: requested but absent in {count} cases" for name, count in summary.absent.items()]
    lines += [
        f"{name}: unknown to the model’s text bank ({count} cases), so not prompted by text"
        for name, count in summary.unknown.items()
    ]
    without = len({row.case for row in summary.rows if row.dice is not None and row.surface_dice is None})
    return lines + ([f"{without} cases have no known spacing, hence no surface Dice and no HD95"] if without else [])


def _box_plot(summary: Summary, category: str) -> Figure:
    rows = [row for row in summary.rows if row.category == category and not row.empty]
    settings = list(dict.fromkeys(row.setting for row in rows))
    width = max(3.3, 0.55 * len(settings))
    figure = Figure(figsize=(width, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for place, setting in enumerate(settings):
        _boxes(axes, place, [row for row in rows if row.setting == setting])
    names = [str(setting).replace("+", "\n+").replace(" ", "\n") for setting in settings]
    longest = max(len(line) for name in names for line in name.splitlines())
    crowded = len(settings) * longest * INCHES_A_CHARACTER > width
    axes.set_xticks(range(len(settings)), names, fontsize=6, rotation=90 if crowded else 0)
    axes.set(ylim=(-0.03, 1.03), xlim=(-0.6, len(settings) - 0.4))
    axes.set_title(category, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _boxes(axes: Axes, place: int, rows: Sequence[Row]) -> None:
    """The boxes of one setting: of the mask, and of the zoom-out if there is one."""
    coarse = [row.zoom_out for row in rows if row.zoom_out is not None]
    if coarse:
        _one_box(axes, place - 0.19, coarse, COARSE)
    _one_box(axes, place + (0.19 if coarse else 0), [row.dice for row in rows if row.dice is not None], FINAL)


def _one_box(axes: Axes, place: float, values: Sequence[float], colour: str) -> None:
    axes.boxplot(
        [values],
        positions=[place],
        widths=0.3,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": colour + "33", "edgecolor": colour},
        medianprops={"color": colour, "linewidth": 1.6},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )
    axes.plot([place] * len(values), values, ".", color=colour, markersize=3, alpha=0.6)


def _match_plot(category: str, match: MatchSummary) -> Figure:
    figure = Figure(figsize=(3.3, 2.4), layout="constrained")
    axes = figure.add_subplot()
    names = list(match.soft_dice)
    colours = [FINAL if name == category else FINAL + "33" for name in names]
    axes.barh(range(len(names)), list(match.soft_dice.values()), color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{category}: first in {match.first:.0%} of {match.n}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
