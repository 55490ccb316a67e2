"""Models without learning: an oracle for tests of geometry, and an untrained SegVol in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from segvol_pl.config import OptimConfig, Precision, SegVolConfig, TrainConfig, ZoomConfig
from segvol_pl.config.loader import plain
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.predictor import Predictor
from segvol_pl.model import SegVol
from segvol_pl.model.text_encoder import TextBank


class Oracle(nn.Module):
    """Logit +5 where intensity > 0.5 and inside the prompt's box (everywhere without one), else -5.

    Has SegVol's interface; its tokens are the voxels. `encoded` counts images, `seen` holds the prompts decoded.
    """

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(input_shape=list(input_shape))
        self.place = nn.Parameter(torch.zeros(1))
        self.encoded = 0
        self.seen: list[Prompt] = []

    def encode(self, image_BCDHW: torch.Tensor) -> torch.Tensor:
        assert list(image_BCDHW.shape[2:]) == self.config.input_shape
        self.encoded += len(image_BCDHW)
        return image_BCDHW.flatten(2).transpose(1, 2)

    def prompts(self, prompts: list[list[Prompt]]) -> list[list[Prompt]]:
        return prompts

    def decode(self, tokens_BTE: torch.Tensor, prompts: list[list[Prompt]]) -> torch.Tensor:
        image_BDHW = tokens_BTE[..., 0].reshape(-1, *self.config.input_shape)
        return torch.stack(
            [
                torch.stack([self._one(image, prompt) for prompt in row])
                for image, row in zip(image_BDHW, prompts, strict=True)
            ]
        )

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        self.seen.append(prompt)
        allowed_DHW = torch.zeros_like(image_DHW, dtype=torch.bool)
        allowed_DHW[box_slices(prompt.box) if prompt.box else ...] = True
        return torch.where((image_DHW > 0.5) & allowed_DHW, 5.0, -5.0)


class RangeOracle(Oracle):
    """As Oracle, but a text means a range of intensity and how sure the oracle is of it: name -> low, high, logit."""

    def __init__(self, input_shape: tuple[int, int, int], known: dict[str, tuple[float, float, float]]) -> None:
        super().__init__(input_shape)
        self.known = known
        self.bank = TextBank(list(known), torch.zeros(len(known), 1))

    def _one(self, image_DHW: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        low, high, logit = self.known[str(prompt.text)]
        self.seen.append(prompt)
        return torch.where((image_DHW > low) & (image_DHW < high), logit, -5.0)


def save_untrained(path: Path, categories: list[str]) -> Path:
    """A training checkpoint of a tiny SegVol that has seen nothing."""
    torch.manual_seed(0)
    config = SegVolConfig(
        input_shape=[8, 32, 32],
        patch_size=[4, 8, 8],
        hidden_size=48,
        num_layers=1,
        num_heads=4,
        mlp_dim=64,
        decoder_heads=4,
        decoder_mlp_dim=64,
        text_dim=16,
    )
    model = SegVol(config, TextBank.seeded(categories, config.text_dim) if categories else None)
    parameters = {
        "task": "segment",
        "config": plain(TrainConfig(model=config, optim=OptimConfig(max_steps=1))),
        "categories": categories,
    }
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": parameters}, path)
    return path


def predictor_of(model: nn.Module, zoom: ZoomConfig | None = None) -> Predictor:
    """In float32, whose masks are compared to the voxel: on CPUs with AMX `auto` is bf16."""
    return Predictor(model, zoom, Precision.fp32)  # type: ignore[arg-type]
