"""A cache of encoded windows, on the GPU and in main memory.

1. `put` keeps a window's tokens on the device on which they were computed.
2. When the device's limit is reached, the least recently used tokens move to main memory; they are evicted when the
   total limit is reached.
3. `get` copies tokens back to the device. Neither direction waits for a GPU: it runs its copies in order, and nothing
   here reads them.

Letters: B batch (of one), T tokens, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch


class TokenStore:
    """Tokens by key; the least recently used are evicted first.

    Args:
        limit: bytes of all tokens.
        device_limit: bytes of those on the device; they count towards `limit`.
    """

    def __init__(self, limit: float, device_limit: float) -> None:
        self.limit, self.device_limit = limit, min(device_limit, limit)
        self._near: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._far: OrderedDict[Hashable, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._near) + len(self._far)

    @property
    def bytes(self) -> int:
        """Bytes kept, on the device and in main memory."""
        return _bytes(self._near) + _bytes(self._far)

    @property
    def device_bytes(self) -> int:
        """Bytes kept on the device."""
        return _bytes(self._near)

    def get(self, key: Hashable, device: torch.device) -> torch.Tensor | None:
        """tokens_BTE on `device`; None if they were never put, or were evicted."""
        tokens_BTE = self._near.pop(key, None)
        if tokens_BTE is None:
            tokens_BTE = self._far.pop(key, None)
        if tokens_BTE is None:
            return None
        tokens_BTE = tokens_BTE.to(device, non_blocking=True)
        self.put(key, tokens_BTE)
        return tokens_BTE

    def put(self, key: Hashable, tokens_BTE: torch.Tensor) -> None:
        """Keep tokens as the most recently used. They must own their memory: dropping a view frees nothing."""
        self._near[key] = tokens_BTE
        while self._near and _bytes(self._near) > self.device_limit:
            oldest, tokens_BTE = self._near.popitem(last=False)
            self._far[oldest] = _to_main_memory(tokens_BTE)
        while self._far and self.bytes > self.limit:
            self._far.popitem(last=False)


def _to_main_memory(tokens_BTE: torch.Tensor) -> torch.Tensor:
    if tokens_BTE.device.type != "cuda":
        return tokens_BTE.cpu()
    return torch.empty_like(tokens_BTE, device="cpu", pin_memory=True).copy_(tokens_BTE, non_blocking=True)


def _bytes(tensors: OrderedDict[Hashable, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
