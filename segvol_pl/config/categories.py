"""The categories file: the label values of each category name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.errors import CaseError, listed


def load_categories(path: str | Path) -> dict[str, list[int]]:
    """Read category name -> label values from YAML: `categories: {name: [values]}`, or only the mapping.

    Raises CaseError for any other content, a name given twice, or a label value outside of 1 to 65535.
    """
    path = Path(path)
    if not path.is_file():
        raise CaseError(f"categories: {path} does not exist: check the path")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CaseError(f"categories: {path} is no YAML ({' '.join(str(error).split())})") from error
    mapping = raw["categories"] if isinstance(raw, dict) and isinstance(raw.get("categories"), dict) else raw
    if not isinstance(mapping, dict) or not mapping:
        raise CaseError(f"categories: {path} names none: write name: [label values]")
    return {checked_name(name, path): checked_values(name, values, path) for name, values in mapping.items()}


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
