"""Read the cases of an evaluation one at a time: from shards, or from CT files that are prepared as in packing.

1. `find_cases` lists them by key, each with a fingerprint that changes when the case does.
2. `EvalCases.read` decodes one: CT, label map and facts of the body crop, and the grid for its masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from segvol_pl.config import CasesConfig, PackConfig, RegionsConfig
from segvol_pl.credentials import masked
from segvol_pl.data.sample_table import SampleTable
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_array, read_facts
from segvol_pl.data.store import Store
from segvol_pl.errors import EvaluateError
from segvol_pl.imaging.box import Box, box_slices, whole_box
from segvol_pl.imaging.geometry import NativeGrid, Volume
from segvol_pl.imaging.write import write_mask
from segvol_pl.packing.pack import list_jobs
from segvol_pl.packing.prepare import prepare_case
from segvol_pl.packing.stage import Job


@dataclass(frozen=True, eq=False)
class EvalCase:
    """One labelled case, cropped to the body."""

    facts: Facts
    hu_DHW: np.ndarray
    label_DHW: np.ndarray
    grid: Volume | None
    """Grid of its mask files: that of the CT file, or of the packed crop; None if the affine is unknown."""
    body: Box
    """The crop within `grid`, in voxels d0 h0 w0 d1 h1 w1, ends included."""
    boxes: dict[str, Box] | None = None
    """Category -> box of the first call with protocol=cvpr25; a category without one begins with a click. None: all
    are drawn from the truth."""
    instances_DHW: np.ndarray | None = None
    """The truth's instances, a value each; None: its parts, connected by faces."""

    def truth(self, category: str) -> np.ndarray:
        """Return the bool mask of a category; all False if the case does not have it."""
        held = self.facts.categories.get(category)
        return np.isin(self.label_DHW, held.values if held else [])

    def save(self, mask_DHW: np.ndarray, path: Path) -> None:
        """Write a bool mask of the crop on the grid. Raises VolumeError if the file cannot be written."""
        assert self.grid is not None
        native_DHW = np.zeros(self.grid.array_DHW.shape, bool)
        native_DHW[box_slices(self.body)] = mask_DHW
        write_mask(native_DHW, self.grid, path)


class EvalCases(Protocol):
    """The labelled cases, sorted by key."""

    fingerprints: dict[str, str]
    """Key -> fingerprint, which changes when the case does."""
    unlabelled: int
    """Number of cases without labels, which are left out."""
    source: str
    """Folder or list of the cases, for the report."""
    split: str

    def read(self, key: str) -> EvalCase:
        """Decode one case. Raises ShardError, SampleError or VolumeError if it cannot be read."""
        ...


def find_cases(data: CasesConfig) -> EvalCases:
    """List the labelled cases of shards or of CT files.

    Raises:
        EvaluateError: There is no labelled case.
        ShardError, CaseError, PackError, ChallengeError: The shards, the files or their list cannot be used.
    """
    if data.npz is not None:
        from segvol_pl.evaluation.challenge_cases import NpzCases  # which makes cases of this module

        return NpzCases(data)
    return FileCases(data) if data.files else ShardCases(data)


class ShardCases:
    """The labelled samples of a split of shards."""

    def __init__(self, data: CasesConfig) -> None:
        self.source, self.split = masked(str(data.shards)), data.split
        self.store = Store(str(data.shards))
        samples = read_index(self.store).samples
        chosen = samples.of_split(data.split)
        labelled = sorted(chosen.labelled(), key=lambda record: record.key)
        if not labelled:
            raise EvaluateError(
                f"data.split: {data.shards} holds no labelled case of split {data.split!r}; it holds {_splits(samples)}"
            )
        self.unlabelled = len(chosen) - len(labelled)
        self.fingerprints = {record.key: record.facts_sha256 for record in labelled}
        self._records = {record.key: record for record in labelled}

    def read(self, key: str) -> EvalCase:
        """Decode a packed case. Raises ShardError if it is damaged."""
        record = self._records[key]
        facts = read_facts(self.store, record)
        hu_DHW, label_DHW = (
            np.asarray(read_array(self.store, record, facts, member)[:]) for member in (Member.CT, Member.LABEL)
        )
        return EvalCase(facts, hu_DHW, label_DHW, _packed_grid(facts, hu_DHW), whole_box(facts.shape))


def _splits(samples: SampleTable) -> str:
    return ", ".join(f"{split} ({count})" for split, count in samples.labelled().per_split().items()) or "none"


def _packed_grid(facts: Facts, hu_DHW: np.ndarray) -> Volume | None:
    if facts.affine is None:
        return None
    d, h, w = facts.shape
    affine = np.array(facts.affine)
    native = NativeGrid((d, h, w), affine, axes=(0, 1, 2), flipped=(False, False, False))
    return Volume(hu_DHW, affine, native, Path(facts.key))


class FileCases:
    """CT files with label maps, listed and prepared as by `pack`, without writing anything."""

    def __init__(self, data: CasesConfig) -> None:
        self.source, self.split = str(data.cases or data.images), "all"
        jobs = sorted(list_jobs(_as_packed(data)), key=lambda job: job.key)
        self._jobs = {job.key: job for job in jobs if job.case.label or job.case.masks}
        if not self._jobs:
            raise EvaluateError(
                f"data.labels: none of the {len(jobs)} cases of {self.source} has labels: set data.labels"
            )
        self.unlabelled = len(jobs) - len(self._jobs)
        self.fingerprints = {key: job.fingerprint for key, job in self._jobs.items()}

    def read(self, key: str) -> EvalCase:
        """Read a case, cropped and measured as by `pack`. Raises VolumeError or SampleError if it cannot be read."""
        job: Job = self._jobs[key]
        # A label map without any structure is a fault in a training set, and a healthy control here.
        found = prepare_case(job.case, key, job.rules, {"image": job.case.image.name}, allow_empty=True)
        assert found.label_DHW is not None
        if found.volume is not None:
            return EvalCase(found.facts, found.hu_DHW, found.label_DHW, found.volume, found.body)
        return EvalCase(found.facts, found.hu_DHW, found.label_DHW, None, whole_box(found.facts.shape))


def _as_packed(data: CasesConfig) -> PackConfig:
    return PackConfig(
        images=data.images,
        labels=data.labels,
        cases=data.cases,
        recipe=data.recipe,
        categories=data.categories,
        out="",
        anchors=1,
        regions=RegionsConfig(enabled=False),
    )
