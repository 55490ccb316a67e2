"""Log an evaluation to wandb, TensorBoard and MLflow, as configured: figures, pictures, and tables or files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.image import imread

from segvol_pl.config import EvaluateConfig, Wandb
from segvol_pl.config.loader import plain
from segvol_pl.evaluation.figures import Picture, png_of
from segvol_pl.evaluation.mask_category import CategoryMatch
from segvol_pl.evaluation.protocol import Interaction, ProtocolFigures, curve_records, interactions, plot_curve
from segvol_pl.evaluation.summary import Row, Summary, columns
from segvol_pl.training.loggers import finish, wandb_is_there, wandb_logger
from segvol_pl.training.trackers import MlflowRun, trackers

if TYPE_CHECKING:
    import wandb


FILES = ("report.html", "summary.json", "rows.csv", "interactions.csv", "category_matches.csv")


def track(
    out: Path,
    config: EvaluateConfig,
    summary: Summary,
    pictures: Sequence[Picture],
    protocol: ProtocolFigures | None = None,
) -> None:
    """Log the overall figures of each setting and the pictures to every tracker that is configured.

    wandb also gets the tables `rows`, `categories` and `matches`, and of a protocol with clicks `interactions`, `curve`
    and the curve as a picture; MLflow gets the files of `out` instead.

    A repeated evaluation continues its runs, except with `resume=false`. If wandb is not installed, only a warning is
    logged. Raises ConfigError if another tracker cannot be used on this machine.
    """
    cases = {f"{protocol.protocol}/{name}": one.mean for name, one in protocol.cases.items()} if protocol else {}
    figures = {**_overall(summary), **cases}
    if config.track.wandb is not Wandb.disabled and wandb_is_there():
        _to_wandb(out, config, summary, pictures, protocol, figures)
    others = trackers(out, config.track, 0 if config.resume else None)
    for other in others:
        other.log_hyperparams({"config": plain(config)})
        other.log_metrics(figures, step=0)
        for picture in pictures:
            other.pixels(picture.caption, _pixels(picture), step=0)
        if isinstance(other, MlflowRun):
            other.files([path for name in FILES if (path := out / name).exists()])
    finish([*others])


def _to_wandb(
    out: Path,
    config: EvaluateConfig,
    summary: Summary,
    pictures: Sequence[Picture],
    protocol: ProtocolFigures | None,
    figures: dict[str, float],
) -> None:
    logger = wandb_logger(out, config.track, new=not config.resume)
    content = {
        "rows": _records(Row, summary.rows),
        "categories": _cells(summary),
        **({"matches": _records(CategoryMatch, summary.matches)} if summary.matches else {}),
        "pictures": [_image(picture) for picture in pictures],
        **(_clicked(summary, protocol) if protocol and protocol.curve else {}),
    }
    logger.attempt(lambda: logger.experiment.config.update(plain(config), allow_val_change=True))
    logger.attempt(lambda: logger.experiment.log(content))
    logger.attempt(lambda: logger.experiment.summary.update(figures))
    finish([logger])


def _clicked(summary: Summary, protocol: ProtocolFigures) -> dict[str, Any]:
    return {
        "interactions": _records(Interaction, interactions(summary.rows, protocol.target_dice)),
        "curve": _table(*curve_records(protocol)),
        "curve_picture": _image(Picture("", "", "Dice over clicks", png_of(plot_curve(protocol)))),
    }


def _image(picture: Picture) -> wandb.Image:
    import wandb

    return wandb.Image(_pixels(picture), caption=picture.caption)


def _pixels(picture: Picture) -> np.ndarray:
    pixels_HWC: np.ndarray = np.rint(255 * imread(io.BytesIO(picture.png))).astype(np.uint8)
    return pixels_HWC


def _table(columns: Sequence[str], data: list[list[Any]]) -> wandb.Table:
    import wandb

    return wandb.Table(columns=list(columns), data=data)


def _records(kind: type, items: Sequence[Any]) -> wandb.Table:
    return _table(*columns(kind, items))


def _cells(summary: Summary) -> wandb.Table:
    spreads = ("dice", "zoom_out", "surface_dice", "hd95", "volume_error")
    data = [
        [category, *setting.named, cell.n, cell.empty, *(_mean(getattr(cell, name)) for name in spreads), cell.seconds]
        for (category, setting), cell in summary.cells.items()
    ]
    return _table(["category", "prompt", "mode", "n", "empty", *spreads, "seconds"], data)


def _mean(spread: Any) -> float | None:
    return None if spread is None else spread.mean


def _overall(summary: Summary) -> dict[str, float]:
    """Return the figures that exist, under keys as `dice/zoom box(exact)+text`."""
    names = ("dice", "zoom_out", "surface_dice", "hd95", "seconds")
    return {
        f"{name}/{setting}": value
        for setting, overall in summary.overall.items()
        for name, value in ({name: getattr(overall, name) for name in names} | overall.custom).items()
        if value is not None
    }
