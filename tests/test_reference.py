"""The forward pass against figures measured from the published code, with deterministic weights."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from segvol_pl.config import Coordinates
from segvol_pl.model import SegVol, SegVolConfig
from segvol_pl.model.prompt_encoder import PromptTensors

TOLERANCE = 1e-4  # of the value range
KINDS = ("text", "box", "points", "box_text", "points_text", "box_points")


def deterministic_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight that the reference run gave to the parameter `name`."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("positional_encoding_gaussian_matrix"):
        return noise
    if len(shape) == 1 and name.endswith("weight"):
        return 1 + np.float32(0.02) * noise
    return np.float32(0.04) * noise


@pytest.fixture(scope="module")
def model() -> SegVol:
    torch.manual_seed(0)
    config = SegVolConfig(input_shape=[16, 64, 64], coordinates=Coordinates.published)
    model = SegVol(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(torch.from_numpy(deterministic_value(name, tuple(value.shape))))
    return model


@pytest.fixture(scope="module")
def figures(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "reference" / "forward_small.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def tokens_BTE(model: SegVol) -> torch.Tensor:
    rng = np.random.Generator(np.random.PCG64(100))
    image = torch.from_numpy(rng.random((2, 1, 16, 64, 64), dtype=np.float32))
    with torch.inference_mode():
        return model.encode(image)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.ptp(want))


def test_image_tokens_equal_the_published_ones(tokens_BTE: torch.Tensor, figures: dict[str, np.ndarray]) -> None:
    assert relative(tokens_BTE[:, ::8, ::16].numpy(), figures["image_tokens"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_published_ones(
    kind: str, model: SegVol, tokens_BTE: torch.Tensor, figures: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    text_BPE = torch.from_numpy(figures["text_embedding"])[:, None]
    monkeypatch.setattr(model.text_encoder, "forward", lambda text_BP: text_BPE)
    has = {part: torch.full((2, 1), part in kind) for part in ("points", "box", "text")}
    prompts = PromptTensors(
        points_BPN3=torch.from_numpy(figures["points"])[:, None],
        labels_BPN=torch.from_numpy(figures["point_labels"]).long()[:, None],
        boxes_BP6=torch.from_numpy(figures["box"])[:, None],
        text_BP=torch.zeros(2, 1, dtype=torch.long),
        has_points_BP=has["points"],
        has_box_BP=has["box"],
        has_text_BP=has["text"],
    )
    with torch.inference_mode():
        logits = model.decode(tokens_BTE, prompts)[:, :, ::2, ::4, ::4].numpy()
    assert relative(logits, figures[f"logits_{kind}"]) < TOLERANCE
