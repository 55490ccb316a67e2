"""What loader processes hold, how they add up, and what planning an epoch costs.

    python benchmarks/loader_processes.py [CT_FOLDER] [samples=10000]
    python benchmarks/loader_processes.py samples=0        # planning alone

1. Volumes/s of one and of two loader processes, in turns within one run, on the volume of `benchmarks/loader.py`;
   and of one and of two processes that load without a loader and know nothing of each other: what the machine gives.
2. Memory of a process over many samples of small phantoms: what it holds after a tenth of them, and after all.
3. Memory of a process on volumes of 600 x 512 x 512 voxels (the trunk CT, enlarged).
4. Milliseconds to plan an epoch of 90,000 volumes for a worker among 1,024 ranks x 16.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import nibabel
import numpy as np
import psutil
from loader import packed
from scipy import ndimage
from torch.utils.data import DataLoader

from segvol_pl.config import DataConfig, PackConfig, PromptConfig, SegVolConfig
from segvol_pl.data import sampling
from segvol_pl.data.batch import Batch
from segvol_pl.data.collate import identity_collate
from segvol_pl.data.corpus import Corpus, Part, open_folders, training_corpus
from segvol_pl.data.sample_table import SampleRecord, SampleTable
from segvol_pl.data.store import ShardSource, Store
from segvol_pl.data.stream import BatchPlan, Stream, World
from segvol_pl.packing.pack import pack
from segvol_pl.packing.phantom import write_phantoms

LARGE = (512, 512, 600)
"""Voxels of the large volume, in the order of its file: right, anterior, superior."""


def loader_of(
    folder: ShardSource, model: SegVolConfig, batch: int, workers: int, overviews: float = 0.5
) -> DataLoader[Batch]:
    """Endless batches of the folder's labelled samples, 4 categories and 6 pseudo-labels each."""
    data = DataConfig(shards=str(folder), overview_fraction=overviews, split="all", samples_per_volume=100)
    (packed_folder,) = folders = open_folders(data)
    corpus = training_corpus(folders, data, labelled=True)
    rows = {category: row for row, category in enumerate(sorted(packed_folder.index.categories))}
    draw = functools.partial(sampling.sample_segmentation, model=model, data=data, prompts=PromptConfig(), row_of=rows)
    stream = Stream(corpus, draw, BatchPlan(corpus.num_samples, batch))
    prefetch = 2 if workers else None
    return DataLoader(
        stream, batch_size=None, collate_fn=identity_collate, num_workers=workers, prefetch_factor=prefetch
    )


def rates(folder: Path, repeats: int = 3, batches: int = 40) -> dict[int, list[float]]:
    """Workers -> volumes/s, measured in turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers, measured in found.items():
            batch = iter(loader_of(folder, SegVolConfig(), 1, workers))
            for _ in islice(batch, 8):
                pass
            started = time.perf_counter()
            for _ in islice(batch, batches):
                pass
            measured.append(batches / (time.perf_counter() - started))
            del batch
    return found


def unloaded(folder: Path, repeats: int = 3) -> dict[int, list[float]]:
    """Processes -> their volumes/s together, nothing passed between them, measured in turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for count, measured in found.items():
            with multiprocessing.get_context("fork").Pool(count) as processes:
                measured.append(sum(processes.map(_rate_alone, [folder] * count, chunksize=1)))
    return found


def _rate_alone(folder: Path, samples: int = 40) -> float:
    batches = iter(loader_of(folder, SegVolConfig(), 1, 0))
    for _ in islice(batches, 8):
        pass
    started = time.perf_counter()
    for _ in islice(batches, samples):
        pass
    return samples / (time.perf_counter() - started)


def held(folder: Path, model: SegVolConfig, samples: int, overviews: float) -> tuple[float, float]:
    """MiB that the process holds after a tenth of the samples, and the most that it held later."""
    batch = 10 if samples >= 1000 else 1
    batches = iter(loader_of(folder, model, batch, 1, overviews))
    early, most = 0.0, 0.0
    for number in range(samples // batch):
        next(batches)
        if number % max(samples // batch // 50, 1) == 0:
            now = sum(child.memory_info().rss for child in psutil.Process().children()) / 2**20
            early, most = (now, most) if number <= samples // batch // 10 else (early, max(most, now))
    return early, most


def small_phantoms(folder: Path) -> Path:
    write_phantoms(folder, count=6, seed=0, scale=0.45)
    return pack_folder(folder, [8, 16, 16], folder / "images", folder / "labels")


def large_volume(source: Path, folder: Path) -> Path:
    for name, order in (("trunk_ct", 1), ("trunk_seg", 0)):
        image = nibabel.load(source / f"{name}.nii.gz")
        array = np.asarray(image.dataobj, dtype=np.int16)
        factors = np.divide(LARGE, array.shape)
        enlarged = ndimage.zoom(array, factors, order=order)
        affine = image.affine @ np.diag([*(1 / factors), 1.0])
        nibabel.save(nibabel.Nifti1Image(enlarged, affine), folder / f"{name}.nii")
    (folder / "categories.yaml").write_text("liver: [5]\nspleen: [1]\naorta: [52]\n")
    return pack_folder(folder, [32, 256, 256], folder / "trunk_ct.nii", folder / "trunk_seg.nii")


def pack_folder(folder: Path, overview: list[int], images: Path, labels: Path) -> Path:
    named = {"images": str(images), "labels": str(labels), "categories": str(folder / "categories.yaml")}
    pack(PackConfig(**named, out=str(folder / "shards"), overview_shape=overview, test_fraction=0.0, workers=1))
    return folder / "shards"


def planning(samples: int = 90_000, repeats: int = 20) -> float:
    """Median milliseconds for the order of an epoch and the part of one worker among 1,024 ranks x 16."""
    record = SampleRecord("a", "a.tar", "train", True, [1, 1, 1], [1.0] * 3, [], {})
    records = SampleTable.of([record]).chosen(np.zeros(samples, int))
    stream = Stream(Corpus([Part(Store("a"), records)]), lambda *_: {}, BatchPlan(samples, 4096))
    taken = []
    for epoch in range(repeats):
        started = time.perf_counter()
        stream.rows(epoch)
        dealt = stream.plan.positions(World(511, 1024, 7, 16), epoch * stream.plan.usable)
        for _ in itertools.takewhile(lambda micro, now=epoch: micro[0] == now, dealt):
            pass
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def main(source: Path, samples: int) -> None:
    print(f"planning an epoch of 90,000: {planning():.1f} ms")
    if not samples:
        return
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name) / part for part in ("scaling", "small", "large")]
        for folder in folders:
            folder.mkdir()
        shards = packed(source, folders[0])
        for kind, measure in (("loader processes", rates), ("processes apart from each other", unloaded)):
            found = {count: statistics.median(rate) for count, rate in measure(shards).items()}
            print(f"volumes/s of 1 and 2 {kind}: {found[1]:.1f}, {found[2]:.1f}: {found[2] / found[1]:.2f} times")
        tiny = SegVolConfig(input_shape=[8, 16, 16], patch_size=[4, 8, 8])
        early, most = held(small_phantoms(folders[1]), tiny, samples, 0.5)
        print(f"a process over {samples} samples: {early:.0f} MiB early, {most:.0f} MiB at most later")
        _, most = held(large_volume(source, folders[2]), SegVolConfig(), 40, 0.0)
        print(f"a process on crops of 600 x 512 x 512 voxels: {most:.0f} MiB at most")


if __name__ == "__main__":
    keys = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    given = [argument for argument in sys.argv[1:] if "=" not in argument]
    main(Path(given[0] if given else "../shared/ct"), int(keys.get("samples", 10_000)))
