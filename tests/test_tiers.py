"""What `make test`, `make slow` and `make gpu` select: a test of a CUDA device is selected by the last alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def selections() -> list[str]:
    """Every marker expression of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return [quoted or word for quoted, word in re.findall(r'-m pytest -m (?:"([^"]+)"|(\S+))', makefile)]


def test_only_one_tier_selects_tests_of_a_cuda_device() -> None:
    assert selections() == ["not slow and not gpu", "slow and not gpu", "gpu"]


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "gpu").glob("test_*.py")), ids=lambda path: path.stem)
def test_every_test_in_the_gpu_folder_is_marked(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    marked = len(re.findall(r"^@pytest\.mark\.gpu$", text, re.MULTILINE))
    whole = re.search(r"^pytestmark = .*pytest\.mark\.gpu", text, re.MULTILINE)
    assert whole or marked == len(re.findall(r"^def test_", text, re.MULTILINE))


@pytest.mark.slow
def test_without_a_cuda_device_they_are_skipped_saying_so_and_the_other_tiers_never_see_them() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "SEGVOL_NO_SKIP"}

    def said(expression: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", expression, "tests/gpu"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**environment, "CUDA_VISIBLE_DEVICES": ""}
        )
        return done.returncode, done.stdout

    fast, slow, gpu = selections()
    status, output = said(f"({fast}) or ({slow})")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED and "skipped" not in output
    status, output = said(gpu)
    assert status == 0 and "needs a CUDA device" in output and "passed" not in output
