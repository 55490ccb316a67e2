"""What the ranks say to each other beside training: over the CPU, so that no GPU is waited for."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch.distributed as dist

Said = TypeVar("Said")


def host_group() -> dist.ProcessGroup:
    """All ranks, by gloo. The first call makes it, for which all ranks call together."""
    assert dist.group.WORLD is not None, "one process has nobody to talk to"
    return _made(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _made(world: dist.ProcessGroup) -> dist.ProcessGroup:
    # One process may train several times, each time in a world of its own.
    return dist.new_group(backend="gloo")


def gathered(own: Said, ranks: int) -> list[Said]:
    """What every rank says, by rank. All call together; what is said is pickled among the ranks of one job alone."""
    if ranks == 1:
        return [own]
    said: list[Said] = [own] * ranks
    dist.all_gather_object(said, own, group=host_group())
    return said
