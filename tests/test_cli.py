"""The program as users start it: exit status, and what stands on stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from factories import TINY, save_untrained

from segvol_pl import __version__
from segvol_pl.__main__ import COMMANDS, main
from segvol_pl.__main__ import _print_table as print_table
from segvol_pl.config import MISSING, SCHEMAS, OptimConfig, PretrainConfig
from segvol_pl.config.loader import fields_help
from segvol_pl.errors import OUT_OF_MEMORY
from segvol_pl.training.pretrain import SimMIMTask

ROOT = Path(__file__).parents[1]
TRAIN = ["train", "configs/tiny/train.yaml", "optim.max_steps=2", "track.wandb=disabled"]


def program(*arguments: str | Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python -m segvol_pl ARGUMENTS`, run in the root of the repository."""
    command = [sys.executable, *python, "-m", "segvol_pl", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def complaint(status: int, *arguments: str | Path) -> str:
    """The one line on stderr of a call that ends with `status` and prints nothing else."""
    done = program(*arguments)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("untrained") / "last.ckpt", ["liver"])


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As `segvol-pl train --help | head`."""
    command = [sys.executable, "-m", "segvol_pl", "train", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# ---- used wrongly: exit 2, at once ----


def imports_and_lines(*arguments: str | Path) -> tuple[set[str], list[str], int]:
    """The modules that a call imports, what it says on stderr, and its exit status."""
    done = program(*arguments, python=("-X", "importtime"))
    lines = done.stderr.splitlines()
    imported = {match[1] for line in lines if (match := re.match(r"import time:.*\|\s*([\w.]+)$", line))}
    return imported, [line for line in lines if not line.startswith("import time:")], done.returncode


def test_a_wrong_key_fails_before_anything_heavy_is_imported() -> None:
    arguments = ["train", "configs/tiny/train.yaml", "data.shards=x", "run.out=x", "optim.max_step=3"]
    imported, said, status = imports_and_lines(*arguments)
    assert status == 2
    assert said == ["segvol-pl train: error: unknown key optim.max_step (command line): did you mean optim.max_steps?"]
    assert {"yaml", "segvol_pl.config.loader"} <= imported
    assert not imported & {"torch", "lightning", "monai", "numpy", "transformers", "omegaconf"}


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_absent_shards_are_named_before_lightning_is_imported(tmp_path: Path, command: str) -> None:
    arguments = [command, f"configs/tiny/{command}.yaml", f"data.shards={tmp_path}/x", f"run.out={tmp_path}/out"]
    imported, said, status = imports_and_lines(*arguments, "optim.max_steps=2")
    assert (status, said) == (
        1,
        [f"segvol-pl {command}: error: {tmp_path}/x/index.json does not exist: run segvol-pl index {tmp_path}/x"],
    )
    assert "segvol_pl.data.store" in imported and not imported & {"torch", "lightning", "monai", "transformers"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "no command trian: did you mean train?"),
        (["xyzzy"], "no command xyzzy: there are demo, phantoms, inventory"),
        (["train", "--lr", "3"], "no option --lr"),
        (["train"], "missing data.shards=... optim.max_steps=... run.out=..."),
        (["train", "configs/trian.yaml"], "did you mean configs/train.yaml?"),
        (["verify"], "takes DIR, got nothing"),
        (["export", "only.ckpt"], "takes SRC DST"),
        (["config", "verify"], "'verify' has no configuration"),
    ],
)
def test_misuse_is_reported_in_one_line(arguments: list[str], expected: str) -> None:
    assert expected in complaint(2, *arguments)


def test_without_a_command_the_usage_is_shown() -> None:
    done = program()
    assert done.returncode == 2 and done.stdout == ""
    assert all(re.search(rf"^  {command} ", done.stderr, re.MULTILINE) for command in COMMANDS)


# ---- help ----


def test_the_version_is_shown() -> None:
    assert program("--version").stdout == f"segvol-pl {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = program(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: segvol-pl {command} ")
    if command in SCHEMAS:
        for field in fields_help(command):
            assert f"  {field.key}  (" in done.stdout and field.help in done.stdout


def test_the_resolved_configuration_is_yaml() -> None:
    done = program("config", "train", "configs/tiny/train.yaml", "optim.lr=0.5")
    assert (done.returncode, done.stderr) == (0, "")
    shown = yaml.safe_load(done.stdout)
    assert shown["data"]["shards"] == MISSING
    assert shown["model"]["hidden_size"] == 128 and shown["optim"]["lr"] == 0.5


# ---- tables ----


def test_a_table_in_a_pipe_has_all_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Wider than any terminal, with brackets that rich would take for markup."""
    rows = [{"name": "x" * 300, "what": "[bold] [1, 2]", "": "last " + "y" * 300}, {"name": "b", "what": "", "": 3}]
    print_table(rows)
    head, first, second = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert head.split() == ["name", "what"] and second.split() == ["b", "3"]
    assert first.split("  ") == ["x" * 300, "[bold] [1, 2]", "last " + "y" * 300]


def test_a_listing_in_a_pipe_has_one_line_per_row(phantom_shards: Path) -> None:
    done = program("inspect", phantom_shards)
    head, *rows = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "") and head.split()[:2] == ["key", "split"]
    index = json.loads((phantom_shards / "index.json").read_text(encoding="utf-8"))
    assert [row.split()[0] for row in rows] == [sample["key"] for sample in index["samples"]]
    assert max(map(len, rows)) > 80 and not any("…" in row for row in rows)


# ---- failed: exit 1, naming the file ----


def test_packing_a_missing_ct_names_it(tmp_path: Path) -> None:
    missing = tmp_path / "nobody.nii.gz"
    assert str(missing) in complaint(1, "pack", f"images={missing}", f"out={tmp_path / 'shards'}")


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    for arguments in (["verify", tmp_path], [*TRAIN, f"data.shards={tmp_path}", f"run.out={tmp_path / 'run'}"]):
        line = complaint(1, *arguments)
        assert str(tmp_path / "index.json") in line and "segvol-pl index" in line
    assert not (tmp_path / "run").exists()


def test_a_truncated_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    paths = [f"checkpoint={cut}", f"image={tmp_path / 'ct.nii.gz'}", f"out={tmp_path / 'mask.nii.gz'}"]
    line = complaint(1, "predict", *paths, "text=liver", "device=cpu")
    assert line.startswith(f"segvol-pl predict: error: {cut}: cannot be read") and "is it complete?" in line
    assert not (tmp_path / "mask.nii.gz").exists()


def test_a_pretraining_checkpoint_cannot_be_evaluated(phantom_shards: Path, tmp_path: Path) -> None:
    task = SimMIMTask(PretrainConfig(model=TINY, optim=OptimConfig(max_steps=1)))
    path = tmp_path / "pretrained.ckpt"
    torch.save({"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "global_step": 1}, path)
    line = complaint(1, *evaluation(path, phantom_shards, tmp_path))
    assert f"{path}: is a checkpoint of pretrain" in line


def test_weights_of_another_size_cannot_be_evaluated(checkpoint: Path, phantom_shards: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["config"]["model"]["mlp_dim"] *= 2
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    line = complaint(1, *evaluation(path, phantom_shards, tmp_path))
    assert f"{path} is of another model" in line and "mlp" in line


def test_an_encoder_of_another_size_cannot_be_trained_from(
    checkpoint: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    given = [f"data.shards={phantom_shards}", f"run.out={tmp_path / 'run'}", "prompts.pseudo_per_volume=0"]
    done = program(*TRAIN, *given, f"pretrained={checkpoint}")
    assert done.returncode == 1
    assert f"segvol-pl train: error: {checkpoint} is of another model" in done.stderr.splitlines()[-1]


def evaluation(checkpoint: Path, shards: Path, folder: Path) -> list[str]:
    return ["evaluate", f"checkpoint={checkpoint}", f"data.shards={shards}", f"out={folder / 'out'}", "device=cpu"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")])
def test_lack_of_memory_is_reported_with_a_remedy(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(arguments: list[str]) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "inspect", COMMANDS["inspect"]._replace(call=failing))
    assert main(["inspect", "shards"]) == OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert re.fullmatch(r"segvol-pl inspect: error: out of memory: (CUDA .* GiB: )?training takes less with .*\n", said)
