"""What turned out damaged while a run read its corpus: said once a sample, counted by shard and cause, and bounded."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from segvol_pl.credentials import masked
from segvol_pl.data.corpus import Corpus
from segvol_pl.data.damage import Damage
from segvol_pl.data.stream import DAMAGES
from segvol_pl.errors import ShardError

log = logging.getLogger(__name__)

Found = dict[int, Damage]
"""Row of the corpus -> what is wrong with the sample."""


class Health:
    """One rank's account of its corpus, and what other ranks and earlier starts of the run have told it."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.size = len(corpus.records)
        self.damaged: Found = {}
        """Every damaged sample known here; of all ranks once they have told each other."""
        self.untold: Found = {}
        """Those found here since `told` was last called."""
        self.replaced = 0
        """Times that a damaged sample came up here and another one took its place."""

    def note(self, damaged_BA2: np.ndarray) -> None:
        """Takes in what a batch says: (row, damage) by sample and attempt, -1 where there was none."""
        for row, number in damaged_BA2[damaged_BA2[..., 0] >= 0].tolist():
            self.replaced += 1
            if row not in self.damaged:
                self.damaged[row] = self.untold[row] = DAMAGES[number]
                self._say(row)

    def _say(self, row: int) -> None:
        store, record = self.corpus.located(row)
        log.warning(
            "sample %s of %s/%s is damaged (%s) and replaced by another; %d so far: run segvol-pl verify on the folder",
            *(record.key, masked(str(store.folder)), record.shard, self.damaged[row].value, len(self.damaged)),
        )

    def told(self) -> Found:
        """What was found here since the last time."""
        untold, self.untold = self.untold, {}
        return untold

    def hear(self, found: Found) -> None:
        """Takes in what another rank, or an earlier start, has found: a sample counts once, whoever met it."""
        self.damaged = {**found, **self.damaged}

    @property
    def causes(self) -> Counter[tuple[str, Damage]]:
        """(shard, cause) -> samples."""
        return Counter((self.corpus.located(row)[1].shard, damage) for row, damage in self.damaged.items())

    def check(self, bound: float) -> None:
        """Raises ShardError where the damaged samples are more than the share `bound` of the corpus."""
        if len(self.damaged) > bound * self.size:
            found = ", ".join(
                f"{shard}: {count} {damage.value}" for (shard, damage), count in sorted_causes(self.causes)
            )
            raise ShardError(
                f"{len(self.damaged)} of {self.size} samples are damaged, more than data.max_bad_fraction={bound:g} "
                f"allows ({found}): run segvol-pl verify, then copy or pack the shards again"
            )

    def state_dict(self) -> dict[int, str]:
        """Row -> cause, as plain values."""
        return {row: damage.value for row, damage in sorted(self.damaged.items())}

    def load_state_dict(self, state: dict[int, str]) -> None:
        """Of the same corpus."""
        self.hear({row: Damage(cause) for row, cause in state.items()})


def sorted_causes(causes: Counter[tuple[str, Damage]]) -> list[tuple[tuple[str, Damage], int]]:
    """By shard, then cause."""
    return sorted(causes.items(), key=lambda item: (item[0][0], item[0][1].value))
