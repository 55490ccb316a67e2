"""The command line: `segvol-pl VERB ...`, or `python -m segvol_pl VERB ...`.

1. The verb is looked up; its arguments are read and checked. Nothing heavy is imported until they are right.
2. The verb's function is imported and called.
3. An error becomes one line on stderr and an exit status: 0 done, 1 failed, 2 used wrongly, 130 interrupted.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from segvol_pl import __version__
from segvol_pl.config import MISSING, SCHEMAS, Range, loader
from segvol_pl.config.loader import imported
from segvol_pl.credentials import masked
from segvol_pl.errors import FAILED, MISUSED, ConfigError, SegVolError
from segvol_pl.launched import rank_named

PROGRAM = "segvol-pl"
DONE, INTERRUPTED = 0, 130
CARRIED = re.compile(r"Caught \w+ in (?:DataLoader worker|pin memory).*\n[\w.]+: (.*)", re.DOTALL)
"""What torch makes of an error in a loader process: its whole traceback, whose last line tells what went wrong."""
SMALLER = (
    "training takes less with run.recompute=blocks or a higher run.accumulate, predicting with zoom.batch=1 and "
    "zoom.decode_batch=1"
)
TOLD = 200
"""Characters of torch's account of a GPU's memory."""
FLAGS = {"--help", "-h", "--debug", "--version"}


class Verb(NamedTuple):
    """What one verb takes and which function does it."""

    usage: str
    summary: str
    call: Callable[[list[str]], int]
    details: str = ""
    """`module:text` of what its help says beside."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program on `arguments` (default: the process's) and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    flags = {argument for argument in given if argument in FLAGS}
    words = [argument for argument in given if argument not in FLAGS]
    _set_up_logging("--debug" in flags)
    try:
        status = _dispatch(words, flags)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _complain(words, "interrupted", INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return DONE
        if "--debug" in flags:
            print(masked(traceback.format_exc()), end="", file=sys.stderr)
        status = error.status if isinstance(error, SegVolError) else FAILED
        return _complain(words, f"error: {_explain(error)}", status)


def _nobody_reads() -> bool:
    """Whether stdout was closed by its reader, as `head` does; what is left unwritten then goes nowhere."""
    closed = select.poll()
    closed.register(sys.stdout.fileno(), 0)
    if not closed.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _dispatch(words: list[str], flags: set[str]) -> int:
    if "--version" in flags:
        print(f"{PROGRAM} {__version__}")
        return DONE
    if not words:
        print(_program_help(), file=sys.stdout if flags & {"--help", "-h"} else sys.stderr)
        return DONE if flags & {"--help", "-h"} else MISUSED
    verb = _verb(words[0])
    if flags & {"--help", "-h"}:
        print(_verb_help(words[0], verb))
        return DONE
    option = next((word for word in words[1:] if word.startswith("-")), None)
    if option is not None:
        raise ConfigError(f"no option {option}; options are --help, --debug, --version, and a key is set by key=value")
    return verb.call(words[1:])


def _verb(name: str) -> Verb:
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(VERBS)}"
        raise ConfigError(f"no verb {name}: {hint}")
    return VERBS[name]


def _set_up_logging(debug: bool) -> None:
    """All that goes well is said once, by rank 0; what does not, by the rank that met it."""
    rank = rank_named()
    told = f"{rank}: " if rank else ""
    logging.basicConfig(format=f"%(asctime)s {told}%(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    usual = logging.WARNING if rank else logging.INFO
    logging.getLogger("segvol_pl").setLevel(logging.DEBUG if debug else usual)


def _complain(words: list[str], message: str, status: int) -> int:
    verb = f"{PROGRAM} {words[0]}" if words and words[0] in VERBS else PROGRAM
    print(f"{verb}: {message}", file=sys.stderr)
    return status


def _explain(error: Exception) -> str:
    """One line. An error that is neither ours nor the system's is a fault of the program, and says where to look."""
    carried = CARRIED.fullmatch(str(error))
    text = masked(" ".join((carried[1] if carried else str(error)).split()))
    if isinstance(error, (SegVolError, OSError)):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return f"out of memory{': ' * bool(text)}{text[:TOLD]}: {SMALLER}"
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


# ---- what the verbs do ----


def _configured(name: str, target: str, console: bool = False) -> Verb:
    """A verb whose function takes the configuration that `SCHEMAS[name]` describes, and maybe a console to print to."""

    def call(arguments: list[str]) -> int:
        config = loader.load(name, arguments)
        imported(target)(config, *([imported("rich.console:Console")()] if console else []))
        return DONE

    return Verb("[FILE.yaml ...] [KEY=VALUE ...]", str(SCHEMAS[name].__doc__), call)


def _take(arguments: list[str], *names: str) -> list[str]:
    """The arguments, exactly as many as names. Raises ConfigError otherwise."""
    if len(arguments) != len(names):
        raise ConfigError(f"takes {' '.join(names)}, got {' '.join(arguments) or 'nothing'}")
    return arguments


def _init(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    print("\n".join(imported("segvol_pl.resources:lay_out")(Path(folder))))
    return DONE


def _index(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    imported("segvol_pl.data.shards:build_index")(folder)
    return DONE


def _verify(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    faults: list[str] = imported("segvol_pl.data.shards:verify")(folder)
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{folder}: sound")
    return FAILED if faults else DONE


def _inspect(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    rows: list[dict[str, Any]] = imported("segvol_pl.data.shards:describe")(folder)
    print(_table(rows) if rows else f"{masked(folder)}: no samples")
    return DONE


def _overlap(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError("takes DIR ...")
    groups = imported("segvol_pl.packing.duplicates:find_duplicates")(arguments)
    leaking = [group for group in groups if imported("segvol_pl.packing.duplicates:crosses_splits")(group)]
    for group in groups:
        copies = "  =  ".join(f"{copy.folder} {copy.key} ({copy.split})" for copy in group)
        print(f"{'in two splits: ' if group in leaking else ''}{copies}")
    print(f"{len(groups)} volumes occur more than once, {len(leaking)} of them in different splits")
    return FAILED if leaking else DONE


def _view(arguments: list[str]) -> int:
    files = [argument for argument in arguments if "=" not in argument and not argument.endswith((".yaml", ".yml"))]
    image = [f"image={_take(files, 'CT')[0]}"] if files else []
    config = loader.load("view", [*image, *(argument for argument in arguments if argument not in files)])
    imported("segvol_pl.inference.viewer:view")(config)
    return DONE


def _import(arguments: list[str]) -> int:
    files = [argument for argument in arguments if "=" not in argument]
    source, destination = _take(files, "SRC", "DST")
    keys = [argument for argument in arguments if argument not in files]
    config = loader.load("import", [f"source={source}", f"out={destination}", *keys])
    imported("segvol_pl.model.convert:import_weights")(config)
    return DONE


def _export(arguments: list[str]) -> int:
    source, destination = _take(arguments[:2], "SRC", "DST")
    published = _take(arguments[2:], "PUBLISHED")[0] if arguments[2:] else None
    imported("segvol_pl.model.convert:export")(source, destination, published)
    return DONE


def _grid(arguments: list[str]) -> int:
    files = [argument for argument in arguments if "=" not in argument]
    (file,) = _take(files, "FILE")
    keys = {name: value for name, _, value in (a.partition("=") for a in arguments) if name in ("run", "sweep", "out")}
    given = [a for a in arguments if a not in files and a.partition("=")[0] not in keys]
    grid = imported("segvol_pl.experiments.grid:read")(Path(file), keys.get("out"))
    runs = imported("segvol_pl.experiments.grid:expand")(grid, given)
    passed = [*given, f"out={keys['out']}"] if "out" in keys else given
    if "sweep" in keys:
        text = imported("segvol_pl.experiments.launch:sweep")(grid, runs, passed)
        imported("segvol_pl.atomic:write_text")(Path(keys["sweep"]), text)
    elif keys.get("run") == "all":
        imported("segvol_pl.experiments.launch:start_all")(grid, runs, passed)
    elif "run" in keys:
        run = _numbered(runs, keys["run"])
        imported("segvol_pl.experiments.launch:start")(
            run, imported(f"segvol_pl.training.run:{run.command}"), not rank_named()
        )
    else:
        print(_table(imported("segvol_pl.experiments.launch:describe")(runs)))
        print(imported("segvol_pl.experiments.launch:held_out")(runs))
    return DONE


def _numbered(runs: list[Any], number: str) -> Any:
    if not number.isdecimal() or int(number) >= len(runs):
        raise ConfigError(f"run={number}: is none of the runs 0 to {len(runs) - 1}, or all")
    return runs[int(number)]


def _scaling(arguments: list[str]) -> int:
    kinds = {"fit": "segvol_pl.experiments.fit:fit_runs", "compare": "segvol_pl.experiments.compare:compare_runs"}
    if not arguments or arguments[0] not in kinds:
        raise ConfigError(f"takes {' or '.join(kinds)}, then RUNS and KEY=VALUE")
    verb = f"scaling {arguments[0]}"
    given = [a for a in arguments[1:] if "=" in a or a.endswith((".yaml", ".yml"))]
    folders = [argument for argument in arguments[1:] if argument not in given]
    runs = [f"runs={json.dumps(folders)}"] if folders else []
    for line in imported(kinds[arguments[0]])(loader.load(verb, [*runs, *given])):
        print(line)
    return DONE


def _config(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError(f"takes VERB FILE...; VERB is one of {', '.join(SCHEMAS)}")
    print(loader.resolved(arguments[0], arguments[1:]), end="")
    return DONE


def _plan(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError("takes FILE.yaml ... [nodes=N] [gpus=N] [device=NAME] [KEY=VALUE ...]")
    made = imported("segvol_pl.planning.plan:plan")(arguments)
    print("\n".join(imported("segvol_pl.planning.plan:lines")(made)))
    return DONE


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


VERBS = {
    "demo": _configured("demo", "segvol_pl.demo:run"),
    "inventory": _configured("inventory", "segvol_pl.packing.inventory:inventory"),
    "pack": _configured("pack", "segvol_pl.packing.pack:pack", console=True),
    "index": Verb("DIR", "Write index.json anew from the shards in DIR.", _index),
    "verify": Verb("DIR", "Read every member of every shard in DIR and check its hash.", _verify),
    "inspect": Verb("DIR", "List the samples in the shards of DIR.", _inspect),
    "overlap": Verb("DIR ...", "List volumes that occur in several of the folders, or in two splits.", _overlap),
    "pretrain": _configured("pretrain", "segvol_pl.training.run:pretrain"),
    "train": _configured("train", "segvol_pl.training.run:train"),
    "plan": Verb(
        "FILE.yaml ... [nodes=N] [gpus=N] [device=NAME] [KEY=VALUE ...]",
        "State parameters, operations, memory by strategy, rates and hours of a training run, before it is launched.",
        _plan,
    ),
    "evaluate": _configured("evaluate", "segvol_pl.evaluation.run:evaluate", console=True),
    "predict": _configured("predict", "segvol_pl.inference.predictor:predict"),
    "view": Verb("CT [FILE.yaml ...] [KEY=VALUE ...]", str(SCHEMAS["view"].__doc__), _view),
    "import": Verb("SRC DST [KEY=VALUE ...]", str(SCHEMAS["import"].__doc__), _import),
    "export": Verb(
        "SRC DST [PUBLISHED]",
        "Write a model as .safetensors, or as the published code's .pth (PUBLISHED: where its text tower comes from).",
        _export,
    ),
    "grid": Verb(
        "FILE [run=K|all] [out=DIR] [sweep=FILE] [KEY=VALUE ...]",
        "List a grid's runs with their state; run=K runs one, run=all one after another, sweep=FILE writes a sweep.",
        _grid,
        "segvol_pl.experiments.grid:HELP",
    ),
    "scaling": Verb(
        "fit|compare RUNS ... [table=CSV] [KEY=VALUE ...]",
        "Fit scaling laws to runs, or compare the points of an axis of a grid by pairs.",
        _scaling,
    ),
    "init": Verb("DIR", "Lay out configs/, slurm/ and shards/datasets/ in DIR, to be edited.", _init),
    "config": Verb(
        "VERB [FILE.yaml ...] [KEY=VALUE ...]", "Print the resolved configuration of VERB as YAML.", _config
    ),
}


# ---- help ----


def _program_help() -> str:
    verbs = "\n".join(f"  {name:<10}{verb.summary}" for name, verb in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB ...\n\n{verbs}\n\n"
        f"{PROGRAM} VERB --help lists the keys of a verb. --debug shows where an error arose, --version the version."
    )


def _verb_help(name: str, verb: Verb) -> str:
    parts = [f"usage: {PROGRAM} {name} {verb.usage}", verb.summary]
    if verb.details:
        parts.append(imported(verb.details))
    # A verb of several kinds has a schema for each: `scaling fit`, `scaling compare`.
    for schema in (each for each in SCHEMAS if each == name or each.startswith(f"{name} ")):
        of = "" if schema == name else f" of {schema}"
        parts.append(f"Keys{of}, for YAML files and as KEY=VALUE; the rightmost wins:\n{_keys_help(schema)}")
    return "\n\n".join(parts)


def _keys_help(schema: str) -> str:
    return "\n".join(
        f"  {field.key}  ({_type(field)}, {_default(field.default)})\n      {field.help}"
        for field in loader.fields_help(schema)
    )


def _type(field: loader.Field) -> str:
    return field.type_name if field.range in (None, Range()) else f"{field.type_name}, {field.range}"


def _default(value: Any) -> str:
    return "required" if value == MISSING else f"default {loader.plain(value)}"


if __name__ == "__main__":
    sys.exit(main())
