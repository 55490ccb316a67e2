"""Start the runs of a grid, show their state, and write the sweep that wandb starts.

1. A run folder holds `grid.json`: which process runs it, since when, or how it ended.
2. `start` runs one: it skips a finished run, starts a new one, or resumes from the last checkpoint.
3. `start_all` runs one after another, each in a process of its own, so that a failure does not end the others.
4. `sweep` writes the file for `wandb sweep`, whose agents call the same command line.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from segvol_pl.atomic import write_text
from segvol_pl.config import Transfer, loader
from segvol_pl.credentials import masked
from segvol_pl.errors import ConfigError, RunError
from segvol_pl.experiments.grid import COMMANDS, Grid, Run, parameters, volume_flops
from segvol_pl.folder_lock import FolderLock, is_running
from segvol_pl.run_folder import GRID_ENTRY, read_grid_entry

log = logging.getLogger(__name__)

MISSING, RUNNING, PARTIAL, FAILED, FINISHED, CHANGED = "missing", "running", "partial", "failed", "finished", "changed"
WAITS = "waits for trunk"
"""State, followed by the trunk's number, of a branch whose checkpoint to start from does not exist yet."""
PLACES = ("out", "device", "workers")
"""Keys of commands that do not train which change where and how fast they run, not their results."""
SILENCE = 900.0
"""Seconds without a logged step after which a run on another machine is taken to have stopped."""


@dataclass(frozen=True)
class State:
    """State of a run: missing, running, partial, failed, finished, changed, or `waits for trunk K`."""

    name: str
    step: int = 0
    detail: str = ""
    """Why it failed, what was changed, or where it runs."""


def state(run: Run) -> State:
    """Read the state from the run folder. `changed`: the folder holds a run with another configuration."""
    own = _own_state(run)
    return _waiting(run) or own if own.name in (MISSING, PARTIAL, FAILED) else own


def _waiting(run: Run) -> State | None:
    """The state of a branch that can neither start nor resume; None for any other run."""
    if run.trunk is None or (run.out / "checkpoints").exists():
        return None
    start = Path(run.config.run.branch_from)
    if start.exists():
        return None
    trunk = _own_state(run.trunk)
    detail = f"for its {start.name}; that run is {trunk.name}, step {trunk.step}"
    if trunk.name == FINISHED:
        detail = f"which has finished without {start.name}: give another out=DIR, or remove {run.trunk.out}"
    return State(f"{WAITS} {run.trunk.number}", 0, detail)


def _own_state(run: Run) -> State:
    record, step = read_grid_entry(run.out), _last_step(run.out / "metrics.csv")
    if record is None and not (run.out / "config.yaml").exists():
        return State(MISSING)
    record = record or {"state": PARTIAL}
    if changed := _changed(run, record):
        return State(CHANGED, step, changed)
    if record["state"] != RUNNING:
        return State(record["state"], step, record.get("error", ""))
    return State(RUNNING, step, f"on {record['host']}") if _lives(run.out, record) else State(PARTIAL, step)


def start(run: Run, call: Callable[[Any], Any], first: bool) -> None:
    """Run one in this process, unless it is finished.

    Args:
        run: The run.
        call: Takes its configuration and trains.
        first: Whether this process is rank 0, which keeps the record.

    Raises:
        RunError: The folder holds a run with another configuration, or a branch's trunk has not come far enough.
        LockedError: Another process runs it.
    """
    before = state(run)
    if before.name == FINISHED:
        log.info("run %d %s: already finished, skipped", run.number, run.name)
        return
    if before.name == CHANGED:
        raise RunError(f"{run.out} holds a run with {before.detail}: give another out=DIR, or remove the folder")
    if before.name.startswith(WAITS):
        raise RunError(f"run {run.number} {run.name}: {before.name}, {before.detail}: start it again after that")
    if not first:
        call(run.config)
        return
    with FolderLock(run.out):
        log.info("run %d %s: was %s, step %d", run.number, run.name, before.name, before.step)
        _write(run, RUNNING)
        try:
            call(run.config)
        except Exception as error:
            _write(run, FAILED, error=masked(f"{type(error).__name__}: {' '.join(str(error).split())}"))
            raise
        _write(run, FINISHED)


def start_all(grid: Grid, runs: Sequence[Run], given: Sequence[str]) -> None:
    """Start all runs that are not finished, one after another. Raises RunError at the end, naming those that failed."""
    failed = []
    for run in runs:
        if state(run).name == FINISHED:
            log.info("run %d %s: already finished, skipped", run.number, run.name)
            continue
        command = [sys.executable, "-m", "segvol_pl", "grid", str(grid.path), f"run={run.number}", *given]
        if subprocess.run(command, check=False).returncode:
            failed.append(run)
    if failed:
        names = ", ".join(f"{run.number} {run.name}" for run in failed)
        raise RunError(f"{len(failed)} of {len(runs)} runs did not finish: {names}; run the same command to retry them")


def warn_of_one_rate(runs: Sequence[Run]) -> None:
    """Log a line if models of several widths all have one learning rate, chosen for one width at most."""
    fixed = [run for run in runs if run.config.optim.transfer is Transfer.none]
    widths = sorted({run.config.model.hidden_size for run in fixed})
    rates = {run.config.optim.lr for run in fixed}
    if len(widths) > 1 and len(rates) == 1:
        log.warning(
            "models of %d widths (%d to %d) share optim.lr=%g, which suits one width at most: set optim.transfer=mup",
            *(len(widths), widths[0], widths[-1], rates.pop()),
        )


def sweep(grid: Grid, runs: Sequence[Run], given: Sequence[str]) -> str:
    """Return the YAML of a wandb sweep over the run numbers. `wandb agent` then calls `segvol-pl grid FILE run=K`."""
    if grid.lengths:
        raise ConfigError("sweep: agents do not wait for the trunks of `lengths`: use run=all, or two arrays on SLURM")
    project = {run.config.track.project for run in runs}
    if len(project) > 1:
        raise ConfigError(f"track.project: a sweep needs one project, these runs have {', '.join(sorted(project))}")
    content = {
        "name": grid.name,
        "project": project.pop(),
        "method": "grid",
        "command": ["segvol-pl", "grid", str(grid.path), *map(masked, given), "${args_no_hyphens}"],
        "parameters": {"run": {"values": [run.number for run in runs]}},
    }
    return str(yaml.safe_dump(content, sort_keys=False))


# ---- the run folder ----


def _write(run: Run, name: str, **more: str) -> None:
    process = psutil.Process()
    started = {"host": socket.gethostname(), "pid": os.getpid(), "started": process.create_time(), "at": time.time()}
    run.out.mkdir(parents=True, exist_ok=True)
    record = {"state": name, "name": run.name, "command": run.command, "places": run.places, **started, **more}
    if run.command not in COMMANDS:
        record["config"] = loader.plain(run.config)  # pre-training and training write their own config.yaml
    write_text(run.out / GRID_ENTRY, json.dumps(record, indent=2) + "\n")


def _changed(run: Run, record: dict[str, Any]) -> str:
    """How the configuration differs from that of the run in the folder; empty if there is nothing to resume or keep."""
    if run.command not in COMMANDS:
        return _changed_since(record, run) if record["state"] == FINISHED else ""
    path = run.out / "config.yaml"
    if not path.exists() or not (run.out / "checkpoints" / "last.ckpt").exists():
        return ""
    try:
        before = loader.plain(loader.load(run.command, [str(path)]))
    except ConfigError as error:
        return str(error)
    return ", ".join(loader.differences(before, loader.plain(run.config))[:3])


def _changed_since(record: dict[str, Any], run: Run) -> str:
    """How a configuration differs from the one that was recorded. The folder may have been moved: a path is compared by
    its last part."""
    before, now = loader.flat(record["config"]), loader.flat(loader.plain(run.config))
    pairs = [(key, before.get(key), value) for key, value in now.items() if key not in PLACES]
    return ", ".join(f"{key} {old} -> {new}" for key, old, new in pairs if _last_part(old) != _last_part(new))


def _last_part(value: Any) -> Any:
    return value.rpartition("/")[2] if isinstance(value, str) else value


def _lives(out: Path, record: dict[str, Any]) -> bool:
    """Whether the process that wrote the record is alive, or on another machine, whether it has logged recently."""
    if record["host"] != socket.gethostname():
        metrics = out / "metrics.csv"
        last = max(record["at"], metrics.stat().st_mtime if metrics.exists() else 0)
        return bool(time.time() - last < SILENCE)
    return is_running(record["pid"], record["started"])


def _last_step(metrics: Path) -> int:
    """Step of the last complete row, 0 if there is none."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - 4096))
        steps = [line.split(b",")[0] for line in stream.read().splitlines()[1:]]
    return max((int(step) for step in steps if step.isdigit()), default=0)


# ---- the listing ----


def describe(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return one row per run: number, name, state, step and steps, parameters, training FLOPs, and a remark."""
    rows = []
    for run in runs:
        now, steps = state(run), run.config.optim.max_steps
        row = {
            "run": str(run.number),
            "name": run.name,
            "state": now.name,
            "step": f"{now.step}/{steps}",
            "parameters": f"{parameters(run.config):,}",
            "flops": f"{steps * run.config.data.global_batch * volume_flops(run.config):.2e}",
            "": now.detail,
        }
        rows.append(row)
    return rows


def branching(grid: Grid, runs: Sequence[Run], given: Sequence[str]) -> list[str]:
    """What the `lengths` of a grid save, and how to submit them to SLURM, in lines; none without `lengths`."""
    branches = [run for run in runs if run.trunk is not None]
    if not branches:
        return []
    whole = sum(run.config.optim.max_steps for run in runs)
    saved = sum(run.config.optim.decay_start for run in branches)
    call = shlex.join(["slurm/grid.sbatch", str(grid.path), *map(masked, given)])
    first = branches[0].number
    return [
        f"steps: {whole - saved:,} in place of {whole:,}, {100 * saved / whole:.1f} % saved "
        f"(trunks: {first}, branches: {len(branches)})",
        "on SLURM:",
        f"  trunks=$(sbatch --parsable --array=0-{first - 1} {call})",
        f"  sbatch --array={first}-{len(runs) - 1} --dependency=afterok:$trunks {call}",
    ]


def held_out(runs: Sequence[Run]) -> str:
    """Report whether all runs are validated on the same volumes and none trains on them. Reads the shards' indexes."""
    # Reading shards imports torch, which expanding a grid must not.
    from segvol_pl.data.corpus import held_out_corpus, open_folders, training_corpus
    from segvol_pl.errors import ShardError

    sets, leaking = set(), []
    seen: dict[str, tuple[frozenset[str], int]] = {}
    for run in runs:
        data, labelled = run.config.data, run.command == "train"
        key = repr((data.shards, data.mix, data.split, data.val_split, data.fraction))
        try:
            if key not in seen:
                folders = open_folders(data)
                held = _contents(held_out_corpus(folders, data.val_split, labelled))
                seen[key] = held, len(held & _contents(training_corpus(folders, data, labelled)))
        except (ShardError, ConfigError, OSError) as error:
            return f"held-out volumes not checked: {error}"
        sets.add(seen[key][0])
        leaking += [run.name] if seen[key][1] else []
    same = f"the same {len(next(iter(sets)))} for all runs" if len(sets) == 1 else f"{len(sets)} DIFFERENT SETS"
    leak = f"ALSO TRAINED ON by {len(leaking)} runs, first {leaking[0]}" if leaking else "none of them is trained on"
    return f"held-out volumes: {same}; {leak}"


def _contents(corpus: Any) -> frozenset[str]:
    """The volumes by the hash of their voxels; by name if an older index has no hashes."""
    texts = (row for part in corpus.parts for row in part.records.texts("content", "key"))
    return frozenset((content or key).decode() for content, key in texts)
