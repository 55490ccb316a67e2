"""Points as maps (`model.point_maps`): a click acts where it is. Models without it are as before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import TINY, tiny_model
from torch import Tensor

from segvol_pl.config import SegVolConfig
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.prompts import INSIDE, OUTSIDE, Prompt
from segvol_pl.model import SegVol, TextBank

MAPS = tiny_model(mask_prompt=True, point_maps=True, input_shape=[16, 64, 64])
"""4 x 8 x 8 tokens of 4 x 8 x 8 voxels."""


def _model(config: SegVolConfig, trained: bool = True) -> SegVol:
    torch.manual_seed(0)
    model = SegVol(config, TextBank.seeded(["liver"], config.text_dim)).eval()
    embedding = model.prompt_encoder.mask_embedding
    if trained and embedding is not None:
        torch.nn.init.normal_(embedding.lin2.weight)
    return model


def _click(voxel: tuple[int, int, int], label: int, **more: object) -> Prompt:
    return Prompt(points_N3=np.array([voxel]), labels_N=np.array([label]), **more)


def _dense(model: SegVol, *prompts: Prompt) -> Tensor:
    """The strength of what is added to each token, (P, 4, 8, 8), against a prompt of text alone."""
    with torch.no_grad():
        dense = model.prompt_encoder.dense(model.prompts([[*prompts]]))
    assert dense is not None
    return dense[0].norm(dim=-1).unflatten(1, MAPS.grid)


def test_a_click_acts_on_its_token_and_a_little_on_those_around() -> None:
    model = _model(MAPS)
    still = model.prompt_encoder.mask_embedding(torch.zeros(1, 1, 3, *MAPS.mask_shape), torch.ones(1, 1, dtype=bool))
    with torch.no_grad():
        dense = model.prompt_encoder.dense(model.prompts([[_click((9, 30, 50), INSIDE)]]))
    assert dense is not None
    moved = (dense - still)[0, 0].norm(dim=-1).unflatten(0, MAPS.grid)
    assert np.unravel_index(int(moved.argmax()), MAPS.grid) == (2, 3, 6)
    assert moved[2, 4, 6] > 100 * moved[2, 7, 6] and moved[2, 3, 6] > 2 * moved[2, 3, 0]


def test_clicks_inside_and_outside_differ_and_several_add_up() -> None:
    model = _model(MAPS)
    inside, outside = _click((9, 30, 50), INSIDE), _click((9, 30, 50), OUTSIDE)
    assert not torch.allclose(_dense(model, inside), _dense(model, outside))
    both = Prompt(points_N3=np.array([[9, 30, 50], [1, 2, 3]]), labels_N=np.array([INSIDE, OUTSIDE]))
    one, two = _dense(model, _click((9, 30, 50), INSIDE)), _dense(model, both)
    assert torch.allclose(one[0, 2, 3, 6], two[0, 2, 3, 6], rtol=1e-3)
    assert not torch.allclose(one[0, 0, 0, 0], two[0, 0, 0, 0], rtol=1e-3)


def test_only_prompts_with_points_or_a_mask_get_something() -> None:
    model = _model(MAPS)
    text, box = Prompt(text="liver"), Prompt(box=(1, 1, 1, 9, 9, 9))
    assert not _dense(model, text, box).any()
    masked = replace(text, mask_DHW=np.zeros(MAPS.mask_shape, np.float32))
    empty, full = _dense(model, masked, replace(text, mask_DHW=np.ones(MAPS.mask_shape, np.float32)))
    assert empty.any() and full.any() and not torch.allclose(empty, full)
    # The padding that a prompt with fewer points gets is no point.
    three = Prompt(points_N3=np.array([[1, 1, 1], [2, 2, 2], [3, 3, 3]]), labels_N=np.array([INSIDE] * 3))
    alone, beside = _dense(model, _click((9, 30, 50), INSIDE)), _dense(model, _click((9, 30, 50), INSIDE), three)
    assert torch.allclose(alone[0], beside[0], atol=1e-5)


def test_untrained_it_changes_nothing() -> None:
    plain, maps = _model(replace(MAPS, mask_prompt=False, point_maps=False)), _model(MAPS, trained=False)
    maps.load_state_dict(plain.state_dict(), strict=False)
    image = torch.rand(1, 1, *MAPS.input_shape)
    with torch.no_grad():
        assert torch.equal(maps(image, _click((9, 30, 50), INSIDE)), plain(image, _click((9, 30, 50), INSIDE)))


def test_maps_need_a_model_that_takes_masks() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.mask_prompt=true"):
        replace(TINY, point_maps=True)
