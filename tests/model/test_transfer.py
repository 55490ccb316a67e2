"""muP: which factor each parameter gets, that the base stays as it is, and that attention's is the stated scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_model

from segvol_pl.config import OptimConfig, PretrainConfig, TrainConfig, Transfer, Widths
from segvol_pl.errors import ConfigError
from segvol_pl.model import TextBank
from segvol_pl.model.image_encoder import Block
from segvol_pl.model.transfer import Factor, at_base, factors
from segvol_pl.training.module import Task, optimizer
from segvol_pl.training.pretrain import SimMIMTask
from segvol_pl.training.segment import SegVolTask

BASE = Widths(hidden_size=16, mlp_dim=32, num_heads=2, decoder_heads=2, decoder_mlp_dim=32)
WIDE = {"hidden_size": 64, "mlp_dim": 128, "decoder_mlp_dim": 64}
"""Four times the base's width, and twice its decoder's MLPs; heads are four times as large."""
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1, max_steps=10, transfer=Transfer.mup, base_widths=BASE)


def simmim(optim: OptimConfig, **sizes: int) -> SimMIMTask:
    torch.manual_seed(0)
    return SimMIMTask(PretrainConfig(model=tiny_model(**sizes), optim=optim))


def segvol(optim: OptimConfig, **sizes: int) -> SegVolTask:
    torch.manual_seed(0)
    config = TrainConfig(model=tiny_model(mask_prompt=True, point_maps=True, landmarks=["line"], **sizes), optim=optim)
    return SegVolTask(config, TextBank.seeded(["liver"], 512))


def found_in(task: Task, make: Callable[..., Task]) -> dict[str, Factor]:
    """The factors of a wide task's parameters."""
    plain = replace(OPTIM, transfer=Transfer.none)
    return factors(task, make(plain), make(plain, **{key: 2 * size for key, size in WIDE.items()}))


MAKERS = pytest.mark.parametrize("make", [simmim, segvol])


OUTPUTS = ("head.weight", "output_hypernetworks_mlps.0.layers.2", "txt_align_upscaled_embedding")
"""What starts at 0."""


@MAKERS
def test_a_model_of_the_bases_widths_is_as_without_transfer_but_for_its_outputs(make: Callable[..., Task]) -> None:
    with_it, without = make(OPTIM), make(replace(OPTIM, transfer=Transfer.none))
    assert set(with_it.rates.values()) == {1.0} and without.rates == {}
    for (name, ours), theirs in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert not ours.any() if any(part in name for part in OUTPUTS) else torch.equal(ours, theirs), name
    (group,), (other,) = (optimizer(task, OPTIM)[0].param_groups for task in (with_it, without))
    assert {**group, "params": []} == {**other, "params": []}


HEAD, CHANNELS = 0.25**0.25, 0.25
"""The factors of operands, where heads and channels are four times the base's."""
ENCODER = {
    "patch_embedding.patch_embeddings.1.weight": Factor(1, 1),
    "patch_embedding.patch_embeddings.1.bias": Factor(1, 1),
    "patch_embedding.position_embeddings": Factor(1, 1),
    "blocks.0.norm1.weight": Factor(1, 1),
    "blocks.0.attn.qkv.weight": Factor(HEAD, HEAD / 4),
    "blocks.0.attn.out_proj.weight": Factor(1 / HEAD, 1 / HEAD / 4),
    "blocks.0.attn.out_proj.bias": Factor(2, 1),
    "blocks.0.mlp.linear1.weight": Factor(1, 1 / 4),
    "blocks.0.mlp.linear2.weight": Factor(1, 1 / 4),
    "norm.bias": Factor(1, 1),
}
SIMMIM = {
    "mask_token": Factor(1, 1),
    "head.weight": Factor(0, 1 / 4),
    "head.bias": Factor(2, 1),
    **{f"encoder.{name}": factor for name, factor in ENCODER.items()},
}
LAYER = "mask_decoder.transformer.layers.0"
SEGVOL = {
    **{f"image_encoder.{name}": factor for name, factor in ENCODER.items()},
    "prompt_encoder.point_embeddings.0.weight": Factor(1, 1),
    "prompt_encoder.landmark_embeddings.weight": Factor(1, 1),
    "prompt_encoder.mask_embedding.lin1.weight": Factor(1, 1),
    "prompt_encoder.mask_embedding.lin2.weight": Factor(1, 1 / 4),
    "text_encoder.dim_align.weight": Factor(1, 1),
    f"{LAYER}.self_attn.q_proj.weight": Factor(HEAD, HEAD / 4),
    f"{LAYER}.self_attn.k_proj.bias": Factor(2 * HEAD, HEAD),
    f"{LAYER}.self_attn.v_proj.weight": Factor(1, 1 / 4),
    f"{LAYER}.cross_attn_token_to_image.out_proj.weight": Factor(1, 1 / 4),
    f"{LAYER}.mlp.lin1.weight": Factor(1, 1 / 4),
    f"{LAYER}.mlp.lin2.weight": Factor(1, 1 / 2),  # the decoder's MLPs are only twice the base's
    "mask_decoder.mask_tokens.weight": Factor(1, 1),
    "mask_decoder.output_upscaling.0.weight": Factor(1, 1 / 4),
    "mask_decoder.output_upscaling.1.weight": Factor(1, 1),
    "mask_decoder.output_upscaling.3.weight": Factor(1, 1 / 4),
    "mask_decoder.output_hypernetworks_mlps.0.layers.0.weight": Factor(1, 1 / 4),
    "mask_decoder.output_hypernetworks_mlps.0.layers.2.weight": Factor(0, CHANNELS / 4),
    "mask_decoder.txt_align_upscaled_embedding.bias": Factor(0, CHANNELS),
}


@pytest.mark.parametrize(
    ("make", "expected"), [(simmim, SIMMIM), (segvol, {f"model.{name}": each for name, each in SEGVOL.items()})]
)
def test_every_kind_of_parameter_has_the_factors_of_the_table(
    make: Callable[..., Task], expected: dict[str, Factor]
) -> None:
    task = make(OPTIM, **WIDE)
    found = found_in(task, make)
    assert list(found) == [name for name, _ in task.named_parameters()]
    for name, factor in expected.items():
        assert found[name] == pytest.approx(factor), name
    assert task.rates == {name: factor.rate for name, factor in found.items()}


@MAKERS
def test_initial_weights_are_those_without_transfer_times_the_factor(make: Callable[..., Task]) -> None:
    task, plain = make(OPTIM, **WIDE), make(replace(OPTIM, transfer=Transfer.none), **WIDE)
    found = found_in(task, make)
    for (name, ours), theirs in zip(task.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs * found[name].start, msg=name)


def test_heads_of_one_size_leave_attention_as_it_is() -> None:
    task = simmim(OPTIM, **WIDE, num_heads=8)
    assert task.rates["encoder.blocks.0.attn.qkv.weight"] == task.rates["encoder.blocks.0.mlp.linear1.weight"] == 0.25


def test_the_factors_of_attention_are_a_scale_by_the_size_of_the_head() -> None:
    """The encoder's attention with them is that without them, its logits divided by size / root of the base's size."""
    config, x_BTE = tiny_model(**WIDE), torch.randn(2, 5, 64)
    with_them = Block(config)
    attention: Any = Block(config).attn
    attention.load_state_dict(with_them.attn.state_dict())
    with torch.no_grad():
        changed: Any = with_them.attn
        changed.qkv.weight.mul_(HEAD)
        changed.out_proj.weight.div_(HEAD)
        found = changed.out_proj(with_them._mixed(changed.qkv(x_BTE)))
        q, k, v = attention.qkv(x_BTE).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=8**0.5 / 32).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found, attention.out_proj(mixed))


def test_every_weight_is_in_one_group_and_shrinks_by_the_same_share() -> None:
    task = segvol(OPTIM, **WIDE)
    groups = optimizer(task, OPTIM)[0].param_groups
    rate_of = {id(weight): group["initial_lr"] for group in groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rate_of) == len(list(task.parameters()))
    for name, weight in task.named_parameters():
        assert rate_of[id(weight)] == pytest.approx(1e-3 * task.rates[name])
    assert all(group["initial_lr"] * group["weight_decay"] == pytest.approx(1e-4) for group in groups)
    assert groups[0]["initial_lr"] == 1e-3, "the rate that is logged"


def test_without_decay_of_norms_and_biases_rates_still_apply() -> None:
    optim = replace(OPTIM, weight_decay_all=False)
    task = segvol(optim, **WIDE)
    groups = optimizer(task, optim)[0].param_groups
    held = {id(weight): group for group in groups for weight in group["params"]}
    for name, weight in task.named_parameters():
        group = held[id(weight)]
        matrix = name.endswith(".weight") and weight.ndim > 1 and "embeddings" not in name
        if name.endswith(".bias"):
            assert group["weight_decay"] == 0 and group["initial_lr"] == pytest.approx(1e-3 * task.rates[name])
        elif matrix and "mlp" in name:
            assert group["initial_lr"] * group["weight_decay"] == pytest.approx(1e-4)


def test_the_base_is_the_same_run_in_other_widths() -> None:
    config = PretrainConfig(model=tiny_model(**WIDE, num_layers=3), optim=OPTIM)
    base = at_base(config)
    assert base.model == tiny_model(num_layers=3) and base.optim.transfer is Transfer.none


def test_base_widths_that_make_no_model_are_named() -> None:
    problem = r"^optim\.base_widths\.hidden_size: 100 is not a multiple of optim\.base_widths\.num_heads"
    with pytest.raises(ConfigError, match=problem):
        Widths(hidden_size=100, num_heads=3)
