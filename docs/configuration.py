"""Write docs/reference/configuration.md, the list of all configuration keys, from the schema.

`python docs/configuration.py` writes the page. `tests/test_docs.py` fails if the page is out of date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from segvol_pl.config import MISSING, SCHEMAS, Range
from segvol_pl.config.fields import Field
from segvol_pl.config.loader import fields_help, plain

MARKUP = re.compile(r"`[^`]*`|[*<\[]")
"""A piece of code, or a character that Markdown would interpret."""
PAGE = Path(__file__).parent / "reference" / "configuration.md"
HEAD = """# Configuration keys

<!-- Written by `python docs/configuration.py` from the schema. Do not edit. -->

Every key can be given in a YAML file or as `key=value` on the command line; the rightmost value wins.
`segvol-pl COMMAND --help` prints the same list for one command, `segvol-pl config COMMAND FILE` prints a resolved
configuration. See
[Command line](command-line.md#configuration) for the rules.

Each line has the key, its type and range, its default, and its meaning.
"""


def page() -> str:
    """Return the page as Markdown: first the keys of each command, then the sections that commands share."""
    keys = {command: fields_help(command) for command in SCHEMAS}
    sections = sorted({section(field) for fields in keys.values() for field in fields} - {""})
    blocks = [
        HEAD,
        "## Commands\n",
        *(section_of(command, fields) for command, fields in keys.items()),
        "## Sections\n",
    ]
    return "\n".join([*blocks, *(shared(name, keys) for name in sections)])


def section(field: Field) -> str:
    """Return the part of the key before its dot; empty without one."""
    return field.key.rpartition(".")[0]


def section_of(command: str, fields: list[Field]) -> str:
    """Return the part of the page about one command."""
    used = list(dict.fromkeys(section(field) for field in fields if section(field)))
    lines = [f"### segvol-pl {command}", "", " ".join(str(SCHEMAS[command].__doc__).split()), ""]
    lines += [line(field) for field in fields if not section(field)]
    if used:
        lines += ["", "Sections: " + ", ".join(f"[{name}](#{name.replace('.', '')})" for name in used) + "."]
    return "\n".join(lines) + "\n"


def shared(name: str, keys: dict[str, list[Field]]) -> str:
    """Return the part of the page about one section. A key that differs between commands has a line for each kind."""
    lines: dict[str, list[str]] = {}
    for command, fields in keys.items():
        for field in fields:
            if section(field) == name:
                lines.setdefault(line(field), []).append(command)
    everywhere = used_by(lines.values())
    marked = (
        text if commands == everywhere else f"{text} (only {', '.join(commands)})" for text, commands in lines.items()
    )
    return "\n".join([f"### {name}", "", f"Used by {', '.join(everywhere)}.", "", *marked]) + "\n"


def used_by(groups: Iterable[list[str]]) -> list[str]:
    """Return the commands of all groups, each once."""
    return list(dict.fromkeys(command for group in groups for command in group))


def line(field: Field) -> str:
    """Return the key's line."""
    return f"- `{field.key}` ({', '.join(facts(field))}): {MARKUP.sub(escaped, field.help)}"


def escaped(found: re.Match[str]) -> str:
    """Return code as it is, and any other character of Markdown after a backslash."""
    return found[0] if found[0].startswith("`") else f"\\{found[0]}"


def facts(field: Field) -> Iterator[str]:
    """Yield type, range and default."""
    yield field.type_name
    if field.range not in (None, Range()):
        yield str(field.range)
    yield "**required**" if field.default == MISSING else f"default `{json.dumps(plain(field.default))}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
