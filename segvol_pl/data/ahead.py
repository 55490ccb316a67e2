"""Copy the next batch to a GPU while it computes the current step.

1. `Ahead` takes a batch from the loader and starts its copy, and only then returns the previous batch.
2. `SideStream` copies from pinned memory on its own CUDA stream. The computing stream waits for the copy; the host does
   not wait.

What the training process reads of a batch stays in main memory (`HOST`): position in the data, rows and damage
belong to the batch that is returned, not to the one that is being copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from segvol_pl.data.batch import HOST, Batch

Begin = Callable[[Batch], Callable[[], Batch]]
"""Starts to copy a batch; the function that it returns gives the copy when it may be used."""


class Ahead:
    """A loader's batches in order; the copy of each starts before the previous one is returned."""

    def __init__(self, loader: Iterable[Batch], begin: Begin) -> None:
        self.loader, self.begin = loader, begin

    def __iter__(self) -> Iterator[Batch]:
        arrived: Callable[[], Batch] | None = None
        for batch in self.loader:
            arriving = self.begin(batch)
            if arrived is not None:
                yield arrived()
            arrived = arriving
        if arrived is not None:
            yield arrived()


class SideStream:
    """Copies batches to a GPU while it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Callable[[], Batch]:
        """Start to copy a batch from pinned memory, which torch keeps until the copy is done."""
        kept = {name: value for name, value in batch.items() if name in HOST}
        with torch.cuda.stream(self.stream):
            sent = {name: value.to(self.device, non_blocking=True) for name, value in batch.items() if name not in kept}
            done = self.stream.record_event()

        def arrived() -> Batch:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            for tensor in sent.values():
                # The side stream owns the memory: it must not reuse it for the next copy while this stream reads it.
                tensor.record_stream(computing)
            return {**sent, **kept}

        return arrived
