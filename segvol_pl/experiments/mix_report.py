"""The results of `scaling mix` as JSON, CSV, a figure and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from segvol_pl import html_page
from segvol_pl.atomic import write_csv, write_text
from segvol_pl.config import MixConfig
from segvol_pl.experiments import figures
from segvol_pl.experiments.mixture import Mixed
from segvol_pl.experiments.verdict import Interval

if TYPE_CHECKING:
    from segvol_pl.experiments.mix import MixRun

LARGEST = 0.1
"""Change of a loss at which the colours of the figure are darkest, at least."""


def write_results(
    out: Path, mixed: Mixed, runs: Sequence[MixRun], expected: Sequence[str], notes: Sequence[str], config: MixConfig
) -> None:
    """Write mix.json, transfer.csv, mixtures.csv, a figure and index.html.

    Args:
        out: The folder.
        mixed: The laws and what follows.
        runs: The runs that were used.
        expected: Predicted losses, one line each.
        notes: What was left out, one line each.
        config: The configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "mix.json", json.dumps(_plain(mixed, notes, config), indent=2, ensure_ascii=False) + "\n")
    transfer = [
        {"loss_on": target, "more_of": source, **effect.plain, "shown": _shown(effect)}
        for (target, source), effect in mixed.transfer.items()
    ]
    write_csv(out / "transfer.csv", transfer, ["loss_on", "more_of", "value", "low", "high", "shown"])
    sources, targets = mixed.mixtures.sources, mixed.mixtures.targets
    rows = [
        {
            "run": run.name,
            **{f"share/{name}": run.shares.get(name, 0.0) for name in sources},
            **{f"loss/{name}": run.losses[name] for name in targets},
        }
        for run in runs
    ]
    write_csv(out / "mixtures.csv", rows)
    _write_page(out, mixed, expected, notes, len(runs))


def _plain(mixed: Mixed, notes: Sequence[str], config: MixConfig) -> dict[str, Any]:
    sources, proposal = mixed.mixtures.sources, mixed.proposal
    laws = [
        {
            "loss_on": law.target,
            "form": "c + exp(sum_j s_j r_j)" if law.floor else "exp(sum_j s_j r_j)",
            "slopes": dict(zip(sources, law.theta_P[: len(sources)].tolist(), strict=True)),
            "floor": float(np.exp(law.theta_P[-1])) if law.floor else None,
            "supported": law.supported,
            "reasons": law.reasons,
            "noise": law.noise,
            "left_out_error": law.error,
        }
        for law in mixed.laws
    ]
    proposed = proposal and {
        "shares": {name: share.plain for name, share in zip(sources, proposal.share, strict=True)},
        "change_of_mean_loss": proposal.change.plain,
        "supported": not proposal.reasons,
        "reasons": proposal.reasons,
        "cautions": proposal.cautions,
    }
    return {
        "metric": config.metric,
        "sources": sources,
        "mixtures": len(mixed.mixtures.share_RM),
        "runs": int(mixed.mixtures.runs_R.sum()),
        "reasons": mixed.reasons,
        "laws": laws,
        "transfer": [
            {"loss_on": target, "more_of": source, **effect.plain}
            for (target, source), effect in mixed.transfer.items()
        ],
        "proposal": proposed,
        "notes": list(notes),
    }


def _shown(effect: Interval) -> str:
    return "helps" if effect.high < 0 else "hurts" if effect.low > 0 else "no effect shown"


def _write_page(out: Path, mixed: Mixed, expected: Sequence[str], notes: Sequence[str], runs: int) -> None:
    lines = [(f"No law: {reason}", "no") for reason in mixed.reasons]
    for law in mixed.laws:
        where = f"The loss on {law.target}"
        if law.supported:
            lines.append((f"{where} follows a law: noise {law.noise:.2%}, mixtures left out {law.error:.2%}", "yes"))
        lines += [(f"{where} follows no law: {reason}", "no") for reason in law.reasons]
    sections = [html_page.Section("Laws", [*lines, *((note, "note") for note in notes)])]
    if mixed.transfer:
        png = figures.save(transfer_figure(mixed), out, "transfer")
        table = [
            {"loss on": target, "10 points more of": source, "change": change_text(effect), "": _shown(effect)}
            for (target, source), effect in mixed.transfer.items()
        ]
        sections.append(html_page.Section("Transfer", pictures=[(png, "Transfer matrix")], rows=table))
    if mixed.proposal is not None:
        proposal = mixed.proposal
        marked = [(reason, "no") for reason in proposal.reasons] + [(each, "note") for each in proposal.cautions]
        change = f"Change of the mean loss, against the mean of the mixtures: {change_text(proposal.change)}"
        rows = [
            {"source": name, "share": share_text(share)}
            for name, share in zip(mixed.mixtures.sources, proposal.share, strict=True)
        ]
        heading = "No proposal" if proposal.reasons else "Proposed mixture"
        kept = [] if proposal.reasons else rows
        sections.append(html_page.Section(heading, [(change, "note"), *marked], rows=kept))
    if expected:
        sections.append(html_page.Section("Prediction", [(line, "note") for line in expected]))
    about = f"{runs} runs of {len(mixed.mixtures.share_RM)} mixtures of {', '.join(mixed.mixtures.sources)}. Intervals "
    about += "are 95 % bootstrap intervals. Transfer: the share of a source grows by 10 percentage points, and the "
    about += "others shrink in proportion."
    html_page.write_sections(out / "index.html", "Mixtures of data", about, sections)


def change_text(effect: Interval) -> str:
    """A relative change with its interval."""
    return f"{effect.value:+.1%} [{effect.low:+.1%}, {effect.high:+.1%}]"


def share_text(share: Interval) -> str:
    """A share of a mixture with its interval."""
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def transfer_figure(mixed: Mixed) -> Figure:
    """Draw the transfer matrix: green lowers the loss, red raises it; pale entries are not shown to differ from 0."""
    sources = mixed.mixtures.sources
    targets = list(dict.fromkeys(target for target, _ in mixed.transfer))
    figure = Figure(figsize=(2.2 + 1.3 * len(sources), 1.4 + 0.6 * len(targets)), layout="constrained")
    axes = figure.add_subplot()
    value_IM = np.array([[mixed.transfer[target, source].value for source in sources] for target in targets])
    most = max(LARGEST, float(np.abs(value_IM).max()))
    axes.imshow(value_IM, cmap="RdYlGn_r", vmin=-most, vmax=most, alpha=0.6, aspect="auto")
    for row, target in enumerate(targets):
        for column, source in enumerate(sources):
            effect = mixed.transfer[target, source]
            colour = "#8a93a0" if _shown(effect).startswith("no") else figures.INK
            text = f"{effect.value:+.1%}\n[{effect.low:+.1%}, {effect.high:+.1%}]"
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(sources)), [f"more of {name}" for name in sources], fontsize=8)
    axes.set_yticks(range(len(targets)), [f"loss on {name}" for name in targets], fontsize=8)
    axes.set_title("change of the loss by 10 points more; 95 % intervals", fontsize=9, loc="left", color=figures.INK)
    return figure
