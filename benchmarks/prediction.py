"""What a prediction costs: many categories against each on its own, a second prompt, a large CT, the start of the help.

    python benchmarks/prediction.py [CT_FOLDER] [--small] [--parts categories second memory help click] [--overlap 0]
                                    [--precision fp32|bf16]

1. Box+text prompts on the trunk CT with each axis doubled (244 x 202 x 224), the overview and every window encoded anew
   for each category, one at a time, as the published code does; and all of them together. The same windows both ways.
2. Zooming out for a second prompt on an open volume against opening it and the first.
3. Peak memory of predicting one category on that CT enlarged to 512 x 512 x 800, beyond the process with its model.
4. Seconds until `predict --help` has ended.
5. Seconds of a click on the open trunk CT at 3 mm with the tiny model (configs/model/tiny.yaml), at places that were
   not looked at before; a structure of a quarter of the CT along each axis is taken to lie there.

Everything is float32 unless --precision says bf16. Weights are random, of the published size, or with --small of
configs/model/small.yaml. They find no organs: the box of the prompt stands for the coarse mask, after that has been
decoded, so that the windows are a trained model's.
Windows overlap by --overlap (0 by default, to keep a run at full size within minutes; predictions use 0.5).
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from loader import double
from packing import enlarge
from resident import resident

from segvol_pl.config import Precision, SegVolConfig, ZoomConfig
from segvol_pl.device import autocast
from segvol_pl.imaging.box import Box, box_of, box_slices
from segvol_pl.imaging.intensity import Normalised, body_box, intensity_of
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.imaging.read import read_label, read_volume
from segvol_pl.inference.coarse import CoarseLogits
from segvol_pl.inference.predictor import Predictor
from segvol_pl.inference.zoom import Zoomer
from segvol_pl.inference.zoom_result import ZoomResult
from segvol_pl.model import SegVol, TextBank

SMALL = SegVolConfig(hidden_size=384, num_heads=6, mlp_dim=1536, decoder_mlp_dim=1024)
"""configs/model/small.yaml."""
SMALLEST = 100
"""Voxels at 3 mm that a category must have."""
TINY = SegVolConfig(
    [24, 48, 48],
    [8, 8, 8],
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    mlp_dim=512,
    decoder_heads=4,
    decoder_mlp_dim=256,
)
"""configs/model/tiny.yaml."""
PARTS = ("categories", "second", "memory", "help", "click")


Answers = tuple[float, list[ZoomResult]]
"""Seconds, and what came of each prompt."""


class BoxZoomer(Zoomer):
    """The coarse mask, once decoded, is the prompt's box."""

    def _zoom_out(self, scaled: list[Prompt]) -> list[CoarseLogits]:
        super()._zoom_out(scaled)
        boxed = []
        for prompt in scaled:
            low_DHW = np.full(self.window_shape, -4, np.float32)
            low_DHW[box_slices(prompt.box or around(prompt, self.window_shape))] = 4
            boxed.append(CoarseLogits(low_DHW, self.image_DHW.shape, nearest=False))
        return boxed


def around(prompt: Prompt, window: tuple[int, ...]) -> Box:
    """An eighth of the overview to each side of the first point, and as far as it goes."""
    assert prompt.points_N3 is not None
    reach_3 = np.array(window) // 8
    low_3 = (prompt.points_N3[0] - reach_3).clip(0)
    high_3 = np.minimum(prompt.points_N3[0] + reach_3, np.array(window) - 1)
    d0, h0, w0, d1, h1, w1 = (int(place) for place in (*low_3, *high_3))
    return d0, h0, w0, d1, h1, w1


def build(config: SegVolConfig, names: list[str]) -> SegVol:
    torch.manual_seed(0)
    return SegVol(config, TextBank.seeded(names, config.text_dim)).eval()


def opened(source: Path, folder: Path) -> tuple[Normalised, list[Prompt]]:
    """The doubled trunk's body crop, and a box+text prompt for each of its categories, in the order of the list."""
    for name in ("trunk_ct", "trunk_seg"):
        double(source / f"{name}.nii.gz", folder / f"{name}.nii.gz")
    volume = read_volume(folder / "trunk_ct.nii.gz")
    labels_DHW = read_label(folder / "trunk_seg.nii.gz", volume)
    intensity = intensity_of(volume.array_DHW)
    body = box_slices(body_box(volume.array_DHW, intensity))
    prompts = []
    for name, values in yaml.safe_load((source / "categories.yaml").read_text())["categories"].items():
        mask_DHW = np.isin(labels_DHW[body], values)
        if mask_DHW.sum() >= 8 * SMALLEST:
            prompts.append(Prompt(text=name, box=box_of(mask_DHW)))
    return Normalised(volume.array_DHW[body], intensity), prompts


def dice(one: ZoomResult, other: ZoomResult) -> float:
    first, second = (result.mask(0.5) for result in (one, other))
    return float(2 * (first & second).sum() / max(int(first.sum() + second.sum()), 1))


def each_alone(model: SegVol, image: Normalised, prompts: list[Prompt], zoom: ZoomConfig) -> Answers:
    config = replace(zoom, batch=1, decode_batch=1, cache_gb=0)
    started = time.perf_counter()
    results = [BoxZoomer(model, image, config).zoom(prompt, np.random.default_rng(0)) for prompt in prompts]
    return time.perf_counter() - started, results


def together(model: SegVol, image: Normalised, prompts: list[Prompt], zoom: ZoomConfig) -> Answers:
    started = time.perf_counter()
    zoomer = BoxZoomer(model, image, zoom)
    results = list(zoomer.zoom_all([zoomer.request(prompt, np.random.default_rng(0)) for prompt in prompts]))
    return time.perf_counter() - started, results


def categories(model: SegVol, image: Normalised, prompts: list[Prompt], count: int, zoom: ZoomConfig) -> None:
    chosen = [prompts[int(place)] for place in np.linspace(0, len(prompts) - 1, count)]
    fast, ours = together(model, image, chosen, zoom)
    slow, theirs = each_alone(model, image, chosen, zoom)
    assert [result.windows for result in ours] == [result.windows for result in theirs]
    agreement = [dice(one, other) for one, other in zip(ours, theirs, strict=True)]
    windows = sum(result.windows for result in ours)
    print(
        f"{count} categories, {windows} windows decoded: {slow:.1f} s each alone, {fast:.1f} s together: "
        f"1/{slow / fast:.1f}; Dice of the masks at least {min(agreement):.4f}",
        flush=True,
    )


def second(model: SegVol, image: Normalised, prompts: list[Prompt]) -> None:
    started = time.perf_counter()
    zoomer = Zoomer(model, image, ZoomConfig())
    zoomer.zoom_out(prompts[0]).mask(0.5)
    first = time.perf_counter() - started
    taken = []
    for prompt in prompts[1:6]:
        started = time.perf_counter()
        zoomer.zoom_out(prompt).mask(0.5)
        taken.append(time.perf_counter() - started)
    later = float(np.median(taken))
    print(
        f"first prompt {first:.2f} s, a second one {later:.2f} s (zooming out alone): 1/{first / later:.1f}", flush=True
    )


def memory(source: Path, config: SegVolConfig, whole: bool, zoom: ZoomConfig, precision: Precision) -> None:
    with tempfile.TemporaryDirectory() as name:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as apart:
            apart.submit(enlarge, source, Path(name)).result()
        with ProcessPoolExecutor(1, mp_context=context) as apart:
            path = Path(name) / "large_ct.nii.gz"
            before, peak, windows, took = apart.submit(predict_large, path, config, whole, zoom, precision).result()
    region = "the whole body" if whole else "a region of 60 x 150 x 150 voxels"
    print(
        f"512 x 512 x 800, {region}, {windows} windows, {took:.0f} s: peak {peak:.2f} GB, "
        f"{peak - before:.2f} GB beyond the model's process",
        flush=True,
    )


def predict_large(
    path: Path, config: SegVolConfig, whole: bool, zoom: ZoomConfig, precision: Precision
) -> tuple[float, float, int, float]:
    """GB before and at the peak, windows, seconds."""
    predictor = Predictor(build(config, ["liver"]), zoom, precision)
    before, started = peak_gb(), time.perf_counter()
    done = [0]

    def tell(now: int, wanted: int) -> None:
        done[0] = now
        print(f"\r{now} of {wanted} windows", end="", file=sys.stderr, flush=True)

    session = predictor.open(path, tell)
    session.zoomer.__class__ = BoxZoomer
    box = session.body if whole else (400, 180, 180, 459, 329, 329)
    session.segment(Prompt(text="liver", box=box)).save(path.with_name("mask.nii.gz"))
    print(file=sys.stderr)
    return before, peak_gb(), done[0], time.perf_counter() - started


def peak_gb() -> float:
    return resident() / 1e9


def help_seconds() -> None:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "segvol_pl", "predict", "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    print(f"predict --help: {np.median(taken):.2f} s", flush=True)


def click(source: Path, precision: Precision) -> None:
    session = Predictor(build(TINY, ["liver"]), precision=precision).open(source / "trunk_ct.nii.gz")
    session.zoomer.__class__ = BoxZoomer
    low_3, high_3 = np.array(session.body[:3]), np.array(session.body[3:])
    taken = []
    for share in (0.5, 0.3, 0.7, 0.4, 0.6):
        point_3 = np.rint(low_3 + share * (high_3 - low_3)).astype(int)
        started = time.perf_counter()
        session.segment(Prompt(points_N3=point_3[None], labels_N=np.array([1])))
        taken.append(time.perf_counter() - started)
    print(f"a click, tiny model: median {np.median(taken):.2f} s, at most {max(taken):.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", type=Path, default=Path("../shared/ct"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--categories", nargs="+", type=int, default=[10, 30])
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--precision", type=Precision, default=Precision.fp32, metavar="fp32|bf16")
    given = parser.parse_args()
    print(f"{given.precision.value}, {torch.get_num_threads()} threads", flush=True)
    config, zoom = SMALL if given.small else SegVolConfig(), ZoomConfig(overlap=given.overlap, batch=1)
    if "help" in given.parts:
        help_seconds()
    if "click" in given.parts:
        click(given.source, given.precision)
    if {"categories", "second"} & set(given.parts):
        with tempfile.TemporaryDirectory() as name:
            image, prompts = opened(given.source, Path(name))
        model = build(config, [str(prompt.text) for prompt in prompts])
        print(f"{image.shape} voxels of body, {len(prompts)} categories", flush=True)
        with autocast(torch.device("cpu"), given.precision):
            if "second" in given.parts:
                second(model, image, prompts)
            for count in given.categories if "categories" in given.parts else []:
                categories(model, image, prompts, count, zoom)
    if "memory" in given.parts:
        memory(given.source, config, given.small, zoom, given.precision)


if __name__ == "__main__":
    main()
