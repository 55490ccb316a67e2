"""Damaged samples that a run met: logged once each, counted by shard and cause, and limited in number."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np

from segvol_pl.credentials import masked
from segvol_pl.data.corpus import Corpus
from segvol_pl.data.damage import DAMAGES, Damage
from segvol_pl.errors import ShardError

log = logging.getLogger(__name__)

Found = dict[int, Damage]
"""Row of the corpus -> what is wrong with the sample."""


class DamageTally:
    """The damaged samples known to one rank: its own, and those reported by other ranks and earlier starts."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.size = corpus.num_volumes
        self.damaged: Found = {}
        """Every damaged sample known here; those of all ranks after each exchange."""
        self.unreported: Found = {}
        """Those found here since the last `take_unreported`."""
        self.replaced = 0
        """How often a sample was replaced here because it is damaged."""

    def note(self, damaged_BA2: np.ndarray) -> None:
        """Count what a batch reports: (row, damage) by sample and attempt, -1 for none."""
        for row, number in damaged_BA2[damaged_BA2[..., 0] >= 0].tolist():
            self.replaced += 1
            if row not in self.damaged:
                self.damaged[row] = self.unreported[row] = DAMAGES[number]
                self._log(row)

    def _log(self, row: int) -> None:
        store, record = self.corpus.located(row)
        log.warning(
            "sample %s of %s/%s is damaged (%s) and replaced by another; %d so far: run segvol-pl verify on the folder",
            *(record.key, masked(str(store.folder)), record.shard, self.damaged[row].value, len(self.damaged)),
        )

    def take_unreported(self) -> Found:
        """The samples found here since the last call."""
        unreported, self.unreported = self.unreported, {}
        return unreported

    def merge(self, found: Found) -> None:
        """Add what another rank, or an earlier start, has found. A sample counts once."""
        self.damaged = {**found, **self.damaged}

    @property
    def causes(self) -> Counter[tuple[str, Damage]]:
        """(shard, cause) -> number of samples."""
        return Counter((self.corpus.located(row)[1].shard, damage) for row, damage in self.damaged.items())

    def check(self, bound: float) -> None:
        """Raise ShardError if more than the share `bound` of the corpus is damaged."""
        if len(self.damaged) > bound * self.size:
            found = ", ".join(
                f"{shard}: {count} {damage.value}" for (shard, damage), count in sorted_causes(self.causes)
            )
            raise ShardError(
                f"{len(self.damaged)} of {self.size} samples are damaged, more than data.max_bad_fraction={bound:g} "
                f"allows ({found}): run segvol-pl verify, then copy or pack the shards again"
            )

    def state_dict(self) -> dict[int, str]:
        """Row -> cause, as plain values for a checkpoint."""
        return {row: damage.value for row, damage in sorted(self.damaged.items())}

    def load_state_dict(self, state: dict[int, str]) -> None:
        """Add the state of an earlier start. It must be of the same corpus."""
        self.merge({row: Damage(cause) for row, cause in state.items()})


def sorted_causes(causes: Counter[tuple[str, Damage]]) -> list[tuple[tuple[str, Damage], int]]:
    """The causes ordered by shard, then by cause."""
    return sorted(causes.items(), key=lambda item: (item[0][0], item[0][1].value))
