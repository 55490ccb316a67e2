"""Kernels and bytes of a step of the full model on a GPU, counted on fake tensors: what a change may not lose again.

Figures in the limits are counts, which no machine changes. Before prompts of all groups were decoded together and the
image was kept narrow the default step took 4,465 kernels and 208 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def steps() -> Any:
    """benchmarks/step_counts.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import step_counts

        yield step_counts
    for name in ("step_counts", "counting", "training", "resident"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("step", "kernels", "gigabytes"), [("simmim", 485, 50.5), ("prompts", 1_095, 58), ("default", 1_095, 89)]
)
def test_a_step_launches_and_moves_no_more_than_it_did(steps: Any, step: str, kernels: int, gigabytes: float) -> None:
    counts = steps.STEPS[step][1]()
    assert counts.kernels.total() <= kernels
    assert counts.moved.total() / 1e9 <= gigabytes
    # And no less than a step can: weights alone are read, and what the encoder's products make is written.
    assert counts.kernels.total() > 400 and counts.moved.total() > 10e9


@pytest.mark.parametrize(
    ("part", "kernels", "gigabytes"), [("encoder", 450, 25.0), ("decoder transformer", 390, 30.5), ("other", 195, 1.3)]
)
def test_no_part_of_the_default_step_grows(steps: Any, part: str, kernels: int, gigabytes: float) -> None:
    found, moved = steps.default_step().of(part)
    assert 0 < found <= kernels and 0 < moved / 1e9 <= gigabytes


@pytest.mark.slow
def test_a_cpus_number_of_prompts_at_once_launches_several_times_as_much(steps: Any) -> None:
    six, all_of_them = (steps.supervised(4, 4, 6, at_once) for at_once in (6, None))
    assert six.kernels.total() > 2 * all_of_them.kernels.total()
