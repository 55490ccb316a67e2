"""Synthetic CTs with organs, for the demo and the tests. Each is a pure function of its seed.

1. `_Anatomy.draw` draws sizes, positions and Hounsfield units.
2. A patient frame (millimetres; z superior, y anterior, x right) is laid over the voxel grid, then tilted,
   shifted and bent by a smooth random field: every organ is a simple solid in that frame.
3. The body wall, distractors without a label (heart, stomach, bowel, ribs, vena cava) and the organs are painted,
   later ones over earlier ones.
4. Partial volume, a table and correlated noise make it a CT.
5. `write_phantoms` writes NIfTI files in many orientations, so that a reader that ignores the affine fails.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from segvol_pl.atomic import atomic_path

LUNG_LEFT, LUNG_RIGHT, SPLEEN, KIDNEY_LEFT, LIVER, KIDNEY_RIGHT, SPINE, AORTA, TUMOUR = range(1, 10)

CATEGORIES: dict[str, list[int]] = {
    "lung left": [LUNG_LEFT],
    "lung right": [LUNG_RIGHT],
    "liver": [LIVER, TUMOUR],
    "spleen": [SPLEEN],
    "kidney left": [KIDNEY_LEFT],
    "kidney right": [KIDNEY_RIGHT],
    "spine": [SPINE],
    "aorta": [AORTA],
    "liver tumour": [TUMOUR],
}
"""Category -> label values; the liver holds its tumour."""

FIELD_OF_VIEW = (320.0, 260.0, 340.0)
"""mm along d, h, w."""

AIR_HU = -1000.0
VOXEL_MM3 = 25.0
"""Smallest voxel at scale 1: a phantom stays under 1.2 million voxels."""

PerAxis = tuple[float, float, float]


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


@dataclass(frozen=True)
class _Solid:
    """An ellipsoid in the patient frame: centre and radii in mm, order (z, y, x); a radius may be infinite."""

    centre: PerAxis
    radii: PerAxis

    @classmethod
    def draw(
        cls, rng: np.random.Generator, centre: PerAxis, radii: PerAxis, shift: float = 5, size: float = 0.1
    ) -> _Solid:
        """Draw a solid: the centre moved by up to `shift` mm, the radii changed by up to the share `size`."""
        moved = np.array(centre) + rng.uniform(-shift, shift, 3)
        scaled = np.array(radii) * rng.uniform(1 - size, 1 + size, 3)
        return cls((moved[0], moved[1], moved[2]), (scaled[0], scaled[1], scaled[2]))

    def within(self, rng: np.random.Generator, reach: float, radius: float) -> _Solid:
        """Draw a solid of about `radius` mm around a random point at most `reach` radii from this one's centre."""
        direction = rng.standard_normal(3)
        offset = direction / np.linalg.norm(direction) * rng.uniform(0, reach) * np.array(self.radii)
        centre = np.array(self.centre) + offset
        return _Solid.draw(rng, (centre[0], centre[1], centre[2]), (radius, radius, radius), shift=0)


class _Canvas:
    """The voxels that are painted, and the patient frame over them."""

    def __init__(self, shape: tuple[int, int, int], spacing: PerAxis, rng: np.random.Generator) -> None:
        self.shape = shape
        self.lines = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
        self.frame = _patient_frame(self.lines, rng)
        grids = np.meshgrid(*self.lines, indexing="ij", sparse=True)
        self.margin = [float(np.abs(bent - grid).max()) for bent, grid in zip(self.frame, grids, strict=True)]
        self.hu_DHW = np.full(shape, AIR_HU, dtype=np.float32)
        self.label_DHW = np.zeros(shape, dtype=np.uint8)

    def distance(self, solid: _Solid) -> tuple[tuple[slice, ...], np.ndarray]:
        """Return a window that holds the solid, and in it the squared distance from the solid's centre, in radii."""
        window = tuple(
            slice(*np.searchsorted(line, (middle - radius - margin, middle + radius + margin)))
            for line, middle, radius, margin in zip(self.lines, solid.centre, solid.radii, self.margin, strict=True)
        )
        total = np.zeros(self.hu_DHW[window].shape, dtype=np.float32)
        for axis_DHW, middle, radius in zip(self.frame, solid.centre, solid.radii, strict=True):
            if np.isfinite(radius):
                total += np.square((axis_DHW[window] - np.float32(middle)) / np.float32(radius))
        return window, total

    def paint(self, solid: _Solid, hu: float, label: int = 0, where: np.ndarray | None = None) -> None:
        """Paint the solid, or its part in the mask `where`."""
        window, distance = self.distance(solid)
        inside = distance <= 1
        if where is not None:
            inside &= where[window]
        self.hu_DHW[window][inside] = hu
        self.label_DHW[window][inside] = label

    def inside(self, solid: _Solid) -> np.ndarray:
        """Return the mask of the solid over the volume."""
        mask_DHW = np.zeros(self.shape, dtype=bool)
        window, distance = self.distance(solid)
        mask_DHW[window] = distance <= 1
        return mask_DHW


def make_phantom(seed: int, scale: float = 1.0) -> Phantom:
    """Make a synthetic CT of a trunk, 320 x 260 x 340 mm, with the organs of `CATEGORIES`.

    Args:
        seed: Determines the CT.
        scale: Multiplies the voxels along each axis, and divides the spacing.

    Raises:
        ValueError: `scale` is not positive.
    """
    if scale <= 0:
        raise ValueError(f"scale is {scale}, must be positive")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    spacing = _draw_spacing(rng, scale)
    depth, height, width = (round(extent / step) for extent, step in zip(FIELD_OF_VIEW, spacing, strict=True))
    canvas = _Canvas((depth, height, width), spacing, rng)
    cavity_DHW = _paint_wall(canvas, rng)
    _paint_chest(canvas, rng, cavity_DHW)
    _paint_distractors(canvas, rng, cavity_DHW)
    _paint_abdomen(canvas, rng, cavity_DHW)
    _paint_vessels(canvas, rng)
    _paint_spine(canvas, rng)
    return Phantom(_scan(canvas, rng), canvas.label_DHW, spacing)


def _draw_spacing(rng: np.random.Generator, scale: float) -> PerAxis:
    slices = rng.uniform(4.0, 6.0)
    plane = rng.uniform(max(2.2, np.sqrt(VOXEL_MM3 / slices)), 3.0)
    return float(slices / scale), float(plane / scale), float(plane / scale)


def _spline_basis(size: int, cells: int) -> np.ndarray:
    """Return float32 (size, cells + 3): the uniform cubic B-spline weight of each control point at `size` points."""
    place = np.linspace(0, cells, size)
    cell = np.minimum(place.astype(int), cells - 1)
    t = place - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    basis = np.zeros((size, cells + 3), dtype=np.float32)
    np.put_along_axis(basis, cell[:, None] + np.arange(4), weights.astype(np.float32), axis=1)
    return basis


def _smooth_field(rng: np.random.Generator, shape: tuple[int, int, int], cells: PerAxis) -> np.ndarray:
    """Draw a float32 (D,H,W) field of mean about 0 and standard deviation 1, smooth over 1/cells of each axis."""
    counts = [max(1, round(cell)) for cell in cells]
    control = rng.standard_normal([count + 3 for count in counts], dtype=np.float32)
    rows, columns, bars = (_spline_basis(size, count) for size, count in zip(shape, counts, strict=True))
    field_DHW = np.tensordot(rows, columns @ control @ bars.T, axes=(1, 0))
    return np.asarray(field_DHW / field_DHW.std(), dtype=np.float32)


def _patient_frame(lines: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Draw z, y, x of the patient (mm) at each voxel: tilted by a few degrees, shifted, and bent smoothly."""
    shape = (len(lines[0]), len(lines[1]), len(lines[2]))
    tilt = np.deg2rad(rng.uniform(-4, 4, 3))
    rotation = np.eye(3) + np.array([[0, -tilt[0], tilt[1]], [tilt[0], 0, -tilt[2]], [-tilt[1], tilt[2], 0]])
    grids = np.meshgrid(*lines, indexing="ij", sparse=True)
    shift = rng.uniform(-1, 1, 3) * (12, 6, 6)
    frame = []
    for row, offset in zip(rotation.astype(np.float32), shift.astype(np.float32), strict=True):
        axis_DHW = _smooth_field(rng, shape, (2, 2, 2)) * np.float32(4.0)
        axis_DHW += offset
        for factor, grid in zip(row, grids, strict=True):
            axis_DHW += factor * grid
        frame.append(axis_DHW)
    return frame


def _paint_wall(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Paint skin, fat, muscle and ribs. Return the mask of the cavity inside them, which is filled with fat."""
    outer = np.array([rng.uniform(95, 108), rng.uniform(138, 154)])
    fat, muscle = rng.uniform(6, 18), rng.uniform(9, 14)
    for inset, hu in ((0.0, 20.0), (3.0, rng.uniform(-110, -95)), (3 + fat, rng.uniform(45, 60))):
        canvas.paint(_Solid((0, 0, 0), (np.inf, *(outer - inset))), hu)
    _paint_ribs(canvas, rng, outer - 3 - fat, muscle)
    cavity = _Solid((0, 4, 0), (np.inf, *(outer - 3 - fat - muscle)))
    canvas.paint(cavity, rng.uniform(-105, -90))
    return canvas.inside(cavity)


def _paint_ribs(canvas: _Canvas, rng: np.random.Generator, wall: np.ndarray, thickness: float) -> None:
    z_DHW, y_DHW, _ = canvas.frame
    phase = (z_DHW + np.float32(0.35) * y_DHW) / np.float32(rng.uniform(26, 32)) + np.float32(rng.uniform())
    ribs_DHW = (phase % 1 < 0.38) & (z_DHW > -25)
    canvas.paint(_Solid((0, 0, 0), (np.inf, *(wall - 2))), rng.uniform(300, 450), where=ribs_DHW)
    canvas.paint(_Solid((0, 0, 0), (np.inf, *(wall - thickness + 2))), 50)


def _paint_chest(canvas: _Canvas, rng: np.random.Generator, cavity_DHW: np.ndarray) -> None:
    """Paint mediastinum, lungs with vessels, and heart."""
    above_DHW = cavity_DHW & (canvas.frame[0] > 40)
    canvas.paint(_Solid((170, 0, 0), (140, 90, 60)), 30, where=above_DHW)
    hu = rng.uniform(-870, -820)
    for side, label in ((-1.0, LUNG_LEFT), (1.0, LUNG_RIGHT)):
        lung = _Solid.draw(rng, (115, 2, 74 * side), (88, 76, 56))
        canvas.paint(lung, hu, label, where=cavity_DHW)
    _paint_lung_vessels(canvas, rng)
    canvas.paint(_Solid.draw(rng, (85, 28, -22), (42, 42, 48)), rng.uniform(110, 160), where=cavity_DHW)


def _paint_lung_vessels(canvas: _Canvas, rng: np.random.Generator) -> None:
    # Where two smooth fields are both 0 there are curves: a cheap texture like a tree of vessels.
    cells = (FIELD_OF_VIEW[0] / 30, FIELD_OF_VIEW[1] / 26, FIELD_OF_VIEW[2] / 26)
    first_DHW, second_DHW = (_smooth_field(rng, canvas.shape, cells) for _ in range(2))
    lungs_DHW = (canvas.label_DHW == LUNG_LEFT) | (canvas.label_DHW == LUNG_RIGHT)
    canvas.hu_DHW[lungs_DHW & (first_DHW**2 + second_DHW**2 < 0.05)] = -150


def _paint_distractors(canvas: _Canvas, rng: np.random.Generator, cavity_DHW: np.ndarray) -> None:
    """Paint psoas, bowel and stomach: tissue with the density of organs but without a label."""
    for side in (-1.0, 1.0):
        canvas.paint(_Solid((-150, -42, 38 * side), (110, 18, 18)), 55, where=cavity_DHW)
    loops_DHW = np.abs(_smooth_field(rng, canvas.shape, (8, 8, 10))) < 0.55
    loops_DHW &= cavity_DHW & (canvas.frame[0] < -20) & (canvas.frame[1] > -12)
    canvas.paint(_Solid((-120, 30, 0), (100, 75, 120)), rng.uniform(20, 45), where=loops_DHW)
    stomach = _Solid.draw(rng, (5, 30, -62), (34, 32, 36))
    canvas.paint(stomach, rng.uniform(15, 35), where=cavity_DHW)
    canvas.paint(stomach.within(rng, 0.3, rng.uniform(8, 15)), -900, where=cavity_DHW)


def _paint_abdomen(canvas: _Canvas, rng: np.random.Generator, cavity_DHW: np.ndarray) -> None:
    """Paint liver with tumour, spleen and kidneys."""
    hu = rng.uniform(78, 102)
    liver = _Solid.draw(rng, (-2, 4, 74), (62, 68, 58))
    left_lobe = _Solid.draw(rng, (12, 38, 18), (32, 32, 62))
    for part in (left_lobe, liver):
        canvas.paint(part, hu, LIVER, where=cavity_DHW)
    spleen = _Solid.draw(rng, (8, -30, -96), (40, 38, 25))
    canvas.paint(spleen, rng.uniform(104, 120), SPLEEN, where=cavity_DHW)
    for side, label, z in ((-1.0, KIDNEY_LEFT, -58.0), (1.0, KIDNEY_RIGHT, -72.0)):
        _paint_kidney(canvas, _Solid.draw(rng, (z, -42, 64 * side), (48, 23, 25), shift=6), label, rng, cavity_DHW)
    canvas.paint(liver.within(rng, 0.5, rng.uniform(11, 21)), rng.uniform(20, 38), TUMOUR, where=cavity_DHW)


def _paint_kidney(canvas: _Canvas, solid: _Solid, label: int, rng: np.random.Generator, cavity_DHW: np.ndarray) -> None:
    canvas.paint(solid, rng.uniform(175, 200), label, where=cavity_DHW)
    medulla = _Solid(solid.centre, tuple(0.6 * radius for radius in solid.radii))  # type: ignore[arg-type]
    canvas.paint(medulla, rng.uniform(130, 155), label, where=cavity_DHW)


def _paint_vessels(canvas: _Canvas, rng: np.random.Generator) -> None:
    radius = rng.uniform(9, 13)
    canvas.paint(_Solid.draw(rng, (0, -24, -14), (np.inf, radius, radius), shift=3), rng.uniform(190, 300), AORTA)
    canvas.paint(_Solid.draw(rng, (0, -22, 20), (np.inf, radius, radius), shift=3), rng.uniform(90, 130))


def _paint_spine(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Paint vertebral bodies with a dense shell and softer discs, arches around the canal, spinous processes."""
    period, phase, marrow = rng.uniform(30, 38), rng.uniform(), rng.uniform(300, 400)
    place_DHW = canvas.frame[0] / np.float32(period) + np.float32(phase)
    place_DHW -= np.floor(place_DHW)
    body = _Solid((0, -57, 0), (np.inf, rng.uniform(17, 20), rng.uniform(21, 25)))
    parts: list[tuple[_Solid, float, Callable[[np.ndarray], np.ndarray] | None]] = [
        (_Solid((0, -80, 0), (np.inf, 13, 16)), rng.uniform(400, 500), None),
        (_Solid((0, -88, 0), (np.inf, 13, 5)), rng.uniform(350, 450), lambda place: place < 0.6),
        (body, rng.uniform(520, 680), None),
        (_Solid(body.centre, (np.inf, body.radii[1] - 4, body.radii[2] - 4)), marrow, None),
        (body, 110, lambda place: place < 0.16),
    ]
    for solid, hu, where in parts:
        canvas.paint(solid, hu, SPINE, where=None if where is None else where(place_DHW))
    canvas.paint(_Solid((0, -81, 0), (np.inf, 7, 9)), 30)


def _scan(canvas: _Canvas, rng: np.random.Generator) -> np.ndarray:
    """Return the canvas as a scanner shows it, int16."""
    hu_DHW = ndimage.gaussian_filter(canvas.hu_DHW, (0.4, 0.6, 0.6), truncate=3)
    if rng.random() < 0.5:
        _add_table(hu_DHW, canvas)
    noise_DHW = rng.standard_normal(canvas.shape, dtype=np.float32)
    noise_DHW = ndimage.gaussian_filter(noise_DHW, (0.0, 0.8, 0.8), truncate=3)
    hu_DHW += noise_DHW * np.float32(rng.uniform(8, 16) / noise_DHW.std())
    stored_DHW: np.ndarray = np.clip(np.rint(hu_DHW), -1024, 3071).astype(np.int16)
    return stored_DHW


def _add_table(hu_DHW: np.ndarray, canvas: _Canvas) -> None:
    """Add a curved couch under the patient, straight through all slices: it does not follow the patient's shape."""
    _, y_H, x_W = canvas.lines
    height_HW = y_H[:, None] + 120 - np.square(x_W)[None, :] / 1500
    table_HW = (np.abs(height_HW) < 4) & (np.abs(x_W) < 150)[None, :]
    air_DHW = hu_DHW[:, table_HW]
    hu_DHW[:, table_HW] = np.where(air_DHW < -500, np.float32(-250), air_DHW)


def write_phantoms(folder: Path, count: int, seed: int, unlabelled: int = 0, scale: float = 1.0) -> Path:
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
    """
    for index in range(count + unlabelled):
        case = np.random.SeedSequence([seed, index])
        phantom = make_phantom(int(case.generate_state(1)[0]), scale)
        rng = np.random.Generator(np.random.PCG64(case.spawn(1)[0]))
        name = f"phantom_{index:03d}"
        images = folder / ("images" if index < count else "unlabelled")
        _write_nifti(images / f"{name}_ct.nii.gz", phantom.hu_DHW, phantom.affine, rng)
        if index < count:
            _write_nifti(folder / "labels" / f"{name}_seg.nii.gz", phantom.label_DHW, phantom.affine, rng)
    lines = [f"{name}: {values}\n" for name, values in CATEGORIES.items()]
    _write_whole(folder / "categories.yaml", "".join(lines).encode())
    return folder


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
