"""CPU time of a training sample on one core, and where it goes.

    python benchmarks/loader.py [CT_FOLDER] [samples=60]

The volume is the trunk CT of CT_FOLDER (default ../shared/ct), each axis doubled: 224 x 202 x 244, 13 categories. Noise
is added, because equal neighbours compress unlike a scan.
Half of the samples are overviews, half foreground crops of 32 x 256 x 256, each with 8 categories' prompts and 6
pseudo-label prompts. The published data set class takes 12.6 s a sample for the same volume on such a core.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import yaml
from results import record
from rich.console import Console
from rich.table import Table

from segvol_pl.config import DataConfig, PackConfig, PromptConfig, SegVolConfig
from segvol_pl.data import sampling, shard_reader, stream
from segvol_pl.data.corpus import open_folders, training_corpus
from segvol_pl.data.frames import PartialFrame, decode_alone
from segvol_pl.data.store import Store
from segvol_pl.packing.pack import pack

PUBLISHED_SECONDS = 12.6
CATEGORIES = 13
NOISE = 10.0


def double(source: Path, target: Path, noise: float = 0.0) -> None:
    """A NIfTI file with every voxel split into eight. noise: standard deviation of what is added (HU)."""
    image = nibabel.load(source)
    array = np.asarray(image.dataobj)
    for axis in range(3):
        array = array.repeat(2, axis)
    array = array + np.random.default_rng(0).normal(0, noise, array.shape) if noise else array
    affine = image.affine @ np.diag([0.5, 0.5, 0.5, 1.0])
    nibabel.save(nibabel.Nifti1Image(array.astype(np.int16), affine), target)


def packed(source: Path, folder: Path) -> Path:
    """The doubled trunk CT as a folder of shards; its 13 largest categories."""
    for name, noise in (("trunk_ct", NOISE), ("trunk_seg", 0.0)):
        double(source / f"{name}.nii.gz", folder / f"{name}.nii.gz", noise)
    named = yaml.safe_load((source / "categories.yaml").read_text())["categories"]
    labels = np.asarray(nibabel.load(source / "trunk_seg.nii.gz").dataobj)
    sizes = {name: int(np.isin(labels, values).sum()) for name, values in named.items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:CATEGORIES]
    (folder / "categories.yaml").write_text(yaml.safe_dump({name: named[name] for name in largest}))
    config = PackConfig(
        images=str(folder / "trunk_ct.nii.gz"),
        labels=str(folder / "trunk_seg.nii.gz"),
        categories=str(folder / "categories.yaml"),
        out=str(folder / "shards"),
        test_fraction=0.0,
        workers=1,
    )
    pack(config)
    return folder / "shards"


@contextmanager
def timed(spent: Counter[str]) -> Iterator[None]:
    """Adds up the time spent in the parts of loading a sample, and the bytes read."""

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **keys: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **keys)
            spent[name] += time.process_time() - started  # type: ignore[assignment]
            if isinstance(result, list):
                spent["bytes"] += sum(map(len, result))
            return result

        return watched

    parts = {
        "read": (Store, "_ranges"),
        "check members": (shard_reader, "_is_sound"),
        "check chunks": (PartialFrame, "is_sound"),
        "draw prompts": (sampling, "segment_sample"),
        "augment": (sampling, "augment"),
        "view (decode, resize, crop)": (sampling, "sample_crop"),
    }
    kept = {name: getattr(module, attribute) for name, (module, attribute) in parts.items()}
    for name, (module, attribute) in parts.items():
        setattr(module, attribute, watch(name, kept[name]))
    try:
        yield
    finally:
        for name, (module, attribute) in parts.items():
            setattr(module, attribute, kept[name])


def main(source: Path, samples: int) -> None:
    torch.set_num_threads(1)
    decode_alone()
    with tempfile.TemporaryDirectory() as name:
        folder = packed(source, Path(name))
        data = DataConfig(shards=str(folder), overview_fraction=0.5)
        (packed_folder,) = folders = open_folders(data)
        corpus, index = training_corpus(folders, data, labelled=True), packed_folder.index
        rows = {category: row for row, category in enumerate(sorted(index.categories))}
        prompts, model = PromptConfig(categories_per_volume=8), SegVolConfig()
        draw = functools.partial(sampling.sample_segmentation, model=model, data=data, prompts=prompts, row_of=rows)
        source_of = stream.Stream(corpus, draw, stream.BatchPlan(samples, 1))
        spent: Counter[str] = Counter()
        order = source_of.rows(0)
        source_of.sample(0, 0, order)
        with timed(spent):
            seconds = [one(source_of, position, order) for position in range(samples)]
        stored = sum(size for part in corpus.parts for record in part.records for _, size in record.members.values())
        report(np.array(seconds), spent, stored, index.samples[0].shape, len(rows))


def one(source_of: stream.Stream, position: int, order: np.ndarray) -> float:
    started = time.process_time()
    source_of.sample(0, position, order)
    return time.process_time() - started


def report(seconds: np.ndarray, spent: Counter[str], stored: int, shape: list[int], categories: int) -> None:
    count, total = len(seconds), seconds.sum()
    table = Table(title=f"{count} samples of {shape}, {categories} categories, one core")
    table.add_column("part")
    table.add_column("CPU ms a sample", justify="right")
    table.add_column("share", justify="right")
    view = "view (decode, resize, crop)"
    checked = spent["check members"] + spent["check chunks"]
    own = {**spent, "check hashes": checked, view: spent[view] - spent["read"] - checked - spent["augment"]}
    for part in ("read", "check hashes", view, "augment", "draw prompts"):
        table.add_row(part, f"{1000 * own[part] / count:.1f}", f"{100 * own[part] / total:.0f} %")
    table.add_section()
    median = float(np.median(seconds))
    table.add_row("whole sample, mean", f"{1000 * total / count:.1f}", "100 %")
    table.add_row("whole sample, median", f"{1000 * median:.1f}", "")
    record("loader", {"sample_median_s": median, "read_mb": spent["bytes"] / count / 1e6, "stored_mb": stored / 1e6})
    console = Console()
    console.print(table)
    console.print(
        f"published data set class: {PUBLISHED_SECONDS} s a sample, {PUBLISHED_SECONDS / median:.0f} x the median"
    )
    console.print(f"bytes read a sample: {spent['bytes'] / count / 1e6:.2f} MB of {stored / 1e6:.2f} MB stored")


if __name__ == "__main__":
    keys = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    main(Path(folders[0] if folders else "../shared/ct"), int(keys.get("samples", 60)))
