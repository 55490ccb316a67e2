"""`segvol-pl runs`: training runs next to each other, as a table, CSV or a page. Needs no torch.

1. Every run folder has a row: what its journal says (`goodput.describe`), its rate, its best figures of validation.
2. Then come the keys of the configuration that differ between the runs, and no others.

What a run has not logged yet is an empty cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from segvol_pl.atomic import write_csv
from segvol_pl.config import RunsConfig
from segvol_pl.config.loader import flat
from segvol_pl.errors import ConfigError
from segvol_pl.goodput import HELP as GOODPUT
from segvol_pl.goodput import describe, run_folders
from segvol_pl.html_page import Section, write_sections
from segvol_pl.run_folder import read_every_metric

RATE = "rate/volumes_per_s"
OWN = ("run.out", "track.name")
"""Keys in which runs always differ."""
UNSET = "-"
"""In place of a key that a run's configuration does not have."""
HELP = f"""Columns: volumes/s is the last rate; val/loss the lowest one; best Dice the highest mean of val/dice/PROMPT
over the prompt combinations, and the step at which it was reached. Behind them are the keys of the configuration that
differ between the runs.

{GOODPUT}"""


def table(config: RunsConfig) -> list[dict[str, str]]:
    """A row for each run folder among `config.folders` and below them; all have the same columns.

    Raises ConfigError for a folder without a run, and for files in a run folder that cannot be read.
    """
    folders = run_folders(config.folders)
    settings = [_settings(folder) for folder in folders]
    return [
        {**_first(described), **_figures(folder, own), **_rest(described), **chosen}
        for folder, described, own, chosen in zip(
            folders, map(describe, folders), settings, _differing(settings), strict=True
        )
    ]


def write(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write the rows as CSV or, by the ending, as a page of HTML."""
    # The last column of the journal has no name in the table of a terminal.
    named = [{name or "why it ended": value for name, value in row.items()} for row in rows]
    if path.suffix == ".csv":
        write_csv(path, named)
        return
    write_sections(path, "Training runs", f"{len(rows)} runs", [Section(rows=named, lines=_legend())])


def _legend() -> list[tuple[str, str]]:
    return [(paragraph, "note") for paragraph in HELP.split("\n\n")[:1]]


def _first(described: dict[str, str]) -> dict[str, str]:
    return {name: described[name] for name in ("run", "state", "step")}


def _rest(described: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in described.items() if name not in ("run", "state", "step")}


def _figures(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    metrics = _metrics(folder / "metrics.csv")
    rates, losses = metrics.get(RATE, []), metrics.get("val/loss", [])
    best = _best_dice(metrics, settings.get("prompts.combinations") or [])
    return {
        "volumes/s": f"{rates[-1][1]:.3g}" if rates else "",
        "val/loss": f"{min(value for _, value in losses):.4f}" if losses else "",
        "best Dice": f"{best[1]:.4f} ({best[0]})" if best else "",
    }


def _metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    if not path.exists():
        return {}
    try:
        return read_every_metric(path)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is not a file of metrics ({error})") from error


def _best_dice(metrics: dict[str, list[tuple[int, float]]], prompts: Sequence[str]) -> tuple[int, float] | None:
    """Step and mean over the prompt combinations of the best validation; None without one of all of them."""
    curves = [dict(metrics.get(f"val/dice/{prompt}", [])) for prompt in prompts]
    if not curves:
        return None
    means = {
        step: sum(curve[step] for curve in curves) / len(curves)
        for step in curves[0]
        if all(step in curve for curve in curves)
    }
    return max(means.items(), key=lambda item: item[1], default=None)


def _settings(folder: Path) -> dict[str, Any]:
    """The configuration of a run by dotted keys; empty if it has none."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        return flat(dict(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is not a configuration ({' '.join(str(error).split())})") from error


def _differing(settings: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Of each run the keys whose values are not the same in all runs."""
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in OWN]
    found = {key: [_text(each[key]) if key in each else UNSET for each in settings] for key in keys}
    differing = {key: values for key, values in found.items() if len(set(values)) > 1}
    return [{key: values[number] for key, values in differing.items()} for number in range(len(settings))]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)
