"""The language of documents, help, log lines, errors and docstrings: certain words and phrases do not occur."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    {
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").glob("*.py"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "segvol_pl").rglob("*.py"),
        ROOT / "CONTRIBUTING.md",
        ROOT / "README.md",
        ROOT / "ROADMAP.md",
        ROOT / "shards" / "README.md",
    }
)
"""What is checked. Of a Python file: docstrings, comments and texts (help, log lines, errors)."""

WORDS = {
    r"anew": "again, or say what is done: rewrites, starts from the beginning",
    r"asked for": "requested, given",
    r"at hand": "available",
    r"beside(?!s)": "next to, in addition to, besides",
    r"by hand of": "by",
    r"by heart": "overfits",
    r"go(?:es)? on|went on|going on": "continue, resume",
    r"heed(?:s|ed)?": "follow, use",
    r"(?:is|are|was|were) held against": "compare with, check against",
    r"house": "project, site, package",
    r"(?<!there )is (?-i:none)(?! of)": "there is no",
    r"likewise": "also, the same way",
    r"lies? on paper|on paper": "estimated",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"milliard": "billion",
    r"nought": "0",
    r"of one's own": "your own, separate",
    r"(?:is|are|was|were) said": "logged, reported",
    r"so (?:that|it) is said": "reported",
    r"told|tells?": "reported, distinguished; or name who reports it",
    r"unbroken": "uninterrupted",
    r"where there (?:is|are) (?:one|any|none)": "if there is one",
    r"where wanted": "if requested",
    r"whole(?! numbers?)": "complete, entire, full",
}
"""Pattern, as whole words in any case -> what to write instead."""
CHAIN = re.compile(r"\bwhere\b[^.;:]*, where\b", re.IGNORECASE)


class Passage(NamedTuple):
    """A piece of prose: the line on which it begins, and its text."""

    line: int
    text: str


def prose(path: Path) -> list[Passage]:
    """Return the prose of a file: a Markdown page, a YAML file's comments, or what Python code says in English."""
    text = path.read_text(encoding="utf-8")
    return list({".md": markdown, ".yaml": comments, ".py": python}[path.suffix](text))


def markdown(text: str) -> Iterator[Passage]:
    """Yield a page's lines without code, addresses and what a comment hides."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith(("    ", "```", "<!--")):
            yield Passage(number, re.sub(r"\]\([^)]*\)", "]", without_code(line)))


def comments(text: str) -> Iterator[Passage]:
    """Yield a YAML file's comments, but for the commands in them."""
    for number, line in enumerate(text.splitlines(), 1):
        found = re.search(r"(?:^|\s)#(.*)", line)
        if found and not re.match(r" *(?:command +)?(?:segvol-pl|sbatch)\b", found[1]):
            yield Passage(number, found[1])


def python(text: str) -> Iterator[Passage]:
    """Yield a program's docstrings, comments and texts of several words."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.splitlines()):
                yield Passage(node.lineno + offset, without_code(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Passage(token.start[0], without_code(token.string))


def without_code(line: str) -> str:
    return re.sub(r"`[^`]*`?", "", line)


def faults(passages: list[Passage]) -> list[str]:
    """Return a line for each word to avoid, with what to write instead."""
    found = [
        f"{line}: {match[0]!r}: write {instead}"
        for line, text in passages
        for pattern, instead in WORDS.items()
        for match in re.finditer(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    ]
    chained = CHAIN.search(" ".join(text for _, text in passages))
    return [*found, *([f"a chain: {chained[0]!r}: write two sentences, or if"] if chained else [])]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_text_is_plain_english(path: Path) -> None:
    assert faults(prose(path)) == []


def test_words_to_avoid_are_seen_in_every_kind_of_text() -> None:
    page = "# Title\n\nIt is written anew.\n\n    anew\n\nSee `anew` and [this](anew.md).\n\n```\nanew\n```\n"
    assert faults(list(markdown(page))) == ["3: 'anew': write " + WORDS["anew"]]
    assert faults(list(comments("# command segvol-pl train\nkey: 1  # likewise\n")))[0].startswith("2: 'likewise'")
    source = 'def f():\n    """Read it anew."""\n    log.info("it is told %s", 1)  # mended\n    return "anew"\n'
    assert [fault.partition(":")[0] for fault in faults(sorted(python(source)))] == ["2", "3", "3"]
    assert faults([Passage(1, "It stops where it is full, where it is not, it runs.")]) != []
    assert faults([Passage(1, "Where it is full, it stops. Where it is not, it runs.")]) == []
