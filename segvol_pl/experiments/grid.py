"""A grid: one YAML file that describes many runs, which are numbered and have stable names.

1. `read` parses the file and keeps the line of each setting.
2. `expand` crosses the axes (those under `zip` step together) and the seeds, seeds fastest, and names each run by its
   places on them: `size-s_fraction-0.5_seed-1`. Adding a value later changes numbers, never names.
3. Each run is a command line of `train` or `pretrain`. All are checked before anything runs: the error for a wrong key
   names file and line.
4. With `lengths`, every setting is a run of the longest length, the trunk, and branches of the others, each from the
   trunk's checkpoint of the step where its own decay begins. Branches are numbered after all trunks.
5. `launch` runs them, shows their state, and writes the sweep for wandb.

Imports neither torch nor lightning at its start: a wrong key must fail at once.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.config import Schedule, TrainConfig, loader
from segvol_pl.config.loader import PAIR, SECTION_FILE, Written, did_you_mean
from segvol_pl.config.yaml_nodes import convert
from segvol_pl.errors import ConfigError
from segvol_pl.planning import flops

KEYS = {
    "command": "pretrain or train (default train).",
    "files": "Configuration files for the command, relative to this file.",
    "set": "List of KEY=VALUE for every run. {AXIS} and {seed} in a value stand for the run's place on that axis.",
    "out": "Folder for the run folders, relative to the current folder (default runs/NAME-OF-THE-FILE).",
    "seeds": "List of values for data.seed, all different (default [0]).",
    "axes": "What varies. A key of the command: a list of values. Another name: named points, lists of KEY=VALUE.",
    "zip": "Lists of axes that step together instead of being crossed.",
    "flops": "List of budgets in training FLOPs: one more axis. optim.max_steps follows from the FLOPs of one step.",
    "lengths": "List of different numbers of steps: one more axis. Each setting trains the longest, its trunk; the "
    "others branch from checkpoints of that, and only decay. Needs optim.schedule=wsd.",
}
COMMANDS = ("pretrain", "train")
HELP = "Keys of FILE:\n" + "\n".join(f"  {key}\n      {text}" for key, text in KEYS.items())
SEED, BUDGET, LENGTH = "seed", "flops", "length"
"""Names of the axes that are not configuration keys."""
DECIDED = ("run.out", "data.seed")
"""Keys that the grid sets itself."""
BY_LENGTH = ("optim.max_steps", "run.keep_steps", "run.branch_from")
"""Keys that `lengths` sets."""
UNSAFE = re.compile(r"[^A-Za-z0-9.+]+")
"""Characters not allowed in the name of a run, where `-` and `_` separate its places."""


@dataclass(frozen=True)
class Point:
    """One place on an axis."""

    label: str
    pairs: list[Written]


Axes = dict[str, list[Point]]
Place = dict[str, Point]
"""Axis -> the point that a run stands at."""


@dataclass(frozen=True)
class Grid:
    """A parsed grid file."""

    path: Path
    out: Path
    command: str = "train"
    files: list[Written] = field(default_factory=list)
    set: list[Written] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    axes: Axes = field(default_factory=dict)
    zip: list[list[str]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the runs' group at wandb."""
        return self.path.stem


@dataclass(frozen=True)
class Run:
    """One run of a grid: `segvol-pl COMMAND *arguments`."""

    number: int
    name: str
    command: str
    out: Path
    places: dict[str, str]
    """Axis (including `seed`) -> label."""
    arguments: list[str]
    config: Any = field(compare=False, repr=False)
    place: Place = field(default_factory=dict, compare=False, repr=False)
    trunk: Run | None = field(default=None, compare=False, repr=False)
    """The run that this one branches from."""


# ---- the file ----


def read(path: Path, out: str | None = None) -> Grid:
    """Read a grid file. `out` replaces the file's own. Raises ConfigError, naming file and line."""
    nodes = mapped(path, loader.read_nodes(path), KEYS)
    grid = _typed(path, {name: node for name, node in nodes.items() if name not in ("axes", "files", "set")}, out)
    parts = {
        "files": [relative(path, written) for written in texts(path, nodes, "files")],
        "set": [pair_of(path, grid.command, written) for written in texts(path, nodes, "set")],
        "axes": _axes(path, grid.command, nodes["axes"]) if "axes" in nodes else {},
    }
    grid = Grid(**{**vars(grid), **parts})
    _check_zips(grid)
    _check_lengths(grid)
    return grid


def mapped(path: Path, node: yaml.MappingNode, known: Mapping[str, str] | None = None) -> dict[str, yaml.Node]:
    """Return the keys of a mapping with their nodes. Raises ConfigError for a key not in `known`, or given twice."""
    nodes: dict[str, yaml.Node] = {}
    for name, value in node.value:
        if known is not None and name.value not in known:
            raise ConfigError(f"unknown key {name.value} ({line_of(path, name)}){did_you_mean(name.value, known)}")
        if name.value in nodes:
            raise ConfigError(f"{name.value} ({line_of(path, name)}): is given twice: remove one")
        nodes[name.value] = value
    return nodes


def line_of(path: Path, node: yaml.Node) -> str:
    """Name the place of a node, `FILE:LINE`."""
    return f"{path}:{node.start_mark.line + 1}"


def _typed(path: Path, nodes: dict[str, yaml.Node], out: str | None) -> Grid:
    """Convert the keys that are plain values."""
    values: dict[str, Any] = {"out": str(Path("runs") / path.stem)}
    wanted = {"command": str, "out": str, "seeds": list[int], "zip": list[list[str]], "flops": list[float]}
    wanted["lengths"] = list[int]
    for key, node in nodes.items():
        try:
            values[key] = convert(node, wanted[key])
        except (ValueError, OverflowError, yaml.YAMLError):
            raise ConfigError(f"{key} ({line_of(path, node)}): {KEYS[key]}") from None
    for key, holds in (
        ("command", values.get("command", "train") in COMMANDS),
        ("seeds", len(set(values.get("seeds", [0]))) == len(values.get("seeds", [0])) > 0),
        ("flops", all(budget > 0 for budget in values.get("flops", []))),
        ("lengths", len(set(lengths := values.get("lengths", []))) == len(lengths) and min(lengths, default=1) > 0),
    ):
        if not holds:
            raise ConfigError(f"{key} ({line_of(path, nodes[key])}): {KEYS[key]} Got {values[key]}")
    if values.get("lengths") and values.get("flops"):
        where = line_of(path, nodes["lengths"])
        raise ConfigError(f"lengths ({where}): both lengths and flops set optim.max_steps: give only one of them")
    return Grid(**{**values, "path": path, "out": Path(out or values["out"])})


def texts(path: Path, nodes: Mapping[str, yaml.Node], key: str) -> list[Written]:
    """Read a text, or a list of them; empty if the key is not given. Raises ConfigError for anything else."""
    node = nodes.get(key)
    items = node.value if isinstance(node, yaml.SequenceNode) else [] if node is None else [node]
    if any(not isinstance(item, yaml.ScalarNode) for item in items):
        raise ConfigError(f"{key} ({line_of(path, nodes[key])}): {KEYS.get(key, 'is a list of KEY=VALUE')}")
    return [Written(item.value, line_of(path, item)) for item in items]


def relative(path: Path, written: Written) -> Written:
    """Resolve a file named in the grid relative to the grid file."""
    return Written(str(path.parent / written), written.origin)


def pair_of(path: Path, command: str, written: Written) -> Written:
    """Check KEY=VALUE. Section files are relative to the grid file. Raises ConfigError if malformed or reserved."""
    match = PAIR.fullmatch(written)
    if match is None:
        raise ConfigError(f"{written} ({written.origin}): is not KEY=VALUE")
    key, value = match.groups()
    if key in DECIDED:
        raise ConfigError(f"{key} ({written.origin}): the grid sets it: use its keys `seeds` and `out`")
    if value.endswith(SECTION_FILE) and loader.is_section(command, key):
        return Written(f"{key}={path.parent / value}", written.origin)
    return written


def _axes(path: Path, command: str, node: yaml.Node) -> Axes:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"axes ({line_of(path, node)}): {KEYS['axes']}")
    axes: Axes = {}
    for name, points in node.value:
        axis = name.value
        if axis in (SEED, BUDGET, *axes):
            why = "is given twice" if axis in axes else "has a key of its own next to `axes`"
            raise ConfigError(f"axes.{axis} ({line_of(path, name)}): {why}")
        axes[axis] = _points(path, command, axis, points)
        labels = [point.label for point in axes[axis]]
        if len(set(labels)) < max(1, len(labels)):
            why = f"two points are called {max(labels, key=labels.count)}: name them" if labels else "has no points"
            raise ConfigError(f"axes.{axis} ({line_of(path, name)}): {why}")
    return axes


def _points(path: Path, command: str, axis: str, node: yaml.Node) -> list[Point]:
    """`key: [value, ...]`, or `name: {point: [KEY=VALUE, ...], ...}`."""
    if isinstance(node, yaml.SequenceNode):
        values = [(item, _flow(item)) for item in node.value]
        return [
            Point(_label(text), [pair_of(path, command, Written(f"{axis}={text}", line_of(path, item)))])
            for item, text in values
        ]
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"axes.{axis} ({line_of(path, node)}): {KEYS['axes']}")
    return [
        Point(
            _label(name.value),
            [pair_of(path, command, written) for written in texts(path, {name.value: pairs}, name.value)],
        )
        for name, pairs in node.value
    ]


def _flow(node: yaml.Node) -> str:
    """The value as written behind `key=`."""
    if not isinstance(node, yaml.CollectionNode):
        return str(node.value)
    node.flow_style = True
    return yaml.serialize(node, width=math.inf).strip()


def _label(text: str) -> str:
    """Turn a value into a part of a run's name."""
    return UNSAFE.sub("-", text).strip("-") or "none"


def _check_zips(grid: Grid) -> None:
    zipped = [axis for group in grid.zip for axis in group]
    for axis in zipped:
        if axis not in grid.axes or zipped.count(axis) > 1:
            why = "is in two lists" if axis in grid.axes else f"is not an axis{did_you_mean(axis, grid.axes)}"
            raise ConfigError(f"zip ({grid.path}): {axis} {why}")
    for group in grid.zip:
        lengths = {axis: len(grid.axes[axis]) for axis in group}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"zip ({grid.path}): axes that step together need as many points each, got {lengths}")


def _check_lengths(grid: Grid) -> None:
    """Raise ConfigError if something else sets what `lengths` sets."""
    if not grid.lengths:
        return
    if LENGTH in grid.axes:
        raise ConfigError(f"axes.{LENGTH} ({grid.path}): `lengths` is an axis of this name: choose another one")
    for pair in (*grid.set, *(pair for points in grid.axes.values() for point in points for pair in point.pairs)):
        if _key(pair) in BY_LENGTH:
            raise ConfigError(f"{_key(pair)} ({pair.origin}): the grid's key `lengths` sets it: remove it")


# ---- the runs ----


def expand(grid: Grid, given: Sequence[str] = ()) -> list[Run]:
    """Make all runs of a grid, in order.

    Args:
        grid: The parsed file.
        given: KEY=VALUE of the command line, for every run; overrides `set`.

    Raises:
        ConfigError: A run's configuration is invalid; names the file and line of the cause.
    """
    decided = dict.fromkeys(DECIDED, "the grid sets it: use out=DIR and `seeds`")
    varied = {_key(pair) for points in grid.axes.values() for point in points for pair in point.pairs}
    refused = {**dict.fromkeys(varied, "varies in the grid"), **decided}
    refused |= dict.fromkeys(BY_LENGTH if grid.lengths else (), "the grid's key `lengths` sets it")
    for pair in given:
        if _key(pair) in refused:
            raise ConfigError(f"{_key(pair)} (command line): {refused[_key(pair)]}", _key(pair))
    places = enumerate(_places(grid))
    runs = [(_trunk if grid.lengths else _run)(grid, number, place, seed, given) for number, (place, seed) in places]
    runs += [
        _branch(grid, len(runs) + number, trunk, length, given)
        for number, (trunk, length) in enumerate(itertools.product(runs, sorted(grid.lengths)[:-1]))
    ]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{grid.path}: two runs are called {max(names, key=names.count)}: give their points different names"
        )
    return runs


def _key(pair: str) -> str:
    match = PAIR.fullmatch(pair)
    if match is None:
        raise ConfigError(f"{pair}: is not KEY=VALUE")
    return match[1]


def _places(grid: Grid) -> Iterator[tuple[Place, int]]:
    """Yield every combination of the axes with every seed, seeds fastest."""
    leader = {axis: group[0] for group in grid.zip for axis in group}
    groups = [[axis for axis in grid.axes if leader.get(axis, axis) == first] for first in grid.axes]
    steps = [
        [dict(zip(group, points, strict=True)) for points in zip(*(grid.axes[axis] for axis in group), strict=True)]
        for group in groups
        if group
    ]
    if grid.flops:
        steps.append([{BUDGET: Point(f"{budget:g}", [])} for budget in grid.flops])
    for parts in itertools.product(*steps):
        for seed in grid.seeds:
            yield {axis: point for part in parts for axis, point in part.items()}, seed


def _run(grid: Grid, number: int, place: Place, seed: int, given: Sequence[str], more: Sequence[str] = ()) -> Run:
    """more: KEY=VALUE that follow from the place."""
    labels = {**{axis: point.label for axis, point in place.items()}, SEED: str(seed)}
    name = "_".join(f"{_short(axis, grid.axes)}-{label}" for axis, label in labels.items())
    pairs = [*grid.set, *(pair for point in place.values() for pair in point.pairs)]
    out = grid.out / name
    tracked = [f"track.group={grid.name}", f"track.name={name}"]
    arguments: list[str] = [*grid.files, *tracked, *(_filled(pair, labels) for pair in pairs), *given]
    arguments += [f"data.seed={seed}", f"run.out={out}", *more]
    if BUDGET in place:
        arguments.append(_steps(grid, arguments, float(labels[BUDGET])))
    return Run(number, name, grid.command, out, labels, arguments, loader.load(grid.command, arguments), place=place)


def _short(axis: str, axes: Axes) -> str:
    """The last part of a key, unless another axis has the same last part."""
    leaf = axis.rpartition(".")[2]
    return _label(axis if [other.rpartition(".")[2] for other in axes].count(leaf) > 1 else leaf)


def _filled(pair: Written, labels: dict[str, str]) -> Written:
    """Replace `{axis}` by the label. Other braces belong to the value, as those of a reference `${key}`."""
    return Written(re.sub(r"(?<!\$)\{([\w.]+)\}", lambda match: labels.get(match[1], match[0]), pair), pair.origin)


# ---- lengths ----


def _trunk(grid: Grid, number: int, place: Place, seed: int, given: Sequence[str]) -> Run:
    """The run of the longest length, which keeps the checkpoints that the others branch from."""
    *shorter, longest = sorted(grid.lengths)
    place = place | _length(grid, longest)
    run = _run(grid, number, place, seed, given)
    optim = run.config.optim
    if optim.schedule is not Schedule.wsd:
        raise ConfigError(
            f"lengths ({grid.path}): need optim.schedule=wsd, {run.name} has {optim.schedule.value}: add it to `set`"
        )
    every = run.config.run.val_every
    if unvalidated := [length for length in grid.lengths if every and length % every]:
        raise ConfigError(
            f"lengths ({grid.path}): {unvalidated[0]} is no multiple of run.val_every={every}, so its end would not be "
            "validated: set run.val_every=0 (only at the end) or a divisor"
        )
    begins = sorted({replace(optim, max_steps=length).decay_start for length in shorter})
    return _run(grid, number, place, seed, given, [f"run.keep_steps={begins}"])


def _branch(grid: Grid, number: int, trunk: Run, length: int, given: Sequence[str]) -> Run:
    """The run of a shorter length: from the trunk's checkpoint of the step where its decay begins."""
    begins = replace(trunk.config.optim, max_steps=length).decay_start
    place, seed = trunk.place | _length(grid, length), trunk.config.data.seed
    start = f"run.branch_from={trunk.out / 'checkpoints' / f'step-{begins}.ckpt'}"
    return replace(_run(grid, number, place, seed, given, [start]), trunk=trunk)


def _length(grid: Grid, steps: int) -> Place:
    return {LENGTH: Point(str(steps), [Written(f"optim.max_steps={steps}", str(grid.path))])}


# ---- budgets of compute ----


def _steps(grid: Grid, arguments: Sequence[str], budget: float) -> Written:
    """`optim.max_steps` that spends the budget. Raises ConfigError if the warm-up would be longer."""
    # Of any length that every schedule has room for.
    config = loader.load(grid.command, [*arguments, f"optim.max_steps={10**9}"])
    step = config.data.global_batch * volume_flops(config)
    steps = round(budget / step)
    if steps <= config.optim.warmup_steps:
        raise ConfigError(
            f"flops ({grid.path}): {budget:.3g} buys {steps} steps of {config.run.out}, optim.warmup_steps is "
            f"{config.optim.warmup_steps}: raise the budget or shorten the warm-up"
        )
    return Written(f"optim.max_steps={steps}", str(grid.path))


def volume_flops(config: Any) -> int:
    """Return the training FLOPs of one volume, forward and backward."""
    return flops.total(flops.volume_work(config)).total


def parameters(config: Any) -> int:
    """Return the number of parameters that a run trains."""
    if isinstance(config, TrainConfig) and config.freeze:
        return _unfrozen(config)
    return sum(flops.trained_parameters(config).values())


def _unfrozen(config: TrainConfig) -> int:
    # `freeze` holds names of tensors, which only the model knows: torch is imported for such runs alone.
    import torch

    from segvol_pl.model.segvol import SegVol
    from segvol_pl.model.text_encoder import TextBank

    with torch.device("meta"):
        model = SegVol(config.model, TextBank.empty(config.model.text_dim))
    named = dict(model.named_parameters())
    patterns = [*config.freeze, *(["image_encoder.*"] if config.adapted else [])]
    frozen = {name for pattern in patterns for name in fnmatch.filter(named, pattern)}
    kept = sum(tensor.numel() for name, tensor in named.items() if name not in frozen)
    return kept + flops.adapter_parameters(config)
