"""Tries every cell of the matrix of faults, and writes the page about it.

python tests/faults/matrix.py                       # all cells, a line for each
python tests/faults/matrix.py --write               # and docs/reference/faults.json and faults.md
python tests/faults/matrix.py 'kill -9' saving fsdp # the cells whose names match all of these patterns
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from faults.cells import CELLS, Cell  # noqa: E402
from faults.harness import HANG_TIMEOUT, Bench, Outcome, no_small_disk  # noqa: E402
from phantom_shards import pack_phantoms  # noqa: E402
from ranks import Ranks  # noqa: E402

from segvol_pl.run_folder import manifest  # noqa: E402

PAGES = runpy.run_path(str(TESTS.parent / "docs" / "faults.py"))


def main() -> int:
    """Try the cells that the arguments select; the exit status is 1 if one of them is not as expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="patterns: cells whose names match all of them")
    parser.add_argument("--write", action="store_true", help="write the page; needs all cells")
    parser.add_argument("--keep", type=Path, help="folder in which runs of cells that are not as expected are kept")
    given = parser.parse_args()
    cells = [cell for cell in CELLS if all(re.search(word, str(cell)) for word in given.words)]
    if given.write and given.words:
        parser.error("--write needs all cells")
    if reason := no_small_disk():
        parser.error(reason)
    with ExitStack() as made:
        folder = given.keep or Path(made.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = tried(cells, folder, made)
    bad = [outcome for outcome in outcomes if outcome.problems]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} cells are as expected")
    if given.write:
        results = {
            "date": datetime.now(UTC).date().isoformat(),
            "hang_timeout": HANG_TIMEOUT,
            **manifest(),
            "cells": [outcome.record() for outcome in outcomes],
        }
        PAGES["RESULTS"].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGES["PAGE"].write_text(PAGES["page"](results), encoding="utf-8")
    return 1 if bad else 0


def tried(cells: list[Cell], folder: Path, made: ExitStack) -> list[Outcome]:
    """The outcome of each cell, reported as it comes."""
    ranks: dict[int, Ranks] = {}
    for number in sorted({cell.ranks for cell in cells}):
        ranks[number] = Ranks(folder, number)
        made.callback(ranks[number].stop)
    shards = folder / "phantoms" / "shards"
    bench, outcomes = Bench(folder, shards if shards.exists() else pack_phantoms(shards.parent), ranks), []
    for cell in cells:
        outcome = bench.attempt(cell)
        print(f"{'ok ' if not outcome.problems else 'BAD'} {cell}: {outcome.statuses}, {outcome.seconds:.1f} s")
        for line in [*(f"! {problem}" for problem in outcome.problems), *outcome.complaints]:
            print(f"      {line[:400]}", flush=True)
        outcomes.append(outcome)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())
