"""Windows over the whole volume: what they cover, what they are asked, how they are put together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from factories import Oracle

from segvol_pl.config import Blend, SlidingConfig
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.sliding import OUTSIDE_LOGIT, Slider, grid, within

WINDOW, SHAPE = (8, 16, 16), (20, 40, 30)


class Constant(Oracle):
    """Each window's logits are all of one value: 1, 2, 3, ... in the order of decoding."""

    def decode(self, tokens_BTE: torch.Tensor, prompts: list[list[Prompt]]) -> torch.Tensor:
        logits = []
        for row in prompts:
            self.seen += row
            logits.append(torch.full((1, *WINDOW), float(len(self.seen))))
        return torch.stack(logits)


def image() -> np.ndarray:
    return np.random.default_rng(0).random(SHAPE, np.float32)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("shape", [SHAPE, (5, 9, 7), (8, 16, 16), (9, 17, 40)])
def test_the_grid_covers_all_and_stays_inside(shape: tuple[int, int, int], overlap: float) -> None:
    covered_DHW = np.zeros([max(extent, size) for extent, size in zip(shape, WINDOW, strict=True)], bool)
    for start in grid(shape, WINDOW, overlap):
        place = tuple(slice(first, first + size) for first, size in zip(start, WINDOW, strict=True))
        assert covered_DHW[place].shape == WINDOW
        covered_DHW[place] = True
    assert covered_DHW.all()


@pytest.mark.parametrize("blend", list(Blend))
def test_an_oracle_finds_the_same_as_at_once(blend: Blend) -> None:
    image_DHW, box = image(), (3, 5, 2, 17, 33, 28)
    expected_DHW = np.zeros(SHAPE, bool)
    expected_DHW[3:18, 5:34, 2:29] = image_DHW[3:18, 5:34, 2:29] > 0.5
    slider = Slider(Oracle(WINDOW), image_DHW, SlidingConfig(blend=blend))
    np.testing.assert_array_equal(slider.segment(Prompt(box=box)).logits_DHW > 0, expected_DHW)
    np.testing.assert_array_equal(slider.segment(Prompt(text="x")).logits_DHW > 0, image_DHW > 0.5)


def test_a_volume_smaller_than_a_window_is_padded() -> None:
    image_DHW = image()[:5, :9, :7]
    result = Slider(Oracle(WINDOW), image_DHW, SlidingConfig()).segment(Prompt(text="x"))
    assert result.windows == 1 and result.logits_DHW.shape == (5, 9, 7)
    np.testing.assert_array_equal(result.logits_DHW > 0, image_DHW > 0.5)


def test_overlapping_windows_are_averaged_alike_or_towards_their_middles() -> None:
    shape = (8, 16, 24)  # two windows that share columns 8 to 15
    flat = Slider(Constant(WINDOW), np.zeros(shape, np.float32), SlidingConfig()).segment(Prompt(text="x"))
    line = flat.logits_DHW[4, 8]
    assert flat.windows == 2 and line[:8].tolist() == [1.0] * 8 and line[16:].tolist() == [2.0] * 8
    assert line[8:16].tolist() == [1.5] * 8
    bent = Slider(Constant(WINDOW), np.zeros(shape, np.float32), SlidingConfig(blend=Blend.gaussian))
    line = bent.segment(Prompt(text="x")).logits_DHW[4, 8]
    assert 1.0 < line[8] < line[11] < line[12] < line[15] < 2.0


def test_windows_that_a_prompt_does_not_touch_are_not_asked() -> None:
    model = Oracle(WINDOW)
    result = Slider(model, np.ones(SHAPE, np.float32), SlidingConfig(overlap=0.0)).segment(
        Prompt(points_N3=np.array([[1, 1, 1], [19, 39, 29]]), labels_N=np.array([1, 0]))
    )
    assert result.windows == 1 == len(model.seen)
    assert (result.logits_DHW[:8, :16, :16] == 5).all() and (result.logits_DHW[8:] == OUTSIDE_LOGIT).all()


def test_a_window_gets_what_of_a_prompt_lies_inside_it() -> None:
    points = {"points_N3": np.array([[1, 1, 1], [2, 20, 3], [3, 2, 2]]), "labels_N": np.array([1, 1, 0])}
    local = within(Prompt(text="x", **points), (0, 0, 0), WINDOW)
    assert local is not None and local.points_N3 is not None and local.text == "x"
    assert local.points_N3.tolist() == [[1, 1, 1], [3, 2, 2]] and np.asarray(local.labels_N).tolist() == [1, 0]
    moved = within(Prompt(**points), (0, 16, 0), WINDOW)
    assert moved is not None and moved.points_N3 is not None and moved.points_N3.tolist() == [[2, 4, 3]]
    both = within(Prompt(box=(0, 0, 0, 5, 5, 20), **points), (0, 0, 16), WINDOW)
    assert both is not None and both.box == (0, 0, 0, 5, 5, 4) and both.points_N3 is None
    assert within(Prompt(box=(0, 0, 0, 5, 5, 5), **points), (0, 16, 0), WINDOW) is None
    marked = Prompt(landmarks={"toys:ends": np.array([[1, 2, 3], [5, 18, 9]])})
    moved = within(marked, (0, 16, 0), WINDOW)
    assert moved is not None and moved.landmarks["toys:ends"].tolist() == [[1, 0, 3], [5, 2, 9]]
    assert within(marked, (0, 32, 0), WINDOW) is None
    alone = within(Prompt(text="x"), (8, 16, 0), WINDOW)
    assert alone is not None and (alone.text, alone.box, alone.points_N3) == ("x", None, None)


def test_a_second_prompt_encodes_nothing_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for room, extra in ((1000, 0), (10, 38)):
        monkeypatch.setattr("segvol_pl.inference.sliding.KEPT_BYTES", room * 4 * math.prod(WINDOW))
        model = Oracle(WINDOW)
        slider = Slider(model, image(), SlidingConfig())
        first = slider.segment(Prompt(text="x"))
        assert model.encoded == first.windows == 4 * 4 * 3
        again = slider.segment(Prompt(text="x"))
        np.testing.assert_array_equal(again.logits_DHW, first.logits_DHW)
        assert model.encoded == first.windows + extra
