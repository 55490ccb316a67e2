"""The files that forges and tools read: each parses, and names only targets and scripts that exist."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
OTHERS = [
    *sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")),
    ROOT / ".github" / "dependabot.yml",
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
MADE_BY_TARGETS = {"build/newest/bin/python"}
"""Programs of an environment that a target has made before."""


def parsed(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def missing(command: str) -> list[str]:
    """Targets of make and programs of the repository that a shell command names and that do not exist."""
    targets = [name for name in re.findall(r"\bmake ([a-z]+)", command) if name not in TARGETS]
    scripts = re.findall(r"(?:^|[\s;&|])((?:\.ci|build|benchmarks|slurm)/\S+)", command)
    return targets + [
        name for name in scripts if name not in MADE_BY_TARGETS and not os.access(ROOT / name, os.X_OK | os.R_OK)
    ]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_exists(path: Path) -> None:
    content = parsed(path)
    assert content[True], "`on`, which YAML reads as true"
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        assert job["runs-on"] and 0 < job["timeout-minutes"] <= 360
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert "@" in step.get("uses", "@") and missing(step.get("run", "")) == []


def test_what_does_not_exist_is_noticed() -> None:
    assert missing("make tset && .ci/rum") == ["tset", ".ci/rum"] and missing("make test lowest; .ci/run") == []


def test_the_workflows_run_every_check() -> None:
    runs = " ".join(step.get("run", "") for path in WORKFLOWS for step in steps(path))
    assert all(
        each in runs for each in ("make test", "make lowest", "make newest", "make docs", "make wheel", ".ci/run")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    matrix = parsed(ROOT / ".github/workflows/test.yml")["jobs"]["pinned"]["strategy"]["matrix"]["python"]
    assert set(matrix) == stated


def test_only_a_tag_publishes() -> None:
    content = parsed(ROOT / ".github/workflows/publish.yml")
    assert content[True] == {"push": {"tags": ["v*"]}}
    publish = content["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_other_files_parse(path: Path) -> None:
    assert parsed(path)


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = parsed(ROOT / "CITATION.cff")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"]["text"])
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2311.13385"
