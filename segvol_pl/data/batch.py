"""A batch in its two forms: packed for transfer, and as the tasks use it.

1. In the loader a sample holds int16 HU and the four numbers that make an image of them (`shade_of`), and eight masks
   share a byte per voxel (`packed`): 4 bytes per voxel instead of 18.
2. In this form a batch goes through shared memory and pinned memory to the device.
3. There `unpacked` makes the float32 image and the bool masks, bit for bit as `intensity.normalise`, on CPU and GPU.

An overview that had to be resized has no HU: it is transferred as an image. A batch may hold both kinds.
Letters as in `schema`; J bytes of a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from segvol_pl.data.collate import Arrays
from segvol_pl.imaging.box import box_slices
from segvol_pl.imaging.intensity import Intensity
from segvol_pl.imaging.masks import BoxedMask

Batch = dict[str, Tensor]

HOST = ("seen", "row_B", "damaged_BA2")
"""What the training process reads: it stays in main memory."""
KINDS = ("", "pseudo_")
"""Prefixes of arrays per mask: of categories and of pseudo-labels."""
BITS = 8


def shade_of(intensity: Intensity, scale: float, shift: float) -> np.ndarray:
    """Low, span, scale, shift, float32 (4,). The image of HU is clip((hu - low) / span, 0, 1) * scale + shift."""
    return np.array([intensity.low, intensity.high - intensity.low, scale, shift], dtype=np.float32)


def packed(masks: Sequence[BoxedMask]) -> np.ndarray:
    """Masks (D,H,W) of one shape as bits, uint8 (J,D,H,W): mask k is bit k % 8 of byte k // 8."""
    bits_JDHW = np.zeros((-(-len(masks) // BITS), *masks[0].shape), np.uint8)
    for place, mask in enumerate(masks):
        if mask.box is not None:
            byte, bit = divmod(place, BITS)
            bits_JDHW[byte][box_slices(mask.box)] |= mask.inside_DHW.view(np.uint8) << bit
    return bits_JDHW


def order_of(samples: Sequence[Arrays]) -> Arrays:
    """`place_B`, each sample's index after the images made of HU come the others; empty unless there are both kinds."""
    finished = np.array(["image_CDHW" in sample for sample in samples])
    mixed = finished.any() and not finished.all()
    return {"place_B": np.argsort(np.argsort(finished, kind="stable"))} if mixed else {}


def unpacked(batch: Batch) -> Batch:
    """The batch as the tasks use it: image_BCDHW float32, masks_BKDHW and pseudo_masks_BKDHW bool, others unchanged.

    Computed on the batch's device, without waiting for it.
    """
    batch = dict(batch)
    images = [shaded(batch.pop("hu_BCDHW"), batch.pop("shade_B4"))] if "hu_BCDHW" in batch else []
    images += [batch.pop("image_BCDHW")] if "image_BCDHW" in batch else []
    if images:
        batch["image_BCDHW"] = torch.cat(images)[batch.pop("place_B")] if len(images) > 1 else images[0]
    for kind in KINDS:
        if f"{kind}bits_BJDHW" in batch:
            count = batch[f"{kind}valid_BK"].shape[1]
            batch[f"{kind}masks_BKDHW"] = masks_of(batch.pop(f"{kind}bits_BJDHW"), count)
    return batch


def shaded(hu_BCDHW: Tensor, shade_B4: Tensor) -> Tensor:
    """The image of int16 HU, float32, see `shade_of`."""
    # Tensors, not Python numbers: a GPU would multiply by a number's reciprocal instead of dividing.
    low, span, scale, shift = shade_B4[..., None, None, None, None].unbind(1)
    return hu_BCDHW.float().sub_(low).div_(span).clamp_(0, 1).mul_(scale).add_(shift)


def masks_of(bits_BJDHW: Tensor, count: int) -> Tensor:
    """The first `count` masks of the bits, bool (B,K,D,H,W)."""
    batch, _, *shape = bits_BJDHW.shape
    masks_BKDHW = bits_BJDHW.new_empty((batch, count, *shape))
    place_K111 = torch.arange(BITS, dtype=torch.uint8, device=bits_BJDHW.device)[:, None, None, None]
    for byte, bits_BDHW in enumerate(bits_BJDHW.unbind(1)):
        eight_BKDHW = masks_BKDHW[:, byte * BITS : (byte + 1) * BITS]
        torch.bitwise_right_shift(bits_BDHW[:, None], place_K111[: eight_BKDHW.shape[1]], out=eight_BKDHW)
    # Bytes of 0 and 1 are valid bools.
    return masks_BKDHW.bitwise_and_(1).view(torch.bool)
