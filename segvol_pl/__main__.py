"""The command line: `segvol-pl COMMAND ...`, or `python -m segvol_pl COMMAND ...`.

1. The command is looked up; its arguments are read and checked. Heavy modules are imported only after that, inside the
   functions below, so that help and configuration errors take a fraction of a second.
2. The command's function is called.
3. An error becomes one line on stderr and an exit status: 0 done, 1 failed, 2 used wrongly, 71 out of memory,
   130 interrupted.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import logging
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from segvol_pl import __version__
from segvol_pl.config import (
    MISSING,
    SCHEMAS,
    CompareConfig,
    DemoConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    FitConfig,
    InventoryConfig,
    MixConfig,
    PackConfig,
    PhantomsConfig,
    PredictConfig,
    PretrainConfig,
    ProbeConfig,
    Range,
    RunConfig,
    ServeConfig,
    TrainConfig,
    loader,
)
from segvol_pl.credentials import masked
from segvol_pl.errors import FAILED, MISUSED, ConfigError, SegVolError, ran_out_of_memory, status_of
from segvol_pl.hub import pinned
from segvol_pl.launched import PROCESS, command_since, rank_named

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "segvol-pl"
DONE, INTERRUPTED = 0, 130
CARRIED = re.compile(r"Caught \w+ in (?:DataLoader worker|pin memory).*\n[\w.]+: (.*)", re.DOTALL)
"""How torch reports an error of a loader process: a full traceback, whose last line has the message."""
USE_LESS_MEMORY = (
    "training takes less with run.recompute=blocks or a higher run.accumulate, predicting with zoom.batch=1 and "
    "zoom.decode_batch=1"
)
MEMORY_REPORT = 200
"""Characters kept of torch's report about GPU memory."""
PIPED_WIDTH = 10_000
"""Columns of the output where it is not a terminal: no table is wrapped or cut."""
ROWS_AT_ONCE = 500
"""Rows of a table that are laid out together."""
PLAN_TAKES = (
    "FILE.yaml ... [nodes=N] [gpus=N] [device=NAME] [volumes=N corpus_gb=GB] [coordinates=true] [KEY=VALUE ...]"
)
FLAGS = {"--help", "-h", "--debug", "--version"}


class Command(NamedTuple):
    """The arguments of one command, and the function that runs it."""

    usage: str
    summary: str
    call: Callable[[list[str]], int]
    """Takes the arguments behind the command's name; returns the exit status."""
    details: Callable[[], str] | None = None
    """Gives further text for the command's help."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program on `arguments` (default: the process's) and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    flags = {argument for argument in given if argument in FLAGS}
    words = [argument for argument in given if argument not in FLAGS]
    _set_up_logging("--debug" in flags)
    command_since.set(PROCESS if arguments is None else time.time())
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
        return _complain(words, f"error: {_explain(error)}", status_of(error))


def _nobody_reads() -> bool:
    """Whether the reader has closed stdout, as `head` does. If so, the rest of the output is discarded."""
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
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {words[0]}: {hint}")
    if flags & {"--help", "-h"}:
        print(_command_help(words[0], COMMANDS[words[0]]))
        return DONE
    option = next((word for word in words[1:] if word.startswith("-")), None)
    if option is not None:
        raise ConfigError(f"no option {option}; options are --help, --debug, --version, and a key is set by key=value")
    return COMMANDS[words[0]].call(words[1:])


def _set_up_logging(debug: bool) -> None:
    """Rank 0 logs progress. Other ranks log warnings and errors only, with their rank."""
    rank = rank_named()
    prefix = f"{rank}: " if rank else ""
    logging.basicConfig(format=f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    usual = logging.WARNING if rank else logging.INFO
    logging.getLogger("segvol_pl").setLevel(logging.DEBUG if debug else usual)


def _complain(words: list[str], message: str, status: int) -> int:
    command = f"{PROGRAM} {words[0]}" if words and words[0] in COMMANDS else PROGRAM
    print(f"{command}: {message}", file=sys.stderr)
    return status


def _explain(error: Exception) -> str:
    """Put an error into one line. One that is neither ours nor the system's is a bug: --debug shows where."""
    carried = CARRIED.fullmatch(str(error))
    text = masked(" ".join((carried[1] if carried else str(error)).split()))
    if isinstance(error, SegVolError):
        return text
    if ran_out_of_memory(error):
        return f"out of memory{': ' * bool(text)}{text[:MEMORY_REPORT]}: {USE_LESS_MEMORY}"
    if isinstance(error, OSError):
        return text
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


# ---- the commands ----


def _configured(name: str, run: Callable[[Any], None]) -> Command:
    """A command whose function takes the configuration that `SCHEMAS[name]` describes."""

    def call(arguments: list[str]) -> int:
        run(pinned(loader.load(name, arguments)))
        return DONE

    return Command("[FILE.yaml ...] [KEY=VALUE ...]", str(SCHEMAS[name].__doc__), call)


def _demo(config: DemoConfig) -> None:
    from segvol_pl.demo import run

    run(config, _console())


def _phantoms(config: PhantomsConfig) -> None:
    from segvol_pl.packing.phantom import phantoms

    phantoms(config)


def _inventory(config: InventoryConfig) -> None:
    from segvol_pl.packing.inventory import inventory

    inventory(config, _console())


def _pack(config: PackConfig) -> None:
    from segvol_pl.packing.pack import pack

    pack(config, _console())


def _pretrain(config: PretrainConfig) -> None:
    from segvol_pl.training.run import pretrain

    pretrain(config)


def _train(config: TrainConfig) -> None:
    from segvol_pl.training.run import train

    train(config)


def _rehearsing(command: Callable[[Any], None]) -> Callable[[Any], None]:
    """The command of a training run; with `run.rehearse` its start is rehearsed instead."""

    def run(config: PretrainConfig | TrainConfig) -> None:
        if not config.run.rehearse:
            from segvol_pl.data.corpus import check_folders

            # Looked for before Lightning is imported, which takes seconds. One rank does: each opens them later.
            if not rank_named():
                check_folders(config.data)
            command(config)
            return
        from segvol_pl.training.rehearsal import lines

        for line in lines(config):
            print(line, flush=True)

    return run


def _finetune(arguments: list[str]) -> int:
    config = _finetune_config(arguments)
    from segvol_pl.finetuning.run import finetune

    finetune(pinned(config), _console())
    return DONE


def _finetune_config(arguments: list[str]) -> FinetuneConfig:
    """The configuration of `finetune`. from=FILE is its key `checkpoint`: `from` is a word of Python."""
    named = [f"checkpoint{argument[4:]}" if argument.startswith("from=") else argument for argument in arguments]
    config: FinetuneConfig = loader.load("finetune", named)
    return config


def _evaluate(config: EvaluateConfig) -> None:
    from segvol_pl.evaluation.run import evaluate

    evaluate(config, _console())


def _embed(config: EmbedConfig) -> None:
    from segvol_pl.evaluation.embed import embed

    embed(config)


def _probe(config: ProbeConfig) -> None:
    from segvol_pl.evaluation.probe import probe

    print("\n".join(probe(config)))


def _predict(config: PredictConfig) -> None:
    if config.images is not None:
        from segvol_pl.evaluation.predict_images import predict_images

        predict_images(config)
        return
    from segvol_pl.inference.predictor import predict

    predict(config)


def _serve(config: ServeConfig) -> None:
    from segvol_pl.inference.server import serve

    serve(config)


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments that are places, and those that are configuration: KEY=VALUE and FILE.yaml."""
    keys = [argument for argument in arguments if "=" in argument or argument.endswith((".yaml", ".yml"))]
    return [argument for argument in arguments if argument not in keys], keys


def _take(arguments: list[str], *names: str) -> list[str]:
    """The arguments, exactly as many as names. Raises ConfigError otherwise."""
    if len(arguments) != len(names):
        raise ConfigError(f"takes {' '.join(names)}, got {' '.join(arguments) or 'nothing'}")
    return arguments


def _init(arguments: list[str]) -> int:
    from segvol_pl.resources import lay_out

    (folder,) = _take(arguments, "DIR")
    print("\n".join(lay_out(Path(folder))))
    return DONE


def _doctor(arguments: list[str]) -> int:
    from segvol_pl.doctor import FAIL, examine

    if wrong := [argument for argument in arguments if "=" in argument]:
        raise ConfigError(f"takes [DIR ...], got {wrong[0]}")
    states = []
    for finding in examine(arguments):
        print(finding.line, flush=True)
        states.append(finding.state)
    print(f"{states.count(FAIL)} of {len(states)} checks failed")
    return FAILED if FAIL in states else DONE


def _index(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    from segvol_pl.data.index_builder import build_index

    build_index(folder)
    return DONE


def _verify(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    from segvol_pl.data.verify import verify

    faults = verify(folder)
    print("\n".join(faults) or f"{folder}: no faults found")
    return FAILED if faults else DONE


def _repack(arguments: list[str]) -> int:
    folders = [argument for argument in arguments if "=" not in argument]
    (folder,) = _take(folders, "DIR")
    keys = [argument for argument in arguments if argument not in folders]
    config = loader.load("repack", [f"folder={folder}", *keys])
    from segvol_pl.packing.repack import repack

    report = repack(config, _console())
    print("".join(f"{fault}\n" for fault in report.faults), end="")
    return FAILED if report.faults else DONE


def _inspect(arguments: list[str]) -> int:
    (folder,) = _take(arguments, "DIR")
    from segvol_pl.data.shard_index import list_samples

    samples, printed = list_samples(folder), 0
    while block := list(itertools.islice(samples, ROWS_AT_ONCE)):
        _print_table(block, header=not printed)
        printed += len(block)
    if not printed:
        print(f"{masked(folder)}: no samples")
    return DONE


def _overlap(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError("takes DIR ...")
    from segvol_pl.packing.duplicates import crosses_splits, find_duplicates

    groups = find_duplicates(arguments)
    leaking = [group for group in groups if crosses_splits(group)]
    for group in groups:
        copies = "  =  ".join(f"{copy.folder} {copy.key} ({copy.split})" for copy in group)
        print(f"{'in two splits: ' if group in leaking else ''}{copies}")
    print(f"{len(groups)} volumes occur more than once, {len(leaking)} of them in different splits")
    return FAILED if leaking else DONE


def _view(arguments: list[str]) -> int:
    files = [argument for argument in arguments if "=" not in argument and not argument.endswith((".yaml", ".yml"))]
    image = [f"image={_take(files, 'CT')[0]}"] if files else []
    config = loader.load("view", [*image, *(argument for argument in arguments if argument not in files)])
    from segvol_pl.inference.viewer import view

    view(config)
    return DONE


def _challenge(arguments: list[str]) -> int:
    if arguments[:1] != ["predict"]:
        raise ConfigError("takes predict IN OUT checkpoint=FILE, then KEY=VALUE")
    places, keys = _parted(arguments[1:])
    cases, out = _take(places, "IN", "OUT")
    config = loader.load("challenge predict", [f"cases={cases}", f"out={out}", *keys])
    from segvol_pl.evaluation.challenge_predict import challenge_predict

    challenge_predict(config)
    return DONE


def _import(arguments: list[str]) -> int:
    files = [argument for argument in arguments if "=" not in argument]
    source, destination = _take(files, "SRC", "DST")
    keys = [argument for argument in arguments if argument not in files]
    config = loader.load("import", [f"source={source}", f"out={destination}", *keys])
    from segvol_pl.model.convert import import_weights

    import_weights(config)
    return DONE


def _export(arguments: list[str]) -> int:
    files, keys = _parted(arguments)
    names = [name for name in ("source", "out") if not any(key.startswith(f"{name}=") for key in keys)]
    if not len(names) <= len(files) <= 3:
        raise ConfigError(f"takes SRC DST [PUBLISHED], then KEY=VALUE, got {' '.join(files) or 'nothing'}")
    given = zip([*names, "published"], files, strict=False)
    config = loader.load("export", [*(f"{name}={file}" for name, file in given), *keys])
    from segvol_pl.sharing.export import export

    export(config)
    return DONE


def _grid(arguments: list[str]) -> int:
    from segvol_pl.experiments import grid as grids
    from segvol_pl.experiments import launch

    files = [argument for argument in arguments if "=" not in argument]
    (file,) = _take(files, "FILE")
    keys = {name: value for name, _, value in (a.partition("=") for a in arguments) if name in ("run", "sweep", "out")}
    given = [a for a in arguments if a not in files and a.partition("=")[0] not in keys]
    grid = grids.read(Path(file), keys.get("out"))
    runs = grids.expand(grid, given)
    if keys.get("run", "all") == "all":
        launch.warn_of_one_rate(runs)
    passed = [*given, f"out={keys['out']}"] if "out" in keys else given
    number = keys.get("run")
    if "sweep" in keys:
        from segvol_pl.atomic import write_text

        write_text(Path(keys["sweep"]), launch.sweep(grid, runs, passed))
    elif number == "all":
        launch.start_all(grid, runs, passed)
    elif number is not None:
        if not number.isdecimal() or int(number) >= len(runs):
            raise ConfigError(f"run={number}: expected 0 to {len(runs) - 1}, or all")
        run = runs[int(number)]
        launch.start(run, _train if run.command == "train" else _pretrain, not rank_named())
    else:
        _print_table(launch.describe(runs))
        print(launch.held_out(runs))
        for line in launch.branching(grid, runs, passed):
            print(line)
    return DONE


def _grid_help() -> str:
    from segvol_pl.experiments.grid import HELP

    return HELP


def _scaling(arguments: list[str]) -> int:
    kinds: dict[str, Callable[[Any], list[str]]] = {
        "fit": _scaling_fit,
        "compare": _scaling_compare,
        "mix": _scaling_mix,
    }
    if not arguments or arguments[0] not in kinds:
        raise ConfigError(f"takes {' or '.join(kinds)}, then RUNS and KEY=VALUE")
    folders, given = _parted(arguments[1:])
    runs = [f"runs={json.dumps(folders)}"] if folders else []
    print("\n".join(kinds[arguments[0]](loader.load(f"scaling {arguments[0]}", [*runs, *given]))))
    return DONE


def _scaling_fit(config: FitConfig) -> list[str]:
    from segvol_pl.experiments.fit import fit_runs

    return fit_runs(config)


def _scaling_compare(config: CompareConfig) -> list[str]:
    from segvol_pl.experiments.compare import compare_runs

    return compare_runs(config)


def _scaling_mix(config: MixConfig) -> list[str]:
    from segvol_pl.experiments.mix import mix_runs

    return mix_runs(config)


JOBS: dict[str, Callable[[Any], None]] = {
    "phantoms": _phantoms,
    "pack": _pack,
    "pretrain": _pretrain,
    "train": _train,
    "evaluate": _evaluate,
}
"""The commands that are jobs of `paper`."""


def _paper(arguments: list[str]) -> int:
    from segvol_pl.experiments import study as studies

    claims = [argument for argument in arguments if "=" not in argument]
    known = {field.key for field in loader.fields_help("paper")}
    own = [argument for argument in arguments if argument.partition("=")[0] in known]
    given = [argument for argument in arguments if argument not in (*claims, *own)]
    config = loader.load("paper", [*([f"claims={json.dumps(claims)}"] if claims else []), *own])
    study = studies.plan(config, given)
    if config.run is None:
        _print_table(studies.describe(study))
        print("\n".join(studies.stages(study)))
        return DONE
    if config.run.isdecimal():
        studies.start(study, int(config.run), JOBS, not rank_named())
        return DONE
    from segvol_pl.experiments.paper import write

    try:
        if config.run == "all":
            passed = [argument for argument in arguments if argument.partition("=")[0] not in ("run", "processes")]
            studies.start_all(study, config.processes, passed)
    finally:
        print("\n".join(write(study)))
    return DONE


def _paper_help() -> str:
    from segvol_pl.experiments.claims import HELP

    return HELP


def _config(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError(f"takes COMMAND FILE...; COMMAND is one of {', '.join(SCHEMAS)}")
    print(loader.resolved(arguments[0], arguments[1:]), end="")
    return DONE


def _plan(arguments: list[str]) -> int:
    if not arguments:
        raise ConfigError(f"takes {PLAN_TAKES}")
    from segvol_pl.planning.plan import lines, plan

    made = plan(arguments)
    if made.coordinates:
        from segvol_pl.training.coordinates import lines as checked

        print("\n".join(checked(made.config)))
        return DONE
    print("\n".join(lines(made)))
    return DONE


def _runs(arguments: list[str]) -> int:
    folders, keys = _parted(arguments)
    config = loader.load("runs", [*([f"folders={json.dumps(folders)}"] if folders else []), *keys])
    from segvol_pl.run_table import table, write

    rows = table(config)
    if config.out is None:
        _print_table(rows)
    else:
        write(rows, Path(config.out))
    return DONE


def _runs_help() -> str:
    from segvol_pl.run_table import HELP

    return HELP


def _completion(arguments: list[str]) -> int:
    from segvol_pl.completion import SHELLS, script

    (shell,) = _take(arguments, "|".join(SHELLS))
    print(script(shell, {name: command.summary for name, command in COMMANDS.items()}), end="")
    return DONE


def _requeue_help() -> str:
    from segvol_pl.requeue import HELP

    return HELP


def _requeue(arguments: list[str]) -> int:
    """Exits with 0 whatever it decides: its line is to be the last one of the job's log."""
    trained = {"train", "pretrain", "finetune"}
    if len(arguments) < 2 or not arguments[0].isdecimal() or arguments[1] not in trained:
        raise ConfigError("takes STATUS, then train, pretrain or finetune, then the arguments of that")
    from segvol_pl import slurm_job
    from segvol_pl.journal import read
    from segvol_pl.requeue import Job, decide, record_end

    job = Job(slurm_job.job_name(), slurm_job.restarts(), int(arguments[0]))
    try:
        run = _trained_run(arguments[1], arguments[2:])
    except ConfigError as error:
        print(f"configuration ({error}): not queued again: fix that, and submit the job again")
        return DONE
    decided = decide(read(Path(run.out)), job, run.requeue)
    if decided.again and not slurm_job.may_be_queued_again():
        print(f"{decided.cause.value}: job {job.name or 'none'} is not running any more, and is left as it is")
        return DONE
    record_end(Path(run.out), job, decided.cause)
    print(decided.reason, flush=True)
    if decided.again:
        slurm_job.queue_again()
    return DONE


def _trained_run(command: str, arguments: list[str]) -> RunConfig:
    """The section `run` of a training command; that of `finetune` with the folder that it trains in."""
    if command == "finetune":
        config = _finetune_config(arguments)
        return dataclasses.replace(config.run, out=str(Path(config.out) / "train"))
    run: RunConfig = loader.load(command, arguments).run
    return run


def _console() -> Console:
    """For tables. They are as wide as the terminal, or as their content where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)


def _print_table(rows: Sequence[Mapping[str, object]], header: bool = True) -> None:
    """Print rows that have the same columns, named in the first row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=header)
    for name in next(iter(rows), {}):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))  # as Text, brackets are no markup
    _console().print(table)


COMMANDS = {
    "demo": _configured("demo", _demo),
    "phantoms": _configured("phantoms", _phantoms),
    "inventory": _configured("inventory", _inventory),
    "pack": _configured("pack", _pack),
    "index": Command("DIR", "Rebuild index.json from the shards in DIR.", _index),
    "repack": Command("DIR [workers=N]", str(SCHEMAS["repack"].__doc__), _repack),
    "verify": Command("DIR", "Read every member of every shard in DIR and check its hash.", _verify),
    "inspect": Command("DIR", "List the samples in the shards of DIR.", _inspect),
    "overlap": Command("DIR ...", "List volumes that occur in several of the folders, or in two splits.", _overlap),
    "pretrain": _configured("pretrain", _rehearsing(_pretrain)),
    "train": _configured("train", _rehearsing(_train)),
    "finetune": Command(
        "[FILE.yaml ...] images=DIR labels=DIR categories=FILE|shards=DIR from=FILE out=DIR [KEY=VALUE ...]",
        str(SCHEMAS["finetune"].__doc__),
        _finetune,
    ),
    "plan": Command(
        PLAN_TAKES,
        "Estimate parameters, operations, memory by strategy, rates and hours of a training run before it is started; "
        "coordinates=true checks instead whether its learning rate transfers over widths.",
        _plan,
    ),
    "runs": Command("DIR ... [out=FILE.csv|FILE.html]", str(SCHEMAS["runs"].__doc__), _runs, _runs_help),
    "requeue": Command(
        "STATUS train|pretrain|finetune [FILE.yaml ...] [KEY=VALUE ...]",
        "Queue the SLURM job of a failed run again if that makes sense, and say why; slurm/train.sbatch calls it.",
        _requeue,
        _requeue_help,
    ),
    "evaluate": _configured("evaluate", _evaluate),
    "embed": _configured("embed", _embed),
    "probe": _configured("probe", _probe),
    "predict": _configured("predict", _predict),
    "view": Command("CT [FILE.yaml ...] [KEY=VALUE ...]", str(SCHEMAS["view"].__doc__), _view),
    "challenge": Command(
        "predict IN OUT checkpoint=FILE [FILE.yaml ...] [KEY=VALUE ...]",
        str(SCHEMAS["challenge predict"].__doc__),
        _challenge,
    ),
    "serve": _configured("serve", _serve),
    "import": Command("SRC DST [KEY=VALUE ...]", str(SCHEMAS["import"].__doc__), _import),
    "export": Command("SRC DST [PUBLISHED] [KEY=VALUE ...]", str(SCHEMAS["export"].__doc__), _export),
    "grid": Command(
        "FILE [run=K|all] [out=DIR] [sweep=FILE] [KEY=VALUE ...]",
        "List the runs of a grid with their state; run=K starts one, run=all one by one, sweep=FILE writes a sweep.",
        _grid,
        _grid_help,
    ),
    "scaling": Command(
        "fit|compare|mix RUNS ... [table=CSV] [KEY=VALUE ...]",
        "Fit scaling laws to runs, compare the points of one grid axis in pairs of runs, or weigh mixtures of data.",
        _scaling,
    ),
    "paper": Command(
        "[CLAIM ...] [size=tiny|full|FILE] [run=K|all|page] [KEY=VALUE ...]",
        "Try the claims of the SegVol paper: list the jobs with their state; run=all runs them and writes the page.",
        _paper,
        _paper_help,
    ),
    "doctor": Command(
        "[DIR ...]",
        "Check packages, GPUs, memory, network, SLURM, wandb and CLIP of this machine, and folders that runs will use.",
        _doctor,
    ),
    "init": Command("DIR", "Copy configs/, slurm/ and shards/datasets/ into DIR, for editing.", _init),
    "completion": Command("bash|zsh|fish", "Print a script that completes commands, keys and values.", _completion),
    "config": Command(
        "COMMAND [FILE.yaml ...] [KEY=VALUE ...]", "Print the resolved configuration of COMMAND as YAML.", _config
    ),
}


# ---- help ----


def _program_help() -> str:
    commands = "\n".join(f"  {name:<11}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...\n\n{commands}\n\n{PROGRAM} COMMAND --help lists the keys of a command. "
        "--debug shows the traceback of an error, --version the version."
    )


def _command_help(name: str, command: Command) -> str:
    parts = [f"usage: {PROGRAM} {name} {command.usage}", command.summary]
    if command.details:
        parts.append(command.details())
    # A command of several kinds has a schema for each: `scaling fit`, `scaling compare`.
    for schema in (each for each in SCHEMAS if each == name or each.startswith(f"{name} ")):
        of = "" if schema == name else f" of {schema}"
        parts.append(f"Keys{of}, for YAML files and as KEY=VALUE; the rightmost wins:\n{_keys_help(schema)}")
    return "\n\n".join(parts)


def _keys_help(schema: str) -> str:
    lines = []
    for field in loader.fields_help(schema):
        kind = field.type_name if field.range in (None, Range()) else f"{field.type_name}, {field.range}"
        default = "required" if field.default == MISSING else f"default {loader.plain(field.default)}"
        lines.append(f"  {field.key}  ({kind}, {default})\n      {field.help}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
