"""SegVol: one image encoding, many prompts decoded from it (paper Sec. 2.1).

    image_BCDHW -> encode -> tokens_BTE -+
    prompts (points, box, text, landmarks) --+-> decode -> logits_BPDHW at the input's resolution

Letters: B images, P prompts of one image, A = B x P, C channel, D H W voxels, T tokens, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segvol_pl.config import SegVolConfig
from segvol_pl.imaging.prompts import Prompt
from segvol_pl.kernels.compared import interpolation
from segvol_pl.model.image_encoder import ImageEncoder
from segvol_pl.model.mask_decoder import ImageContext, MaskDecoder
from segvol_pl.model.prompt_encoder import PromptEncoder, PromptTensors
from segvol_pl.model.text_encoder import TextBank, TextEncoder

POINTS = 8
"""On a GPU there is room for a multiple of so many points: kernels are chosen, and compiled, by shape."""


class Trilinear(nn.Module):
    """Trilinear interpolation (half-pixel centres) as one matrix product per axis.

    The same figures as `F.interpolate`, whose backward pass is slow on the CPU and not deterministic on GPUs.
    """

    def __init__(self, source: Sequence[int], target: Sequence[int]) -> None:
        super().__init__()
        self.deepens = source[0] != target[0]
        for axis, old, new in zip("dhw", source, target, strict=True):
            self.register_buffer(f"matrix_{axis}", interpolation(old, new), persistent=False)

    matrix_d: Tensor
    matrix_h: Tensor
    matrix_w: Tensor

    def forward(self, x_BPDHW: Tensor) -> Tensor:
        """(..., D,H,W) of the source's shape -> (..., D,H,W) of the target's."""
        wide = x_BPDHW @ self.matrix_w.T
        high = self.matrix_h @ wide
        if not self.deepens:
            return high
        deep = self.matrix_d @ high.flatten(-2)
        upsampled: Tensor = deep.unflatten(-1, high.shape[-2:])
        return upsampled


class SegVol(nn.Module):
    """The promptable segmenter. `bank` holds the categories that a text prompt may name; without one, none."""

    def __init__(self, config: SegVolConfig, bank: TextBank | None = None) -> None:
        super().__init__()
        self.config = config
        self.bank = bank or TextBank.empty(config.text_dim)
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.text_encoder = TextEncoder(config, self.bank)
        self.mask_decoder = MaskDecoder(config)
        self.upsampling = Trilinear([4 * size for size in config.grid], config.input_shape)

    def forward(self, image_BCDHW: Tensor, prompts: PromptTensors | Prompt) -> Tensor:
        """logits_BPDHW (float32) of every prompt. A single `Prompt` is asked of every image."""
        if isinstance(prompts, Prompt):
            prompts = self.prompts([[prompts]] * len(image_BCDHW))
        return self.decode(self.encode(image_BCDHW), prompts)

    def encode(self, image_BCDHW: Tensor) -> Tensor:
        """tokens_BTE of images in [0, 1], C = 1, of the shape `config.input_shape`."""
        tokens_BTE: Tensor = self.image_encoder(image_BCDHW)
        return tokens_BTE

    def decode(self, tokens_BTE: Tensor, prompts: PromptTensors) -> Tensor:
        """logits_BPDHW, float32, at the input's resolution (trilinear from the decoder's)."""
        return self.upsample(self.decode_low(tokens_BTE, prompts))

    def decode_low(self, tokens_BTE: Tensor, prompts: PromptTensors) -> Tensor:
        """logits_BPDHW at the decoder's resolution: four times the token grid."""
        return self.decode_from_context(self.image_context(tokens_BTE), prompts)

    def image_context(self, tokens_BTE: Tensor) -> ImageContext:
        """What decoding needs of the images, the same for all prompts: computed once for any number of prompts."""
        # The positions of tokens and of prompts are compared: both are exact.
        with torch.autocast(tokens_BTE.device.type, enabled=False):
            place_TE = self.prompt_encoder.pe_layer.dense()
        return self.mask_decoder.transformer.project_image(
            tokens_BTE + self.prompt_encoder.no_mask_embed.weight, place_TE
        )

    def decode_from_context(self, context: ImageContext, prompts: PromptTensors) -> Tensor:
        """As `decode_low`, of what `side` gave."""
        text_BPE = self.text_encoder(prompts.text_BP)
        prompt_BPSE, keep_BPS = self.prompt_encoder(prompts, text_BPE)
        has_text_A = prompts.has_text_BP.flatten()
        logits_ADHW = self.mask_decoder(
            context, prompt_BPSE.flatten(0, 1), keep_BPS.flatten(0, 1), text_BPE.flatten(0, 1), has_text_A
        )
        low_BPDHW: Tensor = logits_ADHW.unflatten(0, prompts.text_BP.shape)
        return low_BPDHW

    def upsample(self, low_BPDHW: Tensor) -> Tensor:
        """Trilinear, to the input's shape, float32."""
        with torch.autocast(low_BPDHW.device.type, enabled=False):
            upsampled: Tensor = self.upsampling(low_BPDHW.float())
        return upsampled

    def prompts(self, prompts: Sequence[Sequence[Prompt]]) -> PromptTensors:
        """Tensors of a list of prompts per image, on this model's device.

        Raises UnknownCategory for a text, ConfigError for landmarks that the model does not know.
        """
        device = self.text_encoder.bank_KE.device
        step = POINTS if device.type == "cuda" else 1
        return PromptTensors.from_prompts(prompts, self.bank.index, self.config.landmark_counts, step).to(device)
