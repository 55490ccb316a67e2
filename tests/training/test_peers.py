"""Of the ranks of a run that fails, one reports why."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from factories import train_config
from ranks import Ranks

from segvol_pl.config.loader import to_yaml
from segvol_pl.errors import FAILED
from segvol_pl.training.peers import connection_broke, gone_ranks

FAILING = """
import os
from segvol_pl.training.segment import SegVolTask
if os.environ["LOCAL_RANK"] == "1":
    compute = SegVolTask.training_step
    def training_step(self, batch, index):
        if self.global_step == 1:
            {act}
        return compute(self, batch, index)
    SegVolTask.training_step = training_step
"""


@pytest.mark.parametrize(
    ("act", "status", "line"),
    [
        ("raise ValueError('a fault of rank 1')", FAILED, "error: unexpected ValueError: a fault of rank 1"),
        ("os.kill(os.getpid(), 9)", -9, f"error: rank 1 on {socket.gethostname()} (process "),
    ],
)
def test_one_line_over_the_logs_of_all_ranks_says_why(
    phantom_shards: Path, tmp_path: Path, ranks: dict[int, Ranks], act: str, status: int, line: str
) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(train_config(phantom_shards, tmp_path / "run", steps=3)))
    statuses, said = ranks[2].ended("train", str(tmp_path / "run.yaml"), patch=FAILING.format(act=act))
    assert statuses == [FAILED, status], said
    (complaint,) = (text for log in said for text in log.splitlines() if "error" in text)
    assert line in complaint


@pytest.mark.parametrize(
    ("error", "broke"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_errors_of_broken_connections_are_known(error: Exception, broke: bool) -> None:
    assert connection_broke(error) is broke


def test_ranks_of_this_host_that_have_ended_are_gone(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, other = socket.gethostname(), "another-host"
    for rank, (place, pid) in enumerate([(host, os.getpid()), (host, ended.pid), (other, ended.pid), (host, None)]):
        text = json.dumps({"rank": rank, "host": place, "pid": pid}) if pid else "{"
        (tmp_path / f"rank-{rank}.json").write_text(text)
    assert [place["rank"] for place in gone_ranks(tmp_path, ranks=5)] == [1]
