"""Counts parameters and floating-point operations from the configuration, without building the model.

1. `parameters`, `pretrain_parameters`: trainable parameters by part.
2. `pretrain_work`, `train_work`: operations of one step for one volume, by part, forward and backward.

A multiplication and an addition are two operations. Matrix products and attention are counted, as by torch's
FlopCounterMode; recomputation is not. Letters: T image tokens, E embedding, V voxels of one
patch, S prompt tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from segvol_pl.config import FINER, MASK_TOKENS, PretrainConfig, PromptConfig, SegVolConfig, TrainConfig

OWN_TOKENS = 1 + MASK_TOKENS
"""Tokens that the decoder adds before those of a prompt."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Work:
        return Work(times * self.forward, times * self.backward)

    __rmul__ = __mul__


def total(parts: dict[str, Work]) -> Work:
    """The sum over the parts."""
    return sum(parts.values(), Work())


# ---- parameters ----


def parameters(config: SegVolConfig) -> dict[str, int]:
    """SegVol's trainable parameters by part (without text tower and bank)."""
    return {
        "image_encoder": _encoder_parameters(config),
        "prompt_encoder": (6 + _landmarks(config)) * config.hidden_size + _mask_embedding(config),
        "text_encoder": _linear(config.text_dim, config.hidden_size),
        "mask_decoder": _decoder_parameters(config),
    }


def _landmarks(config: SegVolConfig) -> int:
    return sum(config.landmark_counts.values())


def _mask_embedding(config: SegVolConfig) -> int:
    hidden, voxels = config.hidden_size, config.dense_channels * FINER**3
    return _linear(voxels, hidden // 4) + _linear(hidden // 4, hidden) if config.mask_prompt else 0


def pretrain_parameters(config: SegVolConfig) -> dict[str, int]:
    """The same of SimMIM pre-training."""
    return {
        "image_encoder": _encoder_parameters(config),
        "mask_token": config.hidden_size,
        "head": _linear(config.hidden_size, math.prod(config.patch_size)),
    }


def _linear(inner: int, outer: int) -> int:
    return inner * outer + outer


def _encoder_parameters(config: SegVolConfig) -> int:
    embedding = _linear(math.prod(config.patch_size), config.hidden_size) + math.prod(config.grid) * config.hidden_size
    return embedding + config.num_layers * encoder_block(config) + _norm(config.hidden_size)


def encoder_block(config: SegVolConfig) -> int:
    """Parameters of one of the encoder's blocks."""
    hidden = config.hidden_size
    # The product that makes queries, keys and values has no bias.
    attention = 3 * hidden * hidden + _linear(hidden, hidden)
    return attention + _linear(hidden, config.mlp_dim) + _linear(config.mlp_dim, hidden) + 2 * _norm(hidden)


def _norm(width: int) -> int:
    return 2 * width


def _attention_parameters(hidden: int, inner: int) -> int:
    return 3 * _linear(hidden, inner) + _linear(inner, hidden)


def _decoder_parameters(config: SegVolConfig) -> int:
    hidden = config.hidden_size
    transformer = config.decoder_layers * decoder_block(config)
    transformer += _attention_parameters(hidden, hidden // 2) + _norm(hidden)
    quarter, eighth = hidden // 4, hidden // 8
    doubled = (8 * hidden * quarter + quarter) + (8 * quarter * eighth + eighth)
    upscaling = doubled + _norm(8 * math.prod(config.grid) * quarter)
    mask = 2 * _linear(hidden, hidden) + _linear(hidden, eighth)
    return transformer + OWN_TOKENS * hidden + upscaling + mask + _linear(hidden, eighth)


def decoder_block(config: SegVolConfig) -> int:
    """Parameters of one of the decoder's two-way blocks."""
    hidden = config.hidden_size
    across = _attention_parameters(hidden, hidden // 2)
    mlp = _linear(hidden, config.decoder_mlp_dim) + _linear(config.decoder_mlp_dim, hidden)
    return _attention_parameters(hidden, hidden) + 2 * across + mlp + 4 * _norm(hidden)


# ---- operations ----


def volume_work(config: PretrainConfig | TrainConfig) -> dict[str, Work]:
    """Operations of a step of the run for one volume. Frozen parts are counted as if they trained, adapters are not."""
    if isinstance(config, PretrainConfig):
        return pretrain_work(config.model, config.mask_ratio)
    return train_work(config.model, config.prompts)


def run_parameters(config: PretrainConfig | TrainConfig) -> dict[str, int]:
    """Parameters of the run's model, by part, adapters (`optim.lora_rank`) included."""
    if isinstance(config, PretrainConfig):
        return pretrain_parameters(config.model)
    return parameters(config.model) | ({"adapters": adapter_parameters(config)} if config.adapted else {})


def trained_parameters(config: PretrainConfig | TrainConfig) -> dict[str, int]:
    """Those of them that train: with adapters, all but the image encoder. Patterns of `freeze` are not considered."""
    adapted = isinstance(config, TrainConfig) and bool(config.adapted)
    return {part: size for part, size in run_parameters(config).items() if not (adapted and part == "image_encoder")}


def adapter_parameters(config: TrainConfig) -> int:
    """Parameters of the image encoder's adapters."""
    sizes = config.model.encoder_linears
    return config.optim.lora_rank * sum(sum(sizes[name]) for name in config.adapted)


def pretrain_work(config: SegVolConfig, mask_ratio: float) -> dict[str, Work]:
    """Operations of a SimMIM step for one volume. The head predicts only the hidden tokens."""
    hidden = round(mask_ratio * math.prod(config.grid))
    head = _product(hidden, config.hidden_size, math.prod(config.patch_size))
    return {"encoder": encoder_work(config), "head": head}


def train_work(config: SegVolConfig, prompts: PromptConfig) -> dict[str, Work]:
    """Operations of a supervised step for one volume with all its prompts, including those of pseudo-labels."""
    count = prompts.per_volume
    points = 1 + prompts.extra_positive + prompts.extra_negative
    return {
        "encoder": encoder_work(config),
        "decoder": image_work(config) + count * prompt_work(config, points),
        "upsampling": count * upsampling_work(config),
    }


def _product(rows: int, inner: int, columns: int, gradients: int = 2) -> Work:
    """A matrix product; each operand that needs a gradient costs as much again."""
    forward = 2 * rows * inner * columns
    return Work(forward, gradients * forward)


def encoder_work(config: SegVolConfig) -> Work:
    """Encoding one volume. The image itself needs no gradient."""
    tokens, hidden = math.prod(config.grid), config.hidden_size
    attention = _product(tokens, hidden, 3 * hidden) + 2 * _product(tokens, hidden, tokens)
    block = attention + _product(tokens, hidden, hidden) + 2 * _product(tokens, hidden, config.mlp_dim)
    return _product(tokens, math.prod(config.patch_size), hidden, gradients=1) + config.num_layers * block


def image_work(config: SegVolConfig) -> Work:
    """What the decoder does once for all prompts of a volume: the tokens' positions, the first layer's projections."""
    tokens, half = math.prod(config.grid), config.hidden_size // 2
    return _product(tokens, 3, half, gradients=0) + 3 * _product(tokens, config.hidden_size, half)


def prompt_work(config: SegVolConfig, points: int) -> Work:
    """Encoding one prompt of so many points (padding included) and decoding its mask at low resolution."""
    hidden = config.hidden_size
    # Box corners are two points more. Positions are no weights, and the text bank does not train.
    positions = _product(points + 2 + _landmarks(config), 3, hidden // 2, gradients=0)
    encoded = positions + _product(1, config.text_dim, hidden, gradients=1)
    # Behind the points stand SAM's padding point, the box's corners, the text and the landmarks.
    sparse = OWN_TOKENS + points + 4 + _landmarks(config)
    mask = 2 * _product(1, hidden, hidden) + 2 * _product(1, hidden, hidden // 8)
    return encoded + _two_way(config, sparse) + mask + _upscaling(config) + _mask_prompt_work(config, points)


def _mask_prompt_work(config: SegVolConfig, points: int) -> Work:
    """Embedding a prompt's mask and the maps of its points, and projecting that three times."""
    if not config.mask_prompt:
        return Work()
    tokens, hidden = math.prod(config.grid), config.hidden_size
    voxels, (depth, height, width) = config.dense_channels * FINER**3, config.mask_shape
    embedded = _product(tokens, voxels, hidden // 4, gradients=1) + _product(tokens, hidden // 4, hidden)
    if config.point_maps:
        embedded += 2 * _product(depth * height, points, width, gradients=0)
    return embedded + 3 * _product(tokens, hidden, hidden // 2)


def _two_way(config: SegVolConfig, sparse: int) -> Work:
    tokens, hidden, half = math.prod(config.grid), config.hidden_size, config.hidden_size // 2
    among = 4 * _product(sparse, hidden, hidden) + 2 * _product(sparse, hidden, sparse)
    mlp = 2 * _product(sparse, hidden, config.decoder_mlp_dim)
    across = 2 * _product(sparse, hidden, half) + 2 * _product(sparse, half, tokens)
    attentions = 2 * config.decoder_layers + 1
    # Three of the image's projections are those of `image_work`.
    projections = (2 * attentions - 3) * _product(tokens, hidden, half)
    return config.decoder_layers * (among + mlp) + attentions * across + projections


def _upscaling(config: SegVolConfig) -> Work:
    tokens, hidden = math.prod(config.grid), config.hidden_size
    quarter, eighth = hidden // 4, hidden // 8
    doubled = _product(tokens, hidden, 8 * quarter) + _product(8 * tokens, quarter, 8 * eighth)
    return doubled + _product(64 * tokens, eighth, 1)


def upsampling_work(config: SegVolConfig) -> Work:
    """Bringing one prompt's logits to the input's shape, axis by axis. Interpolation weights need no gradient."""
    depth, height, width = config.mask_shape
    deep, high, wide = config.input_shape
    along_w = _product(depth * height, width, wide, gradients=1)
    along_h = _product(high, height, depth * wide, gradients=1)
    along_d = _product(deep, depth, high * wide, gradients=1)
    return along_w + along_h + (Work() if deep == depth else along_d)
