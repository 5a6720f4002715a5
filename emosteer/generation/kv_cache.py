"""KV caches that grow in place. Hugging Face's dynamic cache copies all keys and values at every token; these write into room
allocated ahead. `growing_cache` serves the Hugging Face forward pass, `RowCache` the lean one."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from emosteer.models.architecture import Shape
from emosteer.models.memory import large_pages

#: Positions allocated ahead of need.
ROOM = 64


def position_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What the keys and values of one position of one row take."""
    return 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * dtype.itemsize


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


def cache_name(body: Any) -> str:
    """What a decoder's forward pass calls its cache: transformers renamed it in 5.24 and warns whoever says the old name."""
    return "cache" if "cache" in signature(body.forward).parameters else "past_key_values"


class StepCache(Protocol):
    """What a step of the lean forward pass writes to and reads from."""

    @property
    def block(self) -> Tensor:
        """Keys and values, [layer, 2, row, n_kv_heads, pos, d_head]."""

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """The first column of every row and the one after its last, [row] each, on the processor."""

    def advance(self) -> Tensor | None:
        """Makes room for one more column of every row; returns what is to be added to the scores of the columns that `write` returns."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new column [row, n_kv_heads, d_head] and returns all keys and values [row, n_kv_heads, pos, d_head]."""


def hiding(hidden: Tensor, like: Tensor) -> Tensor:
    """What is added to scores so that some columns [row, pos] have no part. Shape [row, 1, 1, pos], device and precision of `like`."""
    mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
    return mask[:, None, None].to(like.device)


def movers(n_rows: int, gone: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """How slots are taken out so that only as many rows move as leave: for each remaining slot the slot whose row it holds then, and the
    moves (from, to)."""
    left = n_rows - len(set(gone))
    holes = sorted(slot for slot in set(gone) if slot < left)
    moves = list(zip((slot for slot in range(left, n_rows) if slot not in set(gone)), holes, strict=True))
    order = list(range(left))
    for mover, hole in moves:
        order[hole] = mover
    return order, moves


class RowCache:
    """Keys and values of every row in one block [layer, 2, row, n_kv_heads, pos, d_head] that ends at the same column for all rows.

    Shorter prompts leave columns on the left unused. Rows are slots: a row that ends is overwritten by the last one.
    """

    def __init__(self, shape: Shape, lengths: Sequence[int], steps: int, device: torch.device, dtype: torch.dtype) -> None:
        """Room for prompts of the given lengths and the first tokens of their replies; steps: how many tokens may follow at most."""
        self.width = self.end = max(lengths)
        self.steps = steps
        self.unused = torch.tensor([self.width - length for length in lengths])
        size = self.width + min(steps, ROOM)
        block = torch.empty(shape.n_layers, 2, len(lengths), shape.n_kv_heads, size, shape.d_head, device=device, dtype=dtype)
        large_pages(block)
        self.block = block.zero_()  # what a mask hides must still be numbers
        self._set_mask()

    def _set_mask(self) -> None:
        """What is added to the scores of every column, or nothing where all rows are equally long."""
        self.start = int(self.unused.min())
        self.mask: Tensor | None = None
        if int(self.unused.max()) > self.start:
            self.mask = hiding(torch.arange(self.block.shape[4])[None] < self.unused[:, None], self.block)

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """The first column of every row and the one after its last, [row] each."""
        return self.unused, torch.full_like(self.unused, self.end)

    def fill(self, layer: int, rows: Sequence[int], nodes: Tensor, keys: Tensor, values: Tensor) -> None:
        """Gives rows their prompts. nodes: [row, width], indices into keys and values [node, n_kv_heads, d_head]."""
        everything = len(rows) == self.block.shape[2]
        for index, states in enumerate((keys, values)):
            found = states[nodes].transpose(1, 2)
            if everything:
                self.block[layer, index, :, :, : self.width] = found
            else:
                self.block[layer, index, torch.tensor(list(rows), device=found.device), :, : self.width] = found

    def advance(self) -> Tensor | None:
        """Makes room for one more column; returns what is to be added to the scores."""
        if self.end == self.block.shape[4]:
            room = min(max(self.width + self.steps - self.end, 1), max(ROOM, self.end // 2))
            larger = self.block.new_zeros(*self.block.shape[:4], self.end + room, self.block.shape[5])
            larger[..., : self.end, :] = self.block
            self.block = larger
            self._set_mask()
        self.end += 1
        return None if self.mask is None else self.mask[..., self.start : self.end]

    def whole_mask(self) -> Tensor:
        """What is added to the scores of all columns of the block, those to come hidden. Shape [row, 1, 1, pos]."""
        columns = torch.arange(self.block.shape[4])[None]
        return hiding((columns < self.unused[:, None]) | (columns >= self.end), self.block)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new column [row, n_kv_heads, d_head] and returns all keys and values [row, n_kv_heads, pos, d_head]."""
        block = self.block[layer]
        block[0, :, :, self.end - 1] = keys
        block[1, :, :, self.end - 1] = values
        return block[0, :, :, self.start : self.end], block[1, :, :, self.start : self.end]

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Takes slots out. Returns for each remaining slot the slot whose row it holds now; only as many rows move as leave."""
        order, moves = movers(self.block.shape[2], gone)
        for mover, hole in moves:
            self.block[:, :, hole, :, self.start : self.end] = self.block[:, :, mover, :, self.start : self.end]
        self.block = self.block[:, :, : len(order)]
        self.unused = self.unused[order]
        self._set_mask()
        return order
