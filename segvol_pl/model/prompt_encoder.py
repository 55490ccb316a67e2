"""The prompt encoder: points, boxes, text and landmarks become tokens (SAM's encoder in 3-D; paper Sec. 2.1).

All prompts of all images are encoded at once. Parts that a prompt lacks are tokens that attention masks out, so that
any mixture of prompt kinds is one batch. A mask that comes with a prompt is not a token: it becomes a summand of every
image token, SAM's dense embedding.

Letters: B batch, P prompts of one image, N points, M landmarks of all kinds, S prompt tokens, E embedding, T image
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvol_pl.config import FINER, Convention, SegVolConfig
from segvol_pl.errors import ConfigError
from segvol_pl.imaging.prompts import ABSENT, INSIDE, OUTSIDE, PADDING, Prompt, gathered_landmarks
from segvol_pl.imaging.transforms import resize_image

SPOT = 2.0
"""Standard deviation of a point's spot in its map (voxels of the decoder's masks): half a token."""


@dataclass(frozen=True)
class PromptTensors:
    """The prompts of a batch of images, coordinates in voxels of the model's input.

    points_BPN3 float32, labels_BPN int64 (1, 0, -1 = padding, -2 = absent), boxes_BP6 float32 (inclusive maximum),
    text_BP int64 (row of the text bank), landmarks_BPM3 float32; has_* bool (B,P), for landmarks (B,P,M): which
    parts the prompt has. masks_BPDHW float32, probabilities at the decoder's resolution; None if no prompt of the batch
    comes with a mask.
    """

    points_BPN3: Tensor
    labels_BPN: Tensor
    boxes_BP6: Tensor
    text_BP: Tensor
    landmarks_BPM3: Tensor
    has_points_BP: Tensor
    has_box_BP: Tensor
    has_text_BP: Tensor
    has_landmarks_BPM: Tensor
    masks_BPDHW: Tensor | None = None
    has_mask_BP: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> PromptTensors:
        """Copy to a device; to a GPU in one asynchronous copy."""
        own = self.tensors()
        if torch.device(device).type != "cuda":
            return PromptTensors(**{name: tensor.to(device) for name, tensor in own.items()})
        packed = pack(own.values()).pin_memory().to(device, non_blocking=True)
        return PromptTensors(**dict(zip(own, unpack(packed, own.values()), strict=True)))

    def at(self, places: slice) -> PromptTensors:
        """Select prompts of each image."""
        return PromptTensors(**{name: tensor[:, places] for name, tensor in self.tensors().items()})

    def take(self, places_BQ: Tensor) -> PromptTensors:
        """Select prompts of each image by their indices, int64 (B,Q)."""
        taken = {
            name: torch.take_along_dim(tensor, places_BQ[(...,) + (None,) * (tensor.ndim - 2)], dim=1)
            for name, tensor in self.tensors().items()
        }
        return PromptTensors(**taken)

    def joined(self, other: PromptTensors) -> PromptTensors:
        """Append the other's prompts of the same images, equally many points each, with masks if these have any."""
        others = other.tensors()
        return PromptTensors(**{name: torch.cat([own, others[name]], dim=1) for name, own in self.tensors().items()})

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[Sequence[Prompt]],
        index_of: Callable[[str], int],
        config: SegVolConfig,
        step: int = 1,
    ) -> PromptTensors:
        """Convert prompts to tensors.

        Args:
            prompts: the prompts of each image, equally many for all.
            index_of: row of a category name in the text bank.
            config: the model that they are for.
            step: the number of points is padded to a multiple of this.

        Raises:
            ConfigError: the model does not have the landmarks of a prompt, or takes no masks.
        """
        landmark_counts = config.landmark_counts
        shape = (len(prompts), len(prompts[0]))
        flat = [prompt for row in prompts for prompt in row]
        most = max([len(prompt.points_N3) for prompt in flat if prompt.points_N3 is not None], default=1)
        width = math.ceil(most / step) * step
        points, labels = zip(*(_padded(prompt, width) for prompt in flat), strict=True)
        boxes = [prompt.box or (0,) * 6 for prompt in flat]
        text = [0 if prompt.text is None else index_of(prompt.text) for prompt in flat]
        landmarks = np.stack([gathered_landmarks(prompt.landmarks, landmark_counts) for prompt in flat])
        has_landmarks = [
            [name in prompt.landmarks for name, count in landmark_counts.items() for _ in range(count)]
            for prompt in flat
        ]
        return cls(
            points_BPN3=torch.tensor(np.stack(points), dtype=torch.float32).view(*shape, width, 3),
            labels_BPN=torch.tensor(np.stack(labels), dtype=torch.int64).view(*shape, width),
            boxes_BP6=torch.tensor(boxes, dtype=torch.float32).view(*shape, 6),
            text_BP=torch.tensor(text, dtype=torch.int64).view(shape),
            landmarks_BPM3=torch.tensor(landmarks, dtype=torch.float32).view(*shape, -1, 3),
            has_points_BP=torch.tensor([prompt.points_N3 is not None for prompt in flat]).view(shape),
            has_box_BP=torch.tensor([prompt.box is not None for prompt in flat]).view(shape),
            has_text_BP=torch.tensor([prompt.text is not None for prompt in flat]).view(shape),
            has_landmarks_BPM=torch.tensor(has_landmarks, dtype=torch.bool).view(*shape, -1),
            **_mask_tensors(flat, shape, config),
        )


def pack(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate the bytes of the tensors, in an order that `unpack` reproduces."""
    return torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in _wide_first(tensors)])


def unpack(packed_N: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Split the result of `pack` into views with the shapes and dtypes of `like`, in its order."""
    like = list(like)
    ordered = _wide_first(like)
    parts = packed_N.split([tensor.nbytes for tensor in ordered])
    views = {id(old): part.view(old.dtype).view(old.shape) for old, part in zip(ordered, parts, strict=True)}
    return [views[id(tensor)] for tensor in like]


def _wide_first(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Largest element size first, so that each tensor is aligned to its elements, as views require."""
    return sorted(tensors, key=lambda tensor: -tensor.element_size())


def _mask_tensors(flat: Sequence[Prompt], shape: tuple[int, int], config: SegVolConfig) -> dict[str, Tensor]:
    """masks_BPDHW and has_mask_BP; empty if no prompt comes with a mask."""
    given = [prompt.mask_DHW is not None for prompt in flat]
    if not any(given):
        return {}
    if not config.mask_prompt:
        raise ConfigError(
            "model.mask_prompt: false, so this model takes no masks with its prompts", "model.mask_prompt"
        )
    none_DHW = np.zeros(config.mask_shape, np.float32)
    masks = [none_DHW if p.mask_DHW is None else resize_image(p.mask_DHW, config.mask_shape) for p in flat]
    return {
        "masks_BPDHW": torch.from_numpy(np.stack(masks)).unflatten(0, shape),
        "has_mask_BP": torch.tensor(given).view(shape),
    }


def _padded(prompt: Prompt, width: int) -> tuple[np.ndarray, np.ndarray]:
    points_N3, labels_N = np.zeros((width, 3)), np.full(width, ABSENT)
    if prompt.points_N3 is not None and prompt.labels_N is not None:
        points_N3[: len(prompt.points_N3)] = prompt.points_N3
        labels_N[: len(prompt.labels_N)] = prompt.labels_N
    return points_N3, labels_N


class PositionEmbeddingRandom(nn.Module):
    """Random Fourier features of a position in the volume (Tancik et al. 2020), fixed at initialisation."""

    positional_encoding_gaussian_matrix: Tensor
    extent_3: Tensor

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(3, config.hidden_size // 2))
        # A buffer: creating a tensor from Python numbers would synchronise with the GPU at every step.
        extent = torch.tensor(self._extent(config), dtype=torch.float32)
        self.register_buffer("extent_3", extent, persistent=False)
        self.published = config.coordinates is Convention.published
        self.grid = config.grid

    @staticmethod
    def _extent(config: SegVolConfig) -> tuple[int, int, int]:
        depth, height, width = config.input_shape
        # The released weights were trained with coordinates divided by the extent of another axis, see Convention.
        return (height, depth, width) if config.coordinates is Convention.published else (depth, height, width)

    def encode(self, unit_3: Tensor) -> Tensor:
        """Encode positions in [0, 1], (..., 3), to (..., E)."""
        angle = 2 * math.pi * ((2 * unit_3 - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def voxels(self, position_3: Tensor) -> Tensor:
        """Encode the centres of voxels of the model's input, (..., 3), to (..., E)."""
        return self.encode((position_3 + 0.5) / self.extent_3)

    def dense(self) -> Tensor:
        """Encode the positions of all image tokens, (T,E)."""
        matrix = self.positional_encoding_gaussian_matrix
        axes = [(torch.arange(size, device=matrix.device, dtype=matrix.dtype) + 0.5) / size for size in self.grid]
        d, h, w = torch.meshgrid(*axes, indexing="ij")
        unit_T3 = torch.stack([h, d, w] if self.published else [d, h, w], dim=-1).flatten(0, 2)
        return self.encode(unit_T3)


class MaskEmbedding(nn.Module):
    """Masks of the prompts, and maps of their points, become summands of the image tokens: 0 at the start of training.

    Each token's 4 x 4 x 4 voxels go through two linear layers. (SAM has strided convolutions, whose kernels do not
    overlap either.) Letters: C maps of one prompt.
    """

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.lin1 = nn.Linear(config.dense_channels * FINER**3, config.hidden_size // 4)
        self.lin2 = nn.Linear(config.hidden_size // 4, config.hidden_size)
        nn.init.zeros_(self.lin2.weight)
        nn.init.zeros_(self.lin2.bias)

    def forward(self, maps_BPCDHW: Tensor, given_BP: Tensor) -> Tensor:
        """Embed to (B,P,T,E); 0 for prompts that are not given."""
        d, h, w = self.grid
        channels = maps_BPCDHW.shape[2]
        split = maps_BPCDHW.reshape(*given_BP.shape, channels, d, FINER, h, FINER, w, FINER)
        patches = split.permute(0, 1, 3, 5, 7, 2, 4, 6, 8)
        patches_BPTV = patches.reshape(*given_BP.shape, d * h * w, channels * FINER**3)
        embedded_BPTE: Tensor = self.lin2(F.gelu(self.lin1(patches_BPTV)))
        return embedded_BPTE * given_BP[..., None, None]


class PromptEncoder(nn.Module):
    """PromptTensors and text_BPE -> tokens_BPSE and keep_BPS (False: a token that this prompt lacks)."""

    def __init__(self, config: SegVolConfig) -> None:
        super().__init__()
        self.pe_layer = PositionEmbeddingRandom(config)
        # In the released weights' order: outside, inside, the box's first corner, its last corner.
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, config.hidden_size) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, config.hidden_size)
        self.no_mask_embed = nn.Embedding(1, config.hidden_size)
        count = sum(config.landmark_counts.values())
        self.landmark_embeddings = nn.Embedding(count, config.hidden_size) if count else None
        # Not `mask_downscaling`: that name is a part of the released weights that never runs.
        self.mask_embedding = MaskEmbedding(config) if config.mask_prompt else None
        self.mask_shape, self.input_shape, self.point_maps = config.mask_shape, config.input_shape, config.point_maps

    def forward(self, prompts: PromptTensors, text_BPE: Tensor) -> tuple[Tensor, Tensor]:
        """tokens_BPSE, float32: points, the padding point, the box's two corners, text, landmarks; keep_BPS, bool."""
        # Fourier features of voxel positions need float32.
        with torch.autocast(text_BPE.device.type, enabled=False):
            points_BPNE = self._points(prompts.points_BPN3, prompts.labels_BPN)
            box_BP2E = self._box(prompts.boxes_BP6)
            landmarks = (
                []
                if self.landmark_embeddings is None
                else [self._landmarks(prompts.landmarks_BPM3, self.landmark_embeddings)]
            )
        # SAM ends points that come without a box by one padding point.
        padding_BP1E = self.not_a_point_embed.weight.expand(*text_BPE.shape[:2], 1, -1)
        tokens_BPSE = torch.cat([points_BPNE, padding_BP1E, box_BP2E, text_BPE[:, :, None].float(), *landmarks], dim=2)
        return tokens_BPSE, self._keep(prompts)

    def dense(self, prompts: PromptTensors) -> Tensor | None:
        """What is added to the image tokens of each prompt, (B,P,T,E); None if the model adds nothing to these."""
        if self.mask_embedding is None:
            return None
        masks_BPDHW, has_mask_BP = prompts.masks_BPDHW, prompts.has_mask_BP
        if self.point_maps:
            inside_BPDHW, outside_BPDHW = self._point_maps(prompts)
            mask_BPDHW, given_BP = torch.zeros_like(inside_BPDHW), prompts.has_points_BP
            if masks_BPDHW is not None and has_mask_BP is not None:
                # No mask is neither inside nor outside.
                mask_BPDHW = (masks_BPDHW - 0.5) * has_mask_BP[..., None, None, None]
                given_BP = given_BP | has_mask_BP
            maps_BPCDHW = torch.stack([mask_BPDHW, inside_BPDHW, outside_BPDHW], dim=2)
        elif masks_BPDHW is None or has_mask_BP is None:
            return None
        else:
            maps_BPCDHW, given_BP = masks_BPDHW[:, :, None], has_mask_BP
        embedded_BPTE: Tensor = self.mask_embedding(maps_BPCDHW, given_BP)
        return embedded_BPTE

    def _point_maps(self, prompts: PromptTensors) -> list[Tensor]:
        """Maps (B,P,D,H,W) of the points inside and of those outside: the sum of their spots, at most 1."""
        with torch.autocast(prompts.points_BPN3.device.type, enabled=False):
            spots = [
                torch.exp(-((cells - at_BPN[..., None]) ** 2) / (2 * SPOT**2))
                for cells, at_BPN in zip(self._cells(prompts), self._in_cells(prompts), strict=True)
            ]
            d_BPND, h_BPNH, w_BPNW = spots
            maps = []
            for label in (INSIDE, OUTSIDE):
                own_BPN = prompts.has_points_BP[..., None] & (prompts.labels_BPN == label)
                rows = (own_BPN[..., None] * d_BPND)[..., None] * h_BPNH[..., None, :]
                summed = rows.flatten(3).transpose(2, 3) @ w_BPNW
                maps.append(summed.unflatten(2, self.mask_shape[:2]).clamp(max=1.0))
        return maps

    def _cells(self, prompts: PromptTensors) -> list[Tensor]:
        device = prompts.points_BPN3.device
        return [torch.arange(size, device=device, dtype=torch.float32) for size in self.mask_shape]

    def _in_cells(self, prompts: PromptTensors) -> list[Tensor]:
        """The points' places in voxels of the maps, (B,P,N) along each axis."""
        sizes = zip(self.mask_shape, self.input_shape, prompts.points_BPN3.unbind(-1), strict=True)
        return [(at_BPN + 0.5) * (cells / voxels) - 0.5 for cells, voxels, at_BPN in sizes]

    def _points(self, points_BPN3: Tensor, labels_BPN: Tensor) -> Tensor:
        labels_BPN1 = labels_BPN[..., None]
        outside, inside = self._kind(0), self._kind(1)
        placed = self.pe_layer.voxels(points_BPN3) + torch.where(labels_BPN1 == 1, inside, outside)
        return torch.where(labels_BPN1 == PADDING, self.not_a_point_embed.weight, placed)

    def _box(self, boxes_BP6: Tensor) -> Tensor:
        corners_BP2E = self.pe_layer.voxels(boxes_BP6.unflatten(-1, (2, 3)))
        return corners_BP2E + torch.cat([self._kind(2), self._kind(3)])

    def _landmarks(self, landmarks_BPM3: Tensor, embeddings: nn.Embedding) -> Tensor:
        placed: Tensor = self.pe_layer.voxels(landmarks_BPM3) + embeddings.weight
        return placed

    def _kind(self, index: int) -> Tensor:
        embedding = self.point_embeddings[index]
        assert isinstance(embedding, nn.Embedding)
        return embedding.weight

    @staticmethod
    def _keep(prompts: PromptTensors) -> Tensor:
        points_BP1, box_BP1 = prompts.has_points_BP[..., None], prompts.has_box_BP[..., None]
        points_BPN = points_BP1 & (prompts.labels_BPN != ABSENT)
        kept = [points_BPN, points_BP1 & ~box_BP1, box_BP1.expand(-1, -1, 2)]
        return torch.cat([*kept, prompts.has_text_BP[..., None], prompts.has_landmarks_BPM], dim=2)
