"""SegVol: one image encoding, many prompts decoded from it (paper Sec. 2.1).

    image_BCDHW -> encode -> tokens_BTE -----+
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
"""On a GPU the number of points is padded to a multiple of this: kernels are selected and compiled by shape."""


class Trilinear(nn.Module):
    """Trilinear interpolation (half-pixel centres) as one matrix product per axis.

    Equal to `F.interpolate`, whose backward pass is slow on CPUs and not deterministic on GPUs.

    Args:
        source: input shape (D,H,W).
        target: output shape (D,H,W).
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
    """The promptable segmentation model.

    Args:
        config: the architecture.
        bank: the categories that text prompts may name; none by default.
    """

    def __init__(self, config: SegVolConfig, bank: TextBank | None = None) -> None:
        super().__init__()
        self.config = config
        self.bank = bank or TextBank.empty(config.text_dim)
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.text_encoder = TextEncoder(config, self.bank)
        self.mask_decoder = MaskDecoder(config)
        self.upsampling = Trilinear(config.mask_shape, config.input_shape)

    def forward(self, image_BCDHW: Tensor, prompts: PromptTensors | Prompt) -> Tensor:
        """Segment images by prompts.

        Args:
            image_BCDHW: images in [0, 1], C = 1, of the shape `config.input_shape`.
            prompts: prompts of each image, or a single one for every image; coordinates in voxels of the input.

        Returns:
            logits_BPDHW, float32, at the input's resolution.

        Raises:
            UnknownCategory: a text is not in the bank.
            ConfigError: the model does not have the landmarks.
        """
        if isinstance(prompts, Prompt):
            prompts = self.prompts([[prompts]] * len(image_BCDHW))
        return self.decode(self.encode(image_BCDHW), prompts)

    def encode(self, image_BCDHW: Tensor) -> Tensor:
        """Encode images in [0, 1], C = 1, of the shape `config.input_shape`, to tokens_BTE."""
        tokens_BTE: Tensor = self.image_encoder(image_BCDHW)
        return tokens_BTE

    def decode(self, tokens_BTE: Tensor, prompts: PromptTensors) -> Tensor:
        """Decode prompts to logits_BPDHW, float32, trilinearly upsampled to the input's resolution."""
        return self.upsample(self.decode_low(tokens_BTE, prompts))

    def decode_low(self, tokens_BTE: Tensor, prompts: PromptTensors) -> Tensor:
        """Decode prompts to logits_BPDHW at the decoder's resolution, four times the token grid."""
        return self.decode_from_context(self.image_context(tokens_BTE), prompts)

    def image_context(self, tokens_BTE: Tensor) -> ImageContext:
        """Compute what decoding needs of the images, once for any number of prompts."""
        # Positions of tokens and prompts are compared, so both must be exact: no bf16.
        with torch.autocast(tokens_BTE.device.type, enabled=False):
            place_TE = self.prompt_encoder.pe_layer.dense()
        return self.mask_decoder.transformer.project_image(
            tokens_BTE + self.prompt_encoder.no_mask_embed.weight, place_TE
        )

    def decode_from_context(self, context: ImageContext, prompts: PromptTensors) -> Tensor:
        """Like `decode_low`, from the result of `image_context`."""
        return self.decode_embedded(context, prompts, self.text_encoder(prompts.text_BP))

    def decode_embedded(self, context: ImageContext, prompts: PromptTensors, text_BPE: Tensor) -> Tensor:
        """Like `decode_from_context`, with the projected text given: `prompts.text_BP` is not used."""
        dense_BPTE = self.prompt_encoder.dense(prompts)
        if dense_BPTE is not None:
            context = self.mask_decoder.transformer.add_dense(context, dense_BPTE.flatten(0, 1))
        prompt_BPSE, keep_BPS = self.prompt_encoder(prompts, text_BPE)
        has_text_A = prompts.has_text_BP.flatten()
        logits_ADHW = self.mask_decoder(
            context, prompt_BPSE.flatten(0, 1), keep_BPS.flatten(0, 1), text_BPE.flatten(0, 1), has_text_A
        )
        low_BPDHW: Tensor = logits_ADHW.unflatten(0, prompts.text_BP.shape)
        return low_BPDHW

    def upsample(self, low_BPDHW: Tensor) -> Tensor:
        """Upsample logits trilinearly to the input's shape, float32."""
        with torch.autocast(low_BPDHW.device.type, enabled=False):
            upsampled: Tensor = self.upsampling(low_BPDHW.float())
        return upsampled

    def prompts(self, prompts: Sequence[Sequence[Prompt]]) -> PromptTensors:
        """Convert a list of prompts per image to tensors on this model's device.

        Raises UnknownCategory for an unknown text, ConfigError for unknown landmarks, and for a mask if
        `config.mask_prompt` is off.
        """
        device = self.text_encoder.bank_KE.device
        step = POINTS if device.type == "cuda" else 1
        return PromptTensors.from_prompts(prompts, self.bank.index, self.config, step).to(device)
