"""Write docs/reference/claims.md, the paper's claims at size `tiny`, from docs/reference/paper.json.

`segvol-pl paper run=all` writes OUT/paper.json, of which that file is a copy. `python docs/claims.py` writes the page;
`tests/test_docs.py` fails if the page is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference"
PAGE, RESULTS = REFERENCE / "claims.md", REFERENCE / "paper.json"
HEAD = """# The paper's claims on phantoms

<!-- Written by `python docs/claims.py` from paper.json. Do not edit. -->

`segvol-pl paper run=all processes=2` runs each claim of the SegVol paper as an experiment on synthetic CTs, with a
small model on a CPU, and wrote these figures; [The paper's claims](../how-to/paper.md) says how. They can support the
order of two figures. Their values cannot be compared with the paper's, which are of real CTs and a model 80 times as
large.

A claim holds if the 95 % interval (Student's t) of every expected difference, over pairs of runs of equal seed, lies
above 0. It does not hold if one lies below 0. Otherwise it is not shown.
"""


def page(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    claims = results["claims"]
    overview = [[f"[{each['claim']}](#{each['name']})", each["source"], f"**{each['verdict']}**"] for each in claims]
    seeds, unfinished = ", ".join(map(str, results["seeds"])), results["unfinished"]
    state = f"{len(unfinished)} jobs are not finished." if unfinished else "All jobs are finished."
    blocks = [
        HEAD,
        f"Seeds: {seeds}. {state} Code: commit {results['manifest']['commit'][:9]}.\n",
        table(("claim", "paper", "here"), overview),
    ]
    return "\n".join([*blocks, *(part for claim in claims for part in section(claim))])


def section(claim: Mapping[str, Any]) -> Iterator[str]:
    """Yield the part of the page about one claim."""
    yield f"## {claim['name']}\n"
    means = f" Means over {', '.join(claim['categories'])}." if claim["categories"] else ""
    yield f"{claim['source']}, **{claim['verdict']}**: {claim['claim']}{means}\n"
    figures = [
        [each["name"], number(each["paper"]), number(each["mean"]), interval(each["interval"])]
        for each in claim["figures"]
    ]
    yield table(("figure", "paper", "here", "95 % interval"), figures)
    expected = [
        [each["expectation"], number(mean(each["differences"]), "+"), interval(each["interval"], "+"), each["verdict"]]
        for each in claim["expected"]
    ]
    yield table(("expected", "difference", "95 % interval", ""), expected)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(names), ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None without values."""
    return sum(values) / len(values) if values else None


def number(value: float | None, sign: str = "") -> str:
    """Return three digits after the point; empty for None."""
    return "" if value is None else f"{value:{sign}.3f}"


def interval(found: Mapping[str, float] | None, sign: str = "") -> str:
    """Return an interval; empty for None."""
    return "" if found is None else f"{number(found['low'], sign)} to {number(found['high'], sign)}"


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
