"""The categories file: the label values of each category name, and other names of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.errors import CaseError, listed

log = logging.getLogger(__name__)

CATEGORIES, SYNONYMS = "categories", "synonyms"
"""Sections of the file."""


def load_categories(path: str | Path) -> dict[str, list[int]]:
    """Read category name -> label values from YAML: `categories: {name: [values]}`, or only the mapping.

    Raises CaseError for any other content, a name given twice, or a label value outside of 1 to 65535.
    """
    path = Path(path)
    raw = _content(path)
    sections = isinstance(raw, dict) and isinstance(raw.get(CATEGORIES), dict)
    mapping = raw[CATEGORIES] if sections else raw
    if not isinstance(mapping, dict) or not mapping:
        raise CaseError(f"categories: {path} names none: write name: [label values]")
    if not sections and isinstance(mapping.get(SYNONYMS), dict):
        raise CaseError(f"categories: {path} has a section synonyms: put the names above it into a section categories")
    return {checked_name(name, path): checked_values(name, values, path) for name, values in mapping.items()}


def load_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Read category name -> its other names, from the section `synonyms: {name: [other names]}` of the same file.

    A file without that section has none. One that has only that section may name any category.

    Raises CaseError for any other content; for other names of what is no category of the file; and for a synonym that
    is a category or is listed twice.
    """
    path = Path(path)
    raw = _content(path)
    section = raw.get(SYNONYMS) if isinstance(raw, dict) else None
    if section is None or (not isinstance(section, dict) and not isinstance(raw.get(CATEGORIES), dict)):
        return {}  # in a file of the plain form, `synonyms` is the name of a category
    if not isinstance(section, dict):
        raise CaseError(f"synonyms: {path}: {section!r} lists none: write name: [other names]")
    known = list(section) if raw.keys() == {SYNONYMS} else list(load_categories(path))
    owner: dict[str, str] = {}
    for name, others in section.items():
        if checked_name(name, path) not in known:
            raise CaseError(f"synonyms: {path}: {name!r} is none of its categories: correct the name")
        for other in others if isinstance(others, list) else [others]:
            if checked_name(other, path) in known:
                raise CaseError(f"synonyms: {path}: {other!r}, of {name!r}, is a category: it cannot be a synonym too")
            if other in owner:
                raise CaseError(f"synonyms: {path}: {other!r} is listed for {owner[other]!r} and {name!r}: keep one")
            owner[other] = name
    return {name: [other for other in owner if owner[other] == name] for name in section}


def synonyms_among(path: str | Path, categories: Collection[str]) -> dict[str, str]:
    """Synonym -> category, sorted by synonym, of those that a file lists for these categories.

    Logs the categories of the file that are none of these. Raises CaseError as `load_synonyms`, and for a synonym that
    is one of these categories.
    """
    listed_for = load_synonyms(path)
    if others := [name for name in listed_for if name not in categories]:
        log.info("synonyms: %s: left out those of %s, which are no categories here", path, listed(others))
    found = {other: name for name, names in listed_for.items() if name in categories for other in names}
    for other, name in found.items():
        if other in categories:
            raise CaseError(
                f"synonyms: {path}: {other!r}, of {name!r}, is a category here: take it out of the synonyms"
            )
    return dict(sorted(found.items()))


def _content(path: Path) -> Any:
    """What the YAML file holds. Raises CaseError."""
    if not path.is_file():
        raise CaseError(f"categories: {path} does not exist: check the path")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CaseError(f"categories: {path} is no YAML ({' '.join(str(error).split())})") from error


class UniqueKeys(yaml.SafeLoader):
    """Refuse a key that is given twice. YAML's own loader silently replaces the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Raises ConstructorError, with the place, for a key that is given twice."""
        counts = Counter(key.value for key, _ in node.value)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{listed(twice)} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def checked_name(name: Any, path: Path) -> str:
    """Return the name. Raises CaseError unless it is text."""
    if not isinstance(name, str) or not name.strip():
        raise CaseError(f"categories: {path}: {name!r} is no name: quote it to make it text")
    return name


def checked_values(name: str, values: Any, path: Path) -> list[int]:
    """Sort the label values. Raises CaseError for anything but whole numbers from 1 to 65535."""
    given: list[Any] = values if isinstance(values, list) else [values]
    checked = [value for value in given if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536]
    if not checked or len(checked) != len(given):
        raise CaseError(
            f"categories: {path}: {name}: {values!r} are no label values: give whole numbers from 1 to 65535"
        )
    return sorted(set(checked))
