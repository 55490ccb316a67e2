"""The line prompt drawn from a mask: the longest diameter in an axial slice, as all pairs of voxels give it."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from segvol_pl.imaging.lines import JITTER, longest_line, recist_line
from segvol_pl.imaging.prompts import ordered_line, sample_landmarks


def length(line_23: np.ndarray, steps_2: np.ndarray) -> float:
    return float(np.linalg.norm((line_23[1] - line_23[0])[1:] * steps_2))


def by_all_pairs(mask_DHW: np.ndarray, steps_2: np.ndarray) -> tuple[float, int]:
    """The longest in-slice distance, and the first slice that has it."""
    best, at = -1.0, -1
    for depth, mask_HW in enumerate(mask_DHW):
        for one, other in combinations_with_replacement(np.argwhere(mask_HW), 2):
            apart = float(np.linalg.norm((other - one) * steps_2))
            if apart > best + 1e-9:
                best, at = apart, depth
    return best, at


MASKS = arrays(bool, array_shapes(min_dims=3, max_dims=3, max_side=7)).filter(np.any)
STEPS = st.sampled_from([(1.0, 1.0), (0.7, 1.9), (2.0, 0.5)]).map(np.array)


@given(MASKS, STEPS)
@settings(max_examples=150, deadline=None)
def test_no_two_voxels_of_a_slice_are_farther_apart(mask_DHW: np.ndarray, steps_2: np.ndarray) -> None:
    line_23 = longest_line(mask_DHW, steps_2)
    best, at = by_all_pairs(mask_DHW, steps_2)
    assert mask_DHW[tuple(line_23.T)].all() and line_23[0, 0] == line_23[1, 0] == at
    assert length(line_23, steps_2) == pytest.approx(best)


@given(MASKS, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_a_drawn_line_stays_in_its_slice_and_near_the_longest(mask_DHW: np.ndarray, seed: int) -> None:
    line_23 = recist_line(mask_DHW, np.random.default_rng(seed))
    exact_23 = ordered_line(longest_line(mask_DHW, np.ones(2)))
    assert line_23.shape == (2, 3) and line_23.dtype == np.int64 and (line_23[:, 0] == exact_23[0, 0]).all()
    assert ((line_23 >= 0) & (line_23 < mask_DHW.shape)).all()
    np.testing.assert_array_equal(ordered_line(line_23[::-1]), line_23)
    moved_23 = np.abs(line_23 - exact_23)
    assert moved_23.max() <= np.rint(JITTER * length(exact_23, np.ones(2)))


def ellipsoid(shape: tuple[int, int, int], radii: tuple[float, float, float]) -> np.ndarray:
    places = np.ogrid[tuple(slice(0, size) for size in shape)]
    away = sum(((place - size // 2) / radius) ** 2 for place, size, radius in zip(places, shape, radii, strict=True))
    mask_DHW: np.ndarray = np.asarray(away) < 1
    return mask_DHW


def test_the_ends_are_shifted_by_the_rng_alone() -> None:
    mask_DHW = ellipsoid((9, 90, 90), (4, 42, 20))
    drawn = [recist_line(mask_DHW, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2]) and drawn[0][0, 0] == 4
    assert length(drawn[0], np.ones(2)) == pytest.approx(82, rel=2.5 * JITTER)


def test_the_longest_is_measured_in_mm_if_the_spacing_is_known() -> None:
    mask_DHW = np.zeros((3, 20, 20), bool)
    mask_DHW[1, 3:15, 5] = mask_DHW[2, 4, 2:12] = True
    for spacing, expected in ((None, 1), ((9.0, 1.0, 1.0), 1), ((9.0, 1.0, 2.0), 2)):
        assert recist_line(mask_DHW, np.random.default_rng(0), spacing)[0, 0] == expected
        assert sample_landmarks("line", mask_DHW, np.random.default_rng(0), spacing)[0, 0] == expected


def test_one_voxel_is_both_ends_and_nothing_has_none() -> None:
    mask_DHW = np.zeros((3, 4, 5), bool)
    with pytest.raises(ValueError, match="an empty mask has no box"):
        recist_line(mask_DHW, np.random.default_rng(0))
    mask_DHW[1, 2, 3] = True
    assert recist_line(mask_DHW, np.random.default_rng(0)).tolist() == [[1, 2, 3], [1, 2, 3]]
