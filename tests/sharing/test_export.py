"""The command `export`: files and folders, complete or absent, with the permissions of other files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from factories import save_untrained

from segvol_pl.__main__ import main
from segvol_pl.model.checkpoint import read_weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("untrained") / "last.ckpt", ["liver"])


def test_a_folder_holds_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), str(tmp_path / "liver")]) == 0
    (written,) = (tmp_path / "liver").iterdir()
    ours, theirs = read_weights(checkpoint).tensors, read_weights(written).tensors
    assert written.name == "model.safetensors" and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [path.name for path in tmp_path.iterdir()] == ["liver"]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, (0o755, 0o644)), (0o027, (0o750, 0o640))])
def test_what_is_written_is_as_readable_as_other_files(
    umask: int, expected: tuple[int, int], checkpoint: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        assert main(["export", str(checkpoint), str(tmp_path / "model.safetensors")]) == 0
        assert main(["export", str(checkpoint), str(tmp_path / "folder")]) == 0
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(modes) == 3 and {mode for path, mode in modes.items() if path.suffix} == {expected[1]}
    assert modes[Path("folder")] == expected[0]


@pytest.mark.parametrize(
    ("keys", "said", "status"),
    [
        (["FOLDER/full"], "full is there already: give a new folder, or remove it", 1),
        (["FOLDER/model.onnx"], "must end in .safetensors or .pth, or be a folder with format=safetensors", 1),
        (["FOLDER/model.pth", "format=onnx"], "format (command line): onnx is a folder, ", 2),
        (["FOLDER/new", "published=SegVol_v1.pth"], "published (command line): is for a file", 2),
        (["out=FOLDER/new", "format=tflite"], "'tflite' is none of auto, safetensors, onnx, monai", 2),
        (["a", "b", "c"], "takes SRC DST [PUBLISHED], then KEY=VALUE, got ", 2),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    keys: list[str], said: str, status: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", str(checkpoint), *(key.replace("FOLDER", str(tmp_path)) for key in keys)]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
