"""Draw pictures of cases: three planes through a structure with truth, masks and prompts.

1. `slice_planes` takes the three slices that show most of a structure.
2. `plot_picture` draws them as a PNG. Rows and columns are as displayed: the patient's right is on the left, and
   anterior or superior is up.

Letters: R rows, C columns, N points.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from segvol_pl.imaging.prompts import INSIDE, Prompt

LEVEL, WIDTH = 40.0, 400.0
"""Soft-tissue window, in HU."""

TRUTH, COARSE, FINAL, GIVEN, NEUTRAL = "#2e9e5b", "#4f7fd6", "#e0752d", "#f2d13d", "#8a93a0"
OUTLINE = {"truth": (TRUTH, 2.4), "zoom-out": (COARSE, 0.8), "prediction": (FINAL, 1.0)}
"""Mask -> colour and width of its outline."""

Span = tuple[int, int, int, int]
"""First row and column, last row and column."""

MAX_RATIO = 2.0
"""Width over height of a plane. A volume of few slices would exceed it and leave no room for the other planes."""


@dataclass(frozen=True, eq=False)
class SlicePlane:
    """One slice through a CT, with what is drawn on it."""

    name: str
    grey_RC: np.ndarray
    """Windowed image, float32 in [0, 1]."""
    masks: dict[str, np.ndarray]
    """Name -> bool mask (R,C)."""
    aspect: float
    """Height of a pixel over its width, both in mm."""
    boxes: list[tuple[Span, bool]] = field(default_factory=list)
    """Boxes of the prompts, and whether the slice passes through them."""
    points: list[tuple[int, int, bool, bool]] = field(default_factory=list)
    """Points of the prompts: row, column, whether the label is inside, whether the point lies on the slice."""


@dataclass(frozen=True)
class Picture:
    """The picture of one category of one case."""

    case: str
    category: str
    caption: str
    png: bytes


def slice_planes(
    hu_DHW: np.ndarray,
    spacing: Sequence[float],
    truth_DHW: np.ndarray,
    masks: dict[str, np.ndarray],
    prompts: Sequence[Prompt] = (),
) -> list[SlicePlane]:
    """Take the axial, coronal and sagittal slice where the truth is largest.

    Args:
        hu_DHW: The CT in Hounsfield units.
        spacing: In mm along d, h, w.
        truth_DHW: Bool mask.
        masks: Name -> bool mask (D,H,W), drawn besides the truth.
        prompts: Drawn as points and rectangles.
    """
    planes = []
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        others = tuple(other for other in range(3) if other != axis)
        at = int(truth_DHW.sum(axis=others).argmax())
        shown = {label: _displayed(array_DHW, axis, at) for label, array_DHW in {"truth": truth_DHW, **masks}.items()}
        windowed = np.clip((_displayed(hu_DHW, axis, at).astype(np.float32) - LEVEL) / WIDTH + 0.5, 0, 1)
        boxes = [_span(prompt.box, axis, at, hu_DHW.shape) for prompt in prompts if prompt.box is not None]
        points = [point for prompt in prompts for point in _points(prompt, axis, at, hu_DHW.shape)]
        planes.append(SlicePlane(name, windowed, shown, spacing[others[0]] / spacing[others[1]], boxes, points))
    return planes


def _displayed(array_DHW: np.ndarray, axis: int, at: int) -> np.ndarray:
    # Flipped, so that superior or anterior is up and right is on the left. Copied, so that the case can be freed.
    plane: np.ndarray = np.flip(array_DHW.take(at, axis=axis), (0, 1)).copy()
    return plane


def _span(box: Sequence[int], axis: int, at: int, shape: Sequence[int]) -> tuple[Span, bool]:
    row, column = (other for other in range(3) if other != axis)
    rows, columns = ((shape[k] - 1 - box[k + 3], shape[k] - 1 - box[k]) for k in (row, column))
    return (rows[0], columns[0], rows[1], columns[1]), box[axis] <= at <= box[axis + 3]


def _points(prompt: Prompt, axis: int, at: int, shape: Sequence[int]) -> list[tuple[int, int, bool, bool]]:
    """Place the points of a prompt on a slice; landmarks are drawn as points inside."""
    placed = [(landmark, INSIDE) for landmarks_M3 in prompt.landmarks.values() for landmark in landmarks_M3]
    if prompt.points_N3 is not None and prompt.labels_N is not None:
        placed += zip(prompt.points_N3, prompt.labels_N.tolist(), strict=True)
    row, column = (other for other in range(3) if other != axis)
    return [
        (shape[row] - 1 - int(point[row]), shape[column] - 1 - int(point[column]), label == INSIDE, point[axis] == at)
        for point, label in placed
    ]


def plot_picture(planes: Sequence[SlicePlane]) -> bytes:
    """Draw planes in one row, as PNG."""
    ratios = [min(w / (h * plane.aspect), MAX_RATIO) for plane in planes for h, w in [plane.grey_RC.shape]]
    figure = Figure(figsize=(max(3.0 * sum(ratios), 4.0), 3.2), layout="constrained", facecolor="black")
    shown = figure.subplots(1, 3, width_ratios=ratios)
    for axes, plane in zip(shown, planes, strict=True):
        _draw_plane(axes, plane)
    return png_of(figure)


def _draw_plane(axes: Axes, plane: SlicePlane) -> None:
    axes.imshow(plane.grey_RC, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="bilinear")
    for name, mask_RC in plane.masks.items():
        colour, width = OUTLINE[name]
        if mask_RC.any() and not mask_RC.all():
            axes.contour(mask_RC.astype(np.float32), levels=[0.5], colors=[colour], linewidths=[width])
    for (top, left, bottom, right), through in plane.boxes:
        corner, width, height = (left - 0.5, top - 0.5), right - left + 1, bottom - top + 1
        style = "-" if through else ":"
        axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=GIVEN, linewidth=1, linestyle=style))
    for row, column, inside, on_slice in plane.points:
        alpha = 1.0 if on_slice else 0.45
        axes.plot(column, row, "+" if inside else "x", color=GIVEN, markersize=6, markeredgewidth=1.2, alpha=alpha)
    axes.set_title(plane.name, fontsize=8, color=NEUTRAL, pad=2)
    axes.set_axis_off()


def png_of(figure: Figure, dpi: int = 120) -> bytes:
    """Render a figure as the bytes of a PNG, with `dpi` pixels per inch."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()
