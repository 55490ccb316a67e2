"""The coordinate check: activations after ten steps are of one size at all widths with muP, and are not without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from segvol_pl.__main__ import main
from segvol_pl.config import Transfer, loader
from segvol_pl.errors import ConfigError
from segvol_pl.planning.plan import plan
from segvol_pl.training.coordinates import FLAT, Coordinates, lines, measured

TINY = Path(__file__).parents[2] / "configs" / "tiny"
COMMANDS = pytest.mark.parametrize("command", ["pretrain", "train"])


def checked(command: str, transfer: Transfer) -> Coordinates:
    config = plan([str(TINY / f"{command}.yaml")]).config
    return measured(replace(config, optim=replace(config.optim, transfer=transfer)))


@COMMANDS
def test_activations_are_flat_over_widths_64_to_512_with_mup(command: str) -> None:
    found = checked(command, Transfer.mup)
    assert list(found.widths) == [64, 128, 256, 512] and len(found.sizes) > 3
    assert {layer: found.ratio(layer) for layer in found.uneven} == {}


@COMMANDS
def test_and_are_not_without_it(command: str) -> None:
    found = checked(command, Transfer.none)
    assert len(found.uneven) > 1 and max(map(found.ratio, found.sizes)) > 1.5 * FLAT
