"""Which category a mask looks like, by an oracle to which each name means a place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from factories import Oracle

from segvol_pl.evaluation.mask_category import CategoryMatch, matches_of, soft_dice
from segvol_pl.evaluation.summary import Summary
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.prompts import Prompt

WINDOW = (4, 8, 8)
PLACES = {"organ": (0, 0, 0, 3, 7, 3), "lesion": (1, 1, 1, 2, 2, 2), "other": (0, 0, 4, 3, 7, 7)}


class Placed(Oracle):
    """Finds a box prompt's box, and for a text the place of its name."""

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        logits_DHW = torch.full(image_DHW.shape, -20.0)
        logits_DHW[box_slices(prompt.box or PLACES[str(prompt.text)])] = 20.0
        return logits_DHW


def test_soft_dice_is_the_overlap_with_what_the_name_finds() -> None:
    names, asked = list(PLACES), [Prompt(box=box) for box in PLACES.values()]
    table_JK = soft_dice(Placed(WINDOW), torch.zeros(1, int(np.prod(WINDOW)), 1), asked, names)
    np.testing.assert_array_equal(table_JK.argmax(axis=1), [0, 1, 2])
    assert table_JK[0, 1] == pytest.approx(2 * 8 / (128 + 8), rel=1e-4) and table_JK[0, 2] == pytest.approx(0, abs=1e-4)


def test_a_match_names_eight_and_the_category_itself() -> None:
    names = [f"organ {number}" for number in range(12)]
    soft_dice_K = np.linspace(1, 0, 12)
    found = matches_of("a", "organ 10", "box(exact)", soft_dice_K, names)
    assert [(one.place, one.named) for one in found] == [(n + 1, f"organ {n}") for n in (*range(8), 10)]
    assert len(matches_of("a", "organ 3", "box(exact)", soft_dice_K, names)) == 8
    assert len(matches_of("a", "unheard of", "box(exact)", soft_dice_K, names)) == 8


def test_matches_are_put_together_by_category() -> None:
    matches = [
        CategoryMatch("a", "liver", "box", 1, "liver", 0.8),
        CategoryMatch("a", "liver", "box", 2, "spleen", 0.4),
        CategoryMatch("b", "liver", "box", 1, "spleen", 0.6),
        CategoryMatch("b", "liver", "box", 2, "liver", 0.5),
    ]
    read = Summary("m", "s", "test", 2, [], matches=matches).matches_by_category["liver"]
    assert (read.n, read.first) == (2, 0.5)
    assert read.soft_dice == pytest.approx({"liver": 0.65, "spleen": 0.5})
