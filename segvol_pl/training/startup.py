"""What must be alike on all ranks, and be there at all: looked at before training, so that it fails in seconds.

1. Every rank states its configuration, packages, samples and clock; the first that differs from rank 0 is named.
2. Room for checkpoints in the run folder, and in shared memory for the batches of all ranks of a node, is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import socket
import time
from pathlib import Path

import lightning.pytorch as pl

from segvol_pl.config import PretrainConfig, RunConfig, TrainConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.data.datamodule import VolumeModule
from segvol_pl.errors import StartUpError
from segvol_pl.planning.plan import GIB, micro_batch, sample_bytes
from segvol_pl.run_folder import manifest
from segvol_pl.training.ranks import gathered

log = logging.getLogger(__name__)

CLOCK = 60.0
"""Seconds by which the ranks' clocks may differ before it is said."""
BYTES_A_WEIGHT = 12
"""In a checkpoint: float32, and AdamW's two moments."""
CHECKPOINTS = 3
"""Those that must fit at once beside the ones that are kept: last, best, and the one being written."""
SHARED = Path("/dev/shm")
"""Where loader processes lay their batches; containers come with 64 MiB of it."""

VALIDATING = 1
"""Loader processes of validation, which stay beside those of training."""

Config = PretrainConfig | TrainConfig
Statement = dict[str, str]
"""What is compared -> what this rank says of it."""


class StartUp(pl.Callback):
    """Compares the ranks once, before the first step or validation. Raises StartUpError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.looked = False

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.looked:
            return
        self.looked = True
        check_room(self.config.run, sum(parameter.numel() for parameter in module.parameters()))
        check_shared_memory(self.config)
        if trainer.world_size > 1:
            said = self._statement(trainer), socket.gethostname(), time.time()
            stated = gathered(said, trainer.world_size)
            hosts = [host for _, host, _ in stated]
            compare([statement for statement, _, _ in stated], hosts)
            compare_clocks([clock for _, _, clock in stated], hosts)
            log.info("%d ranks on %s", trainer.world_size, ", ".join(dict.fromkeys(hosts)))

    def _statement(self, trainer: pl.Trainer) -> Statement:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, VolumeModule)
        packages = ", ".join(f"{name} {version}" for name, version in manifest()["packages"].items())
        return {
            "configuration": _digest(to_yaml(self.config)),
            "packages": packages,
            "samples": _digest(samples_of(data)),
        }


def samples_of(data: VolumeModule) -> str:
    """The samples of both corpora and where they lie, as their index states them."""
    records = [*data.train_corpus.records, *data.val_corpus.records]
    return "\n".join(f"{record.key} {record.facts_sha256} {record.shard} {record.members}" for record in records)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(statements: list[Statement], hosts: list[str]) -> None:
    """Raises StartUpError naming the first rank that differs from rank 0, and in what."""
    first = statements[0]
    for rank, (statement, host) in enumerate(zip(statements, hosts, strict=True)):
        for what, said in statement.items():
            if said != first[what]:
                raise StartUpError(
                    f"rank {rank} on {host} has other {what} than rank 0 on {hosts[0]} ({said}; {first[what]}): "
                    "give all nodes the same environment, arguments and shards"
                )


def compare_clocks(clocks: list[float], hosts: list[str]) -> None:
    """Warns of clocks apart: logs and file times cannot be put in order."""
    apart = max(clocks) - min(clocks)
    if apart > CLOCK:
        late, early = hosts[clocks.index(max(clocks))], hosts[clocks.index(min(clocks))]
        log.warning("the clocks of %s and %s are %.0f s apart", late, early, apart)


def check_room(run: RunConfig, weights: int) -> None:
    """Raises StartUpError where the run folder's disk cannot hold the checkpoints."""
    count = CHECKPOINTS + (run.keep_last if run.save_every else 0)
    needed, free = count * BYTES_A_WEIGHT * weights, shutil.disk_usage(run.out).free
    if free < needed:
        raise StartUpError(
            f"run.out: {run.out} has {free / 1e9:.1f} GB free, {count} checkpoints need {needed / 1e9:.1f}: make room"
        )


def shared_bytes(config: Config) -> int:
    """What the loader processes of one node lay into shared memory: the batches that they hold ready."""
    run, data = config.run, config.data
    batch = sample_bytes(config) * micro_batch(config)
    return run.devices * (data.workers + VALIDATING) * data.prefetch * batch if data.workers else 0


def check_shared_memory(config: Config, place: Path = SHARED) -> None:
    """Raises StartUpError where loader processes could not hand over their batches: they would die of SIGBUS."""
    needed = shared_bytes(config)
    if needed and place.is_dir() and (free := shutil.disk_usage(place).free) < needed:
        size = math.ceil(1.1 * needed / GIB)
        raise StartUpError(
            f"data.workers: {place} has {free / GIB:.2f} GiB free, the loader processes of {config.run.devices} ranks "
            f"need {needed / GIB:.2f}: start the container with --shm-size={size}g or --ipc=host, or lower "
            "data.workers or data.prefetch"
        )
