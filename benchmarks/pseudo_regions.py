"""Time and memory of pseudo-label regions at the model's input size, on one core.

    python benchmarks/pseudo_regions.py [--repeats 5] [--shape 32 256 256]

The volume is the overview of a phantom with its label map. Best and median of the repeats, after compilation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from resident import NOW, resident
from results import record

from segvol_pl.config import RegionsConfig
from segvol_pl.imaging.intensity import intensity_of, normalise
from segvol_pl.imaging.transforms import resize_image, resize_label
from segvol_pl.packing.phantom import make_phantom
from segvol_pl.packing.regions import clean, felzenszwalb, pseudo_regions

AXES = (2, 1, 0)


def _seconds(work: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def _overview(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    phantom = make_phantom(0)
    image_DHW = resize_image(normalise(phantom.hu_DHW, intensity_of(phantom.hu_DHW)), shape)
    return image_DHW, resize_label(phantom.label_DHW, shape)


def _peak_bytes_per_voxel(image_DHW: np.ndarray) -> float:
    felzenszwalb(image_DHW[:4, :16, :16], axes=AXES)
    # The kernel's peak is reset, so that what was needed to make the phantom does not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident(NOW)
    felzenszwalb(image_DHW, axes=AXES)
    return (resident() - before) / image_DHW.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 256, 256))
    arguments = parser.parse_args()
    config = RegionsConfig()
    image_DHW, label_DHW = _overview(tuple(arguments.shape))
    peak = _peak_bytes_per_voxel(image_DHW)
    regions_DHW = felzenszwalb(image_DHW, axes=AXES) + 1
    rows: dict[str, Callable[[], object]] = {
        "felzenszwalb": lambda: felzenszwalb(image_DHW, axes=AXES),
        "clean": lambda: clean(regions_DHW, config.min_fraction),
        "pseudo_regions": lambda: pseudo_regions(image_DHW, label_DHW, config),
    }
    print(f"{image_DHW.shape} voxels, {regions_DHW.max()} regions; peak of felzenszwalb {peak:.1f} bytes/voxel")
    best_ms: dict[str, float] = {}
    for name, work in rows.items():
        taken = _seconds(work, arguments.repeats)
        best_ms[name] = 1e3 * min(taken)
        best, middle = best_ms[name], 1e3 * statistics.median(taken)
        print(f"{name:16} best {best:6.0f} ms  median {middle:6.0f} ms  {1e6 * best / image_DHW.size:5.0f} ns/voxel")
    record("pseudo_regions", {"shape": image_DHW.shape, "peak_bytes_per_voxel": peak, "best_ms": best_ms})


if __name__ == "__main__":
    main()
