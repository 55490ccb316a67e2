"""`segvol-pl predict images=...`: many CTs with one model, each into a file of its own.

1. The CTs of a folder, a glob or a list are divided among the ranks and array tasks (`results.Partition`).
2. Each CT is read and encoded once, and segmented by the texts into a label map, `OUT/ID.nii.gz`. Its volumes and
   densities are written to `OUT/cases/ID.json`, last, so that a CT that has this file is done. A DICOM object cannot be
   empty: a CT in which nothing is found is then done without one.
3. A CT that cannot be used is named in one line and recorded, and the next one follows. A restart tries it again.
4. Whoever ends collects all records so far in `OUT/statistics.csv` and `OUT/failed.csv`: the last one has them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from segvol_pl.atomic import write_csv
from segvol_pl.config import PredictConfig, mask_ending
from segvol_pl.errors import EvaluateError, SegVolError, listed
from segvol_pl.evaluation.results import CaseRecord, CaseStore, Partition, deciding_settings
from segvol_pl.folder_lock import FolderLock
from segvol_pl.hub import local
from segvol_pl.imaging.write import DICOM_CHECKS
from segvol_pl.inference.predictor import LabelMap, Predictor, category_names
from segvol_pl.model.checkpoint import digest_of
from segvol_pl.packing.cases import Case, pair_cases, read_cases
from segvol_pl.packing.stage import stat_of

log = logging.getLogger(__name__)

STATISTICS, FAILURES = "statistics.csv", "failed.csv"
LISTS = (".csv", ".json")
"""Endings of lists of CTs."""
NEUTRAL_KEYS = ("checkpoint", "device", "image", "images", "out", "part", "zoom.cache_gb", "zoom.device_gb")
"""Keys that do not change the mask of a CT. The model has a hash."""


@dataclass(frozen=True)
class SegmentedCase(CaseRecord):
    """What was found in one CT, or why it could not be segmented."""

    image: str
    seconds: float = 0.0
    file: str = ""
    """Name of its mask; empty if nothing was found and it would be a DICOM object."""
    structures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of STATISTICS."""
    problem: str = ""


def predict_images(config: PredictConfig) -> list[Path]:
    """Segment this process's share of the CTs that `config.images` names into the folder `config.out`.

    Returns:
        The files of its CTs, in the order of their ids; none for a CT in which nothing was found, if its file were a
        DICOM object.

    Raises:
        EvaluateError: `out` holds masks of other settings; or some CTs could not be segmented, after all others were.
        CaseError: there is no CT, or two have one id.
        CheckpointError, UnknownCategory, TextError: the model, a name or CLIP cannot be used.
        LockedError: another process has the same share.
    """
    cases, out, partition = _cases(str(config.images)), Path(config.out), Partition.of(config.part)
    predictor = Predictor.from_checkpoint(config.checkpoint, config.device, config.zoom, config.precision, config.seed)
    names = category_names(predictor, config)
    with FolderLock(out, partition.lock):
        store = _open(out, config, names)
        mine = partition.select(cases)
        records = {case.id: _done(store, case) for case in mine}
        todo = [case for case in mine if records[case.id] is None]
        if len(todo) < len(mine):
            log.info("%d of %d CTs are already done", len(mine) - len(todo), len(mine))
        for number, case in enumerate(todo, start=1):
            log.info("CT %d/%d %s", number, len(todo), case.id)
            records[case.id] = record = _segmented(predictor, case, names, config)
            store.write(record)
        _collect(store)
    known = [record for record in records.values() if record is not None]
    if failed := [record.key for record in known if record.problem]:
        told = f"{len(failed)} of {len(mine)} CTs were not segmented, for the reasons in {out / FAILURES}"
        raise EvaluateError(f"{told}: {listed(failed)}")
    return [out / record.file for record in known if record.file]


def _cases(images: str) -> list[Case]:
    return read_cases(images) if images.lower().endswith(LISTS) else pair_cases(images)


def _open(out: Path, config: PredictConfig, names: Sequence[str]) -> CaseStore[SegmentedCase]:
    """Create the folder, or check that its masks have the same settings. Raises EvaluateError."""
    deciding = deciding_settings(config, NEUTRAL_KEYS)
    settings = {**deciding, "text": list(names), "model": digest_of(local(config.checkpoint))}
    store = CaseStore(out, settings, SegmentedCase, "masks that were made", "remove this one")
    store.open()
    return store


def _done(store: CaseStore[SegmentedCase], case: Case) -> SegmentedCase | None:
    """The record of a CT that is segmented, has not changed since, and still has its mask."""
    record = store.find(case.id, _fingerprint(case))
    if record is None or record.problem or (record.file and not (store.out / record.file).exists()):
        return None
    return record


def _segmented(predictor: Predictor, case: Case, names: Sequence[str], config: PredictConfig) -> SegmentedCase:
    """Segment a CT and write its label map; what was found, or the reason why not."""
    started, path = time.perf_counter(), Path(config.out) / f"{case.id}{config.ending}"
    before, image = _fingerprint(case), str(case.image)
    try:
        if config.ending in DICOM_CHECKS:
            DICOM_CHECKS[config.ending](case.image)
        found = predictor.open(case.image).segment_all(names, config.overlaps)
        written = _save(found, path)
    except SegVolError as error:
        problem = " ".join(str(error).split())
        log.error("%s", problem if image in problem else f"{image}: {problem}")
        return SegmentedCase(case.id, before, image, problem=problem)
    structures, seconds = _structures(found), time.perf_counter() - started
    count = sum(each["voxels"] > 0 for each in structures)
    without = "" if written else "; not written, as it would be empty"
    log.info("%s: found %d of %d in %.1f s%s", path, count, len(names), seconds, without)
    return SegmentedCase(case.id, before, image, round(seconds, 2), written, structures)


def _save(found: LabelMap, path: Path) -> str:
    """Write a label map and its scores; the name of its file, empty for a DICOM object in which nothing would be."""
    if mask_ending(path.name) in DICOM_CHECKS and not found.array_DHW.any():
        path.unlink(missing_ok=True)  # what was found before the CT changed
        found.save_scores(path)
        return ""
    found.save(path)
    return path.name


def _structures(found: LabelMap) -> list[dict[str, Any]]:
    """Volume and density of each category, as rows of `STATISTICS`."""
    values = [score.value for score in found.scores]
    of = (found.volume.array_DHW, found.array_DHW, values)
    with np.errstate(divide="ignore", invalid="ignore"):  # a category that was not found has no density
        means, deviations = ndimage.mean(*of), ndimage.standard_deviation(*of)
    return [
        {
            "category": score.category,
            "value": score.value,
            "voxels": score.voxels,
            "millilitres": round(score.millilitres, 3),
            "mean_hu": round(float(mean), 2) if score.voxels else "",
            "std_hu": round(float(deviation), 2) if score.voxels else "",
            "probability": round(score.probability, 4),
        }
        for score, mean, deviation in zip(found.scores, means, deviations, strict=True)
    ]


def _collect(store: CaseStore[SegmentedCase]) -> None:
    """Write the tables of all CTs that were tried so far."""
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for record in store.all():
        named = {"id": record.key, "image": record.image}
        rows += [{**named, "file": record.file, **each} for each in record.structures]
        failures += [{**named, "problem": record.problem}] if record.problem else []
    for name, table in ((STATISTICS, rows), (FAILURES, failures)):
        if not table:
            (store.out / name).unlink(missing_ok=True)
            continue
        write_csv(store.out / name, table)


def _fingerprint(case: Case) -> str:
    """Changes when a file of the CT does."""
    return hashlib.sha256(json.dumps(stat_of(case)).encode()).hexdigest()
