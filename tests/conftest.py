"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from phantom_shards import pack_phantoms
from ranks import Ranks

from segvol_pl import device

TESTS = Path(__file__).parent
LONGEST = [
    "test_demo.py",
    "slurm/test_training.py",
    "training/test_strategies.py",
    "training/test_sharded.py",
    "training/test_speed.py",
    "experiments/test_paper.py",
    "training/test_run.py",
    "training/test_validation.py",
    "training/test_startup.py",
    "training/test_watchdog.py",
    "evaluation/test_evaluate_ranks.py",
    "experiments/test_grid.py",
]
"""Files that take minutes. They begin first: a long one that begins last is waited for by an idle core."""

SHARED = Path(os.environ.get("SEGVOL_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real CTs and reference figures, which stands beside the repository."""
    if not (SHARED / "ct").is_dir():
        pytest.skip(f"needs the real CTs: no folder {SHARED} (set SEGVOL_SHARED)")
    return SHARED


@pytest.fixture(scope="session")
def challenge(shared: Path) -> Path:
    """The figures of the interactive challenge's own functions."""
    folder = shared / "reference" / "challenge"
    if not folder.is_dir():
        pytest.skip(f"needs the challenge's figures: no folder {folder} (set SEGVOL_SHARED)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _amx() -> Iterator[None]:
    """Here `precision=auto` is bf16 on any CPU, as it is on CPUs with AMX: a test that compares figures states fp32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "has_amx", lambda: True)
        yield


@pytest.fixture(autouse=True)
def _rank_zero() -> Iterator[None]:
    """A test that leaves the process another rank switches off the loggers of all later ones."""
    yield
    assert not getattr(rank_zero_only, "rank", 0), "restore rank_zero_only.rank at the end of this test"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    """Number -> as many ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {number: Ranks(folder, number) for number in (1, 2, 4)}
    yield found
    for these in found.values():
        these.stop()


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small labelled phantoms, packed: four or so to train on, the others to test on.

    Packing needs SimpleITK. Where it is not, SEGVOL_PHANTOMS names a folder that this fixture packed elsewhere.
    """
    if "SEGVOL_PHANTOMS" in os.environ:
        return Path(os.environ["SEGVOL_PHANTOMS"])
    return pack_phantoms(tmp_path_factory.mktemp("phantoms"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first; tests of a CUDA device are skipped where there is none."""
    rank = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    """With SEGVOL_NO_SKIP set a skipped test has failed: there, everything that tests need is present."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("SEGVOL_NO_SKIP") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, though SEGVOL_NO_SKIP is set: {report.longrepr}"
