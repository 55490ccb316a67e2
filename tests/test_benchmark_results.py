"""A benchmark's figures stand beside what they were measured on."""

from __future__ import annotations

import importlib
import json
import socket
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_figures_are_written_with_commit_host_versions_and_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    text = importlib.import_module("results").record("x", {"stall_s": 0.5}, tmp_path).read_text()
    found = json.loads(text)
    assert found["figures"] == {"stall_s": 0.5} and found["date"].count("-") == 2
    assert found["host"]["cores"] >= 1 and found["host"]["processor"]
    assert found["commit"] and found["python"] and found["packages"]["torch"]
    assert socket.gethostname() not in text


def test_every_written_figure_names_its_commit_and_host() -> None:
    for path in (BENCHMARKS / "results").glob("*.json"):
        assert {"figures", "date", "host", "commit", "packages"} <= set(json.loads(path.read_text()))
