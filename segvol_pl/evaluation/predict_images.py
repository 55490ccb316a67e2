"""`segvol-pl predict images=...`: many CTs with one model, each into a file of its own.

1. The CTs of a folder, a glob or a list are divided among the ranks and array tasks (`results.Partition`).
2. Each CT is read and encoded once, and segmented by the texts into a label map, `OUT/ID.nii.gz`. Its volumes and
   densities are written to `OUT/cases/ID.json`, last, so that a CT that has this file is done.
3. A CT that cannot be used is named in one line and recorded, and the next one follows. A restart tries it again.
4. Whoever ends collects all records so far in `OUT/statistics.csv` and `OUT/failed.csv`: the last one has them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from segvol_pl.atomic import write_csv, write_text
from segvol_pl.config import DICOM_SEG, PredictConfig
from segvol_pl.errors import EvaluateError, SegVolError, listed
from segvol_pl.evaluation.results import CASES, SETTINGS, Partition, deciding_settings, differing_settings
from segvol_pl.folder_lock import FolderLock
from segvol_pl.hub import local
from segvol_pl.imaging.dicom_seg import check_dicom_seg
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


def predict_images(config: PredictConfig) -> list[Path]:
    """Segment this process's share of the CTs that `config.images` names into the folder `config.out`.

    Returns:
        The files of its CTs, in the order of their ids.

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
        _open(out, config, names)
        records = _Records(out, config.ending)
        mine = partition.select(cases)
        todo = [case for case in mine if not records.has(case)]
        if len(todo) < len(mine):
            log.info("%d of %d CTs are already done", len(mine) - len(todo), len(mine))
        failed = []
        for number, case in enumerate(todo, start=1):
            log.info("CT %d/%d %s", number, len(todo), case.id)
            before = _fingerprint(case)
            found = _segmented(predictor, case, names, config)
            records.write(case, before, found)
            failed += [case.id] if "problem" in found else []
        records.collect()
    if failed:
        told = f"{len(failed)} of {len(mine)} CTs were not segmented, for the reasons in {out / FAILURES}"
        raise EvaluateError(f"{told}: {listed(failed)}")
    return [out / f"{case.id}{config.ending}" for case in mine]


def _cases(images: str) -> list[Case]:
    return read_cases(images) if images.lower().endswith(LISTS) else pair_cases(images)


def _open(out: Path, config: PredictConfig, names: Sequence[str]) -> None:
    """Create the folder, or check that its masks have the same settings. Raises EvaluateError."""
    (out / CASES).mkdir(parents=True, exist_ok=True)
    deciding = deciding_settings(config, NEUTRAL_KEYS)
    settings = {**deciding, "text": list(names), "model": digest_of(local(config.checkpoint))}
    if others := differing_settings(out / SETTINGS, settings):
        raise EvaluateError(
            f"out: {out} holds masks that were made with other {', '.join(others)}: set out to another folder, or "
            "remove this one"
        )


def _segmented(predictor: Predictor, case: Case, names: Sequence[str], config: PredictConfig) -> dict[str, Any]:
    """Segment a CT and write its label map; what was found, or the reason why not."""
    started, path = time.perf_counter(), Path(config.out) / f"{case.id}{config.ending}"
    try:
        if config.ending == DICOM_SEG:
            check_dicom_seg(case.image)
        found = predictor.open(case.image).segment_all(names, config.overlaps)
        found.save(path)
    except SegVolError as error:
        problem = " ".join(str(error).split())
        log.error("%s", problem if str(case.image) in problem else f"{case.image}: {problem}")
        return {"problem": problem}
    structures, seconds = _structures(found), time.perf_counter() - started
    log.info("%s: found %d of %d in %.1f s", path, sum(each["voxels"] > 0 for each in structures), len(names), seconds)
    return {"seconds": round(seconds, 2), "structures": structures}


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


class _Records:
    """What is known of each CT, a file for each."""

    def __init__(self, out: Path, ending: str) -> None:
        self.out, self.ending = out, ending

    def has(self, case: Case) -> bool:
        """Whether the CT is segmented, and has not changed since."""
        record = self._read(self._path(case))
        done = "problem" not in record and record.get("fingerprint") == _fingerprint(case)
        return done and (self.out / f"{case.id}{self.ending}").exists()

    def write(self, case: Case, fingerprint: str, found: dict[str, Any]) -> None:
        """Record what was found in a CT. fingerprint: as it was before it was read."""
        record = {"id": case.id, "image": str(case.image), "fingerprint": fingerprint, **found}
        write_text(self._path(case), json.dumps(record, ensure_ascii=False) + "\n")

    def collect(self) -> None:
        """Write the tables of all CTs that were tried so far."""
        records = [self._read(path) for path in sorted((self.out / CASES).glob("*.json"))]
        rows = [{**_named(record), **each} for record in records for each in record.get("structures", [])]
        failures = [{**_named(record), "problem": record["problem"]} for record in records if "problem" in record]
        for name, table in ((STATISTICS, rows), (FAILURES, failures)):
            if not table:
                (self.out / name).unlink(missing_ok=True)
                continue
            write_csv(self.out / name, table)

    def _path(self, case: Case) -> Path:
        return self.out / CASES / f"{case.id}.json"

    def _read(self, path: Path) -> dict[str, Any]:
        """A record; empty if there is none. Raises EvaluateError for a file of another form."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise EvaluateError(f"{path} is not a record of a CT ({error}): remove it") from error
        return dict(record)


def _named(record: dict[str, Any]) -> dict[str, str]:
    """The first columns of both tables."""
    return {"id": record["id"], "image": record["image"]}


def _fingerprint(case: Case) -> str:
    """Changes when a file of the CT does."""
    return hashlib.sha256(json.dumps(stat_of(case)).encode()).hexdigest()
