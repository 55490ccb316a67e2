"""The image encoder: a plain 3-D ViT made of MONAI's blocks (paper Sec. 2.1).

Letters: B batch, C channel, D H W voxels, T tokens, E embedding, V voxels of one patch.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.patchembedding import PatchEmbeddingBlock
from monai.networks.blocks.transformerblock import TransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from segvol_pl.config import Recompute, SegVolConfig
from segvol_pl.model import lora
from segvol_pl.model.narrow import narrowed


class Block(TransformerBlock):
    """MONAI's transformer block with the same parameters, in fewer kernel launches, and optionally with recomputation.

    Recomputation happens inside the block, so that torch.compile includes it and FSDP2 gathers weights once for both.
    """

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__(config.hidden_size, config.mlp_dim, config.num_heads, qkv_bias=False)
        # MONAI creates this norm even without cross attention; parameters without a gradient break DDP.
        del self.norm_cross_attn
        self.recompute = Recompute.none

    def forward(self, tokens_BTE: Tensor) -> Tensor:  # type: ignore[override]
        """tokens_BTE -> tokens_BTE."""
        if self.recompute is Recompute.none or not torch.is_grad_enabled():
            return self._computed(tokens_BTE)
        # A block is not random: random states need not be saved.
        again = functools.partial(checkpoint, self._computed, use_reentrant=False, preserve_rng_state=False)
        # torch.compile needs two separate calls.
        if self.recompute is Recompute.cheap:
            cheap: Tensor = again(tokens_BTE, context_fn=_kept_products)
            return cheap
        out: Tensor = again(tokens_BTE)
        return out

    def _computed(self, tokens_BTE: Tensor) -> Tensor:
        attention: Any = self.attn
        perceptron: Any = self.mlp
        # Access by name: this is when DeepSpeed gathers a split weight.
        projecting, widening, narrowing = attention.out_proj, perceptron.linear1, perceptron.linear2
        biased = [(part.weight, part.bias) for part in (projecting, widening, narrowing)]
        qkv, *others = narrowed(attention.qkv.weight, *itertools.chain(*biased))
        mixed_BTE = self._mixed(lora.linear(attention.qkv, self.norm1(tokens_BTE), qkv))
        tokens_BTE = tokens_BTE + lora.linear(projecting, mixed_BTE, *others[:2])
        hidden_BTE = F.gelu(lora.linear(widening, self.norm2(tokens_BTE), *others[2:4]))
        return tokens_BTE + lora.linear(narrowing, hidden_BTE, *others[4:])

    def _mixed(self, qkv_BTE: Tensor) -> Tensor:
        """Self-attention between the projections. With unbind the backward pass writes one tensor, not three."""
        each = qkv_BTE.unflatten(-1, (3, self.attn.num_heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in each))
        return mixed.transpose(1, 2).flatten(2)


class ImageEncoder(nn.Module):
    """image_BCDHW (C = 1, `config.input_shape`) -> tokens_BTE.

    Parameter names are those of the released weights.
    """

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbeddingBlock(
            in_channels=1,
            img_size=list(config.input_shape),
            patch_size=list(config.patch_size),
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            proj_type="perceptron",
            pos_embed_type="learnable",
            spatial_dims=3,
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def compute_again(self, recompute: Recompute) -> None:
        """Set what the blocks recompute in the backward pass instead of storing it."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = recompute

    def patches(self, image_BCDHW: Tensor) -> Tensor:
        """Cut images into patches_BTV, in the order of the tokens."""
        patches_BTV: Tensor = self._embedding()[0](image_BCDHW)
        return patches_BTV

    def _embedding(self) -> nn.Sequential:
        embedding = self.patch_embedding.patch_embeddings
        assert isinstance(embedding, nn.Sequential)
        return embedding

    def forward(self, image_BCDHW: Tensor) -> Tensor:
        """Encode images in [0, 1] of shape (B, 1, *config.input_shape) to tokens_BTE."""
        return self.encode_patches(self.patches(image_BCDHW))

    def encode_patches(
        self, patches_BTV: Tensor, mask_BT: Tensor | None = None, mask_token_E: Tensor | None = None
    ) -> Tensor:
        """Encode patches to tokens_BTE; `mask_token_E` replaces patches where `mask_BT` (bool) is set (SimMIM)."""
        tokens_BTE = self._embedding()[1](patches_BTV)
        if mask_BT is not None and mask_token_E is not None:
            tokens_BTE = torch.where(mask_BT[..., None], mask_token_E.to(tokens_BTE.dtype), tokens_BTE)
        tokens_BTE = tokens_BTE + self.patch_embedding.position_embeddings
        for block in self.blocks:
            tokens_BTE = block(tokens_BTE)
        normed_BTE: Tensor = self.norm(tokens_BTE)
        return normed_BTE


def _kept_products() -> tuple[Any, Any]:
    """The contexts of a checkpoint that stores matrix products and attention, and recomputes the rest."""
    aten = torch.ops.aten
    attention = [
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
    ]
    products = [aten.mm, aten.addmm, aten.bmm, *attention]
    kept: list[Any] = [operation.default for operation in products]
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(kept)
    return contexts
