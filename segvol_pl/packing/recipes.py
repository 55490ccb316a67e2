"""Recipes of public data sets: where a set's files lie as distributed, and what its labels mean.

1. `read_recipe` reads and checks a recipe, a YAML file such as those in shards/datasets/.
2. `recipe_cases` finds the cases that it describes under the folder where the set was unpacked.

A recipe is data, not code: a further data set is a further file.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.config.categories import UniqueKeys, checked_name, checked_values
from segvol_pl.errors import CaseError, listed
from segvol_pl.packing.cases import Case

WILDCARDS = {"{id}": r"(?P<id>[^/]+?)", "**/": r"(?:.*/)?", "*": r"[^/]*"}


@dataclass(frozen=True)
class DatasetRecipe:
    """One data set. Paths are relative to its root; `{id}` is the case's id, `*` and `**/` are globs."""

    name: str
    """Written to every sample as its data set."""
    title: str
    volumes: int
    """Labelled volumes by the paper's Table 4."""
    published_categories: int
    """Categories by the paper's Table 4."""
    images: str
    """The CTs: files, or folders of one DICOM series."""
    source: str
    """Where to get it, in words."""
    licence: str
    certain: bool
    """Whether label table and paths are known for sure. If not, `doubts` says what is uncertain."""
    labels: str = ""
    """A case's label map; `categories` says what its values mean."""
    masks: str = ""
    """A case's files of single categories; `files` says which `{file}` belong to which category."""
    categories: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    """Category -> its files; the category is their union."""
    modality: str = "CT"
    m3d_code: str = ""
    """Folder of the set in the processed M3D-Seg form."""
    m3d_labels: list[str] = field(default_factory=list)
    """Names of that form's mask channels, known faults corrected."""
    exclude: str = ""
    """Regular expression; ids that match it in full are left out."""
    exclude_reason: str = ""
    doubts: str = ""
    faults: str = ""
    """Known errors of the labels, and what is done about them."""
    prepare: str = ""
    """What must be done by hand first."""

    def excludes(self, id: str) -> bool:
        """Return whether the recipe leaves this case out."""
        return bool(self.exclude) and re.fullmatch(self.exclude, id) is not None


def read_recipe(path: str | Path) -> DatasetRecipe:
    """Read a recipe from a YAML file. Raises CaseError for an unknown key, a wrong type or a wrong pattern."""
    path = Path(path)
    if not path.is_file():
        raise CaseError(
            f"recipe: {path} does not exist: give a file such as shards/datasets/btcv.yaml (segvol-pl init DIR copies "
            "them)"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CaseError(f"recipe: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise CaseError(f"recipe: {path} is not a mapping: see shards/README.md")
    _check_keys(raw, path)
    _check_meanings(raw, path)
    return DatasetRecipe(**raw)


def recipe_cases(recipe: DatasetRecipe, root: str | Path) -> list[Case]:
    """Find the cases of a data set, including those that the recipe excludes.

    Args:
        recipe: The recipe.
        root: The folder where the data set was unpacked.

    Returns:
        The cases, sorted by id.

    Raises:
        CaseError: No CT matches, two have one id, or a CT has no label.
    """
    root = Path(root)
    if not root.is_dir():
        raise CaseError(
            f"images: {root} is not a folder: with a recipe, give the folder where {recipe.name} was unpacked"
        )
    found = _find_images(recipe, root)
    cases = [_recipe_case(recipe, root, id, image) for id, image in sorted(found.items())]
    bare = [str(case.image) for case in cases if not case.label and not case.masks and not recipe.excludes(case.id)]
    if bare:
        wanted = recipe.labels or recipe.masks
        raise CaseError(f"{recipe.name}: no label for {listed(bare)}: {root / wanted} matches nothing" + _hint(recipe))
    return cases


def _check_keys(raw: dict[Any, Any], path: Path) -> None:
    fields = {field.name: field for field in dataclasses.fields(DatasetRecipe)}
    for key, value in raw.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            raise CaseError(f"recipe: {path}: unknown key {key}" + (f": did you mean {close[0]}?" if close else ""))
        kind = str(fields[key].type).partition("[")[0]
        if type(value).__name__ != kind:
            raise CaseError(f"recipe: {path}: {key} must be a {kind}, not {value!r}")
    unset = dataclasses.MISSING
    required = [name for name, field in fields.items() if field.default is field.default_factory is unset]
    missing = [name for name in required if name not in raw]
    if missing:
        raise CaseError(f"recipe: {path}: lacks {listed(missing)}")


def _check_meanings(raw: dict[str, Any], path: Path) -> None:
    for name, values in raw.get("categories", {}).items():
        checked_values(checked_name(name, path), values, path)
    for pattern in (raw["images"], raw.get("labels") or raw.get("masks", "")):
        if "{id}" not in pattern:
            raise CaseError(f"recipe: {path}: pattern {pattern!r} does not contain {{id}}")
    parts = [file for files in raw.get("files", {}).values() for file in files]
    for pattern in (raw["images"], raw.get("labels", ""), raw.get("masks", ""), *parts):
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise CaseError(f"recipe: {path}: pattern {pattern!r} leads out of the data set's folder")
    if bool(raw.get("labels")) == bool(raw.get("masks")):
        raise CaseError(f"recipe: {path}: give one of labels (with categories) and masks (with files)")
    if bool(raw.get("labels")) != bool(raw.get("categories")) or bool(raw.get("masks")) != bool(raw.get("files")):
        raise CaseError(f"recipe: {path}: labels go with categories, masks with files")
    if not raw["certain"] and not raw.get("doubts"):
        raise CaseError(f"recipe: {path}: certain is false: say in doubts what is uncertain")
    try:
        re.compile(raw.get("exclude", ""))
    except re.error as error:
        raise CaseError(f"recipe: {path}: exclude is not a regular expression ({error})") from error


def _find_images(recipe: DatasetRecipe, root: Path) -> dict[str, Path]:
    """Id -> CT."""
    pattern = _regex(recipe.images)
    found: dict[str, Path] = {}
    for path in sorted(root.glob(recipe.images.replace("{id}", "*"))):
        match = pattern.fullmatch(path.relative_to(root).as_posix())
        if match is None:
            continue
        if match["id"] in found:
            raise CaseError(f"{recipe.name}: {found[match['id']]} and {path} have one id, {match['id']}")
        found[match["id"]] = path
    if not found:
        raise CaseError(f"{recipe.name}: {root / recipe.images} matches nothing: give the set's root" + _hint(recipe))
    return found


def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{id\}|\*\*/|\*)", pattern)
    text = "".join(WILDCARDS.get(part, re.escape(part)) for part in parts)
    head, name, tail = text.partition(WILDCARDS["{id}"])
    return re.compile(head + name + tail.replace(WILDCARDS["{id}"], "(?P=id)"))


def _hint(recipe: DatasetRecipe) -> str:
    return f" ({recipe.prepare})" if recipe.prepare else ""


def _recipe_case(recipe: DatasetRecipe, root: Path, id: str, image: Path) -> Case:
    place = glob.escape(id)
    if recipe.labels:
        matches = sorted(root.glob(recipe.labels.replace("{id}", place)))
        if len(matches) > 1:
            raise CaseError(f"{recipe.name}: {id} has several label maps: {listed([str(path) for path in matches])}")
        return Case(id, image, matches[0] if matches else None)
    masks = {}
    for category, files in recipe.files.items():
        patterns = [recipe.masks.replace("{id}", place).replace("{file}", glob.escape(file)) for file in files]
        masks[category] = tuple(path for pattern in patterns for path in sorted(root.glob(pattern)))
    return Case(id, image, masks={name: paths for name, paths in masks.items() if paths})
