"""What a batch weighs on its way: as it travels, against the image and masks that it is made into.

    python benchmarks/batches.py [volumes=4] [repeats=12]

Volumes of 32 x 256 x 256 with 8 categories and 6 pseudo-labels, masks being boxes. Both forms in turns within one run:

1. MiB of a batch.
2. Milliseconds of a sample to collate: the travelling form packs its masks, the other stacks them.
3. Milliseconds of a batch from a loader process that has it ready, copied once as for pinned memory.
4. On this device, milliseconds of a batch to unpack.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from segvol_pl.config import SegVolConfig
from segvol_pl.data.batch import Batch, packed, shade_of, unpacked
from segvol_pl.data.collate import Arrays, identity_collate, stacked
from segvol_pl.data.stream import collate
from segvol_pl.device import resolve_device
from segvol_pl.imaging.intensity import Intensity, normalise
from segvol_pl.training.strategies import keep_freed_memory

INTENSITY = Intensity(mean=-400.0, low=-160.25, high=240.75, minimum=-1024, maximum=1500)
MASKS = {"": 8, "pseudo_": 6}


@dataclass(frozen=True)
class Drawn:
    """A volume with its masks, as drawn."""

    hu_DHW: np.ndarray
    masks: dict[str, list[np.ndarray]]

    @classmethod
    def of_noise(cls, shape: list[int]) -> Drawn:
        """Masks are boxes at different places."""
        rng = np.random.default_rng(0)
        masks: dict[str, list[np.ndarray]] = {}
        for kind, count in MASKS.items():
            masks[kind] = [np.zeros(shape, dtype=bool) for _ in range(count)]
            for place, mask_DHW in enumerate(masks[kind]):
                mask_DHW[place : place + shape[0] // 2, : shape[1] // 2, place : place + shape[2] // 2] = True
        return cls(rng.integers(-1024, 1500, shape).astype(np.int16), masks)

    def travelling(self) -> Arrays:
        bits = {f"{kind}bits_JDHW": packed(masks) for kind, masks in self.masks.items()}
        valid = {f"{kind}valid_K": np.ones(len(masks), dtype=bool) for kind, masks in self.masks.items()}
        return {"hu_CDHW": self.hu_DHW[None], "shade_4": shade_of(INTENSITY, 1.05, 0.01), **bits, **valid}

    def whole(self) -> Arrays:
        image_DHW = normalise(self.hu_DHW, INTENSITY) * np.float32(1.05) + np.float32(0.01)
        masks = {f"{kind}masks_KDHW": np.stack(masks) for kind, masks in self.masks.items()}
        return {"image_CDHW": image_DHW[None], **masks}


class Ready(IterableDataset[Batch]):
    """The same batch again and again, put into shared memory each time."""

    def __init__(self, batch: Batch) -> None:
        self.arrays = {name: value.numpy() for name, value in batch.items()}

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield stacked([], {}, self.arrays)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def handed_over(batches: Iterator[Batch]) -> Batch:
    return {name: value.clone() for name, value in next(batches).items()}


def main(volumes: int, repeats: int) -> None:
    torch.set_num_threads(1)
    host, device = torch.device("cpu"), resolve_device("auto")
    # As training on a CPU does.
    keep_freed_memory()
    drawn = Drawn.of_noise(SegVolConfig().input_shape)
    makes = {"travels": drawn.travelling, "whole": drawn.whole}
    batches = {form: collate([make()] * volumes, 0) for form, make in makes.items()}
    loaders = {form: iter(_loader(batch)) for form, batch in batches.items()}
    sent = {name: value.to(device) for name, value in batches["travels"].items()}
    taken: dict[str, list[float]] = {}

    def note(what: str, work: Callable[[], Any], where: torch.device = host) -> None:
        taken.setdefault(what, []).append(milliseconds(work, where))

    for _ in range(repeats):
        for form, make in makes.items():
            note(f"collate, {form}", lambda make=make: collate([make()], 0))
            note(f"hand over, {form}", lambda form=form: handed_over(loaders[form]))
        note("unpack", lambda: unpacked(sent), device)
    report(batches, {what: statistics.median(each[2:]) for what, each in taken.items()}, device)


def _loader(batch: Batch) -> DataLoader[Batch]:
    return DataLoader(Ready(batch), batch_size=None, collate_fn=identity_collate, num_workers=1, prefetch_factor=2)


def report(batches: dict[str, Batch], taken: dict[str, float], device: torch.device) -> None:
    sizes = {form: sum(value.nbytes for value in batch.values()) / 2**20 for form, batch in batches.items()}
    whole, travels = sizes["whole"], sizes["travels"]
    print(f"a batch: {travels:.1f} MiB as it travels, {whole:.1f} as it is used: 1/{whole / travels:.2f}")
    for what, of in (("collate", "a sample"), ("hand over", "a batch")):
        packed_ms, whole_ms = taken[f"{what}, travels"], taken[f"{what}, whole"]
        print(f"{what} {of}: {packed_ms:.1f} ms against {whole_ms:.1f}: {packed_ms / whole_ms:.2f} of it")
    print(f"unpack a batch on {device.type}: {taken['unpack']:.1f} ms")


if __name__ == "__main__":
    keys = dict(argument.split("=") for argument in sys.argv[1:])
    main(int(keys.get("volumes", 4)), int(keys.get("repeats", 12)))
