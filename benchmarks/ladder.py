"""A ladder of sizes and lengths on phantoms, and the laws that its runs support: SimMIM, then training on prompts.

    make ladder                                     # both
    python benchmarks/ladder.py commands=pretrain   # SimMIM alone

The grids are configs/ablations/ladder_pretrain.yaml and ladder_train.yaml: one trunk for each size and seed, branches
for the shorter lengths, one learning rate that transfers over widths. Two runs go at a time, a core each. Started
again, it continues where it stopped. Phantom data, small models, CPU: it shows the instrument, not accuracy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import record

from segvol_pl.config.loader import load
from segvol_pl.experiments.grid import Run, expand, read
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
METRICS = {"pretrain": "val/loss", "train": "val/supervised"}
"""Command -> the loss that is fitted."""
AT_ONCE = 2
VOLUMES = 320


def shards_of(out: Path, volumes: int, labelled: bool = True) -> Path:
    """Packed phantoms, a fifth of them held out; without their labels, samples are read in a third of the time."""
    phantoms, shards = out / "phantoms", out / ("shards" if labelled else "unlabelled")
    if not (shards / "index.json").exists():
        if not (phantoms / "categories.yaml").exists():
            write_phantoms(phantoms, volumes, seed=0, scale=0.5, workers=0)
        sources = [f"images={phantoms / 'images'}"]
        if labelled:
            sources += [f"labels={phantoms / 'labels'}", f"categories={phantoms / 'categories.yaml'}"]
        chosen = [*sources, f"out={shards}", "overview_shape=[16,32,32]", "regions.enabled=false"]
        pack(load("pack", [str(ROOT / "configs" / "tiny" / "pack.yaml"), *chosen]))
    return shards


def program(*arguments: str) -> int:
    """`segvol-pl ARGUMENTS` on one thread; its exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "segvol_pl", *arguments], cwd=ROOT, env=environment, check=False
    ).returncode


def climb(command: str, shards: Path, out: Path) -> int:
    """Do the runs of a command's grid, trunks before branches, and fit the laws; the number of runs that failed."""
    grid = str(ROOT / "configs" / "ablations" / f"ladder_{command}.yaml")
    chosen = [f"data.shards={shards}", f"out={out / command}"]
    runs = expand(read(Path(grid)), chosen[:1])
    trunks, branches = ([run for run in runs if (run.trunk is None) == first] for first in (True, False))

    def status(run: Run) -> int:
        return program("grid", grid, *chosen, f"run={run.number}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = sum(map(bool, [*pool.map(status, trunks), *pool.map(status, branches)]))
    program("grid", grid, *chosen)
    program("scaling", "fit", str(out / command), f"metric={METRICS[command]}", f"out={out / f'{command}-fit'}")
    return failed


def figures_of(fit: Path) -> dict[str, Any]:
    """What a fit found, without the runs: law -> supported, reasons, coefficients, largest settings as predicted."""
    laws = json.loads((fit / "fit.json").read_text(encoding="utf-8"))["laws"]
    kept = ("supported", "reasons", "cautions", "coefficients")

    def figures(law: dict[str, Any]) -> dict[str, Any]:
        held_out = {name: value for name, value in (law["held_out"] or {}).items() if name != "predictions"}
        return {name: law[name] for name in kept} | {"held_out": held_out}

    return {f"{law['law']} ({law['where']})": figures(law) for law in laws}


def main() -> int:
    """Exit status: 0 where all runs finished and the fits were written."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    out = Path(given.get("out", "runs/ladder")).resolve()
    commands = given.get("commands", "pretrain,train").split(",")
    begun, failed, found = time.perf_counter(), 0, {}
    for command in commands:
        started = time.perf_counter()
        failed += climb(command, shards_of(out, VOLUMES, labelled=command == "train"), out)
        found[command] = {
            "minutes": round((time.perf_counter() - started) / 60, 1),
            **figures_of(out / f"{command}-fit"),
        }
    print(f"{(time.perf_counter() - begun) / 60:.0f} minutes in all, {failed} runs failed")
    record("ladder", found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
