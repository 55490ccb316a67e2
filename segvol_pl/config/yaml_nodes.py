"""The YAML of configurations: parse it to nodes that know their lines, convert a node to a type, write YAML."""

from __future__ import annotations

import re
import types
import typing
from enum import Enum
from typing import Any

import yaml

from segvol_pl.errors import ConfigError

NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Know only text and the types of JSON. YAML 1.1 reads `no` as false, 2026-11-01 as a date and 1e-4 as text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012, as PyYAML declares it


_Loader.add_implicit_resolver(NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[Tt]rue|[Ff]alse|TRUE|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Write one key per line, with a list on the line of its key."""

    def represent_in_line(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_in_line)


def parse(text: str, origin: str) -> yaml.Node:
    """Parse YAML; empty text gives a null node. Raises ConfigError that starts with `origin`."""
    try:
        return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(NULL, "")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}: not valid YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def convert(node: yaml.Node, hint: Any, references: bool = False) -> Any:
    """Convert a node to a type.

    Args:
        node: A scalar or a sequence.
        hint: str, int, float, bool, an enum, a list of these, or `X | None`.
        references: Keep text that contains `${` as it is, whatever the type.

    Raises:
        ValueError, OverflowError, yaml.YAMLError: The node does not have this type.
    """
    if typing.get_origin(hint) is types.UnionType:
        inner, _ = typing.get_args(hint)  # `X | None` is the only union in the schema
        return None if node.tag == NULL else convert(node, inner, references)
    if typing.get_origin(hint) is list and isinstance(node, yaml.SequenceNode):
        return [convert(item, typing.get_args(hint)[0], references) for item in node.value]
    if hint == list[str] and isinstance(node, yaml.ScalarNode) and node.tag != NULL:
        return [str(node.value)]  # as `text=liver` on the command line
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL or typing.get_origin(hint) is list:
        raise ValueError(node.tag)
    if references and "${" in node.value:
        return node.value
    if hint is str or issubclass(hint, Enum):
        return hint(node.value)  # as it was written: text may be `007`
    value = _Loader("").construct_document(node)
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and type(value) in (int, float) and hint(value) == value:
        return hint(value)  # 1e5 is an int
    raise ValueError(value)


def dump(container: Any) -> str:
    """Write dicts, lists, numbers and text as YAML."""
    return str(yaml.dump(container, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))
