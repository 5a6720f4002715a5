"""The cache of a batch that rows join and leave all the time. A row stands where its own tokens put it, whoever is there with it, so that
nothing moves while rows are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emosteer.generation.kv_cache import ROOM, hiding, movers
from emosteer.models.architecture import Shape
from emosteer.models.memory import large_pages


class JoiningCache:
    """Keys and values of every row from the first column on, as many columns as `lengths` [row], on the processor, says. `block` is the
    part of `store` [layer, 2, row, n_kv_heads, pos, d_head] whose rows are there."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, bound: int | None = None) -> None:
        """Empty; memory is taken when rows join, and given back when none is left.

        Args:
            bound: positions, rows times columns, beyond which no memory is taken to spare; whoever lets rows join sees to it that their
                own positions stay below.
        """
        self.shape, self.device, self.dtype, self.bound = shape, device, dtype, bound
        self._clear()

    def _clear(self) -> None:
        self.store = self._empty(0, 0)
        self.block = self.store
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.n_columns = 0  # of the longest row

    def _empty(self, rows: int, columns: int) -> Tensor:
        shape = self.shape
        store = torch.empty(shape.n_layers, 2, rows, shape.n_kv_heads, columns, shape.d_head, device=self.device, dtype=self.dtype)
        if store.numel():
            large_pages(store)
        return store.zero_()  # what a mask hides must still be numbers

    @property
    def n_rows(self) -> int:
        """Rows that are there."""
        return len(self.lengths)

    @property
    def spans(self) -> tuple[Tensor, Tensor]:
        """The first column of every row and the one after its last, [row] each."""
        return torch.zeros_like(self.lengths), self.lengths

    def join(self, lengths: Sequence[int]) -> list[int]:
        """Makes room for rows whose first tokens, as many as `lengths` says, are about to be placed. Returns their slots."""
        before = self.n_rows
        self._make_room(before + len(lengths), max(self.n_columns, *lengths) + 1)
        self.block = self.store[:, :, : before + len(lengths)]
        self._now(torch.cat([self.lengths, torch.tensor(lengths, dtype=torch.long)]))
        return list(range(before, before + len(lengths)))

    def _now(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.n_columns = int(lengths.max()) if len(lengths) else 0

    def _make_room(self, rows: int, columns: int) -> None:
        """Room for rows and columns. Memory of a long row that has left is given back once it is most of what there is."""
        have_rows, have_columns = self.store.shape[2], self.store.shape[4]
        if rows > have_rows:  # twice as many as there were, so that a growing batch is copied few times
            self._move(self._empty(*self._roomy(rows, max(rows, min(2 * have_rows, rows + ROOM)), columns)))
        elif not columns <= have_columns <= 2 * (columns + ROOM):  # of places whose rows have left few are taken along
            self._move(self._empty(*self._roomy(rows, min(have_rows, 2 * rows), columns)))

    def _roomy(self, rows: int, some_rows: int, columns: int) -> tuple[int, int]:
        """How many rows and columns a store is given that needs some: more columns, then up to `some_rows` rows, so far as the bound lets
        it. Near the bound all columns that it leaves are taken at once, as a store that grew column by column would be copied each time."""
        if self.bound is None:
            return some_rows, columns + ROOM
        wide = max(columns, min(columns + ROOM, self.bound // rows))
        return max(rows, min(some_rows, self.bound // wide)), wide

    def _move(self, target: Tensor) -> None:
        """Copies what is there into another store."""
        target[:, :, : self.n_rows, :, : self.n_columns] = self.block[..., : self.n_columns, :]
        self.store, self.block = target, target[:, :, : self.n_rows]

    def advance(self) -> Tensor | None:
        """Makes room for one more column of every row; returns what is to be added to the scores of the columns that `write` returns."""
        self._make_room(self.n_rows, self.n_columns + 1)
        self._now(self.lengths + 1)
        self._rows = torch.arange(self.n_rows, device=self.device)
        self._last = (self.lengths - 1).to(self.device)
        if int(self.lengths.min()) == self.n_columns:
            return None
        return hiding(torch.arange(self.n_columns)[None] >= self.lengths[:, None], self.block)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new column [row, n_kv_heads, d_head] and returns all keys and values [row, n_kv_heads, pos, d_head]."""
        block = self.block[layer]
        block[0, self._rows, :, self._last] = keys
        block[1, self._rows, :, self._last] = values
        return block[0, :, :, : self.n_columns], block[1, :, :, : self.n_columns]

    def place(self, row: int, states: Tensor) -> None:
        """Gives a row its prompt. states: [layer, 2, n_kv_heads, pos, d_head]."""
        self.block[:, :, row, :, : states.shape[3]] = states

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Takes slots out. Returns for each remaining slot the slot whose row it holds now; with the last row all memory goes."""
        order, moves = movers(self.n_rows, gone)
        if not order:
            self._clear()
            return order
        # behind its own length a slot holds zeros alone: hidden scores are zeros, and zero times what is not finite is no zero
        for mover, hole in moves:
            self.block[:, :, hole, :, : self.n_columns] = self.block[:, :, mover, :, : self.n_columns]
        self.block[:, :, len(order) :, :, : self.n_columns] = 0
        self.block = self.block[:, :, : len(order)]
        self._now(self.lengths[order])
        return order
