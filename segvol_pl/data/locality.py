"""Shares of the corpus: each node reads its own share for several epochs, so that its cache holds what it reads.

1. `Locality.arranged` divides the rows of an epoch into shares of equal size. All copies of a row have the same place
   in the division, which is a pure function of (seed, epoch // epochs). Each epoch permutes each share within itself.
2. Every global batch takes the same number of samples from each share. Its positions lie share after share, and ranks
   take them in their order (`BatchPlan.positions`): the ranks of a node read neighbouring shares, or the same one.
3. `Locality.place` finds the row of a position, and the rows that may replace it: those of its share.

None of this depends on the world. With one share, the default, the order is one permutation of the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from segvol_pl.data.corpus import rng_of

DIVISION = (0, 0, 1)
"""Ends the key of a division's rng. It makes the key longer than every other one, so that none is the same."""


def epoch_order(num_samples: int, seed: int = 0, epoch: int = 0, shares: int = 1) -> np.ndarray:
    """Permute range(num_samples), each share within itself: int32 (num_samples,)."""
    rng, edges = rng_of(seed, epoch), edges_of(num_samples, shares)
    return np.concatenate([rng.permutation(np.arange(*share, dtype=np.int32)) for share in pairwise(edges)])


def edges_of(num_samples: int, shares: int) -> list[int]:
    """Where shares begin and end: `shares` + 1 numbers. The sizes of shares differ by one at most."""
    return [share * num_samples // shares for share in range(shares + 1)]


@dataclass(frozen=True)
class Locality:
    """How many shares the corpus is divided into, and for how many epochs."""

    shares: int = 1
    epochs: int = 1

    def arranged(self, rows: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Put the rows of an epoch in its order, share after share.

        Args:
            rows: int32 (num_samples,), before they are shuffled; a row may occur several times.
            seed: decides divisions and orders.
            epoch: counted from 0.
        """
        if self.shares > 1:
            # 16 bits: numpy sorts them in linear time. Rows with equal numbers keep their order.
            rng = rng_of(seed, epoch // self.epochs, *DIVISION)
            places = rng.integers(1 << 16, size=rows.max() + 1, dtype=np.uint16)
            rows = rows[np.argsort(places[rows], kind="stable")]
        arranged: np.ndarray = rows[epoch_order(len(rows), seed, epoch, self.shares)]
        return arranged

    def place(self, position: int, batch: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """Find a position's row. Positions beyond the end of a share start again at its first row.

        Args:
            position: in the epoch.
            batch: samples of a global batch, a multiple of the shares.
            rows: as arranged.

        Returns:
            The row, and the rows of its share.
        """
        where, first, last = self.located(np.int64(position), batch, len(rows))
        return int(rows[where]), rows[first:last]

    def located(self, positions: Any, batch: int, count: int) -> tuple[Any, Any, Any]:
        """Where positions lie in an epoch's order.

        Args:
            positions: in the epoch, int64 of any shape.
            batch: samples of a global batch, a multiple of the shares.
            count: samples of the epoch.

        Returns:
            Their places in the order, and where their shares begin and end; each int64 of that shape.
        """
        each = batch // self.shares
        step, slot = divmod(positions, batch)
        share, number = divmod(slot, each)
        first, last = share * count // self.shares, (share + 1) * count // self.shares
        return first + (step * each + number) % (last - first), first, last


ONE_SHARE = Locality()
"""The corpus is not divided."""
