"""Where voxels lie: volumes, their grids and affines, and the way between a file's axes and canonical ones.

1. `NativeGrid.of` finds how a file's axes must be permuted and flipped to become canonical: D superior, H anterior,
   W right (indices grow in that direction). `to_canonical` and `from_canonical` do it and undo it, without resampling.
2. `affine_of` and `to_itk_image` convert between ITK's geometry and affines.
3. `resample` brings an array onto another grid. It is used for label maps on another grid, and for the slices of a
   tilted gantry, which `straight_grid` covers with a grid that is not sheared.

World coordinates are RAS millimetres. SimpleITK and DICOM use LPS: `RAS_FROM_LPS` changes the signs.
Affines are 4x4 float64 and map (d, h, w, 1), or native array indices, to RAS. Native arrays have their slowest axis
first, as SimpleITK's. Letters: D, H, W canonical axes; N points; 3 a point; 4 a homogeneous point.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segvol_pl.errors import VolumeError
from segvol_pl.imaging.itk import ItkHeader, sitk

RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
CANONICAL = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]])
"""Rows: the world axis (R, A, S) along which D, H, W grow."""

SAME_GRID = 1e-2
"""Voxels by which two grids may differ and still count as the same."""
VOXEL_SPACING = (0.01, 100.0)
"""Least and greatest mm between the voxels of a CT. A spacing beyond these is in another unit."""
DIRECTION_TOLERANCE = 1e-3
"""Error of rounded direction vectors: how far they may be from length 1 or from a right angle."""
MOST_VOXELS = 2**32
"""Twice the voxels of 2048 slices of 1024 x 1024. A header that promises more than this is wrong."""


@dataclass(frozen=True, eq=False)
class NativeGrid:
    """The grid of a file, and how its axes became the canonical ones."""

    shape: tuple[int, int, int]
    """Slowest axis first."""
    affine: np.ndarray
    """Native array index -> RAS."""
    axes: tuple[int, int, int]
    """The native axes that became D, H, W."""
    flipped: tuple[bool, bool, bool]
    """Whether D, H, W run against their native axis."""

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray) -> NativeGrid:
        """Choose the axes and flips that come closest to D, H, W. An oblique affine stays oblique.

        Args:
            shape: Voxels along each native axis.
            affine: Native array index -> RAS.
        """
        cosines = CANONICAL @ (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
        d, h, w = max(itertools.permutations(range(3)), key=lambda axes: sum(np.abs(cosines[range(3), axes])))
        flipped = cosines[range(3), (d, h, w)] < 0
        shape_3 = (shape[0], shape[1], shape[2])
        return cls(shape_3, affine, (d, h, w), (bool(flipped[0]), bool(flipped[1]), bool(flipped[2])))

    @property
    def canonical_affine(self) -> np.ndarray:
        """(d, h, w, 1) -> RAS."""
        native_from_canonical = np.zeros((4, 4))
        native_from_canonical[3, 3] = 1
        for canonical, (axis, flipped) in enumerate(zip(self.axes, self.flipped, strict=True)):
            native_from_canonical[axis, canonical] = -1 if flipped else 1
            native_from_canonical[axis, 3] = self.shape[axis] - 1 if flipped else 0
        return self.affine @ native_from_canonical

    def to_canonical(self, array: np.ndarray) -> np.ndarray:
        """Permute and flip an array on this grid to (D,H,W)."""
        return np.ascontiguousarray(np.flip(array.transpose(self.axes), self._flipped_axes()))

    def from_canonical(self, array_DHW: np.ndarray) -> np.ndarray:
        """Undo `to_canonical`."""
        return np.ascontiguousarray(np.flip(array_DHW, self._flipped_axes()).transpose(np.argsort(self.axes)))

    def _flipped_axes(self) -> tuple[int, ...]:
        return tuple(axis for axis, flipped in enumerate(self.flipped) if flipped)


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT in canonical axes."""

    array_DHW: np.ndarray
    """int16 HU; of any dtype if it was normalised before, see `unplaced_volume`."""
    affine: np.ndarray
    """(d, h, w, 1) -> RAS."""
    native: NativeGrid
    path: Path

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm along d, h, w."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(d), float(h), float(w)


def unplaced_volume(array_DHW: np.ndarray, spacing: Sequence[float], path: Path) -> Volume:
    """A volume whose file states no orientation: its array's own axes are taken as D, H, W.

    Args:
        array_DHW: The voxels; of any dtype if they are normalised already, see `Predictor.open_normalised`.
        spacing: mm along d, h, w.
        path: The file, for messages.
    """
    affine = np.eye(4)
    affine[:3, :3] = CANONICAL * np.asarray(spacing, float)
    d, h, w = array_DHW.shape
    return Volume(array_DHW, affine, NativeGrid((d, h, w), affine, (0, 1, 2), (False, False, False)), path)


def to_native(mask_DHW: np.ndarray, volume: Volume) -> np.ndarray:
    """Bring a mask of a CT onto the grid of the CT's file, slowest axis first. Raises VolumeError for another shape."""
    if mask_DHW.shape != volume.array_DHW.shape:
        raise VolumeError(f"a mask of shape {mask_DHW.shape} does not fit {volume.path}, {volume.array_DHW.shape}")
    return volume.native.from_canonical(mask_DHW)


# Points


def voxels_of(world_N3: np.ndarray, volume: Volume, lps: bool = False) -> np.ndarray:
    """Convert millimetres to voxels (d, h, w) of the CT, not rounded: the centre of a voxel is a whole number.

    Args:
        world_N3: Points in mm.
        volume: The CT.
        lps: Whether the points are LPS, not RAS.
    """
    world_4N = _homogeneous(world_N3)
    return np.linalg.solve(volume.affine, RAS_FROM_LPS @ world_4N if lps else world_4N)[:3].T


def world_of(voxels_N3: np.ndarray, volume: Volume, lps: bool = False) -> np.ndarray:
    """Convert voxels to millimetres: the inverse of `voxels_of`."""
    ras_4N = volume.affine @ _homogeneous(voxels_N3)
    points_N3: np.ndarray = (RAS_FROM_LPS @ ras_4N if lps else ras_4N)[:3].T
    return points_N3


def lattice(shape: tuple[int, ...], steps: int) -> np.ndarray:
    """Return homogeneous voxel indices (4,N): `steps` along each axis, from the first voxel to the last."""
    axes = [np.linspace(0, size - 1, steps) for size in shape]
    return _homogeneous(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3))


def _homogeneous(points_N3: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(points_N3, float), np.ones((len(points_N3), 1))], axis=1).T


# Grids


def check_voxel_count(shape: tuple[int, ...], path: Path) -> None:
    """Raise VolumeError for more than MOST_VOXELS, before memory is allocated for them."""
    if math.prod(shape) > MOST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise VolumeError(
            f"{path}: its header promises {sizes} voxels; a volume has at most {MOST_VOXELS}: repair it or leave it out"
        )


def check_grid(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> None:
    """Raise VolumeError for a grid that no CT has: a single slice, a singular affine, or a spacing not in mm.

    Args:
        shape: Voxels along each native axis.
        affine: Native array index -> RAS.
        path: The file, for the message.
    """
    if min(shape) < 2:
        raise VolumeError(f"{path}: a 2-D image, {shape[::-1]} voxels: give a volume of several slices")
    steps = np.linalg.norm(affine[:3, 2::-1], axis=0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        spacing = tuple(steps.round(4).tolist())
        raise VolumeError(f"{path}: its affine is singular (spacing {spacing} mm): repair its header")
    if steps.min() < VOXEL_SPACING[0] or steps.max() > VOXEL_SPACING[1]:
        spacing_text = " x ".join(f"{step:.4g}" for step in steps)
        raise VolumeError(f"{path}: spacing {spacing_text} mm: it is wrong or in another unit, repair its header")


def right_angled(affine: np.ndarray) -> bool:
    """Return whether the steps along the axes are at right angles and none is 0."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() == 0:
        return False
    cosines = affine[:3, :3] / lengths
    return bool(np.abs(cosines.T @ cosines - np.eye(3)).max() <= DIRECTION_TOLERANCE)


def affine_of(header: ItkHeader) -> np.ndarray:
    """Return native array index -> RAS of an ITK image or reader."""
    affine = np.eye(4)
    steps = np.array(header.GetDirection()).reshape(3, 3) * np.array(header.GetSpacing())  # type: ignore[no-untyped-call]
    affine[:3, :3] = steps[:, ::-1]
    affine[:3, 3] = header.GetOrigin()  # type: ignore[no-untyped-call]
    return RAS_FROM_LPS @ affine


def to_itk_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """Make an ITK image of a native array and its affine: the inverse of `affine_of`."""
    lps = RAS_FROM_LPS @ affine
    steps = lps[:3, :3][:, ::-1]
    spacing = np.linalg.norm(steps, axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((steps / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def straight_grid(shape: tuple[int, int, int], affine: np.ndarray) -> tuple[tuple[int, int, int], np.ndarray]:
    """Return shape and affine of the smallest unsheared grid that holds a stack of slices shifted in their planes.

    The grid has the slices' planes and runs along their normal. For a stack that is not sheared it is the same grid.
    """
    planes_32 = affine[:3, 1:3]
    shear_2 = planes_32.T @ affine[:3, 0] / np.sum(planes_32**2, axis=0)
    ends_2 = shear_2 * (shape[0] - 1)
    before_2 = np.floor(np.minimum(ends_2, 0) + SAME_GRID).astype(int)
    rows, columns = (np.ceil(np.maximum(ends_2, 0) - SAME_GRID).astype(int) - before_2).tolist()
    straight = affine.copy()
    straight[:3, 0] -= planes_32 @ shear_2
    straight[:3, 3] += planes_32 @ before_2
    return (shape[0], shape[1] + rows, shape[2] + columns), straight


def resample(
    array: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    onto: np.ndarray,
    linear: bool = False,
    outside: float = 0.0,
) -> np.ndarray:
    """Resample an array onto another grid.

    Args:
        array: Voxels on the old grid.
        affine: Array index -> RAS on the old grid.
        shape: Shape of the new grid.
        onto: Array index -> RAS on the new grid.
        linear: Interpolate linearly; otherwise take the nearest neighbour.
        outside: Value of voxels outside the old grid.
    """
    method = sitk.sitkLinear if linear else sitk.sitkNearestNeighbor
    grid = to_itk_image(np.zeros(shape, np.uint8), onto)
    image = sitk.Resample(to_itk_image(array, affine), grid, sitk.Transform(), method, outside)
    return sitk.GetArrayFromImage(image)


def is_on_grid_of(shape: tuple[int, ...], affine: np.ndarray, like: Volume) -> bool:
    """Return whether a canonical grid is that of the CT `like`, up to SAME_GRID voxels at the corners."""
    if shape != like.array_DHW.shape:
        return False
    corners_4N = lattice(shape, 2)
    moved_4N = np.linalg.solve(affine, like.affine @ corners_4N)
    return bool(np.abs(moved_4N - corners_4N).max() < SAME_GRID)


def covered_share(shape: tuple[int, ...], affine: np.ndarray, like: Volume) -> float:
    """Return the share of the extent of the CT `like` that a canonical grid covers, on 17 points along each axis."""
    voxels_4N = np.linalg.solve(affine, like.affine @ lattice(like.array_DHW.shape, 17))
    limits = np.array(shape)[:, None] - 0.5
    return float(((voxels_4N[:3] >= -0.5) & (voxels_4N[:3] <= limits)).all(axis=0).mean())
