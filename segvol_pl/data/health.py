"""What turned out damaged while a run read its corpus: counted by shard and cause, said once a sample, and bounded."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from segvol_pl.data.corpus import Corpus
from segvol_pl.data.shards import Damage, ShardError
from segvol_pl.data.stream import DAMAGES

log = logging.getLogger(__name__)


class Health:
    """One rank's account of its corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.size = len(corpus.records)
        self.causes: Counter[tuple[str, Damage]] = Counter()
        """(shard, cause) -> samples."""
        self.rows: set[int] = set()
        """Damaged samples, by row of the corpus."""
        self.replaced = 0
        """Times that a damaged sample came up and another one took its place."""

    def note(self, damaged_BA2: np.ndarray) -> None:
        """Takes in what a batch says: (row, damage) by sample and attempt, -1 where there was none."""
        for row, number in damaged_BA2[damaged_BA2[..., 0] >= 0].tolist():
            self.replaced += 1
            if row not in self.rows:
                self.rows.add(row)
                self._say(row, DAMAGES[number])

    def _say(self, row: int, damage: Damage) -> None:
        store, record = self.corpus.located(row)
        self.causes[record.shard, damage] += 1
        log.warning(
            "sample %s of %s/%s is damaged (%s) and replaced by another; %d so far: run segvol-pl verify on the folder",
            *(record.key, store.folder, record.shard, damage.value, len(self.rows)),
        )

    def check(self, damaged: int, bound: float) -> None:
        """Raises ShardError where `damaged` samples (of all ranks) are more than the share `bound` of the corpus."""
        if damaged > bound * self.size:
            found = ", ".join(
                f"{shard}: {count} {damage.value}" for (shard, damage), count in sorted_causes(self.causes)
            )
            raise ShardError(
                f"{damaged} of {self.size} samples are damaged, more than data.max_bad_fraction={bound:g} allows "
                f"({found or 'found by other ranks'}): run segvol-pl verify, then copy or pack the shards again"
            )


def sorted_causes(causes: Counter[tuple[str, Damage]]) -> list[tuple[tuple[str, Damage], int]]:
    """By shard, then cause."""
    return sorted(causes.items(), key=lambda item: (item[0][0], item[0][1].value))
