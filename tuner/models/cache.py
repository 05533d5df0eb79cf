"""Keys and values of the tokens already seen, so that each new token costs one position and not the whole text."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One layer's keys and values, [B, K, max_tokens, E] each, filled from the left."""

    def __init__(self, max_tokens: int, padding: Tensor | None = None) -> None:
        self.max_tokens = max_tokens
        self.padding = padding
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
        padding: how many positions at the left of each row are no text, integers [B]; None for no padding.
    """

    def __init__(self, num_layers: int, max_tokens: int, padding: Tensor | None = None) -> None:
        self.padding = padding
        self.layers = [LayerCache(max_tokens, padding) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def positions(self, num_new: int, device: torch.device) -> Tensor:
        """The places in their text of the next `num_new` tokens, [T] or, with padding, [B, 1, T] (for all heads)."""
        columns_T = torch.arange(self.length, self.length + num_new, device=device)
        return columns_T if self.padding is None else (columns_T - self.padding[:, None, None]).clamp_min(0)
