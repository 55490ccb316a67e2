"""What every schema is made of: keys with their ranges, and the checks that several schemas share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from segvol_pl.errors import ConfigError

MISSING: Any = "???"
"""Stands for a value that must be given."""

CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""A function of the user's own, as `package.module:function`; `loader.custom_function` finds it."""

HIGHEST_SEED = 2**63 - 1
"""Of what numpy and torch both take."""


@dataclass(frozen=True)
class Range:
    """The numbers that a key takes: finite ones within the bounds that are given."""

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
    """A key that holds a number, or a list of numbers, within bounds: see `Range`."""
    metadata = {"range": Range(**bounds)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Keys:
    """A schema, or a section of one. Its numbers lie within their ranges (ConfigError)."""

    section: ClassVar[str] = ""
    """What stands before its keys."""

    def __post_init__(self) -> None:
        for key in fields(self):
            for number in _numbers(getattr(self, key.name)) if "range" in key.metadata else ():
                problem = f"must be {key.metadata['range']}, got {number}"
                require(number in key.metadata["range"], f"{self.section}{key.name}", problem)


def _numbers(value: Any) -> Iterator[float]:
    """Those of a key's value; none where there is none yet."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif value is not None and value != MISSING:
        yield value


def require(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: {problem}", key)


def check_custom(key: str, names: Sequence[str], others: Sequence[str] = ()) -> None:
    known = f"none of {', '.join(others)} nor" if others else "not"
    for name in names:
        require(CUSTOM.fullmatch(name) is not None, key, f"{name!r} is {known} a function as package.module:function")


def check_triple(key: str, value: list[int]) -> None:
    require(len(value) == 3, key, f"needs 3 numbers (d, h, w), got {len(value)}")
