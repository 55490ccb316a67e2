"""Checks before training, so that a run that cannot work fails within seconds.

1. Configuration, packages and samples must agree on all ranks; the first rank that differs from rank 0 is named.
2. The run folder needs disk space for checkpoints, and each node shared memory for the batches of its ranks.
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
"""Difference of the ranks' clocks, in seconds, above which a warning is logged."""
BYTES_A_WEIGHT = 12
"""Bytes of a checkpoint per weight: float32, and AdamW's two moments."""
CHECKPOINTS = 3
"""Checkpoints that exist at once besides the step-N.ckpt: last, best, and the one being written."""
SHARED = Path("/dev/shm")
"""Where loader processes put their batches; containers have 64 MiB by default."""

VALIDATING = 1
"""Loader processes of validation, which live as long as those of training."""

Config = PretrainConfig | TrainConfig
Statement = dict[str, str]
"""What is compared -> its value on this rank."""


class StartUp(pl.Callback):
    """Run the checks once, before the first step or validation. Raises StartUpError."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.checked = False

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.checked:
            return
        self.checked = True
        check_room(self.config.run, sum(parameter.numel() for parameter in module.parameters()))
        check_shared_memory(self.config)
        if trainer.world_size > 1:
            stated = gathered((self._statement(trainer), socket.gethostname(), time.time()), trainer.world_size)
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
            "samples": _digest(" ".join(index_digests(data))),
        }


def index_digests(data: VolumeModule) -> list[str]:
    """Hashes of the index entries of all samples. Unlike `data.samples`, they include the shards that hold these."""
    return [part.records.digest() for corpus in (data.train_corpus, data.val_corpus) for part in corpus.parts]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(statements: list[Statement], hosts: list[str]) -> None:
    """Raise StartUpError naming the first rank that differs from rank 0, and in what."""
    first = statements[0]
    for rank, (statement, host) in enumerate(zip(statements, hosts, strict=True)):
        for what, value in statement.items():
            if value != first[what]:
                raise StartUpError(
                    f"{what} of rank {rank} on {host} differs from rank 0 on {hosts[0]} ({value}; {first[what]}): "
                    "use the same environment, arguments and shards on all nodes"
                )


def compare_clocks(clocks: list[float], hosts: list[str]) -> None:
    """Warn if the clocks differ: logs and file times of different hosts then cannot be compared."""
    apart = max(clocks) - min(clocks)
    if apart > CLOCK:
        late, early = hosts[clocks.index(max(clocks))], hosts[clocks.index(min(clocks))]
        log.warning("the clocks of %s and %s differ by %.0f s", late, early, apart)


def check_room(run: RunConfig, weights: int) -> None:
    """Raise StartUpError if the run folder's disk cannot hold the checkpoints. weights: number of parameters."""
    count = CHECKPOINTS + (run.keep_last if run.save_every else 0)
    needed, free = count * BYTES_A_WEIGHT * weights, shutil.disk_usage(run.out).free
    if free < needed:
        raise StartUpError(
            f"run.out: {run.out} has {free / 1e9:.1f} GB free, {count} checkpoints need {needed / 1e9:.1f}: make room"
        )


def shared_bytes(config: Config) -> int:
    """Bytes of shared memory that the prefetched batches of one node's loader processes need."""
    run, data = config.run, config.data
    batch = sample_bytes(config) * micro_batch(config)
    return run.devices * (data.workers + VALIDATING) * data.prefetch * batch if data.workers else 0


def check_shared_memory(config: Config, place: Path = SHARED) -> None:
    """Raise StartUpError if shared memory is too small for the batches: loader processes would die of SIGBUS."""
    needed = shared_bytes(config)
    if needed and place.is_dir() and (free := shutil.disk_usage(place).free) < needed:
        size = math.ceil(1.1 * needed / GIB)
        raise StartUpError(
            f"data.workers: {place} has {free / GIB:.2f} GiB free, the loader processes of {config.run.devices} ranks "
            f"need {needed / GIB:.2f}: start the container with --shm-size={size}g or --ipc=host, or lower "
            "data.workers or data.prefetch"
        )
