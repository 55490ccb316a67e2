"""The files of `segvol-pl paper`: a claim of the paper, and the size at which it is tried.

1. `read_size` reads what all claims share at one size: data, seeds, configuration files, and runs and evaluations that
   several claims use.
2. `read_claim` reads a claim: the sentence, the figures that the paper gives, which runs and evaluations give ours, and
   which figure should be larger than which. Its section named after the size adds what differs between sizes.
3. Every text keeps its line, so that the error for a wrong key names file and line, as for a grid.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.config import COMBINATIONS, Mode, PaperConfig, loader, named_parts
from segvol_pl.config.loader import Written, did_you_mean
from segvol_pl.config.yaml_nodes import convert
from segvol_pl.errors import ConfigError
from segvol_pl.experiments.grid import line_of, mapped, pair_of, relative, texts
from segvol_pl.resources import bundled

FOLDER = "paper"
"""Folder of the claims in configs/; that of the sizes is `SIZES` in it."""
SIZES = "sizes"
COMMANDS = {"runs": "train", "evaluations": "evaluate"}
"""Key of a claim -> the command whose settings it holds."""
STAGES = ("phantoms", "pack", "pretrain", "train", "evaluate")
SIZE_KEYS = {
    "about": "Text for the page: on what data, and what the figures can show.",
    "seeds": "List of seeds, all different. Each run is trained once per seed.",
    "data_sets": "Name -> list of KEY=VALUE of `segvol-pl phantoms`. Each becomes the data set {shards}/NAME.",
    "set": "List of KEY=VALUE for pre-training and training. {shards}, {out} and {seed} are replaced in every list.",
    **{stage: f"`files` and `set` of `segvol-pl {stage}`, as in a grid." for stage in STAGES},
    "runs": "Name -> list of KEY=VALUE of `segvol-pl train`. Each run is trained once per seed.",
    "evaluations": "Name -> list of KEY=VALUE of `segvol-pl evaluate`.",
}
PART_KEYS = {
    "runs": SIZE_KEYS["runs"],
    "evaluations": SIZE_KEYS["evaluations"],
    "categories": "List of the categories that the figures are means over. Default: all that were evaluated.",
}
CLAIM_KEYS = {
    "claim": "The claim in one sentence.",
    "source": "Table or figure of the paper.",
    "about": "What the reader must know to judge it.",
    "figures": "Name -> what is measured: run, evaluation, prompt, mode, box, points, of; paper: the paper's figure.",
    "expect": "List of `A > B` or `A > B > C`: figures by name, or numbers. All must hold.",
    **PART_KEYS,
}
RECIPE_KEYS = {"files": "Configuration files, relative to this file.", "set": "List of KEY=VALUE."}
MEASURES = ("dice", "zoom_out", "seconds", "first")
"""dice: mean Dice. zoom_out: that of the coarse mask. seconds: mean time of a prompt. first: share of the masks that
are most similar to their own category."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
"""Names of runs, evaluations and data sets, which become names of folders."""
NUMBER = re.compile(r"[-+]?\d*\.?\d+")
HELP = "\n".join(
    [
        f"Keys of a claim (configs/{FOLDER}/*.yaml):",
        *(f"  {key}\n      {text}" for key, text in CLAIM_KEYS.items()),
        f"  tiny, full\n      {', '.join(PART_KEYS)} of one size; they replace those above.",
        f"Keys of a size (configs/{FOLDER}/{SIZES}/*.yaml):",
        *(f"  {key}\n      {text}" for key, text in SIZE_KEYS.items()),
    ]
)

Pairs = dict[str, list[Written]]
"""Name -> KEY=VALUE."""


@dataclass(frozen=True)
class Recipe:
    """Configuration files and settings of one command."""

    files: list[Written] = field(default_factory=list)
    set: list[Written] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    """What all claims share at one size."""

    path: Path
    about: str
    seeds: list[int]
    data_sets: Pairs
    set: list[Written]
    stages: dict[str, Recipe]
    """By command, see `STAGES`."""
    runs: Pairs
    evaluations: Pairs

    @property
    def name(self) -> str:
        """Name of the size, and of the section of a claim that belongs to it."""
        return self.path.stem


@dataclass(frozen=True)
class Figure:
    """One figure: where ours comes from, and the paper's."""

    name: str
    run: str
    evaluation: str
    prompt: str = ""
    mode: str = Mode.zoom.value
    box: str = ""
    points: str = ""
    of: str = MEASURES[0]
    paper: float | None = None
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Expectation:
    """`larger` should exceed `smaller`: each the name of a figure, or a number."""

    larger: str
    smaller: str

    def __str__(self) -> str:
        return f"{self.larger} > {self.smaller}"


@dataclass(frozen=True)
class Claim:
    """One claim at one size."""

    path: Path
    claim: str
    source: str
    about: str
    figures: dict[str, Figure]
    expect: list[Expectation]
    runs: Pairs
    evaluations: Pairs
    categories: list[str]

    @property
    def name(self) -> str:
        """Name of the claim."""
        return self.path.stem


# ---- finding the files ----


def size_path(size: str) -> Path:
    """Return the file of a size, by its name or its path. Raises ConfigError for an unknown name."""
    return _found("size", size, bundled("configs") / FOLDER / SIZES)


def claim_paths(claims: Sequence[str]) -> list[Path]:
    """Return the files of claims, named or as paths; all if none is given. Raises ConfigError for an unknown name."""
    folder = bundled("configs") / FOLDER
    return [_found("claims", claim, folder) for claim in claims] or sorted(folder.glob("*.yaml"))


def _found(key: str, name: str, folder: Path) -> Path:
    if name.endswith(loader.SECTION_FILE):
        return Path(name)
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        hint = did_you_mean(name, known).removesuffix(": --help lists the keys")
        raise ConfigError(f"{key}: no {name!r}{hint or ': there are ' + ', '.join(known)}, or give a YAML file", key)
    return known[name]


# ---- a size ----


def read_size(path: Path) -> Size:
    """Read the file of a size. Raises ConfigError, naming file and line."""
    nodes = mapped(path, loader.read_nodes(path), SIZE_KEYS)
    _require(path, nodes, "seeds", "evaluate", "train")
    seeds = _value(path, nodes, "seeds", list[int])
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds ({line_of(path, nodes['seeds'])}): {SIZE_KEYS['seeds']} Got {seeds}")
    return Size(
        path=path,
        about=_value(path, nodes, "about", str, ""),
        seeds=seeds,
        data_sets=_named_pairs(path, nodes, "data_sets", "phantoms"),
        set=[pair_of(path, "pretrain", written) for written in texts(path, nodes, "set")],
        stages={stage: _recipe(path, stage, nodes[stage]) for stage in STAGES if stage in nodes},
        runs=_named_pairs(path, nodes, "runs", "train"),
        evaluations=_named_pairs(path, nodes, "evaluations", "evaluate"),
    )


def _recipe(path: Path, stage: str, node: yaml.Node) -> Recipe:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{stage} ({line_of(path, node)}): {SIZE_KEYS[stage]}")
    nodes = mapped(path, node, RECIPE_KEYS)
    return Recipe(
        [relative(path, written) for written in texts(path, nodes, "files")],
        [pair_of(path, stage, written) for written in texts(path, nodes, "set")],
    )


def _named_pairs(path: Path, nodes: Mapping[str, yaml.Node], key: str, command: str) -> Pairs:
    """Name -> list of KEY=VALUE."""
    if key not in nodes:
        return {}
    node = nodes[key]
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{key} ({line_of(path, node)}): {SIZE_KEYS[key]}")
    lists = mapped(path, node)
    for name in lists:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{key}.{name} ({line_of(path, lists[name])}): use letters, digits, `.`, `+` and `-`")
    return {name: [pair_of(path, command, written) for written in texts(path, lists, name)] for name in lists}


# ---- a claim ----


def read_claim(path: Path, size: Size) -> Claim:
    """Read the file of a claim, with its section for the size. Raises ConfigError, naming file and line."""
    known = {**CLAIM_KEYS, **{path.stem: "" for path in size_path("tiny").parent.glob("*.yaml")}, size.name: ""}
    nodes = mapped(path, loader.read_nodes(path), known)
    _require(path, nodes, "claim", "source", "figures", "expect")
    section = nodes.get(size.name)
    part = mapped(path, section, PART_KEYS) if isinstance(section, yaml.MappingNode) else {}
    runs, evaluations = (
        {**_named_pairs(path, nodes, key, command), **_named_pairs(path, part, key, command)}
        for key, command in COMMANDS.items()
    )
    found = Claim(
        path=path,
        claim=_value(path, nodes, "claim", str),
        source=_value(path, nodes, "source", str),
        about=_value(path, nodes, "about", str, ""),
        figures=_figures(path, nodes["figures"]),
        expect=_expectations(path, nodes["expect"]),
        runs=_joined(size.runs, runs),
        evaluations=_joined(size.evaluations, evaluations),
        categories=_value(path, {**nodes, **part}, "categories", list[str], []),
    )
    _check(found, nodes["expect"])
    return found


def merged(parts: Iterable[Pairs]) -> Pairs:
    """Put the runs, or the evaluations, of several claims together. Raises ConfigError as `_joined` does."""
    return functools.reduce(_joined, parts, {})


def _joined(first: Pairs, second: Pairs) -> Pairs:
    """Put two together. Raises ConfigError if a name stands for different settings in them."""
    for name, pairs in second.items():
        if name in first and first[name] != pairs:
            places = [given[0].origin if given else "without settings" for given in (first[name], pairs)]
            raise ConfigError(f"{name}: has one meaning at {places[0]} and another at {places[1]}: rename one")
    return {**first, **second}


def _figures(path: Path, node: yaml.Node) -> dict[str, Figure]:
    if not isinstance(node, yaml.MappingNode) or not node.value:
        raise ConfigError(f"figures ({line_of(path, node)}): {CLAIM_KEYS['figures']}")
    return {name: _figure(path, name, inner) for name, inner in mapped(path, node).items()}


def _figure(path: Path, name: str, node: yaml.Node) -> Figure:
    origin = line_of(path, node)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"figures.{name} ({origin}): {CLAIM_KEYS['figures']}")
    known = {each.name: "" for each in fields(Figure) if each.name not in ("name", "origin")}
    nodes = mapped(path, node, known)
    _require(path, nodes, "run", "evaluation", where=f"figures.{name} ({origin})")
    values: dict[str, Any] = {key: _value(path, nodes, key, str) for key in nodes if key != "paper"}
    if "paper" in nodes:
        values["paper"] = _value(path, nodes, "paper", float)
    figure = Figure(name=name, origin=origin, **values)
    for key, holds in (
        ("of", figure.of in MEASURES),
        ("mode", figure.mode in {mode.value for mode in Mode}),
        ("prompt", figure.prompt in COMBINATIONS or (figure.of == "first" and not figure.prompt)),
    ):
        if not holds:
            known_values = {"of": MEASURES, "mode": [mode.value for mode in Mode], "prompt": COMBINATIONS}[key]
            raise ConfigError(
                f"figures.{name}.{key} ({origin}): {getattr(figure, key)!r} is none of {', '.join(known_values)}"
            )
    return _with_sources(figure)


def _with_sources(figure: Figure) -> Figure:
    """Fill in the usual sources of box and points."""
    parts = named_parts(figure.prompt)
    usual = {"box": "exact", "points": "random5"}
    values = {part: getattr(figure, part) or usual[part] for part in usual if part in parts}
    return Figure(**{**vars(figure), **values})


def _expectations(path: Path, node: yaml.Node) -> list[Expectation]:
    found = []
    for written in texts(path, {"expect": node}, "expect"):
        names = [part.strip() for part in written.split(">")]
        if len(names) < 2 or not all(names):
            raise ConfigError(f"{written} ({written.origin}): is not `A > B`")
        found += [Expectation(*pair) for pair in itertools.pairwise(names)]
    if not found:
        raise ConfigError(f"expect ({line_of(path, node)}): {CLAIM_KEYS['expect']}")
    return found


def as_number(name: str) -> float:
    """Return the number that an expectation names; NaN if it is the name of a figure."""
    return float(name) if NUMBER.fullmatch(name) else math.nan


def _check(claim: Claim, node: yaml.Node) -> None:
    """Raise ConfigError for a figure, run or evaluation that is not there."""
    for each in claim.expect:
        for name in (each.larger, each.smaller):
            if name not in claim.figures and math.isnan(as_number(name)):
                hint = did_you_mean(name, claim.figures).replace("--help lists the keys", "see figures")
                raise ConfigError(f"expect ({line_of(claim.path, node)}): no figure {name!r}{hint}")
    for figure in claim.figures.values():
        for what, known in (("run", claim.runs), ("evaluation", claim.evaluations)):
            if (name := getattr(figure, what)) not in known:
                raise ConfigError(
                    f"figures.{figure.name} ({figure.origin}): no {what} {name!r} at this size; there are "
                    + ", ".join(known)
                )


# ---- values ----


def _require(path: Path, nodes: Mapping[str, yaml.Node], *keys: str, where: str = "") -> None:
    if missing := [key for key in keys if key not in nodes]:
        raise ConfigError(f"{where or path}: lacks {', '.join(missing)}")


def _value(path: Path, nodes: Mapping[str, yaml.Node], key: str, kind: Any, *default: Any) -> Any:
    """Convert the value of a key; without the key, return the default."""
    if key not in nodes and default:
        return default[0]
    try:
        return convert(nodes[key], kind)
    except (ValueError, OverflowError, yaml.YAMLError):
        help = {**SIZE_KEYS, **CLAIM_KEYS}.get(key, f"must be a {'number' if kind is float else 'text'}")
        raise ConfigError(f"{key} ({line_of(path, nodes[key])}): {help}") from None


def read_all(config: PaperConfig) -> tuple[Size, list[Claim]]:
    """Read the size and the claims of a configuration. Raises ConfigError."""
    size = read_size(size_path(config.size))
    claims = [read_claim(path, size) for path in claim_paths(config.claims)]
    names = [claim.name for claim in claims]
    if len(set(names)) < len(names):
        raise ConfigError(f"claims: two files are called {max(names, key=names.count)}: rename one", "claims")
    return size, claims
