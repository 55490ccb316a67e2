"""Tries every cell of the matrix of faults, and writes the page about it.

1. `python tests/faults/matrix.py` tries all cells, and prints a line for each.
2. `python tests/faults/matrix.py 'kill -9' saving fsdp` tries those whose names match all of these patterns.
3. With `--write` each outcome is also put into docs/reference/faults.json and faults.md, as it comes.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from faults.cells import CELLS, Cell  # noqa: E402
from faults.harness import HANG_TIMEOUT, Bench, Outcome, no_small_disk  # noqa: E402
from phantom_shards import pack_phantoms  # noqa: E402
from ranks import Ranks  # noqa: E402

from segvol_pl.atomic import write_text  # noqa: E402
from segvol_pl.run_folder import manifest  # noqa: E402

PAGES = runpy.run_path(str(TESTS.parent / "docs" / "faults.py"))


def main() -> int:
    """Try the cells that the arguments select; the exit status is 1 if one of them is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="patterns: cells whose names match all of them")
    parser.add_argument("--write", action="store_true", help="write each cell into the page, as it comes")
    parser.add_argument("--keep", type=Path, help="folder in which runs of cells that are not as expected are kept")
    given = parser.parse_args()
    cells = [cell for cell in CELLS if all(re.search(word, str(cell)) for word in given.words)]
    if reason := no_small_disk():
        parser.error(reason)
    with ExitStack() as made:
        folder = given.keep or Path(made.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bad = 0
        for outcome in tried(cells, folder, made):
            bad += bool(outcome.problems)
            if given.write:
                write(outcome)
    print(f"{len(cells) - bad} of {len(cells)} cells are as expected")
    return 1 if bad else 0


def write(outcome: Outcome) -> None:
    """Put the outcome in the place of the cell's earlier one, and write the page."""
    path: Path = PAGES["RESULTS"]
    before = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
    today = datetime.now(UTC).date().isoformat()
    now = {**before, str(outcome.cell): {**outcome.record(), "date": today}}
    results = {
        "hang_timeout": HANG_TIMEOUT,
        "packages": manifest()["packages"],
        "cells": {str(cell): now[str(cell)] for cell in CELLS if str(cell) in now},
    }
    write_text(path, json.dumps(results, indent=1) + "\n")
    write_text(PAGES["PAGE"], PAGES["page"](results))


def tried(cells: list[Cell], folder: Path, made: ExitStack) -> Iterator[Outcome]:
    """The outcome of each cell, reported as it comes."""
    ranks: dict[int, Ranks] = {}
    for number in sorted({cell.ranks for cell in cells}):
        ranks[number] = Ranks(folder, number)
        made.callback(ranks[number].stop)
    shards = folder / "phantoms" / "shards"
    bench = Bench(folder, shards if shards.exists() else pack_phantoms(shards.parent), ranks)
    for cell in cells:
        outcome = bench.attempt(cell)
        print(f"{'ok ' if not outcome.problems else 'BAD'} {cell}: {outcome.statuses}, {outcome.seconds:.1f} s")
        for line in [*(f"! {problem}" for problem in outcome.problems), *outcome.complaints]:
            print(f"      {line[:400]}", flush=True)
        yield outcome


if __name__ == "__main__":
    sys.exit(main())
