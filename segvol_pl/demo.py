"""The main job on phantoms, in a few minutes on two cores: the whole path, each part the one that real data takes.

1. Make phantoms (`data.phantom`), as NIfTI files in varying orientations.
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

from segvol_pl.config import DemoConfig
from segvol_pl.configure import load
from segvol_pl.data.pack import pack
from segvol_pl.data.phantom import write_phantoms
from segvol_pl.data.whole import write_text
from segvol_pl.evaluate import Summary, evaluate
from segvol_pl.release import export
from segvol_pl.run.tracking import read_metrics
from segvol_pl.run.trainer import pretrain, train
from segvol_pl.shipped import shipped

log = logging.getLogger(__name__)

PHANTOM_SCALE = 0.75
"""Voxels per millimetre against a phantom of the default size: organs small in the overview, but of some voxels."""


def run(config: DemoConfig) -> Summary:
    """Runs the demo in `config.out`, prints the table and where the report lies. Raises what its parts raise."""
    started = time.perf_counter()
    out = Path(config.out)
    shards = _pack(config, out)
    _stage("pre-training", started)
    encoder = pretrain(load("pretrain", _arguments("pretrain", shards, out, config.pretrain_steps, config.seed)))
    _stage("training", started)
    arguments = _arguments("train", shards, out, config.train_steps, config.seed)
    model = export(train(load("train", [*arguments, f"pretrained={encoder}"])), out / "model.safetensors")
    _stage("evaluation", started)
    chosen = [f"checkpoint={model}", f"data.shards={shards}", f"out={out / 'evaluation'}", f"seed={config.seed}"]
    # The model may have been trained further since the demo ran before.
    summary = evaluate(load("evaluate", [_settings("evaluate"), *chosen, "resume=false"]))
    assert summary is not None, "one process alone puts its own results together"
    _tell(summary, out, time.perf_counter() - started)
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


def _arguments(verb: str, shards: Path, out: Path, steps: int, seed: int) -> list[str]:
    chosen = [f"data.shards={shards}", f"data.seed={seed}", f"run.out={out / verb}", f"optim.max_steps={steps}"]
    return [_settings(verb), *chosen]


def _settings(verb: str) -> str:
    return str(shipped("configs") / "tiny" / f"{verb}.yaml")


def _tell(summary: Summary, out: Path, seconds: float) -> None:
    """The table, pre-training's gain, and where the report lies; the same as demo.json."""
    losses = [value for _, value in read_metrics(out / "pretrain" / "metrics.csv", "val/loss")]
    figures = {
        "seconds": round(seconds, 1),
        "pretrain_val_loss_first": losses[0],
        "pretrain_val_loss_last": losses[-1],
        "dice": {setting.prompt: overall.dice for setting, overall in summary.overall.items()},
    }
    write_text(out / "demo.json", json.dumps(figures, indent=2) + "\n")
    console = Console()
    console.print(summary.table())
    fell = 100 * (1 - losses[-1] / losses[0])
    console.print(f"Pre-training: loss on held-out phantoms {losses[0]:.4f} -> {losses[-1]:.4f} ({fell:.0f} % lower)")
    console.print(
        f"Phantom data on a small model: it shows that the parts work together, not accuracy. {seconds:.0f} s."
    )
    console.print(f"Report: {out / 'evaluation' / 'report.html'}")
