"""Shell completion, by a real bash; the scripts of the other shells are read as far as they are installed here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from segvol_pl import __main__ as program
from segvol_pl.completion import SHELLS, script, words_of
from segvol_pl.errors import ConfigError

COMMANDS = {name: command.summary for name, command in program.COMMANDS.items()}
ASK = """
source "$1"
COMP_LINE=$2 COMP_POINT=${#2}
[[ $3 == joined ]] && COMP_WORDBREAKS=' ' || COMP_WORDBREAKS=$' \\t\\n=:'
_segvol_pl
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "segvol-pl.bash"
    path.write_text(script("bash", COMMANDS))
    return path


def completed(file: Path, line: str, folder: Path | None = None, how: str = "split") -> list[str]:
    command = ["bash", "--norc", "-c", ASK, "bash", str(file), line, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder or file.parent)
    assert not done.stderr.replace("bash: line 1: compopt: not currently executing completion function\n", "")
    return done.stdout.split()


def test_commands_keys_and_choices_are_completed(file: Path) -> None:
    assert completed(file, "segvol-pl pre") == ["pretrain", "predict"]
    assert set(COMMANDS) <= set(completed(file, "segvol-pl "))
    assert completed(file, "segvol-pl train optim.sch") == ["optim.schedule="]
    assert completed(file, "segvol-pl train run.strategy=fs") == ["fsdp"]
    assert completed(file, "segvol-pl train run.strategy=fs", how="joined") == ["run.strategy=fsdp"]
    assert {"true", "false"} == set(completed(file, "segvol-pl train a.yaml track.tensorboard="))
    assert completed(file, "segvol-pl scaling fi") == ["fit"]
    assert completed(file, "segvol-pl completion z") == ["zsh"]
    assert "optim.lr=" in completed(file, "segvol-pl plan optim.l")
    assert completed(file, "segvol-pl predict --d") == ["--debug"]


def test_every_key_of_every_command_is_a_word() -> None:
    for name, schema in (("train", "train"), ("scaling", "scaling mix"), ("challenge", "challenge predict")):
        assert {f"{field.key}=" for field in program.loader.fields_help(schema)} <= set(words_of(name))


def test_files_are_completed_as_words_and_as_values(file: Path, tmp_path: Path) -> None:
    (tmp_path / "train mine.yaml").touch()
    (tmp_path / "shards").mkdir()
    assert completed(file, "segvol-pl train sha", tmp_path) == ["shards"]
    assert completed(file, "segvol-pl train data.shards=sha", tmp_path) == ["shards"]
    assert completed(file, "segvol-pl train data.shards=sha", tmp_path, "joined") == ["data.shards=shards"]


def test_bash_offers_a_key_at_the_keyboard(file: Path) -> None:
    """An interactive bash, to which a tab is typed."""
    typed = f'source {file}\nsegvol-pl() {{ echo "<$1>"; }}\nsegvol-pl compl\t\nexit\n'
    done = subprocess.run(["bash", "--norc", "-i"], input=typed, capture_output=True, text=True, check=False)
    assert "<completion>" in done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    """Printed by the command, which imports no torch."""
    code = (
        f"import sys; from segvol_pl.__main__ import main; status = main(['completion', {shell!r}]);"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run.strategy=fsdp" in done.stdout and "pretrain" in done.stdout
    (tmp_path / "script").write_text(done.stdout)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_another_shell_is_named() -> None:
    with pytest.raises(ConfigError, match="csh: is none of bash, zsh, fish"):
        script("csh", COMMANDS)
