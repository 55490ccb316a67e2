"""The worked example of scaling: phantoms, the grid configs/ablations/worked_example.yaml, and laws fitted to it.

    python benchmarks/worked_example.py                                        # all 32 runs
    python benchmarks/worked_example.py steps=40 volumes=40 out=runs/short     # the same path, cut down

Phantom data, models of 30 to 600 thousand parameters, CPU: it shows the instrument, not accuracy. Given again it goes
on where it stopped. Two runs go at a time, a core each.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from segvol_pl.config.loader import load
from segvol_pl.experiments.grid import expand, read
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms

ROOT = Path(__file__).parents[1]
GRID = ROOT / "configs" / "ablations" / "worked_example.yaml"
AT_ONCE = 2


def shards_of(out: Path, volumes: int) -> Path:
    """Packed phantoms, a fifth of them held out."""
    phantoms, shards = out / "phantoms", out / "shards"
    if not (shards / "index.json").exists():
        write_phantoms(phantoms, volumes, seed=0, scale=0.5)
        sources = [f"{part}={phantoms / part}" for part in ("images", "labels")]
        sources.append(f"categories={phantoms / 'categories.yaml'}")
        chosen = [*sources, f"out={shards}", "overview_shape=[16,32,32]", "regions.enabled=false"]
        pack(load("pack", [str(ROOT / "configs" / "tiny" / "pack.yaml"), *chosen]))
    return shards


def program(*arguments: str) -> int:
    """`segvol-pl ARGUMENTS`; its exit status."""
    return subprocess.run([sys.executable, "-m", "segvol_pl", *arguments], cwd=ROOT, check=False).returncode


def main() -> int:
    """Exit status: 0 where all runs finished and the fits were written."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    out = Path(given.get("out", "runs/worked_example")).resolve()
    started = time.perf_counter()
    shards = shards_of(out, int(given.get("volumes", 80)))
    chosen = [f"data.shards={shards}", f"out={out / 'runs'}"]
    if "steps" in given:
        chosen += [f"optim.max_steps={given['steps']}"]
    runs = expand(read(GRID), [pair for pair in chosen if not pair.startswith("out=")])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        statuses = list(pool.map(lambda run: program("grid", str(GRID), *chosen, f"run={run.number}"), runs))
    program("grid", str(GRID), *chosen)
    for metric, name in (("val/supervised", "loss"), ("val/dice/box+text", "dice")):
        program("scaling", "fit", str(out / "runs"), "samples=volumes", f"metric={metric}", f"out={out / name}")
    print(f"{time.perf_counter() - started:.0f} s in all, {sum(map(bool, statuses))} of {len(runs)} runs failed")
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main())
