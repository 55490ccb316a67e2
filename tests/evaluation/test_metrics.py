"""Scores against libraries and by hand, and their spread over cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_surface_dice
from scipy import ndimage

from segvol_pl.evaluation.metrics import Scores, Stats, dice, macro_interval, score, surface_dice, volume_error

SPACINGS = ((1.0, 1.0, 1.0), (2.5, 1.0, 0.7))


def blob(seed: int, level: float) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(12, 18, 15))
    return ndimage.gaussian_filter(noise, 2) > level


def test_dice() -> None:
    one, other = np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    one[0], other[:, 0] = True, True
    assert dice(one, other) == pytest.approx(2 * 4 / (12 + 8))
    assert dice(one, np.zeros_like(one)) == 0.0 and dice(one, one) == 1.0
    with pytest.raises(ValueError, match="undefined"):
        dice(np.zeros_like(one), np.zeros_like(one))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 999), st.sampled_from([0.4, 1.0, 1.5, 2.0, 3.7]), st.sampled_from([(1.0, 1.0, 1.0), (2.5, 1.0, 0.7)])
)
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*")
def test_the_surface_dice_is_monais(seed: int, tolerance: float, spacing: tuple[float, float, float]) -> None:
    predicted_DHW, truth_DHW = blob(seed, 0.0), blob(seed + 1, 0.02)
    tensors = [torch.from_numpy(mask_DHW)[None, None] for mask_DHW in (predicted_DHW, truth_DHW)]
    expected = compute_surface_dice(*tensors, [tolerance], include_background=True, spacing=list(spacing))
    assert surface_dice(predicted_DHW, truth_DHW, spacing, tolerance) == pytest.approx(expected.item(), abs=1e-6)


def test_a_surface_moved_by_the_tolerance_is_within_it() -> None:
    truth_DHW = np.zeros((20, 20, 20), bool)
    truth_DHW[5:12, 5:12, 5:12] = True
    moved_DHW = np.roll(truth_DHW, 1, axis=0)
    assert surface_dice(moved_DHW, truth_DHW, (3.0, 1.0, 1.0), 3.0) == 1.0
    assert surface_dice(moved_DHW, truth_DHW, (3.0, 1.0, 1.0), 2.9) < 1.0
    assert surface_dice(np.zeros_like(truth_DHW), truth_DHW, (1, 1, 1), 2.0) == 0.0


def test_scores_that_do_not_exist_are_none() -> None:
    truth_DHW = blob(0, 0.05)
    nothing_DHW = np.zeros_like(truth_DHW)
    assert score(truth_DHW, nothing_DHW, (1, 1, 1), 2.0) == Scores(None, None, None)
    assert score(truth_DHW, truth_DHW, None, 2.0) == Scores(1.0, None, 0.0)
    assert score(nothing_DHW, truth_DHW, (1, 1, 1), 2.0) == Scores(0.0, 0.0, -1.0)
    twice_DHW = np.zeros_like(truth_DHW)
    twice_DHW.reshape(-1)[: 2 * truth_DHW.sum()] = True
    assert volume_error(twice_DHW, truth_DHW) == 1.0


def test_spread() -> None:
    spread = Stats.of([0.2, 0.4, 0.9], [0])
    assert spread is not None and spread.n == 3
    figures = (spread.mean, spread.q1, spread.median, spread.q3)
    assert figures == pytest.approx((0.5, 0.3, 0.4, 0.65))
    assert spread == Stats.of([0.2, 0.4, 0.9], [0]) and Stats.of([], [0]) is None
    alone = Stats.of([0.7], [0])
    assert alone is not None and alone.mean == 0.7 and alone.mean_interval is None and alone.median_interval is None


def test_intervals_cover_the_true_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for number in range(100):
        spread = Stats.of(rng.normal(0.5, 0.1, 40).tolist(), [number])
        assert spread is not None and spread.mean_interval is not None
        covered += spread.mean_interval[0] <= 0.5 <= spread.mean_interval[1]
    assert 86 <= covered <= 100


def test_the_overall_interval_keeps_a_cases_rows_together() -> None:
    """Two categories that rise and fall together are not twice as much evidence as one."""
    values_N = np.random.default_rng(0).normal(0.5, 0.1, 60)
    one, same = macro_interval(values_N[:, None], [1]), macro_interval(np.stack([values_N, values_N], axis=1), [1])
    assert one is not None and one == pytest.approx(same)
    holed_NK = np.stack([values_N, values_N], axis=1)
    holed_NK[:55, 1] = np.nan
    assert macro_interval(holed_NK, [1]) is not None and macro_interval(values_N[:1, None], [1]) is None
