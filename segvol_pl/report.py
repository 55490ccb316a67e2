"""The report of an evaluation: one HTML file that needs nothing else.

1. `cut` takes from a case the three slices that show a structure best, as soon as it is segmented.
2. `write_report` puts tables, box plots and pictures (PNG, inline) into a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from segvol_pl.data.whole import write_text

if TYPE_CHECKING:
    from segvol_pl.evaluate import Cell, Quartiles, Summary

LEVEL, WIDTH = 40.0, 400.0
"""Soft tissue window, HU."""

TRUTH, COARSE, FINAL, NEUTRAL = "#2e9e5b", "#4f7fd6", "#e0752d", "#8a93a0"


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice through a CT, rows and columns as shown: patient's right on the left, anterior or superior up."""

    name: str
    grey_RC: np.ndarray
    """float32 in [0, 1], windowed."""
    truth_RC: np.ndarray
    coarse_RC: np.ndarray
    final_RC: np.ndarray
    aspect: float
    """Height of a pixel over its width, mm."""


@dataclass(frozen=True, eq=False)
class Outlined:
    """One category of a case: three planes with the outlines of truth, zoom-out and zoom-in."""

    caption: str
    dice: float
    planes: list[Plane]


@dataclass(frozen=True, eq=False)
class Picture:
    """A case of the report and some of its categories."""

    case: str
    outlined: list[Outlined]


def cut(
    hu_DHW: np.ndarray,
    spacing: Sequence[float],
    truth_DHW: np.ndarray,
    coarse_DHW: np.ndarray,
    final_DHW: np.ndarray,
) -> list[Plane]:
    """Axial, coronal and sagittal slice, each where the truth is largest. spacing: mm along d, h, w."""
    planes = []
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        others = tuple(other for other in range(3) if other != axis)
        at = int(truth_DHW.sum(axis=others).argmax())
        grey, truth, coarse, final = (
            # Rows and columns fall as D, H and W grow: superior, anterior up, right on the left. A copy: the case goes.
            np.flip(array_DHW.take(at, axis=axis), (0, 1)).copy()
            for array_DHW in (hu_DHW, truth_DHW, coarse_DHW, final_DHW)
        )
        windowed = np.clip((grey.astype(np.float32) - LEVEL) / WIDTH + 0.5, 0, 1)
        planes.append(Plane(name, windowed, truth, coarse, final, spacing[others[0]] / spacing[others[1]]))
    return planes


def write_report(path: Path, summary: Summary, pictures: Sequence[Picture], about: dict[str, Any]) -> None:
    """The page of an evaluation. about: config (YAML), commit, python, packages (name -> version)."""
    sections = [
        _header(summary, about),
        _section("Overall", _overall(summary)),
        _section("By category", _by_category(summary)),
        _section("Spread", _box_plots(summary)),
        _section("Cases", "".join(_pictured(picture) for picture in pictures)) if pictures else "",
        _section("What was run", _about(about)),
    ]
    write_text(path, PAGE.format(style=STYLE, body="\n".join(sections)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _header(summary: Summary, about: dict[str, Any]) -> str:
    facts = {
        "checkpoint": summary.checkpoint,
        "shards": summary.shards,
        "split": summary.split,
        "cases": f"{summary.cases}" + (f" ({summary.unlabelled} more without labels)" if summary.unlabelled else ""),
        "prompts": f"{len(summary.rows)}, of kinds {', '.join(summary.prompts)}",
        "time": f"{summary.seconds:.0f} s",
        "commit": about["commit"],
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<header><h1>Evaluation</h1><dl>{items}</dl>{_cautions(summary)}</header>"


def _cautions(summary: Summary) -> str:
    lines = [
        "Boxes and points are drawn from the ground truth: their figures say how well a prompt is obeyed. "
        "Only the prompt kind “text” knows nothing of the truth"
    ]
    lines += [f"{name}: asked for but absent in {count} cases" for name, count in summary.absent.items()]
    lines += [
        f"{name}: unknown to the model’s text bank ({count} cases), so not prompted by text"
        for name, count in summary.unknown.items()
    ]
    return "".join(f'<p class="note">{escape(line)}.</p>' for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _overall(summary: Summary) -> str:
    rows = [
        (
            escape(prompt),
            str(figures.categories),
            f"{figures.zoom_out:.3f}",
            f"<b>{figures.zoom_in:.3f}</b>",
            f"{figures.zoom_in - figures.zoom_out:+.3f}",
            f"{figures.seconds:.2f}",
        )
        for prompt, figures in summary.overall().items()
    ]
    head = ("prompt", "categories", "zoom-out", "zoom-in", "difference", "seconds / prompt")
    return "<p>Mean over categories of their mean Dice.</p>" + _table(head, rows)


def _by_category(summary: Summary) -> str:
    rows = [_category_row(category, prompt, cell) for (category, prompt), cell in summary.cells().items()]
    head = ("category", "prompt", "n", "zoom-out", "zoom-in", "mean out", "mean in", "seconds")
    return "<p>Dice: median [first quartile, third quartile] over cases.</p>" + _table(head, rows)


def _category_row(category: str, prompt: str, cell: Cell) -> tuple[str, ...]:
    bar = f'<span class="bar" style="--share:{100 * cell.zoom_in.median:.0f}%">{_quartiles(cell.zoom_in)}</span>'
    means = f"{cell.zoom_out.mean:.3f}", f"{cell.zoom_in.mean:.3f}"
    return (
        *(escape(category), escape(prompt), str(cell.n)),
        *(_quartiles(cell.zoom_out), bar, *means),
        f"{cell.seconds:.2f}",
    )


def _quartiles(dice: Quartiles) -> str:
    return f"{dice.median:.3f} <small>[{dice.q1:.3f}, {dice.q3:.3f}]</small>"


def _box_plots(summary: Summary) -> str:
    plots = "".join(_image(_box_plot(summary, category), f"Dice of {category}") for category in summary.categories)
    legend = f"<p>{_swatch(COARSE)} zoom-out {_swatch(FINAL)} zoom-in; a dot is a case.</p>"
    return f'{legend}<div class="grid">{plots}</div>'


def _swatch(colour: str) -> str:
    return f'<span class="swatch" style="background:{colour}"></span>'


def _box_plot(summary: Summary, category: str) -> Figure:
    rows = [row for row in summary.rows if row.category == category]
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    figure = Figure(figsize=(3.3, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for place, prompt in enumerate(prompts):
        _one_box(axes, place - 0.19, [row.zoom_out for row in rows if row.prompt == prompt], COARSE)
        _one_box(axes, place + 0.19, [row.zoom_in for row in rows if row.prompt == prompt], FINAL)
    axes.set_xticks(range(len(prompts)), prompts, fontsize=8)
    axes.set(ylim=(-0.03, 1.03), xlim=(-0.6, len(prompts) - 0.4))
    axes.set_title(category, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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


def _pictured(picture: Picture) -> str:
    legend = f"{_swatch(TRUTH)} truth {_swatch(COARSE)} zoom-out {_swatch(FINAL)} zoom-in"
    figures = "".join(
        f"<figure>{_image(_planes(one), one.caption)}<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in picture.outlined
    )
    return f"<h3>{escape(picture.case)}</h3><p>{legend}</p>{figures}"


def _planes(outlined: Outlined) -> Figure:
    ratios = [plane.grey_RC.shape[1] / (plane.grey_RC.shape[0] * plane.aspect) for plane in outlined.planes]
    figure = Figure(figsize=(3.0 * sum(ratios), 3.2), layout="constrained", facecolor="black")
    shown = figure.subplots(1, 3, width_ratios=ratios)
    for axes, plane in zip(shown, outlined.planes, strict=True):
        _plane(axes, plane)
    return figure


def _plane(axes: Axes, plane: Plane) -> None:
    axes.imshow(plane.grey_RC, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="bilinear")
    outlines = ((plane.truth_RC, TRUTH, 2.4), (plane.coarse_RC, COARSE, 0.8), (plane.final_RC, FINAL, 1.0))
    for mask_RC, colour, width in outlines:
        if mask_RC.any() and not mask_RC.all():
            axes.contour(mask_RC.astype(np.float32), levels=[0.5], colors=[colour], linewidths=[width])
    axes.set_title(plane.name, fontsize=8, color=NEUTRAL, pad=2)
    axes.set_axis_off()


def _image(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=120, facecolor=figure.get_facecolor())
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def _about(about: dict[str, Any]) -> str:
    versions = [("python", about["python"]), *about["packages"].items()]
    table = _table(("package", "version"), [(escape(name), escape(found)) for name, found in versions])
    return f"<pre>{escape(about['config'])}</pre>{table}"


PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""

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
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .8rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
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
