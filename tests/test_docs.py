"""Documents hold what they say: pages are found, links lead somewhere, commands and keys exist, names are explained."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from segvol_pl import __main__ as program
from segvol_pl.config import SCHEMAS
from segvol_pl.config.loader import fields_help

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "shards" / "README.md"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MODULES = sorted((ROOT / "segvol_pl").rglob("*.py"))
TOLD = ("command", "hardware", "time", "result")
"""What a named configuration says at its top."""
README_WIDTH = 120


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- pages ----


def listed(entry: Any) -> Iterator[str]:
    """The pages in a part of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from listed(inner)


def test_every_page_is_in_the_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed(site["nav"])) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_the_readme_has_no_long_line_and_the_pages_include_nothing_of_it() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > README_WIDTH] == []
    included_paths = {found["path"] for page in PAGES for found in INCLUDED.finditer(page.read_text(encoding="utf-8"))}
    assert included_paths == {"ROADMAP.md", "shards/README.md"}


def test_the_list_of_keys_is_current() -> None:
    written = runpy.run_path(str(DOCS / "configuration.py"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), "run `python docs/configuration.py`"


def test_the_page_of_the_claims_is_current() -> None:
    written = runpy.run_path(str(DOCS / "claims.py"))
    results = json.loads(written["RESULTS"].read_text(encoding="utf-8"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](results), "run `python docs/claims.py`"


def test_the_page_of_the_faults_is_current() -> None:
    written = runpy.run_path(str(DOCS / "faults.py"))
    results = json.loads(written["RESULTS"].read_text(encoding="utf-8"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](results), "run `python docs/faults.py`"


LINK = re.compile(r"\]\((?!\w+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
INCLUDED = re.compile(r'^--8<-- "(?P<path>[^":]+)(?::(?P<section>\w+))?"$', re.MULTILINE)


def whole(page: Path) -> str:
    """A page's text with what it includes: a file, or the part of it between a section's landmarks."""
    return INCLUDED.sub(included, page.read_text(encoding="utf-8"))


def included(found: re.Match[str]) -> str:
    text = (ROOT / found["path"]).read_text(encoding="utf-8")
    if found["section"] is None:
        return text
    return text.split(f"[start:{found['section']}]")[1].split(f"[end:{found['section']}]")[0]


def anchors(text: str) -> set[str]:
    """Those of a page's headings, as MkDocs makes them."""
    headings = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"(?m)^#+ (.+)$", text))
    return {re.sub(r"[-\s]+", "-", heading) for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = [(page.parent / found["path"] if found["path"] else page, found["anchor"]) for found in links_of(page)]
    assert [named(target.resolve()) for target, _ in links if not target.is_file()] == []
    assert [anchor for target, anchor in links if anchor and anchor not in anchors(whole(target))] == []


def links_of(page: Path) -> list[re.Match[str]]:
    return list(LINK.finditer(page.read_text(encoding="utf-8")))


def test_links_and_anchors_are_seen() -> None:
    (found,) = LINK.finditer("see [this](shards.md#recipes-datasetsyaml), not [that](https://a.org/b.md)")
    assert (found["path"], found["anchor"]) == ("shards.md", "recipes-datasetsyaml")
    assert "recipes-datasetsyaml" in anchors(whole(DOCS / "reference" / "shards.md"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    assert "BatchPlan" in (tmp_path / "api" / "segvol_pl" / "data" / "stream.html").read_text(encoding="utf-8")
    assert (tmp_path / "repository" / "configs" / "model" / "published.yaml.txt").is_file()


# ---- commands and keys ----

WORKING = (
    *("data.index_builder", "data.shard_index", "data.verify", "demo"),
    *("evaluation.embed", "evaluation.probe", "evaluation.run"),
    *(
        "evaluation.challenge_predict",
        "evaluation.predict_images",
        "experiments.compare",
        "experiments.fit",
        "experiments.mix",
        "finetuning.run",
        "goodput",
        "requeue",
        "run_table",
        "inference.predictor",
        "inference.server",
        "inference.viewer",
        "model.convert",
        "packing.duplicates",
        "sharing.export",
    ),
    *("packing.inventory", "packing.pack", "packing.phantom", "packing.repack", "training.rehearsal"),
    "training.run",
)
"""Modules that a command calls once it has read its arguments."""


class Nothing(list[str]):
    """What such a function returns: no lines, no rows, no faults, and a decision that nothing is to be done."""

    faults: tuple[str, ...] = ()
    again, cause, reason = False, None, ""


class Idle(ModuleType):
    """A module whose functions do nothing."""

    def __getattr__(self, name: str) -> Callable[..., list[str]]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: Nothing()


COMMAND = re.compile(r"^(?:#|    ) *(?:command +)?(?P<line>(?:segvol-pl|(?:\w+=\$\()?sbatch) .+)$", re.MULTILINE)


def commands(text: str) -> list[str]:
    """The lines of a document, or of a configuration's top, that call this program or queue a job of it."""
    return [found["line"] for found in COMMAND.finditer(re.sub(r" *\\\n +", " ", text))]


def words_of(line: str) -> list[str]:
    """Name and arguments of a command; of a job those that its script calls. What may be left out is in."""
    if line.startswith(program.PROGRAM):
        words = shlex.split(line, comments=True)[1:]
    else:
        script, *words = shlex.split(re.split(r"\bslurm/", line, maxsplit=1)[1], comments=True)
        words = [job_verb(script), *(word.removesuffix(")") for word in words)]
    return [word[1:-1] if word.startswith("[") else word for word in words]


def job_verb(script: str) -> str:
    called = re.search(r"-m segvol_pl (\w+)", (ROOT / "slurm" / script).read_text(encoding="utf-8"))
    assert called
    return called[1]


DOCUMENTED = [*(page for page in TEXTS if page.name not in ("CHANGELOG.md", "ROADMAP.md")), *CONFIGS]
COMMANDS = [(path, line) for path in DOCUMENTED for line in commands(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("path", "line"), COMMANDS, ids=[f"{named(path)}-{line[:60]}" for path, line in COMMANDS])
def test_every_command_is_one(
    path: Path, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program reads it, and would go on to do it."""
    monkeypatch.chdir(ROOT)
    for name in WORKING:
        monkeypatch.setitem(sys.modules, f"segvol_pl.{name}", Idle(name))
    for name in (
        "experiments.launch.held_out",
        "experiments.launch.start",
        "experiments.launch.start_all",
        "experiments.paper.write",
        "experiments.study.start",
        "experiments.study.start_all",
        "doctor.examine",
        "resources.lay_out",
        "training.coordinates.lines",
        "atomic.write_text",
        "data.corpus.check_folders",
    ):
        monkeypatch.setattr(f"segvol_pl.{name}", lambda *_: [])
    monkeypatch.setattr("segvol_pl.hub._pin", lambda place: place)
    assert program.main(words_of(line)) == program.DONE, capsys.readouterr().err


def test_commands_are_seen_and_wrong_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert words_of("first=$(sbatch --parsable slurm/pack.sbatch cases=a.csv out=DIR)")[:2] == ["pack", "cases=a.csv"]
    assert len(COMMANDS) > 100
    assert {word for _, line in COMMANDS for word in words_of(line)[:1]} == set(program.COMMANDS)
    assert program.main(words_of("segvol-pl train configs/train.yaml data.shard=x run.out=y")) == program.MISUSED
    assert program.main(words_of("sbatch slurm/evaluate.sbatch checkpoint=a out=b")) == program.MISUSED


KEYS = {field.key for schema in SCHEMAS for field in fields_help(schema)}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
DOTTED = re.compile(
    r"`(?P<key>(?:" + "|".join(sorted(SECTIONS)) + r")\.(?!(?:py|json|safetensors)`)[a-z_]+)(?:=[^`]*)?`"
)


@pytest.mark.parametrize("page", TEXTS, ids=named)
def test_every_key_that_is_spoken_of_exists(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    if page.name == "CHANGELOG.md":  # its table of names shows the old ones too
        lines = [line for line in lines if not line.startswith("| ")]
    spoken = {found["key"] for found in DOTTED.finditer("\n".join(lines))}
    assert sorted(spoken - KEYS - MODULE_NAMES) == []


MODULE_NAMES = {".".join(path.relative_to(ROOT / "segvol_pl").with_suffix("").parts) for path in MODULES}
"""`data.stream` is a module, not a key."""


# ---- configurations ----


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_every_configuration_says_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    top = lines[: next((place for place, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    assert [word for word in TOLD if not any(re.match(rf"# {word} +\S", line) for line in top)] == []


# ---- names ----

Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
OVERRIDES = ("setup", "teardown", "state_dict", "load_state_dict", "on_", "log_", "configure_")
"""Beginnings of methods that a library calls on a class derived from its own, and explains."""


def unexplained(tree: ast.Module | ast.ClassDef, ours: set[str]) -> Iterator[str]:
    """Public classes, functions and methods in `tree` that have no docstring. `ours`: classes that are not derived."""
    derived = isinstance(tree, ast.ClassDef) and not {ast.unparse(base) for base in tree.bases} <= ours
    for node in tree.body:
        if not isinstance(node, Named) or node.name.startswith("_") or (derived and overrides(node)):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for name in unexplained(node, ours))


def overrides(node: Named) -> bool:
    return node.name.startswith(OVERRIDES)


def test_every_public_name_explains_itself() -> None:
    trees = {named(path): ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
    ours = {node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    found = {path: list(unexplained(tree, ours)) for path, tree in trees.items()}
    assert {path: names for path, names in found.items() if names} == {}
    bad = ast.parse("class A:\n  def f(self): ...\n  def _g(self): ...\nclass B(Hook):\n  'B.'\n  def on_x(self): ...")
    assert list(unexplained(bad, {"A", "B"})) == ["A", "A.f"]
