"""The coordinate check: activations after ten steps are of one size at all widths with muP, and are not without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from segvol_pl.__main__ import main
from segvol_pl.config import Transfer
from segvol_pl.errors import ConfigError
from segvol_pl.planning.plan import plan
from segvol_pl.training import coordinates
from segvol_pl.training.coordinates import FLAT, WIDTHS, Coordinates, measured

TINY = Path(__file__).parents[2] / "configs" / "tiny"
# Of a file with keys of both commands `plan` takes the one whose own keys are given.
PRETRAIN, TRAIN = [str(TINY / "pretrain.yaml"), "mask_ratio=0.6"], [str(TINY / "train.yaml")]
COMMANDS = pytest.mark.parametrize("keys", [PRETRAIN, pytest.param(TRAIN, marks=pytest.mark.slow)])


def checked(keys: list[str], transfer: Transfer) -> Coordinates:
    config = plan([*keys, "coordinates=true"]).config
    return measured(replace(config, optim=replace(config.optim, transfer=transfer)))


@COMMANDS
def test_activations_are_flat_over_widths_64_to_512_with_mup(keys: list[str]) -> None:
    found = checked(keys, Transfer.mup)
    assert tuple(found.widths) == WIDTHS == (64, 128, 256, 512) and len(found.sizes) > 3
    assert {layer: found.ratio(layer) for layer in found.uneven} == {}


@COMMANDS
def test_and_are_not_without_it(keys: list[str]) -> None:
    found = checked(keys, Transfer.none)
    assert len(found.uneven) > 1 and max(map(found.ratio, found.sizes)) > 1.5 * FLAT


def test_the_command_prints_a_table_and_names_what_is_not_flat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"encoder.blocks.0": [1.0, 1.1, 1.3, 1.2], "head": [0.5, 0.5, 0.5, 0.5]}
    monkeypatch.setattr(coordinates, "measured", lambda config: Coordinates(config.optim.transfer, WIDTHS, dict(sizes)))
    assert main(["plan", *TRAIN, "coordinates=true"]) == 0
    head, columns, block, last, verdict = capsys.readouterr().out.splitlines()
    assert head.endswith("optim.transfer=none") and columns.split()[1:5] == ["64", "128", "256", "512"]
    assert block.endswith("1.30  not flat") and last.endswith("1.00") and "encoder.blocks.0" in verdict
    del sizes["encoder.blocks.0"]
    assert main(["plan", *TRAIN, "coordinates=true", "optim.transfer=mup"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("flat (at most 1.2)")


def test_the_check_is_requested_by_true_or_false() -> None:
    assert not plan([*TRAIN, "coordinates=false", "optim.max_steps=10"]).coordinates
    with pytest.raises(ConfigError, match="coordinates: 'yes' is neither true nor false"):
        plan([*TRAIN, "coordinates=yes"])
