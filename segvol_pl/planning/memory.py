"""Estimates the memory of a training step on one device from the configuration, without importing torch.

1. `encoder_bytes`, `side_bytes`, `prompt_bytes` and `head_bytes` count what autograd stores for one volume.
2. `moments` are the three times of most memory: decoding prompts, the start of the encoder's backward pass, and the
   optimizer's step. `peak` is the largest of them.
3. A strategy splits weights, gradients and optimizer state over the ranks (fsdp: over `run.shard_degree` of them), and
   adds its communication buffers.
4. Inverted, this gives how many prompts a device can decode together: `prompt_groups`, for the step and the planner.

All in bytes. Letters: T image tokens, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from segvol_pl.config import DEEPSPEED_BUCKET, PretrainConfig, Recompute, RunConfig, SegVolConfig, Strategy, TrainConfig
from segvol_pl.planning import flops

WIDE = 4
"""Bytes of a float32."""
NARROW = 2
"""Bytes of a bfloat16."""
MARGIN = 0.85
"""Share of a GPU's memory to fill; the rest is for fragmentation, libraries and what is not counted."""
ON_A_CPU = 6
"""Prompts of each volume that are decoded together on a CPU; more are not faster there."""

Config = PretrainConfig | TrainConfig


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All parts, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def prompt_groups(config: TrainConfig, count: int, volumes: int, bf16: bool, room: float | None) -> list[int]:
    """How many prompts of each volume are decoded together, group by group.

    Args:
        config: the run's configuration; `run.prompts_at_once` is the size of a group. If it is 0, a group is as large
            as the memory allows on a GPU, or `ON_A_CPU`.
        count: prompts of each volume.
        volumes: volumes on the device.
        bf16: whether the step computes in bf16.
        room: bytes of GPU memory; None on a CPU.

    Returns:
        The sizes of the groups, whose sum is `count`.
    """
    size = config.run.prompts_at_once or (ON_A_CPU if room is None else 0)
    if size:
        return [min(size, count - first) for first in range(0, count, size)]
    assert room is not None
    left = MARGIN * room - moments(config, volumes, bf16, 0, on_gpu=True)[0].total
    most = max(1, int(left / (volumes * prompt_bytes(config.model, bf16, on_gpu=True))))
    groups = math.ceil(count / most)
    return [count * (place + 1) // groups - count * place // groups for place in range(groups)]


def peak(config: Config, volumes: int, bf16: bool, room: float | None = None) -> Memory:
    """Peak memory of a step with `volumes` volumes on a device: a GPU with `room` bytes, or a CPU (None)."""
    group = 0
    if isinstance(config, TrainConfig):
        count = config.prompts.per_volume
        group = max(prompt_groups(config, count, volumes, bf16, room), default=0)
    return max(moments(config, volumes, bf16, group, room is not None), key=lambda moment: moment.total)


def moments(config: Config, volumes: int, bf16: bool, group: int, on_gpu: bool) -> list[Memory]:
    """Memory while decoding (pre-training: the head), at the start of the encoder's backward pass, and at the step.

    group: prompts of each volume that are decoded together; on_gpu: whether the fused operations of `kernels` run.
    """
    parts = flops.trained_parameters(config)
    count, trained = sum(flops.run_parameters(config).values()), sum(parts.values())
    weights, gradients, optimizer = state(config, count, trained, bf16)
    cast = NARROW * count if bf16 else 0
    encoder = volumes * encoder_bytes(config.model, config.run.recompute, bf16)
    recorded = on_gpu and replays(config.run)
    if recorded:  # it keeps gradients of its own, and all that it computes with
        gradients *= 2
    # Without buckets that outlive it, a gradient exists only from the backward pass to the optimizer's step.
    lasting = 0.0 if _plain(config.run) and not recorded else gradients
    if isinstance(config, PretrainConfig):
        decoding, early = volumes * head_bytes(config, bf16), 0.0
    else:
        decoding = volumes * (side_bytes(config.model, bf16) + group * prompt_bytes(config.model, bf16, on_gpu))
        decoder = sum(size for part, size in parts.items() if part not in ("image_encoder", "adapters"))
        early = float(WIDE * decoder) if weights_resident(config.run) else 0.0
    block = volumes * block_bytes(config.model, bf16)
    kept = cast + encoder + max(decoding, block) if recorded else 0.0
    return [
        Memory(weights, lasting + early, optimizer, cast + encoder + decoding),
        Memory(weights, max(lasting, 2 * early), optimizer, cast + encoder + block),
        Memory(weights, gradients, optimizer, kept),
    ]


def replays(run: RunConfig) -> bool:
    """Whether a step on a GPU is recorded once and replayed, see `training/graph.py`."""
    return run.compile and recordable(run)


def recordable(run: RunConfig) -> bool:
    """Whether `run.compile` also records the step on a GPU."""
    return _plain(run) and not run.custom_strategy


def _plain(run: RunConfig) -> bool:
    return run.strategy is Strategy.auto and run.devices * run.nodes == 1


def weights_resident(run: RunConfig) -> bool:
    """Whether each rank holds the complete weights at all times, see `training/grouped_loss.py`."""
    return run.strategy not in (Strategy.fsdp, Strategy.zero3)


def state(config: Config, count: int, trained: int, bf16: bool) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer state on one device. trained: how many of `count` parameters train."""
    run, kept = config.run, 3 if config.optim.ema else 2  # AdamW's moments, and the averages
    ranks = run.shard_degree or run.devices * run.nodes
    held, held_share = float(WIDE * count), WIDE * count / ranks
    full, share = float(WIDE * trained), WIDE * trained / ranks
    buckets = 2.0 * WIDE * min(DEEPSPEED_BUCKET, trained)
    match run.strategy:
        case Strategy.auto | Strategy.ddp:
            return held, full, kept * full
        # DeepSpeed's optimizer holds its own copy of the weights.
        case Strategy.zero1:
            weights, gradients, optimizer = held, full + buckets, (1 + kept) * share
        case Strategy.zero2:
            weights, gradients, optimizer = held, share + buckets, (1 + kept) * share
        # Below 10^9 parameters ZeRO-3 frees none of the gathered weights.
        case Strategy.zero3:
            weights, gradients, optimizer = held_share + held, share + buckets, (1 + kept) * share
        case Strategy.fsdp:
            gathered = _gathered(config.model, count, bf16)
            weights, gradients, optimizer = held_share + gathered, share + gathered, kept * share
            weights -= held_share if run.offload else 0
    return weights, gradients, 0.0 if run.offload else optimizer


def _gathered(model: SegVolConfig, count: int, bf16: bool) -> float:
    """Bytes that FSDP2 gathers at once: everything outside of blocks, and two blocks (one computes, one is fetched)."""
    encoder, decoder = flops.encoder_block(model), flops.decoder_block(model)
    outside = count - model.num_layers * encoder
    # Pre-training has no decoder.
    if outside > model.decoder_layers * decoder:
        outside -= model.decoder_layers * decoder
    return float((NARROW if bf16 else WIDE) * (outside + 2 * max(encoder, decoder)))


# ---- activations of one volume ----


def _tokens(model: SegVolConfig) -> int:
    """Elements of image_TE."""
    return math.prod(model.grid) * model.hidden_size


def block_bytes(model: SegVolConfig, bf16: bool) -> int:
    """Bytes of an encoder block: residual streams and norms (2 each), queries, keys, values, attention; MLP twice."""
    narrow = NARROW if bf16 else WIDE
    hidden = math.prod(model.grid) * model.mlp_dim
    return _tokens(model) * (2 * WIDE + 6 * narrow) + 2 * narrow * hidden


def encoder_bytes(model: SegVolConfig, recompute: Recompute, bf16: bool) -> int:
    """Bytes of all blocks, the patches and the last norm."""
    narrow = NARROW if bf16 else WIDE
    tokens, hidden = _tokens(model), math.prod(model.grid) * model.mlp_dim
    around = narrow * math.prod(model.input_shape) + 2 * WIDE * tokens
    if recompute is Recompute.blocks:
        return around + model.num_layers * WIDE * tokens + block_bytes(model, bf16)
    if recompute is Recompute.cheap:
        # Its input, and the results of its four products and of attention.
        kept = tokens * (WIDE + 6 * narrow) + narrow * hidden
        return around + model.num_layers * kept + block_bytes(model, bf16) - kept
    return around + model.num_layers * block_bytes(model, bf16)


def head_bytes(config: PretrainConfig, bf16: bool) -> float:
    """Bytes of the hidden tokens, their patches, the predicted patches, and the gradients of the difference."""
    hidden = config.mask_ratio * math.prod(config.model.grid)
    voxels = math.prod(config.model.patch_size)
    return hidden * ((NARROW if bf16 else WIDE) * config.model.hidden_size + 4 * WIDE * voxels)


def side_bytes(model: SegVolConfig, bf16: bool) -> float:
    """Bytes that all prompts share: the image, positions, the first layer's three projections, and their gradients."""
    narrow = NARROW if bf16 else WIDE
    return _tokens(model) * (4 * WIDE + 2 * 1.5 * narrow)


def two_way_bytes(model: SegVolConfig, bf16: bool) -> float:
    """Bytes of one prompt in the two-way transformer: its image, which is far larger than its own tokens."""
    layers, tokens = model.decoder_layers, _tokens(model)
    if bf16:
        # Queries, what they found, its sum with the image, the norm of that; from the second layer on two projections
        # besides the queries; keys and values of the last attention.
        return NARROW * tokens * (layers * (0.5 + 0.5 + 1 + 1) + (layers - 1) * 1 + 1)
    first = 0.5 * WIDE + 2 * WIDE
    later = first + WIDE + 1.5 * WIDE
    return tokens * (first + (layers - 1) * later + 2 * WIDE)


def mask_bytes(model: SegVolConfig, bf16: bool) -> float:
    """Bytes of a prompt's own image tokens if it may come with a mask: its embedding, their sum, three projections."""
    narrow = NARROW if bf16 else WIDE
    return _tokens(model) * (narrow + WIDE + 3 * 0.5 * narrow) if model.mask_prompt else 0.0


def prompt_bytes(model: SegVolConfig, bf16: bool, on_gpu: bool) -> float:
    """Bytes to decode one prompt and compute its gradients, when those of the finest features exist too."""
    narrow = NARROW if bf16 else WIDE
    tokens = _tokens(model)
    # Twice the image's size, then eight times.
    fine, finest = 2 * narrow, 8 * narrow
    if on_gpu:
        # Fine ones before their norm and after GELU, finest ones before GELU, which is not kept; low logits.
        logits = 3 * WIDE * 64 * math.prod(model.grid)
        return mask_bytes(model, bf16) + two_way_bytes(model, bf16) + tokens * (2 * fine + 2 * finest) + logits
    # The norm is in float32.
    fine += 4 * WIDE + (narrow if bf16 else 0)
    # Features before and after their activation, and gradients: fully of the one, partly of the other.
    upscaled = tokens * (fine + 3 * finest + finest * 0.75)
    voxels = math.prod(model.input_shape)
    # Logits, probabilities, the mask as a number and the logits' gradients in part.
    compared = 4 * WIDE * voxels + voxels
    decoded = mask_bytes(model, bf16) + two_way_bytes(model, bf16)
    return decoded + max(upscaled, tokens * (fine + 2 * finest) + compared)
