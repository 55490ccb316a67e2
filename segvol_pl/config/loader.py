"""Load one checked configuration from YAML files and `key=value` arguments.

1. Flatten every source to `Setting`s: dotted key, value, and where it was written. A later source wins.
   `base: FILE` in a YAML file names the file that it builds on. A section given as `FILE.yaml` (`model=small.yaml`) is
   read from that file. Both paths are relative to the file that names them; on the command line, to the working folder.
2. Look each key up in the schema as it is read, and convert its value to the type of the field. A value may refer to
   the value of another key as `${data.seed}`, also within a text: `run.out=runs/${data.seed}`. Nothing but keys can be
   referred to. `\\${` stands for the text itself.
3. OmegaConf puts the settings into the schema, replaces the references and makes the dataclasses. Their
   `__post_init__` checks lengths and ranges.

Every error is a ConfigError that names the key, where it was written, and the remedy. OmegaConf is imported after
step 2, so that a wrong key fails at once.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.config import BUNDLED, MAY_CHANGE, MISSING, SCHEMAS
from segvol_pl.config.fields import Field, keys_of
from segvol_pl.config.yaml_nodes import TEXT, convert, dump, parse
from segvol_pl.credentials import masked
from segvol_pl.errors import ConfigError

COMMAND_LINE = "command line"
UNKNOWN = "unknown key"
"""Begins the message about a key that a command does not have."""
PAIR = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
REFERENCE = re.compile(r"(\\*)\$\{([^}]*\}?)")
"""`${KEY}`. An odd number of backslashes before it makes it plain text."""
SECTION_FILE = (".yaml", ".yml")


@dataclass(frozen=True)
class Setting:
    """The value of one key in one source."""

    key: str
    value: Any
    origin: str
    """`FILE:LINE` or `command line`."""


@dataclass(frozen=True)
class Source:
    """A YAML file or the command line."""

    command: str
    path: Path | None = None
    """None for the command line."""
    through: tuple[Path, ...] = ()
    """The chain of files that led to this one, which is the last."""
    origin: str = COMMAND_LINE
    """Where its settings were written, unless it is a file."""

    def line(self, node: yaml.Node) -> str:
        """Name the place of a node: `FILE:LINE`, or the origin of a source that is no file."""
        return self.origin if self.path is None else f"{self.path}:{node.start_mark.line + 1}"

    def named(self, name: str) -> Source:
        """Make the source of a file that this one names. Raises ConfigError if files build on each other."""
        path = (self.path.parent if self.path else Path()) / name
        if path.resolve() in self.through:
            chain = " -> ".join(step.name for step in (*self.through, path))
            raise ConfigError(
                f"base ({self.path}): builds on itself: {chain}; remove one of these `base` lines", "base"
            )
        return Source(self.command, path, (*self.through, path.resolve()))


class Written(str):
    """An argument from a file instead of the command line, with `FILE:LINE` as its origin."""

    origin: str

    def __new__(cls, text: str, origin: str) -> Written:
        made = super().__new__(cls, text)
        made.origin = origin
        return made


def load(command: str, arguments: Sequence[str]) -> Any:
    """Load and check the configuration of a command.

    Args:
        command: A key of `SCHEMAS`.
        arguments: YAML files and `key=value` pairs. The rightmost wins; a file's own keys win over its base's.

    Returns:
        An instance of `SCHEMAS[command]`.

    Raises:
        ConfigError: An unknown or missing key, a value of the wrong type, length or range, or a file that is missing,
            unreadable or builds on itself. The message names key, origin and remedy.
    """
    settings = _settings(command, arguments)
    missing = _missing(command, settings)
    if missing:
        pairs = " ".join(f"{field.key}=..." for field in missing)
        raise ConfigError(f"missing {pairs} ({missing[0].key}: {missing[0].help})", missing[0].key)
    return _built(command, settings)


def load_run(arguments: Sequence[str]) -> Any:
    """Load the configuration of a training run as `train`, or else as `pretrain`, whichever has its keys.

    Raises ConfigError as `load` does for the command that has its keys, or for train if neither has.
    """
    try:
        return load("train", arguments)
    except ConfigError as error:
        try:
            return load("pretrain", arguments)
        except ConfigError as other:
            has_its_keys = UNKNOWN in str(error) and UNKNOWN not in str(other)
            raise (other if has_its_keys else error) from None


def custom_function(name: str, key: str) -> Callable[..., Any]:
    """Import the user's function `package.module:function` for a key. Raises ConfigError if it is not found."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
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
    """Load a configuration and write it as YAML. Raises ConfigError as `load` does.

    If keys are missing, they are written as `???`, and references are not replaced.
    """
    settings = _settings(command, arguments)
    if not _missing(command, settings):
        return to_yaml(_built(command, settings))
    from omegaconf import OmegaConf

    return dump(plain(OmegaConf.to_container(_merged(command, settings))))


def plain(config: Any) -> Any:
    """Convert a configuration to dicts, lists, numbers and text, as checkpoints hold it. Credentials are masked."""
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
    """Write a configuration as YAML. `load` reads an equal configuration from it, except for masked credentials."""
    return dump(_escaped(plain(config)))


def _escaped(value: Any) -> Any:
    """Escape `${` in all texts, so that it is not read as a reference."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two plain configurations: key -> (before, now) for each difference."""
    old, new = flat(plain(before)), flat(plain(now))  # an older run's may hold credentials
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List `key before -> now` for each difference that a resumed run may not have (see `MAY_CHANGE`)."""
    changed = changes(before, now).items()
    return [f"{key} {old} -> {new}" for key, (old, new) in changed if not key.startswith(MAY_CHANGE)]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a plain configuration: dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found


def fields_help(command: str) -> list[Field]:
    """List the keys of a command in the schema's order. Raises ConfigError for an unknown command."""
    return list(_fields(command).values())


# ---- the schema ----


def _schema(command: str) -> type:
    if command not in SCHEMAS:
        raise ConfigError(f"{command!r} has no configuration; these have: {', '.join(SCHEMAS)}")
    return SCHEMAS[command]


@functools.cache
def _fields(command: str) -> dict[str, Field]:
    return {field.key: field for field in keys_of(_schema(command))}


@functools.cache
def _sections(command: str) -> set[str]:
    """The keys that contain keys."""
    return {key.rsplit(".", depth)[0] for key in _fields(command) for depth in range(1, key.count(".") + 1)}


# ---- sources to settings ----


def _settings(command: str, arguments: Sequence[str]) -> dict[str, Setting]:
    """Read all sources into one setting per given key; a later source replaces an earlier one."""
    settings: list[Setting] = []
    for argument in arguments:
        source = Source(command, origin=argument.origin) if isinstance(argument, Written) else Source(command)
        pair = PAIR.fullmatch(argument)
        settings += _from_pair(source, *pair.groups()) if pair else _from_file(source.named(argument), "")
    return {setting.key: setting for setting in settings}


def _from_pair(source: Source, key: str, text: str) -> Iterator[Setting]:
    known = _fields(source.command)
    hint = known[key].type if key in known else None
    # The shell has taken the quotes: `clip_model=a: b` and `out=[1]` are texts, whatever YAML would read.
    if (hint in (str, str | None) and text != "null") or (hint == list[str] and not text.startswith("[")):
        return _flatten(source, key, yaml.ScalarNode(TEXT, text))
    return _flatten(source, key, parse(text, f"{key} ({source.origin})"))


def _from_file(source: Source, key: str) -> Iterator[Setting]:
    """Read the settings of a YAML file whose root belongs at `key`, after those of its base."""
    node = parse(_read(source), str(source.path))
    if isinstance(node, yaml.ScalarNode) and node.value == "":
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{source.path}: holds no keys; a configuration is lines of the form `key: value`")
    bases = [value for name, value in node.value if name.value == "base"]
    node.value = [(name, value) for name, value in node.value if name.value != "base"]
    for base in bases:
        yield from _from_file(source.named(str(base.value)), key)
    yield from _flatten(source, key, node)


def _flatten(source: Source, key: str, node: yaml.Node) -> Iterator[Setting]:
    """Read the settings in a node that belongs at `key`."""
    command, here = source.command, source.line(node)
    if key in _fields(command):
        yield _setting(command, key, node, here)
    elif key and key not in _sections(command):
        raise ConfigError(f"{UNKNOWN} {key} ({here}){did_you_mean(key, _fields(command))}", key)
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
            raise ConfigError(f"{name.value} ({source.line(name)}): is given twice: keep only one", str(name.value))
        seen.add(str(name.value))


def _setting(command: str, key: str, node: yaml.Node, origin: str) -> Setting:
    field = _fields(command)[key]
    try:
        value = convert(node, field.type, references=True)
    except (ValueError, OverflowError, yaml.YAMLError):
        given = node.value if isinstance(node, yaml.ScalarNode) else yaml.serialize(node).strip()
        wanted = field.type_name.replace("|", ", ")
        problem = f"{given!r} is none of {wanted}" if wanted != field.type_name else f"{given!r} is not {wanted}"
        raise ConfigError(f"{key} ({origin}): {problem}", key) from None
    for name in _references(value):
        _check_reference(command, name, f"{key} ({origin})")
    return Setting(key, value, origin)


def _references(value: Any) -> list[str]:
    """Find what follows each `${` in a text, or in the texts of a list, except for `\\${`."""
    if isinstance(value, list):
        return [name for item in value for name in _references(item)]
    found = REFERENCE.findall(value) if isinstance(value, str) else []
    return [name for slashes, name in found if len(slashes) % 2 == 0]


def _check_reference(command: str, name: str, place: str) -> None:
    field = _fields(command).get(name.removesuffix("}"))
    if ":" in name:
        problem = "looks outside of the configuration: refer to a key, as ${data.seed}"
    elif field is None or not name.endswith("}"):
        problem = f"refers to no key{did_you_mean(name, _fields(command))}"
    elif "list" in field.type_name:
        problem = "refers to a list: write the list itself"
    else:
        return
    raise ConfigError(f"{place}: ${{{name} {problem} (write \\${{ for the text)", place.partition(" ")[0])


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


def read_nodes(path: Path) -> yaml.MappingNode:
    """Read the keys of a YAML file as nodes, which know their lines. Raises ConfigError."""
    node = parse(_read(Source("", path, (path.resolve(),))), str(path))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: holds no keys")
    return node


def is_section(command: str, key: str) -> bool:
    """Whether a key contains keys, so that a file may be given for it."""
    return key in _sections(command)


def _nearest_file(path: Path) -> str:
    close = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=1)
    if close:
        return f": did you mean {path.parent / close[0]}?"
    return f": segvol-pl init DIR lays out {path.parts[0]}/" if path.parts[0] in BUNDLED else ""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Suggest a known key: the same name in another section before a similar name. Otherwise name --help."""
    known = list(known)
    leaf = wrong.rpartition(".")[2]
    same_name = [key for key in known if key.rpartition(".")[2] == leaf]
    close = same_name or difflib.get_close_matches(wrong, known, n=1)
    return f": did you mean {close[0]}?" if close else ": --help lists the keys"


# ---- settings to a configuration ----


def _missing(command: str, settings: dict[str, Setting]) -> list[Field]:
    """The keys that are required and not given."""
    return [
        field
        for key, field in _fields(command).items()
        if (settings[key].value if key in settings else field.default) == MISSING
    ]


@functools.cache
def _defaults(command: str) -> Any:
    from omegaconf import OmegaConf  # its import takes longer than reading all sources, and a wrong key needs none

    return OmegaConf.structured(_schema(command))


def _merged(command: str, settings: dict[str, Setting]) -> Any:
    """Merge the settings into the schema's defaults."""
    from omegaconf import OmegaConf

    tree = copy.deepcopy(_defaults(command))
    for setting in settings.values():
        OmegaConf.update(tree, setting.key, setting.value, merge=False)
    return tree


def _built(command: str, settings: dict[str, Setting]) -> Any:
    """Replace the references and create the dataclasses, which check themselves."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        tree = _merged(command, settings)
        for setting in settings.values():
            for name in _references(setting.value):
                if setting.value != f"${{{name}" and OmegaConf.select(tree, name[:-1]) is None:
                    raise ConfigError(f"{setting.key}: ${{{name} is null and cannot be part of a text", setting.key)
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        setting = settings[str(error.full_key).partition("[")[0]]
        problem = f"{setting.value} gives no {_fields(command)[setting.key].type_name}: {str(error).splitlines()[0]}"
        raise ConfigError(f"{setting.key} ({setting.origin}): {problem}", setting.key) from None
    except ConfigError as error:
        if error.key not in settings:
            raise
        origin = settings[error.key].origin
        raise ConfigError(f"{error.key} ({origin}){str(error).removeprefix(error.key)}", error.key) from None
