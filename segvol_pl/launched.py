"""The rank of this process, from the variables that launchers set, and when its command began; needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar

TORCHRUN, SRUN = ("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""Variables with the rank of a process and the number of ranks; sbatch alone sets the second of srun's not."""
RANKS = (SRUN[0], TORCHRUN[0])
"""Variables with the rank."""
NODES = ("NODE_RANK", "GROUP_RANK")
"""Variables with the number of its node, if ranks are started by hand or by Lightning's launcher."""
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Variables with the rank within its node: torchrun's and Lightning's, SLURM's."""
PROCESS = 0.0
"""The value of `command_since` of a process that runs one command: since the process began."""
command_since: ContextVar[float] = ContextVar("command_since")
"""When the command that this process runs began (s since the epoch). The command line sets it."""


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The rank of this process within its node; 0 for a single process."""
    return next((int(environment[name]) for name in LOCAL_RANKS if name in environment), 0)


def rank_named(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this process in log lines: `rank 3`, `rank 1 of node 2`; empty for rank 0 and for a launcher."""
    rank = next((environment[name] for name in RANKS if name in environment), None)
    if rank is not None:
        return f"rank {rank}" if rank != "0" else ""
    node = next((environment[name] for name in NODES if name in environment), "0")
    local = environment.get("LOCAL_RANK", "0")
    if node != "0":
        return f"rank {local} of node {node}"
    return f"rank {local}" if local != "0" else ""
