"""Figures of fits and comparisons, as PNG and SVG. Axes have units; n and the kind of interval are stated."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter

from segvol_pl.atomic import atomic_path
from segvol_pl.experiments.frontier import Optimum
from segvol_pl.experiments.points import Points
from segvol_pl.experiments.sensitivity import FAR
from segvol_pl.experiments.verdict import SYMBOLS, Verdict, predicted

if TYPE_CHECKING:
    from segvol_pl.experiments.compare import Comparison
    from segvol_pl.experiments.paper import Result

COLOURS = ("#3b6fb6", "#e0752d", "#2e9e5b", "#8e5bb0", "#c03d5d", "#6b7785", "#b08a1e", "#2a9aa8")
INK, BAND = "#1d2430", 0.16
CURVES = len(COLOURS)
"""Most curves of a figure."""
LINE = 60
"""Number of points of a curve."""


def unit(points: Points, variable: str) -> str:
    """Return the label of an axis."""
    return "N, parameters" if variable == "params" else f"D, {points.samples}"


def loss_label(points: Points) -> str:
    """Return the label of the loss axis, which has no unit."""
    return points.loss if "loss" in points.loss else f"loss ({points.loss})"


def law_figure(judged: Verdict, points: Points, variable: str) -> Figure:
    """Draw the loss over one variable, one curve for each value of the other. Bands are 95 % intervals of the law.

    If the other variable has more than `CURVES` values, neighbours share a colour and a curve at their mean."""
    figure, axes = _axes(unit(points, variable), loss_label(points))
    place = judged.law.variables.index(variable)
    logs = points.logs(judged.law.variables)
    others = np.delete(logs, place, axis=1)
    values = np.unique(others, axis=0)
    for number, group in enumerate(np.array_split(values, min(CURVES, len(values)))):
        colour = COLOURS[number % len(COLOURS)]
        mine = (others[:, None] == group).all(axis=2).any(axis=1)
        label = _group_label(judged, variable, group, int(mine.sum()))
        axes.plot(np.exp(logs[mine, place]), points.losses[mine], "o", color=colour, markersize=4, label=label)
        _curve(axes, judged, place, group.mean(axis=0), logs[:, place], colour)
    figure.suptitle(_title(judged), fontsize=9, x=0.01, ha="left", color=INK)
    figure.legend(
        fontsize=7.5, frameon=False, title="dot: run; band: 95 %", title_fontsize=7.5, loc="outside right center"
    )
    _plain_ticks(axes)
    return figure


def _group_label(judged: Verdict, variable: str, group: np.ndarray, count: int) -> str:
    others = [other for other in judged.law.variables if other != variable]
    ends = [" to ".join(dict.fromkeys(_short(value) for value in np.exp(column[[0, -1]]))) for column in group.T]
    named = ", ".join(f"{SYMBOLS[other]} = {text}" for other, text in zip(others, ends, strict=True))
    return f"{named or 'runs'} (n = {count})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 10 <= value < 1e7 else f"{value:.3g}"


def _curve(axes: Axes, judged: Verdict, place: int, group: np.ndarray, logs_R: np.ndarray, colour: str) -> None:
    if judged.fit is None:
        return
    line = np.linspace(logs_R.min(), logs_R.max() + 0.15 * np.ptp(logs_R), LINE)
    grid = np.insert(np.tile(group, (LINE, 1)), place, line, axis=1)
    band = predicted(judged.fit, grid, noise=False)
    axes.fill_between(
        np.exp(line), [each.low for each in band], [each.high for each in band], color=colour, alpha=BAND, linewidth=0
    )
    style = "-" if judged.supported else ":"
    axes.plot(np.exp(line), [each.value for each in band], style, color=colour, linewidth=1.2)


def _title(judged: Verdict) -> str:
    if judged.fit is None:
        return f"{judged.law.formula}: not fitted, n = {judged.runs}"
    named = ", ".join(
        f"{name} = {each.value:.3g} [{each.low:.3g}, {each.high:.3g}]"
        for name, each in judged.coefficients.items()
        if name in ("E", "alpha", "beta")
    )
    claim = "" if judged.supported else "NOT SUPPORTED by the data: "
    return f"{claim}{judged.law.formula}\n{named}; n = {judged.runs}"


def frontier_figure(optima: Sequence[Optimum], points: Points) -> Figure:
    """Draw the best N and its loss over the budget. Hollow dots lie outside the range of the runs."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in (
        (left, "params", "best N, parameters"),
        (right, "loss", f"{loss_label(points)} at the best"),
    ):
        _dress(axes, "training budget, FLOPs", label)
        values = [getattr(optimum, name) for optimum in optima]
        flops = [optimum.flops for optimum in optima]
        axes.fill_between(flops, [v.low for v in values], [v.high for v in values], color=COLOURS[0], alpha=BAND)
        axes.plot(flops, [v.value for v in values], "-", color=COLOURS[0], linewidth=1.2)
        for inside, face in ((True, COLOURS[0]), (False, "white")):
            shown = [(o.flops, getattr(o, name).value) for o in optima if o.beyond is not inside]
            word = "within the runs" if inside else "outside of the runs"
            if shown:
                axes.plot(*zip(*shown, strict=True), "o", mfc=face, color=COLOURS[0], markersize=4, label=word)
    left.legend(fontsize=7.5, frameon=False, title="band: 95 %", title_fontsize=7.5)
    _plain_ticks(right)
    figure.suptitle(f"Compute-optimal frontier, n = {len(points.used)} runs", fontsize=9, x=0.01, ha="left", color=INK)
    return figure


def residual_figure(judged: Verdict, points: Points) -> Figure:
    """Draw the residuals over N, D and the loss. Rings are outliers; the lines are where they begin."""
    assert judged.fit is not None
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    row = figure.subplots(1, 3, sharey=True)
    deviations_R = judged.fit.residuals_R / judged.fit.spread
    far_R = np.abs(deviations_R) > FAR
    columns = [
        (unit(points, "params"), np.exp(points.logs(["params"])[:, 0])),
        (unit(points, "samples"), np.exp(points.logs(["samples"])[:, 0])),
        (loss_label(points), points.losses),
    ]
    for axes, (label, column_R) in zip(row, columns, strict=True):
        _dress(axes, label, "")
        axes.set_yscale("linear")
        # Three narrow panels have room for the powers, or for the loss as it is.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.plot(column_R, 100 * judged.fit.residuals_R, "o", color=COLOURS[0], markersize=3.5)
        rings = {"mfc": "none", "color": COLOURS[4], "markersize": 8}
        axes.plot(column_R[far_R], 100 * judged.fit.residuals_R[far_R], "o", **rings)
        for height in (-FAR, 0, FAR):
            style = "-" if height == 0 else ":"
            axes.axhline(100 * height * judged.fit.spread, color="#8a93a0", linewidth=0.8, linestyle=style)
    row[2].xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5)))
    row[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    row[0].set_ylabel("measured above the law, %", fontsize=8.5)
    text = f"residuals of {judged.law.formula}, n = {judged.runs}; "
    text += f"{int(far_R.sum())} outliers beyond {FAR:g} robust standard deviations ({judged.fit.spread:.2%} each)"
    figure.suptitle(text, fontsize=9, x=0.01, ha="left", color=INK)
    return figure


def held_out_figure(judged: Verdict, points: Points) -> Figure:
    """Draw predicted against measured loss of the largest runs, which were held out of the fit."""
    figure, axes = _axes(f"measured {loss_label(points)}", "predicted from the smaller runs")
    assert judged.held_out is not None
    rows = judged.held_out.predictions
    measured = [row["measured"] for row in rows]
    errors = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    axes.errorbar(measured, [row["value"] for row in rows], errors, fmt="o", color=COLOURS[0], markersize=4, capsize=2)
    ends = [min(row["low"] for row in rows), max(row["high"] for row in rows)]
    axes.plot(ends, ends, "-", color="#8a93a0", linewidth=0.8)
    axes.set(xscale="linear", yscale="linear")
    held = judged.held_out
    text = f"held out: {held.settings} largest settings, n = {held.runs}\n"
    text += f"mean error {held.error:.1%}, {held.inside} within 95 %"
    axes.set_title(text, fontsize=9, loc="left", color=INK)
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """Draw the paired differences of each point to the baseline, over the other axes. Bars are 95 % intervals."""
    rows = comparison.differences
    figure = Figure(figsize=(6.4, 1.3 + 0.32 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(reversed(rows)):
        colour = COLOURS[comparison.points.index(row.point) % len(COLOURS)]
        axes.plot(row.pairs, [number] * row.n, ".", color=colour, alpha=0.45, markersize=5)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [number, number], "-", color=colour, linewidth=1.6)
        axes.plot(row.mean, number, "D", color=colour, markersize=4.5)
    names = [f"{row.point}{', ' if row.where else ''}{row.where} (n = {row.n})" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.axvline(0, color="#8a93a0", linewidth=0.8)
    axes.set_xlabel(
        f"{comparison.loss}: difference to {comparison.axis} = {comparison.baseline} (left is better)", fontsize=8
    )
    axes.set_title(
        "Pairs of equal seed; diamond: mean; bar: 95 % interval; dots: pairs", fontsize=9, loc="left", color=INK
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    return figure


def claim_figure(result: Result) -> Figure:
    """Draw the figures of a claim: ours with 95 % intervals over seeds, and the paper's where it gives one."""
    rows = [each for each in result.measured if each.figure.of != "seconds"] or result.measured
    figure = Figure(figsize=(6.4, 1.1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(reversed(rows)):
        axes.plot(list(row.values.values()), [place] * len(row.values), ".", color=COLOURS[0], alpha=0.4, markersize=5)
        if row.interval is not None:
            axes.plot([row.interval.low, row.interval.high], [place, place], "-", color=COLOURS[0], linewidth=1.4)
        if row.mean is not None:
            axes.plot(row.mean, place, "o", color=COLOURS[0], markersize=4.5)
        if row.figure.paper is not None:
            axes.plot(row.figure.paper, place, "D", mfc="white", color=COLOURS[1], markersize=5)
    axes.set_yticks(range(len(rows)), [row.figure.name for row in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("seconds" if rows[0].figure.of == "seconds" else "mean Dice, or share", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", linewidth=0.4, color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("blue: here, bar: 95 % interval, dots: seeds; diamond: the paper", fontsize=9, loc="left", color=INK)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, x, y)
    return figure, axes


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x, fontsize=8.5)
    axes.set_ylabel(y, fontsize=8.5)
    axes.tick_params(labelsize=8, which="both")
    # There is no room for more labels; over many decades only the powers are labelled.
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(3, 3)))
    axes.grid(linewidth=0.4, color="#dddddd", which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _plain_ticks(axes: Axes) -> None:
    """Label losses as 0.4 and 0.5 instead of 4 x 10^-1: they span less than a decade."""
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """Write NAME.png and NAME.svg; return the PNG."""
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "segvol"}),
        atomic_path(folder / f"{name}.svg") as part,
    ):
        FigureCanvasSVG(figure).print_figure(str(part), format="svg", metadata={"Date": None})
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=200)
    with atomic_path(folder / f"{name}.png") as part:
        part.write_bytes(buffer.getvalue())
    return buffer.getvalue()
