"""The model's parts against plain implementations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import tiny_model

from segvol_pl.config import SegVolConfig
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.mask_decoder import Upscaling
from segvol_pl.model.prompt_encoder import PromptTensors, pack, unpack
from segvol_pl.model.segvol import Trilinear

MODEL = tiny_model(input_shape=[12, 32, 16], patch_size=[2, 8, 8], hidden_size=32)


def _model(landmarks: Sequence[str] = ()) -> SegVol:
    torch.manual_seed(0)
    return SegVol(replace(MODEL, landmarks=list(landmarks)), TextBank.seeded(["liver", "spleen"], 512)).eval()


def test_prompts_packed_for_one_copy_come_out_as_they_were() -> None:
    """Numbers of 8, 4 and 1 bytes, and tensors without any, in any order."""
    kinds = [torch.bool, torch.int64, torch.float32, torch.bool, torch.int64]
    shapes = [(2, 3), (2, 3, 1), (1, 0, 3), (1, 5), (3,)]
    tensors = [torch.randint(0, 2, shape).to(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    found = unpack(pack(tensors), tensors)
    assert [one.dtype for one in found] == kinds
    assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def test_room_for_points_that_are_not_there_changes_nothing() -> None:
    model = _model()
    points = Prompt(points_N3=np.array([[3, 4, 5], [6, 20, 9]]), labels_N=np.array([1, 0]))
    prompts = [[Prompt(text="liver"), points, Prompt(box=(1, 2, 3, 9, 20, 12))]]
    narrow, wide = (PromptTensors.from_prompts(prompts, model.bank.index, MODEL, step) for step in (1, 8))
    assert narrow.points_BPN3.shape == (1, 3, 2, 3) and wide.points_BPN3.shape == (1, 3, 8, 3)
    with torch.no_grad():
        tokens = model.encode(torch.rand(1, 1, *MODEL.input_shape))
        torch.testing.assert_close(model.decode(tokens, wide), model.decode(tokens, narrow), rtol=0, atol=1e-5)


def test_trilinear_equals_torchs() -> None:
    x = torch.randn(2, 3, 6, 5, 7)
    expected = F.interpolate(x, size=(12, 20, 7), mode="trilinear", align_corners=False)
    assert torch.allclose(Trilinear((6, 5, 7), (12, 20, 7))(x), expected, atol=1e-6)


def test_upscaling_equals_its_own_modules_in_volume_order() -> None:
    torch.manual_seed(0)
    grid = (3, 2, 4)
    upscaling = Upscaling(32, grid)
    torch.nn.init.normal_(upscaling[1].weight)
    torch.nn.init.normal_(upscaling[1].bias)
    tokens, weights = torch.randn(2, 24, 32), torch.randn(2, 4)
    plain = torch.nn.Sequential(*upscaling)(tokens.transpose(1, 2).unflatten(2, grid))
    expected = torch.einsum("ae,aedhw->adhw", weights, plain)
    assert torch.allclose(upscaling(tokens, weights), expected, atol=1e-5)


def test_a_single_prompt_is_asked_of_every_image() -> None:
    image = torch.rand(2, 1, 12, 32, 16)
    logits = _model()(image, Prompt(text="liver"))
    assert logits.shape == (2, 1, 12, 32, 16) and logits.dtype == torch.float32


def test_prompt_kinds_mix_in_one_batch_without_touching_each_other() -> None:
    model = _model()
    points = np.array([[1, 2, 3], [4, 5, 6]])
    prompts = [
        Prompt(text="liver"),
        Prompt(box=(0, 1, 2, 5, 6, 7)),
        Prompt(points_N3=points, labels_N=np.array([1, 0])),
        Prompt(text="spleen", points_N3=points[:1], labels_N=np.array([1]), box=(0, 0, 0, 3, 3, 3)),
    ]
    with torch.inference_mode():
        tokens = model.encode(torch.rand(1, 1, 12, 32, 16))
        together = model.decode(tokens, model.prompts([prompts]))
        alone = torch.cat([model.decode(tokens, model.prompts([[prompt]])) for prompt in prompts], dim=1)
    assert torch.allclose(together, alone, atol=1e-5)
    spread = (together[0][:, None] - together[0][None]).abs().amax((2, 3, 4))
    assert (spread[~torch.eye(4, dtype=torch.bool)] > 1e-3).all()


def test_marks_are_heard_and_their_absence_changes_nothing() -> None:
    """A prompt without landmarks is answered as by the same model that knows none."""
    deaf = _model()
    model = _model(landmarks=["2*toys:ends", "1*toys:middle"])
    lacking, unknown = model.load_state_dict(deaf.state_dict(), strict=False)
    assert lacking == ["prompt_encoder.landmark_embeddings.weight"] and not unknown
    here, there = ({"toys:ends": np.array(ends)} for ends in ([[0, 1, 2], [9, 9, 9]], [[5, 20, 3], [9, 9, 9]]))
    middle = {"toys:middle": np.array([[4, 5, 6]])}
    prompts = [Prompt(text="liver", landmarks=landmarks) for landmarks in ({}, here, there, middle, here | middle)]
    with torch.inference_mode():
        tokens = model.encode(torch.rand(1, 1, 12, 32, 16))
        together = model.decode(tokens, model.prompts([prompts]))[0]
        plain = deaf.decode(tokens, deaf.prompts([prompts[:1]]))[0]
    assert torch.allclose(together[:1], plain, atol=1e-5)
    spread = (together[:, None] - together[None]).abs().amax((2, 3, 4))
    assert (spread[~torch.eye(5, dtype=torch.bool)] > 1e-3).all()
    with pytest.raises(ConfigError, match=r"no landmarks toys:ends; its model\.landmarks: none"):
        deaf.prompts([prompts[1:2]])


def test_the_base_model_has_the_published_sizes() -> None:
    with torch.device("meta"):
        model = SegVol(SegVolConfig(), TextBank(["x"], torch.zeros(1, 512)))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["image_encoder"] == 87_388_416
    dead_heads = 3 * (2 * (768 * 768 + 768) + 768 * 96 + 96) + (768 * 256 + 256) + (256 * 256 + 256) + (256 * 4 + 4)
    assert count["mask_decoder"] == 29_923_716 - dead_heads
