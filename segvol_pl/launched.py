"""Which process of its job this one is, as whoever started it says: known before torch is."""

from __future__ import annotations

import os
from collections.abc import Mapping

RANKS = ("SLURM_PROCID", "RANK")
"""Its number among all: SLURM's name, torchrun's."""
NODES = ("NODE_RANK", "GROUP_RANK")
"""Its node's number, where ranks are started by hand or by Lightning's launcher."""
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Its number on its node: torchrun's and Lightning's name, SLURM's."""


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """The process's number on its node; 0 for one that is alone."""
    return next((int(environment[name]) for name in LOCAL_RANKS if name in environment), 0)


def rank_named(environment: Mapping[str, str] = os.environ) -> str:
    """As log lines name the process: `rank 3`, `rank 1 of node 2`. Empty for rank 0 and who will start the others."""
    rank = next((environment[name] for name in RANKS if name in environment), None)
    if rank is not None:
        return f"rank {rank}" if rank != "0" else ""
    node = next((environment[name] for name in NODES if name in environment), "0")
    local = environment.get("LOCAL_RANK", "0")
    if node != "0":
        return f"rank {local} of node {node}"
    return f"rank {local}" if local != "0" else ""
