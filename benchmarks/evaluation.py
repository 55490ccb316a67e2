"""What evaluating costs: seconds of the three modes on one CT, and of the surface Dice against MONAI's.

    python benchmarks/evaluation.py [tiny|small|base|surfaces] [precision=fp32|bf16]

1. Seconds a prompt of zoom, resize and sliding, everything encoded anew (paper Table 3: 190, 65, 3331 ms a case and
   organ on a GPU, its prompts not stated): a CT of 244 x 202 x 224 voxels, text and box+text, an untrained model of the
   size named (base: the published ViT-B), float32 unless said otherwise.
2. The surface Dice (alone with `surfaces`) of two balls of 120 voxels across and of two noisy organs, by area and by
   voxels, against `monai.metrics.compute_surface_dice` of the same form in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_surface_dice
from results import record
from scipy import ndimage

from segvol_pl.config import CasesConfig, EvaluateConfig, Mode, Precision, Timing
from segvol_pl.config.loader import load
from segvol_pl.data.schema import CategoryFacts, Facts
from segvol_pl.evaluation.case_runner import CaseRunner
from segvol_pl.evaluation.cases import EvalCase
from segvol_pl.evaluation.metrics import hausdorff95, surface_dice, surface_voxel_dice
from segvol_pl.evaluation.prompts import settings
from segvol_pl.imaging.intensity import intensity_of
from segvol_pl.model import SegVol
from segvol_pl.model.text_encoder import TextBank

SHAPE, ORGAN = (244, 202, 224), (slice(80, 150), slice(60, 130), slice(70, 150))
MODELS = Path(__file__).parents[1] / "configs" / "model"


def made_case() -> tuple[EvalCase, np.ndarray]:
    """A bright box in noise, and its mask."""
    truth_DHW = np.zeros(SHAPE, bool)
    truth_DHW[ORGAN] = True
    hu_DHW = np.random.default_rng(0).normal(-100, 40, SHAPE).astype(np.int16)
    hu_DHW[truth_DHW] += 150
    box = [80, 60, 70, 149, 129, 149]
    facts = Facts(
        key="ct",
        shape=list(SHAPE),
        spacing=[1.5, 1.5, 1.5],
        affine=None,
        source={},
        dataset="noise",
        split="test",
        modality="CT",
        intensity=intensity_of(hu_DHW),
        categories={"liver": CategoryFacts([1], int(truth_DHW.sum()), box, [])},
        labelled=True,
        overview_shape=[32, 256, 256],
    )
    return EvalCase(facts, hu_DHW, truth_DHW.astype(np.uint8), None, (0, 0, 0, 243, 201, 223)), truth_DHW


def modes(size: str, precision: Precision) -> None:
    model_config = load(
        "train", [f"model={MODELS / size}.yaml", "data.shards=x", "run.out=x", "optim.max_steps=1"]
    ).model
    torch.manual_seed(0)
    model = SegVol(model_config, TextBank.seeded(["liver"], model_config.text_dim)).eval()
    config = EvaluateConfig(
        "untrained",
        CasesConfig(shards="x"),
        "x",
        modes=list(Mode),
        prompts=["text", "box+text"],
        timing=Timing.cold,
        precision=precision,
    )
    # An untrained model marks about half of all voxels, so that the region zoomed into is the whole volume; holding it
    # to the organ is what a trained one does.
    case, truth_DHW = made_case()
    runner = CaseRunner(model, case, config)
    inside_DHW = torch.nn.functional.interpolate(
        torch.from_numpy(truth_DHW.astype(np.float32))[None, None], size=model_config.input_shape
    )
    decode = model.decode

    def held(tokens_BTE: torch.Tensor, prompts: object) -> torch.Tensor:
        logits_BPDHW: torch.Tensor = decode(tokens_BTE, prompts)  # type: ignore[arg-type]
        return 0 * logits_BPDHW + (20 * inside_DHW - 10)

    model.decode = held  # type: ignore[method-assign,assignment]
    seconds = {}
    print(f"{size} model, {precision.value}")
    for setting in settings(config):
        prediction = runner.predict(setting, "liver", truth_DHW)
        seconds[setting.prompt, setting.mode] = prediction.seconds
        cost = f"{prediction.seconds:8.2f} s  {prediction.windows:3} windows  {prediction.memory_mb or 0:6.0f} MiB"
        print(f"{setting.prompt:8} {setting.mode:8} {cost}", flush=True)
    record("evaluation", {f"{size} {precision.value} {mode} {prompt}, s": s for (prompt, mode), s in seconds.items()})
    for prompt in config.prompts:
        zoom, resize, sliding = (seconds[prompt, mode.value] for mode in Mode)
        print(f"{prompt}: sliding / zoom {sliding / zoom:.1f}, zoom / resize {zoom / resize:.1f}")


def surfaces() -> None:
    place = np.indices((160, 160, 160))
    balls = [((place - middle) ** 2).sum(axis=0) < 60**2 for middle in (80, 81)]
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=place.shape[1:]), 3)
    organs = [ball & (noise + shift > -0.02) for ball, shift in zip(balls, (0.0, 0.005), strict=True)]
    for name, (one, other) in {"balls": balls, "organs": organs}.items():
        _surface(name, one, other)


def _surface(name: str, one: np.ndarray, other: np.ndarray) -> None:
    spacing = [2.0, 1.0, 1.0]
    tensors = [torch.from_numpy(mask)[None, None] for mask in (one, other)]
    ours = {
        "area": seconds_of(lambda: surface_dice(one, other, spacing, 2.0)),
        "voxels": seconds_of(lambda: surface_voxel_dice(one, other, spacing, 2.0)),
        "HD95": seconds_of(lambda: hausdorff95(one, other, spacing)),
    }
    theirs = {
        form: seconds_of(
            lambda subvoxels=form == "area": compute_surface_dice(  # type: ignore[misc]
                *tensors, [2.0], include_background=True, spacing=spacing, use_subvoxels=subvoxels
            )
        )
        for form in ("area", "voxels")
    }
    told = ", ".join(f"{form} {taken:.2f} s" for form, taken in ours.items())
    ratios = ", ".join(f"{form} {taken / ours[form]:.1f}" for form, taken in theirs.items())
    print(f"surface Dice of {name}: {told}; area / voxels {ours['area'] / ours['voxels']:.2f}; MONAI / ours: {ratios}")


def seconds_of(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    keys = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    sizes = [argument for argument in sys.argv[1:] if "=" not in argument]
    if sizes != ["surfaces"]:
        modes(sizes[0] if sizes else "small", Precision(keys.get("precision", "fp32")))
    surfaces()
