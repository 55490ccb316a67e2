"""Synthetic CTs with organs, for the demo and the tests. Each is a pure function of its seed.

1. `phantom_body` draws a body: its structures and their places. `phantom_anatomy` holds the tables, and draws the
   Hounsfield units in a contrast phase.
2. A patient frame (millimetres; z superior, y anterior, x right) is laid over the voxel grid: scaled to a body size,
   tilted, shifted and bent by a smooth random field. Every part is a simple shape in that frame.
3. The parts are painted in their order, later ones over earlier ones. What reaches out of the scanned range is cut off.
4. `phantom_scan` makes a CT of it: partial volume, table, noise and artefacts.
5. `write_phantoms` writes NIfTI files in many orientations, so that a reader that ignores the affine fails.
"""

from __future__ import annotations

import functools
import gzip
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from segvol_pl.atomic import atomic_path
from segvol_pl.config import PhantomsConfig
from segvol_pl.errors import CaseError, listed
from segvol_pl.packing.phantom_anatomy import CATEGORIES, VALUE, draw_tissues
from segvol_pl.packing.phantom_body import Part, Solid, Tube, draw_anatomy
from segvol_pl.packing.phantom_draws import Draws
from segvol_pl.packing.phantom_scan import AIR_HU, draw_field, scan

FIELD_OF_VIEW = (440.0, 260.0, 340.0)
"""mm along d, h, w, of a scan of the complete trunk."""

MIDDLE_Z = -22.0
"""Height in the patient's frame of the middle of the trunk, in mm."""

PARTIAL = 0.3
"""Share of phantoms whose scan covers a part of the trunk only."""

LEAST_COVER = 0.6
"""Smallest part of the trunk that a scan covers."""

VOXEL_MM3 = 34.0
"""Smallest voxel at scale 1: a phantom stays under 1.2 million voxels."""

PerAxis = tuple[float, float, float]
Window = tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT in canonical axes: D superior, H anterior, W right.

    hu_DHW: int16 Hounsfield units. label_DHW: uint8, values as in `CATEGORIES`, 0 = none. spacing: mm along d, h, w.
    """

    hu_DHW: np.ndarray
    label_DHW: np.ndarray
    spacing: PerAxis

    @property
    def affine(self) -> np.ndarray:
        """4x4 float64: voxel (d, h, w, 1) -> RAS millimetres, the centre of the volume at 0."""
        affine = np.zeros((4, 4))
        affine[[2, 1, 0], [0, 1, 2]] = self.spacing
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(self.hu_DHW.shape) - 1) / 2)
        affine[3, 3] = 1
        return affine


def make_phantom(seed: int, scale: float = 1.0, variation: float = 1.0) -> Phantom:
    """Make a synthetic CT of a trunk, with the organs of `CATEGORIES`.

    A body may lack an organ and has some of the lesions; a scan may leave out the upper or lower part of the trunk.

    Args:
        seed: Determines the CT.
        scale: Multiplies the voxels along each axis, and divides the spacing.
        variation: How far bodies and scans differ, from 0 to 1, see `phantom_draws`.

    Raises:
        ValueError: `scale` is not positive, or `variation` out of range.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}, must be positive")
    if not 0 <= variation <= 1:
        raise ValueError(f"variation is {variation}, must be from 0 to 1")
    rng = Draws(np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))), variation)
    spacing = _draw_spacing(rng, scale)
    anatomy, tissues = draw_anatomy(rng), draw_tissues(rng)
    canvas = _Canvas(_draw_lines(rng, spacing), rng)
    canvas.cavity_DHW = canvas.mask(anatomy.cavity)
    for part in anatomy.parts:
        canvas.paint(part, tissues[part.tissue])
    return Phantom(scan(canvas.hu_DHW, canvas.lines, rng), canvas.label_DHW, spacing)


def _draw_spacing(rng: Draws, scale: float) -> PerAxis:
    slices = rng.uniform(4.4, 5.4)
    plane = rng.uniform(max(2.5, np.sqrt(VOXEL_MM3 / slices)), 3.0)
    return float(slices / scale), float(plane / scale), float(plane / scale)


def _draw_lines(rng: Draws, spacing: PerAxis) -> list[np.ndarray]:
    """Draw the scanned range, and return the places of the voxels along d, h, w in mm from the trunk's middle."""
    cover = rng.uniform(LEAST_COVER, 0.85) if rng.unusual(PARTIAL) else 1.0
    middle = rng.uniform(-0.5, 0.5) * (1 - cover) * FIELD_OF_VIEW[0]
    lines = []
    for extent, step in zip((FIELD_OF_VIEW[0] * cover, *FIELD_OF_VIEW[1:]), spacing, strict=True):
        count = round(extent / step)
        lines.append((np.arange(count, dtype=np.float32) - (count - 1) / 2) * np.float32(step))
    lines[0] += np.float32(middle)
    return lines


class _Canvas:
    """The voxels that are painted, and the patient frame over them.

    lines: places of the voxels along d, h, w, in mm. frame_CDHW: z, y, x of the patient at each voxel, in mm.
    """

    def __init__(self, lines: list[np.ndarray], rng: Draws) -> None:
        self.lines = lines
        self.shape = (len(lines[0]), len(lines[1]), len(lines[2]))
        self.rng = rng
        tilt = np.deg2rad(rng.uniform(-4, 4, 3))
        rotation = np.eye(3) + np.array([[0, -tilt[0], tilt[1]], [tilt[0], 0, -tilt[2]], [-tilt[1], tilt[2], 0]])
        size = rng.uniform(0.9, 1.06) * rng.uniform(0.94, 1.06, 3)
        self._to_patient = rotation / size[:, None]
        self._to_grid = np.linalg.inv(self._to_patient)
        self._offset = rng.uniform(-1, 1, 3) * (14, 6, 6) + (MIDDLE_Z, 0, 0)
        self.frame_CDHW, self._bend = self._draw_frame()
        self._rough_DHW = np.clip(self._field(55, 45, 45), -2, 2)
        self._patterns: dict[str, np.ndarray] = {}
        self.hu_DHW = np.full(self.shape, AIR_HU, dtype=np.float32)
        self.label_DHW = np.zeros(self.shape, dtype=np.uint8)
        self.cavity_DHW = np.ones(self.shape, dtype=bool)

    def _field(self, *period: float) -> np.ndarray:
        """Draw a smooth field (D,H,W) that varies over this many mm along each axis."""
        extents = [abs(float(line[-1] - line[0])) for line in self.lines]
        cells = [extent / length for extent, length in zip(extents, period, strict=True)]
        return draw_field(self.rng, self.shape, (cells[0], cells[1], cells[2]))

    def _draw_frame(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the frame, and how far it is bent at most along each axis."""
        grids = np.meshgrid(*self.lines, indexing="ij", sparse=True)
        frame_CDHW, bend = np.empty((3, *self.shape), dtype=np.float32), []
        for axis_DHW, row, offset, amplitude in zip(frame_CDHW, self._to_patient, self._offset, (7, 5, 6), strict=True):
            axis_DHW[...] = self._field(160, 130, 150) * np.float32(amplitude)
            bend.append(float(np.abs(axis_DHW).max()))
            axis_DHW += np.float32(offset)
            for factor, grid in zip(row.astype(np.float32), grids, strict=True):
                axis_DHW += factor * grid
        return frame_CDHW, np.array(bend)

    def _windows(self, low_N3: np.ndarray, high_N3: np.ndarray) -> list[Window]:
        """Return for each box of the patient's frame the voxels that may lie in it."""
        middle_N3 = ((low_N3 + high_N3) / 2 - self._offset) @ self._to_grid.T
        reach_N3 = ((high_N3 - low_N3) / 2 + self._bend) @ np.abs(self._to_grid).T
        first = np.array([line[0] for line in self.lines])
        step = np.array([line[1] - line[0] for line in self.lines])
        start_N3 = np.clip(np.ceil((middle_N3 - reach_N3 - first) / step), 0, self.shape).astype(int)
        stop_N3 = np.clip(np.floor((middle_N3 + reach_N3 - first) / step) + 1, start_N3, self.shape).astype(int)
        return [
            tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
            for starts, stops in zip(start_N3.tolist(), stop_N3.tolist(), strict=True)
        ]

    def _offsets(self, window: Window, origin: np.ndarray) -> np.ndarray:
        """Return z, y, x from the origin (3,d,h,w) at each voxel of the window."""
        return np.asarray(self.frame_CDHW[(slice(None), *window)] - origin.astype(np.float32)[:, None, None, None])

    def _in_solid(self, solid: Solid) -> Iterator[tuple[Window, np.ndarray]]:
        reach = np.linalg.norm(solid.turn * solid.radii[:, None], axis=0) * (1 + 2 * solid.rough)
        (window,) = self._windows((solid.centre - reach)[None], (solid.centre + reach)[None])
        axes = (solid.turn / solid.radii[:, None]).astype(np.float32)
        along_CDHW = np.tensordot(axes, self._offsets(window, solid.centre), axes=1)
        if solid.power == 4:
            along_CDHW = np.square(along_CDHW)
        distance_DHW = np.einsum("cdhw,cdhw->dhw", along_CDHW, along_CDHW)
        yield window, distance_DHW <= np.square(1 + np.float32(solid.rough) * self._rough_DHW[window])

    def _in_tube(self, tube: Tube) -> Iterator[tuple[Window, np.ndarray]]:
        """Each stretch between two points, with round ends."""
        starts, ends = tube.points_N3[:-1], tube.points_N3[1:]
        thick_N1 = np.maximum(tube.radii_N[:-1], tube.radii_N[1:])[:, None]
        windows = self._windows(np.minimum(starts, ends) - thick_N1, np.maximum(starts, ends) + thick_N1)
        stretches = zip(windows, starts, ends - starts, tube.radii_N[:-1], np.diff(tube.radii_N), strict=True)
        for window, start, step, radius, growth in stretches:
            offset_CDHW, step_C = self._offsets(window, start), step.astype(np.float32)
            length = np.float32(step_C @ step_C)
            along_DHW = np.einsum("c,cdhw->dhw", step_C, offset_CDHW)
            share_DHW = np.clip(along_DHW / length, 0, 1)
            square_DHW = np.einsum("cdhw,cdhw->dhw", offset_CDHW, offset_CDHW)
            square_DHW += share_DHW * (share_DHW * length - 2 * along_DHW)
            yield window, square_DHW <= np.square(np.float32(radius) + share_DHW * np.float32(growth))

    def _covered(self, shape: Solid | Tube) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield windows, and in each the voxels inside the shape."""
        return self._in_solid(shape) if isinstance(shape, Solid) else self._in_tube(shape)

    def mask(self, shape: Solid | Tube) -> np.ndarray:
        """Return the mask of the shape over the volume."""
        mask_DHW = np.zeros(self.shape, dtype=bool)
        for window, inside in self._covered(shape):
            mask_DHW[window] |= inside
        return mask_DHW

    def paint(self, part: Part, hu: float) -> None:
        """Paint the part, within its limits."""
        for window, inside in self._covered(part.shape):
            if part.within == "cavity":
                inside &= self.cavity_DHW[window]
            elif part.within:
                inside &= self.label_DHW[window] == VALUE[part.within]
            if part.pattern:
                inside &= self._pattern(part.pattern)[window]
            self.hu_DHW[window][inside] = hu
            self.label_DHW[window][inside] = VALUE[part.label] if part.label else 0

    def _pattern(self, name: str) -> np.ndarray:
        if name not in self._patterns:
            self._patterns[name] = getattr(self, f"_draw_{name}")()
        return self._patterns[name]

    def _draw_ribs(self) -> np.ndarray:
        z_DHW, y_DHW, _ = self.frame_CDHW
        phase_DHW = (z_DHW + np.float32(0.35) * y_DHW) / np.float32(self.rng.uniform(22, 28))
        return np.asarray((phase_DHW % 1 < 0.38) & (z_DHW > -25))

    def _draw_loops(self) -> np.ndarray:
        return np.asarray(np.abs(self._field(40, 32, 34)) < 0.6)

    def _draw_gas(self) -> np.ndarray:
        return np.asarray((self._field(36, 30, 32) > 1.1) & self._pattern("loops"))

    def _draw_vessels(self) -> np.ndarray:
        # Where two smooth fields are both 0 there are curves: a cheap texture like a tree of vessels.
        return np.asarray(np.square(self._field(30, 26, 26)) + np.square(self._field(30, 26, 26)) < 0.05)


def phantoms(config: PhantomsConfig) -> Path:
    """Write the phantoms that a configuration describes, see `write_phantoms`."""
    return write_phantoms(
        Path(config.out),
        config.volumes,
        config.seed,
        scale=config.scale,
        variation=config.variation,
        categories=config.categories,
        workers=config.workers,
    )


def write_phantoms(
    folder: Path,
    count: int,
    seed: int,
    unlabelled: int = 0,
    scale: float = 1.0,
    variation: float = 1.0,
    categories: Sequence[str] = (),
    workers: int = 1,
) -> Path:
    """Write phantoms as NIfTI files and return `folder`.

    It will hold images/phantom_000_ct.nii.gz, labels/phantom_000_seg.nii.gz, unlabelled/phantom_001_ct.nii.gz (numbers
    continue after the labelled ones) and categories.yaml. Each file, also a label file, has its own random orientation
    on disk, given by its affine. A file is complete or not there.

    Args:
        folder: Where to write.
        count: Phantoms with a label map.
        seed: Determines all of them.
        unlabelled: Phantoms without a label map.
        scale: As for `make_phantom`.
        variation: As for `make_phantom`.
        categories: Categories that categories.yaml lists; all if empty. The label maps hold all in any case.
        workers: Processes; 0 for one per core. Their number changes nothing in the files.

    Raises:
        CaseError: No category has one of these names.
    """
    if unknown := [name for name in categories if name not in CATEGORIES]:
        raise CaseError(f"categories: a phantom has no {listed(unknown)}; there are {', '.join(CATEGORIES)}")
    write = functools.partial(_write_phantom, folder, seed, count, scale, variation)
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        list(map(write, range(count + unlabelled)))
    else:
        # A fork of a process with torch's threads may hang.
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(write, range(count + unlabelled)))
    lines = [f"{name}: {CATEGORIES[name]}\n" for name in categories or CATEGORIES]
    _write_whole(folder / "categories.yaml", "".join(lines).encode())
    return folder


def _write_phantom(folder: Path, seed: int, labelled: int, scale: float, variation: float, index: int) -> None:
    case = np.random.SeedSequence([seed, index])
    phantom = make_phantom(int(case.generate_state(1)[0]), scale, variation)
    rng = np.random.Generator(np.random.PCG64(case.spawn(1)[0]))
    name = f"phantom_{index:03d}"
    images = folder / ("images" if index < labelled else "unlabelled")
    _write_nifti(images / f"{name}_ct.nii.gz", phantom.hu_DHW, phantom.affine, rng)
    if index < labelled:
        _write_nifti(folder / "labels" / f"{name}_seg.nii.gz", phantom.label_DHW, phantom.affine, rng)


def _write_nifti(path: Path, array_DHW: np.ndarray, affine: np.ndarray, rng: np.random.Generator) -> None:
    """Write the array with its axes permuted and flipped at random, and an affine that says so."""
    orientation = np.stack([rng.permutation(3), rng.choice([-1, 1], 3)], axis=1)
    image = nib.Nifti1Image(array_DHW, affine).as_reoriented(orientation)
    # A fixed time stamp: the same phantom is the same bytes.
    _write_whole(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        part.write_bytes(content)
