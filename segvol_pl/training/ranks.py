"""What the ranks say to each other beside training: over the CPU, so that no GPU is waited for."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch.distributed as dist

Said = TypeVar("Said")


def host_group() -> dist.ProcessGroup:
    """All ranks, by gloo. The first call may make it, for which all ranks call together."""
    world = dist.group.WORLD
    assert world is not None, "one process has nobody to talk to"
    # Ranks whose own group has gloo need no second one, with connections of its own from each to each.
    return world if "cpu:gloo" in dist.get_backend_config(world) else _made(world)


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
