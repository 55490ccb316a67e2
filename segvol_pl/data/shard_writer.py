"""Write shards: ordinary WebDataset tars whose arrays are Blosc2 frames, see `frames`.

The format is promised in shards/README.md. `index_builder` then makes the index, with which a sample is a ranged read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import webdataset

from segvol_pl.atomic import atomic_path
from segvol_pl.data.schema import Member, Sample


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar of the samples, their members in the order of `Member`. Equal samples give equal bytes.

    It is written under a temporary name in the same folder, then renamed.
    """
    with atomic_path(path) as part, part.open("wb") as stream:
        _write_tar(stream, samples)
        stream.flush()
        os.fsync(stream.fileno())


def _write_tar(stream: IO[bytes], samples: Iterable[Sample]) -> None:
    fixed = {"user": "segvol_pl", "group": "segvol_pl", "mode": 0o644, "mtime": 0}
    with webdataset.TarWriter(stream, encoder=False, **fixed) as writer:
        for sample in samples:
            for member in Member:
                # The writer sorts the members of one call by name: one call per member keeps the order of `Member`.
                if member in sample.members:
                    writer.write({"__key__": sample.key, member.value: sample.members[member]})
