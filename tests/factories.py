"""The tiny models and configurations that tests share: each is made here, and nowhere else.

A test states what it changes: `tiny_model(hidden_size=32)`, `train_config(shards, out, steps=3)`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from segvol_pl.config import (
    CasesConfig,
    DataConfig,
    EvaluateConfig,
    Mode,
    OptimConfig,
    Precision,
    PretrainConfig,
    PromptConfig,
    RunConfig,
    SegVolConfig,
    TextConfig,
    TextSource,
    TrackConfig,
    TrainConfig,
    Wandb,
    ZoomConfig,
)
from segvol_pl.config.loader import plain
from segvol_pl.data.corpus import Corpus, open_folders, training_corpus
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.inference.predictor import Predictor
from segvol_pl.model import SegVol
from segvol_pl.model.text_encoder import TextBank

# ---- models ----

TINY_SIZES: dict[str, Any] = {
    "input_shape": [8, 16, 16],
    "patch_size": [4, 8, 8],
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 32,
    "decoder_heads": 2,
    "decoder_mlp_dim": 32,
}
TINY_KEYS = [f"model.{key}={value}" for key, value in TINY_SIZES.items() if key != "hidden_size"]
"""The tiny model as keys of the command line; the width is the test's."""


def tiny_model(**changes: Any) -> SegVolConfig:
    """The smallest model that has every part; `changes` are keys of `model`."""
    return SegVolConfig(**{**TINY_SIZES, **changes})


TINY = tiny_model()


def save_untrained(path: Path, categories: list[str], bank: TextBank | None = None, **changes: Any) -> Path:
    """A training checkpoint of a tiny SegVol that has seen nothing; `changes` are keys of `model`."""
    torch.manual_seed(0)
    config = tiny_model(
        input_shape=[8, 32, 32],
        hidden_size=48,
        num_heads=4,
        mlp_dim=64,
        decoder_heads=4,
        decoder_mlp_dim=64,
        text_dim=16 if bank is None else bank.vectors_KE.shape[1],
        **changes,
    )
    seeded = TextBank.seeded(categories, config.text_dim) if categories else None
    model = SegVol(config, bank or seeded)
    parameters = {
        "task": "segment",
        "config": plain(TrainConfig(model=config, optim=OptimConfig(max_steps=1))),
        "categories": categories,
    }
    if bank is not None and bank.synonyms:
        parameters["synonyms"] = bank.synonyms
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": parameters}, path)
    return path


class Oracle(nn.Module):
    """Logit +5 where intensity > 0.5 and inside the prompt's box (everywhere without one), else -5.

    Has SegVol's interface; its tokens are the voxels. `encoded` counts images, `seen` holds the prompts decoded.
    """

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(input_shape=list(input_shape), mask_prompt=False)
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


def predictor_of(model: nn.Module, zoom: ZoomConfig | None = None) -> Predictor:
    """In float32, whose masks are compared to the voxel: on CPUs with AMX `auto` is bf16."""
    return Predictor(model, zoom, Precision.fp32)  # type: ignore[arg-type]


# ---- configurations ----

SILENT = TrackConfig(wandb=Wandb.disabled)


def _run_sections(shards: Path, out: Path, steps: int) -> dict[str, Any]:
    """The sections that pre-training and training share."""
    return {
        "model": TINY,
        "data": DataConfig(shards=str(shards), global_batch=2, workers=0, samples_per_volume=4),
        "optim": OptimConfig(lr=1e-3, warmup_steps=2, max_steps=steps),
        "run": RunConfig(
            out=str(out),
            log_every=1,
            val_every=4,
            val_batches=2,
            checkpoint_every=3,
            accelerator="cpu",
            cpu_threads=1,
            precision=Precision.fp32,
        ),
        "track": SILENT,
    }


def train_config(shards: Path, out: Path, steps: int = 6) -> TrainConfig:
    """Supervised training of the tiny model over `shards`, on one CPU, in float32."""
    return TrainConfig(
        **_run_sections(shards, out, steps),
        prompts=PromptConfig(categories_per_volume=1, pseudo_per_volume=2),
        text=TextConfig(source=TextSource.seeded),
    )


def pretrain_config(shards: Path, out: Path, steps: int = 6) -> PretrainConfig:
    """SimMIM pre-training, otherwise as `train_config`."""
    return PretrainConfig(**_run_sections(shards, out, steps))


def wandb_config(shards: Path, out: Path, steps: int = 4) -> TrainConfig:
    """Training that logs to an offline wandb run, with two kinds of prompt."""
    config = train_config(shards, out, steps)
    return replace(
        config,
        run=replace(config.run, val_every=2, checkpoint_every=2),
        track=TrackConfig(wandb=Wandb.offline, group="ladder"),
        prompts=replace(config.prompts, combinations=["text", "box+text"], categories_per_volume=2),
    )


def evaluate_config(
    cases: Path | CasesConfig, out: Path, checkpoint: str = "oracle", split: str = "test", **changes: Any
) -> EvaluateConfig:
    """Evaluation over a split of a folder of shards, or over other cases, in float32."""
    data = cases if isinstance(cases, CasesConfig) else CasesConfig(str(cases), split)
    return EvaluateConfig(checkpoint, data, str(out), precision=Precision.fp32, **changes)


def phantom_evaluation(shards: Path, out: Path) -> EvaluateConfig:
    """An untrained model over all six phantoms, with enough prompts that a case takes a while."""
    categories = ["aorta", "liver", "spleen"]
    return evaluate_config(
        CasesConfig(shards=str(shards), split="all"),
        out,
        str(save_untrained(out.with_name("tiny.ckpt"), categories)),
        modes=[Mode.zoom, Mode.sliding],
        prompts=["box+text", "points"],
        categories=categories,
        pictures=0,
        device="cpu",
    )


def pipe_corpus(folder: Path, split: str = "all", times: int = 1) -> Corpus:
    """Shards read through `pipe:cat`, in the order of their files."""
    data = DataConfig(shards=f"pipe:cat {folder}/{{file}}", split=split, samples_per_volume=times)
    return training_corpus(open_folders(data), data, labelled=True)


DEMO_FILES = (
    "phantoms/categories.yaml",
    "shards/index.json",
    "pretrain/checkpoints/last.ckpt",
    "pretrain/metrics.csv",
    "train/config.yaml",
    "train/manifest.json",
    "model.safetensors",
    "evaluation/rows.csv",
    "evaluation/summary.json",
    "evaluation/report.html",
)
"""What a finished demo leaves in its folder."""
