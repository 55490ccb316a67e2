"""Pseudo-label regions: 3-D Felzenszwalb-Huttenlocher (FH) and its cleaning (paper Sec. 2.2, "pseudo mask").

1. The volume is smoothed. Edges between neighbouring voxels cost the absolute difference of the two.
2. Every edge that costs less than the 25th percentile of the non-zero costs joins its two regions.
3. The other edges, cheapest first, join their two regions if one of them has fewer than `min_size` voxels.
4. `pseudo_regions` puts the ground truth over the regions, drops small regions, and smooths the others.

Step 3 is Kruskal's algorithm, stopped early. It runs over intervals of cost: only edges that still have a small region
at one end are listed and sorted, so the full list of five edges per voxel is never in memory.

Order of ties: edges of equal cost are taken family by family in the order of `FAMILIES`, within a family by the
index of the voxel. The published code does not define the order of ties.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy import ndimage

from segvol_pl.config import RegionsConfig

FAMILIES = np.array([(0, 1, 0), (1, 0, 0), (1, 1, 0), (1, -1, 0), (0, 0, 1)], dtype=np.int64)
"""Steps along the first, second and third axis from one end of an edge to the other: four in the plane, one across."""

JOINED_SHARE = 0.25
"""Share of the edges of non-zero cost that join their voxels in step 2."""

REFERENCE_VOXELS = 32 * 256 * 256
"""Voxels of the volume that `RegionsConfig.min_size` refers to."""

# Costs are binned by the upper 16 bits of their float32 pattern, which orders as non-negative floats do.
# Bin 0 holds exact zeros; bin b > 0 the patterns above (b - 1) << 16 up to and including b << 16.
BIN_BITS = 16
BIN_FILL = (1 << BIN_BITS) - 1
BINS = (1 << (31 - BIN_BITS)) + 1
EDGE_BITS = np.uint64(32)
EDGE_MASK = np.uint64((1 << 32) - 1)

Shape = tuple[int, int, int]


def felzenszwalb(
    volume_DHW: np.ndarray, sigma: float = 0.8, min_size: int = 1000, axes: tuple[int, int, int] = (0, 1, 2)
) -> np.ndarray:
    """Compute the published FH partition of a volume. Deterministic; needs under 40 bytes per voxel of memory.

    The algorithm has diagonal neighbours in one plane only, so the order of the axes matters. The published code's
    volumes have their slices last: (2, 1, 0) gives its result for an array in D,H,W order.

    Args:
        volume_DHW: Finite numbers.
        sigma: Standard deviation of the smoothing, in voxels.
        min_size: Regions with fewer voxels are merged into a neighbour.
        axes: The axes of the volume that are the first and second of the plane, and the one across it.

    Returns:
        int32 regions of the volume's shape, 0..n-1, numbered by their first voxel in the order of `axes`. A constant
        volume is one region.

    Raises:
        ValueError: The volume is not 3-D, not finite, or has 2**32 / 5 voxels or more.
    """
    if volume_DHW.ndim != 3:
        raise ValueError(f"volume has shape {volume_DHW.shape}, expected three axes")
    if volume_DHW.size * len(FAMILIES) >= 1 << 32:
        raise ValueError(f"volume of shape {volume_DHW.shape} is too large for 32-bit edges: resize it first")
    volume = np.ascontiguousarray(volume_DHW.transpose(axes), dtype=np.float32)
    if not np.isfinite(volume).all():
        raise ValueError("volume holds NaN or infinite voxels: replace them first")
    regions = _partition(ndimage.gaussian_filter(volume, sigma=sigma), min_size)
    return np.ascontiguousarray(regions.reshape(volume.shape).transpose(np.argsort(axes)))


def _partition(smooth: np.ndarray, min_size: int) -> np.ndarray:
    """Return the region of each voxel (flat, int32) of the smoothed volume, whose axes are in the published order."""
    shape, flat = smooth.shape, smooth.ravel()
    counts = _histogram(flat, shape)
    if counts[1:].sum() == 0:
        return np.zeros(flat.size, dtype=np.int32)
    first_bin, threshold = _threshold(flat, shape, counts)
    parent = _join_cheap(flat, shape, threshold)
    _flatten(parent)
    _merge_small(flat, shape, parent, _sizes(parent), min_size, counts, first_bin)
    return _numbered(parent)


def _threshold(flat: np.ndarray, shape: Shape, counts: np.ndarray) -> tuple[int, float]:
    """Return the bin of the percentile of the non-zero costs, and the percentile, interpolated as numpy does."""
    ends = np.cumsum(counts)
    rank = JOINED_SHARE * (ends[-1] - ends[0] - 1)
    below = int(ends[0]) + int(rank)
    above = min(below + 1, int(ends[-1]) - 1)
    first, last = (int(np.searchsorted(ends, position, side="right")) for position in (below, above))
    costs = np.sort(_costs_between(flat, shape, first, last, int(counts[first : last + 1].sum())))
    start = int(ends[first - 1])
    low, high = float(costs[below - start]), float(costs[above - start])
    return first, low + (high - low) * (rank % 1)


def _merge_small(
    flat: np.ndarray,
    shape: Shape,
    parent: np.ndarray,
    size: np.ndarray,
    min_size: int,
    counts: np.ndarray,
    first_bin: int,
) -> None:
    """Step 3, in place, over intervals of cost with at most one edge per voxel (or one bin, if that has more)."""
    ends = np.cumsum(counts)
    while first_bin < BINS and ends[first_bin - 1] < ends[-1]:
        room = ends[first_bin - 1] + flat.size
        stop_bin = max(first_bin + 1, int(np.searchsorted(ends, room, side="right")))
        capacity = int(ends[stop_bin - 1] - ends[first_bin - 1])
        keys = _edges_between(flat, shape, parent, size, min_size, first_bin, stop_bin - 1, capacity)
        keys.sort()
        _merge(keys, shape, parent, size, min_size)
        _flatten(parent)
        first_bin = stop_bin


def _numbered(parent: np.ndarray) -> np.ndarray:
    """Number the regions 0..n-1 in the order of their roots, which are their first voxels."""
    roots = np.flatnonzero(parent == np.arange(parent.size, dtype=parent.dtype))
    number = np.zeros(parent.size, dtype=np.int32)
    number[roots] = np.arange(roots.size, dtype=np.int32)
    numbers: np.ndarray = number[parent]
    return numbers


@njit(cache=True)
def _row(family: int, x: int, y: int, shape: Shape) -> tuple[int, int, int]:
    """Return a family's edges along a row: first far end, one past the last far end, and the step to the near end."""
    dx, dy, dz = FAMILIES[family]
    back = (dx * shape[1] + dy) * shape[2] + dz
    if x < dx or y < dy or y - dy >= shape[1]:
        return 0, 0, back
    start = (x * shape[1] + y) * shape[2]
    return start + dz, start + shape[2], back


@njit(cache=True)
def _cost_bits(flat: np.ndarray, far: int, near: int) -> np.int32:
    return np.float32(abs(flat[far] - flat[near])).view(np.int32)


@njit(cache=True)
def _histogram(flat: np.ndarray, shape: Shape) -> np.ndarray:
    """Count the edges by cost: int64 (BINS,)."""
    counts = np.zeros(BINS, dtype=np.int64)
    for x in range(shape[0]):
        for y in range(shape[1]):
            for family in range(len(FAMILIES)):
                start, stop, back = _row(family, x, y, shape)
                for far in range(start, stop):
                    counts[(_cost_bits(flat, far, far - back) + BIN_FILL) >> BIN_BITS] += 1
    return counts


@njit(cache=True)
def _costs_between(flat: np.ndarray, shape: Shape, first: int, last: int, count: int) -> np.ndarray:
    """Return the `count` costs in bins `first` to `last`, unordered, float32."""
    costs = np.empty(count, dtype=np.float32)
    found = 0
    for x in range(shape[0]):
        for y in range(shape[1]):
            for family in range(len(FAMILIES)):
                start, stop, back = _row(family, x, y, shape)
                for far in range(start, stop):
                    bits = _cost_bits(flat, far, far - back)
                    if first <= (bits + BIN_FILL) >> BIN_BITS <= last:
                        costs[found] = abs(flat[far] - flat[far - back])
                        found += 1
    return costs


@njit(cache=True)
def _root(parent: np.ndarray, voxel: np.integer | int) -> np.integer | int:
    while parent[voxel] != voxel:
        parent[voxel] = parent[parent[voxel]]
        voxel = parent[voxel]
    return voxel


@njit(cache=True)
def _join_cheap(flat: np.ndarray, shape: Shape, threshold: float) -> np.ndarray:
    """Step 2: return the parent of each voxel, int32. The order of the edges does not matter here."""
    parent = np.arange(flat.size).astype(np.int32)
    for x in range(shape[0]):
        for y in range(shape[1]):
            for family in range(len(FAMILIES)):
                start, stop, back = _row(family, x, y, shape)
                for far in range(start, stop):
                    if abs(flat[far] - flat[far - back]) < threshold:
                        one, other = _root(parent, far), _root(parent, far - back)
                        parent[max(one, other)] = min(one, other)
    return parent


@njit(cache=True)
def _flatten(parent: np.ndarray) -> None:
    # A parent never has the higher index, so it is already flat when its children are reached.
    for voxel in range(parent.size):
        parent[voxel] = parent[parent[voxel]]


@njit(cache=True)
def _sizes(parent: np.ndarray) -> np.ndarray:
    """Count the voxels of each region, int32, at its root."""
    size = np.zeros(parent.size, dtype=np.int32)
    for voxel in range(parent.size):
        size[parent[voxel]] += 1
    return size


@njit(cache=True)
def _edges_between(
    flat: np.ndarray,
    shape: Shape,
    parent: np.ndarray,
    size: np.ndarray,
    min_size: int,
    first: int,
    last: int,
    capacity: int,
) -> np.ndarray:
    """Return the edges in these bins that may still join regions, uint64: cost in the upper half, edge number below."""
    keys = np.empty(capacity, dtype=np.uint64)
    found = 0
    for x in range(shape[0]):
        for y in range(shape[1]):
            for family in range(len(FAMILIES)):
                start, stop, back = _row(family, x, y, shape)
                for far in range(start, stop):
                    one, other = parent[far], parent[far - back]
                    if one == other:
                        continue
                    bits = _cost_bits(flat, far, far - back)
                    within = first <= (bits + BIN_FILL) >> BIN_BITS <= last
                    if within and (size[one] < min_size or size[other] < min_size):
                        keys[found] = (np.uint64(bits) << EDGE_BITS) | np.uint64(family * flat.size + far)
                        found += 1
    return keys[:found]


@njit(cache=True)
def _merge(keys: np.ndarray, shape: Shape, parent: np.ndarray, size: np.ndarray, min_size: int) -> None:
    """Join, in the order of the keys, the regions at the ends of each edge if one of them is small."""
    for key in keys:
        edge = np.int64(key & EDGE_MASK)
        family = edge // parent.size
        far = edge - family * parent.size
        dx, dy, dz = FAMILIES[family]
        one = _root(parent, far)
        other = _root(parent, far - ((dx * shape[1] + dy) * shape[2] + dz))
        if one != other and (size[one] < min_size or size[other] < min_size):
            kept, gone = min(one, other), max(one, other)
            parent[gone] = kept
            size[kept] += size[gone]


def pseudo_regions(overview_DHW: np.ndarray, label_DHW: np.ndarray | None, config: RegionsConfig) -> np.ndarray:
    """Make the cleaned pseudo-label regions of a volume at the model's input size.

    Every region is part of one FH region or of one label value, plus what its closing fills.

    Args:
        overview_DHW: float32 in [0, 1], axes superior, anterior, right.
        label_DHW: Label values, or None. Each value but 0 becomes a region and takes its voxels from the others, as
            published.
        config: Its `min_size` is scaled to the volume's voxels: a smaller overview keeps regions of the same extent.

    Returns:
        uint16 (D,H,W): regions 1..n, 0 = none.

    Raises:
        ValueError: The shapes differ, or `felzenszwalb` refuses the volume.
    """
    min_size = max(1, round(config.min_size * overview_DHW.size / REFERENCE_VOXELS))
    regions_DHW = felzenszwalb(overview_DHW, config.sigma, min_size, axes=(2, 1, 0)) + np.int32(1)
    if label_DHW is not None:
        regions_DHW = overlay(regions_DHW, label_DHW)
    cleaned_DHW = clean(regions_DHW, config.min_fraction)
    # 16 bits are enough: with the least min_fraction that the configuration allows, there are at most 50,000 regions.
    labels: np.ndarray = _consecutive(cleaned_DHW).astype(np.uint16)[cleaned_DHW]
    return labels


def _consecutive(ids_DHW: np.ndarray) -> np.ndarray:
    """Return a table from id to 1..n in the order of the ids present; 0 stays 0."""
    present = np.bincount(ids_DHW.ravel()) > 0
    present[0] = False
    return np.where(present, np.cumsum(present), 0)


def overlay(regions_DHW: np.ndarray, label_DHW: np.ndarray) -> np.ndarray:
    """Return a copy of the regions in which each label value but 0 is a region with a new id above the highest.

    Raises ValueError if the shapes differ.
    """
    if regions_DHW.shape != label_DHW.shape:
        raise ValueError(f"label has shape {label_DHW.shape}, the regions {regions_DHW.shape}")
    new_ids = (_consecutive(label_DHW) + regions_DHW.max()).astype(regions_DHW.dtype)
    return np.where(label_DHW != 0, new_ids[label_DHW], regions_DHW)


def clean(regions_DHW: np.ndarray, min_fraction: float) -> np.ndarray:
    """Clean the regions as published: return a copy in which small regions, rough edges and small parts are 0.

    Regions (ids > 0) with less than `min_fraction` of the voxels are dropped. Then each region, in ascending order of
    id, is opened and closed by the 3-D cross, and its connected parts below `min_fraction` are dropped; a region takes
    what its closing fills from its neighbours. As published, voxels outside the volume count as empty, so regions lose
    their voxels on the volume's faces.
    """
    least = min_fraction * regions_DHW.size
    counts = np.bincount(regions_DHW.ravel())
    kept = counts >= least
    kept[0] = False
    cleaned_DHW = np.where(kept[regions_DHW], regions_DHW, 0)
    for region, box in enumerate(ndimage.find_objects(cleaned_DHW), start=1):
        if box is not None:
            _clean_region(cleaned_DHW[_widened(box, cleaned_DHW.shape)], region, least)
    return cleaned_DHW


def _widened(box: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the box and one voxel around it, as far as a dilation reaches, within the volume."""
    return tuple(slice(max(s.start - 1, 0), min(s.stop + 1, size)) for s, size in zip(box, shape, strict=True))


def _clean_region(regions_DHW: np.ndarray, region: int, least: float) -> None:
    """Clean one region in place, in a window that holds it."""
    before_DHW = regions_DHW == region
    after_DHW = _erode(_dilate(_dilate(_erode(before_DHW))))
    parts_DHW, count = ndimage.label(after_DHW)
    if count:
        large = np.bincount(parts_DHW.ravel()) >= least
        large[0] = False
        after_DHW = large[parts_DHW]
    regions_DHW[before_DHW] = 0
    regions_DHW[after_DHW] = region


def _erode(mask_DHW: np.ndarray) -> np.ndarray:
    """Erode by the 3-D cross; voxels outside the array count as empty. Faster than ndimage.binary_erosion."""
    return ~_dilate(~mask_DHW, outside=True)


def _dilate(mask_DHW: np.ndarray, outside: bool = False) -> np.ndarray:
    grown_DHW = mask_DHW.copy()
    for axis in range(3):
        grown, mask = grown_DHW.swapaxes(0, axis), mask_DHW.swapaxes(0, axis)
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        if outside:
            grown[[0, -1]] = True
    return grown_DHW
