"""Small tasks and batches of noise for the tests on a CUDA device. Widths suit its attention: multiples of 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from factories import tiny_model
from torch import Tensor

from segvol_pl.config import OptimConfig, PretrainConfig, PromptConfig, RunConfig, TrainConfig
from segvol_pl.config.loader import load
from segvol_pl.model import TextBank
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask

MODEL = tiny_model(
    input_shape=[16, 64, 64],
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    mlp_dim=256,
    decoder_heads=4,
    decoder_mlp_dim=128,
)
PROMPTS = PromptConfig(categories_per_volume=2, pseudo_per_volume=3)
OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, max_steps=10)
VOLUMES = 2
TINY = Path(__file__).parents[2] / "configs" / "tiny"
STEPS = 6


def supervised_task(**run: Any) -> SegVolTask:
    torch.manual_seed(0)
    config = TrainConfig(model=MODEL, prompts=PROMPTS, optim=OPTIM, run=RunConfig(**run))
    return SegVolTask(config, TextBank.seeded(["one", "two", "three"], MODEL.text_dim))


def simmim_task() -> SimMIMTask:
    torch.manual_seed(0)
    return SimMIMTask(PretrainConfig(model=MODEL, optim=OPTIM))


def supervised_batch() -> dict[str, Tensor]:
    """Boxes as masks, with points anywhere."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor(MODEL.input_shape)
    batch = {"image_BCDHW": torch.rand(VOLUMES, 1, *MODEL.input_shape, generator=generator)}
    for prefix, count in (("", PROMPTS.categories_per_volume), ("pseudo_", PROMPTS.pseudo_per_volume)):
        low_BK3 = (torch.rand(VOLUMES, count, 3, generator=generator) * (shape // 2)).long()
        high_BK3 = low_BK3 + shape // 4
        axes = [torch.arange(size) for size in MODEL.input_shape]
        within = [(axis >= low_BK3[..., i, None]) & (axis <= high_BK3[..., i, None]) for i, axis in enumerate(axes)]
        width = 1 + PROMPTS.extra_positive + PROMPTS.extra_negative
        points_BKN3 = (torch.rand(VOLUMES, count, width, 3, generator=generator) * shape).long()
        batch |= {
            f"{prefix}masks_BKDHW": within[0][..., None, None]
            & within[1][..., None, :, None]
            & within[2][..., None, None, :],
            f"{prefix}category_BK": torch.randint(0, 3, (VOLUMES, count), generator=generator),
            f"{prefix}points_BKN3": points_BKN3,
            f"{prefix}labels_BKN": torch.randint(-2, 2, (VOLUMES, count, width), generator=generator),
            f"{prefix}boxes_BK6": torch.cat([low_BK3, high_BK3], dim=-1),
            f"{prefix}valid_BK": torch.ones(VOLUMES, count, dtype=torch.bool),
        }
    return batch


def simmim_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = MODEL.grid[0] * MODEL.grid[1] * MODEL.grid[2]
    order_BT = torch.rand(VOLUMES, tokens, generator=generator).argsort(1)
    image_BCDHW = torch.rand(VOLUMES, 1, *MODEL.input_shape, generator=generator)
    return {"image_BCDHW": image_BCDHW, "mask_BT": order_BT < round(0.6 * tokens)}


def configured(command: str, shards: Path, out: Path, *more: str) -> Any:
    """configs/tiny on the GPU, in the precision that `auto` gives there."""
    keys = [f"data.shards={shards}", f"run.out={out}", f"optim.max_steps={STEPS}", "track.wandb=disabled"]
    run = ["run.accelerator=cuda", "run.precision=auto", "run.log_every=2", "run.val_batches=1"]
    return load(command, [str(TINY / f"{command}.yaml"), *keys, *run, "data.samples_per_volume=8", *more])


def logged(out: Path, metric: str) -> list[float]:
    """Its values, in order."""
    return [value for _, value in read_metrics(out / "metrics.csv", metric)]
