"""What the named configurations come to, key by key: a changed default shows as a line of a diff.

SEGVOL_GOLDEN=write python -m pytest tests/config/test_golden.py      # after a change that is meant
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from segvol_pl.config import SCHEMAS
from segvol_pl.config.loader import resolved

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
VERBS = ("evaluate", "pack", "predict", "pretrain", "train")
NAMED = {
    **{command: (command, [f"configs/{command}.yaml"]) for command in VERBS},
    **{f"tiny-{path.stem}": (path.stem, [str(path)]) for path in sorted((ROOT / "configs/tiny").glob("*.yaml"))},
    "interactive-train": ("train", ["configs/interactive/train.yaml"]),
    "train-published": ("train", ["configs/train.yaml", "model=configs/model/published.yaml"]),
    "predict-published": ("predict", ["configs/predict.yaml", "zoom=configs/zoom/published.yaml"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_configuration_comes_to_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command, arguments = NAMED[name]
    found, golden = resolved(command, arguments), GOLDEN / f"{name}.yaml"
    if os.environ.get("SEGVOL_GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(NAMED)
    assert set(VERBS) <= set(SCHEMAS)
