"""The main job on phantoms, in a few minutes on two cores: the same code path that real data takes.

Training and prediction run on `device`, by default a GPU if there is one.

1. Make phantoms (`packing.phantom`), as NIfTI files in varying orientations.
2. `pack` them; labelled and unlabelled ones into shards of their own.
3. `pretrain` on the unlabelled, `train` on the labelled ones, with the settings of `configs/tiny`.
4. `export` the model, `evaluate` it on held-out phantoms, write the report.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from segvol_pl.atomic import write_text
from segvol_pl.config import DemoConfig, Mode
from segvol_pl.config.loader import load
from segvol_pl.device import resolve_device
from segvol_pl.evaluation.run import evaluate
from segvol_pl.evaluation.summary import Summary, number
from segvol_pl.model.convert import export
from segvol_pl.packing import phantom
from segvol_pl.packing.pack import pack
from segvol_pl.resources import bundled
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import pretrain, train

log = logging.getLogger(__name__)

SMALL = ("spleen", "kidney left", "kidney right", "aorta", "liver tumour")
"""Categories of the table's second part: less than a hundred voxels of the overview."""
PROMPTS = ("text", "points", "points+text", "box", "box+text")
"""Kinds of prompts to evaluate, each with zooming and with sliding windows."""
WAYS = ("zoom-out", "sliding", "zoom-in")
"""Columns of the table."""


def run(config: DemoConfig, console: Console | None = None) -> Summary:
    """Run the demo in `config.out`; print the table and the report's path. Raises what its stages raise."""
    resolve_device(config.device)  # fails before any work if there is none
    started = time.perf_counter()
    out = Path(config.out)
    shards = _pack(config, out)
    _stage("pre-training", started)
    encoder = pretrain(load("pretrain", training("pretrain", config, shards)))
    _stage("training", started)
    export(train(load("train", [*training("train", config, shards), f"pretrained={encoder}"])), _model(out))
    _stage("evaluation", started)
    summary = evaluate(load("evaluate", evaluation(config, shards)))
    assert summary is not None, "a single process always returns the summary"
    _report(summary, out, time.perf_counter() - started, console or Console())
    return summary


def _stage(name: str, started: float) -> None:
    log.info("---- %s (%.0f s since the start)", name, time.perf_counter() - started)


def _pack(config: DemoConfig, out: Path) -> Path:
    phantoms = out / "phantoms"
    if not (phantoms / "categories.yaml").exists():
        log.info("making %d phantoms in %s", config.volumes, phantoms)
        made = [f"out={phantoms}", f"volumes={config.volumes}", f"seed={config.seed}"]
        made += [] if config.scale is None else [f"scale={config.scale}"]
        phantom.phantoms(load("phantoms", [_settings("phantoms"), *made]))
    sources = [f"{part}={phantoms / part}" for part in ("images", "labels")]
    chosen = [*sources, f"categories={phantoms / 'categories.yaml'}", f"out={out / 'shards'}"]
    pack(load("pack", [_settings("pack"), *chosen]))
    return out / "shards"


def training(command: str, config: DemoConfig, shards: Path) -> list[str]:
    """The arguments of `pretrain` and of `train`."""
    steps = {"pretrain": config.pretrain_steps, "train": config.train_steps}[command]
    chosen = [f"data.shards={shards}", f"data.seed={config.seed}", f"optim.max_steps={steps}"]
    placed = [f"run.out={Path(config.out) / command}", f"run.accelerator={config.device}"]
    return [_settings(command), *chosen, *placed]


def evaluation(config: DemoConfig, shards: Path) -> list[str]:
    """The arguments of `evaluate`."""
    out = Path(config.out)
    chosen = [f"checkpoint={_model(out)}", f"data.shards={shards}", f"seed={config.seed}"]
    placed = [f"out={out / 'evaluation'}", f"device={config.device}"]
    compared = [f"modes=[{Mode.zoom.value}, {Mode.sliding.value}]", f"prompts=[{', '.join(PROMPTS)}]"]
    # The model may have been trained further since an earlier run of the demo.
    return [_settings("evaluate"), *chosen, *placed, *compared, "resume=false"]


def _model(out: Path) -> Path:
    return out / "model.safetensors"


def _settings(command: str) -> str:
    return str(bundled("configs") / "tiny" / f"{command}.yaml")


def _report(summary: Summary, out: Path, seconds: float, console: Console) -> None:
    """Print the table, the gain of pre-training and the report's path; write the same figures to demo.json."""
    dice, small = _by_way(summary, summary.categories), _by_way(summary, SMALL)
    losses = [value for _, value in read_metrics(out / "pretrain" / "metrics.csv", "val/loss")]
    figures = {
        "seconds": round(seconds, 1),
        "pretrain_val_loss_first": losses[0],
        "pretrain_val_loss_last": losses[-1],
        "dice": dice,
        "dice_small": small,
        "prompt_seconds": {f"{each.prompt} {each.mode}": found.seconds for each, found in summary.overall.items()},
    }
    write_text(out / "demo.json", json.dumps(figures, indent=2) + "\n")
    console.print(_table(summary, dice, small))
    fell = 100 * (1 - losses[-1] / losses[0])
    console.print(f"Pre-training: loss on held-out phantoms {losses[0]:.4f} -> {losses[-1]:.4f} ({fell:.0f} % lower)")
    console.print(
        f"Phantom data on a small model: this shows that the parts work together, not accuracy. {seconds:.0f} s."
    )
    console.print(f"Report: {out / 'evaluation' / 'report.html'}", soft_wrap=True)
    ct = min((out / "phantoms" / "images").iterdir())
    # In one line, as it is to be copied.
    console.print(f"Try the model: segvol-pl view {ct} checkpoint={_model(out)}", soft_wrap=True)


Dice = dict[str, dict[str, float]]
"""Prompt -> column of `WAYS` -> mean Dice."""


def _by_way(summary: Summary, categories: Sequence[str]) -> Dice:
    """Mean over these categories of their means over cases."""
    found: dict[str, dict[str, list[float]]] = {}
    for (category, setting), cell in summary.cells.items():
        if category not in categories or cell.dice is None:
            continue
        ways = found.setdefault(setting.prompt, {way: [] for way in WAYS})
        ways["sliding" if setting.mode == Mode.sliding.value else "zoom-in"].append(cell.dice.mean)
        if cell.zoom_out is not None:
            ways["zoom-out"].append(cell.zoom_out.mean)
    return {prompt: {way: float(np.mean(dice)) for way, dice in ways.items()} for prompt, ways in found.items()}


def _table(summary: Summary, dice: Dice, small: Dice) -> Table:
    """Make the table: the three ways side by side, over all categories and over small ones, and their time."""
    count = len(summary.categories)
    title = f"Mean Dice of {count} categories ({len(SMALL)} small ones) of {summary.cases} held-out phantoms"
    table = Table(box=SIMPLE_HEAD, title=title)
    table.add_column("prompt")
    for heading in (*WAYS, *(f"small: {way}" for way in WAYS), "s: sliding", "s: zoom-in"):
        table.add_column(heading, justify="right")
    seconds = {(each.prompt, each.mode): found.seconds for each, found in summary.overall.items()}
    for prompt, ways in dice.items():
        figures = [*(ways[way] for way in WAYS), *(small[prompt][way] for way in WAYS)]
        times = [seconds[prompt, mode.value] for mode in (Mode.sliding, Mode.zoom)]
        table.add_row(prompt, *(number(figure) for figure in figures), *(number(time, 2) for time in times))
    return table
