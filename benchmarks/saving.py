"""Seconds for which a step waits while a checkpoint is saved, and until it is on the disk: full and sharded.

    python benchmarks/saving.py [--hidden 768] [--ranks 2] [--folder DIR]

The state is that of SegVol at its default size with AdamW's moments (other sizes by --hidden), sharded over CPU ranks
by FSDP2. Full: gathered on rank 0, copied, and written by a thread. Sharded: every rank copies its shards, and a thread
writes its part. The two take turns; medians of three after one that is not counted. A save that waited for the disk
would stall for the whole time until then. CPU ranks gather through memory: over a network the difference is larger.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from results import record
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from segvol_pl.config import SegVolConfig
from segvol_pl.model import SegVol
from segvol_pl.training.checkpoints import AtomicCheckpointIO
from segvol_pl.training.strategies import sharded_blocks

REPEATS = 3
FORMS = ("full", "sharded")


def state(model: SegVol, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """What a run saves: each rank's shards, or all of it gathered on rank 0 (and nothing on the others)."""
    if sharded:
        return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = get_optimizer_state_dict(model, optimizer, options=options)
    return {"state_dict": get_model_state_dict(model, options=options), "optimizer_states": [moments]}


def trained(hidden: int, ranks: int) -> tuple[SegVol, torch.optim.Optimizer]:
    """A sharded model, and its optimizer after one step."""
    torch.manual_seed(0)
    model = SegVol(SegVolConfig(hidden_size=hidden))
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    for block in sharded_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure(rank: int, hidden: int, ranks: int, folder: Path, port: int) -> None:
    """One rank; rank 0 prints and records."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model, optimizer = trained(hidden, ranks)
    waits: dict[str, list[float]] = {form: [] for form in FORMS}
    writes: dict[str, list[float]] = {form: [] for form in FORMS}
    writers = {form: AtomicCheckpointIO(form == "sharded") for form in FORMS}
    for _ in range(REPEATS + 1):
        for form in FORMS:
            dist.barrier()
            start = time.perf_counter()
            gathered = state(model, optimizer, form == "sharded")
            if rank == 0 or form == "sharded":
                writers[form].save_checkpoint(gathered, folder / f"{form}.ckpt")
            dist.barrier()
            waits[form].append(time.perf_counter() - start)
            del gathered
            writers[form].wait()
            dist.barrier()
            writes[form].append(time.perf_counter() - start)
    if rank == 0:
        size = (folder / "full.ckpt").stat().st_size / 1e9
        report(
            hidden,
            ranks,
            size,
            *({form: statistics.median(each[form][1:]) for form in FORMS} for each in (waits, writes)),
        )
    dist.destroy_process_group()


def report(hidden: int, ranks: int, size: float, waits: dict[str, float], writes: dict[str, float]) -> None:
    """Print and record. size: GB; waits, writes: form -> seconds."""
    print(f"{size:.2f} GB, {ranks} ranks")
    for form in FORMS:
        print(f"{form:<8} a step waits {waits[form]:.2f} s, on disk after {writes[form]:.2f} s")
    ratios = {"wait_ratio": waits["sharded"] / waits["full"], "written_ratio": writes["sharded"] / writes["full"]}
    print(f"sharded / full: wait {ratios['wait_ratio']:.2f}, until on disk {ratios['written_ratio']:.2f}")
    figures = {
        f"{form}_{what}_s": each[form] for form in FORMS for what, each in (("wait", waits), ("written", writes))
    }
    record("saving", {"hidden_size": hidden, "ranks": ranks, "checkpoint_gb": size, **figures, **ratios})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    port = 20000 + os.getpid() % 20000
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        settings = (arguments.hidden, arguments.ranks, Path(folder), port)
        multiprocessing.spawn(measure, args=settings, nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
