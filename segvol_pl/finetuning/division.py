"""Which cases are trained on, and which are kept for validation: drawn by a seed, case by case.

The division is written to `OUT/cases.json`, a list as `pack` reads it, before anything is packed. Later starts use that
list, so that no case changes sides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from segvol_pl.atomic import write_text
from segvol_pl.config import FinetuneConfig
from segvol_pl.data.schema import Split
from segvol_pl.errors import CaseError, listed
from segvol_pl.packing.cases import Case, pair_cases, read_cases

CASES = "cases.json"
PAIR = 4
"""Cases from which on two are held out, so that there is a spread between them."""


def find_cases(config: FinetuneConfig) -> list[Case]:
    """List the configured cases, all with labels. Raises CaseError if they cannot be found, paired or learned from."""
    found = read_cases(config.cases) if config.cases else pair_cases(str(config.images), config.labels)
    if bare := [case.id for case in found if case.label is None and not case.masks]:
        raise CaseError(f"cases: {listed(bare)} have no label map: give one to each, or leave them out")
    return found


def divided(cases: Sequence[Case], fraction: float, seed: int) -> list[Case]:
    """Give every case its split.

    Args:
        cases: If a list names a case of the split test, its splits are kept, and cases without one are trained on.
        fraction: Of the cases to hold out.
        seed: Which ones.

    Raises:
        CaseError: There is nothing to train on or to validate with.
    """
    if any(case.split == Split.TEST.value for case in cases):
        found = [replace(case, split=case.split or Split.TRAIN.value) for case in cases]
    else:
        order = sorted(cases, key=lambda case: hashlib.sha256(f"{seed} {case.id}".encode()).digest())
        held = {case.id for case in order[: held_out(len(cases), fraction)]}
        found = [replace(case, split=(Split.TEST if case.id in held else Split.TRAIN).value) for case in cases]
    for split, purpose in ((Split.TRAIN, "train on"), (Split.TEST, "validate with")):
        if not any(case.split == split.value for case in found):
            raise CaseError(f"cases: of {len(cases)} cases none is left to {purpose}: give at least two, in two splits")
    return found


def held_out(cases: int, fraction: float) -> int:
    """How many of so many cases to hold out: the fraction, at least one, at least two of four or more."""
    return min(max(2 if cases >= PAIR else 1, round(fraction * cases)), cases - 1)


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """Write a list of cases that `read_cases` reads, with absolute paths."""
    write_text(path, json.dumps([_row(case) for case in cases], indent=1, ensure_ascii=False) + "\n")


def _row(case: Case) -> dict[str, Any]:
    masks = {name: str(path.resolve()) for name, (path,) in case.masks.items()}
    label = {"label": str(case.label.resolve())} if case.label else {}
    return {"id": case.id, "image": str(case.image.resolve()), **label, "split": case.split, **masks}


def same_cases(before: Sequence[Case], now: Sequence[Case]) -> str:
    """How the cases differ from those of the first start, in words; empty if they are the same."""
    old, new = {case.id: case.split for case in before}, {case.id: case.split for case in now}
    parts = [
        ("new", sorted(new.keys() - old.keys())),
        ("gone", sorted(old.keys() - new.keys())),
        ("in another split", sorted(id for id in old.keys() & new.keys() if old[id] != new[id])),
    ]
    return "; ".join(f"{what}: {listed(ids)}" for what, ids in parts if ids)
