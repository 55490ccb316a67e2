"""What an index of a million samples costs: opening it, holding it, planning an epoch, starting loader processes.

    python benchmarks/large_index.py [samples=1000000] [out=FOLDER]

1. An index of that many samples in shards of 356 is written, as `segvol-pl index` writes it; the shards are not.
2. A new process opens it, states its samples as a training run does at its start, and plans an epoch. Seconds, and the
   memory that is private to the process, are printed; the rows themselves are pages of a file, shared by all processes.
3. One loader process for each way of starting it takes the first samples of an epoch, of this index and of one of
   20,000 samples: seconds, and its private memory. It locates the samples and reads nothing.
4. `overlap` on the index: seconds, and the most memory held.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig
from segvol_pl.data.batch import Batch
from segvol_pl.data.collate import Arrays, identity_collate
from segvol_pl.data.corpus import Folder, training_corpus
from segvol_pl.data.datamodule import corpus_summary, start_fork_server
from segvol_pl.data.sample_table import ABSENT, Names, SampleTable, row_dtype
from segvol_pl.data.schema import Member, Split
from segvol_pl.data.shard_index import Category, Index, Shard, load_index, write_index
from segvol_pl.data.store import Store
from segvol_pl.data.stream import BatchPlan, Stream
from segvol_pl.packing.duplicates import find_duplicates

PER_SHARD = 356
MEMBER_BYTES = 4_000_000


def large_index(samples: int) -> Index:
    """An index of samples that do not exist: 13 categories, every second sample labelled."""
    categories = [f"organ{number:02d}" for number in range(13)]
    shards = [f"ct-{number:05d}.tar" for number in range(-(-samples // PER_SHARD))]
    members = sorted(member.value for member in Member)
    names = Names(shards, sorted(split.value for split in Split), categories, members)
    rows = np.zeros(samples, row_dtype(names, key=20, content=64, facts_sha256=64))
    numbers, rng = np.arange(samples), np.random.default_rng(0)
    rows["key"] = np.char.mod("study-%012d", numbers)
    rows["shard"] = numbers // PER_SHARD
    rows["split"] = np.where(rng.random(samples) < 0.01, 0, len(names.splits) - 1)
    rows["labelled"] = numbers % 2
    rows["shape"], rows["spacing"] = (300, 512, 512), (1.0, 0.8, 0.8)
    rows["members"] = ABSENT
    places = np.arange(len(members)) * MEMBER_BYTES
    rows["members"][:, :, 0] = (numbers % PER_SHARD)[:, None] * MEMBER_BYTES * len(members) + places
    rows["members"][:, :, 1] = MEMBER_BYTES
    rows["categories"] = rng.integers(0, 256, (samples, rows["categories"].shape[1])) & (255, 248)
    for column in ("content", "facts_sha256"):
        rows[column] = [hashlib.sha256(f"{column} {number}".encode()).hexdigest().encode() for number in range(samples)]
    size = PER_SHARD * len(members) * MEMBER_BYTES
    table = SampleTable(names, rows)
    return Index(
        dataset="large",
        overview_shape=[32, 256, 256],
        shards=[Shard(name, size, "0" * 64, PER_SHARD) for name in shards],
        splits=table.per_split(),
        categories={name: Category([number + 1], samples // 4, 1) for number, name in enumerate(categories)},
        samples=table,
    )


def nothing(*_: Any) -> Arrays:
    """Draw a sample: none is drawn here."""
    raise AssertionError("nothing is read")


class Locating(Stream):
    """The stream without reading: a sample is the length of its key."""

    def sample(self, epoch: int, position: int, rows: np.ndarray) -> Arrays:
        _, record = self.corpus.located(int(rows[position]))
        return {"key": np.array(len(record.key)), "order": np.array(position)}


def private_mib(pid: int | str = "self") -> float:
    """Memory of a process that is its own: no page of a file."""
    held = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(held["Anonymous"].split()[0]) / 1024


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def opened(folder: Path) -> list[Folder]:
    """The folder without a comparison of sizes: its shards do not exist. It is a stat for each shard, once a node."""
    store = Store(folder)
    return [Folder(store, 1.0, load_index(store))]


def at_start(folder: Path) -> None:
    before = private_mib()
    seconds, folders = timed(functools.partial(opened, folder))
    print(f"open: {seconds:.2f} s, {private_mib() - before:.0f} MiB private")
    seconds, corpus = timed(lambda: training_corpus(folders, DataConfig(shards="x"), labelled=False))
    print(f"samples of the training split: {seconds:.3f} s ({corpus.num_volumes} of {len(folders[0].index.samples)})")
    seconds, _ = timed(lambda: [part.records.digest() for part in corpus.parts])
    print(f"compared between ranks: {seconds:.2f} s")
    seconds, _ = timed(lambda: corpus_summary(corpus))
    print(f"stated in a checkpoint: {seconds:.2f} s")
    stream = Stream(corpus, nothing, BatchPlan(corpus.num_samples, 4096))
    seconds, _ = timed(lambda: stream.rows(0))
    print(f"an epoch planned: {1000 * seconds:.0f} ms")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"then: {private_mib() - before:.0f} MiB private; at most {peak:.0f} MiB resident, the rows' pages included")


def first_batches(folder: Path, method: str) -> None:
    if method == "forkserver":
        start_fork_server()
        # Once a run it imports what loader processes need: wait until one has started and ended.
        first = multiprocessing.get_context("forkserver").Process(target=int)
        first.start()
        first.join()
    corpus = training_corpus(opened(folder), DataConfig(shards="x"), labelled=False)
    stream = Locating(corpus, nothing, BatchPlan(corpus.num_samples, 8))
    loader: DataLoader[Batch] = DataLoader(
        stream, None, num_workers=1, collate_fn=identity_collate, multiprocessing_context=method
    )
    started = time.perf_counter()
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - started
    (worker,) = (child for child in multiprocessing.active_children() if child.daemon)
    print(
        f"{method}, {corpus.num_volumes} volumes: first batch after {seconds:.2f} s, "
        f"{private_mib(worker.pid):.0f} MiB private in its process"
    )


def commands(folder: Path) -> None:
    seconds, _ = timed(lambda: find_duplicates([folder]))
    print(f"overlap: {seconds:.1f} s, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def alone(step: Callable[..., None], *arguments: Any) -> None:
    """Run a step in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=step, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{step.__name__} ended with status {process.exitcode}")


def write(folder: Path, samples: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    seconds, _ = timed(lambda: write_index(folder, large_index(samples)))
    sizes = ", ".join(f"{path.stat().st_size / 1e6:.1f} MB of {path.suffix}" for path in sorted(folder.iterdir()))
    print(f"{samples} samples, made in {seconds:.0f} s: {sizes}")
    return folder


def main(out: Path, samples: int) -> None:
    large, small = write(out / "large", samples), write(out / "small", 20_000)
    alone(at_start, large)
    for method in ("fork", "forkserver", "spawn"):
        for folder in (small, large):
            alone(first_batches, folder, method)
    alone(commands, large)


if __name__ == "__main__":
    keys = dict(argument.split("=", 1) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(keys.get("out", temporary)), int(keys.get("samples", 1_000_000)))
