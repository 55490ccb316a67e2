"""Milliseconds and requests that a training sample takes from a distant store, by how its parts are requested.

    python benchmarks/remote_reads.py [CT_FOLDER] [samples=40] [latency=0.05]

The volume is that of `loader.py`, behind HTTP on this machine with `latency` seconds before each response. One process
reads one sample after another: loader processes read several at once, and hide most of it.

- from disk: as training reads, from the folder itself
- member by member: CT, label map and regions one after another, each with a request per run of chunks
- together: all that the sample needs at once, after its facts
- together, merged: neighbours in one request, as training reads
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from loader import packed
from ranged_server import Served, serving
from results import record
from rich.console import Console
from rich.table import Table

from segvol_pl.config import DataConfig, PromptConfig, SegVolConfig
from segvol_pl.data import sampling, shard_reader, store, stream
from segvol_pl.data.collate import Arrays
from segvol_pl.data.corpus import open_folders, training_corpus
from segvol_pl.data.frames import Slices, decode_alone
from segvol_pl.data.sample_table import SampleRecord
from segvol_pl.data.schema import Facts, Member
from segvol_pl.data.shard_reader import read_slices
from segvol_pl.data.store import Store

MERGE_GAP = store.MERGE_GAP


def one_by_one(
    place: Store, sample: SampleRecord, facts: Facts, wanted: Mapping[Member, Slices]
) -> dict[Member, np.ndarray]:
    """Read the slices one after another."""
    return {member: shard_reader.read_array(place, sample, facts, member)[slices] for member, slices in wanted.items()}


WAYS = {
    "from disk": (True, read_slices, MERGE_GAP),
    "member by member": (False, one_by_one, -1),
    "together": (False, read_slices, -1),
    "together, merged": (False, read_slices, MERGE_GAP),
}
"""Name -> whether from disk, how to read slices, and the gap up to which ranges are merged (bytes; -1: never)."""


def stream_of(place: str, samples: int) -> stream.Stream:
    """Samples of the folder: half overviews, half crops, with 8 categories each."""
    data = DataConfig(shards=place, overview_fraction=0.5)
    (folder,) = folders = open_folders(data)
    rows = {category: row for row, category in enumerate(sorted(folder.index.categories))}
    draw = functools.partial(
        sampling.sample_segmentation,
        model=SegVolConfig(),
        data=data,
        prompts=PromptConfig(categories_per_volume=8),
        row_of=rows,
    )
    return stream.Stream(training_corpus(folders, data, labelled=True), draw, stream.BatchPlan(samples, 1))


def timed(source: stream.Stream, position: int) -> tuple[float, Arrays]:
    """Seconds of one sample, and what it holds."""
    order, started = source.rows(0), time.perf_counter()
    found = source.sample(0, position, order)
    return time.perf_counter() - started, found


def measure(folder: Path, served: Served, samples: int, latency: float) -> dict[str, tuple[float, float, float]]:
    """Way -> milliseconds (median), requests and MB a sample. The ways take turns, sample by sample."""
    near, far = stream_of(str(folder), samples), stream_of(f"{served.url}/{1000 * latency:g}", samples)
    timed(near, 0), timed(far, 0)  # numba compiles, connections open
    served.requests()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    counts = {name: np.zeros(2) for name in WAYS}
    for position in range(samples):
        alike = []
        for name, (local, read, gap) in WAYS.items():
            stream.read_slices, store.MERGE_GAP = read, gap  # type: ignore[assignment]
            took, found = timed(near if local else far, position)
            seconds[name].append(took)
            counts[name] += served.requests()
            alike.append(b"".join(array.tobytes() for _, array in sorted(found.items())))
        assert len(set(alike)) == 1, "all ways read the same"
    return {
        name: (1000 * float(np.median(seconds[name])), counts[name][0] / samples, counts[name][1] / samples / 1e6)
        for name in WAYS
    }


def main(source: Path, samples: int, latency: float) -> None:
    torch.set_num_threads(1)
    decode_alone()
    with tempfile.TemporaryDirectory() as name:
        folder = packed(source, Path(name))
        with serving(folder) as served:
            figures = measure(folder, served, samples, latency)
    table = Table(title=f"{samples} samples, {1000 * latency:.0f} ms before each response")
    for column in ("read", "ms a sample", "requests", "MB"):
        table.add_column(column, justify="left" if column == "read" else "right")
    for way, (milliseconds, requests, size) in figures.items():
        table.add_row(way, f"{milliseconds:.0f}", f"{requests:.1f}", f"{size:.2f}")
    Console().print(table)
    kept = {
        f"{way.replace(', ', '_').replace(' ', '_')}_{unit}": value
        for way, values in figures.items()
        for unit, value in zip(("ms", "requests", "mb"), values, strict=True)
    }
    record("remote_reads", {"latency_ms": 1000 * latency, **kept})


if __name__ == "__main__":
    keys = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    main(
        Path(folders[0] if folders else "../shared/ct"), int(keys.get("samples", 40)), float(keys.get("latency", 0.05))
    )
