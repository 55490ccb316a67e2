"""The folder that `embed` writes and `probe` reads: settings, parts, and an index of the volumes.

1. `open_folder` records the settings that determine the features. It refuses a folder of other settings, and one that
   holds anything else.
2. `write_part` writes the features of some volumes to `parts/NNNNN.npz`, atomically; `read_part` checks that a part is
   complete and holds these volumes.
3. `write_index` writes `volumes.csv`, a line for each volume, and at last `index.json`: a folder without it is not
   finished.
4. `load_features` reads all of it.

Letters: N volumes, T tokens, E embedding, F cells of the pooled image.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segvol_pl.atomic import atomic_path, write_text
from segvol_pl.data.sample_table import SampleTable
from segvol_pl.errors import EvaluateError
from segvol_pl.evaluation.results import SETTINGS, differing_settings

SCHEMA = 1
PARTS, VOLUMES, INDEX = "parts", "volumes.csv", "index.json"
COMMAND = "embed"
TRAINED, UNTRAINED, INTENSITY, TOKENS = "volumes_NE", "untrained_NE", "intensity_NF", "tokens_NTE"
"""Arrays of a part: mean of the encoder's tokens, the same of random weights, the pooled image; all tokens."""
KINDS = {TRAINED: "encoder", UNTRAINED: "untrained encoder", INTENSITY: "raw intensity"}
"""Features of a volume that are compared, and their names in tables."""


@dataclass(frozen=True, eq=False)
class Part:
    """The features of some volumes, in the order of their keys."""

    keys: list[str]
    arrays: dict[str, np.ndarray]
    """Rows are the volumes that could be read."""
    unread: dict[str, str]
    """Key of each volume that could not be read -> why."""

    @property
    def read(self) -> list[str]:
        """Keys of the rows of the arrays."""
        return [key for key in self.keys if key not in self.unread]


@dataclass(frozen=True, eq=False)
class Features:
    """The features of all volumes."""

    folder: Path
    keys: list[str]
    split_N: np.ndarray
    """Names of splits."""
    labelled_N: np.ndarray
    """bool."""
    categories: list[list[str]]
    """The categories that each volume holds."""
    arrays: dict[str, np.ndarray]
    """Kind of features, see `KINDS` -> (N,...) float32."""
    index: dict[str, Any]
    """The content of index.json."""


def open_folder(out: Path, settings: Mapping[str, Any]) -> None:
    """Create the folder, or check that it is one of the same settings. Raises EvaluateError if it is not."""
    strange = [] if not out.is_dir() else [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if strange and not (out / SETTINGS).exists() and set(strange) != {PARTS}:
        raise EvaluateError(f"out: {out} holds other files ({sorted(strange)[0]}): set out to another folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    own = {"command": COMMAND, "schema": SCHEMA, **settings}
    try:
        others = differing_settings(out / SETTINGS, own)
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluateError(f"{out / SETTINGS} is damaged ({error}): set out to another folder") from error
    if "command" in others:
        raise EvaluateError(f"out: {out} was not written by segvol-pl {COMMAND}: set out to another folder")
    if others:
        raise EvaluateError(f"out: {out} holds features with other {', '.join(others)}: set out to another folder")


def part_path(out: Path, number: int) -> Path:
    """The file of a part."""
    return out / PARTS / f"{number:05d}.npz"


def write_part(path: Path, part: Part) -> None:
    """Write a part, atomically."""
    texts = {"keys": np.array(part.keys), "unread": np.array(json.dumps(part.unread))}
    with atomic_path(path, ".npz") as target:
        np.savez(target, **texts, **part.arrays)  # type: ignore[arg-type]  # its stub takes them for allow_pickle


def read_part(path: Path, names: Sequence[str] = ()) -> Part | None:
    """Read a part; None if there is none.

    Args:
        path: The file.
        names: The arrays to read.

    Raises:
        EvaluateError: The file is damaged, or lacks an array.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            part = Part(held["keys"].tolist(), {name: held[name] for name in names}, json.loads(str(held["unread"])))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EvaluateError(f"{path} is damaged ({reason}): remove it, and run segvol-pl {COMMAND} again") from error
    if any(len(array) != len(part.read) for array in part.arrays.values()):
        raise EvaluateError(f"{path} is damaged (rows are missing): remove it, and run segvol-pl {COMMAND} again")
    return part


def write_index(out: Path, samples: SampleTable, parts: Sequence[Part], about: Mapping[str, Any]) -> None:
    """Write volumes.csv, then index.json. samples: of all parts, in their order."""
    with atomic_path(out / VOLUMES) as target, target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", "part", "row", "split", "labelled", "categories"])
        records = iter(samples)
        for number, part in enumerate(parts):
            row = 0
            for key, record in zip(part.keys, records, strict=False):
                if key not in part.unread:
                    facts = record.split, int(record.labelled), json.dumps(record.categories, ensure_ascii=False)
                    writer.writerow([key, number, row, *facts])
                    row += 1
    unread = {key: why for part in parts for key, why in part.unread.items()}
    content = {"volumes": sum(len(part.read) for part in parts), "parts": len(parts), "unread": unread, **about}
    write_text(out / INDEX, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_features(folder: Path) -> Features:
    """Read the features of all volumes. Raises EvaluateError if the folder is not finished, or damaged."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        with (folder / VOLUMES).open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        kinds = [kind for kind in KINDS if kind in index["arrays"]]
        parts = [read_part(part_path(folder, number), kinds) for number in range(index["parts"])]
        categories = [json.loads(row["categories"]) for row in rows]
        labelled_N = np.array([row["labelled"] == "1" for row in rows], bool)
        keys, splits = [row["key"] for row in rows], np.array([row["split"] for row in rows])
    except FileNotFoundError as error:
        raise EvaluateError(
            f"features: {folder} is no finished folder of segvol-pl {COMMAND} (no {Path(str(error.filename)).name}): "
            f"run segvol-pl {COMMAND} to its end"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, EvaluateError):
            raise
        raise EvaluateError(f"features: {folder} is damaged ({error}): run segvol-pl {COMMAND} again") from error
    read = [part for part in parts if part is not None]
    if len(read) < len(parts) or [key for part in read for key in part.read] != keys:
        raise EvaluateError(f"features: {folder} is damaged: its parts are not those of {VOLUMES}: embed again")
    # A part of which nothing could be read does not know the size of its rows.
    arrays = {kind: np.concatenate([part.arrays[kind] for part in read if part.read]) for kind in kinds}
    return Features(folder, keys, splits, labelled_N, categories, arrays, index)
