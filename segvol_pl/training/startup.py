"""Checks before training, so that a run that cannot work fails within seconds.

1. The run folder needs disk space for checkpoints, each node shared memory for the batches of its ranks, and each
   process enough open files for its connections.
2. Configuration, packages and samples must agree on all ranks; the first rank that differs from rank 0 is named. No
   rank receives the statements of all others: rank 0's is broadcast, each rank compares its own with it, and one
   reduction of a few numbers finds the lowest rank that differs, which then reports in what.
"""

from __future__ import annotations

import hashlib
import logging
import math
import resource
import shutil
import socket
import time
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from segvol_pl.config import PretrainConfig, TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.data.store import KEPT_OPEN
from segvol_pl.errors import StartUpError
from segvol_pl.planning.plan import GIB, micro_batch, sample_bytes
from segvol_pl.run_folder import manifest
from segvol_pl.training.ranks import host_group

log = logging.getLogger(__name__)

CLOCK = 60.0
"""Difference of the ranks' clocks, in seconds, above which a warning is logged."""
LATE = 10.0
"""Seconds between the first and the last rank to get here above which the last one is named."""
BYTES_A_WEIGHT, BYTES_AN_AVERAGE = 12, 4
"""Bytes of a checkpoint per weight: float32 and AdamW's two moments; and its average, with `optim.ema`."""
CHECKPOINTS = 3
"""Checkpoints that exist at once besides the step-N.ckpt: last, best, and the one being written."""
SHARED = Path("/dev/shm")
"""Where loader processes put their batches; containers have 64 MiB by default."""
FILES = 256
"""Files that a process has open besides connections and shards, with room to spare."""

VALIDATING = 1
"""Loader processes of validation, which live as long as those of training."""

RANK_BITS = 20
"""Bits of a reduced number that hold a rank: the greatest number is then found together with its rank."""
HOST_BYTES, WORD = 64, 8
"""Bytes of a host's name, as long as Linux allows, and bytes of it in one reduced number."""

Config = PretrainConfig | TrainConfig
Statement = dict[str, str]
"""What is compared -> its value on this rank."""
Value = TypeVar("Value")


class StartUp(pl.Callback):
    """Run the checks once, before the first step or validation. Raises StartUpError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.checked = False

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.checked:
            return
        self.checked = True
        check_room(self.config, sum(parameter.numel() for parameter in module.parameters()))
        check_shared_memory(self.config)
        if trainer.world_size > 1:
            # By rank 0 of each node: all reduce the names of hosts together.
            node = trainer.node_rank if trainer.local_rank == 0 else None
            hosts = compare(self._statement(trainer), node, trainer.num_nodes)
            log.info("%d ranks on %s", trainer.world_size, ", ".join(dict.fromkeys(hosts)))

    def _statement(self, trainer: pl.Trainer) -> Statement:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, VolumeModule)
        packages = ", ".join(f"{name} {version}" for name, version in manifest()["packages"].items())
        return {
            "configuration": _digest(to_yaml(self.config)),
            "packages": packages,
            "samples": _digest(" ".join(index_digests(data))),
        }


def index_digests(data: VolumeModule) -> list[str]:
    """Hashes of the index entries of all samples. Unlike `data.samples`, they include the shards that hold these."""
    return [part.records.digest() for corpus in (data.train_corpus, data.val_corpus) for part in corpus.parts]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(own: Statement, node: int | None, nodes: int) -> list[str]:
    """Compare the statements of all ranks with rank 0's. All ranks call this together.

    Args:
        own: this rank's statement.
        node: number of the node that this rank names the host of; None: another rank of the node does.
        nodes: number of nodes.

    Returns:
        The host of each node.

    Raises:
        StartUpError: naming the first rank that differs from rank 0, and in what.
    """
    rank, arrived = dist.get_rank(), _milliseconds()
    first, first_host = _from_rank(0, (own, socket.gethostname()))
    what = next((name for name, value in own.items() if value != first[name]), None)
    ranks = dist.get_world_size()
    of_all = _greatest([_with_rank(arrived), _with_rank(-arrived), -rank if what else -ranks], node, nodes)
    last, earliest, lowest, *words = of_all
    if -lowest < ranks:
        what, value, host = _from_rank(-lowest, (what, own.get(what or ""), socket.gethostname()))
        raise StartUpError(
            f"{what} of rank {-lowest} on {host} differs from rank 0 on {first_host} ({value}; {first[what or '']}): "
            "use the same environment, arguments and shards on all nodes"
        )
    # Only now: before, ranks were still arriving.
    _compare_clocks()
    _name_the_last(last, earliest)
    return [_host(words[number : number + HOST_BYTES // WORD]) for number in range(0, len(words), HOST_BYTES // WORD)]


def _compare_clocks() -> None:
    """Warn if the clocks differ: logs and file times of different hosts then cannot be compared."""
    now = _milliseconds()
    late, early = _greatest([_with_rank(now), _with_rank(-now)])
    apart = ((late >> RANK_BITS) + (early >> RANK_BITS)) / 1000
    if apart > CLOCK:
        hosts = [_from_rank(_rank_of(number), socket.gethostname()) for number in (late, early)]
        if dist.get_rank() == 0:
            log.warning("the clocks of %s and %s differ by %.0f s", *hosts, apart)


def _name_the_last(last: int, earliest: int) -> None:
    waited = ((last >> RANK_BITS) + (earliest >> RANK_BITS)) / 1000
    if waited > LATE:
        host = _from_rank(_rank_of(last), socket.gethostname())
        log.info("rank %d on %s was the last to start, %.0f s after the first", _rank_of(last), host, waited)


def _milliseconds() -> int:
    return int(1000 * time.time())


def _with_rank(number: int) -> int:
    """A number that orders as `number`, and also holds this rank."""
    return (number << RANK_BITS) | dist.get_rank()


def _rank_of(number: int) -> int:
    return number & ((1 << RANK_BITS) - 1)


def _from_rank(rank: int, own: Value) -> Value:
    """The value that a rank has."""
    values = [own]
    dist.broadcast_object_list(values, src=rank, group=host_group())
    return values[0]


def _greatest(numbers: list[int], node: int | None = None, nodes: int = 0) -> list[int]:
    """The greatest value of each number over all ranks, followed by the names of the nodes' hosts as numbers."""
    width = HOST_BYTES // WORD
    hosts = torch.zeros(nodes, width, dtype=torch.int64)
    if node is not None and node < nodes:
        name = socket.gethostname().encode("ascii", "replace")[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
        # Of ASCII the highest bit is 0: no number is negative, and the others' zeros are less.
        hosts[node] = torch.tensor([int.from_bytes(name[at : at + WORD], "big") for at in range(0, HOST_BYTES, WORD)])
    together = torch.cat([torch.tensor(numbers, dtype=torch.int64), hosts.flatten()])
    dist.all_reduce(together, dist.ReduceOp.MAX, group=host_group())
    found: list[int] = together.tolist()
    return found


def _host(words: list[int]) -> str:
    return b"".join(word.to_bytes(WORD, "big") for word in words).rstrip(b"\0").decode("ascii")


def check_room(config: Config, weights: int) -> str:
    """Raise StartUpError if the run folder's disk cannot hold the checkpoints. weights: number of parameters.

    Returns what is needed, and what is free, in words; so do the other checks.
    """
    run = config.run
    count = CHECKPOINTS + len(set(run.keep_steps)) + (run.keep_last if run.save_every else 0)
    size = weights * (BYTES_A_WEIGHT + (BYTES_AN_AVERAGE if config.optim.ema else 0))
    needed, free = count * size, shutil.disk_usage(run.out).free
    if free < needed:
        raise StartUpError(
            f"run.out: {run.out} has {free / 1e9:.1f} GB free, {count} checkpoints need {needed / 1e9:.1f}: make room"
        )
    return f"{count} of {size / 1e9:.2f} GB at once; {free / 1e9:.1f} GB free"


def shared_bytes(config: Config) -> int:
    """Bytes of shared memory that the prefetched batches of one node's loader processes need."""
    run, data = config.run, config.data
    batch = sample_bytes(config) * micro_batch(config)
    return run.devices * (data.workers + VALIDATING) * data.prefetch * batch if data.workers else 0


def check_shared_memory(config: Config, place: Path = SHARED) -> str:
    """Raise StartUpError if shared memory is too small for the batches: loader processes would die of SIGBUS."""
    needed = shared_bytes(config)
    if not needed or not place.is_dir():
        return "not used" if not needed else f"no {place}"
    free = shutil.disk_usage(place).free
    if free < needed:
        size = math.ceil(1.1 * needed / GIB)
        raise StartUpError(
            f"data.workers: {place} has {free / GIB:.2f} GiB free, the loader processes of {config.run.devices} ranks "
            f"need {needed / GIB:.2f}: start the container with --shm-size={size}g or --ipc=host, or lower "
            "data.workers or data.prefetch"
        )
    return f"{needed / GIB:.2f} GiB for the ranks of a node; {free / GIB:.2f} GiB free"


def check_open_files(ranks: int) -> str:
    """Raise this process's limit of open files to what its connections need, or StartUpError if it may not be so high.

    gloo connects each rank with every other one, and all ranks are connected with the store of rank 0.
    """
    needed = 2 * ranks + KEPT_OPEN + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and hard < needed:
        raise StartUpError(
            f"open files: this process may open {hard}, a run of {ranks} ranks needs {needed} for its connections and "
            "shards: raise the limit of the nodes (LimitNOFILE of slurmd, or --ulimit nofile of a container)"
        )
    if soft != unlimited and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return f"{needed} needed; {'any number' if hard == unlimited else hard} allowed"
