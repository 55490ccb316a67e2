"""The challenge's rules against figures of its own functions, and against plain forms of its words."""

from __future__ import annotations

import json
from collections import deque
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segvol_pl.evaluation import challenge as rules
from segvol_pl.evaluation.challenge import (
    box_of_challenge,
    case_nsd,
    case_scores,
    challenge_box,
    instance_scores,
    next_click,
)
from segvol_pl.evaluation.metrics import dice, surface_dice

CASES = range(8)
INSTANCE_CASES = range(10)


def interactive(challenge: Path, case: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    arrays = np.load(challenge / "interactive.npz")
    told = json.loads((challenge / "interactive.json").read_text())[str(case)]
    return arrays[f"gts_{case}"], arrays[f"segs_{case}"], told


@pytest.mark.parametrize("case", CASES)
def test_boxes_are_the_challenges(challenge: Path, case: int) -> None:
    truth_DHW, _, told = interactive(challenge, case)
    rng = np.random.RandomState(told["box_seed"])
    found = [challenge_box(truth_DHW == value, rng) for value in told["classes"]]
    assert told["boxes"] is None or found == told["boxes"]


@pytest.mark.parametrize("case", CASES)
def test_clicks_are_the_challenges_voxel_for_voxel(challenge: Path, case: int) -> None:
    truth_DHW, answers, told = interactive(challenge, case)
    if told["boxes"] is None:  # that call is skipped
        answers[0] = 0
    for place, value in enumerate(told["classes"]):
        clicks: dict[str, list[list[int]]] = {"fg": [], "bg": []}
        order: list[str | None] = []
        for answer_DHW in answers[:5]:
            found = next_click(truth_DHW == value, answer_DHW == value)
            order.append(None if found is None else found[1])
            if found is not None:
                clicks[found[1]].append(list(found[0]))
        assert clicks == told["clicks"][place] and order == told["clicks_order"][place]


@pytest.mark.parametrize("case", CASES)
def test_scores_of_a_case_are_the_challenges(challenge: Path, case: int) -> None:
    truth_DHW, answers, told = interactive(challenge, case)
    dsc, nsd = [], []
    for call, answer_DHW in enumerate(answers):
        masks = [(answer_DHW == value, truth_DHW == value) for value in told["classes"]]
        overlap = np.mean([dice(*pair) for pair in masks])
        surface = np.mean([surface_dice(*pair, told["spacing"], rules.NSD_TOLERANCE) for pair in masks])
        skipped = call == 0 and told["boxes"] is None
        dsc.append(0.0 if skipped else float(overlap))
        nsd.append(0.0 if skipped else case_nsd(float(overlap), float(surface)))
    np.testing.assert_allclose(dsc, told["dsc"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(nsd, told["nsd"], rtol=0, atol=1e-6)
    found = case_scores(told["dsc"], told["nsd"])
    assert found == pytest.approx({name: told[name] for name in found}, abs=1e-9) and len(found) == 4


@pytest.mark.parametrize("case", INSTANCE_CASES)
def test_instances_are_matched_as_in_the_challenge(challenge: Path, case: int) -> None:
    arrays = np.load(challenge / "instances.npz")
    told = json.loads((challenge / "instances.json").read_text())[str(case)]
    assert instance_scores(arrays[f"gts_{case}"], arrays[f"segs_{case}"]) == pytest.approx(told, abs=1e-9)


# ---- the box ----


def test_a_box_is_the_extent_on_the_middle_slice_moved_outward() -> None:
    truth_DHW = np.zeros((9, 256, 512), bool)
    truth_DHW[2, 10:20, 10:20] = truth_DHW[5, 3:8, 400:510] = truth_DHW[8, 0, 0] = True
    rng = np.random.default_rng(3)
    shift = int(np.random.default_rng(3).integers(0, 6, 1)[0])
    assert shift > 0
    assert challenge_box(truth_DHW, rng) == {
        "z_min": 2,
        "z_max": 8,
        "z_mid": 5,
        "z_mid_x_min": 400 - 2 * shift,
        "z_mid_y_min": max(0, 3 - shift),
        "z_mid_x_max": min(511, 509 + 2 * shift),
        "z_mid_y_max": 7 + shift,
    }
    with pytest.raises(ValueError, match="an empty mask"):
        challenge_box(np.zeros((2, 3, 4), bool), rng)


def test_a_box_of_the_challenge_in_our_axes() -> None:
    parts = ("z_min", "z_mid_y_min", "z_mid_x_min", "z_max", "z_mid_y_max", "z_mid_x_max")
    assert box_of_challenge(dict(zip(parts, range(6), strict=True))) == (0, 1, 2, 3, 4, 5)


# ---- clicks ----


def plain_parts(error_DHW: np.ndarray) -> list[np.ndarray]:
    """Components of 26 neighbours, found voxel by voxel in the order d, h, w."""
    left = {tuple(place) for place in np.argwhere(error_DHW).tolist()}
    parts = []
    for first in sorted(left):
        if first not in left:
            continue
        part_DHW, queue = np.zeros(error_DHW.shape, bool), deque([first])
        left.remove(first)
        while queue:
            at = queue.popleft()
            part_DHW[at] = True
            for step in product((-1, 0, 1), repeat=3):
                near = tuple(a + b for a, b in zip(at, step, strict=True))
                if near in left:
                    left.remove(near)
                    queue.append(near)
        parts.append(part_DHW)
    return parts


def plain_click(truth_DHW: np.ndarray, mask_DHW: np.ndarray, large: int) -> tuple[list[int], str] | None:
    """The README's words, step by step, without a library."""
    parts = plain_parts(truth_DHW != mask_DHW)
    if not parts:
        return None
    part_DHW = max(parts, key=lambda one: int(one.sum()))  # the first of several
    places = np.argwhere(part_DHW)
    low, size = places.min(axis=0), np.ptp(places, axis=0) + 1
    more = np.maximum((size * 0.25).astype(int), 1)
    crop = part_DHW[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    padded = np.pad(crop, [(int(n), int(n)) for n in more])
    pooled = padded.size > large
    if pooled:
        padded = np.pad(padded, [(0, n % 2) for n in padded.shape])
        d, h, w = (n // 2 for n in padded.shape)
        padded = padded.reshape(d, 2, h, 2, w, 2).max(axis=(1, 3, 5))
    outside = np.argwhere(~padded)
    squares = np.zeros(padded.shape, int)
    for at in np.argwhere(padded):
        squares[tuple(at)] = ((outside - at) ** 2).sum(axis=1).min()
    if pooled:
        squares = squares.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    full = np.zeros(part_DHW.shape, int)
    inner = squares[tuple(slice(a, a + n) for a, n in zip(more, size, strict=True))]
    full[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))] = inner
    deepest = np.argwhere(full == full.max())
    state = np.random.get_state()
    np.random.seed(42)
    chosen = deepest[np.random.choice(len(deepest))]
    np.random.set_state(state)
    return chosen.tolist(), "fg" if truth_DHW[tuple(chosen)] else "bg"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.sampled_from([0.02, 0.1, 0.3]), st.sampled_from([60_000_000, 0]))
def test_a_click_is_where_the_words_put_it(seed: int, share: float, large: int) -> None:
    """Few voxels in error, so that components of one size are frequent; errors at the border; the coarse form too."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 8, 3)
    truth_DHW = rng.random(shape) < 0.5
    mask_DHW = truth_DHW ^ (rng.random(shape) < share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "LARGE", large)
        found = next_click(truth_DHW, mask_DHW)
    wanted = plain_click(truth_DHW, mask_DHW, large)
    assert (found is None) == (wanted is None)
    if found is not None and wanted is not None:
        assert (list(found[0]), found[1]) == wanted


def test_clicks_at_the_edges_of_what_there_is() -> None:
    nothing_DHW, everything_DHW = np.zeros((5, 7, 9), bool), np.ones((5, 7, 9), bool)
    assert next_click(nothing_DHW, nothing_DHW) is None and next_click(everything_DHW, everything_DHW) is None
    place, kind = next_click(everything_DHW, nothing_DHW) or ((), "")
    assert place[:2] == (2, 3) and 2 <= place[2] <= 6 and kind == "fg"
    assert next_click(nothing_DHW, everything_DHW) == (place, "bg")
    with pytest.raises(ValueError, match="shapes"):
        next_click(nothing_DHW, nothing_DHW[1:])


def test_a_click_leaves_the_global_generator_alone() -> None:
    np.random.seed(7)
    wanted = np.random.rand()
    np.random.seed(7)
    next_click(np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool))
    assert np.random.rand() == wanted


# ---- scores ----


def test_areas_are_those_of_the_five_calls_with_clicks() -> None:
    found = case_scores([0.1, 0.0, 0.5, 0.5, 0.5, 1.0], [0.9, 1, 1, 1, 1, 1])
    assert found == {"dsc_auc": 2.0, "nsd_auc": 4.0, "dsc_final": 1.0, "nsd_final": 1.0}
    assert case_scores([0.0, 0.5, 0.5, 0.5, 1.0], [1] * 5) == found
    for short in ([1.0] * 4, [1.0] * 7):
        with pytest.raises(ValueError, match="at least 5 calls"):
            case_scores(short, [1.0] * len(short[:-1]))
    assert case_nsd(0.2, 0.9) == 0.0 and case_nsd(0.21, 0.9) == 0.9


# ---- instances ----


def lesions(*values: int) -> np.ndarray:
    """One row of voxels."""
    return np.array(values)[None, None]


def test_instances_match_one_to_one_at_half_their_union() -> None:
    truth, answer = lesions(1, 1, 0, 2, 2, 0, 3), lesions(7, 0, 0, 5, 5, 5, 0)
    found = instance_scores(truth, answer)
    assert found == {"tp": 2, "fp": 0, "fn": 1, "f1": 0.8, "dsc_tp": pytest.approx((2 / 3 + 4 / 5) / 2)}


def test_an_answer_of_one_value_is_split_by_faces() -> None:
    truth, answer = np.zeros((2, 2, 4), int), np.zeros((2, 2, 4), int)
    truth[0, 0, 0], truth[1, 1, 1] = 1, 2
    answer[truth > 0] = 9
    assert instance_scores(truth, answer)["tp"] == 2
    assert instance_scores(truth, answer.astype(bool))["f1"] == 1.0
    assert instance_scores(truth, np.full(truth.shape, 4)) == {"tp": 0, "fp": 1, "fn": 2, "f1": 0.0, "dsc_tp": 0.0}


def test_an_answer_of_two_values_is_split_only_if_there_is_no_third() -> None:
    """Background counts as a value: the challenge counts the distinct values of the answer."""
    assert instance_scores(lesions(1, 2, 3), lesions(4, 5, 4))["tp"] == 3
    assert instance_scores(lesions(1, 2, 3, 3, 0), lesions(4, 5, 4, 4, 0))["fn"] == 1


def test_instances_of_nothing() -> None:
    some, none = lesions(1, 0, 2), lesions(0, 0, 0)
    assert instance_scores(some, none) == {"tp": 0, "fp": 0, "fn": 0, "f1": 0.0, "dsc_tp": 0.0}
    assert instance_scores(none, some) == {"tp": 0, "fp": 2, "fn": 0, "f1": 0.0, "dsc_tp": 0.0}
    with pytest.raises(ValueError, match="shapes"):
        instance_scores(some, lesions(1))
