"""A page on this machine to prompt a CT by hand: scroll, click, draw, type, see the mask. Needs bokeh (extra `viewer`).

1. `view` opens the CT once and starts Bokeh's server, on the loopback interface unless told otherwise. Bokeh brings its
   browser's part in its own package; nothing comes from the network, and no other file is served. The page's address
   holds a secret, as others on a shared node reach its ports too; they see the browser's arguments as well, so it gets
   the address from a file.
2. `Asked` is what the user has said so far: clicks, a box, a category; `Plane` turns places on the screen to voxels.
3. `Page` is one browser tab: three planes, and what is said in them goes to `Session.segment` on a thread of its own.

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

from segvol_pl.config import ViewConfig
from segvol_pl.errors import UnknownCategory, ViewError
from segvol_pl.imaging.box import Box
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt
from segvol_pl.inference.predictor import Mask, Predictor, Session

if TYPE_CHECKING:
    from bokeh.document import Document
    from bokeh.events import MouseWheel, SelectionGeometry, Tap
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

log = logging.getLogger(__name__)

WINDOWS = {"soft tissue": (-160, 240), "lung": (-1350, 150), "bone": (-500, 1300)}
"""HU shown from black to white."""
PIXELS = 420
"""Of the longer side of a plane on the screen."""
SECRET_BYTES = 16
"""Of the page's address: not to be guessed."""
RED = 0x780000FF
"""The mask's colour: alpha, blue, green, red."""
COLOURS = {INSIDE: "#2bd966", OUTSIDE: "#ff9f1c"}

OTHER_NAMES = r"(?!(localhost|127(\.\d+){3}|\[?::1\]?)$).*"
"""Hosts that a request to the loopback interface does not name, unless it was led there."""

KEPT = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
"""Headers of every answer."""

SAVE_AS = """
const bytes = Uint8Array.from(atob(file.data.content[0]), (letter) => letter.charCodeAt(0));
const link = document.createElement("a");
link.href = URL.createObjectURL(new Blob([bytes], {type: "application/gzip"}));
link.download = file.data.name[0];
link.click();
URL.revokeObjectURL(link.href);
"""


@dataclass(frozen=True)
class Plane:
    """A way to cut the CT. `across` is the axis that one scrolls along, `down` and `along` are the slice's Y and X."""

    name: str
    across: int
    down: int
    along: int

    def cut(self, array_DHW: np.ndarray, place: int) -> np.ndarray:
        """The slice (Y,X) at `place`."""
        plane: np.ndarray = array_DHW.take(place, axis=self.across)
        return plane

    def voxel(self, x: float, y: float, place: int, spacing: Sequence[float]) -> tuple[int, int, int]:
        """(d, h, w) of a place on the slice, given in millimetres from its corner."""
        found = [0, 0, 0]
        found[self.across], found[self.down], found[self.along] = (
            place,
            int(np.floor(y / spacing[self.down])),
            int(np.floor(x / spacing[self.along])),
        )
        return found[0], found[1], found[2]


PLANES = (Plane("axial", 0, 1, 2), Plane("coronal", 1, 0, 2), Plane("sagittal", 2, 0, 1))


@dataclass
class Asked:
    """What the user has said about one structure, in voxels of the CT of `shape`."""

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    text: str = ""
    points: list[tuple[tuple[int, int, int], int]] = field(default_factory=list)
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Axis -> first and last voxel of the box."""

    def click(self, voxel: tuple[int, int, int], label: int) -> bool:
        """Whether the place lies in the CT, and hence counts."""
        inside = all(0 <= place < size for place, size in zip(voxel, self.shape, strict=True))
        if inside:
            self.points.append((voxel, label))
        return inside

    def draw(self, plane: Plane, corners: Sequence[tuple[int, int, int]]) -> None:
        """A rectangle on a slice. Along the third axis the box stays as drawn elsewhere, or is as deep as wide."""
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
        """Inclusive, in voxels of the CT; None where nothing was drawn."""
        if len(self.spans) < len(self.shape):
            return None
        (d0, d1), (h0, h1), (w0, w1) = (self.spans[axis] for axis in range(3))
        return d0, h0, w0, d1, h1, w1

    @property
    def empty(self) -> bool:
        """Whether nothing was said yet."""
        return not (self.text or self.points or self.box)

    def prompt(self) -> Prompt:
        """Raises ValueError where nothing was said."""
        points_N3 = np.array([voxel for voxel, _ in self.points], np.int64) if self.points else None
        labels_N = np.array([label for _, label in self.points], np.int64) if self.points else None
        return Prompt(text=self.text or None, points_N3=points_N3, labels_N=labels_N, box=self.box)


def view(config: ViewConfig) -> None:
    """Serve the page until interrupted. Raises ViewError, VolumeError, SampleError, CheckpointError."""
    server = make_server(config)
    address = f"http://{config.host}:{server.port}{server.prefix}/"
    log.info("%s is open at %s (stop with Ctrl-C); who knows the address sees the CT", config.image, address)
    with tempfile.TemporaryDirectory(prefix="segvol-view.") as folder:
        if config.show:
            server.io_loop.add_callback(_show, address, Path(folder))
        try:
            server.io_loop.start()
        finally:
            server.stop()


def _show(address: str, folder: Path) -> None:
    """Opens the page in a browser, by way of a file that only this user reads: everybody sees a program's arguments."""
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

    if not _loopback(config.host):
        log.warning("host: %s may be reached from other machines", config.host)
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    session = predictor.open(config.image)
    # One thread: the model answers one question after the other, whichever tab it comes from.
    worker = ThreadPoolExecutor(1)
    application = Application(FunctionHandler(lambda document: Page(session, worker, document).lay_out()))
    try:
        secret = secrets.token_urlsafe(SECRET_BYTES)
        server = Server({"/": application}, address=config.host, port=config.port, prefix=secret)
    except OSError as error:
        raise ViewError(f"port: {config.port} is taken ({error.strerror}): give another, or 0 for any") from error
    if _loopback(config.host):
        _refuse_other_names(server)
    _keep_to_itself(server)
    server.start()
    return server


def _refuse_other_names(server: Any) -> None:
    """A site may have its own name lead to this machine: its scripts would then read the page, which names the CT."""
    from tornado.web import ErrorHandler

    server._tornado.add_handlers(OTHER_NAMES, [(r".*", ErrorHandler, {"status_code": 403})])


def _keep_to_itself(server: Any) -> None:
    """No other page shows this one in a frame, and none that is gone to from here learns its address."""
    from tornado.httputil import HTTPHeaders
    from tornado.web import OutputTransform

    class Headers(OutputTransform):
        def transform_first_chunk(
            self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
        ) -> tuple[int, HTTPHeaders, bytes]:
            headers.update(KEPT)
            return status_code, headers, chunk

    server._tornado.add_transform(Headers)


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Shown:
    """One plane on the page."""

    plane: Plane
    figure: figure
    slice: ColumnDataSource
    mask: ColumnDataSource
    landmarks: ColumnDataSource
    box: ColumnDataSource
    scroll: Any


class Page:
    """One browser tab. Its models are named, so that a test finds them: status, category, label, download, clear."""

    def __init__(self, session: Session, worker: ThreadPoolExecutor, document: Document) -> None:
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

        self.session, self.worker, self.document = session, worker, document
        self.volume = session.volume
        self.mask: Mask | None = None
        self.asked = self._anew()
        try:
            names = session.predictor.categories
        except UnknownCategory:  # weights without text are prompted by clicks and boxes
            names = []
        self.status = Div(name="status", text="Click a structure, draw a box, or type a category.", width=900)
        self.category = AutocompleteInput(
            name="category", title="Category", completions=names, restrict=False, case_sensitive=False, min_characters=1
        )
        self.label = RadioButtonGroup(name="label", labels=["inside", "outside"], active=0)
        self.refine = CheckboxGroup(name="refine", labels=["refine the mask shown"], active=[])
        self.window = Select(name="window", title="Window", options=list(WINDOWS), value=next(iter(WINDOWS)))
        self.clear = Button(name="clear", label="Clear")
        self.download = Button(name="download", label="Download NIfTI", disabled=True)
        self.file = ColumnDataSource({"name": [""], "content": [""]}, name="file")
        self.file.js_on_change("data", CustomJS(args={"file": self.file}, code=SAVE_AS))
        self.planes = [self._shown(plane) for plane in PLANES]
        self._connect()

    def lay_out(self) -> None:
        """Puts the page into the document."""
        from bokeh.layouts import column, row

        controls = column(self.category, self.label, self.refine, self.window, self.clear, self.download)
        views = [column(shown.figure, shown.scroll) for shown in self.planes]
        self.document.add_root(column(self.status, row(controls, *views)))
        self.document.add_root(self.file)
        self.document.title = f"SegVol: {self.volume.path.name}"
        for shown in self.planes:
            self._draw(shown)

    def _anew(self) -> Asked:
        return Asked(self.volume.array_DHW.shape, self.volume.spacing)

    def _shown(self, plane: Plane) -> Shown:
        """Seen from the front or from the feet, as radiologists do: the body's right is on the left."""
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
        landmarks = ColumnDataSource({"x": [], "y": [], "colour": []})
        plot.scatter("x", "y", source=landmarks, size=10, fill_color="colour", line_color="white")
        box = ColumnDataSource({"left": [], "right": [], "bottom": [], "top": []}, name=f"{plane.name} box")
        plot.quad("left", "right", "bottom", "top", source=box, fill_alpha=0, line_color="#29b6f6", line_width=2)
        last = shape[plane.across] - 1
        scroll = Slider(name=f"{plane.name} slice", title=plane.name, start=0, end=last, value=last // 2, step=1)
        return Shown(plane, plot, hu, mask, landmarks, box, scroll)

    def _connect(self) -> None:
        from bokeh.events import MouseWheel, SelectionGeometry, Tap

        for shown in self.planes:
            shown.figure.on_event(Tap, partial(self._tapped, shown))
            shown.figure.on_event(SelectionGeometry, partial(self._selected, shown))
            shown.figure.on_event(MouseWheel, partial(self._wheeled, shown))
            shown.scroll.on_change("value", lambda attribute, old, new, shown=shown: self._draw(shown))
        self.window.on_change("value", lambda attribute, old, new: self._draw_all())
        self.category.on_change("value", lambda attribute, old, new: self._typed(new))
        self.clear.on_click(self._cleared)
        self.download.on_click(self._downloaded)

    # what the user does

    def _tapped(self, shown: Shown, event: Tap) -> None:
        label = INSIDE if self.label.active == 0 else OUTSIDE
        voxel = self._voxel(shown, event.x, event.y)
        if self.asked.click(voxel, label):
            for other in self.planes:
                other.scroll.value = voxel[other.plane.across]
            self._ask()

    def _selected(self, shown: Shown, event: SelectionGeometry) -> None:
        if event.final:
            rectangle = event.geometry
            corners = [self._voxel(shown, rectangle[f"x{end}"], rectangle[f"y{end}"]) for end in (0, 1)]
            self.asked.draw(shown.plane, corners)
            self._ask()

    def _voxel(self, shown: Shown, x: float, y: float) -> tuple[int, int, int]:
        return shown.plane.voxel(x, y, int(shown.scroll.value), self.volume.spacing)

    def _wheeled(self, shown: Shown, event: MouseWheel) -> None:
        step = 1 if event.delta > 0 else -1
        shown.scroll.value = min(max(shown.scroll.value + step, shown.scroll.start), shown.scroll.end)

    def _typed(self, name: str) -> None:
        self.asked.text = name.strip()
        if not self.asked.empty:
            self._ask()

    def _cleared(self) -> None:
        self.asked, self.mask = self._anew(), None
        self.category.value = ""
        self.download.disabled = True
        self.status.text = "Cleared."
        self._draw_all()

    def _downloaded(self) -> None:
        if self.mask is None:
            return
        name = f"{self.asked.text or 'mask'}.nii.gz".replace("/", "_")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mask.nii.gz"
            self.mask.save(path)
            content = base64.b64encode(path.read_bytes()).decode()
        self.file.data = {"name": [name], "content": [content]}

    # what the model answers

    def _ask(self) -> None:
        self.status.text = "Segmenting ..."
        self._draw_all()
        previous = self.mask.array_DHW if self.mask is not None and self.refine.active else None
        future = self.worker.submit(self.session.segment, self.asked.prompt(), previous)
        future.add_done_callback(lambda done: self.document.add_next_tick_callback(partial(self._answered, done)))

    def _answered(self, done: Future[Mask]) -> None:
        try:
            self.mask = done.result()
        except ValueError as error:  # a prompt that does not fit: the user is told, and goes on
            self.status.text = html.escape(f"{type(error).__name__}: {error}", quote=False)
            return
        found = f"{self.mask.voxels} voxels, {self.mask.millilitres:.1f} ml"
        self.status.text = found if self.mask.roi else "Zooming out found nothing for this prompt."
        self.download.disabled = self.mask.roi is None
        self._draw_all()

    # what is seen

    def _draw_all(self) -> None:
        for shown in self.planes:
            self._draw(shown)

    def _draw(self, shown: Shown) -> None:
        plane, place = shown.plane, int(shown.scroll.value)
        low, high = WINDOWS[self.window.value]
        hu_YX = plane.cut(self.volume.array_DHW, place).astype(np.float32)
        grey_YX = ((hu_YX - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)
        shown.slice.data = {"image": [grey_YX]}
        mask_YX = np.zeros(grey_YX.shape, bool) if self.mask is None else plane.cut(self.mask.array_DHW, place)
        shown.mask.data = {"image": [mask_YX.astype(np.uint32) * np.uint32(RED)]}
        self._draw_prompt(shown, place)

    def _draw_prompt(self, shown: Shown, place: int) -> None:
        plane, spacing = shown.plane, self.volume.spacing
        here = [(voxel, label) for voxel, label in self.asked.points if voxel[plane.across] == place]
        shown.landmarks.data = {
            "x": [(voxel[plane.along] + 0.5) * spacing[plane.along] for voxel, _ in here],
            "y": [(voxel[plane.down] + 0.5) * spacing[plane.down] for voxel, _ in here],
            "colour": [COLOURS[label] for _, label in here],
        }
        box = self.asked.box
        cut = box is not None and box[plane.across] <= place <= box[plane.across + 3]
        spans = self.asked.spans if cut else {}
        edges = {"left": (plane.along, 0), "right": (plane.along, 1), "bottom": (plane.down, 0), "top": (plane.down, 1)}
        shown.box.data = {
            edge: [(spans[axis][end] + end) * spacing[axis]] if spans else [] for edge, (axis, end) in edges.items()
        }
