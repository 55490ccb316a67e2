"""The stage `micro` of `gpu.py`: parts of a step by themselves, ours beside plain forms, forward and backward.

1. Norm and GELU over a prompt's whole fine features (A, T, 8, E/4): torch's, by `var_mean`, and the model's.
2. The decoder's upscaling of A prompts as a whole, and one of its two-way blocks.
3. From low-resolution logits to the losses: upsampled and compared plainly, and as the task does it.
4. Attention in the shapes of encoder and decoder, by each of torch's backends.

ms is the median of a forward and a backward pass; `limit` what the tensors read and written once would take at this
card's own copy rate. Letters: A prompts, B images, T tokens, E embedding, D H W voxels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_stages import Bench, milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from segvol_pl.config import SegVolConfig
from segvol_pl.device import autocast
from segvol_pl.model import SegVol
from segvol_pl.training import losses
from segvol_pl.training.losses import mask_losses

Part = Callable[..., Tensor]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def measure(bench: Bench) -> None:
    """All four."""
    torch.manual_seed(0)
    model = SegVol(bench.model).to(bench.device)
    rate = _copy_rate(bench)
    # A group of today's default on CPUs, and all prompts of a default batch.
    for prompts in (2,) if bench.small else (6, 120):
        _norms(bench, model, prompts, rate)
        _upscaling(bench, model, prompts, rate)
        _compared(bench, model, prompts, rate)
    _attention(bench, bench.model)


def _copy_rate(bench: Bench) -> float:
    """Bytes read and written a millisecond."""
    words = 2**20 if bench.small else 2**28
    here, there = torch.randn(words, device=bench.device), torch.randn(words, device=bench.device)
    return 8 * words / milliseconds(lambda: there.copy_(here), bench.device)


def _time(bench: Bench, form: str, work: Part, inputs: list[Tensor], moved: float = 0.0, **told: Any) -> None:
    """ms of `work(*inputs)` and of all inputs' gradients, from random ones of its result."""
    with bench.part(form=form, **told):
        leaves = [each.detach().requires_grad_(each.is_floating_point()) for each in inputs]
        trained = [each for each in leaves if each.requires_grad]
        with autocast(bench.device, bench.precision):
            upper = torch.randn_like(work(*leaves))

        def both() -> None:
            with autocast(bench.device, bench.precision):
                out = work(*leaves)
            torch.autograd.grad(out, trained, upper)

        ms = milliseconds(both, bench.device, repeats=10 if bench.gpu else 2, warm=2 if bench.gpu else 1)
        bench.note("ms", round(ms, 3), "ms", form=form, **told, precision=bench.precision.value)
        if moved:
            bench.note("limit", round(moved, 3), "ms", form=form, **told, precision=bench.precision.value)


def _features(bench: Bench, *shape: int) -> Tensor:
    dtype = torch.bfloat16 if bench.bf16 else torch.float32
    return torch.randn(*shape, device=bench.device, dtype=dtype)


# ---- the decoder's upscaling ----


def _norms(bench: Bench, model: SegVol, prompts: int, rate: float) -> None:
    upscaling, config = model.mask_decoder.output_upscaling, bench.model
    fine_AT8E = _features(bench, prompts, math.prod(config.grid), 8, config.hidden_size // 4)
    weights = [torch.randn(fine_AT8E.shape[1:], device=bench.device) for _ in range(2)]
    # Forward twice read and once written, backward twice two tensors read and one written.
    limit = 8 * fine_AT8E.nbytes / rate
    forms: dict[str, Part] = {
        "torch's layer_norm, GELU": lambda x, w, b: F.gelu(F.layer_norm(x, x.shape[1:], w, b)),
        "var_mean, GELU": _by_var_mean,
    }
    if hasattr(upscaling, "_activated"):
        forms["the model's"] = lambda x, *_: upscaling._activated(x)
    for form, work in forms.items():
        given = [fine_AT8E, *weights] if form != "the model's" else [fine_AT8E]
        _time(bench, form, work, given, limit, part="norm and GELU", prompts=prompts)


def _by_var_mean(x_AT8E: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x_AT8E.float(), (1, 2, 3), correction=0, keepdim=True)
    normed = (x_AT8E - mean) * torch.rsqrt(variance + 1e-5) * scale + shift
    return F.gelu(normed.to(x_AT8E.dtype))


def _upscaling(bench: Bench, model: SegVol, prompts: int, rate: float) -> None:
    config, upscaling = bench.model, model.mask_decoder.output_upscaling
    image_ATE = _features(bench, prompts, math.prod(config.grid), config.hidden_size)
    weights_AE = _features(bench, prompts, config.hidden_size // 8)
    # Twice and eight times as many voxels of a quarter and an eighth of the channels, both ways.
    limit = (2 * image_ATE.nbytes * (1 + 2 + 8)) / rate
    _time(bench, "the model's", upscaling, [image_ATE, weights_AE], limit, part="upscaling", prompts=prompts)


# ---- from low resolution to the losses ----


def _compared(bench: Bench, model: SegVol, prompts: int, rate: float) -> None:
    config = bench.model
    low_BPDHW = _features(bench, 1, prompts, *(4 * size for size in config.grid))
    masks_BKDHW = torch.rand(1, max(prompts // 6, 1), *config.input_shape, device=bench.device) < 0.1
    rows_P = torch.arange(prompts, device=bench.device) % masks_BKDHW.shape[1]
    limit = 2 * (2 * low_BPDHW.nbytes + masks_BKDHW.nbytes) / rate

    def plain(upsample: Part, low: Tensor) -> Tensor:
        dice, bce = mask_losses(upsample(low)[:, :, None], masks_BKDHW[:, rows_P])
        return dice + bce

    forms: dict[str, Part] = {
        "upsampled by torch, compared": functools.partial(
            plain, lambda low: F.interpolate(low.float(), config.input_shape, mode="trilinear")
        ),
        "upsampled by products, compared": functools.partial(plain, model.upsample),
    }
    fused = getattr(losses, "low_mask_losses", None)
    if fused is not None:
        forms["the task's"] = lambda low: sum(fused(low, masks_BKDHW, rows_P))
    for form, work in forms.items():
        _time(bench, form, work, [low_BPDHW], limit, part="upsampling and losses", prompts=prompts)


# ---- attention ----


def _attention(bench: Bench, config: SegVolConfig) -> None:
    """Queries x keys: the encoder's, a prompt's tokens to the image, the image to a prompt's tokens (masked)."""
    tokens, many = math.prod(config.grid), 2 if bench.small else 30
    shapes = {
        "encoder": (
            2 if bench.small else 8,
            config.num_heads,
            tokens,
            tokens,
            config.hidden_size // config.num_heads,
            False,
        ),
        "prompt to image": (
            many,
            config.decoder_heads,
            32,
            tokens,
            config.hidden_size // 2 // config.decoder_heads,
            False,
        ),
        "image to prompt": (
            many,
            config.decoder_heads,
            tokens,
            32,
            config.hidden_size // 2 // config.decoder_heads,
            True,
        ),
    }
    for name, (batch, heads, queries, keys, width, masked) in shapes.items():
        q, k, v = (_features(bench, batch, heads, length, width) for length in (queries, keys, keys))
        keep = torch.rand(batch, 1, 1, keys, device=bench.device) < 0.8 if masked else None
        if keep is not None:
            keep[..., 0] = True
        for form, backend in BACKENDS.items():
            # On a CPU there are these two, and a mask or large products need memory that a small machine lacks.
            if not bench.gpu and form not in ("flash", "math"):
                continue

            def work(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend, keep: Any = keep) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

            _time(bench, form, work, [q, k, v], part="attention", what=name)
