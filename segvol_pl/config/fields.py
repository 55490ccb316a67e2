"""What every schema consists of: keys with their ranges, shared checks, and what the help says about a key."""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from segvol_pl.errors import ConfigError

MISSING: Any = "???"
"""Default of a key that the user must give. OmegaConf uses the same text."""

CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A user's function, `package.module:function`; `loader.custom_function` imports it."""

HIGHEST_SEED = 2**63 - 1
"""The largest seed that numpy and torch both accept."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key accepts: finite and within the given bounds."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        # NaN is neither above nor below anything.
        return (
            -math.inf < number < math.inf
            and (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        given = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        return " and ".join(given) or "a finite number"


def ranged(default: Any, **bounds: float) -> Any:
    """Declare a key that holds a number, or a list of numbers, within a `Range`."""
    metadata = {"range": Range(**bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Keys:
    """A schema or a section of one. Raises ConfigError for a number outside of its range."""

    section: ClassVar[str] = ""
    """Prefix of its keys."""

    def __post_init__(self) -> None:
        for key in fields(self):
            for number in _numbers(getattr(self, key.name)) if "range" in key.metadata else ():
                problem = f"must be {key.metadata['range']}, got {number}"
                require(number in key.metadata["range"], f"{self.section}{key.name}", problem)


def _numbers(value: Any) -> Iterator[float]:
    """Iterate over the numbers in a key's value, if it has been given."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif value is not None and value != MISSING:
        yield value


def require(condition: bool, key: str, problem: str) -> None:
    """Raise ConfigError for a key unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {problem}", key)


def check_custom(key: str, names: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise ConfigError for a name that is no `package.module:function`. `others` are the built-in alternatives."""
    known = f"none of {', '.join(others)} nor" if others else "not"
    for name in names:
        require(CUSTOM.fullmatch(name) is not None, key, f"{name!r} is {known} a function as package.module:function")


def check_triple(key: str, value: list[int]) -> None:
    """Raise ConfigError unless the value has three numbers (d, h, w)."""
    require(len(value) == 3, key, f"needs 3 numbers (d, h, w), got {len(value)}")


# ---- the keys of a schema, for loading and for the help ----


@dataclass(frozen=True)
class Field:
    """One key of a schema."""

    key: str
    type: Any
    default: Any
    """MISSING where the key must be given."""
    help: str
    """The docstring under the field."""
    range: Range | None
    """None unless the key holds numbers."""

    @property
    def type_name(self) -> str:
        """The type as help and errors show it; for an enum, its values."""
        return _type_name(self.type)


def keys_of(schema: type, prefix: str = "", given: Any = None) -> Iterator[Field]:
    """Iterate over the keys of a schema and its sections, in order.

    Args:
        schema: A dataclass.
        prefix: Prefix of its keys, such as `optim.`.
        given: An instance that holds the defaults, instead of the class itself.
    """
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint, key = hints[item.name], prefix + item.name
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if dataclasses.is_dataclass(hint):
            yield from keys_of(typing.cast(type, hint), f"{key}.", default)
        else:
            default = default if given is None else getattr(given, item.name)
            texts = (_docstrings(owner.__module__).get((owner.__name__, item.name)) for owner in schema.__mro__[:-1])
            yield Field(key, hint, default, next(filter(None, texts), ""), item.metadata.get("range"))


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """Read (class, field) -> the text under the field from a module's source; Python does not keep these texts."""
    tree = ast.parse(Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8"))
    found = {}
    for schema in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for statement, following in zip(schema.body, schema.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                text = typing.cast(ast.Constant, following.value).value
                found[schema.name, typing.cast(ast.Name, statement.target).id] = " ".join(str(text).split())
    return found


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(member.value or '""' for member in hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return str(hint.__name__)
