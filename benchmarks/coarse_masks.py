"""Simulated coarse masks, which training shows in windows, next to the real ones of a model's zoom-out.

    python benchmarks/coarse_masks.py CHECKPOINT SHARDS [--windows 300]

Windows of held-out volumes around each category, prompted by text, as training draws them; only those in which zooming
out finds something. Of both kinds of masks, at the decoder's resolution, against the truth: Dice, distance between the
centres (voxels of the overview, along the axis where it is largest), size relative to the truth, and spill (share of
the mask outside the truth). Quartiles, over windows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from results import record

from segvol_pl.config import ZoomConfig
from segvol_pl.data.coarse_masks import simulated_coarse
from segvol_pl.data.sampling import Member, mask_of, overview_step, window_start
from segvol_pl.data.shard_index import read_index
from segvol_pl.data.shard_reader import read_array, read_facts
from segvol_pl.data.store import Store
from segvol_pl.imaging.intensity import Normalised
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.transforms import crop, resize_image
from segvol_pl.inference.zoom import Zoomer
from segvol_pl.model.checkpoint import load_model

NAMES = ("dice", "shift", "size", "spill")
HALF = 0.5


def measures(likely_DHW: np.ndarray, truth_DHW: np.ndarray, cells: Sequence[float]) -> list[float]:
    """`NAMES` of a mask that is not empty. cells: voxels of the overview per voxel of the mask, along (d, h, w)."""
    mask_DHW, true_DHW = likely_DHW > HALF, truth_DHW > HALF
    inside = (mask_DHW & true_DHW).sum()
    centres = [np.argwhere(each).mean(axis=0) for each in (mask_DHW, true_DHW)]
    shift = float(np.abs((centres[0] - centres[1]) * cells).max())
    size = mask_DHW.sum() / true_DHW.sum()
    return [2 * inside / (mask_DHW.sum() + true_DHW.sum()), shift, size, 1 - inside / mask_DHW.sum()]


def compare(checkpoint: Path, shards: Path, windows: int) -> dict[str, np.ndarray]:
    """Rows of `NAMES` for real and for simulated masks, of the same windows."""
    model = load_model(checkpoint)
    store, rng = Store(shards), np.random.default_rng(0)
    records = [each for each in read_index(store).samples if each.labelled and each.split == "test"]
    found: dict[str, list[list[float]]] = {"real": [], "simulated": []}
    shape, low = model.config.input_shape, model.config.mask_shape
    for record_ in records:
        facts = read_facts(store, record_)
        hu_DHW, label_DHW = (read_array(store, record_, facts, each)[:] for each in (Member.CT, Member.LABEL))
        zoomer = Zoomer(model, Normalised(hu_DHW, facts.intensity), ZoomConfig())
        step_3 = overview_step(facts, shape)
        cells = [size / count / step for size, count, step in zip(shape, low, step_3, strict=True)]
        for name in sorted(facts.categories):
            coarse = zoomer.zoom_out(Prompt(text=name))
            for _ in range(max(1, windows // (len(records) * len(facts.categories)))):
                start = window_start(facts, name, shape, rng)
                truth_DHW = crop(mask_of(label_DHW, facts.categories[name].values), start, shape)
                real_DHW = coarse.probabilities(start, shape, low)
                simulated_DHW = simulated_coarse(truth_DHW, step_3, low, rng)
                small_DHW = resize_image(truth_DHW, low)
                if (small_DHW > HALF).any():
                    for kind, likely_DHW in (("real", real_DHW), ("simulated", simulated_DHW)):
                        if (likely_DHW > HALF).any():
                            found[kind].append(measures(likely_DHW, small_DHW, cells))
    return {kind: np.array(rows) for kind, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--windows", type=int, default=300)
    arguments = parser.parse_args()
    print(f"{'':12}{'windows':>8}" + "".join(f"{name:>24}" for name in NAMES))
    figures: dict[str, object] = {}
    for kind, rows in compare(arguments.checkpoint, arguments.shards, arguments.windows).items():
        quartiles_3N = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
        cells = [f"{middle:.2f} [{low:.2f}, {high:.2f}]" for low, middle, high in quartiles_3N.T]
        print(f"{kind:12}{len(rows):8}" + "".join(f"{cell:>24}" for cell in cells))
        figures[kind] = {name: np.round(each, 3).tolist() for name, each in zip(NAMES, quartiles_3N.T, strict=True)}
    record("coarse_masks", figures)


if __name__ == "__main__":
    main()
