"""From YAML files and `key=value` to one checked configuration.

1. Every source is flattened to `Setting`s: dotted key, value, where it was written. A later one wins.
   `base: FILE` in a YAML names the file that it builds on; a section given as `FILE.yaml` (`model=small.yaml`) is
   read from that file. Both are relative to the file that names them; on the command line, to the working folder.
2. Each key is looked up in the schema as it is read, and its value converted to the field's type.
3. The dataclasses are built, and their `__post_init__` checks lengths and ranges.

Every fault is a ConfigError that names the key, where it was written, and the remedy. All of it is done in well under
0.1 s, which is why no configuration library is imported.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.config import BUNDLED, MAY_CHANGE, MISSING, SCHEMAS, Range
from segvol_pl.credentials import masked
from segvol_pl.errors import ConfigError

COMMAND_LINE = "command line"
NULL = "tag:yaml.org,2002:null"
PAIR = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
SECTION_FILE = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """Only what JSON knows besides text: YAML 1.1 would read `no` as false, 2026-11-01 as a date and 1e-4 as text."""

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
    """One key a line; a list on its key's line."""

    def represent_in_line(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_in_line)


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
    """Of numbers, where they are checked."""

    @property
    def type_name(self) -> str:
        """As the help and errors name it; of an enum its values."""
        return _type_name(self.type)


@dataclass(frozen=True)
class Setting:
    """One key's value, as one source gives it."""

    key: str
    value: Any
    origin: str
    """`FILE:LINE` or `command line`."""


@dataclass(frozen=True)
class Source:
    """What is being read: a YAML file, or the command line."""

    command: str
    path: Path | None = None
    """None: the command line."""
    through: tuple[Path, ...] = ()
    """The files that led here, this one last."""
    origin: str = COMMAND_LINE
    """Where it was written, if it is no file."""

    def line(self, node: yaml.Node) -> str:
        """`FILE:LINE` of a node, or the origin of what is no file."""
        return self.origin if self.path is None else f"{self.path}:{node.start_mark.line + 1}"

    def named(self, name: str) -> Source:
        """The file `name`, as this source names it. Raises ConfigError where it is among those that led here."""
        path = (self.path.parent if self.path else Path()) / name
        if path.resolve() in self.through:
            chain = " -> ".join(step.name for step in (*self.through, path))
            raise ConfigError(
                f"base ({self.path}): builds on itself: {chain}; take one of these `base` lines out", "base"
            )
        return Source(self.command, path, (*self.through, path.resolve()))


class Written(str):
    """An argument that was not given on the command line: text, and `FILE:LINE` as its origin."""

    origin: str

    def __new__(cls, text: str, origin: str) -> Written:
        made = super().__new__(cls, text)
        made.origin = origin
        return made


def load(command: str, arguments: Sequence[str]) -> Any:
    """The checked configuration of `command`: an instance of `SCHEMAS[command]`.

    arguments: YAML files and `key=value` pairs; the rightmost wins, a file's own keys over its base's.
    Raises ConfigError, naming key, origin and remedy, for an unknown or missing key, a value of the wrong type, length
    or range, a file that is missing, unreadable or builds on itself.
    """
    settings = _settings(command, arguments)
    values = _values(command, settings)
    missing = [field for field in fields_help(command) if values[field.key] == MISSING]
    if missing:
        pairs = " ".join(f"{field.key}=..." for field in missing)
        raise ConfigError(f"missing {pairs} ({missing[0].key}: {missing[0].help})", missing[0].key)
    return _built(command, values, settings)


def load_run(arguments: Sequence[str]) -> Any:
    """The configuration of a training run: of train or of pretrain, whichever has its keys.

    Raises ConfigError, as `load` does for train, where it is neither's.
    """
    try:
        return load("train", arguments)
    except ConfigError as error:
        try:
            return load("pretrain", arguments)
        except ConfigError:
            raise error from None


def imported(name: str) -> Any:
    """What `package.module:name` names. Raises ImportError or AttributeError where there is none."""
    module, _, inner = name.partition(":")
    return getattr(importlib.import_module(module), inner)


def custom_function(name: str, key: str) -> Callable[..., Any]:
    """The user's function `package.module:function` that a key names. Raises ConfigError where it is not found."""
    module, _, function = name.partition(":")
    try:
        found = imported(name)
    except ImportError as error:
        raise ConfigError(
            f"{key}: {name}: {error}: install the package, or name its folder in PYTHONPATH", key
        ) from error
    except AttributeError:
        raise ConfigError(f"{key}: {name}: {module} has no {function!r}", key) from None
    if not callable(found):
        raise ConfigError(f"{key}: {name} is no function", key)
    return typing.cast(Callable[..., Any], found)


def resolved(command: str, arguments: Sequence[str]) -> str:
    """The configuration as YAML. Keys that still must be given stand as `???`. Raises ConfigError as `load` does."""
    values = _values(command, _settings(command, arguments))
    if MISSING in values.values():
        return _dump(_nested(values))
    return to_yaml(load(command, arguments))


def plain(config: Any) -> Any:
    """A configuration as dicts, lists, numbers and text alone: what a checkpoint may hold. Credentials are masked."""
    if dataclasses.is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    if isinstance(config, dict):
        return {name: plain(item) for name, item in config.items()}
    return masked(config) if isinstance(config, str) else config


def to_yaml(config: Any) -> str:
    """The configuration as YAML; `load` of it gives an equal configuration, but for masked credentials."""
    return _dump(plain(config))


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now) of what differs between two plain configurations."""
    old, new = _flat(plain(before)), _flat(plain(now))  # an older run's may hold credentials
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`key before -> now` of two plain configurations, but for the keys that a run may go on with changed."""
    changed = changes(before, now).items()
    return [f"{key} {old} -> {new}" for key, (old, new) in changed if not key.startswith(MAY_CHANGE)]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def fields_help(command: str) -> list[Field]:
    """The keys of `command` in the schema's order. Raises ConfigError for an unknown command."""
    return list(_fields(command).values())


def _dump(container: Any) -> str:
    return str(yaml.dump(container, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


# ---- the schema ----


def _schema(command: str) -> type:
    if command not in SCHEMAS:
        raise ConfigError(f"{command!r} has no configuration; these have: {', '.join(SCHEMAS)}")
    return SCHEMAS[command]


@functools.cache
def _fields(command: str) -> dict[str, Field]:
    return {field.key: field for field in _walk(_schema(command), "")}


def _walk(schema: type, prefix: str, given: Any = None) -> Iterator[Field]:
    """`given`: the section's default, where the schema that holds it has one of its own."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint, key = hints[item.name], prefix + item.name
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), f"{key}.", default)
        else:
            default = default if given is None else getattr(given, item.name)
            texts = (_docstrings(owner.__module__).get((owner.__name__, item.name)) for owner in schema.__mro__[:-1])
            yield Field(key, hint, default, next(filter(None, texts), ""), item.metadata.get("range"))


@functools.cache
def _docstrings(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the text under the field, which Python itself does not keep, of the schemas in a module."""
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
        return "|".join(member.value for member in hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return str(hint.__name__)


@functools.cache
def _sections(command: str) -> set[str]:
    """The keys that hold keys. The root, which is one too, is the empty key."""
    return {"", *_inner_keys(command)}


def _inner_keys(command: str) -> set[str]:
    return {key.rsplit(".", depth)[0] for key in _fields(command) for depth in range(1, key.count(".") + 1)}


# ---- sources to settings ----


def _settings(command: str, arguments: Sequence[str]) -> list[Setting]:
    """All sources, flattened, the decisive one of a key last. Raises ConfigError for unknown keys and bad files."""
    settings: list[Setting] = []
    for argument in arguments:
        source = Source(command, origin=argument.origin) if isinstance(argument, Written) else Source(command)
        pair = PAIR.fullmatch(argument)
        settings += _from_pair(source, *pair.groups()) if pair else _from_file(source.named(argument), "")
    return settings


def _from_pair(source: Source, key: str, text: str) -> Iterator[Setting]:
    field = _fields(source.command).get(key)
    if field is not None and field.type in (str, str | None) and text != "null":
        # The shell has taken the quotes: `text=a: b` and `out=[1]` are texts, whatever YAML would read.
        return iter([Setting(key, text, source.origin)])
    if field is not None and field.type == list[str] and not text.startswith("["):
        return iter([Setting(key, [text], source.origin)])  # `text=liver` is a list of one
    return _flatten(source, key, _parse(text, f"{key} ({source.origin})"))


def _from_file(source: Source, key: str) -> Iterator[Setting]:
    """The settings of a YAML file whose root stands at `key`, after those of its base."""
    node = _parse(_read(source), str(source.path))
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{source.path}: holds no keys; a configuration is lines of `key: value`")
    bases = [value for name, value in node.value if name.value == "base"]
    node.value = [(name, value) for name, value in node.value if name.value != "base"]
    for base in bases:
        yield from _from_file(source.named(str(base.value)), key)
    yield from _flatten(source, key, node)


def _flatten(source: Source, key: str, node: yaml.Node) -> Iterator[Setting]:
    """The settings in `node`, which stands at `key`. Raises ConfigError for keys that the schema does not know."""
    command, here = source.command, source.line(node)
    if key in _fields(command):
        yield Setting(key, _read_value(node, _fields(command)[key], here), here)
    elif key not in _sections(command):
        raise ConfigError(f"unknown key {key} ({here}){did_you_mean(key, _fields(command))}", key)
    elif isinstance(node, yaml.MappingNode):
        _refuse_doubled(source, node)
        for name, value in node.value:
            yield from _flatten(source, f"{key}.{name.value}".lstrip("."), value)
    elif isinstance(node, yaml.ScalarNode) and node.value.endswith(SECTION_FILE):
        yield from _from_file(source.named(node.value), key)
    else:
        inside = next(name for name in _fields(command) if name.startswith(f"{key}."))
        raise ConfigError(f"{key} ({here}): is a section: give {key}=FILE.yaml, or keys in it such as {inside}", key)


def _refuse_doubled(source: Source, node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for name, _ in node.value:
        if str(name.value) in seen:
            raise ConfigError(f"{name.value} ({source.line(name)}): is given twice: keep one", str(name.value))
        seen.add(str(name.value))


def _read_value(node: yaml.Node, field: Field, origin: str) -> Any:
    try:
        return convert(node, field.type)
    except (ValueError, OverflowError, yaml.YAMLError):
        given = node.value if isinstance(node, yaml.ScalarNode) else yaml.serialize(node).strip()
        wanted = field.type_name.replace("|", ", ")
        problem = f"{given!r} is none of {wanted}" if wanted != field.type_name else f"{given!r} is not {wanted}"
        raise ConfigError(f"{field.key} ({origin}): {problem}", field.key) from None


def convert(node: yaml.Node, hint: Any) -> Any:
    """The node as a value of type `hint`. Raises ValueError where it is none."""
    if typing.get_origin(hint) is types.UnionType:
        inner, _ = typing.get_args(hint)  # `X | None` is the only union in the schema
        return None if node.tag == NULL else convert(node, inner)
    if typing.get_origin(hint) is list and isinstance(node, yaml.SequenceNode):
        return [convert(item, typing.get_args(hint)[0]) for item in node.value]
    if hint == list[str] and isinstance(node, yaml.ScalarNode) and node.tag != NULL:
        return [str(node.value)]  # as `text=liver` on the command line
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL or typing.get_origin(hint) is list:
        raise ValueError(node.tag)
    if hint is str or issubclass(hint, Enum):
        return hint(node.value)  # as it was written: `007` is no number where a text is wanted
    return _convert_scalar(_Loader("").construct_document(node), hint)


def _convert_scalar(value: Any, hint: type) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if (
        hint in (int, float)
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and hint(value) == value
    ):
        return hint(value)  # 1e5 steps are a whole number
    raise ValueError(value)


def _read(source: Source) -> str:
    path = typing.cast(Path, source.path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        named_by = f", named by {source.through[-2]}" if len(source.through) > 1 else ""
        hint = "" if path.suffix in SECTION_FILE else "; an override is written key=value"
        raise ConfigError(f"{path}: no such file{named_by}{hint}{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read as a configuration: {reason}") from None


def _parse(text: str, origin: str) -> yaml.Node:
    try:
        return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(NULL, "")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{origin}: not valid YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def read_nodes(path: Path) -> yaml.MappingNode:
    """A YAML file's keys with the lines that they stand on. Raises ConfigError where it is none."""
    node = _parse(_read(Source("", path, (path.resolve(),))), str(path))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no keys")
    return node


def is_section(command: str, key: str) -> bool:
    """Whether `key` holds keys, so that a file may be given for it."""
    return key in _inner_keys(command)


def _nearest_file(path: Path) -> str:
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    if close:
        return f": did you mean {path.parent / close[0]}?"
    return f": segvol-pl init DIR lays out {path.parts[0]}/" if path.parts[0] in BUNDLED else ""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """`: did you mean KEY?`, or nothing. A key of the right name in another section comes before a similar one."""
    known = list(known)
    leaf = wrong.rpartition(".")[2]
    same_name = [key for key in known if key.rpartition(".")[2] == leaf]
    close = same_name or difflib.get_close_matches(wrong, known, n=1)
    return f": did you mean {close[0]}?" if close else ": --help lists the keys"


# ---- settings to a configuration ----


def _values(command: str, settings: list[Setting]) -> dict[str, Any]:
    """Every key's value: the last setting's, else the default."""
    given = {setting.key: setting.value for setting in settings}
    return {key: given.get(key, field.default) for key, field in _fields(command).items()}


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, root)[name] = plain(value)
    return root


def _built(command: str, values: dict[str, Any], settings: list[Setting]) -> Any:
    try:
        return _build(_schema(command), "", values)
    except ConfigError as error:
        origin = next((setting.origin for setting in reversed(settings) if setting.key == error.key), None)
        if origin is None:
            raise
        raise ConfigError(f"{error.key} ({origin}){str(error).removeprefix(str(error.key))}", error.key) from None


def _build(schema: type, prefix: str, values: dict[str, Any]) -> Any:
    arguments, hints = {}, typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        arguments[item.name] = values[key] if key in values else _build(hints[item.name], f"{key}.", values)
    return schema(**arguments)
