"""Runs next to each other: figures, and the keys in which they differ, as a table, CSV and a page."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from factories import train_config

from segvol_pl import journal
from segvol_pl.__main__ import main
from segvol_pl.config import RunsConfig
from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import Cause, ConfigError
from segvol_pl.journal import Journal, Mark
from segvol_pl.run_table import table


def write_run(out: Path, lr: float, metrics: str = "") -> Path:
    out.mkdir(parents=True)
    config = train_config(Path("shards"), out, steps=100)
    config = replace(config, optim=replace(config.optim, lr=lr))
    config = replace(config, prompts=replace(config.prompts, combinations=["text", "box"]))
    (out / "config.yaml").write_text(to_yaml(config))
    written = Journal(out, rank=0)
    written.start(0, 100, resume=True)
    written.end(Cause.done, Mark(journal.read(out)[0].start.at + 3600, 100), "<b>all done</b>")
    if metrics:
        (out / "metrics.csv").write_text("step,metric,value\n" + metrics)
    return out


METRICS = (
    "10,rate/volumes_per_s,2\n20,rate/volumes_per_s,2.5\n50,val/loss,0.9\n100,val/loss,1.1\n"
    "50,val/dice/text,0.6\n50,val/dice/box,0.8\n50,val/dice/text/liver,1.0\n100,val/dice/text,0.9\n"
    "100,val/dice/box,0.3\n75,val/dice/text,1.0\n"
)


def test_figures_and_only_the_keys_that_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1e-3, METRICS)
    write_run(tmp_path / "b", 1e-4)
    first, second = table(RunsConfig(folders=[str(tmp_path)]))
    assert first["volumes/s"] == "2.5" and first["val/loss"] == "0.9000"
    assert first["best Dice"] == "0.7000 (50)", "step 75 has no Dice by box"
    assert (second["volumes/s"], second["best Dice"]) == ("", "")
    assert (first["state"], first["step"]) == ("done", "100/100")
    differing = [name for name in first if "." in name]
    assert differing == ["optim.lr"] and (first["optim.lr"], second["optim.lr"]) == ("0.001", "0.0001")
    assert list(first) == list(second)


def test_a_key_that_a_run_does_not_have_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1e-3)
    older = write_run(tmp_path / "b", 1e-3) / "config.yaml"
    older.write_text("".join(line for line in older.read_text().splitlines(True) if "tensorboard" not in line))
    rows = table(RunsConfig(folders=[str(tmp_path)]))
    assert [row["track.tensorboard"] for row in rows] == ["false", "-"]
    older.write_text("- no\n- configuration\n")
    with pytest.raises(ConfigError, match=r"b/config.yaml: is not a configuration"):
        table(RunsConfig(folders=[str(tmp_path)]))


def test_the_table_as_text_csv_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, lr in (("a", 1e-3), ("b", 1e-4)):
        write_run(tmp_path / name, lr, METRICS)
    assert main(["runs", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out.splitlines()
    assert "optim.lr" in text[0] and "0.7000 (50)" in text[1]
    for ending in ("csv", "html"):
        assert main(["runs", str(tmp_path), f"out={tmp_path / f'runs.{ending}'}"]) == 0
    with (tmp_path / "runs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["optim.lr"] for row in rows] == ["0.001", "0.0001"] and rows[0]["why it ended"] == "<b>all done</b>"
    page = (tmp_path / "runs.html").read_text()
    assert "&lt;b&gt;all done&lt;/b&gt;" in page and "<b>all" not in page and "<th>optim.lr</th>" in page
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "out=runs.pdf"]) == 2
    assert "out (command line): 'runs.pdf' must end in .csv or .html" in capsys.readouterr().err
