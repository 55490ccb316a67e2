"""The mask decoder: image tokens and prompt tokens attend to each other, then a mask is predicted (paper Sec. 2.1).

SAM's two-way transformer, upscaling by transposed 3-D convolutions, a hyper-network for the mask, and SegVol's
text branch, whose similarity map is added to the mask (the paper's prose multiplies, its released code adds).

On a CPU, tensors that prompts share with their image are copied for each prompt. On a GPU, where memory traffic costs
more than arithmetic, they are not: the queries of all prompts of an image attend to its keys together, the projections
of the image are one product, and under autocast the image stays bf16 through its norm.

Letters: B images, A images x prompts flattened, S prompt tokens, T image tokens, E embedding, I inner width of an
attention, D H W low-resolution voxels.

Sizes are read as `x.shape[0]`: `len(x)` would fix the number of prompts when the decoder is exported (`sharing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segvol_pl.config import MASK_TOKENS, SegVolConfig
from segvol_pl.kernels import fused
from segvol_pl.kernels.upscaled import gelu_product, norm_gelu
from segvol_pl.model.narrow import narrow


class Attention(nn.Module):
    """Multi-head attention with an inner width of `hidden / downsample`."""

    def __init__(self, hidden: int, heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = hidden // downsample
        self.heads = heads
        self.q_proj = nn.Linear(hidden, inner)
        self.k_proj = nn.Linear(hidden, inner)
        self.v_proj = nn.Linear(hidden, inner)
        self.out_proj = nn.Linear(inner, hidden)
        if downsample > 1:
            self._start_local()

    def _start_local(self) -> None:
        """Start with equal query and key projections: tokens attend to tokens with a similar position.

        With independent ones the Fourier features of a box have no meaning at first, and training long ignores boxes.
        """
        nn.init.orthogonal_(self.q_proj.weight)
        with torch.no_grad():
            self.k_proj.weight.copy_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        nn.init.zeros_(self.k_proj.bias)

    def forward(self, q_ASE: Tensor, k_ATE: Tensor, v_ATE: Tensor, keep_AT: Tensor | None = None) -> Tensor:
        """Attention, (A,S,E). keep_AT: bool, False for keys that are masked out."""
        return self.mix(self.q_proj(q_ASE), self.k_proj(k_ATE), self.v_proj(v_ATE), keep_AT)

    def mix(self, q_ASI: Tensor, k_ATI: Tensor, v_ATI: Tensor, keep_AT: Tensor | None = None) -> Tensor:
        """Attention after the projections. Queries, or keys and values, may be those of B images, shared by prompts."""
        if q_ASI.shape[0] > k_ATI.shape[0]:
            assert keep_AT is None, "shared keys cannot be masked"
            of_image = q_ASI.unflatten(0, (k_ATI.shape[0], -1)).flatten(1, 2)
            return self.mix(of_image, k_ATI, v_ATI).view(*q_ASI.shape[:2], -1)
        q_ASI = _spread(q_ASI, k_ATI.shape[0] // q_ASI.shape[0])
        mask = None if keep_AT is None else keep_AT[:, None, None, :]
        q, k, v = self._split(q_ASI), self._split(k_ATI), self._split(v_ATI)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        split_heads: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return split_heads


def _spread(x_BTE: Tensor, count: int) -> Tensor:
    """(B,...) -> (B x count, ...). A single image is not copied."""
    return x_BTE[:, None].expand(-1, count, *x_BTE.shape[1:]).flatten(0, 1)


def _projections(
    image_ATE: Tensor, place_TE: Tensor, placed: Sequence[nn.Linear], plain: nn.Linear
) -> tuple[Tensor, ...]:
    """(A,T,I) each: `placed` applied to the image plus its positions, and `plain` applied to the image."""
    if not fused(image_ATE):
        placed_ATE = image_ATE + place_TE
        return *(layer(placed_ATE) for layer in placed), plain(image_ATE)
    # One product reads the image once; the positions are projected once for all prompts.
    products = F.linear(image_ATE, torch.cat([*(layer.weight for layer in placed), plain.weight]))
    assert plain.bias is not None
    offset_T = torch.cat([*(layer(place_TE) for layer in placed), plain.bias.expand(len(place_TE), -1)], dim=-1)
    parts: tuple[Tensor, ...] = (products + offset_T.to(products.dtype)).split(plain.out_features, dim=-1)
    return parts


def _renewed(image_BTE: Tensor, found_ATE: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(A,T,E): the norm of the image plus the result of its attention to each prompt's tokens."""
    if not fused(found_ATE):
        normed_ATE: Tensor = norm(image_BTE + found_ATE)
        return normed_ATE
    dtype = found_ATE.dtype
    sum_ATE = (image_BTE.to(dtype)[:, None] + found_ATE.unflatten(0, (len(image_BTE), -1))).flatten(0, 1)
    # Autocast would use float32: twice the memory traffic, and another cast. The statistics are float32 anyway.
    with torch.autocast(found_ATE.device.type, enabled=False):
        return F.layer_norm(sum_ATE, norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


class MLPBlock(nn.Module):
    """Two linear layers with a ReLU between them: (..., E) -> (..., E)."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(hidden, mlp)
        self.lin2 = nn.Linear(mlp, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class ImageContext(NamedTuple):
    """The image's part in a layer's two cross attentions; in the first layer equal for all prompts of an image."""

    image_BTE: Tensor
    place_TE: Tensor
    """The tokens' positions."""
    keys_BTI: Tensor
    values_BTI: Tensor
    """Keys and values for the attention of prompt tokens to the image."""
    queries_BTI: Tensor
    """Queries for the attention of the image to prompt tokens."""

    def spread(self, count: int) -> ImageContext:
        """Repeat for `count` prompts of each image."""
        image, place, *projected = self
        image, *projected = (_spread(x, count) for x in (image, *projected))
        return ImageContext(image, place, *projected)


class TwoWayAttentionBlock(nn.Module):
    """Prompt tokens attend to themselves and to the image; then the image attends to the prompt tokens."""

    def __init__(self, config: SegVolConfig, first: bool) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.decoder_heads
        self.first = first
        self.self_attn = Attention(hidden, heads)
        self.norm1 = nn.LayerNorm(hidden)
        self.cross_attn_token_to_image = Attention(hidden, heads, downsample=2)
        self.norm2 = nn.LayerNorm(hidden)
        self.mlp = MLPBlock(hidden, config.decoder_mlp_dim)
        self.norm3 = nn.LayerNorm(hidden)
        self.norm4 = nn.LayerNorm(hidden)
        self.cross_attn_image_to_token = Attention(hidden, heads, downsample=2)

    def project_image(self, image_BTE: Tensor, place_TE: Tensor) -> ImageContext:
        """Compute this layer's projections of the image; a public method, for which FSDP2 gathers the weights."""
        return self._projected(image_BTE, place_TE)

    def _projected(self, image_BTE: Tensor, place_TE: Tensor) -> ImageContext:
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        keys, queries, values = _projections(image_BTE, place_TE, (to_image.k_proj, to_token.q_proj), to_image.v_proj)
        return ImageContext(image_BTE, place_TE, keys, values, queries)

    def add_dense(self, context: ImageContext, dense_ATE: Tensor) -> ImageContext:
        """Add each prompt's dense embedding to the tokens of its image. As `project_image`, FSDP2 gathers for it."""
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        image_ATE, place_TE, *projected = context.spread(dense_ATE.shape[0] // context.image_BTE.shape[0])
        layers = (to_image.k_proj, to_image.v_proj, to_token.q_proj)
        # Projections are linear: those of the images stay as they are.
        added = (x + F.linear(dense_ATE, layer.weight) for x, layer in zip(projected, layers, strict=True))
        return ImageContext(image_ATE + dense_ATE, place_TE, *added)

    def forward(
        self, tokens_ASE: Tensor, seen: ImageContext | tuple[Tensor, Tensor], prompt_ASE: Tensor, keep_AS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer. seen: the context of the image, or image_ATE and place_TE to compute it from."""
        context = seen if isinstance(seen, ImageContext) else self._projected(*seen)
        to_image, to_token = self.cross_attn_token_to_image, self.cross_attn_image_to_token
        tokens_ASE = narrow(self.norm1(self._attend_self(tokens_ASE, prompt_ASE, keep_AS)))
        q = to_image.q_proj(tokens_ASE + prompt_ASE)
        tokens_ASE = narrow(self.norm2(tokens_ASE + to_image.mix(q, context.keys_BTI, context.values_BTI)))
        tokens_ASE = narrow(self.norm3(tokens_ASE + self.mlp(tokens_ASE)))
        k, v = to_token.k_proj(tokens_ASE + prompt_ASE), to_token.v_proj(tokens_ASE)
        image_ATE = _renewed(context.image_BTE, to_token.mix(context.queries_BTI, k, v, keep_AS), self.norm4)
        return tokens_ASE, image_ATE

    def _attend_self(self, tokens_ASE: Tensor, prompt_ASE: Tensor, keep_AS: Tensor) -> Tensor:
        if self.first:
            out: Tensor = self.self_attn(tokens_ASE, tokens_ASE, tokens_ASE, keep_AS)
            return out
        q = tokens_ASE + prompt_ASE
        attended_ASE: Tensor = tokens_ASE + self.self_attn(q, q, tokens_ASE, keep_AS)
        return attended_ASE


class TwoWayTransformer(nn.Module):
    """Two-way attention of prompt and image tokens, block by block; a last attention of prompt tokens to the image."""

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayAttentionBlock(config, first=i == 0) for i in range(config.decoder_layers))
        self.final_attn_token_to_image = Attention(config.hidden_size, config.decoder_heads, downsample=2)
        self.norm_final_attn = nn.LayerNorm(config.hidden_size)

    def project_image(self, image_BTE: Tensor, place_TE: Tensor) -> ImageContext:
        """Compute the first layer's context of the images, which does not depend on prompts."""
        first = self.layers[0]
        assert isinstance(first, TwoWayAttentionBlock)
        return first.project_image(image_BTE, place_TE)

    def add_dense(self, context: ImageContext, dense_ATE: Tensor) -> ImageContext:
        """Make the context of the images that of each prompt, whose dense embedding is added to the image's tokens."""
        first = self.layers[0]
        assert isinstance(first, TwoWayAttentionBlock)
        return first.add_dense(context, dense_ATE)

    def forward(self, prompt_ASE: Tensor, context: ImageContext, keep_AS: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens_ASE and image_ATE. context: of all A prompts, or on a GPU of the B images."""
        place_TE, prompt_ASE = context.place_TE, narrow(prompt_ASE)
        tokens_ASE = prompt_ASE
        seen: ImageContext | tuple[Tensor, Tensor] = context
        for layer in self.layers:
            tokens_ASE, image_ATE = layer(tokens_ASE, seen, prompt_ASE, keep_AS)
            seen = (image_ATE, place_TE)
        final = self.final_attn_token_to_image
        q = final.q_proj(tokens_ASE + prompt_ASE)
        tokens_ASE = tokens_ASE + final.mix(q, *_projections(image_ATE, place_TE, (final.k_proj,), final.v_proj))
        return narrow(self.norm_final_attn(tokens_ASE)), image_ATE


class HyperNetwork(nn.Module):
    """Three linear layers from a mask token to the weights of the upscaled embedding's channels."""

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out)])

    def forward(self, x: Tensor) -> Tensor:
        """(A, hidden) -> (A, out)."""
        x = F.relu(self.layers[0](x))
        out: Tensor = self.layers[2](F.relu(self.layers[1](x)))
        return out


class _Weighed(torch.autograd.Function):
    """voxels_AVE and weights_AE -> their products (A, V), prompt by prompt: used on CPUs.

    A batched product with a single column is several times slower, most of all backward; and torch would copy the
    prompts' gradients, the largest tensor of a step, to stack them.
    """

    @staticmethod
    def forward(ctx: Any, voxels_AVE: Tensor, weights_AE: Tensor) -> Tensor:
        ctx.save_for_backward(voxels_AVE, weights_AE)
        return torch.stack([voxels_VE @ weight_E for voxels_VE, weight_E in zip(voxels_AVE, weights_AE, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AV: Tensor) -> tuple[Tensor, Tensor]:
        voxels_AVE, weights_AE = ctx.saved_tensors
        to_weights = [voxels_VE.T @ grad_V for grad_V, voxels_VE in zip(grad_AV, voxels_AVE, strict=True)]
        return grad_AV[..., None] * weights_AE[:, None], torch.stack(to_weights)


class Upscaling(nn.Sequential):
    """image_ATE and the mask's channel weights_AE -> logits (A, D, H, W), each token becoming 4 x 4 x 4 voxels.

    Two transposed convolutions of kernel and stride 2: every output voxel has one input voxel, so both are plain
    matrix products over the tokens, and only the final logits are permuted to the order of the volume. The modules hold
    the parameters under the names of the released weights.
    """

    def __init__(self, hidden: int, grid: tuple[int, int, int]) -> None:
        super().__init__(
            nn.ConvTranspose3d(hidden, hidden // 4, kernel_size=2, stride=2),
            nn.LayerNorm((hidden // 4, *(2 * size for size in grid))),
            nn.GELU(),
            nn.ConvTranspose3d(hidden // 4, hidden // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.grid = grid
        for conv in self._convolutions():
            # Every output voxel has one input voxel; torch's default assumes that all eight taps of the kernel add up.
            nn.init.normal_(conv.weight, std=(2 / conv.in_channels) ** 0.5)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def _convolutions(self) -> list[nn.ConvTranspose3d]:
        return [module for module in self if isinstance(module, nn.ConvTranspose3d)]

    def forward(self, image_ATE: Tensor, weights_AE: Tensor) -> Tensor:  # type: ignore[override]
        """logits_ADHW, four times the token grid along each axis."""
        first, second = self._convolutions()
        fine = self._activated(self._double(image_ATE, first))
        finest = self._double(fine, second)
        return self._in_volume_order(self._weighed(finest.flatten(1, 3), weights_AE))

    @staticmethod
    def _double(x: Tensor, conv: nn.ConvTranspose3d) -> Tensor:
        """(..., E) -> (..., 8, out): the eight voxels of each input voxel."""
        assert conv.bias is not None
        weight = conv.weight.flatten(2).permute(2, 1, 0).flatten(0, 1)
        upscaled: Tensor = F.linear(x, weight, conv.bias.repeat(8)).unflatten(-1, (8, -1))
        return upscaled

    def _activated(self, fine_AT8E: Tensor) -> Tensor:
        """Norm and GELU."""
        norm = self[1]
        assert isinstance(norm, nn.LayerNorm)
        scale, shift = self._in_token_order(norm.weight), self._in_token_order(norm.bias)
        if fused(fine_AT8E):
            # torch's norm would process the 3 million values of each prompt in a single thread block.
            return norm_gelu(fine_AT8E.flatten(1), scale.flatten(), shift.flatten(), norm.eps).view_as(fine_AT8E)
        if torch.compiler.is_exporting():
            # Over these millions of values ONNX Runtime's own norm is wrong by 1e-4.
            centred = fine_AT8E - _mean_by_axis(fine_AT8E)
            return F.gelu(centred * torch.rsqrt(_mean_by_axis(centred.square()) + norm.eps) * scale + shift)
        return F.gelu(F.layer_norm(fine_AT8E, fine_AT8E.shape[1:], scale, shift, norm.eps))

    @staticmethod
    def _weighed(finest_AVE: Tensor, weights_AE: Tensor) -> Tensor:
        """logits_AV: GELU, then the product with the mask's weights."""
        if fused(finest_AVE):
            return gelu_product(finest_AVE, weights_AE)
        activated = F.gelu(finest_AVE)
        if torch.compiler.is_exporting():  # the loop over prompts would fix their number in the file
            exported_AV: Tensor = (activated @ weights_AE[..., None])[..., 0]
            return exported_AV
        logits_AV: Tensor = _Weighed.apply(activated, weights_AE.to(activated.dtype))  # type: ignore[no-untyped-call]
        return logits_AV

    def _in_token_order(self, x_EDHW: Tensor) -> Tensor:
        """(E, 2D, 2H, 2W) -> (T, 8, E)."""
        d, h, w = self.grid
        split = x_EDHW.reshape(-1, d, 2, h, 2, w, 2)
        return split.permute(1, 3, 5, 2, 4, 6, 0).reshape(d * h * w, 8, -1)

    def _in_volume_order(self, logits_AV: Tensor) -> Tensor:
        """Voxels ordered (token, first halving, second halving) -> (A, 4D, 4H, 4W)."""
        d, h, w = self.grid
        split = logits_AV.reshape(-1, d, h, w, 2, 2, 2, 2, 2, 2)
        return split.permute(0, 1, 4, 7, 2, 5, 8, 3, 6, 9).reshape(-1, 4 * d, 4 * h, 4 * w)


def _mean_by_axis(x: Tensor) -> Tensor:
    """The mean of each prompt's values, axis after axis, which keeps the sums short."""
    for axis in range(x.ndim - 1, 0, -1):
        x = x.mean(dim=axis, keepdim=True)
    return x


class MaskDecoder(nn.Module):
    """Images, prompt tokens and text -> low-resolution logits (A, D, H, W), four times finer than the token grid.

    Parameter names are those of the released weights. Their unused parts (three of four hyper-networks and the
    IoU head) are omitted: a parameter without a gradient breaks DDP.
    """

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        hidden, grid = config.hidden_size, config.grid
        self.transformer = TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, hidden)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, hidden)
        self.output_upscaling = Upscaling(hidden, grid)
        self.output_hypernetworks_mlps = nn.ModuleList([HyperNetwork(hidden, hidden // 8)])
        self.txt_align_upscaled_embedding = nn.Linear(hidden, hidden // 8)

    def forward(
        self, context: ImageContext, prompt_ASE: Tensor, keep_AS: Tensor, text_AE: Tensor, has_text_A: Tensor
    ) -> Tensor:
        """Return logits_ADHW. context: the first layer's, of the B images, each with A / B prompts."""
        own_SE = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens_ASE = torch.cat([own_SE.expand(prompt_ASE.shape[0], -1, -1), prompt_ASE], dim=1)
        keep_AS = F.pad(keep_AS, (len(own_SE), 0), value=True)
        if not fused(context.image_BTE):
            context = context.spread(prompt_ASE.shape[0] // context.image_BTE.shape[0])
        tokens_ASE, image_ATE = self.transformer(tokens_ASE, context, keep_AS)
        weights_AE = self.output_hypernetworks_mlps[0](tokens_ASE[:, 1])
        weights_AE = weights_AE + self.txt_align_upscaled_embedding(text_AE) * has_text_A[:, None]
        logits_ADHW: Tensor = self.output_upscaling(image_ATE, weights_AE)
        return logits_ADHW
