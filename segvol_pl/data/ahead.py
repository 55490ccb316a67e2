"""Batches on their way to a GPU while it computes the step before.

1. `Ahead` takes a batch from the loader and begins its copy; only then it gives the batch before.
2. `SideStream` copies from pinned memory on a stream of its own. The computing stream waits for the copy, the host
   for nothing.

A batch keeps in main memory what the training process looks at (`HOST`): the position in the data, rows and damage
that it tells are its own, not those of the batch that is copied meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from segvol_pl.data.batch import HOST, Batch

Begin = Callable[[Batch], Callable[[], Batch]]
"""Begins to copy a batch; what it returns gives the copy, once it may be used."""


class Ahead:
    """A loader's batches, in its order, each begun to be copied before the one in front of it is given."""

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
    """Copies batches to a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: Batch) -> Callable[[], Batch]:
        """Begins the copy of a batch in pinned memory, which torch keeps until it is done."""
        kept = {name: value for name, value in batch.items() if name in HOST}
        with torch.cuda.stream(self.stream):
            sent = {name: value.to(self.device, non_blocking=True) for name, value in batch.items() if name not in kept}
            done = self.stream.record_event()

        def arrived() -> Batch:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(done)
            for tensor in sent.values():
                # Its memory is the side stream's: not to be given to the next copy while this stream still reads it.
                tensor.record_stream(computing)
            return {**sent, **kept}

        return arrived
