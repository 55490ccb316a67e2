"""Write docs/reference/faults.md, what a run does when something goes wrong, from docs/reference/faults.json.

`python tests/faults/matrix.py --write` writes both. `python docs/faults.py` writes the page again; `tests/test_docs.py`
fails if the page is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent / "reference"
PAGE, RESULTS = REFERENCE / "faults.md", REFERENCE / "faults.json"
HEAD = """# When something goes wrong

<!-- Written by `python tests/faults/matrix.py --write`. Do not edit. -->

Each cell is a real run of a small model on CPU ranks, in which one thing goes wrong within one rank: a process that
hangs, fails, is slow, killed or stopped, a disk that is full, a store that is down, NaN, a refused allocation. Then the
same command is started again, without the fault.

The ranks are processes of one machine that communicate over gloo, which notices at once that a rank has gone. NCCL does
not: on GPUs the launcher (`srun --kill-on-bad-exit`) or the watchdog ends the others. That was not tried.
"""
MEANING = """
A cell is good if

- the run ends by itself, and each rank has the expected exit status,
- one line over the logs of all ranks gives the reason, and there is no traceback,
- no checkpoint is damaged, and the next start resumes from the last one before the fault,
- every loss, in training and in validation, is then equal to the uninterrupted run's, to the last digit.

The number is the time from the fault until the first rank has ended, in seconds. `run.hang_timeout` was {timeout:.0f} s
for ranks that hang or are stopped. A cell without a number ran on to its end. In `saving` the fault befalls rank 0,
while it writes a checkpoint, otherwise the last rank.
"""
MARKS = {True: "good", False: "**not as expected**"}


def page(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    cells = list(results["cells"].values())
    good = sum(not cell["problems"] for cell in cells)
    dates, packages = sorted({cell["date"] for cell in cells}), results["packages"]
    made = (
        f"Tried on {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with torch {packages['torch']} and lightning "
        f"{packages['lightning']}: {good} of {len(cells)} cells are good.\n"
    )
    blocks = [HEAD, made, MEANING.format(timeout=results["hang_timeout"]), "## Cells\n", matrix(cells)]
    blocks += ["## What ends a run\n", lines(cells)]
    if good < len(cells):
        blocks += ["## Not as expected\n", exceptions(cells)]
    return "\n".join(blocks)


def matrix(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of all cells: a row for each fault, moment and number of ranks."""
    strategies = list(dict.fromkeys(cell["cell"]["strategy"] for cell in cells))
    rows: dict[tuple[str, str, int], dict[str, str]] = {}
    for cell in cells:
        of = cell["cell"]
        seconds = f" {cell['seconds']:.1f}" if any(cell["statuses"]) else ""
        row = rows.setdefault((of["fault"], of["moment"], of["ranks"]), {})
        row[of["strategy"]] = MARKS[not cell["problems"]] + seconds
        row["date"] = min(cell["date"], row.get("date", cell["date"]))
    columns = (*strategies, "date")
    return table(
        ("fault", "moment", "ranks", *columns),
        [
            [fault, moment, str(ranks), *(row.get(column, "") for column in columns)]
            for (fault, moment, ranks), row in rows.items()
        ],
    )


def lines(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of exit statuses and of an example of the line, for each fault that ends a run."""
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        of = cell["cell"]
        if not any(cell["statuses"]) or of["strategy"] != cells[0]["cell"]["strategy"] or of["ranks"] != 2:
            continue
        statuses = ", ".join(map(str, cell["statuses"]))
        rows[of["fault"], of["moment"]] = [of["fault"], of["moment"], statuses, f"`{shown(cell['complaints'])}`"]
    head = "Exit statuses are those of rank 0 and rank 1; a negative one is the signal that killed the process.\n\n"
    return head + table(("fault", "moment", "exit statuses", "line"), list(rows.values()))


def shown(complaints: Sequence[str]) -> str:
    """Return the first line, fit for a table."""
    return complaints[0].replace("|", "/").replace("`", "'") if complaints else ""


def exceptions(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a list of the cells that are not as expected, and why."""
    bad = [cell for cell in cells if cell["problems"]]
    return "".join(f"- {name(cell['cell'])}: `{shown(['; '.join(cell['problems'])])}`\n" for cell in bad)


def name(cell: Mapping[str, Any]) -> str:
    """Return a cell's name."""
    return f"{cell['fault']}, {cell['moment']}, {cell['strategy']}, {cell['ranks']} ranks"


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    made = [list(names), ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in made)


if __name__ == "__main__":
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
