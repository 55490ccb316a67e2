"""Fine-tuning on synthetic CTs with organs that the checkpoint never saw: what is gained and forgotten, in which time.

    python benchmarks/finetune.py OUT --checkpoint FILE --old SHARDS [--record] [--arms full scratch lora replay]

The checkpoint is a model like the demo's (`segvol-pl demo`: OUT/model.safetensors), which knows 10 categories, and the
shards are the demo's. 16 new phantoms have labels of stomach and bladder alone. Each arm is one command. `full` does
everything and is timed from start to end; it must come first. The others begin with its shards and with its evaluations
of the checkpoint, which are the same, and their training is timed. `scratch` trains the same model on the same cases
without a checkpoint, for four times the steps. `replay` is LoRA with the old training cases mixed in, at half the rate
and for six times the steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import record

STEPS, FACTOR, REPLAYED = 100, 4, 6
"""Steps of fine-tuning, and how many times as many from scratch, and with old cases mixed in."""
NEW = {"stomach": [11], "bladder": [12]}
PROMPTS = "text, box"
FIRST = "full"
SETTINGS = "configs/tiny/finetune.yaml"
SILENT = "track.wandb=disabled"


def run(*arguments: str) -> float:
    """Run a command of segvol-pl; return its seconds."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "segvol_pl", *arguments], check=True)
    return time.monotonic() - began


def make_cases(folder: Path) -> Path:
    """Make the phantoms of the new anatomy."""
    if not (folder / "categories.yaml").exists():
        made = ["configs/tiny/phantoms.yaml", f"out={folder}", "volumes=16", "seed=7", "workers=2"]
        run("phantoms", *made, f"categories=[{', '.join(NEW)}]")
    return folder


def share_evaluations(first: Path, out: Path) -> None:
    """Begin a fine-tuning with the evaluations of the checkpoint that another one has made on the same cases."""
    out.mkdir(parents=True)
    for name in ("before", "before-old"):
        shutil.copytree(first / name, out / name)
    stages = json.loads((first / "stages.json").read_text(encoding="utf-8"))
    kept = {name: done for name, done in stages.items() if name.startswith("evaluate before")}
    (out / "stages.json").write_text(json.dumps(kept), encoding="utf-8")


def fine_tune(out: Path, new: Path, given: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Run one arm, and return its figures."""
    first = given.out / FIRST
    sources = [f"{part}={new / part}" for part in ("images", "labels")]
    own = [*sources, f"categories={new / 'categories.yaml'}"] if out == first else [f"shards={first / 'shards'}"]
    if out != first and not out.exists():
        share_evaluations(first, out)
    chosen = [
        *own,
        f"from={given.checkpoint}",
        f"out={out}",
        "held_out=0.3",
        f"evaluation.prompts=[{PROMPTS}]",
        "evaluation.pictures=0",
    ]
    measured = [f"forgotten.shards={given.old}", SILENT]
    seconds = run("finetune", SETTINGS, *chosen, *measured, *more)
    return {**({"command_s": round(seconds, 1)} if out == first else {}), **figures_of(out)}


def figures_of(out: Path) -> dict[str, Any]:
    """The figures of a finished fine-tuning: Dice on the new organs, and points lost or gained on the old ones."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {"training_s": report["stages"]["train"]["seconds"]}
    for gain in (gain for gain in report["gained"] if not gain["category"]):
        figures[f"new_dice_{gain['prompt'].split()[0]}"] = round(gain["after"]["mean"], 4)
    for gain in (gain for gain in report["forgotten"] if not gain["category"]):
        change = gain["difference"]
        figures[f"old_points_{gain['prompt'].split()[0]}"] = round(100 * change["mean"], 2)
        figures[f"old_points_interval_{gain['prompt'].split()[0]}"] = [
            round(100 * end, 2) for end in change["interval"]
        ]
    return figures


def from_scratch(out: Path, shards: Path) -> dict[str, Any]:
    """Train on the same cases without a checkpoint, and evaluate as `finetune` does."""
    steps = f"optim.max_steps={FACTOR * STEPS}"
    seconds = run(
        "train", "configs/tiny/train.yaml", f"data.shards={shards}", f"run.out={out / 'train'}", steps, SILENT
    )
    checkpoint = out / "train" / "checkpoints" / "last.ckpt"
    chosen = [f"checkpoint={checkpoint}", f"data.shards={shards}", f"out={out / 'evaluation'}", "pictures=0"]
    run("evaluate", "configs/tiny/evaluate.yaml", *chosen, f"prompts=[{PROMPTS}]", "match_categories=false")
    summary = json.loads((out / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    return {
        "training_s": round(seconds, 1),
        **{f"new_dice_{each['prompt']}": round(each["dice"], 4) for each in summary["overall"]},
    }


def main() -> None:
    """Run the arms that are named, and print or record all figures of the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--old", required=True)
    parser.add_argument("--arms", nargs="*", default=["full", "scratch", "decoder", "lora", "replay"])
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    new, path = make_cases(given.out / "phantoms"), given.out / "figures.json"
    brief = f"optim.max_steps={STEPS}"
    more = {
        "full": ["method=full", brief],
        "decoder": ["method=decoder", brief],
        "lora": ["method=lora", brief],
        "replay": ["method=lora", f"data.mix=[{given.old}]", "optim.lr=5e-4", f"optim.max_steps={REPLAYED * STEPS}"],
    }
    for arm in given.arms:
        out = given.out / arm
        found = from_scratch(out, given.out / FIRST / "shards") if arm == "scratch" else None
        found = found or fine_tune(out, new, given, *more[arm])
        figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**figures, arm: found}, indent=1), encoding="utf-8")
        print(json.dumps({arm: found}, indent=1), flush=True)
    if given.record:
        figures = json.loads(path.read_text(encoding="utf-8"))
        further = {"steps_from_scratch": FACTOR * STEPS, "steps_of_replay": REPLAYED * STEPS}
        print(record("finetune", {"steps": STEPS, **further, **figures}))


if __name__ == "__main__":
    main()
