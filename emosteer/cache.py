"""A KV cache that grows in place. Hugging Face's dynamic cache copies all keys and values at every token; this one writes into room
allocated ahead, and rows that end leave it without moving the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

#: Positions allocated ahead of need.
ROOM = 64


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one full-attention layer in buffers with room to spare; `keys` and `values` are views of the used part."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new states behind the old ones and returns all of them."""
        if not getattr(self, "is_initialized", False):
            self.dtype, self.device = key_states.dtype, key_states.device
            self.used, self.is_initialized = 0, True
            self._buffers = self._grow(key_states, value_states, key_states.shape[-2] + ROOM)
        end = self.used + key_states.shape[-2]
        if end > self._buffers[0].shape[-2]:
            old = tuple(buffer[:, :, : self.used] for buffer in self._buffers)
            self._buffers = self._grow(old[0], old[1], end + ROOM)
            for buffer, states in zip(self._buffers, old, strict=True):
                buffer[:, :, : self.used] = states
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _grow(keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
        return tuple(states.new_empty(*states.shape[:2], size, states.shape[3]) for states in (keys, values))  # type: ignore[return-value]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        self._buffers = tuple(buffer[indices] for buffer in self._buffers)  # type: ignore[assignment]
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self._buffers)


def growing_cache(config: Any) -> DynamicCache:
    """A dynamic cache for a model's config whose full-attention layers grow in place (sliding windows stay as they are)."""
    cache = DynamicCache(config=config)
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
