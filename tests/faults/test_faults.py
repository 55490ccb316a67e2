"""A dozen cells of the matrix of faults, with real ranks; `python tests/faults/matrix.py` tries all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.cells import CELLS, CHOSEN, STRATEGIES, Cell
from faults.harness import Bench, no_small_disk
from faults.injection import Fault, Moment
from ranks import Ranks

ROOT = Path(__file__).parents[2]


def test_the_chosen_cells_have_every_fault_moment_and_strategy() -> None:
    assert {cell.fault for cell in CHOSEN} == set(Fault)
    assert {cell.moment for cell in CHOSEN} == set(Moment)
    assert {cell.strategy for cell in CHOSEN} == set(STRATEGIES)
    assert set(CHOSEN) <= set(CELLS) and len(CELLS) == len(set(CELLS))


def test_the_page_has_every_cell() -> None:
    """One that is new or has changed its name: `python tests/faults/matrix.py --write PATTERN`."""
    results = json.loads((ROOT / "docs" / "reference" / "faults.json").read_text(encoding="utf-8"))
    assert list(results["cells"]) == [str(cell) for cell in CELLS]


@pytest.fixture(scope="module")
def bench(phantom_shards: Path, ranks: dict[int, Ranks], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    return Bench(folder, phantom_shards, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CHOSEN, ids=str)
def test_a_fault_is_noticed_and_the_same_command_resumes(bench: Bench, cell: Cell) -> None:
    if cell.fault is Fault.disk and (reason := no_small_disk()):
        pytest.skip(reason)
    outcome = bench.attempt(cell)
    assert outcome.problems == [], outcome.complaints
