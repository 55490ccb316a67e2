"""What the project holds itself to, read from its sources: who imports whom, lengths, names, types."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "segvol_pl"
TREES = {path.relative_to(PACKAGE): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
MODULES = sorted(TREES)
LIBRARIES = {"lightning", "pytorch_lightning", "monai"}
LONGEST = 80
FORBIDDEN_NAMES = {"utils", "common", "helpers", "base"}
# What any part may import: it stands on nothing else of ours.
GROUND = {"atomic", "config", "credentials", "errors"}
# Part of the package -> the parts that it may import beside itself and GROUND, wherever in the file.
MAY_IMPORT: dict[str, set[str]] = {
    "credentials": set(),
    "errors": {"credentials"},
    "atomic": set(),
    "config": {"credentials", "errors"},
    "launched": set(),
    "folder_lock": {"launched"},
    "hub": set(),
    "run_folder": {"hub"},
    "slurm_job": set(),
    "journal": {"launched", "slurm_job"},
    "goodput": {"folder_lock", "journal"},
    "requeue": {"journal"},
    "run_table": {"goodput", "html_page", "run_folder"},
    "completion": set(),
    "resources": set(),
    "doctor": {"planning", "training.loggers", "training.out_of_memory", "training.startup"},
    "html_page": set(),
    "kernels": set(),
    "device": {"launched"},
    "imaging": {"segvol_pl"},
    "data": {"imaging", "launched"},
    "packing": {"data", "folder_lock", "imaging"},
    "model": {"data", "hub", "imaging", "kernels"},
    "planning": set(),
    "inference": {"data", "device", "imaging", "model"},
    "training": {
        "data",
        "device",
        "folder_lock",
        "goodput",
        "hub",
        "imaging",
        "journal",
        "kernels",
        "launched",
        "model",
        "planning",
        "run_folder",
        "slurm_job",
    },
    "evaluation": {
        "data",
        "device",
        "folder_lock",
        "html_page",
        "hub",
        "imaging",
        "inference",
        "launched",
        "model",
        "packing",
        "run_folder",
        "training.loggers",
        "training.trackers",
    },
    "finetuning": {
        "data",
        "device",
        "evaluation",
        "folder_lock",
        "html_page",
        "hub",
        "launched",
        "model",
        "packing",
        "planning",
        "run_folder",
        "training.run",
    },
    "sharing": {"segvol_pl", "data", "goodput", "hub", "imaging", "journal", "model", "run_folder"},
    "experiments": {"data", "folder_lock", "html_page", "model", "planning", "resources", "run_folder"},
}
STANDS_ON_LESS = {"credentials", "errors", "config"}
"""Parts of the ground, which may import what their row names alone."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def dotted(module: Path) -> str:
    return ".".join(module.with_suffix("").parts).removesuffix(".__init__")


def imported(node: ast.AST) -> Iterator[str]:
    """Full dotted names that the import statements in `node` name, the names behind `from` included."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            yield from (alias.name for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "imports are absolute"
            for alias in inner.names:
                full = f"{inner.module}.{alias.name}"
                yield full if _is_module(full) else str(inner.module)


def _is_module(name: str) -> bool:
    parts = name.split(".")
    place = ROOT.joinpath(*parts)
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def ours(node: ast.AST) -> set[str]:
    return {name.removeprefix("segvol_pl.") for name in imported(node) if name.split(".")[0] == "segvol_pl"}


def within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


# ---- who imports whom ----


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_each_part_imports_only_what_it_may(part: str) -> None:
    modules = [module for module in MODULES if within(dotted(module), {part})]
    assert modules
    allowed = {part} | MAY_IMPORT[part] | (set() if part in STANDS_ON_LESS else GROUND)
    broken = {
        str(module): sorted(name for name in ours(TREES[module]) if not within(name, allowed)) for module in modules
    }
    assert {module: names for module, names in broken.items() if names} == {}


def test_no_two_parts_import_each_other() -> None:
    """Not by way of others either: the parts can be put in an order in which each imports only those before it."""
    needs = {part: {name.split(".")[0] for name in names} - {"segvol_pl"} for part, names in MAY_IMPORT.items()}
    assert len(list(graphlib.TopologicalSorter(needs).static_order())) == len(needs.keys() | GROUND)
    listed = {dotted(module).split(".")[0] for module in MODULES} - {"", "__init__", "__main__", "demo"}
    assert listed == set(MAY_IMPORT)


def test_the_schema_imports_no_library_that_starts_slowly() -> None:
    schema = [module for module in MODULES if module.parts[0] == "config"]
    libraries = {name.split(".")[0] for module in schema for name in imported(TREES[module])}
    assert not libraries & {"torch", "lightning", "numpy"}


@pytest.mark.parametrize(
    ("part", "libraries"),
    [
        ("inference", {"lightning", "deepspeed", "numba"}),
        ("inference.predictor", {"lightning", "deepspeed", "numba"}),
        ("data.datamodule", {"numba", "SimpleITK"}),
        ("training.run", {"numba", "SimpleITK", "deepspeed"}),
        ("evaluation.run", {"SimpleITK", "deepspeed"}),
    ],
)
def test_a_part_starts_without_the_libraries_that_it_does_not_need(part: str, libraries: set[str]) -> None:
    program = f"import sys, segvol_pl.{part}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not libraries & set(done.stdout.split())


def test_data_knows_neither_the_trainer_nor_monai() -> None:
    data = [module for module in MODULES if module.parts[0] == "data" and module.name != "datamodule.py"]
    knows = [module for module in data if {name.split(".")[0] for name in imported(TREES[module])} & LIBRARIES]
    assert data and knows == []


def test_the_import_guard_sees_every_spelling() -> None:
    source = (
        "import segvol_pl.training.run\nfrom segvol_pl import demo\ndef f():\n  from segvol_pl.data import stream\n"
    )
    assert ours(ast.parse(source)) == {"training.run", "demo", "data.stream"}


# ---- functions and names ----


def test_no_function_is_long() -> None:
    lengths = {f"{module}:{each.name}": length(each) for module in MODULES for each in functions(TREES[module])}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def untyped(function: Function) -> list[str]:
    """The arguments without annotation, and `return`; `self` and `cls` need none."""
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    missing = [arg.arg for arg in every if arg and not arg.annotation and arg.arg not in ("self", "cls")]
    return missing + ([] if function.returns else ["return"])


def test_every_signature_is_typed() -> None:
    found = {f"{module}:{each.name}": untyped(each) for module in MODULES for each in functions(TREES[module])}
    assert {name: missing for name, missing in found.items() if missing} == {}
    (bad,) = functions(ast.parse("def f(self, a: int, b, *c, d=1, **e): ..."))
    assert untyped(bad) == ["b", "d", "c", "e", "return"]


def test_modules_have_telling_names_and_docstrings() -> None:
    assert [module for module in MODULES if FORBIDDEN_NAMES & set(module.with_suffix("").parts)] == []
    # An empty __init__.py only marks a package.
    assert [module for module in MODULES if TREES[module].body and not ast.get_docstring(TREES[module])] == []


def calls(tree: ast.Module) -> Iterator[str]:
    """`print` of print(...), `.cuda` of anything.cuda(...)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield f".{node.func.attr}"


def test_only_the_command_line_prints_and_nobody_pins_a_device() -> None:
    assert [module for module in MODULES if ".cuda" in calls(TREES[module])] == []
    printing = [module for module in MODULES if "print" in calls(TREES[module])]
    assert printing == [Path("__main__.py")]


# ---- the repository ----


def tracked() -> list[Path]:
    """Files of the repository, those about to be added included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_test_module_imports_another() -> None:
    """What several of them need lies in a module of its own: tiny models and configurations in factories.py."""
    paths = list((ROOT / "tests").rglob("*.py"))
    modules = {path.stem for path in paths if path.name.startswith("test_")}
    imports = {path: {name.split(".")[0] for name in imported(ast.parse(path.read_text("utf-8")))} for path in paths}
    assert {path.name: sorted(names & modules) for path, names in imports.items() if names & modules} == {}
    assert "factories" in set().union(*imports.values())


MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:work|root|home|Users|scratch|mnt)/")


def test_no_file_names_a_place_on_one_machine() -> None:
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content and MACHINE_PATH.search(content.decode("utf-8", errors="replace")):
            found.append(str(path.relative_to(ROOT)))
    assert found == []
    assert MACHINE_PATH.search("see " + "/".join(["", "work", "main"])) and not MACHINE_PATH.search("a.org/home/x")


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").iterdir()), ids=lambda path: path.name)
def test_cluster_scripts_are_sound_shell(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
