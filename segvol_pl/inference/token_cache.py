"""The encoded windows of a volume, kept as long as there is room.

1. `put` keeps a window's tokens on the device that they were computed on.
2. What was used longest ago moves to main memory when the device's share is full, and goes when all of it is.
3. `get` brings a window back to the device. Neither way waits for a GPU: copies follow each other in its order of work,
   and nothing here reads what they bring.

Letters: B batch (of one), T tokens, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch


class TokenStore:
    """Tokens by key, the least recently used first to go. `limit` and `device_limit` (part of it) are bytes."""

    def __init__(self, limit: float, device_limit: float) -> None:
        self.limit, self.device_limit = limit, min(device_limit, limit)
        self._near: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._far: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    @property
    def bytes(self) -> int:
        """What is kept, on the device and in main memory."""
        return _bytes(self._near) + _bytes(self._far)

    @property
    def device_bytes(self) -> int:
        """What of it is on the device."""
        return _bytes(self._near)

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """tokens_BTE on `device`; None where they were never put, or are gone."""
        tokens_BTE = self._near.pop(key, None)
        if tokens_BTE is None:
            tokens_BTE = self._far.pop(key, None)
        if tokens_BTE is None:
            return None
        tokens_BTE = tokens_BTE.to(device, non_blocking=True)
        self.put(key, tokens_BTE)
        return tokens_BTE

    def put(self, key: Hashable, tokens_BTE: torch.Tensor) -> None:
        """Keeps them as the most recently used. They must own their memory, or dropping them frees nothing."""
        self._near[key] = tokens_BTE
        while self._near and _bytes(self._near) > self.device_limit:
            oldest, tokens_BTE = self._near.popitem(last=False)
            self._far[oldest] = _away(tokens_BTE)
        while self._far and self.bytes > self.limit:
            self._far.popitem(last=False)


def _away(tokens_BTE: torch.Tensor) -> torch.Tensor:
    if tokens_BTE.device.type != "cuda":
        return tokens_BTE.cpu()
    return torch.empty_like(tokens_BTE, device="cpu", pin_memory=True).copy_(tokens_BTE, non_blocking=True)


def _bytes(tensors: OrderedDict[Hashable, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
