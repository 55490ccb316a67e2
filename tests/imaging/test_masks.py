"""Masks kept as the box around them equal masks of the complete array."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from segvol_pl.imaging.box import box_of, enlarged
from segvol_pl.imaging.masks import BoxedMask, LabelMap, counts_of

SHAPE = (6, 20, 24)


def regions(count: int, dtype: type = np.uint16) -> np.ndarray:
    """Blocks of `count` values, each in a few connected parts, and voxels of 0."""
    coarse_DHW = np.random.default_rng(3).integers(0, count + 1, (2, 5, 6))
    regions_DHW: np.ndarray = ndimage.zoom(coarse_DHW, (3, 4, 4), order=0).astype(dtype)
    assert regions_DHW.shape == SHAPE
    return regions_DHW


@pytest.mark.parametrize("values", [[2], [1, 5], [1, 2, 3, 4, 5], [300], []])
def test_a_cut_mask_is_that_of_a_comparison(values: list[int]) -> None:
    label_DHW = regions(8)
    labels = LabelMap(label_DHW)
    wanted_DHW = np.isin(label_DHW, values)
    mask = labels.mask(values)
    np.testing.assert_array_equal(mask.complete(), wanted_DHW)
    assert mask.box == (box_of(wanted_DHW) if wanted_DHW.any() else None)
    assert labels.holds(values) == wanted_DHW.any()


def test_a_mask_is_not_changed_by_the_next_one() -> None:
    labels = LabelMap(regions(8))
    first = labels.mask([1])
    kept_DHW = first.complete()
    labels.mask([2])
    labels.mask_near([3], (0, 0, 0, 5, 19, 23))
    np.testing.assert_array_equal(first.complete(), kept_DHW)


@pytest.mark.parametrize("values", [[1], [2, 3], [1, 2, 3, 4, 5, 6], []])
@pytest.mark.parametrize("box", [(0, 0, 0, 2, 7, 7), (1, 4, 4, 4, 15, 19), (0, 0, 0, 5, 19, 23)])
def test_a_mask_near_a_box_is_the_complete_one(values: list[int], box: tuple[int, ...]) -> None:
    label_DHW = np.zeros(SHAPE, np.uint16)
    label_DHW[0:2, 2:8, 2:8] = 1
    label_DHW[2:5, 5:16, 6:18] = 2
    label_DHW[5, 19, 23] = 3
    labels = LabelMap(label_DHW)
    found = labels.mask_near([value for value in values if value < len(labels.counts)], box)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.complete(), np.isin(label_DHW, values))


@pytest.mark.parametrize(("count", "dtype"), [(8, np.uint8), (8, np.uint16), (250, np.uint8), (40_000, np.uint16)])
def test_counts_are_numpys(count: int, dtype: type) -> None:
    label_DHW = regions(count, dtype)
    label_DHW[0, 0, 0] = count
    np.testing.assert_array_equal(counts_of(label_DHW), np.bincount(label_DHW.reshape(-1)))
    np.testing.assert_array_equal(counts_of(label_DHW[1:4, ::2]), np.bincount(label_DHW[1:4, ::2].reshape(-1)))


def test_voxels_are_drawn_from_the_mask_as_from_its_list() -> None:
    mask_DHW = np.isin(regions(8), [2, 5])
    mask = BoxedMask.of(mask_DHW)
    drawn_N3 = mask.draw(np.random.default_rng(0), 50)
    listed_N = np.random.default_rng(0).choice(np.flatnonzero(mask_DHW), size=50)
    np.testing.assert_array_equal(drawn_N3, np.stack(np.unravel_index(listed_N, SHAPE), axis=1))
    with pytest.raises(ValueError, match="empty"):
        BoxedMask.empty(SHAPE).draw(np.random.default_rng(0), 1)


def test_what_a_mask_covers_is_what_it_holds() -> None:
    mask_DHW = np.isin(regions(8), [2])
    voxels_N3 = np.stack(np.unravel_index(np.arange(mask_DHW.size), SHAPE), axis=1)
    np.testing.assert_array_equal(BoxedMask.of(mask_DHW).covers(voxels_N3), mask_DHW.reshape(-1))
    assert not BoxedMask.empty(SHAPE).covers(voxels_N3).any()


def test_a_box_is_enlarged_within_the_array() -> None:
    assert enlarged((0, 4, 10, 3, 7, 23), 0.25, SHAPE) == (0, 3, 6, 4, 8, 23)
