"""What `segvol-pl doctor` says of a machine: this one, and ones that lack something."""

from __future__ import annotations

import importlib.metadata
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from segvol_pl import doctor
from segvol_pl.__main__ import main
from segvol_pl.doctor import FAIL, NOTE, OK, Finding
from segvol_pl.training import out_of_memory

Usage = namedtuple("Usage", "total used free")


def test_this_machine_can_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that tests need is here; a SLURM that does not run is told."""
    status = main(["doctor", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    states = {line[6:20].strip(): line[:5].strip() for line in lines}
    assert {states[what] for what in ("python", "packages", "memory", "two ranks", "folder")} == {OK}
    assert list(tmp_path.iterdir()) == []
    failed = sum(line.startswith(FAIL) for line in lines)
    assert lines[-1] == f"{failed} of {len(lines) - 1} checks failed" and status == min(failed, 1)
    assert failed == (states["slurm"] == FAIL)


def test_packages_that_are_missing_or_of_another_version_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = [
        "torch>=99",
        "nobodys-package>=2",
        "numpy>=1",
        "nobodys-extra; extra == 'viewer'",
        "old; python_version < '3'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: stated)
    found = [finding for finding in doctor.examine([]) if finding.what != "python"]
    torch, nobody, extra, rest = found
    assert torch.state == FAIL and torch.said.endswith(" is not >=99: pip install 'torch>=99'")
    assert nobody == Finding(FAIL, "packages", "nobodys-package is not installed: pip install 'nobodys-package>=2'")
    assert extra.state == NOTE and extra.what == "[viewer]" and "nobodys-extra is not installed" in extra.said
    assert rest == Finding(NOTE, "the rest", "is checked when the packages are right")


@pytest.mark.parametrize(
    ("listed", "cuda", "hidden", "state", "said"),
    [
        ([], "12.8", None, NOTE, "runs compute on the CPU"),
        ([["H100", "550.1"]], None, None, FAIL, "is built for CPUs alone: install a torch that is built for CUDA"),
        ([["H100", "550.1"]], "12.8", "", FAIL, "hidden by CUDA_VISIBLE_DEVICES=: ask SLURM"),
        ([["H100", "470.1"]], "12.8", None, FAIL, "cannot use driver 470.1: update the driver"),
    ],
)
def test_why_torch_sees_no_gpu(
    listed: list[list[str]],
    cuda: str | None,
    hidden: str | None,
    state: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    finding = doctor._no_gpu(listed, "2.13.0", cuda)
    assert finding.state == state and said in finding.said


def test_ranks_that_cannot_meet_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nobody0")
    finding = doctor._exchange()
    assert finding.state == FAIL and "nobody0" in finding.said and finding.said.endswith("(slurm/env.sh)")


def test_a_host_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "nobody.invalid")
    monkeypatch.setattr(doctor, "_exchange", lambda: Finding(OK, "two ranks", ""))
    first = next(doctor.check_network())
    assert first.state == FAIL and first.said.startswith("nobody.invalid has no address: add it to /etc/hosts")


@pytest.mark.parametrize(("answer", "state"), [("Slurmctld(primary) at head is UP", OK), ("", FAIL)])
def test_a_slurm_that_does_not_answer_is_told(
    answer: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, says in (("sbatch", "slurm 23.11.4"), ("scontrol", answer)):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (finding,) = doctor.check_slurm()
    assert finding.state == state and ("slurm 23.11.4; " in finding.said) == (state == OK)


def test_limits_of_a_container_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text("4096\n")
    (tmp_path / "memory.stat").write_text("file 0\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(out_of_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(out_of_memory, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(2**26, 0, 2**26))
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    (cores,) = doctor.check_cores()
    memory, shared = doctor.check_memory()
    assert cores.state == NOTE and cores.said.startswith("1 of 64 may be used here")
    assert memory.said.startswith("1 GiB of ")
    assert shared.state == FAIL and "has 0.06 GiB free" in shared.said and "--shm-size" in shared.said


def test_folders_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor.check_folder(tmp_path / "file" / "runs").state == FAIL
    assert doctor.check_folder(Path("/proc/segvol")).said.startswith("/proc/segvol: cannot be written")
    made = doctor.check_folder(tmp_path / "a" / "b")
    assert made.state in (OK, NOTE) and made.said.endswith(f"GiB free, will be made in {tmp_path}")
