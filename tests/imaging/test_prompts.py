"""Prompts: what is drawn from a mask lies where it should; what is malformed is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.imaging.box import box_of
from segvol_pl.imaging.prompts import Prompt, jitter_box, sample_points

RNG = np.random.default_rng(0)


def _mask() -> np.ndarray:
    mask = np.zeros((6, 9, 7), dtype=bool)
    mask[1:4, 2:8, 3:5] = True
    return mask


def test_points_lie_inside_and_outside() -> None:
    points, labels = sample_points(_mask(), RNG, positive=5, negative=7)
    assert points.shape == (12, 3) and list(labels) == [1] * 5 + [0] * 7
    assert np.array_equal(_mask()[tuple(points.T)], labels == 1)


def test_a_mask_without_outside_gets_no_negative_points() -> None:
    points, labels = sample_points(np.ones((2, 2, 2), dtype=bool), RNG, positive=2, negative=3)
    assert len(points) == 2 and set(labels) == {1}


def test_a_nearly_full_mask_still_gets_its_negative_points() -> None:
    mask = np.ones((20, 20, 20), dtype=bool)
    mask[0, 0, 0] = False
    points, labels = sample_points(mask, RNG, positive=1, negative=4)
    assert (points[1:] == 0).all() and list(labels) == [1, 0, 0, 0, 0]


def test_an_empty_mask_has_neither_points_nor_box() -> None:
    empty = np.zeros((2, 2, 2), dtype=bool)
    with pytest.raises(ValueError, match="empty mask"):
        sample_points(empty, RNG, 1, 0)
    with pytest.raises(ValueError, match="empty mask"):
        box_of(empty)


def test_boxes_include_their_maximum() -> None:
    assert box_of(_mask()) == (1, 2, 3, 3, 7, 4)


@given(st.integers(0, 10_000), st.floats(0, 0.49))
@settings(max_examples=100, deadline=None)
def test_jittered_boxes_stay_boxes_inside_the_volume(seed: int, share: float) -> None:
    box = jitter_box((1, 2, 3, 3, 7, 4), (6, 9, 7), share, np.random.default_rng(seed))
    assert all(0 <= low <= high < size for low, high, size in zip(box[:3], box[3:], (6, 9, 7), strict=True))
    assert share > 0 or box == (1, 2, 3, 3, 7, 4)


@pytest.mark.parametrize(
    ("given_parts", "message"),
    [
        ({}, "at least one of"),
        ({"box": (3, 0, 0, 1, 2, 2)}, "inverted"),
        ({"box": (0, 0, 0, 1, 2)}, "6 numbers"),
        ({"points_N3": np.zeros((0, 3)), "labels_N": np.zeros(0)}, "shape"),
        ({"points_N3": np.zeros((2, 3)), "labels_N": np.zeros(1)}, "one label each"),
    ],
)
def test_malformed_prompts_are_refused(given_parts: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(**given_parts)  # type: ignore[arg-type]
