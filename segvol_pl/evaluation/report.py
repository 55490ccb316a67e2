"""The report of an evaluation: one HTML file that needs nothing else.

`write_report` puts tables, box plots, matches and pictures (PNG, inline) into a page. Only the masks, where they were
written, lie beside it and are linked.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from segvol_pl import html_page
from segvol_pl.evaluation.figures import COARSE, FINAL, GIVEN, TRUTH, Picture, png_of
from segvol_pl.evaluation.metrics import Stats
from segvol_pl.evaluation.prompts import Setting
from segvol_pl.evaluation.summary import GroupStats, MatchSummary, Row, Summary, interval_text, number

LONG = 8
"""Settings beyond which their names stand upright below a plot."""


def write_report(path: Path, summary: Summary, pictures: Sequence[Picture], about: dict[str, Any]) -> None:
    """The page of an evaluation. about: config (YAML), commit, python, packages (name -> version)."""
    parts = {
        "Overall": _overall(summary),
        "By category": _by_category(summary),
        "Empty truths": _empty_truths(summary),
        "Stats": _box_plots(summary),
        "What the masks look like": _matches(summary),
        "Pictures": _pictures(pictures),
        "Masks": _masks(summary),
        "What was run": _about(about),
    }
    sections = [_header(summary, about), *(_section(title, content) for title, content in parts.items() if content)]
    html_page.write_page(path, "Evaluation", STYLE, sections)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _header(summary: Summary, about: dict[str, Any]) -> str:
    facts = {
        "checkpoint": summary.checkpoint,
        "data": summary.source,
        "split": summary.split,
        "cases": f"{summary.cases}" + (f" ({summary.unlabelled} more without labels)" if summary.unlabelled else ""),
        "prompts": f"{len(summary.rows)}: {', '.join(map(str, summary.settings))}",
        "time": f"{summary.seconds:.0f} s of all cases together",
        "commit": about["commit"],
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<header><h1>Evaluation</h1><dl>{items}</dl>{_cautions(summary)}</header>"


def _cautions(summary: Summary) -> str:
    lines = [
        "Boxes and points are drawn from the ground truth: their figures say how well a prompt is obeyed. "
        "Only the prompt kind “text” knows nothing of the truth"
    ]
    lines += [f"{case} cannot be read and is in no figure: {why}" for case, why in summary.unusable.items()]
    lines += [f"{name}: asked for but absent in {count} cases" for name, count in summary.absent.items()]
    lines += [
        f"{name}: unknown to the model’s text bank ({count} cases), so not prompted by text"
        for name, count in summary.unknown.items()
    ]
    without = len({row.case for row in summary.rows if row.dice is not None and row.surface_dice is None})
    lines += [f"{without} cases have no known spacing, hence no surface Dice"] if without else []
    return "".join(f'<p class="note">{escape(line)}.</p>' for line in lines)


def _named(setting: Setting) -> tuple[str, str]:
    prompt, mode = setting.named
    return escape(prompt), mode


def _overall(summary: Summary) -> str:
    rows = [
        (
            *_named(setting),
            str(figures.categories),
            f"<b>{number(figures.dice)}</b>",
            f"<small>{interval_text(figures.dice_interval)}</small>",
            number(figures.zoom_out),
            number(figures.surface_dice),
            number(figures.seconds),
            number(figures.memory_mb, 0),
            *(number(value) for value in figures.custom.values()),
        )
        for setting, figures in summary.overall.items()
    ]
    head = ("prompt", "mode", "categories", "Dice", "95 % interval", "of the zoom-out", "surface Dice")
    told = (
        "Mean over categories of their mean over cases; the interval is a bootstrap over the cases. Seconds are a mean "
        "over prompts, memory (MiB) the most of any prompt."
    )
    return f"<p>{told}</p>" + html_page.table((*head, "seconds / prompt", "memory", *summary.custom), rows)


def _by_category(summary: Summary) -> str:
    rows = [_category_row(category, setting, cell) for (category, setting), cell in summary.cells.items() if cell.n]
    head = ("category", "prompt", "mode", "n", "Dice", "mean", "95 % interval", "of the zoom-out", "surface Dice")
    told = (
        "Median [first quartile, third quartile] over cases, and the mean Dice with its interval. The volume error is "
        "(predicted - true) / true."
    )
    return f"<p>{told}</p>" + html_page.table((*head, "volume error", "seconds", *summary.custom), rows)


def _category_row(category: str, setting: Setting, cell: GroupStats) -> tuple[str, ...]:
    assert cell.dice is not None
    bar = f'<span class="bar" style="--share:{100 * cell.dice.median:.0f}%">{_quartiles(cell.dice)}</span>'
    return (
        *(escape(category), *_named(setting), str(cell.n), bar),
        *(number(cell.dice.mean), f"<small>{interval_text(cell.dice.mean_interval)}</small>"),
        *(_quartiles(spread) for spread in (cell.zoom_out, cell.surface_dice, cell.volume_error)),
        number(cell.seconds, 2),
        *(_quartiles(spread) for spread in cell.custom.values()),
    )


def _quartiles(spread: Stats | None) -> str:
    return "" if spread is None else f"{spread.median:.3f} <small>[{spread.q1:.3f}, {spread.q3:.3f}]</small>"


def _empty_truths(summary: Summary) -> str:
    """Cases that lack a category asked for; none of the other figures counts them."""
    cells = [(category, setting, cell) for (category, setting), cell in summary.cells.items() if cell.empty]
    if not cells:
        return ""
    rows = [
        (escape(category), *_named(setting), str(cell.empty), str(cell.false_alarms))
        for category, setting, cell in cells
    ]
    told = "Cases without the category, asked for it by text: they have no Dice and count in no other figure."
    return f"<p>{told}</p>" + html_page.table(("category", "prompt", "mode", "cases", "something found"), rows)


def _box_plots(summary: Summary) -> str:
    plots = "".join(
        html_page.picture(png_of(_box_plot(summary, category)), f"Dice of {category}")
        for category in summary.categories
        if any(row.category == category and not row.empty for row in summary.rows)
    )
    legend = f"<p>{_swatch(COARSE)} zoom-out alone {_swatch(FINAL)} the mask; a dot is a case.</p>"
    return f'{legend}<div class="grid">{plots}</div>' if plots else ""


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _box_plot(summary: Summary, category: str) -> Figure:
    rows = [row for row in summary.rows if row.category == category and not row.empty]
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure = Figure(figsize=(max(3.3, 0.55 * len(settings)), 2.8), layout="constrained")
    axes = figure.add_subplot()
    for place, setting in enumerate(settings):
        _boxes(axes, place, [row for row in rows if row.setting == setting])
    names = [str(setting).replace("+", "\n+").replace(" ", "\n") for setting in settings]
    axes.set_xticks(range(len(settings)), names, fontsize=6, rotation=90 if len(settings) > LONG else 0)
    axes.set(ylim=(-0.03, 1.03), xlim=(-0.6, len(settings) - 0.4))
    axes.set_title(category, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _boxes(axes: Axes, place: int, rows: Sequence[Row]) -> None:
    """Of one setting: the mask's, and beside it the zoom-out's where there is one."""
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


def _matches(summary: Summary) -> str:
    if not summary.matches:
        return ""
    told = (
        f"The mask of a spatial prompt without text ({summary.matches[0].prompt}), held against the mask that the "
        "model finds for each category by text alone, on the overview: mean soft Dice of the two over the cases, the "
        "eight likeliest. Filled: the category that the prompt was drawn for."
    )
    plots = "".join(
        html_page.picture(png_of(_reading_plot(category, read)), f"What masks of {category} look like")
        for category, read in summary.matches_by_category.items()
    )
    return f'<p>{escape(told)}</p><div class="grid">{plots}</div>'


def _reading_plot(category: str, read: MatchSummary) -> Figure:
    figure = Figure(figsize=(3.3, 2.4), layout="constrained")
    axes = figure.add_subplot()
    names = list(read.soft_dice)
    colours = [FINAL if name == category else FINAL + "33" for name in names]
    axes.barh(range(len(names)), list(read.soft_dice.values()), color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{category}: first in {read.first:.0%} of {read.n}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _pictures(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    legend = (
        f"<p>{_swatch(TRUTH)} truth {_swatch(COARSE)} zoom-out {_swatch(FINAL)} prediction {_swatch(GIVEN)} prompt "
        "(dotted or pale: on another slice). The categories with the lowest median Dice.</p>"
    )
    return legend + "".join(
        f"<figure>{html_page.picture(one.png, one.caption)}<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in pictures
    )


def _masks(summary: Summary) -> str:
    """Links to the masks that were written, by case."""
    by_case: dict[str, list[str]] = {}
    for row in summary.rows:
        if row.mask:
            text = f"{row.category}, {row.setting}: Dice {number(row.dice) or 'none, the truth is empty'}"
            by_case.setdefault(row.case, []).append(f'<li><a href="{quote(row.mask)}">{escape(text)}</a></li>')
    return "".join(
        f"<details><summary>{escape(case)}</summary><ul>{''.join(links)}</ul></details>"
        for case, links in by_case.items()
    )


def _about(about: dict[str, Any]) -> str:
    versions = [("python", about["python"]), *about["packages"].items()]
    table = html_page.table(("package", "version"), [(escape(name), escape(found)) for name, found in versions])
    return f"<pre>{escape(about['config'])}</pre>{table}"


STYLE = """
:root { --ink: #1d2430; --soft: #5c6675; --line: #dde1e7; --tint: #f5f7f9; --bar: #fbe6d8; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem;
  padding-top: 1rem; border-top: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.6rem 0 .2rem; }
p { margin: .3rem 0 .6rem; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.note { background: var(--tint); border-left: 3px solid #8a93a0; padding: .45rem .8rem; color: var(--ink); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; padding-left: 0; }
small { color: var(--soft); }
.bar { display: inline-block; padding: 0 .4rem; border-radius: 2px;
  background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share)); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: .6rem; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .2em 0 .8em; }
img { max-width: 100%; display: block; } figure { margin: .4rem 0 1rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .2rem; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""
