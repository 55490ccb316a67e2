"""A GPU's forms of encoder and decoder against a CPU's, which are the plain ones: here both run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from factories import tiny_model
from monai.networks.blocks.transformerblock import TransformerBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from segvol_pl import kernels
from segvol_pl.config import Recompute, SegVolConfig
from segvol_pl.model.image_encoder import Block, ImageEncoder
from segvol_pl.model.mask_decoder import TwoWayTransformer
from segvol_pl.model.narrow import narrow, narrowed
from segvol_pl.planning import memory

MODEL = tiny_model(
    input_shape=[8, 32, 32],
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    mlp_dim=96,
    decoder_heads=4,
    decoder_mlp_dim=64,
)
PROMPTS, SPARSE = 3, 7


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Chooses the forms."""
    return lambda yes: monkeypatch.setattr(kernels, "INTERPRETED", yes)


def _prompts(transformer: TwoWayTransformer, images: int) -> Callable[[], list[Tensor]]:
    """What the transformer gives for prompts of so many images, and its gradients: of image, prompts and weights."""
    generator = torch.Generator().manual_seed(1)
    tokens = math.prod(MODEL.grid)
    image_BTE = torch.randn(images, tokens, MODEL.hidden_size, generator=generator, requires_grad=True)
    place_TE = torch.randn(tokens, MODEL.hidden_size, generator=generator)
    prompt_ASE = torch.randn(images * PROMPTS, SPARSE, MODEL.hidden_size, generator=generator, requires_grad=True)
    keep_AS = torch.rand(images * PROMPTS, SPARSE, generator=generator) < 0.7
    keep_AS[:, 0] = True
    weigh_ATE = torch.randn(images * PROMPTS, tokens, MODEL.hidden_size, generator=generator)

    def found() -> list[Tensor]:
        side = transformer.project_image(image_BTE, place_TE)
        side = side if kernels.fused(image_BTE) else side.spread(PROMPTS)
        tokens_ASE, seen_ATE = transformer(prompt_ASE, side, keep_AS)
        loss = (seen_ATE.float() * weigh_ATE).mean() + tokens_ASE.float().square().mean()
        gradients = torch.autograd.grad(loss, [image_BTE, prompt_ASE, *transformer.parameters()])
        return [tokens_ASE.float(), seen_ATE.float(), *gradients]

    return found


def _transformer() -> TwoWayTransformer:
    torch.manual_seed(0)
    transformer = TwoWayTransformer(MODEL)
    for weight in transformer.parameters():  # biases and norms start as nothing
        nn.init.normal_(weight, mean=float(weight.ndim == 1), std=0.2)
    return transformer


def _away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max().clamp(min=1e-6))


def _far(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("images", [1, 2])
def test_what_prompts_share_is_not_copied_and_gives_the_same(on_gpu: Callable[[bool], None], images: int) -> None:
    results = []
    for gpu in (False, True):
        on_gpu(gpu)
        results.append(_prompts(_transformer(), images)())
    forward = [_away(found, wanted) for wanted, found in zip(*(result[:2] for result in results), strict=True)]
    assert max(forward) < 1e-5
    for wanted, found in zip(*(result[2:] for result in results), strict=True):
        # A key's bias moves no softmax: its gradient is rounding alone.
        assert _away(found, wanted) < 1e-4 or float(wanted.abs().max()) < 1e-6


def test_in_bf16_the_image_stays_narrow_and_as_near_to_float32(on_gpu: Callable[[bool], None]) -> None:
    transformer = _transformer()
    on_gpu(False)
    exact = _prompts(transformer, 2)()
    errors = []
    for gpu in (False, True):
        on_gpu(gpu)
        with torch.autocast("cpu", torch.bfloat16):
            found = _prompts(transformer, 2)()
        errors.append(
            [float((x - y).detach().norm() / y.detach().norm()) for x, y in zip(found[:4], exact[:4], strict=True)]
        )
    plain, ours = errors
    # Tokens and image, then their gradients: 0.4 % is what one rounding costs.
    assert all(mine < 2 * theirs + 4e-3 for mine, theirs in zip(ours, plain, strict=True)), errors


class _Made(TorchDispatchMode):
    """Sizes and types of what operations other than views make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, torch.dtype]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not function.is_view:
            self.made.append((out.numel(), out.dtype))
        return out


def test_nothing_wide_is_made_for_every_prompt(on_gpu: Callable[[bool], None]) -> None:
    """Under autocast no float32 tensor of the size of all prompts' images, forward and backward."""
    on_gpu(True)
    transformer, size = _transformer(), math.prod(MODEL.grid) * MODEL.hidden_size
    image_BTE = torch.randn(2, size // MODEL.hidden_size, MODEL.hidden_size, requires_grad=True)
    place_TE = torch.randn(image_BTE.shape[1:])
    prompt_ASE, keep_AS = torch.randn(2 * PROMPTS, SPARSE, MODEL.hidden_size), torch.ones(2 * PROMPTS, SPARSE).bool()
    with _Made() as watch, torch.autocast("cpu", torch.bfloat16):
        out = transformer(prompt_ASE, transformer.project_image(image_BTE, place_TE), keep_AS)
        torch.autograd.grad(out, [image_BTE, *transformer.parameters()], [torch.ones_like(x) for x in out])
    assert {dtype for made, dtype in watch.made if made >= 2 * PROMPTS * size} == {torch.bfloat16}


def test_keys_of_an_image_are_not_copied_for_its_prompts() -> None:
    attention = _transformer().final_attn_token_to_image
    inner, tokens = MODEL.hidden_size // 2, math.prod(MODEL.grid)
    q_ASI, k_BTI, v_BTI = (torch.randn(*size, inner) for size in ((2 * PROMPTS, 1), (2, tokens), (2, tokens)))
    with _Made() as watch:
        attention.mix(q_ASI, k_BTI, v_BTI)
    assert max(made for made, _ in watch.made) < PROMPTS * tokens * inner


def _kept(transformer: TwoWayTransformer, config: SegVolConfig, prompts: int) -> int:
    """Bytes that autograd keeps of so many prompts of two images in bf16, each storage counted once."""
    tokens, width = math.prod(config.grid), config.hidden_size
    storages: dict[Any, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    image_BTE, place_TE = torch.empty(2, tokens, width, requires_grad=True), torch.empty(tokens, width)
    prompt_ASE, keep_AS = torch.empty(2 * prompts, SPARSE, width), torch.ones(2 * prompts, SPARSE, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = transformer(prompt_ASE, transformer.project_image(image_BTE, place_TE), keep_AS)
        held = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in out}
    return sum({**storages, **held}.values())


def test_the_planner_knows_what_a_prompt_keeps_of_its_image(on_gpu: Callable[[bool], None]) -> None:
    """Of the full model, on fake tensors."""
    on_gpu(True)
    config = SegVolConfig()
    with FakeTensorMode():
        transformer = TwoWayTransformer(config)
        few, many = (_kept(transformer, config, prompts) for prompts in (4, 12))
    # A prompt's own tokens are small.
    assert (many - few) / 16 == pytest.approx(memory.two_way_bytes(config, True), rel=0.05)


# ---- the encoder ----


def test_a_block_of_the_encoder_is_monais_to_the_digit() -> None:
    ours = Block(MODEL)
    theirs = TransformerBlock(MODEL.hidden_size, MODEL.mlp_dim, MODEL.num_heads, use_flash_attention=True)
    del theirs.norm_cross_attn
    # An optimizer's state in a checkpoint goes by the order of the parameters.
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    tokens_BTE = torch.randn(2, 16, MODEL.hidden_size, requires_grad=True)
    found = [
        (out := block(tokens_BTE), *torch.autograd.grad(out.square().sum(), tokens_BTE)) for block in (ours, theirs)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_cast_together_train_as_weights_cast_one_by_one(on_gpu: Callable[[bool], None]) -> None:
    torch.manual_seed(0)
    encoder, image_BCDHW = ImageEncoder(MODEL), torch.rand(2, 1, *MODEL.input_shape)
    results: list[Sequence[Tensor]] = []
    for gpu in (False, True):
        on_gpu(gpu)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder(image_BCDHW).float()
        results.append([out, *torch.autograd.grad(out.square().mean(), list(encoder.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_nothing_is_narrowed_without_autocast_or_on_a_cpu(on_gpu: Callable[[bool], None]) -> None:
    x, weights = torch.randn(3, requires_grad=True), (torch.randn(2, requires_grad=True), torch.randn(3))
    for gpu in (False, True):
        on_gpu(gpu)
        assert narrow(x) is x and all(a is b for a, b in zip(narrowed(*weights), weights, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            dtypes = {narrow(x).dtype, *(weight.dtype for weight in narrowed(*weights))}
            again = narrowed(*narrowed(*weights))
        assert dtypes == {torch.bfloat16 if gpu else torch.float32}
        assert {weight.dtype for weight in again} == dtypes


@pytest.mark.parametrize("recompute", list(Recompute))
def test_a_block_draws_nothing(recompute: Recompute) -> None:
    """What is computed again may do without the generators' states."""
    encoder = ImageEncoder(MODEL)
    encoder.recompute = recompute
    before = torch.get_rng_state()
    encoder(torch.zeros(1, 1, *MODEL.input_shape)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    dropped = [module.p for module in encoder.modules() if isinstance(module, nn.Dropout)]
    assert dropped and not any(dropped)
