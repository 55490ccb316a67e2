"""What every loader of `benchmarks/peers.py` shares: the corpus on disk, and one turn of measuring a loader.

A turn is a process of its own, pinned to one core. It opens the loader, draws a few samples and compares their voxels
with the raw arrays, prints `ready`, waits for a line, draws samples for some seconds, and prints its figures as JSON.

Imports nothing of segvol_pl: the peers run in an environment without it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from resident import resident

CHECKED = 3
"""Samples whose voxels are compared before a turn."""
WARM_SECONDS = 0.7
LEAST_SAMPLES = 3
"""Of a turn, however long they take."""

DONE = ".done"
"""A file that is written last into the folder of a format."""

Start = tuple[int, int, int]
"""First voxel (d, h, w) of a window."""


@dataclass(frozen=True)
class Crop:
    """A sample: the image float32 in [0, 1] and the label map of a window, each (1,1,D,H,W)."""

    volume: str
    start: Start
    image_BCDHW: Any
    label_BCDHW: Any


class Loader(Protocol):
    """One way to load crops."""

    package: str
    """The distribution whose version the table states."""
    form: str
    """The folder of its format, which several loaders may share."""

    def convert(self, corpus: Corpus, folder: Path) -> None:
        """Write the volumes of the corpus into `folder`, in this loader's format."""

    def open(self, corpus: Corpus, folder: Path) -> None:
        """Prepare to draw samples."""

    def sample(self) -> Crop | None:
        """Draw the next sample; None if its voxels cannot be compared, because they are augmented."""


@dataclass(frozen=True)
class Corpus:
    """The folder that `benchmarks/peers.py` prepares: raw arrays, how to normalise them, and the windows to draw.

    Args:
        folder: holds corpus.json, raw/KEY.ct.npy (int16), raw/KEY.label.npy (uint8), and forms/, a folder for each
            format.
    """

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """window; volumes: key -> low, high, anchors (label value -> voxels); windows: key -> starts."""
        facts: dict[str, Any] = json.loads((self.folder / "corpus.json").read_text())
        return facts

    @property
    def keys(self) -> list[str]:
        return list(self.facts["volumes"])

    @property
    def window(self) -> list[int]:
        """(D,H,W) of a crop."""
        window: list[int] = self.facts["window"]
        return window

    def raw(self, key: str, role: str) -> np.ndarray:
        """The volume's `ct` or `label` (D,H,W), mapped from disk."""
        return np.load(self.folder / "raw" / f"{key}.{role}.npy", mmap_mode="r")

    def normalise(self, key: str, hu: np.ndarray) -> np.ndarray:
        """HU to float32 in [0, 1], as segvol_pl does."""
        low, high = self.facts["volumes"][key]["low"], self.facts["volumes"][key]["high"]
        image = (hu.astype(np.float32) - low) / (high - low)
        return np.clip(image, 0.0, 1.0, out=image)

    def slices(self, start: Start) -> tuple[slice, ...]:
        return tuple(slice(first, first + size) for first, size in zip(start, self.window, strict=True))

    def crop(self, key: str, start: Start, hu_DHW: np.ndarray, label_DHW: np.ndarray) -> Crop:
        """The sample of a window's HU and labels."""
        return Crop(key, start, self.normalise(key, hu_DHW)[None, None], label_DHW[None, None])

    def windows(self) -> Iterator[tuple[str, Start]]:
        """Windows of volumes in random order, without end, as segvol_pl draws them."""
        starts = {key: self.starts(key) for key in self.keys}
        rng = np.random.default_rng(0)
        while True:
            for number in rng.permutation(len(self.keys)):
                key = self.keys[number]
                yield key, next(starts[key])

    def starts(self, key: str) -> Iterator[Start]:
        """Windows of one volume, without end."""
        return itertools.cycle(tuple(start) for start in self.facts["windows"][key])

    def differs(self, crop: Crop) -> str:
        """How a sample's voxels differ from the raw arrays; empty if they do not."""
        before = [max(-first, 0) for first in crop.start]
        inside = tuple(slice(max(part.start, 0), part.stop) for part in self.slices(crop.start))
        hu_DHW, label_DHW = (np.asarray(self.raw(crop.volume, role)[inside]) for role in ("ct", "label"))
        # nnU-Net's windows may reach beyond the volume: there it pads the image with 0 and the labels with -1.
        pad = [
            (first, size - first - have) for first, size, have in zip(before, self.window, hu_DHW.shape, strict=True)
        ]
        image_DHW = np.pad(self.normalise(crop.volume, hu_DHW), pad)
        found_DHW, labels_DHW = np.asarray(crop.image_BCDHW)[0, 0], np.asarray(crop.label_BCDHW)[0, 0]
        if found_DHW.dtype != np.float32 or found_DHW.shape != image_DHW.shape:
            return f"its image is {found_DHW.dtype} {found_DHW.shape}, not float32 {image_DHW.shape}"
        if not np.allclose(found_DHW, image_DHW, rtol=0, atol=1e-6):
            return f"its image differs by up to {np.abs(found_DHW - image_DHW).max():.2g}"
        wrong = int((np.maximum(labels_DHW, 0) != np.pad(label_DHW, pad)).sum())
        return f"{wrong} voxels of its label map differ" if wrong else ""


def form_of(corpus: Corpus, loader: Loader) -> Path:
    """The folder of a loader's format."""
    return corpus.folder / "forms" / loader.form


def convert(corpus: Corpus, loader: Loader) -> None:
    """Convert the corpus unless that is done."""
    folder = form_of(corpus, loader)
    if (folder / DONE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    loader.convert(corpus, folder)
    (folder / DONE).touch()


def turn(corpus: Corpus, loader: Loader, seconds: float, wait: Any = lambda: None) -> dict[str, Any]:
    """One turn of a loader.

    Args:
        corpus: the volumes.
        loader: what to measure.
        seconds: how long to draw samples.
        wait: called before the measurement.

    Returns:
        Per sample: `cpu_ms` (user + system of all threads), `wall_ms`, `read_mb` (by read calls; mapped pages do not
        count). `peak_mib` of the process, `stored_mb` a volume, `version`, `samples`.

    Raises:
        ValueError: the loader's voxels are not those of the corpus.
    """
    folder = form_of(corpus, loader)
    stored = _cached(folder)
    loader.open(corpus, folder)
    for _ in range(CHECKED):
        crop = loader.sample()
        if crop is not None and (problem := corpus.differs(crop)):
            raise ValueError(f"{crop.volume} at {crop.start}: {problem}")
    ended = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < ended:
        loader.sample()
    wait()
    samples, read, cpu, wall = 0, _read_bytes(), _cpu_seconds(), time.perf_counter()
    while samples < LEAST_SAMPLES or time.perf_counter() - wall < seconds:
        loader.sample()
        samples += 1
    return {
        "cpu_ms": 1000 * (_cpu_seconds() - cpu) / samples,
        "wall_ms": 1000 * (time.perf_counter() - wall) / samples,
        "read_mb": (_read_bytes() - read) / samples / 1e6,
        "peak_mib": resident() / 2**20,
        "stored_mb": stored / len(corpus.keys) / 1e6,
        "version": importlib.metadata.version(loader.package),
        "samples": samples,
    }


def _cached(folder: Path) -> int:
    """Bytes of the files in a folder, which are read once so that they are in the page cache."""
    return sum(len(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file())


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def main(loaders: Mapping[str, type[Loader]]) -> None:
    """`convert FOLDER NAME` or `turn FOLDER NAME SECONDS CORE`, for the scripts that hold loaders."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("convert", "turn"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=loaders)
    parser.add_argument("seconds", type=float, nargs="?", default=1.0)
    parser.add_argument("core", type=int, nargs="?", default=-1)
    arguments = parser.parse_args()
    corpus, loader = Corpus(arguments.folder), loaders[arguments.name]()
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        if arguments.what == "convert":
            convert(corpus, loader)
            return
        if arguments.core >= 0:
            os.sched_setaffinity(0, {arguments.core})

        def wait() -> None:
            print("ready", file=output, flush=True)
            sys.stdin.readline()

        figures = turn(corpus, loader, arguments.seconds, wait)
    print(json.dumps(figures), file=output, flush=True)
    # Some peers leave threads that would keep the process alive.
    os._exit(0)
