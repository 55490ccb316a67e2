"""Files that are whole or not there."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from segvol_pl.atomic import NoRoomError, atomic_path


def test_writers_with_one_process_number_do_not_meet(tmp_path: Path) -> None:
    """As in two containers, or on two hosts, that share the folder."""
    path = tmp_path / "file"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second and socket.gethostname() in first.name
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_the_file_before_stays(tmp_path: Path, full: int) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(NoRoomError, match=rf"^{path}: no space left on the disk.* MB free"), atomic_path(path) as part:
        part.write_text("half")
        raise OSError(full, "full")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
