"""What `data.locality` costs in shuffling, and what it gains in hits of a node's cache. Numbers only: nothing is read.

    python benchmarks/shuffle_quality.py

Every order is the stream's own. Its quality is compared with that of independent permutations:

- `place`: chi-square of the batch in which a sample comes, per degree of freedom. 1: every batch is equally likely.
- `pairs`: how often two samples come in one batch. Total variation between the distribution of that count over all
  pairs and the same of permutations; the first row is between two sets of permutations, which is noise.
- `mix`: variance of the number of samples of a tenth of the corpus in a batch, divided by that of permutations.

A cache is simulated for the node in the middle of 64. It drops the samples used least recently, down to `KEPT_SHARE`
of its size, as `data.cache` does. It starts empty.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

import numpy as np

from segvol_pl.data.cache import CHECK_SHARE, KEPT_SHARE
from segvol_pl.data.corpus import rng_of
from segvol_pl.data.locality import Locality
from segvol_pl.data.stream import BatchPlan, World

SHARES, PERIODS = (1, 8, 64), (1, 4, 16)
NODES, BATCH, EPOCHS = 64, 256, 64
SAMPLES = 4096
"""Samples of the corpus whose order is examined: every pair of them is counted."""
CACHED_SAMPLES = 64 * 256
"""Samples of the corpus whose reads are simulated."""
CORPUS_TB, CACHE_TB = 1.2, 0.5


def batches(locality: Locality, seed: int) -> Iterator[np.ndarray]:
    """The rows of each batch, (batches of an epoch, BATCH), epoch by epoch."""
    plan = BatchPlan(SAMPLES, BATCH, seed=seed, locality=locality)
    for epoch in range(EPOCHS):
        rows = locality.arranged(np.arange(SAMPLES), seed, epoch)
        placed = [locality.place(position, BATCH, rows)[0] for position in range(plan.usable)]
        yield np.reshape(placed, (-1, BATCH))


def permutations(seed: int) -> Iterator[np.ndarray]:
    """The same of independent permutations."""
    for epoch in range(EPOCHS):
        yield rng_of(seed, epoch).permutation(SAMPLES).reshape(-1, BATCH)


def quality(epochs: Iterator[np.ndarray]) -> tuple[float, np.ndarray, float]:
    """Chi-square of places, distribution of how often pairs meet, variance of a tenth."""
    count = SAMPLES // BATCH
    places, meetings, tenths = np.zeros((SAMPLES, count)), np.zeros((SAMPLES, SAMPLES), dtype=np.uint8), []
    for rows in epochs:
        for number, batch in enumerate(rows):
            places[batch, number] += 1
            meetings[np.ix_(batch, batch)] += 1
            tenths.append((batch < SAMPLES // 10).sum())
    expected = EPOCHS / count
    square = ((places - expected) ** 2 / expected).sum() / (SAMPLES * (count - 1))
    pairs = np.bincount(meetings[np.triu_indices(SAMPLES, 1)], minlength=EPOCHS + 1)
    return float(square), pairs / pairs.sum(), float(np.var(tenths))


def hits(locality: Locality) -> list[float]:
    """Share of the samples that a node finds in its cache, for each epoch."""
    plan = BatchPlan(CACHED_SAMPLES, BATCH, locality=locality)
    size, steps = CORPUS_TB / CACHED_SAMPLES, plan.usable // BATCH
    kept: OrderedDict[int, None] = OrderedDict()
    added, found = CACHE_TB, []
    micros = plan.positions(World(NODES // 2, NODES), 0)
    for epoch in range(EPOCHS):
        rows, hit = locality.arranged(np.arange(CACHED_SAMPLES), 0, epoch), 0
        positions = np.concatenate([own for _, _, own in islice(micros, steps)])
        for row in (locality.place(int(position), BATCH, rows)[0] for position in positions):
            hit += row in kept
            added += 0 if row in kept else size
            kept[row] = None
            kept.move_to_end(row)
            if added > CACHE_TB * CHECK_SHARE:
                added = 0.0
                while len(kept) * size > CACHE_TB * KEPT_SHARE:
                    kept.popitem(last=False)
        found.append(hit / len(positions))
    return found


def main() -> None:
    _, uniform, tenth = quality(permutations(1))
    print("| shares | epochs | place | pairs | mix | hits, epochs 2 to 4 | epochs 1 to 16 | epochs 49 to 64 |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    rows = [("permutations", "", quality(permutations(2)), None)]
    for shares in SHARES:
        for period in PERIODS if shares > 1 else (1,):
            locality = Locality(shares, period)
            rows.append((str(shares), str(period) if shares > 1 else "", quality(batches(locality, 3)), hits(locality)))
    for shares, period, (square, pairs, variance), found in rows:
        cells = [f"{square:.3f}", f"{np.abs(pairs - uniform).sum() / 2:.4f}", f"{variance / tenth:.2f}"]
        cells += [f"{100 * np.mean(found[a:b]):.0f} %" for a, b in ((1, 4), (0, 16), (48, 64))] if found else [""] * 3
        print(f"| {' | '.join([shares, period, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
