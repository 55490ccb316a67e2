"""Writes a model card (`export card=true`): a README.md that says what the model was made of, and what it is worth.

1. `Evaluated.read` reads the folder of `segvol-pl evaluate`, and refuses one of another model.
2. `Trained.of` reads what the checkpoint and its run folder state about training.
3. `write_card` puts both into Markdown, with the front matter that model hubs read.

A figure that nothing states is written as unknown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segvol_pl import __version__, goodput, journal
from segvol_pl.atomic import write_text
from segvol_pl.config.loader import flat
from segvol_pl.credentials import masked
from segvol_pl.errors import ExportError
from segvol_pl.hub import PREFIX
from segvol_pl.model.checkpoint import Weights, digest_of
from segvol_pl.model.released import Contents
from segvol_pl.run_folder import manifest

CARD = "README.md"
FEW = 10
"""Cases of a category below which its row is marked: the intervals are then wide, or wrong."""
UNKNOWN = "unknown"
TAGS = ["medical", "ct", "3d", "segmentation", "promptable", "segvol"]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of the model."""

    summary: dict[str, Any]
    settings: dict[str, Any]
    cases_sha256: str
    """Of the keys and fingerprints of its cases, in the order of the keys."""

    @classmethod
    def read(cls, folder: Path, source: Path) -> Evaluated:
        """Read the results in a folder. Raises ExportError if there are none, or if they are of another model."""
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cases").iterdir())]
            cases = sorted((str(result["key"]), str(result["fingerprint"])) for result in results)
            if not summary["categories"]:
                raise ExportError(f"evaluation: {folder} holds no figures: a card needs some")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(
                f"evaluation: {folder} is no finished folder of segvol-pl evaluate, and a card needs one"
            ) from error
        if not source.exists() or settings.get("model") != digest_of(source):
            raise ExportError(
                f"evaluation: {folder} is of {summary.get('checkpoint')}, not of {source}: evaluate this file"
            )
        digest = hashlib.sha256("".join(f"{key} {fingerprint}\n" for key, fingerprint in cases).encode()).hexdigest()
        return cls(summary, settings, digest)


@dataclass(frozen=True)
class Trained:
    """What is known of a training run, as rows of a table."""

    data: list[tuple[str, str]]
    compute: list[tuple[str, str]]
    start: str | None
    """The checkpoint that it started from, if any."""
    seen: tuple[str, ...] = ()
    """Its shards, each with the split, as `PLACE SPLIT`."""

    @classmethod
    def of(cls, contents: Contents) -> Trained:
        """Read the checkpoint's header, and the run folder that it lies in."""
        parameters = contents.header.get("hyper_parameters")
        config = flat(parameters["config"]) if isinstance(parameters, dict) else {}
        if not config:
            text = "unknown: the exported file does not state it. Export the checkpoint of the run for more"
            return cls([("training data", text)], [("training", text)], None)
        samples = contents.header.get("VolumeModule", {}).get("samples", {})
        shards = [config["data.shards"], *config["data.mix"]]
        data = [("shards", ", ".join(_name(each) for each in shards)), ("split", str(config["data.split"]))]
        for name, title in (("train", "training samples"), ("held_out", "held-out samples")):
            held = samples.get(name, {})
            data.append((title, f"{held.get('samples', UNKNOWN)}, sha256 `{held.get('sha256', UNKNOWN)}`"))
        data.append(("prompts in training", ", ".join(config["prompts.combinations"])))
        start = config.get("weights") or config.get("pretrained")
        seen = tuple(f"{place} {config['data.split']}" for place in shards)
        return cls(data, _compute(contents, config), None if start is None else str(start), seen)


def _compute(contents: Contents, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    steps, devices = contents.header.get("global_step", UNKNOWN), config["run.nodes"] * config["run.devices"]
    rows = [
        ("steps", f"{steps} of {config['data.global_batch']} volumes"),
        ("precision, strategy", f"{config['run.precision']}, {config['run.strategy']}"),
        ("started from", _start_name(config.get("weights") or config.get("pretrained"))),
    ]
    run = contents.path.parent.parent
    own = contents.path.parent.name == "checkpoints"  # a copy of it may lie in the folder of another run
    attempts = journal.read(run) if own and (run / journal.JOURNAL).is_file() else []
    if attempts:
        spent = goodput.parts(attempts, running=False)
        hours = (spent.wall - spent.queue) / 3600
        rows.append(
            ("compute", f"{hours:.2f} h on {devices} x {config['run.accelerator']}: {hours * devices:.2f} device hours")
        )
    else:
        rows.append(("compute", UNKNOWN))
    path = run / "manifest.json"
    stated = json.loads(path.read_text(encoding="utf-8")) if own and path.is_file() else {}
    commits = list(dict.fromkeys(start["commit"] for start in stated.get("starts", [])))
    rows.append(("commit of segvol_pl", ", ".join(f"`{commit}`" for commit in commits) or UNKNOWN))
    return rows


def write_card(folder: Path, weights: Weights, contents: Contents, evaluated: Evaluated, licence: str) -> None:
    """Write the card into a folder.

    Args:
        folder: exists.
        weights: the model.
        contents: the file that it was read from.
        evaluated: its evaluation.
        licence: as the hub names it, such as `apache-2.0`.
    """
    trained = Trained.of(contents)
    front = {"license": licence, "library_name": "segvol_pl", "pipeline_tag": "image-segmentation", "tags": TAGS}
    if trained.start and trained.start.startswith(PREFIX):
        front["base_model"] = trained.start.removeprefix(PREFIX).partition("@")[0]
    lines = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", f"# {folder_title(weights)}", ""]
    lines += _model_lines(weights)
    lines += ["", "## Training data", "", *_table(("", ""), trained.data)]
    lines += ["", "## Training", "", *_table(("", ""), trained.compute)]
    lines += ["", "## Evaluation", "", *_evaluation_lines(evaluated)]
    lines += ["", "## Limits", "", *_limits(evaluated, trained)]
    lines += ["", "## Licence", "", f"{licence}. The data that it was trained on have licences of their own.", ""]
    write_text(folder / CARD, masked("\n".join(lines)))


def folder_title(weights: Weights) -> str:
    """The card's first line."""
    return f"SegVol for {len(weights.categories)} categories on CT" if weights.categories else "SegVol on CT"


def _model_lines(weights: Weights) -> list[str]:
    config, count = weights.config, sum(value.numel() for value in weights.tensors.values())
    synonyms = [f"{other} ({name})" for other, name in weights.synonyms.items()]
    return [
        f"A promptable 3-D segmentation model of {count / 1e6:.1f} M parameters, input {config.input_shape} voxels, "
        f"exported by segvol_pl {__version__} (commit `{manifest()['commit']}`).",
        "",
        f"Categories for text prompts: {', '.join(weights.categories) or 'none'}.",
        *([f"Synonyms: {', '.join(synonyms)}."] if synonyms else []),
    ]


def _evaluation_lines(evaluated: Evaluated) -> list[str]:
    summary, settings = evaluated.summary, evaluated.settings
    source = _name(str(summary["source"]))
    lines = [
        f"{summary['cases']} cases of the split `{summary['split']}` of {source}; sha256 of the cases "
        f"`{evaluated.cases_sha256}`. Evaluated with commit `{summary['manifest']['commit']}`.",
        "",
        _prompts_line(summary, settings),
        "",
        "Dice over the cases that hold the category. The interval is the 95 % bootstrap interval of the mean.",
    ]
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in summary["categories"]:
        where = tuple(f"{name} {cell[name]}" for name in ("mode", "prompt", "box", "points") if cell[name])
        cells.setdefault(where, []).append(cell)
    header = ("category", "n", "Dice, mean", "95 % interval", "quartiles: 25 %, median, 75 %")
    for where, own in cells.items():
        lines += ["", f"### {', '.join(where)}", "", *_table(header, [_row(cell) for cell in own])]
    return lines


def _prompts_line(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if not summary.get("prompts_from_truth", True):
        return "Boxes and points were given with the cases."
    if settings.get("protocol"):
        return f"Prompts are those of the protocol `{settings['protocol']}`, computed from the ground truth."
    drawn = f"boxes `{', '.join(settings['draw.boxes'])}`, points `{', '.join(settings['draw.points'])}`"
    return f"Boxes and points were drawn from the ground truth ({drawn}), which no user has. Text prompts are names."


def _row(cell: Mapping[str, Any]) -> tuple[str, ...]:
    dice, few = cell["dice"], "\\*" if cell["n"] < FEW else ""
    if dice is None:
        return str(cell["category"]), f"{cell['n']}{few}", "", "", ""
    interval = "" if dice["mean_interval"] is None else "{:.3f} to {:.3f}".format(*dice["mean_interval"])
    quartiles = ", ".join(f"{dice[name]:.3f}" for name in ("q1", "median", "q3"))
    return str(cell["category"]), f"{cell['n']}{few}", f"{dice['mean']:.3f}", interval, quartiles


def _limits(evaluated: Evaluated, trained: Trained) -> Iterator[str]:
    summary = evaluated.summary
    if f"{summary['source']} {summary['split']}" in trained.seen:
        yield "- **The figures are of cases that the model was trained on**, and say nothing about new ones."
    yield "- For research. Not a medical device: a person must check every mask."
    yield "- CT in Hounsfield units only. Scanners, protocols, body regions and patients other than those are untried."
    yield "- The figures are of the split above alone, and say nothing about other sites."
    few = sorted({str(cell["category"]) for cell in summary["categories"] if cell["n"] < FEW})
    if few:
        yield f"- \\* fewer than {FEW} cases, too few for a claim: {', '.join(few)}."
    alarms = sum(cell["false_alarms"] for cell in summary["categories"])
    empty = sum(cell["empty"] for cell in summary["categories"])
    yield (
        f"- False alarms: {alarms} of {empty} prompts for a category that the case does not hold got a mask."
        if empty
        else "- False alarms were not counted: no prompt named a category that its case does not hold."
    )
    if summary["unusable"]:
        yield f"- {len(summary['unusable'])} cases could not be read, and are not in the figures."


def _start_name(start: str | None) -> str:
    if start is None:
        return "random weights"
    return start if start.startswith(PREFIX) else _name(start)


def _name(place: str) -> str:
    """The end of a folder's path or of a URL: where it lies on a disk is nobody's business."""
    return place.rstrip("/").rsplit("/", 1)[-1] or place


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |" for row in cells]
