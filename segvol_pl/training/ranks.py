"""Communication between ranks over the CPU, which does not wait for GPUs."""

from __future__ import annotations

import functools
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def host_group() -> dist.ProcessGroup:
    """The group of all ranks over gloo. The first call may create it: all ranks must call together."""
    world = dist.group.WORLD
    assert world is not None, "a single process has no group"
    # If the default group already has gloo, a second one would only add connections between all ranks.
    return world if "cpu:gloo" in dist.get_backend_config(world) else _made(world)


@functools.lru_cache(maxsize=1)
def _made(world: dist.ProcessGroup) -> dist.ProcessGroup:
    # One process may train several times, each time in a new world.
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def gathered(own: Value, ranks: int, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Gather a value from every rank, in rank order. All call together; values are pickled within one job only.

    group: of all ranks; None: `host_group`.
    """
    if ranks == 1:
        return [own]
    values: list[Value] = [own] * ranks
    dist.all_gather_object(values, own, group=group or host_group())
    return values
