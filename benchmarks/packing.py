"""What packing costs: seconds and memory of a volume, two processes against one, bytes, and the choice of codec.

    python benchmarks/packing.py [CT_FOLDER]

1. Seconds and peak memory to pack the trunk CT with each axis doubled, 13 categories, regions included, on one core.
2. The same of that CT enlarged to 512 x 512 x 800.
3. Forty of the former with one and with two processes within one run, the start of the processes included, and ten,
   so that the difference tells what thirty cost once the processes run.
4. Bytes of a packed sample against its NIfTI files (gzip).
5. Codec and chunk shape: bytes of the CT, milliseconds to encode it, and to read a crop of 32 x 256 x 256.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import blosc2
import nibabel
import numpy as np
import yaml
from loader import NOISE, double
from resident import resident
from results import record
from rich.console import Console
from rich.table import Table

from segvol_pl.config import PackConfig
from segvol_pl.imaging.read import read_volume
from segvol_pl.packing.pack import pack

COPIES, FEW = 40, 10
CODECS = [("ZSTD", 5), ("ZSTD", 1), ("ZLIB", 5), ("LZ4HC", 9), ("LZ4", 5)]
"""Codec and level."""
FILTERS = ("SHUFFLE", "BITSHUFFLE")
CHUNKS = {(32, 64, 64): (8, 32, 32), (16, 128, 128): (8, 64, 64), (64, 128, 128): (16, 32, 32)}
"""Chunk shape -> block shape."""
WINDOW = (32, 256, 256)
LARGE = (512, 512, 800)
"""Voxels along x, y, z."""


def corpus(source: Path, folder: Path) -> PackConfig:
    """The doubled trunk CT under COPIES names, each with noise of 10 HU: equal neighbours compress unlike a scan."""
    double(source / "trunk_ct.nii.gz", folder / "whole_ct.nii.gz")
    double(source / "trunk_seg.nii.gz", folder / "seg.nii.gz")
    image = nibabel.load(folder / "whole_ct.nii.gz")
    hu = np.asarray(image.dataobj).astype(np.int16)
    for number in range(COPIES):
        path = folder / f"cases/c{number}_ct.nii.gz"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).normal(0, NOISE, hu.shape).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu + noise, image.affine), path)
        (folder / f"cases/c{number}_seg.nii.gz").write_bytes((folder / "seg.nii.gz").read_bytes())
    for name, count in (("few", FEW), ("all", COPIES)):
        rows = [f"c{number},cases/c{number}_ct.nii.gz,cases/c{number}_seg.nii.gz" for number in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["id,image,label", *rows]) + "\n")
    named = yaml.safe_load((source / "categories.yaml").read_text())["categories"]
    (folder / "categories.yaml").write_text(yaml.safe_dump(dict(itertools.islice(named.items(), 13))))
    return PackConfig(
        cases=str(folder / "all.csv"),
        categories=str(folder / "categories.yaml"),
        out=str(folder / "out"),
        workers=1,
    )


def seconds(config: PackConfig, out: str, workers: int) -> float:
    started = time.perf_counter()
    pack(replace(config, out=out, workers=workers))
    return time.perf_counter() - started


def enlarge(source: Path, folder: Path) -> None:
    """The trunk CT and its labels at LARGE voxels, by nearest neighbour, with noise."""
    for role in ("ct", "seg"):
        image = nibabel.load(source / f"trunk_{role}.nii.gz")
        array = np.asarray(image.dataobj).astype(np.int16)
        grown = array[np.ix_(*(np.arange(new) * old // new for new, old in zip(LARGE, array.shape, strict=True)))]
        if role == "ct":
            grown += np.random.default_rng(0).normal(0, NOISE, grown.shape).astype(np.int16)
        factors = [old / new for old, new in zip(array.shape, LARGE, strict=True)]
        nibabel.save(nibabel.Nifti1Image(grown, image.affine @ np.diag([*factors, 1])), folder / f"large_{role}.nii.gz")


def large(config: PackConfig, source: Path, folder: Path) -> tuple[float, float]:
    """Seconds and GiB to pack one CT of LARGE voxels in a process of its own."""
    context = multiprocessing.get_context("spawn")
    images, labels = (str(folder / f"large_{role}.nii.gz") for role in ("ct", "seg"))
    with ProcessPoolExecutor(1, mp_context=context) as apart:
        apart.submit(enlarge, source, folder).result()
    with ProcessPoolExecutor(1, mp_context=context) as apart:
        config = replace(config, cases=None, images=images, labels=labels)
        taken = apart.submit(seconds, config, str(folder / "large"), 1).result()
        return taken, apart.submit(peak_gib).result()


def peak_gib() -> float:
    return resident() / 2**30


def processes(config: PackConfig, folder: Path, name: str) -> list[float]:
    """Seconds for a list of cases by one process and by two. Starting the processes counts."""
    listed = replace(config, cases=str(folder / f"{name}.csv"))
    return [seconds(listed, str(folder / f"{name}{workers}"), workers) for workers in (1, 2)]


def compared(what: str, one: float, two: float) -> str:
    return f"{what}: {one:.1f} s by one process, {two:.1f} s by two: {one / two:.2f} times"


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def encoded(hu_DHW: np.ndarray, codec: tuple[str, int], filtered: str, chunk: tuple[int, ...]) -> bytes:
    name, level = codec
    parameters = blosc2.CParams(codec=blosc2.Codec[name], clevel=level, filters=[blosc2.Filter[filtered]], nthreads=1)
    return bytes(blosc2.asarray(hu_DHW, chunks=chunk, blocks=CHUNKS[chunk], cparams=parameters).to_cframe())


def codecs(hu_DHW: np.ndarray) -> Table:
    """Each codec, level, filter and chunk shape on one CT, one thread."""
    table = Table("codec", "filter", "chunk", "MB", "encode ms", "crop ms", title=f"CT of {hu_DHW.shape}, one thread")
    start = [max((size - window) // 2, 0) for size, window in zip(hu_DHW.shape, WINDOW, strict=True)]
    crop = tuple(slice(first, first + window) for first, window in zip(start, WINDOW, strict=True))
    for choice in itertools.product(CODECS, FILTERS, CHUNKS):
        encode = functools.partial(encoded, hu_DHW, *choice)
        frame = encode()
        array = blosc2.ndarray_from_cframe(frame)
        figures = len(frame) / 1e6, milliseconds(encode, 1), milliseconds(functools.partial(array.__getitem__, crop), 5)
        (codec, level), filtered, chunk = choice
        table.add_row(
            f"{codec} {level}", filtered, " x ".join(map(str, chunk)), *(f"{figure:.1f}" for figure in figures)
        )
    return table


def main(source: Path) -> None:
    blosc2.set_nthreads(1)
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = corpus(source, folder)
        one = replace(
            config, cases=None, images=str(folder / "cases/c0_ct.nii.gz"), labels=str(folder / "cases/c0_seg.nii.gz")
        )
        seconds(one, str(folder / "warm"), 1)
        alone = statistics.median(seconds(one, str(folder / f"one{turn}"), 1) for turn in range(3))
        peak = peak_gib()
        volume = read_volume(folder / "cases/c0_ct.nii.gz")
        console.print(f"{volume.array_DHW.shape} with 13 categories and regions: {alone:.1f} s, peak {peak:.2f} GiB")
        stored = sum(path.stat().st_size for path in (folder / "warm").glob("*.tar"))
        given = sum((folder / f"cases/c0_{role}.nii.gz").stat().st_size for role in ("ct", "seg"))
        console.print(f"{stored / 1e6:.1f} MB packed, {given / 1e6:.1f} MB as NIfTI (gzip)")
        slow, much = large(config, source, folder)
        sizes = {"packed_mb": stored / 1e6, "nifti_mb": given / 1e6}
        record("packing", {"case_s": alone, "peak_gib": peak, **sizes, "large_s": slow, "large_peak_gib": much})
        console.print(f"{' x '.join(map(str, LARGE))}: {slow:.1f} s, peak {much:.2f} GiB")
        few, every = (processes(config, folder, name) for name in ("few", "all"))
        console.print(compared(f"{COPIES} volumes", *every))
        console.print(compared(f"the last {COPIES - FEW} of them", *np.subtract(every, few).tolist()))
        console.print(codecs(np.ascontiguousarray(volume.array_DHW)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/ct"))
