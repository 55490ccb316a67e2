"""Felzenszwalb-Huttenlocher regions: the published partition, its tie order, and the cleaning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segvol_pl.config import RegionsConfig
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.intensity import intensity_of, normalise
from segvol_pl.imaging.transforms import resize_image, resize_label
from segvol_pl.packing.phantom import make_phantom
from segvol_pl.packing.phantom_anatomy import VALUE
from segvol_pl.packing.regions import clean, felzenszwalb, overlay, pseudo_regions

STEPS = [(0, 1, 0), (1, 0, 0), (1, 1, 0), (1, -1, 0), (0, 0, 1)]
OVERVIEW_SHAPE = (16, 64, 64)


def _slow_edges(volume: np.ndarray) -> list[tuple[float, int, int, int]]:
    """(cost, family, far voxel, near voxel), cheapest first, ties by family, then voxel."""
    edges = []
    for family, step in enumerate(STEPS):
        for far in np.ndindex(volume.shape):
            near = tuple(f - s for f, s in zip(far, step, strict=True))
            if all(0 <= n < size for n, size in zip(near, volume.shape, strict=True)):
                cost = float(abs(volume[far] - volume[near]))
                far_voxel, near_voxel = (int(np.ravel_multi_index(place, volume.shape)) for place in (far, near))
                edges.append((cost, family, far_voxel, near_voxel))
    return sorted(edges)


def _slow_felzenszwalb(volume: np.ndarray, sigma: float, min_size: int) -> np.ndarray:
    """The same partition, by sets of voxels and no cleverness."""
    edges = _slow_edges(ndimage.gaussian_filter(volume, sigma))
    costs = np.array([edge[0] for edge in edges])
    if not costs.any():
        return np.zeros(volume.shape, dtype=int)
    threshold = np.percentile(costs[costs != 0], 25)
    region = {voxel: {voxel} for voxel in range(volume.size)}
    for merging_small in (False, True):
        for cost, _, far, near in edges:
            one, other = region[far], region[near]
            small = len(one) < min_size or len(other) < min_size
            if one is not other and (small if merging_small else cost < threshold):
                joined = one | other
                region.update(dict.fromkeys(joined, joined))
    firsts = np.array([min(region[voxel]) for voxel in range(volume.size)])
    return np.unique(firsts, return_inverse=True)[1].reshape(volume.shape)


def _slow_clean(regions_DHW: np.ndarray, min_fraction: float) -> np.ndarray:
    """The published cleaning, over the whole volume with scipy's morphology."""
    least = min_fraction * regions_DHW.size
    cleaned_DHW = regions_DHW.copy()
    for region in np.unique(regions_DHW):
        if (regions_DHW == region).sum() < least:
            cleaned_DHW[cleaned_DHW == region] = 0
    for region in np.unique(cleaned_DHW[cleaned_DHW > 0]):
        before_DHW = cleaned_DHW == region
        after_DHW = ndimage.binary_closing(ndimage.binary_opening(before_DHW))
        parts_DHW, count = ndimage.label(after_DHW)
        for part in range(1, count + 1):
            if (parts_DHW == part).sum() < least:
                after_DHW[parts_DHW == part] = False
        cleaned_DHW[before_DHW] = 0
        cleaned_DHW[after_DHW] = region
    return cleaned_DHW


@pytest.mark.parametrize("case", [0, 1])
def test_equals_the_published_partition(shared: Path, case: int) -> None:
    with np.load(shared / "reference" / "felzenszwalb.npz") as reference:
        image, regions = reference[f"image{case}"], reference[f"regions{case}"]
        min_size = int(reference[f"min_size{case}"])
    found = felzenszwalb(image, sigma=0.8, min_size=min_size)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, regions)


def _golden_volume() -> np.ndarray:
    """Eight blocks of different mean under noise."""
    rng = np.random.Generator(np.random.PCG64(3))
    means = np.kron(rng.permutation(8).reshape(2, 2, 2), np.ones((8, 10, 6)))
    return (means + 1.5 * rng.random(means.shape)).astype(np.float32)


def test_golden_partition() -> None:
    found = felzenszwalb(_golden_volume(), sigma=0.8, min_size=80)
    assert np.bincount(found.ravel()).tolist() == [432, 432, 144, 504, 360, 144, 552, 438, 474, 360]
    assert found[::5, ::6, 4].tolist() == [[0, 0, 4, 4], [0, 0, 4, 4], [8, 8, 3, 3], [8, 8, 3, 3]]


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5)),
    levels=st.sampled_from([2, 5, 30, 10**6]),
    sigma=st.sampled_from([0.0, 0.8]),
    min_size=st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_equals_an_independent_implementation_ties_included(
    seed: int, shape: tuple[int, int, int], levels: int, sigma: float, min_size: int
) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    volume = (rng.integers(levels, size=shape) / levels).astype(np.float32)
    np.testing.assert_array_equal(felzenszwalb(volume, sigma, min_size), _slow_felzenszwalb(volume, sigma, min_size))


def test_equals_an_independent_implementation_where_regions_remain() -> None:
    volume = _golden_volume()[4:12, 5:15, 3:9]
    found = felzenszwalb(volume, 0.8, 20)
    assert found.max() >= 4
    np.testing.assert_array_equal(found, _slow_felzenszwalb(volume, 0.8, 20))


def test_axes_say_which_plane_has_diagonals() -> None:
    volume = _golden_volume()
    turned = felzenszwalb(np.ascontiguousarray(volume.transpose(2, 1, 0)), 0.8, 80, axes=(2, 1, 0))
    np.testing.assert_array_equal(turned.transpose(2, 1, 0), felzenszwalb(volume, 0.8, 80))
    moved = felzenszwalb(np.ascontiguousarray(volume.transpose(1, 2, 0)), 0.8, 80, axes=(2, 0, 1))
    np.testing.assert_array_equal(moved.transpose(2, 0, 1), felzenszwalb(volume, 0.8, 80))


def test_no_region_is_under_the_minimum_and_each_is_connected() -> None:
    found = felzenszwalb(_golden_volume(), 0.8, 80)
    assert np.bincount(found.ravel()).min() >= 80
    for region in range(found.max() + 1):
        assert ndimage.label(found == region, structure=np.ones((3, 3, 3)))[1] == 1


def test_is_deterministic() -> None:
    np.testing.assert_array_equal(felzenszwalb(_golden_volume()), felzenszwalb(_golden_volume()))


def test_a_constant_volume_is_one_region() -> None:
    assert felzenszwalb(np.full((4, 5, 6), 0.3, dtype=np.float32)).max() == 0


@pytest.mark.parametrize(
    ("volume", "problem"),
    [
        (np.zeros((4, 5), dtype=np.float32), "three axes"),
        (np.full((4, 5, 6), np.nan, dtype=np.float32), "NaN"),
        (np.broadcast_to(np.float32(0), (1000, 1000, 1000)), "too large"),
    ],
)
def test_bad_volumes_are_named(volume: np.ndarray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        felzenszwalb(volume)


def _blobs(seed: int) -> np.ndarray:
    noise = np.random.Generator(np.random.PCG64(seed)).random((14, 18, 16), dtype=np.float32)
    levels = np.quantile(smooth := ndimage.gaussian_filter(noise, 1.5), [0.2, 0.4, 0.6, 0.8])
    return ndimage.label(np.ones_like(smooth))[0] + np.digitize(smooth, levels).astype(np.int32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_fraction", [0.0, 0.01, 0.25])
def test_cleaning_equals_the_published_recipe(seed: int, min_fraction: float) -> None:
    regions_DHW = _blobs(seed)
    before_DHW = regions_DHW.copy()
    cleaned_DHW = clean(regions_DHW, min_fraction)
    np.testing.assert_array_equal(cleaned_DHW, _slow_clean(regions_DHW, min_fraction))
    np.testing.assert_array_equal(regions_DHW, before_DHW)
    assert set(np.unique(cleaned_DHW)) <= set(np.unique(regions_DHW)) | {0}


def test_cleaning_drops_small_regions_and_small_parts() -> None:
    regions_DHW = np.zeros((12, 24, 24), dtype=np.int32)
    regions_DHW[2:10, 2:10, 2:10] = 1  # large
    regions_DHW[4:7, 14:17, 4:7] = 1  # a small part of it
    regions_DHW[4:7, 18:21, 18:21] = 2  # small
    cleaned_DHW = clean(regions_DHW, 0.01)
    assert cleaned_DHW[5, 5, 5] == 1
    assert not cleaned_DHW[:, 12:].any()


def test_overlay_gives_each_label_value_a_new_region() -> None:
    regions_DHW = np.arange(1, 9, dtype=np.int32).reshape(2, 2, 2)
    label_DHW = np.array([0, 9, 9, 0, 0, 5, 0, 0], dtype=np.uint8).reshape(2, 2, 2)
    assert overlay(regions_DHW, label_DHW).ravel().tolist() == [1, 10, 10, 4, 5, 9, 7, 8]
    with pytest.raises(ValueError, match="label has shape"):
        overlay(regions_DHW, label_DHW[:1])


@pytest.fixture(scope="module")
def overview() -> tuple[np.ndarray, np.ndarray]:
    phantom = make_phantom(2, scale=0.6)
    image_DHW = normalise(phantom.hu_DHW, intensity_of(phantom.hu_DHW))
    return resize_image(image_DHW, OVERVIEW_SHAPE), resize_label(phantom.label_DHW, OVERVIEW_SHAPE)


def test_pseudo_regions_are_numbered_without_gaps(overview: tuple[np.ndarray, np.ndarray]) -> None:
    image_DHW, label_DHW = overview
    for label in (None, label_DHW):
        regions_DHW = pseudo_regions(image_DHW, label, RegionsConfig())
        assert regions_DHW.dtype == np.uint16 and regions_DHW.shape == OVERVIEW_SHAPE
        count = int(regions_DHW.max())
        assert count >= 4
        assert np.unique(regions_DHW[regions_DHW > 0]).tolist() == list(range(1, count + 1))
        sizes = np.bincount(regions_DHW.ravel())[1:]
        # A later neighbour's closing may still nibble at a region that was large enough when it was cleaned.
        assert sizes.min() >= 0.9 * RegionsConfig().min_fraction * regions_DHW.size


def test_pseudo_regions_are_parts_of_one_source_each(overview: tuple[np.ndarray, np.ndarray]) -> None:
    image_DHW, label_DHW = overview
    config = RegionsConfig()
    min_size = round(config.min_size * image_DHW.size / (32 * 256 * 256))
    sources_DHW = overlay(felzenszwalb(image_DHW, config.sigma, min_size, axes=(2, 1, 0)) + 1, label_DHW)
    regions_DHW = pseudo_regions(image_DHW, label_DHW, config)
    owners = []
    for region in range(1, int(regions_DHW.max()) + 1):
        ids, counts = np.unique(sources_DHW[regions_DHW == region], return_counts=True)
        assert counts.max() / counts.sum() > 0.6
        owners.append(int(ids[counts.argmax()]))
    assert owners == sorted(set(owners))


def test_a_labelled_organ_is_one_region(overview: tuple[np.ndarray, np.ndarray]) -> None:
    image_DHW, label_DHW = overview
    regions_DHW = pseudo_regions(image_DHW, label_DHW, RegionsConfig())
    lung_DHW = label_DHW == VALUE["lung right"]
    inside = np.bincount(regions_DHW[lung_DHW])
    region = int(inside[1:].argmax()) + 1
    assert inside[region] > 0.8 * lung_DHW.sum()
    assert inside[region] > 0.8 * (regions_DHW == region).sum()


@pytest.mark.parametrize("wrong", [{"min_fraction": 1e-6}, {"min_fraction": 1.0}, {"min_size": 0}, {"sigma": -1.0}])
def test_settings_out_of_range_name_their_key(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"regions.{next(iter(wrong))}"):
        RegionsConfig(**wrong)  # type: ignore[arg-type]
