"""Keys and values of the tokens already seen, so that each new token costs one position and not the whole text."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, K, max_tokens, E] each, filled from the left."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new positions; returns all keys and values so far, [B, K, S, E]."""
        if self._keys is None or self._values is None:
            shape = (*k_BKTE.shape[:2], self.max_tokens, k_BKTE.shape[3])
            self._keys = torch.empty(shape, dtype=k_BKTE.dtype, device=k_BKTE.device)
            self._values = torch.empty_like(self._keys)
        end = self.length + k_BKTE.shape[2]
        self._keys[:, :, self.length : end] = k_BKTE
        self._values[:, :, self.length : end] = v_BKTE
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """The caches of all layers.

    Args:
        num_layers: layers of the model.
        max_tokens: the longest text, prompt included.
    """

    def __init__(self, num_layers: int, max_tokens: int) -> None:
        self.layers = [LayerCache(max_tokens) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length
