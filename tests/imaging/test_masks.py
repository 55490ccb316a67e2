"""Masks kept as the box around them equal masks of the complete array."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.masks import BoxedMask, Extents, LabelMap

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
    np.testing.assert_array_equal(first.complete(), kept_DHW)


def boxes(count: int) -> list[Box]:
    """Random boxes in an array of `SHAPE`."""
    rng = np.random.default_rng(5)
    d, h, w = (np.sort(rng.integers(0, size, (count, 2)), axis=1) for size in SHAPE)
    return [tuple(int(at) for at in (*low, *high)) for low, high in np.stack([d, h, w], axis=2)]  # type: ignore[misc]


def test_values_mostly_in_a_box_are_those_counted_there() -> None:
    label_DHW = regions(40)
    labels = LabelMap(label_DHW)
    found = []
    for box in [(0, 0, 0, 5, 19, 23), *boxes(60)]:
        inside_V = np.bincount(label_DHW[box_slices(box)].reshape(-1), minlength=len(labels.counts))
        for share in (0.0, 0.5, 0.9):
            wanted = [value for value in range(1, len(inside_V)) if inside_V[value] > share * labels.counts[value]]
            assert labels.mostly_in(box, share) == wanted
            found.append(len(wanted))
    assert 0 in found and max(found) > 5


def label_maps() -> dict[str, np.ndarray]:
    """Label maps of both types: of few and of many values, in blocks and as noise, of one value, of other shapes."""
    rng = np.random.default_rng(4)
    return {
        "few uint8": regions(8, np.uint8),
        "few uint16": regions(8),
        "noise of all uint8": rng.integers(0, 256, SHAPE, np.uint8),
        "noise of all uint16": rng.integers(0, 1 << 16, SHAPE, np.uint16),
        "largest uint16": np.full(SHAPE, np.iinfo(np.uint16).max, np.uint16),
        "zeros": np.zeros(SHAPE, np.uint8),
        "no voxel": np.zeros((0, 3, 4), np.uint8),
        "one voxel": np.full((1, 1, 1), 3, np.uint8),
        "one column": rng.integers(0, 3, (5, 7, 1), np.uint16),
        "one row": rng.integers(0, 3, (1, 1, 9), np.uint8),
        "every second": regions(8)[1:4, ::2, ::-1],
        "axes in another order": regions(8).transpose(2, 0, 1),
    }


@pytest.mark.parametrize("name", label_maps())
def test_counts_boxes_and_masks_of_all_values_are_numpys(name: str) -> None:
    label_DHW = label_maps()[name]
    labels = LabelMap(label_DHW)
    counts_V = np.bincount(label_DHW.reshape(-1))
    np.testing.assert_array_equal(labels.counts, counts_V)
    extents = Extents.of(np.ascontiguousarray(label_DHW))
    assert (extents.low_3V > extents.high_3V).all(axis=0).tolist() == (counts_V == 0).tolist()
    for value in np.unique(label_DHW)[:300].tolist():
        wanted_DHW = label_DHW == value
        mask = labels.mask([value])
        assert mask.box == box_of(wanted_DHW) == (*extents.low_3V[:, value], *extents.high_3V[:, value])
        np.testing.assert_array_equal(mask.complete(), wanted_DHW)


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
