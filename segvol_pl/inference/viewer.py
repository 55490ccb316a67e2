"""A web page to prompt a CT by hand: scroll, click, draw, type, see the mask. Needs bokeh (extra `viewer`).

1. `view` opens the CT and starts Bokeh's server, by default on the loopback interface. Bokeh's package holds its part
   for the browser: nothing is loaded from the network, and no other file is served. The page's address holds a secret,
   because other users of a shared node reach its ports. They also see a browser's arguments, so the browser gets the
   address from a file.
2. `UserPrompt` collects clicks, a box, landmarks and a category; `SlicePlane` converts positions on the screen to
   voxels.
3. `Page` is one browser tab with three planes. It sends prompts to `Session.segment` on a separate thread.

Letters: D H W voxels of the CT in canonical axes; Y X rows and columns of a slice as it is shown.
"""

from __future__ import annotations

import base64
import html
import logging
import secrets
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segvol_pl.config import LINE, ViewConfig
from segvol_pl.errors import UnknownCategory, ViewError
from segvol_pl.imaging.box import Box
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt, ordered_line
from segvol_pl.inference.predictor import Mask, Predictor, Session

if TYPE_CHECKING:
    from bokeh.document import Document
    from bokeh.events import MouseWheel, SelectionGeometry, Tap
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

log = logging.getLogger(__name__)

WINDOWS = {"soft tissue": (-160, 240), "lung": (-1350, 150), "bone": (-500, 1300)}
"""HU shown as black and as white."""
PIXELS = 420
"""Length of the longer side of a plane on the screen."""
SECRET_BYTES = 16
"""Length of the secret in the page's address."""
RED = 0x780000FF
"""The mask's colour: alpha, blue, green, red."""
LANDMARK_COLOUR = "#f2e205"
POINT_COLOURS = {INSIDE: "#2bd966", OUTSIDE: "#ff9f1c"}

OTHER_HOSTS = r"(?!(localhost|127(\.\d+){3}|\[?::1\]?)$).*"
"""Host names of requests to refuse: a request to the loopback interface has another one only if DNS was abused."""

SECURITY_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
"""Sent with every response."""

SAVE_AS = """
const bytes = Uint8Array.from(atob(file.data.content[0]), (letter) => letter.charCodeAt(0));
const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([bytes], {type: "application/gzip"}));
link.download = file.data.name[0];
link.click();
URL.revokeObjectURL(link.href);
"""


@dataclass(frozen=True)
class SlicePlane:
    """An anatomical plane. `across` is the axis to scroll along; `down` and `along` are the slice's Y and X."""

    name: str
    across: int
    down: int
    along: int

    def cut(self, array_DHW: np.ndarray, place: int) -> np.ndarray:
        """The slice (Y,X) at `place`."""
        plane: np.ndarray = array_DHW.take(place, axis=self.across)
        return plane

    def voxel(self, x: float, y: float, place: int, spacing: Sequence[float]) -> tuple[int, int, int]:
        """(d, h, w) of a position on the slice, given in millimetres from the slice's corner."""
        found = [0, 0, 0]
        found[self.across], found[self.down], found[self.along] = (
            place,
            int(np.floor(y / spacing[self.down])),
            int(np.floor(x / spacing[self.along])),
        )
        return found[0], found[1], found[2]


PLANES = (SlicePlane("axial", 0, 1, 2), SlicePlane("coronal", 1, 0, 2), SlicePlane("sagittal", 2, 0, 1))


@dataclass
class UserPrompt:
    """The user's prompt for one structure so far, in voxels of the CT of `shape`; spacing in mm."""

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    text: str = ""
    points: list[tuple[tuple[int, int, int], int]] = field(default_factory=list)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Axis -> first and last voxel of the box."""
    landmarks: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    """Kind -> the voxels marked so far."""
    kinds: dict[str, int] = field(default_factory=dict)
    """Kind of landmark that the model knows -> how many voxels it has."""

    def _inside(self, voxel: tuple[int, int, int]) -> bool:
        return all(0 <= place < size for place, size in zip(voxel, self.shape, strict=True))

    def mark(self, kind: str, voxel: tuple[int, int, int]) -> bool:
        """Add a landmark, if it lies in the CT; return whether it does. After the last of its kind begins the first."""
        if not self._inside(voxel):
            return False
        placed = self.landmarks.get(kind, [])
        self.landmarks[kind] = [*(placed if len(placed) < self.kinds[kind] else []), voxel]
        return True

    @property
    def complete(self) -> dict[str, np.ndarray]:
        """Kind -> landmarks (N,3), of the kinds whose voxels are all marked."""
        found = {
            kind: np.array(voxels, np.int64)
            for kind, voxels in self.landmarks.items()
            if len(voxels) == self.kinds[kind]
        }
        return {kind: ordered_line(voxels_N3) if kind == LINE else voxels_N3 for kind, voxels_N3 in found.items()}

    def click(self, voxel: tuple[int, int, int], label: int) -> bool:
        """Add a point, if it lies in the CT; return whether it does."""
        inside = self._inside(voxel)
        if inside:
            self.points.append((voxel, label))
        return inside

    def draw(self, plane: SlicePlane, corners: Sequence[tuple[int, int, int]]) -> None:
        """Set the box from a rectangle on a slice.

        Along the third axis it keeps the extent drawn in another plane; without one it gets the mean of the two sides.
        """
        low, high = np.min(corners, axis=0), np.max(corners, axis=0)
        for axis in (plane.down, plane.along):
            self.spans[axis] = self._within(axis, int(low[axis]), int(high[axis]))
        if plane.across not in self.spans:
            sides = [(high[axis] - low[axis] + 1) * self.spacing[axis] for axis in (plane.down, plane.along)]
            reach = int(np.mean(sides) / self.spacing[plane.across] / 2)
            place = int(low[plane.across])
            self.spans[plane.across] = self._within(plane.across, place - reach, place + reach)

    def _within(self, axis: int, low: int, high: int) -> tuple[int, int]:
        last = self.shape[axis] - 1
        return min(max(low, 0), last), min(max(high, 0), last)

    @property
    def box(self) -> Box | None:
        """Inclusive, in voxels of the CT; None if none was drawn."""
        if len(self.spans) < len(self.shape):
            return None
        (d0, d1), (h0, h1), (w0, w1) = (self.spans[axis] for axis in range(3))
        return d0, h0, w0, d1, h1, w1

    @property
    def empty(self) -> bool:
        """Whether there is no text, point, box or complete landmarks yet."""
        return not (self.text or self.points or self.box or self.complete)

    def prompt(self) -> Prompt:
        """The prompt for the model. Raises ValueError if it is empty."""
        points_N3 = np.array([voxel for voxel, _ in self.points], np.int64) if self.points else None
        labels_N = np.array([label for _, label in self.points], np.int64) if self.points else None
        return Prompt(
            text=self.text or None, points_N3=points_N3, labels_N=labels_N, box=self.box, landmarks=self.complete
        )


def view(config: ViewConfig) -> None:
    """Serve the page until interrupted.

    Raises:
        ViewError: bokeh is missing, or the port is taken.
        VolumeError, SampleError, CheckpointError: CT or model cannot be used.
    """
    server = make_server(config)
    address = f"http://{config.host}:{server.port}{server.prefix}/"
    log.info("%s is open at %s (stop with Ctrl-C); anyone who knows this address can see the CT", config.image, address)
    with tempfile.TemporaryDirectory(prefix="segvol-view.") as folder:
        if config.show:
            server.io_loop.add_callback(_show, address, Path(folder))
        try:
            server.io_loop.start()
        finally:
            server.stop()


def _show(address: str, folder: Path) -> None:
    """Open the page in a browser through a file that only this user can read: everybody sees a program's arguments."""
    from bokeh.util.browser import view as open_file

    door, quoted = folder / "view.html", html.escape(address)
    door.touch(mode=0o600)
    door.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={quoted}">'
        f'<title>SegVol</title><a href="{quoted}">the viewer</a>\n',
        encoding="utf-8",
    )
    open_file(str(door), new="tab")


def make_server(config: ViewConfig) -> Any:
    """The Bokeh server, started but not yet looping."""
    if find_spec("bokeh") is None:
        raise ViewError("the viewer needs bokeh: pip install 'segvol_pl[viewer]'")
    from bokeh.application import Application
    from bokeh.application.handlers.function import FunctionHandler
    from bokeh.server.server import Server

    if not is_loopback(config.host):
        log.warning("host: other machines may reach %s", config.host)
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    session = predictor.open(config.image)
    # One thread: the model segments one prompt at a time, for all tabs.
    worker = ThreadPoolExecutor(1)
    application = Application(FunctionHandler(lambda document: Page(session, worker, document).lay_out()))
    try:
        secret = secrets.token_urlsafe(SECRET_BYTES)
        server = Server({"/": application}, address=config.host, port=config.port, prefix=secret)
    except OSError as error:
        raise ViewError(
            f"port: {config.port} is taken ({error.strerror}): choose another, or 0 for any free one"
        ) from error
    if is_loopback(config.host):
        _refuse_other_hosts(server)
    _add_security_headers(server)
    server.start()
    return server


def _refuse_other_hosts(server: Any) -> None:
    """Refuse other host names: a site could point its own name at this machine, and its scripts read the page."""
    from tornado.web import ErrorHandler

    server._tornado.add_handlers(OTHER_HOSTS, [(r".*", ErrorHandler, {"status_code": 403})])


def _add_security_headers(server: Any) -> None:
    """Let no other page show this one in a frame, and send no other site this page's address."""
    from tornado.httputil import HTTPHeaders
    from tornado.web import OutputTransform

    class Headers(OutputTransform):
        def transform_first_chunk(
            self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
        ) -> tuple[int, HTTPHeaders, bytes]:
            headers.update(SECURITY_HEADERS)
            return status_code, headers, chunk

    server._tornado.add_transform(Headers)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Panel:
    """One plane on the page, and its data sources."""

    plane: SlicePlane
    figure: figure
    slice: ColumnDataSource
    mask: ColumnDataSource
    points: ColumnDataSource
    box: ColumnDataSource
    line: ColumnDataSource
    scroll: Any


class Page:
    """One browser tab. Its models are named, so that a test finds them: status, category, label, download, clear."""

    def __init__(self, session: Session, worker: ThreadPoolExecutor, document: Document) -> None:
        self.session, self.worker, self.document = session, worker, document
        self.volume = session.volume
        self.mask: Mask | None = None
        config = session.predictor.model.config
        self.kinds: dict[str, int] = getattr(config, "landmark_counts", {})
        self.user_prompt = self._empty_prompt()
        self._controls()
        self.panels = [self._panel(plane) for plane in PLANES]
        self._connect()

    def _controls(self) -> None:
        """Create the widgets."""
        from bokeh.models import (
            AutocompleteInput,
            Button,
            CheckboxGroup,
            ColumnDataSource,
            CustomJS,
            Div,
            RadioButtonGroup,
            Select,
        )

        try:
            predictor = self.session.predictor
            names = [*predictor.categories, *predictor.synonyms]
        except UnknownCategory:  # weights without a text bank are prompted by clicks and boxes
            names = []
        self.status = Div(name="status", text="Click a structure, draw a box, or type a category.", width=900)
        self.category = AutocompleteInput(
            name="category", title="Category", completions=names, restrict=False, case_sensitive=False, min_characters=1
        )
        self.label = RadioButtonGroup(name="label", labels=["inside", "outside", *self.kinds], active=0)
        self.refine = CheckboxGroup(name="refine", labels=["refine the mask shown"], active=[])
        self.window = Select(name="window", title="Window", options=list(WINDOWS), value=next(iter(WINDOWS)))
        self.clear = Button(name="clear", label="Clear")
        self.download = Button(name="download", label="Download NIfTI", disabled=True)
        self.file = ColumnDataSource({"name": [""], "content": [""]}, name="file")
        self.file.js_on_change("data", CustomJS(args={"file": self.file}, code=SAVE_AS))

    def lay_out(self) -> None:
        """Add the page to the document."""
        from bokeh.layouts import column, row

        controls = column(self.category, self.label, self.refine, self.window, self.clear, self.download)
        views = [column(panel.figure, panel.scroll) for panel in self.panels]
        self.document.add_root(column(self.status, row(controls, *views)))
        self.document.add_root(self.file)
        self.document.title = f"SegVol: {self.volume.path.name}"
        for panel in self.panels:
            self._draw(panel)

    def _empty_prompt(self) -> UserPrompt:
        return UserPrompt(self.volume.array_DHW.shape, self.volume.spacing, kinds=self.kinds)

    def _panel(self, plane: SlicePlane) -> Panel:
        """In radiological convention: seen from the front or from the feet, the body's right is on the left."""
        from bokeh.models import ColumnDataSource, LinearColorMapper, Range1d, Slider
        from bokeh.plotting import figure

        shape, spacing = self.volume.array_DHW.shape, self.volume.spacing
        wide, high = (shape[axis] * spacing[axis] for axis in (plane.along, plane.down))
        scale = PIXELS / max(wide, high)
        plot = figure(
            name=plane.name,
            x_range=Range1d(wide, 0),
            y_range=Range1d(0, high),
            frame_width=max(int(wide * scale), 40),
            frame_height=max(int(high * scale), 40),
            tools="box_select,reset",
            active_drag="box_select",
            toolbar_location=None,
        )
        plot.axis.visible = plot.grid.visible = False
        hu, mask = ColumnDataSource({"image": []}), ColumnDataSource({"image": []})
        place = {"x": 0, "y": 0, "dw": wide, "dh": high}
        greys = LinearColorMapper(palette="Greys256", low=0, high=255)
        plot.image("image", source=hu, color_mapper=greys, **place)
        plot.image_rgba("image", source=mask, **place)
        points = ColumnDataSource({"x": [], "y": [], "colour": []})
        plot.scatter("x", "y", source=points, size=10, fill_color="colour", line_color="white")
        box = ColumnDataSource({"left": [], "right": [], "bottom": [], "top": []}, name=f"{plane.name} box")
        plot.quad("left", "right", "bottom", "top", source=box, fill_alpha=0, line_color="#29b6f6", line_width=2)
        line = ColumnDataSource({"x": [], "y": []}, name=f"{plane.name} line")
        plot.line("x", "y", source=line, line_color=LANDMARK_COLOUR, line_width=2)
        last = shape[plane.across] - 1
        scroll = Slider(name=f"{plane.name} slice", title=plane.name, start=0, end=last, value=last // 2, step=1)
        return Panel(plane, plot, hu, mask, points, box, line, scroll)

    def _connect(self) -> None:
        from bokeh.events import MouseWheel, SelectionGeometry, Tap

        for panel in self.panels:
            panel.figure.on_event(Tap, partial(self._tapped, panel))
            panel.figure.on_event(SelectionGeometry, partial(self._selected, panel))
            panel.figure.on_event(MouseWheel, partial(self._wheeled, panel))
            panel.scroll.on_change("value", lambda attribute, old, new, panel=panel: self._draw(panel))
        self.window.on_change("value", lambda attribute, old, new: self._draw_all())
        self.category.on_change("value", lambda attribute, old, new: self._typed(new))
        self.clear.on_click(self._cleared)
        self.download.on_click(self._downloaded)

    # ---- events ----

    def _tapped(self, panel: Panel, event: Tap) -> None:
        voxel, kinds = self._voxel(panel, event.x, event.y), list(self.kinds)
        kind = kinds[self.label.active - 2] if self.label.active > 1 else None
        if kind is None:
            placed = self.user_prompt.click(voxel, INSIDE if self.label.active == 0 else OUTSIDE)
        else:
            placed = self.user_prompt.mark(kind, voxel)
        if not placed:
            return
        for other in self.panels:
            other.scroll.value = voxel[other.plane.across]
        if kind is None or kind in self.user_prompt.complete:
            self._segment(everywhere=kind is not None)
            return
        self.status.text = f"{kind}: {len(self.user_prompt.landmarks[kind])} of {self.kinds[kind]} marked."
        self._draw_all()

    def _selected(self, panel: Panel, event: SelectionGeometry) -> None:
        if event.final:
            rectangle = event.geometry
            corners = [self._voxel(panel, rectangle[f"x{end}"], rectangle[f"y{end}"]) for end in (0, 1)]
            self.user_prompt.draw(panel.plane, corners)
            self._segment(everywhere=True)

    def _voxel(self, panel: Panel, x: float, y: float) -> tuple[int, int, int]:
        return panel.plane.voxel(x, y, int(panel.scroll.value), self.volume.spacing)

    def _wheeled(self, panel: Panel, event: MouseWheel) -> None:
        step = 1 if event.delta > 0 else -1
        panel.scroll.value = min(max(panel.scroll.value + step, panel.scroll.start), panel.scroll.end)

    def _typed(self, name: str) -> None:
        self.user_prompt.text = name.strip()
        if not self.user_prompt.empty:
            self._segment(everywhere=True)

    def _cleared(self) -> None:
        self.user_prompt, self.mask = self._empty_prompt(), None
        self.category.value = ""
        self.download.disabled = True
        self.status.text = "Cleared."
        self._draw_all()

    def _downloaded(self) -> None:
        if self.mask is None:
            return
        name = f"{self.user_prompt.text or 'mask'}.nii.gz".replace("/", "_")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mask.nii.gz"
            self.mask.save(path)
            content = base64.b64encode(path.read_bytes()).decode()
        self.file.data = {"name": [name], "content": [content]}

    # ---- segmentation ----

    def _segment(self, everywhere: bool) -> None:
        """everywhere: whether refining may change more than what is around the clicks."""
        self.status.text = "Segmenting ..."
        self._draw_all()
        previous = self.mask.array_DHW if self.mask is not None and self.refine.active else None
        future = self.worker.submit(self.session.segment, self.user_prompt.prompt(), previous, everywhere)
        future.add_done_callback(lambda done: self.document.add_next_tick_callback(partial(self._finished, done)))

    def _finished(self, done: Future[Mask]) -> None:
        try:
            self.mask = done.result()
        except ValueError as error:  # a prompt that does not fit: show the error and continue
            self.status.text = html.escape(f"{type(error).__name__}: {error}", quote=False)
            return
        found = f"{self.mask.voxels} voxels, {self.mask.millilitres:.1f} ml"
        self.status.text = found if self.mask.roi else "Zooming out found nothing for this prompt."
        self.download.disabled = self.mask.roi is None
        self._draw_all()

    # ---- drawing ----

    def _draw_all(self) -> None:
        for panel in self.panels:
            self._draw(panel)

    def _draw(self, panel: Panel) -> None:
        plane, place = panel.plane, int(panel.scroll.value)
        low, high = WINDOWS[self.window.value]
        hu_YX = plane.cut(self.volume.array_DHW, place).astype(np.float32)
        grey_YX = ((hu_YX - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
        panel.slice.data = {"image": [grey_YX]}
        mask_YX = np.zeros(grey_YX.shape, bool) if self.mask is None else plane.cut(self.mask.array_DHW, place)
        panel.mask.data = {"image": [mask_YX.astype(np.uint32) * np.uint32(RED)]}
        self._draw_prompt(panel, place)

    def _draw_prompt(self, panel: Panel, place: int) -> None:
        plane, spacing = panel.plane, self.volume.spacing
        marks = [(voxel, POINT_COLOURS[label]) for voxel, label in self.user_prompt.points]
        marks += [(voxel, LANDMARK_COLOUR) for voxels in self.user_prompt.landmarks.values() for voxel in voxels]
        here = [(voxel, colour) for voxel, colour in marks if voxel[plane.across] == place]
        ends = self.user_prompt.landmarks.get(LINE, [])
        shown = ends if all(voxel[plane.across] == place for voxel in ends) else []
        panel.points.data = {**_centres([voxel for voxel, _ in here], plane, spacing), "colour": [c for _, c in here]}
        panel.line.data = _centres(shown, plane, spacing)
        box = self.user_prompt.box
        cut = box is not None and box[plane.across] <= place <= box[plane.across + 3]
        spans = self.user_prompt.spans if cut else {}
        edges = {"left": (plane.along, 0), "right": (plane.along, 1), "bottom": (plane.down, 0), "top": (plane.down, 1)}
        panel.box.data = {
            edge: [(spans[axis][end] + end) * spacing[axis]] if spans else [] for edge, (axis, end) in edges.items()
        }


def _centres(
    voxels: Sequence[tuple[int, int, int]], plane: SlicePlane, spacing: Sequence[float]
) -> dict[str, list[float]]:
    """Where the centres of voxels lie on the slice: mm from its corner."""
    return {
        "x": [(voxel[plane.along] + 0.5) * spacing[plane.along] for voxel in voxels],
        "y": [(voxel[plane.down] + 0.5) * spacing[plane.down] for voxel in voxels],
    }
