"""The tutorial: its commands are run as they are written, with fewer steps, and print what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "getting-started" / "tutorial.md"
COMMANDS = ("segvol-pl ", "python ")
BEGIN = rf"\n(?={'|'.join(COMMANDS)})"
"""Of a further command in a block: one may go over several lines."""
STEPS = re.compile(r"optim\.max_steps=\d+")


def steps(page: str) -> list[tuple[str, list[str]]]:
    """Return the commands of a page, each with the lines of output that the page shows for it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"(?:^    .+\n)+", re.sub(r" *\\\n +", " ", page), re.MULTILINE):
        lines = [line[4:] for line in block.splitlines()]
        if lines[0].startswith(COMMANDS):
            found += [(command, []) for command in re.split(BEGIN, "\n".join(lines))]
        elif found:
            found[-1][1].extend(lines)
    return found


def form(line: str) -> str:
    """Return a line of output without its digits and the width of its columns."""
    return " ".join(re.sub(r"\d+", "0", line).split())


def test_commands_and_their_output_are_seen() -> None:
    page = "    liver: 1\n\nText\n\n    segvol-pl pack \\\n        out=x\n\nIt prints\n\n    12 s  done\n"
    assert steps(page) == [("segvol-pl pack out=x", ["12 s  done"])]
    block = "    python -c '\n    pass'\n    segvol-pl demo\n"
    assert steps(block) == [("python -c '\npass'", []), ("segvol-pl demo", [])]
    assert form(" 3.5 s   left") == form("12.25 s left")


def test_the_readme_has_the_commands_of_the_tutorial() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own CTs")[1].split("\n## ")[0]
    shown = [command for command, _ in steps(readme)]
    assert len(shown) == 5
    assert set(shown) <= {command for command, _ in steps(PAGE.read_text(encoding="utf-8"))}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_tutorial_leads_to_a_mask(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    run = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for command, shown in steps(PAGE.read_text(encoding="utf-8")):
        words = STEPS.sub("optim.max_steps=100", command).replace("segvol-pl", f"{sys.executable} -m segvol_pl")
        done = subprocess.run(
            re.sub(r"^python ", f"{sys.executable} ", words),
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": run, "COLUMNS": "120"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed = {form(line) for line in (done.stdout + done.stderr).splitlines()}
        assert [line for line in shown if form(line) not in printed] == [], f"{command}\n{sorted(printed)}"
    mask, image = (
        nib.Nifti1Image.from_filename(tmp_path / name) for name in ("liver.nii.gz", "own/images/phantom_003_ct.nii.gz")
    )
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine)
