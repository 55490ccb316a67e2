"""Seconds for which a step waits while a checkpoint is saved, against the seconds that writing it takes.

    python benchmarks/saving.py [--hidden 768] [--folder DIR]

The state is that of SegVol at its default size with AdamW's moments (other sizes by --hidden), on one process. Saving
stalls training for the copy alone; a save that waited for the disk would stall for both. Median of three.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from results import record

from segvol_pl.config import SegVolConfig
from segvol_pl.model import SegVol
from segvol_pl.training.checkpoints import AtomicCheckpointIO

REPEATS = 3


def state(hidden: int) -> dict[str, torch.Tensor]:
    """The weights, and twice their number for the moments."""
    weights = SegVol(SegVolConfig(hidden_size=hidden)).state_dict()
    moments = {f"{name}.{which}": value.clone() for name, value in weights.items() for which in ("first", "second")}
    return {**weights, **moments}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    saved, io = state(arguments.hidden), AtomicCheckpointIO()
    stalls, writes = [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for _ in range(REPEATS):
            start = time.perf_counter()
            io.save_checkpoint(saved, Path(folder) / "last.ckpt")
            stalls.append(time.perf_counter() - start)
            io.wait()
            writes.append(time.perf_counter() - start - stalls[-1])
        size = (Path(folder) / "last.ckpt").stat().st_size
    stall, write = statistics.median(stalls), statistics.median(writes)
    print(f"{size / 1e9:.2f} GB: the step waits {stall:.2f} s, writing takes {write:.2f} s beside it")
    print(f"{stall / (stall + write):.2f} of the time of a save that waits for the disk")
    record("saving", {"hidden_size": arguments.hidden, "checkpoint_gb": size / 1e9, "stall_s": stall, "write_s": write})


if __name__ == "__main__":
    main()
