"""The surfaces of two masks, in surface elements weighted by their area, and the distances between them.

Published surface distances (DeepMind's surface-distance, and every challenge that uses it) count surface by its area:

1. A surface element (surfel) lies at each corner of the voxel grid where eight voxels meet and some, not all, of them
   are inside the mask. Outside the volume there is no mask, so a mask at the border has its surface there.
2. Which of the eight are inside is its code. The code and the spacing give its area, by marching cubes.
3. Its distance is that to the nearest surfel of the other mask.

Letters: D H W voxels, N surfels, C codes, T triangles of a code.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics.utils import _get_neighbour_code_to_normals_table
from scipy.spatial import cKDTree

from segvol_pl.imaging.box import box_or_none, box_slices

SLACK = 1e-6
"""Relative distance beyond a limit to which neighbours are looked for; the exact distance then decides."""


@functools.lru_cache(maxsize=16)
def surfel_areas(spacing: tuple[float, float, float]) -> np.ndarray:
    """Return the area in mm^2 of a surfel by its code, float64 (256,).

    Args:
        spacing: In mm along d, h, w.
    """
    # MONAI's own function of the spacing computes in float32, which is too coarse for a percentile.
    normals_CT3 = _get_neighbour_code_to_normals_table("cpu").numpy().astype(np.float64)
    d, h, w = spacing
    areas_C: np.ndarray = np.linalg.norm(normals_CT3 * [h * w, d * w, d * h], axis=-1).sum(axis=-1)
    return areas_C


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """The surfels of two masks, N of the first and M of the second. A mask without a surface has none."""

    areas_N: np.ndarray
    """In mm^2."""
    distances_N: np.ndarray
    """In mm to the other mask's surface; infinite if that has none, or if it lies beyond the limit."""
    areas_M: np.ndarray
    distances_M: np.ndarray

    @classmethod
    def between(
        cls, one_DHW: np.ndarray, other_DHW: np.ndarray, spacing: Sequence[float], limit: float = np.inf
    ) -> SurfaceDistances:
        """Measure the distances between the surfaces of two bool masks of one shape.

        Args:
            one_DHW: The first mask.
            other_DHW: The second mask.
            spacing: In mm along d, h, w.
            limit: Distances beyond it (mm) may be infinite; the smaller, the faster.

        Raises:
            ValueError: Both masks are empty, or their shapes differ.
        """
        if one_DHW.shape != other_DHW.shape:
            raise ValueError(f"masks of the shapes {list(one_DHW.shape)} and {list(other_DHW.shape)}")
        box = box_or_none(one_DHW | other_DHW)
        if box is None:
            raise ValueError("the surface distance of two empty masks is undefined")
        within = box_slices(box)
        one_DHW, other_DHW = np.asarray(one_DHW, bool), np.asarray(other_DHW, bool)
        step_3 = np.asarray(spacing, np.float64)
        table_C = surfel_areas((float(step_3[0]), float(step_3[1]), float(step_3[2])))
        one, other = (_codes(mask_DHW[within]) for mask_DHW in (one_DHW, other_DHW))
        on_one, on_other = (_on_surface(codes_DHW) for codes_DHW in (one, other))
        places, found = [np.flatnonzero(on_one), np.flatnonzero(on_other)], []
        for (own, towards), is_there in zip((places, places[::-1]), (on_other, on_one), strict=True):
            found.append(_distances(own, towards, is_there, step_3, limit))
        areas = [table_C[codes.reshape(-1)[own]] for codes, own in zip((one, other), places, strict=True)]
        return cls(areas[0], found[0], areas[1], found[1])

    def share_within(self, tolerance: float) -> float:
        """Return the share of both surfaces, by area, within `tolerance` mm of the other one."""
        near = self.areas_N[self.distances_N <= tolerance].sum() + self.areas_M[self.distances_M <= tolerance].sum()
        return float(near / (self.areas_N.sum() + self.areas_M.sum()))

    def percentile(self, percent: float) -> float:
        """Return the larger of both surfaces' percentiles of the distance in mm, by area; infinite if one is empty."""
        pairs = ((self.distances_N, self.areas_N), (self.distances_M, self.areas_M))
        return max(_percentile(distances, areas, percent) for distances, areas in pairs)


def _codes(mask_DHW: np.ndarray) -> np.ndarray:
    """The code of every corner, uint8 of one more than the mask's shape along each axis."""
    bits = np.pad(mask_DHW, 1).view(np.uint8)
    # Along each axis a corner joins its two neighbours, so that the first of the eight voxels is the highest bit.
    wide = (bits[:, :, :-1] << 1) | bits[:, :, 1:]
    high = (wide[:, :-1] << 2) | wide[:, 1:]
    codes_DHW: np.ndarray = (high[:-1] << 4) | high[1:]
    return codes_DHW


def _on_surface(codes_DHW: np.ndarray) -> np.ndarray:
    """Whether some, and not all, of a corner's voxels are inside."""
    on_DHW: np.ndarray = (codes_DHW + np.uint8(1)) > 1  # 255 + 1 is 0
    return on_DHW


def _distances(
    own_N: np.ndarray, towards_M: np.ndarray, is_there_DHW: np.ndarray, step_3: np.ndarray, limit: float
) -> np.ndarray:
    """Distances in mm of corners, given as flat indices, to the nearest of others."""
    shared_N = is_there_DHW.reshape(-1)[own_N]
    distances_N = np.where(shared_N, 0.0, np.inf)
    if not len(towards_M) or shared_N.all():
        return distances_N
    shape = is_there_DHW.shape
    far_K3 = np.stack(np.unravel_index(own_N[~shared_N], shape), axis=1)
    towards_M3 = np.stack(np.unravel_index(towards_M, shape), axis=1)
    # Points of a grid: splitting at medians costs more than the more even tree saves.
    tree = cKDTree(towards_M3 * step_3, balanced_tree=False, compact_nodes=False)
    _, nearest_K = tree.query(far_K3 * step_3, distance_upper_bound=limit * (1 + SLACK))
    reached_K = nearest_K < len(towards_M3)
    # From whole numbers of voxels, so that a distance that equals the tolerance does not depend on the place.
    offset_R3 = (far_K3[reached_K] - towards_M3[nearest_K[reached_K]]) * step_3
    found_K = np.full(len(far_K3), np.inf)
    found_K[reached_K] = np.sqrt((offset_R3**2).sum(axis=1))
    distances_N[~shared_N] = found_K
    return distances_N


def _percentile(distances_N: np.ndarray, areas_N: np.ndarray, percent: float) -> float:
    if not len(distances_N):
        return np.inf
    order_N = np.lexsort((areas_N, distances_N))
    areas_N = areas_N[order_N]
    share_N = np.cumsum(areas_N) / areas_N.sum()
    place = min(int(np.searchsorted(share_N, percent / 100)), len(share_N) - 1)
    return float(distances_N[order_N[place]])
