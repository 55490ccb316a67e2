"""Volumes/s of the stream from a local disk, HTTP and S3, by 1, 2 and 4 loader processes and by the store's latency.

    python benchmarks/remote.py OUT [--rounds 3] [--seconds 3] [--write docs/reference/performance.md]
    python benchmarks/remote.py OUT --small    # tiny volumes, to try the script out

OUT is the folder of `benchmarks/peers.py`, whose corpus is made unless it is there. One server on loopback, a process
of its own, waits before each response for 0, 5 or 50 ms. The S3 rows read from it with s3fs: it answers the ranged
requests that the stream makes. It runs on the same cores as the loaders, which limits the rows without latency.
A sample is one of training: half are overviews, half crops, each with 4 categories and 6 pseudo-labels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from itertools import islice
from pathlib import Path

from loader_processes import loader_of
from peers import FULL, SMALL, Size, prepare
from peers_own import Crops
from peers_turn import form_of
from ranged_server import serving
from results import Column, host, markdown, record, write_between

from segvol_pl.config import SegVolConfig
from segvol_pl.data.store import ShardSource

PROCESSES = (1, 2, 4)
LATENCIES = (0, 5, 50)
"""Milliseconds."""

SECTION = """## From remote stores

`python benchmarks/remote.py OUT --write docs/reference/performance.md` wrote this table. The server is on loopback and
waits before each response. It shares the cores with the loaders."""

Place = tuple[str, int]
"""disk, HTTP or S3, and the latency."""

PLACES: list[Place] = [("disk", 0), *((kind, latency) for kind in ("HTTP", "S3") for latency in LATENCIES)]


def s3_settings(address: str) -> dict[str, str]:
    """The environment in which an S3 client reads from the server."""
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": address}


def rate(source: ShardSource, size: Size, processes: int, seconds: float) -> float:
    """Volumes/s that arrive from loader processes, once each of them has delivered."""
    batches = iter(loader_of(source, SegVolConfig(input_shape=list(size.window)), 1, processes))
    for _ in islice(batches, 4 * processes):
        pass
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - started)


def measure(shards: Path, size: Size, rounds: int, seconds: float) -> dict[Place, list[float]]:
    """Place -> volumes/s for each number of processes, medians over rounds."""
    found: dict[tuple[Place, int], list[float]] = {}
    with serving(shards) as served:
        os.environ.update(s3_settings(served.url))
        roots = {"HTTP": served.url, "S3": "s3:/"}
        for _ in range(rounds):
            for place in PLACES:
                kind, latency = place
                source = f"{roots[kind]}/{latency:03d}" if kind in roots else shards
                for processes in PROCESSES:
                    found.setdefault((place, processes), []).append(rate(source, size, processes, seconds))
    return {place: [statistics.median(found[place, processes]) for processes in PROCESSES] for place in PLACES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement, default 3")
    parser.add_argument("--small", action="store_true", help="tiny volumes")
    parser.add_argument("--write", default="", help="a page with the table's markers, which is given the table")
    arguments = parser.parse_args()
    # More loader processes than cores are meant: they wait for the store.
    warnings.filterwarnings("ignore", message=".*worker processes in total.*")
    size = SMALL if arguments.small else FULL
    corpus = prepare(arguments.out.resolve() / ("small" if arguments.small else "full"), size)
    rates = measure(form_of(corpus, Crops()), size, arguments.rounds, arguments.seconds)
    processes = [f"{count} process{'es' if count > 1 else ''}" for count in PROCESSES]
    columns = [Column("store", right=False), Column("added latency, ms"), *map(Column, processes)]
    rows = [[kind, str(latency), *(f"{one:.1f}" for one in found)] for (kind, latency), found in rates.items()]
    heading = (
        f"Volumes/s of training samples from volumes of {' x '.join(map(str, size.shape))} voxels, {host()['cores']} "
        f"cores of {host()['processor']} for loaders and server, medians of {arguments.rounds} rounds:"
    )
    lines = [heading, "", *markdown(columns, rows)]
    print("\n".join(lines))
    if arguments.write:
        write_between(Path(arguments.write), "remote", [SECTION, "", *lines])
        record("remote", {f"{kind} {latency} ms": found for (kind, latency), found in rates.items()})


if __name__ == "__main__":
    main()
