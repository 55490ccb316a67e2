"""The cluster that tests of jobs share: two nodes that claim a GPU each, or `NODES` of the test module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm.lab import SlurmLab, available


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmLab]:
    if reason := available():
        pytest.skip(reason)
    with SlurmLab(tmp_path_factory.mktemp("lab"), nodes=getattr(request.module, "NODES", 2), gpus=1) as lab:
        yield lab
