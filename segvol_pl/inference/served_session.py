"""One client's image, prompts and mask, in the client's own axes: what a server does for an image viewer.

1. `client_volume` makes a CT of the client's array: a grid by the direction of each axis, HU as int16.
2. `ServedSession` collects points, a box and a text. Each of them segments, and refines the mask of those before.
3. Each answer is a `Change`: the smallest region that differs from what the client shows.

A prompt that is refused changes nothing: the next one finds the session as it was.

Letters: C channel; X Y Z the client's axes; D H W canonical axes; N points; 3 a point.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.config import names_axes
from segvol_pl.errors import RequestError
from segvol_pl.imaging.box import Box, box_or_none, box_slices
from segvol_pl.imaging.geometry import NativeGrid, Volume, check_grid
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt
from segvol_pl.inference.predictor import Predictor, Session
from segvol_pl.inference.viewer import PLANES, UserPrompt

DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Letter -> RAS axis, and whether it grows or falls."""
IMAGE = Path("image")
"""Stands for the file's name in messages."""
UNDO_LEVELS = 16
"""Prompts that can be undone."""
MOST_POINTS = 500
"""Points of one structure."""
SCRIBBLE_POINTS = 5
"""Points that a scribble becomes, at most."""

Interval = tuple[int, int]
"""First voxel along an axis, and the voxel behind the last."""


@dataclass(frozen=True, eq=False)
class Change:
    """What a client must draw after a request.

    Args:
        ran: whether a mask was computed or restored.
        region: intervals along X, Y and Z; None if the mask is as the client shows it.
        mask_XYZ: uint8, the mask in that region.
    """

    ran: bool
    region: list[Interval] | None = None
    mask_XYZ: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class State:
    """What a prompt changes, and undoing it restores."""

    prompt: UserPrompt
    packed: np.ndarray | None
    """The mask's bits; None without a mask."""
    pending: bool
    everywhere: bool


def client_volume(image_CXYZ: np.ndarray, properties: dict[str, Any], axes: str) -> Volume:
    """Make a CT of a client's array.

    Args:
        image_CXYZ: HU, one channel.
        properties: `spacing`: mm along X, Y, Z, 1 mm if it is missing; `axes`: used instead of the next argument.
        axes: direction in which each axis grows.

    Raises:
        RequestError: several channels, values that are not finite, or wrong properties.
        VolumeError: a grid that no CT has.
    """
    if len(image_CXYZ) != 1:
        raise RequestError(f"image: {len(image_CXYZ)} channels: a CT has one")
    axes = properties.get("axes", axes)
    if not isinstance(axes, str) or not names_axes(axes):
        raise RequestError("image_properties: axes must be one letter each of R or L, A or P, S or I, such as SPL")
    spacing = _numbers(properties.get("spacing", (1.0, 1.0, 1.0)), "image_properties: spacing")
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, letter in enumerate(axes):
        direction, sign = DIRECTIONS[letter]
        affine[direction, axis] = sign * spacing[axis]
    x, y, z = image_CXYZ.shape[1:]
    check_grid((x, y, z), affine, IMAGE)
    native = NativeGrid.of((x, y, z), affine)
    return Volume(native.to_canonical(_hounsfield(image_CXYZ[0])), native.canonical_affine, native, IMAGE)


def _hounsfield(image_XYZ: np.ndarray) -> np.ndarray:
    """Round and clip to int16, slice by slice to save memory."""
    limits = np.iinfo(np.int16)
    hu_XYZ = np.empty(image_XYZ.shape, np.int16)
    for place, given in enumerate(image_XYZ):
        values = given.astype(np.float64)
        if not np.isfinite(values).all():
            raise RequestError("image: some voxels are NaN or infinite: replace them")
        hu_XYZ[place] = np.clip(np.rint(values), limits.min, limits.max)
    return hu_XYZ


def _numbers(given: Any, name: str) -> tuple[float, float, float]:
    """Three finite numbers. Raises RequestError."""
    if isinstance(given, list | tuple) and len(given) == 3:
        numbers = [each for each in given if isinstance(each, int | float) and not isinstance(each, bool)]
        if len(numbers) == 3 and all(abs(each) < 2**31 for each in numbers):
            return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise RequestError(f"{name} must be three numbers, one for each axis of the image")


class ServedSession:
    """A client's session. Every method may raise RequestError, PromptError, UnknownCategory, VolumeError, SampleError.

    Args:
        predictor: the model, which all sessions share.
        axes: directions in which the axes of clients' arrays grow.
    """

    def __init__(self, predictor: Predictor, axes: str) -> None:
        self.predictor, self.axes = predictor, axes
        self._session: Session | None = None
        self._clear()

    def _clear(self) -> None:
        shape, spacing = ((), (1.0, 1.0, 1.0)) if self._session is None else self._size(self._session)
        self.prompt = UserPrompt(shape, spacing)
        """All prompts so far, in canonical voxels."""
        self._mask_DHW: np.ndarray | None = None
        self._shown_DHW: np.ndarray | None = None
        """The mask as the client shows it; None for an empty one."""
        self._pending = False
        """Whether prompts were added since the mask was computed."""
        self._everywhere = False
        """Whether box or text were among them: more than what is around the clicks may change then."""
        self._undo: deque[State] = deque(maxlen=UNDO_LEVELS)

    @staticmethod
    def _size(session: Session) -> tuple[tuple[int, ...], tuple[float, float, float]]:
        return session.volume.array_DHW.shape, session.volume.spacing

    # ---- the image ----

    def set_image(self, image_CXYZ: np.ndarray, properties: dict[str, Any]) -> None:
        """Take an image and encode it; prompts and mask of the one before are dropped. See `client_volume`."""
        self._session = self.predictor.open(client_volume(image_CXYZ, properties, self.axes))
        self._clear()

    def set_target_buffer(self, shape: Any) -> None:
        """Take the shape of the client's mask, which is empty from now on. The prompts remain."""
        if list(shape) != list(self._grid.shape):
            raise RequestError(f"shape: the mask has {list(shape)} voxels, the image has {list(self._grid.shape)}")
        self._shown_DHW = None

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise RequestError("there is no image yet: send one by set_image")
        return self._session

    @property
    def _grid(self) -> NativeGrid:
        return self._open.volume.native

    def _canonical(self, voxel: Sequence[int]) -> tuple[int, int, int]:
        """A voxel of the client's array in canonical axes."""
        grid = self._grid
        d, h, w = (
            grid.shape[axis] - 1 - voxel[axis] if flipped else voxel[axis]
            for axis, flipped in zip(grid.axes, grid.flipped, strict=True)
        )
        return d, h, w

    # ---- prompts ----

    def add_point(self, coordinates: Any, inside: bool, run: bool) -> Change:
        """Add a point.

        Args:
            coordinates: along X, Y, Z; rounded to a voxel.
            inside: whether it lies in the structure.
            run: whether to segment now.
        """
        voxel = [round(number) for number in _numbers(coordinates, "coordinates")]
        self._check_within([(place, place + 1) for place in voxel], f"point {voxel}")
        return self._add_points([voxel], inside, run)

    def add_box(self, intervals: Any, inside: bool, run: bool) -> Change:
        """Set the box.

        A box of one slice becomes as deep as wide, until another one is drawn across it.

        Args:
            intervals: first voxel and the one behind the last, along X, Y and Z.
            inside: whether the structure is in the box: the model knows no other boxes.
            run: whether to segment now.
        """
        if not inside:
            raise RequestError("box: this model takes no box that excludes: use negative points")
        box = self._intervals(intervals, "bbox_coords")
        low, high = (self._canonical([interval[end] - end for interval in box]) for end in (0, 1))
        low, high = tuple(np.minimum(low, high).tolist()), tuple(np.maximum(low, high).tolist())
        prompt = self._copied()
        flat = [axis for axis in range(3) if low[axis] == high[axis]]
        if len(flat) == 1:
            plane = next(plane for plane in PLANES if plane.across == flat[0])
            prompt.draw(plane, [low, high])
            first, last = prompt.spans[plane.across]
            prompt.spans[plane.across] = min(first, low[plane.across]), max(last, low[plane.across])
        else:
            prompt.spans = {axis: (low[axis], high[axis]) for axis in range(3)}
        return self._add(prompt, run)

    def add_scribble(self, mask: np.ndarray, intervals: Any, inside: bool, run: bool) -> Change:
        """Add points that are spread evenly along a scribble.

        Args:
            mask: not 0 on the scribble.
            intervals: the region of the image that `mask` covers; None: all of it.
            inside: whether it lies in the structure.
            run: whether to segment now.
        """
        voxels_N3 = self._drawn(mask, intervals, "scribble")
        return self._add_points(spread(voxels_N3, SCRIBBLE_POINTS).tolist(), inside, run)

    def add_lasso(self, mask: np.ndarray, intervals: Any, inside: bool, run: bool) -> Change:
        """Set the box to the extent of a lasso. Arguments as of `add_scribble`."""
        if not inside:
            raise RequestError("lasso: this model takes no lasso that excludes: use negative points or a scribble")
        voxels_N3 = self._drawn(mask, intervals, "lasso")
        low, high = voxels_N3.min(axis=0).tolist(), (voxels_N3.max(axis=0) + 1).tolist()
        return self.add_box([list(interval) for interval in zip(low, high, strict=True)], inside, run)

    def add_text(self, name: Any, run: bool) -> Change:
        """Set the category.

        Args:
            name: as in the model's text bank.
            run: whether to segment now.
        """
        if not isinstance(name, str) or not name.strip():
            raise RequestError("text: give the name of a category")
        prompt = self._copied()
        prompt.text = name.strip()
        self.predictor.check(Prompt(text=prompt.text))
        return self._add(prompt, run)

    def add_initial(self, mask_XYZ: np.ndarray, run: bool) -> Change:
        """Replace prompts and mask by a mask found elsewhere, which the client shows already.

        Args:
            mask_XYZ: not 0 in the structure.
            run: whether to refine it now.
        """
        grid = self._grid
        if mask_XYZ.shape != grid.shape:
            raise RequestError(
                f"initial segmentation: the mask has {list(mask_XYZ.shape)} voxels, the image has {list(grid.shape)}"
            )
        before, mask_DHW = self._state(), grid.to_canonical(mask_XYZ != 0)
        empty = UserPrompt(*self._size(self._open))
        self._shown_DHW = mask_DHW  # by the client, even if this is refused
        found_DHW = self._segmented(empty, mask_DHW, everywhere=True) if run else mask_DHW
        self._undo.append(before)
        self.prompt, self._pending, self._everywhere, self._mask_DHW = empty, False, False, found_DHW
        return self._change() if run else Change(ran=False)

    def predict(self) -> Change:
        """Segment by the prompts that were added without it."""
        if not self._pending:
            return Change(ran=False)
        self._mask_DHW = self._segmented(self.prompt, self._mask_DHW, self._everywhere)
        self._pending = self._everywhere = False
        return self._change()

    # ---- back ----

    def undo(self) -> Change:
        """Take the last prompt back."""
        session = self._open
        if not self._undo:
            return Change(ran=False)
        state, shape = self._undo.pop(), session.volume.array_DHW.shape
        self.prompt, self._pending, self._everywhere = state.prompt, state.pending, state.everywhere
        self._mask_DHW = None
        if state.packed is not None:
            self._mask_DHW = np.unpackbits(state.packed, count=math.prod(shape)).reshape(shape).view(bool)
        return self._change()

    def reset(self) -> None:
        """Drop prompts and mask; the client empties its own."""
        self._clear()

    # ---- inside ----

    def _copied(self) -> UserPrompt:
        self._open  # noqa: B018 - refuses without an image
        return replace(self.prompt, points=[*self.prompt.points], spans={**self.prompt.spans})

    def _state(self) -> State:
        packed = None if self._mask_DHW is None else np.packbits(self._mask_DHW)
        return State(self.prompt, packed, self._pending, self._everywhere)

    def _check_within(self, box: Sequence[Interval], name: str) -> None:
        shape = self._grid.shape
        if any(low < 0 or high > size for (low, high), size in zip(box, shape, strict=True)):
            raise RequestError(f"{name} lies outside the image of {list(shape)} voxels")

    def _intervals(self, given: Any, name: str) -> list[Interval]:
        """Intervals that a client stated. Raises RequestError for those outside the image, or empty."""
        rows = given if isinstance(given, list) and len(given) == 3 else []
        if not rows or not all(isinstance(row, list) and len(row) == 2 for row in rows):
            raise RequestError(f"{name} must be three pairs, of the first voxel and the one behind the last")
        lows, highs = (_numbers([row[end] for row in rows], name) for end in (0, 1))
        box = [(round(min(pair)), round(max(pair))) for pair in zip(lows, highs, strict=True)]
        if any(low == high for low, high in box):
            raise RequestError(f"{name}: {given} is empty")
        self._check_within(box, f"{name}: {given}")
        return box

    def _drawn(self, mask: np.ndarray, intervals: Any, name: str) -> np.ndarray:
        """The voxels (N,3) of the image that a drawing covers."""
        shape = self._grid.shape
        box = self._intervals([[0, size] for size in shape] if intervals is None else intervals, "interaction_bbox")
        if list(mask.shape) != [high - low for low, high in box]:
            place = "the image" if intervals is None else "interaction_bbox"
            sizes = [high - low for low, high in box]
            raise RequestError(f"{name}: its mask has {list(mask.shape)} voxels, {place} has {sizes}")
        voxels_N3 = np.argwhere(mask)
        if not len(voxels_N3):
            raise RequestError(f"{name}: nothing is drawn")
        return voxels_N3 + [low for low, _ in box]

    def _add_points(self, voxels: list[list[int]], inside: bool, run: bool) -> Change:
        prompt = self._copied()
        for voxel in voxels:
            prompt.click(self._canonical(voxel), INSIDE if inside else OUTSIDE)
        if len(prompt.points) > MOST_POINTS:
            raise RequestError(f"points: a structure has {MOST_POINTS} at most: reset the prompts")
        return self._add(prompt, run)

    def _add(self, prompt: UserPrompt, run: bool) -> Change:
        before = self._state()
        everywhere = self._everywhere or (prompt.spans, prompt.text) != (self.prompt.spans, self.prompt.text)
        found_DHW = self._segmented(prompt, self._mask_DHW, everywhere) if run else self._mask_DHW
        self._undo.append(before)
        self.prompt, self._mask_DHW, self._pending, self._everywhere = (
            prompt,
            found_DHW,
            not run,
            not run and everywhere,
        )
        return self._change() if run else Change(ran=False)

    def _segmented(self, prompt: UserPrompt, previous_DHW: np.ndarray | None, everywhere: bool) -> np.ndarray:
        """The mask of all prompts; it refines the previous one. That alone is refined by its own box."""
        session, held = self._open, None if previous_DHW is None else box_or_none(previous_DHW)
        if prompt.empty:
            if held is None:
                raise RequestError("initial segmentation: it is empty, and there is no other prompt")
            return session.segment(Prompt(box=held), previous_DHW).array_DHW
        self._check_points(prompt, session.body, refining=held is not None)
        return session.segment(prompt.prompt(), None if held is None else previous_DHW, everywhere).array_DHW

    @staticmethod
    def _check_points(prompt: UserPrompt, body: Box, refining: bool) -> None:
        """Refuse what the predictor would, in words that need none of its coordinates."""
        labels = [label for voxel, label in prompt.points if _within(voxel, body)]
        if prompt.points and not labels:
            raise RequestError("point: it lies in the air around the body: click the structure")
        if prompt.points and not refining and INSIDE not in labels:
            raise RequestError("point: begin with a positive one in the body, as there is no mask to correct yet")

    def _change(self) -> Change:
        """What differs from the client's mask, which is up to date afterwards."""
        mask_DHW, shown_DHW = self._mask_DHW, self._shown_DHW
        if mask_DHW is None or shown_DHW is None:
            differs_DHW = shown_DHW if mask_DHW is None else mask_DHW
        else:
            differs_DHW = mask_DHW ^ shown_DHW
        self._shown_DHW = mask_DHW
        box = None if differs_DHW is None else box_or_none(differs_DHW)
        if box is None or differs_DHW is None:
            return Change(ran=True)
        part_DHW = (np.zeros_like(differs_DHW) if mask_DHW is None else mask_DHW)[box_slices(box)]
        return Change(True, self._region(box), self._grid.from_canonical(part_DHW).view(np.uint8))

    def _region(self, box: Box) -> list[Interval]:
        """A box in canonical axes as intervals along the client's."""
        grid, region = self._grid, [(0, 0)] * 3
        for canonical, (axis, flipped) in enumerate(zip(grid.axes, grid.flipped, strict=True)):
            low, high = box[canonical], box[canonical + 3]
            size = grid.shape[axis]
            region[axis] = (size - 1 - high, size - low) if flipped else (low, high + 1)
        return region


def _within(voxel: Sequence[int], box: Box) -> bool:
    return all(low <= place <= high for low, place, high in zip(box[:3], voxel, box[3:], strict=True))


def spread(voxels_N3: np.ndarray, count: int) -> np.ndarray:
    """Choose voxels of a stroke that are spread evenly along it and lie in its middle.

    The stroke is cut across its longest direction into parts of equal size; each gives the voxel nearest to its mean.

    Args:
        voxels_N3: the stroke, at least one voxel.
        count: number of voxels to choose, at most.

    Returns:
        Rows of `voxels_N3`.
    """
    centred_N3 = voxels_N3 - voxels_N3.mean(axis=0)
    longest = np.linalg.eigh(centred_N3.T @ centred_N3)[1][:, -1]
    along_N3 = voxels_N3[np.argsort(centred_N3 @ longest, kind="stable")]
    parts = np.array_split(along_N3, min(count, len(along_N3)))
    return np.stack([part[np.argmin(((part - part.mean(axis=0)) ** 2).sum(axis=1))] for part in parts])
