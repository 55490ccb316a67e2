"""Parameters and operations by arithmetic, against the model built and torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segvol_pl.config import PretrainConfig, TrainConfig
from segvol_pl.config.loader import load
from segvol_pl.model import SegVol, TextBank
from segvol_pl.model.prompt_encoder import PromptTensors
from segvol_pl.planning import flops
from segvol_pl.planning.flops import Work
from segvol_pl.training.pretrain import SimMIMTask

SMALL = tiny_model(
    input_shape=[12, 32, 16],
    patch_size=[2, 8, 8],
    hidden_size=32,
    num_layers=3,
    mlp_dim=48,
    decoder_mlp_dim=40,
)
POINTS = 5


def _prompts(count: int, landmarks: int, mask_shape: tuple[int, ...] | None) -> PromptTensors:
    return PromptTensors(
        points_BPN3=torch.rand(1, count, POINTS, 3),
        labels_BPN=torch.ones(1, count, POINTS, dtype=torch.int64),
        boxes_BP6=torch.rand(1, count, 6),
        text_BP=torch.zeros(1, count, dtype=torch.int64),
        landmarks_BPM3=torch.rand(1, count, landmarks, 3),
        has_points_BP=torch.ones(1, count, dtype=torch.bool),
        has_box_BP=torch.ones(1, count, dtype=torch.bool),
        has_text_BP=torch.ones(1, count, dtype=torch.bool),
        has_landmarks_BPM=torch.ones(1, count, landmarks, dtype=torch.bool),
        masks_BPDHW=None if mask_shape is None else torch.rand(1, count, *mask_shape),
        has_mask_BP=None if mask_shape is None else torch.ones(1, count, dtype=torch.bool),
    )


def _counted(forward: Callable[[], Tensor]) -> Work:
    # Torch's counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as first:
            out = forward()
        with FlopCounterMode(display=False) as second:
            out.sum().backward()
    return Work(first.get_total_flops(), second.get_total_flops())


@pytest.fixture(scope="module")
def model() -> SegVol:
    return SegVol(SMALL, TextBank.seeded(["liver"], SMALL.text_dim))


def test_the_encoders_work_is_what_torch_counts(model: SegVol) -> None:
    assert _counted(lambda: model.encode(torch.rand(1, 1, 12, 32, 16))) == flops.encoder_work(SMALL)


@pytest.mark.parametrize(
    ("count", "landmarks", "masks", "maps"),
    [(1, 0, False, False), (3, 0, False, False), (3, 2, False, False), (3, 0, True, False), (3, 0, True, True)],
)
def test_the_decoders_work_is_what_torch_counts(count: int, landmarks: int, masks: bool, maps: bool) -> None:
    marks = [f"{landmarks}*toys:ends"] if landmarks else []
    config = replace(SMALL, landmarks=marks, mask_prompt=masks, point_maps=maps)
    model = SegVol(config, TextBank.seeded(["liver"], SMALL.text_dim))
    tokens = torch.rand(1, 48, 32, requires_grad=True)
    expected = count * flops.prompt_work(config, POINTS) + flops.image_work(config)
    # Torch's counter leaves out the product of the finest features with a vector, the mask's weights.
    voxels, width = 64 * 48, SMALL.hidden_size // 8
    with_a_vector = count * Work(2 * voxels * width, 4 * voxels * width)
    prompts = _prompts(count, landmarks, config.mask_shape if masks else None)
    assert _counted(lambda: model.decode_low(tokens, prompts)) + with_a_vector == expected


def test_the_upsamplings_work_is_what_torch_counts(model: SegVol) -> None:
    low = torch.rand(1, 3, 24, 16, 8, requires_grad=True)
    assert _counted(lambda: model.upsample(low)) == 3 * flops.upsampling_work(SMALL)


def test_the_work_of_pretraining_is_what_torch_counts() -> None:
    task = SimMIMTask(PretrainConfig(model=SMALL, mask_ratio=0.25))
    mask = torch.arange(48)[None] < 12
    batch = {"image_BCDHW": torch.rand(1, 1, 12, 32, 16), "mask_BT": mask}
    assert _counted(lambda: task.loss(batch)) == flops.total(flops.pretrain_work(SMALL, 0.25))


@pytest.mark.parametrize(
    "more",
    ["landmarks=[]", "landmarks=[6*toys:extremes]", "mask_prompt=true", "mask_prompt=true model.point_maps=true"],
)
@pytest.mark.parametrize("name", ["tiny", "small", "base", "large", "huge"])
def test_parameters_are_those_of_the_model(name: str, more: str) -> None:
    path = Path(__file__).parents[2] / "configs" / "model" / f"{name}.yaml"
    config = load(
        "train",
        [f"model={path}", *f"model.{more}".split(), "data.shards=DIR", "run.out=DIR", "optim.max_steps=1"],
    )
    assert isinstance(config, TrainConfig)
    with torch.device("meta"):
        model = SegVol(config.model, TextBank(["x"], torch.zeros(1, 512)))
        pretraining = SimMIMTask(PretrainConfig(model=config.model))
    assert {name: _size(part) for name, part in model.named_children() if _size(part)} == flops.parameters(config.model)
    assert _size(pretraining) == sum(flops.pretrain_parameters(config.model).values())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
