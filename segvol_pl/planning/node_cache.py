"""How much of what a node reads is in its cache, epoch by epoch: simulated in pieces of the corpus, without numpy.

A node reads its part of every batch, as in `data.stream`. Its cache drops the piece that was used least recently, as
`data.cache` does. Every sample counts as read completely.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

PIECES = 64
"""Pieces of the corpus that a node reads in an epoch in which each volume occurs once."""
LONGEST = 64
"""Epochs that are simulated at most."""
KEPT_SHARE = 7 / 8
"""Share of `data.cache_gb` that is surely kept, as in `data.cache`."""


@dataclass(frozen=True)
class NodeCache:
    """The cache of one of many nodes.

    Args:
        nodes: nodes of the run.
        cached: bytes of the cache / bytes of the corpus.
        locality, locality_epochs, samples_per_volume: keys of `data`.
    """

    nodes: int
    cached: float
    locality: int = 1
    locality_epochs: int = 1
    samples_per_volume: int = 1

    def hits(self, epochs: int) -> list[float]:
        """Share of the reads that the cache holds, for each of the first epochs, `LONGEST` at most."""
        kept: OrderedDict[int, None] = OrderedDict()
        room = self.cached * KEPT_SHARE * self.nodes * PIECES
        found = []
        for reads in self._epochs(min(epochs, LONGEST)):
            hits = 0
            for piece in reads:
                hits += piece in kept
                kept[piece] = None
                kept.move_to_end(piece)
                if len(kept) > room:
                    kept.popitem(last=False)
            found.append(hits / len(reads))
        return found

    def _epochs(self, count: int) -> Iterator[list[int]]:
        """The pieces that the node in the middle reads, in order, for each epoch."""
        rng = random.Random(0)
        division = list(range(self.nodes * PIECES))
        node = self.nodes // 2
        for epoch in range(count):
            if epoch % self.locality_epochs == 0 and self.locality > 1:
                rng.shuffle(division)
            reads = [
                piece
                for share in range(node * self.locality // self.nodes, -(-(node + 1) * self.locality // self.nodes))
                for piece in self._reads_of(share, node, division, rng)
            ]
            rng.shuffle(reads)
            yield reads

    def _reads_of(self, share: int, node: int, division: list[int], rng: random.Random) -> list[int]:
        """Pieces of a share that the node reads in an epoch, as many as its ranks have positions there."""
        first, last = (edge * len(division) // self.locality for edge in (share, share + 1))
        begin, end = max(first, node * PIECES), min(last, (node + 1) * PIECES)
        copies = self.samples_per_volume
        return rng.sample(division[first:last] * copies, max(0, end - begin) * copies)
