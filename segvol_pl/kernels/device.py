"""The Triton kernels and what launches them. Sums are float32, block by block into partials, never by atomics.

A program knows its place by one number, since only a grid's first axis is long; a tensor's offsets beyond a row are
64 bits wide, since all prompts of a batch together have more than 2^31 elements.

Letters: A rows (images x prompts), N elements of a row, V voxels, E channels; lower case: of low resolution.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

WIDE = 4096
"""Elements of a row that one program takes, where it reads a single tensor."""
NARROW = 1024
"""The same where it reads several, and keeps sums of each element."""
TILE = 2048
"""Voxels x channels at once."""
SPAN = 8192
"""Voxels that one program sums up."""
LOW = 128
"""Voxels of low resolution that one program takes."""


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# Arguments are numbers and pointers as much as tensors; Triton itself reads what stands behind the colon.

# ---- norm and GELU ----


@triton.jit
def _normal(z: tensor) -> tensor:
    """The normal distribution below z, and its density there; z times the first is GELU.

    Beyond |z| the distribution is the bell times a polynomial of 1 / (1 + c |z|), here that of degree 8 whose relative
    error is least, 3e-7. GELU is as exact by it as by `tl.erf`, in fewer instructions, and its slope shares the bell.
    """
    bell = tl.exp(-0.5 * z * z)
    near = 1.0 / (1.0 + 0.42426406871192845 * tl.abs(z))
    beyond = -0.0460446310 * near + 0.2059877844
    beyond = beyond * near - 0.3222545570
    beyond = beyond * near + 0.1419107866
    beyond = beyond * near + 0.0366914647
    beyond = beyond * near + 0.1458050927
    beyond = beyond * near + 0.1686238195
    beyond = (beyond * near + 0.1692800883) * near * bell
    return tl.where(z < 0, beyond, 1.0 - beyond), 0.3989422804014327 * bell


@triton.jit
def _gelu(z: tensor) -> tensor:
    share, _ = _normal(z)
    return z * share


@triton.jit
def _gelu_slope(z: tensor) -> tensor:
    share, density = _normal(z)
    return share + z * density


@triton.jit
def _moments_of_blocks(x: tensor, means: tensor, spreads: tensor, N: tensor, blocks: tensor, BLOCK: constexpr) -> None:
    """Each block's mean, and the sum of squares around it: squares around zero would cancel where the mean is large."""
    place = tl.program_id(0)
    first = (place % blocks) * BLOCK
    element = first + tl.arange(0, BLOCK)
    row = x + (place // blocks).to(tl.int64) * N
    value = tl.load(row + element, mask=element < N, other=0.0).to(tl.float32)
    mean = tl.sum(value) / tl.minimum(N - first, BLOCK)
    away = tl.where(element < N, value - mean, 0.0)
    tl.store(means + place, mean)
    tl.store(spreads + place, tl.sum(away * away))


@triton.jit
def _moments_of_rows(
    means: tensor, spreads: tensor, mean: tensor, inverse: tensor, eps: tensor, N: tensor, blocks: tensor,
    SPAN: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """A row's mean and 1 / standard deviation from its blocks of SPAN elements."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        count = tl.minimum(tl.maximum(N - block * SPAN, 0), SPAN)
        total += count * tl.load(means + row * blocks + block, mask=block < blocks, other=0.0)
    middle = tl.sum(total) / N
    spread = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        count = tl.minimum(tl.maximum(N - block * SPAN, 0), SPAN)
        away = tl.load(means + row * blocks + block, mask=block < blocks, other=0.0) - middle
        spread += tl.load(spreads + row * blocks + block, mask=block < blocks, other=0.0) + count * away * away
    tl.store(mean + row, middle)
    tl.store(inverse + row, 1.0 / tl.sqrt_rn(tl.sum(spread) / N + eps))


@triton.jit
def _norm_gelu(
    x: tensor, scale: tensor, shift: tensor, mean: tensor, inverse: tensor, out: tensor, N: tensor, rows: tensor,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    # Neighbours take the same elements of other rows: scale and shift come from the cache.
    place = tl.program_id(0)
    row = place % rows
    element = (place // rows) * BLOCK + tl.arange(0, BLOCK)
    inside = element < N
    start = row.to(tl.int64) * N
    value = tl.load(x + start + element, mask=inside, other=0.0).to(tl.float32)
    normed = (value - tl.load(mean + row)) * tl.load(inverse + row)
    z = normed * tl.load(scale + element, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(shift + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + element, _gelu(z).to(out.dtype.element_ty), mask=inside)


def norm_gelu(x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `upscaled.norm_gelu`, with each row's mean and 1 / standard deviation."""
    rows, size = x_AN.shape
    blocks = triton.cdiv(size, WIDE)
    means, spreads = x_AN.new_empty((2, rows, blocks), dtype=torch.float32)
    mean_A, inverse_A = x_AN.new_empty(rows, dtype=torch.float32), x_AN.new_empty(rows, dtype=torch.float32)
    out_AN = torch.empty_like(x_AN)
    with _on(x_AN):
        _moments_of_blocks[(rows * blocks,)](x_AN, means, spreads, size, blocks, WIDE, num_warps=8)
        _moments_of_rows[(rows,)](means, spreads, mean_A, inverse_A, eps, size, blocks, WIDE, 1024)
        grid = (rows * triton.cdiv(size, NARROW),)
        scale, shift = scale_N.contiguous(), shift_N.contiguous()
        _norm_gelu[grid](x_AN, scale, shift, mean_A, inverse_A, out_AN, size, rows, NARROW)
    return out_AN, mean_A, inverse_A


@triton.jit
def _norm_gelu_sums(
    grad: tensor, x: tensor, scale: tensor, shift: tensor, mean: tensor, inverse: tensor, to_scale: tensor,
    to_shift: tensor, totals: tensor, alongs: tensor, N: tensor, rows: tensor, blocks: tensor, BLOCK: constexpr,
) -> None:  # fmt: skip
    """One block of elements in all rows: the gradients of its scale and shift, and its part of each row's two sums."""
    place = tl.program_id(0)
    element = place * BLOCK + tl.arange(0, BLOCK)
    inside = element < N
    scales = tl.load(scale + element, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + element, mask=inside, other=0.0).to(tl.float32)
    for_scale = tl.zeros((BLOCK,), tl.float32)
    for_shift = tl.zeros((BLOCK,), tl.float32)
    offset = element.to(tl.int64)
    for row in range(0, rows):
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        normed = (value - tl.load(mean + row)) * tl.load(inverse + row)
        inner = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        inner *= _gelu_slope(normed * scales + shifts)
        for_scale += inner * normed
        for_shift += inner
        tl.store(totals + row * blocks + place, tl.sum(inner * scales))
        tl.store(alongs + row * blocks + place, tl.sum(inner * scales * normed))
        offset += N
    tl.store(to_scale + element, for_scale.to(to_scale.dtype.element_ty), mask=inside)
    tl.store(to_shift + element, for_shift.to(to_shift.dtype.element_ty), mask=inside)


@triton.jit
def _norm_gelu_backward(
    grad: tensor, x: tensor, scale: tensor, shift: tensor, mean: tensor, inverse: tensor, total: tensor, along: tensor,
    to_x: tensor, N: tensor, rows: tensor, BLOCK: constexpr,
) -> None:  # fmt: skip
    place = tl.program_id(0)
    row = place % rows
    element = (place // rows) * BLOCK + tl.arange(0, BLOCK)
    inside = element < N
    start = row.to(tl.int64) * N
    deviation = tl.load(inverse + row)
    normed = (tl.load(x + start + element, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + row)) * deviation
    scales = tl.load(scale + element, mask=inside, other=0.0).to(tl.float32)
    z = normed * scales + tl.load(shift + element, mask=inside, other=0.0).to(tl.float32)
    to_normed = tl.load(grad + start + element, mask=inside, other=0.0).to(tl.float32) * _gelu_slope(z) * scales
    found = deviation * (to_normed - tl.load(total + row) / N - normed * (tl.load(along + row) / N))
    tl.store(to_x + start + element, found.to(to_x.dtype.element_ty), mask=inside)


def norm_gelu_backward(
    grad_AN: Tensor, x_AN: Tensor, scale_N: Tensor, shift_N: Tensor, mean_A: Tensor, inverse_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and shift."""
    rows, size = x_AN.shape
    blocks = triton.cdiv(size, NARROW)
    scale, shift = scale_N.contiguous(), shift_N.contiguous()
    to_x, to_scale, to_shift = torch.empty_like(x_AN), torch.empty_like(scale), torch.empty_like(shift)
    partials = x_AN.new_empty((2, rows, blocks), dtype=torch.float32)
    given = grad_AN, x_AN, scale, shift, mean_A, inverse_A
    with _on(x_AN):
        _norm_gelu_sums[(blocks,)](*given, to_scale, to_shift, *partials, size, rows, blocks, NARROW)
        _norm_gelu_backward[(rows * blocks,)](*given, *partials.sum(-1), to_x, size, rows, NARROW)
    return to_x, to_scale, to_shift


# ---- GELU and product ----


@triton.jit
def _gelu_product(
    x: tensor, weights: tensor, out: tensor, V: tensor, blocks: tensor, E: constexpr, TALL: constexpr, BROAD: constexpr
) -> None:
    """TALL voxels of one row, BROAD of their channels at a time."""
    place = tl.program_id(0)
    row = place // blocks
    first = (place % blocks) * TALL
    within = tl.arange(0, TALL)
    inside = first + within < V
    start = row.to(tl.int64) * V + first
    total = tl.zeros((TALL, BROAD), tl.float32)
    for lowest in tl.static_range(0, E, BROAD):
        channel = lowest + tl.arange(0, BROAD)
        known = inside[:, None] & (channel < E)[None, :]
        value = tl.load(x + start * E + (within[:, None] * E + channel[None, :]), mask=known, other=0.0)
        value = value.to(tl.float32)
        weight = tl.load(weights + row * E + channel, mask=channel < E, other=0.0).to(tl.float32)
        total += _gelu(value) * weight[None, :]
    tl.store(out + start + within, tl.sum(total, 1), mask=inside)


@triton.jit
def _gelu_product_backward(
    grad: tensor, x: tensor, weights: tensor, to_x: tensor, to_weights: tensor, V: tensor, spans: tensor, E: constexpr,
    SPAN: constexpr, TALL: constexpr, BROAD: constexpr,
) -> None:  # fmt: skip
    """SPAN voxels of one row, BROAD of their channels: x's gradient, and the span's part of the weights'."""
    CHUNKS: constexpr = (E + BROAD - 1) // BROAD
    place = tl.program_id(0)
    channel = (place % CHUNKS) * BROAD + tl.arange(0, BROAD)
    span = place // CHUNKS
    row = span // spans
    weight = tl.load(weights + row * E + channel, mask=channel < E, other=0.0).to(tl.float32)
    total = tl.zeros((TALL, BROAD), tl.float32)
    within = tl.arange(0, TALL)
    for step in range(0, SPAN, TALL):
        first = (span % spans) * SPAN + step
        inside = first + within < V
        start = row.to(tl.int64) * V + first
        known = inside[:, None] & (channel < E)[None, :]
        tile = within[:, None] * E + channel[None, :]
        value = tl.load(x + start * E + tile, mask=known, other=0.0).to(tl.float32)
        above = tl.load(grad + start + within, mask=inside, other=0.0)[:, None]
        share, density = _normal(value)
        slope = share + value * density
        tl.store(to_x + start * E + tile, (above * weight[None, :] * slope).to(to_x.dtype.element_ty), mask=known)
        total += above * value * share
    tl.store(to_weights + span * E + channel, tl.sum(total, 0), mask=channel < E)


def _tile(channels: int) -> tuple[int, int]:
    """Voxels and channels at once: powers of two, and as few lanes without a channel as can be."""
    even = channels & -channels
    broad = min(even, 128) if even >= 16 else min(triton.next_power_of_2(channels), 128)
    return TILE // broad, broad


def gelu_product(x_AVE: Tensor, weights_AE: Tensor) -> Tensor:
    """As `upscaled.gelu_product`."""
    rows, voxels, channels = x_AVE.shape
    tall, broad = _tile(channels)
    blocks = triton.cdiv(voxels, tall)
    out_AV = x_AVE.new_empty((rows, voxels), dtype=torch.float32)
    with _on(x_AVE):
        _gelu_product[(rows * blocks,)](x_AVE, weights_AE, out_AV, voxels, blocks, channels, tall, broad)
    return out_AV


def gelu_product_backward(grad_AV: Tensor, x_AVE: Tensor, weights_AE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights."""
    rows, voxels, channels = x_AVE.shape
    tall, broad = _tile(channels)
    span = 16 * tall
    spans = triton.cdiv(voxels, span)
    to_x, partials = torch.empty_like(x_AVE), x_AVE.new_empty((rows, spans, channels), dtype=torch.float32)
    grid = (rows * spans * triton.cdiv(channels, broad),)
    with _on(x_AVE):
        _gelu_product_backward[grid](
            grad_AV, x_AVE, weights_AE, to_x, partials, voxels, spans, channels, span, tall, broad
        )
    return to_x, partials.sum(1).to(weights_AE.dtype)


# ---- comparison with masks ----


@triton.jit
def _source(voxel: tensor, OLD: constexpr, NEW: constexpr) -> tensor:
    """Where a full voxel lies among the low ones, along one axis."""
    return tl.minimum(tl.maximum((voxel.to(tl.float32) + 0.5) * (OLD / NEW) - 0.5, 0.0), OLD - 1.0)


@triton.jit
def _between(near: tensor, far: tensor, share: tensor) -> tensor:
    return near + (far - near) * share


@triton.jit
def _column(
    low: tensor, d0: tensor, d1: tensor, d_share: tensor, h0: tensor, h1: tensor, h_share: tensor, w: tensor,
    inside: tensor, h: constexpr, w_size: constexpr, DEEPENS: constexpr,
) -> tensor:  # fmt: skip
    """Low logits in column w, interpolated along h and, where that axis grows, d."""
    line = low + w
    value = _between(
        tl.load(line + (d0 * h + h0) * w_size, mask=inside, other=0.0).to(tl.float32),
        tl.load(line + (d0 * h + h1) * w_size, mask=inside, other=0.0).to(tl.float32),
        h_share,
    )
    if DEEPENS:
        deeper = _between(
            tl.load(line + (d1 * h + h0) * w_size, mask=inside, other=0.0).to(tl.float32),
            tl.load(line + (d1 * h + h1) * w_size, mask=inside, other=0.0).to(tl.float32),
            h_share,
        )
        value = _between(value, deeper, d_share)
    return value


@triton.jit
def _mask_of(masks: tensor, rows: tensor, prompt: tensor, P: tensor, K: tensor, V: constexpr) -> tensor:
    """The mask that answers a prompt of the batch."""
    row = tl.load(rows + prompt % P)
    return masks + ((prompt // P) * K + row).to(tl.int64) * V


@triton.jit
def _compared(
    low: tensor, masks: tensor, rows: tensor, sums: tensor, prompts: tensor, P: tensor, K: tensor, spans: tensor,
    d: constexpr, h: constexpr, w: constexpr, D: constexpr, H: constexpr, W: constexpr, SPAN: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    # Neighbours compare the same voxels of other prompts, which may share the mask.
    place = tl.program_id(0)
    prompt = place % prompts
    span = place // prompts
    mask = _mask_of(masks, rows, prompt, P, K, D * H * W)
    logits = low + prompt.to(tl.int64) * (d * h * w)
    bce = tl.zeros((BLOCK,), tl.float32)
    all_of = tl.zeros((BLOCK,), tl.float32)
    overlap = tl.zeros((BLOCK,), tl.float32)
    size = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, SPAN, BLOCK):
        voxel = span * SPAN + step + tl.arange(0, BLOCK)
        inside = voxel < D * H * W
        deep = _source(voxel // (H * W), d, D)
        high = _source(voxel // W % H, h, H)
        wide = _source(voxel % W, w, W)
        d0, h0, w0 = deep.to(tl.int32), high.to(tl.int32), wide.to(tl.int32)
        d1, h1, w1 = tl.minimum(d0 + 1, d - 1), tl.minimum(h0 + 1, h - 1), tl.minimum(w0 + 1, w - 1)
        left = _column(logits, d0, d1, deep - d0, h0, h1, high - h0, w0, inside, h, w, d != D)
        right = _column(logits, d0, d1, deep - d0, h0, h1, high - h0, w1, inside, h, w, d != D)
        logit = _between(left, right, wide - w0)
        truth = tl.load(mask + voxel, mask=inside, other=0) != 0
        # In (0, 1]: neither it nor what is made of it overflows.
        small = tl.exp(-tl.abs(logit))
        beyond = 1.0 + small
        # log(1 + small), whose last digits 1 + small has lost.
        log_beyond = tl.where(beyond == 1.0, small, tl.log(beyond) * small / tl.where(beyond == 1.0, 1.0, beyond - 1.0))
        probability = tl.where(logit >= 0, 1.0, small) / beyond
        bce += tl.where(inside, tl.maximum(tl.where(truth, -logit, logit), 0.0) + log_beyond, 0.0)
        all_of += tl.where(inside, probability, 0.0)
        overlap += tl.where(truth, probability, 0.0)
        size += tl.where(truth, 1.0, 0.0)
    sums += (prompt * spans + span) * 4
    tl.store(sums, tl.sum(bce))
    tl.store(sums + 1, tl.sum(all_of))
    tl.store(sums + 2, tl.sum(overlap))
    tl.store(sums + 3, tl.sum(size))


@triton.jit
def _visited(low: tensor, step: tensor, OLD: constexpr, NEW: constexpr) -> tensor:
    """One of the full voxels around a low one, along one axis.

    Its place (-1 if there is none), the low voxel's neighbour that it lies towards, that one's share in it, and the
    low voxel's own.
    """
    voxel = tl.floor((low - 0.5) * (NEW / OLD) - 0.5).to(tl.int32) + 1 + step
    away = _source(voxel, OLD, NEW) - low
    share = tl.abs(away)
    there = (voxel >= 0) & (voxel < NEW) & (share < 1.0)
    neighbour = tl.where(away < 0, tl.maximum(low - 1, 0), tl.minimum(low + 1, OLD - 1))
    return tl.where(there, voxel, -1), neighbour, share, tl.where(there, 1.0 - share, 0.0)


@triton.jit
def _compared_backward(
    grad: tensor, low: tensor, masks: tensor, rows: tensor, to_low: tensor, P: tensor, K: tensor, blocks: tensor,
    d: constexpr, h: constexpr, w: constexpr, D: constexpr, H: constexpr, W: constexpr, DEEP: constexpr,
    HIGH: constexpr, WIDE: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Low voxels, each of which visits DEEP x HIGH x WIDE full ones.

    A full voxel that takes part of a low one lies between it and its neighbours: three columns of low logits, brought
    to the full voxel's d and h, give all of a line.
    """
    place = tl.program_id(0)
    prompt = place // blocks
    mask = _mask_of(masks, rows, prompt, P, K, D * H * W)
    start = prompt.to(tl.int64) * (d * h * w)
    to_bce = tl.load(grad + prompt * 4)
    to_probability = tl.load(grad + prompt * 4 + 1)
    to_overlap = tl.load(grad + prompt * 4 + 2)
    voxel = (place % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = voxel < d * h * w
    d0, h0, w0 = voxel // (h * w), voxel // w % h, voxel % w
    before, behind = tl.maximum(w0 - 1, 0), tl.minimum(w0 + 1, w - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for deep in range(0, DEEP):
        d_full, d1, d_share, d_own = _visited(d0, deep, d, D)
        for high in range(0, HIGH):
            h_full, h1, h_share, h_own = _visited(h0, high, h, H)
            left = _column(low + start, d0, d1, d_share, h0, h1, h_share, before, inside, h, w, d != D)
            middle = _column(low + start, d0, d1, d_share, h0, h1, h_share, w0, inside, h, w, d != D)
            right = _column(low + start, d0, d1, d_share, h0, h1, h_share, behind, inside, h, w, d != D)
            line = tl.zeros((BLOCK,), tl.float32)
            for wide in tl.static_range(0, WIDE):
                w_full, w1, w_share, w_own = _visited(w0, wide, w, W)
                logit = _between(middle, tl.where(w1 < w0, left, right), w_share)
                there = inside & (d_full >= 0) & (h_full >= 0) & (w_full >= 0)
                truth = tl.load(mask + (d_full * H + h_full) * W + w_full, mask=there, other=0) != 0
                small = tl.exp(-tl.abs(logit))
                part = 1.0 / (1.0 + small)
                rest = small * part
                probability = tl.where(logit >= 0, part, rest)
                # Within the mask probability - 1, without losing its last digits.
                off = tl.where(truth, -tl.where(logit >= 0, rest, part), probability)
                line += w_own * (to_bce * off + (to_probability + tl.where(truth, to_overlap, 0.0)) * part * rest)
            total += d_own * h_own * line
    tl.store(to_low + start + voxel, total.to(to_low.dtype.element_ty), mask=inside)


def compared(low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    """As `compared.compared`."""
    (images, each), full = low_BPdhw.shape[:2], masks_BKDHW.shape[2:]
    voxels = math.prod(full)
    span = min(SPAN, triton.cdiv(voxels, NARROW) * NARROW)
    prompts, spans = images * each, triton.cdiv(voxels, span)
    partials = low_BPdhw.new_empty((images, each, spans, 4), dtype=torch.float32)
    with _on(low_BPdhw):
        _compared[(prompts * spans,)](
            low_BPdhw, masks_BKDHW.view(torch.uint8), rows_P, partials, prompts, each, masks_BKDHW.shape[1], spans,
            *low_BPdhw.shape[2:], *full, span, NARROW,
        )  # fmt: skip
    return partials.sum(2)


def compared_backward(grad_BP4: Tensor, low_BPdhw: Tensor, masks_BKDHW: Tensor, rows_P: Tensor) -> Tensor:
    """The low logits' gradient."""
    (images, each, *low), full = low_BPdhw.shape, masks_BKDHW.shape[2:]
    blocks = triton.cdiv(math.prod(low), LOW)
    visits = [1 if old == new else math.ceil(2 * new / old) for old, new in zip(low, full, strict=True)]
    to_low = torch.empty_like(low_BPdhw)
    with _on(low_BPdhw):
        _compared_backward[(images * each * blocks,)](
            grad_BP4, low_BPdhw, masks_BKDHW.view(torch.uint8), rows_P, to_low, each, masks_BKDHW.shape[1], blocks,
            *low, *full, *visits, LOW,
        )  # fmt: skip
    return to_low
