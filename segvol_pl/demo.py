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
from pathlib import Path

from rich.console import Console

from segvol_pl.atomic import write_text
from segvol_pl.config import DemoConfig
from segvol_pl.config.loader import load
from segvol_pl.device import resolve_device
from segvol_pl.evaluation.run import evaluate
from segvol_pl.evaluation.summary import Summary
from segvol_pl.model.convert import export
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms
from segvol_pl.resources import bundled
from segvol_pl.run_folder import read_metrics
from segvol_pl.training.run import pretrain, train

log = logging.getLogger(__name__)

PHANTOM_SCALE = 0.75
"""Scale of the phantoms: organs are small in the overview, but still cover some voxels."""


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
        write_phantoms(phantoms, config.volumes, config.seed, scale=PHANTOM_SCALE)
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
    # The model may have been trained further since an earlier run of the demo.
    return [_settings("evaluate"), *chosen, *placed, "resume=false"]


def _model(out: Path) -> Path:
    return out / "model.safetensors"


def _settings(command: str) -> str:
    return str(bundled("configs") / "tiny" / f"{command}.yaml")


def _report(summary: Summary, out: Path, seconds: float, console: Console) -> None:
    """Print the table, the gain of pre-training and the report's path; write the same figures to demo.json."""
    losses = [value for _, value in read_metrics(out / "pretrain" / "metrics.csv", "val/loss")]
    figures = {
        "seconds": round(seconds, 1),
        "pretrain_val_loss_first": losses[0],
        "pretrain_val_loss_last": losses[-1],
        "dice": {setting.prompt: overall.dice for setting, overall in summary.overall.items()},
    }
    write_text(out / "demo.json", json.dumps(figures, indent=2) + "\n")
    console.print(summary.table())
    fell = 100 * (1 - losses[-1] / losses[0])
    console.print(f"Pre-training: loss on held-out phantoms {losses[0]:.4f} -> {losses[-1]:.4f} ({fell:.0f} % lower)")
    console.print(
        f"Phantom data on a small model: this shows that the parts work together, not accuracy. {seconds:.0f} s."
    )
    console.print(f"Report: {out / 'evaluation' / 'report.html'}")
