"""Seconds and memory of a training step, against its own arithmetic and against plain implementations.

    python benchmarks/training.py [--small] [--only NAME,...] [--precision fp32|bf16] [--threads N]
                                  [--trace FOLDER] [--write FILE]

Each row is a process of its own, on the GPU where there is one; on a CPU it keeps its freed memory, as training does.
The matrix rate is measured in it first, the step runs once to warm up, then a few times; the fastest counts, peak
memory is the process's (on a GPU: torch's). `limit` is the step's operations (`segvol_pl.planning.flops`) at that
matrix rate.
The full-size model takes minutes on a CPU; --small tries the script out. --trace writes a chrome trace of the last step
of each row; --write docs/reference/performance.md puts the table there. Plain forms, for comparison, are below:

    plain       the published step: image encoded, prompts decoded and compared one by one, MONAI's default attention,
                convolutions and interpolation by torch
    simmim      against MONAI's default attention, the head on every token, the loss picked from the full image
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.transformerblock import TransformerBlock
from resident import resident
from results import Column, markdown, write_between
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from segvol_pl.config import OptimConfig, Precision, PretrainConfig, PromptConfig, SegVolConfig, TrainConfig
from segvol_pl.device import autocast, resolve_device
from segvol_pl.model import TextBank
from segvol_pl.model.image_encoder import Block
from segvol_pl.planning import flops
from segvol_pl.training.module import Task, optimizer
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask
from segvol_pl.training.strategies import keep_freed_memory
from segvol_pl.training.targets import pseudo_targets, supervised_targets

SMALL = SegVolConfig(
    input_shape=[16, 64, 64],
    patch_size=[4, 8, 8],
    hidden_size=192,
    num_layers=4,
    num_heads=4,
    mlp_dim=768,
    decoder_heads=4,
    decoder_mlp_dim=256,
)
OPTIM = OptimConfig(max_steps=1000)
Batch = dict[str, Tensor]
Step = Callable[[], Tensor]


def train_config(model: SegVolConfig, categories: int, pseudo: int) -> TrainConfig:
    return TrainConfig(
        model=model, optim=OPTIM, prompts=PromptConfig(categories_per_volume=categories, pseudo_per_volume=pseudo)
    )


def train_batch(config: TrainConfig, volumes: int = 1) -> Batch:
    """Volumes of noise; every mask is a box, its points are drawn within."""
    generator = torch.Generator().manual_seed(0)
    shape, prompts = config.model.input_shape, config.prompts
    batch = {"image_BCDHW": torch.rand(volumes, 1, *shape, generator=generator)}
    for prefix, count in (("", prompts.categories_per_volume), ("pseudo_", prompts.pseudo_per_volume)):
        low = torch.stack(
            [torch.randint(0, size // 2, (volumes, count), generator=generator) for size in shape], dim=-1
        )
        high = low + torch.tensor([size // 2 - 1 for size in shape])
        grids = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        inside = [
            (grid >= low[..., i, None, None, None]) & (grid <= high[..., i, None, None, None])
            for i, grid in enumerate(grids)
        ]
        width = 1 + prompts.extra_positive + prompts.extra_negative
        batch |= {
            f"{prefix}masks_BKDHW": functools.reduce(torch.logical_and, inside),
            f"{prefix}category_BK": torch.zeros(volumes, count, dtype=torch.int64),
            f"{prefix}points_BKN3": low[:, :, None] + torch.arange(width)[:, None] % 4,
            f"{prefix}labels_BKN": torch.ones(volumes, count, width, dtype=torch.int64),
            f"{prefix}boxes_BK6": torch.cat([low, high], dim=-1),
            f"{prefix}valid_BK": torch.ones(volumes, count, dtype=torch.bool),
        }
    if config.model.mask_prompt:
        of_masks = (volumes, prompts.categories_per_volume)
        batch["coarse_BKDHW"] = torch.zeros(*of_masks, *config.model.mask_shape, dtype=torch.uint8)
        batch["has_coarse_BK"] = torch.zeros(of_masks, dtype=torch.bool)
    return batch


# ---- plain forms ----


def default_attention(task: nn.Module) -> None:
    """MONAI's blocks as they come."""
    for block in [module for module in task.modules() if isinstance(module, Block)]:
        block.forward = functools.partial(TransformerBlock.forward, block)


def plain_logits(task: SegVolTask, tokens_BTE: Tensor, prompts: Any) -> Tensor:
    """One prompt's logits (B,D,H,W) by the decoder's own modules: convolutions, and torch's interpolation."""
    model, decoder = task.model, task.model.mask_decoder
    upscaling = decoder.output_upscaling

    def by_modules(image_ATE: Tensor, weights_AE: Tensor) -> Tensor:
        volume = image_ATE.transpose(1, 2).unflatten(2, upscaling.grid)
        for module in upscaling:
            volume = module(volume)
        return torch.einsum("ae,aedhw->adhw", weights_AE, volume)

    kept, upscaling.forward = upscaling.forward, by_modules  # type: ignore[method-assign]
    try:
        low_BPDHW = model.decode_low(tokens_BTE, prompts).float()
    finally:
        upscaling.forward = kept  # type: ignore[method-assign]
    shape = task.config.model.input_shape
    return F.interpolate(low_BPDHW, size=shape, mode="trilinear", align_corners=False)[:, 0]


def plain_loss(task: SegVolTask, batch: Batch) -> Tensor:
    """A category's step as published: 6 + 6 prompts decoded and compared one by one."""
    asked = supervised_targets(batch, task.config.prompts.combinations, {})
    asked = asked.joined(pseudo_targets(batch, {}), task.config.pseudo_weight)
    tokens_BTE = task.model.encode(batch["image_BCDHW"])
    loss = tokens_BTE.new_zeros(())
    for place, mask_BDHW in enumerate(asked.masks_BKDHW[:, asked.rows_P].unbind(1)):
        logits = plain_logits(task, tokens_BTE, asked.prompts.at(slice(place, place + 1))).flatten(1)
        truth, probability = mask_BDHW.float().flatten(1), logits.sigmoid()
        bce = F.binary_cross_entropy_with_logits(logits, truth)
        overlap = (probability * truth).sum(1)
        dice = 1 - 2 * overlap / (probability.sum(1) + truth.sum(1) + 1)
        loss = loss + (asked.weights_BP[:, place] * (dice + bce)).sum()
    return loss


def plain_simmim(task: SimMIMTask, batch: Batch) -> Tensor:
    """The restored image as a whole; the loss is masked voxel by voxel, as in MIM codes."""
    encoder, mask_BT = task.encoder, batch["mask_BT"]
    tokens_BTE = encoder.encode_patches(encoder.patches(batch["image_BCDHW"]), mask_BT, task.mask_token)
    d, h, w = task.config.model.grid
    a, b, c = task.config.model.patch_size
    blocks = task.head(tokens_BTE).reshape(-1, d, h, w, a, b, c)
    image = blocks.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, d * a, h * b, w * c)
    mask = mask_BT.view(-1, 1, d, h, w).repeat_interleave(a, 2).repeat_interleave(b, 3).repeat_interleave(c, 4)
    loss = F.l1_loss(image.float(), batch["image_BCDHW"], reduction="none")
    return (loss * mask).sum() / mask.sum()


# ---- measuring ----


def matrix_rate(device: torch.device, bf16: bool, rows: int, inner: int, columns: int) -> float:
    """Operations a second of the model's largest kind of product, the best of some tries."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    return 2 * rows * inner * columns / min(timed(lambda: left @ right, device) for _ in range(20))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resident() / 2**30


def measured(task: Task, loss: Step, operations: int, arguments: argparse.Namespace) -> dict[str, float]:
    """One row: forward, backward and AdamW."""
    device, model = resolve_device("auto"), task.config.model  # type: ignore[attr-defined]
    if device.type == "cpu":
        keep_freed_memory()
    bf16 = arguments.precision is Precision.bf16
    rate = matrix_rate(device, bf16, math.prod(model.grid), model.hidden_size, model.mlp_dim)
    adamw, _ = optimizer(task, OPTIM)

    def step() -> None:
        with autocast(device, arguments.precision):
            value = loss()
        value.backward()
        adamw.step()
        adamw.zero_grad()

    seconds = [timed(step, device) for _ in range(1 + arguments.repeats)]
    rate = max(rate, matrix_rate(device, bf16, math.prod(model.grid), model.hidden_size, model.mlp_dim))
    peak = peak_gib(device)
    if arguments.trace:
        trace(step, Path(arguments.trace) / f"{arguments.row}.json")
    return {"seconds": min(seconds[1:] or seconds), "operations": operations, "rate": rate, "peak_gib": peak}


def trace(step: Callable[[], None], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        step()
    profile.export_chrome_trace(str(path))


def train_row(arguments: argparse.Namespace, categories: int, pseudo: int, plain: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    config = train_config(SMALL if arguments.small else SegVolConfig(), categories, pseudo)
    device = resolve_device("auto")
    task = SegVolTask(config, TextBank.seeded(["one"], config.model.text_dim)).to(device)
    batch = {name: value.to(device) for name, value in train_batch(config).items()}
    operations = flops.total(flops.train_work(config.model, config.prompts)).total
    if plain:
        default_attention(task)
        return measured(task, lambda: plain_loss(task, batch), operations, arguments)
    return measured(task, lambda: task.losses(batch)[0], operations, arguments)


def simmim_row(arguments: argparse.Namespace, plain: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    config = PretrainConfig(model=SMALL if arguments.small else SegVolConfig(), optim=OPTIM)
    device, tokens = resolve_device("auto"), math.prod(config.model.grid)
    task = SimMIMTask(config).to(device)
    mask_BT = torch.randperm(tokens)[None] < task.hidden
    batch = {"image_BCDHW": torch.rand(1, 1, *config.model.input_shape).to(device), "mask_BT": mask_BT.to(device)}
    operations = flops.total(flops.pretrain_work(config.model, config.mask_ratio)).total
    if plain:
        default_attention(task)
        return measured(task, lambda: plain_simmim(task, batch), operations, arguments)
    return measured(task, lambda: task.loss(batch), operations, arguments)


# ---- the table ----

ROWS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "plain: 1 category, 6 + 6 prompts": lambda given: train_row(given, 1, 6, plain=True),
    "1 category, 6 + 6 prompts": lambda given: train_row(given, 1, 6),
    "8 categories, 8 x (6 + 6) prompts": lambda given: train_row(given, 8, 48),
    "8 categories, 8 x 6 + 6 prompts": lambda given: train_row(given, 8, 6),
    "plain: simmim": lambda given: simmim_row(given, plain=True),
    "simmim": simmim_row,
}


def run_row(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    given = [sys.executable, __file__, "--row", name, "--repeats", str(arguments.repeats)]
    given += ["--precision", arguments.precision.value]
    given += ["--small"] if arguments.small else []
    given += ["--trace", arguments.trace] if arguments.trace else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(given, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


COLUMNS = ("step", "s", "TFLOP", "TFLOP/s of matrices", "limit, s", "s / limit", "peak GiB")


def cells_of(step: str, row: dict[str, float]) -> list[str]:
    limit = row["operations"] / row["rate"]
    figures = (row["seconds"], row["operations"] / 1e12, row["rate"] / 1e12, limit, row["seconds"] / limit)
    return [step, *(f"{figure:.3g}" for figure in figures), f"{row['peak_gib']:.1f}"]


def title(small: bool, precision: Precision) -> str:
    device = resolve_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    kind = "bf16 autocast" if precision is Precision.bf16 else "float32"
    return f"One step of one volume, {'small' if small else 'full-size'} model, {name}, {kind}"


def report(rows: dict[str, dict[str, float]], heading: str) -> None:
    table = Table(title=heading)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "step" else "right")
    for step, row in rows.items():
        table.add_row(*cells_of(step, row))
    console = Console(width=120)
    console.print(table)
    for line in ratios(rows):
        console.print(line)


def write(rows: dict[str, dict[str, float]], heading: str, path: Path) -> None:
    """The table as Markdown between the markers of a file."""
    columns = [Column(name, right=name != "step") for name in COLUMNS]
    table = markdown(columns, [cells_of(step, row) for step, row in rows.items()])
    write_between(path, "training", [f"{heading}:", "", *table, "", ". ".join(ratios(rows)) + "."])


def ratios(rows: dict[str, dict[str, float]]) -> list[str]:
    seconds = {step: row["seconds"] for step, row in rows.items()}
    plain, one, eight, once, whole_image, simmim = ROWS
    lines = []
    for above, below, count, text in (
        (one, plain, 1, "1 category: {:.2f} of the plain step"),
        (eight, one, 8, "8 categories together, a category: {:.2f} of the 1-category step"),
        (once, one, 8, "the same, pseudo prompts once a volume: {:.2f}"),
        (simmim, whole_image, 1, "SimMIM: {:.2f} of the plain step"),
    ):
        if above in seconds and below in seconds:
            lines.append(text.format(seconds[above] / count / seconds[below]))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="rows whose names begin so, comma-separated")
    parser.add_argument(
        "--precision",
        type=Precision,
        choices=(Precision.fp32, Precision.bf16),
        default=Precision.fp32,
        metavar="fp32|bf16",
        help="of the step and of the matrix rate, default fp32",
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--trace", default="", help="folder for chrome traces")
    parser.add_argument("--write", default="", help="a file with the table's markers, which is given the table")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        with contextlib.redirect_stdout(sys.stderr):
            found = ROWS[arguments.row](arguments)
        print(json.dumps(found))
        return
    wanted = tuple(arguments.only.split(",")) if arguments.only else ("",)
    rows = {name: run_row(name, arguments) for name in ROWS if name.startswith(wanted)}
    heading = title(arguments.small, arguments.precision)
    report(rows, heading)
    if arguments.write:
        write(rows, heading, Path(arguments.write))


if __name__ == "__main__":
    main()
