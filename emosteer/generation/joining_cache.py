"""The cache of a batch that rows join and leave all the time: `RowCache` with room for rows to come, whose columns move up when the oldest
are no longer used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emosteer.generation.kv_cache import ROOM, RowCache
from emosteer.models.architecture import Shape
from emosteer.models.memory import large_pages

#: Columns that moving up must give: a column is moved at most once in as many steps.
LEAST_ROOM = ROOM // 2


class JoiningCache(RowCache):
    """All rows end at the same column, where the next one is written; a row begins wherever its prompt does. `block` is the part of
    `store` [layer, 2, row, n_kv_heads, pos, d_head] whose rows are there."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        """Empty; memory is taken when rows join, and given back when none is left."""
        self.shape, self.device, self.dtype = shape, device, dtype
        self._clear()

    def _clear(self) -> None:
        self.store = self._empty(0, 0)
        self.block = self.store
        self.unused = torch.zeros(0, dtype=torch.long)
        self.width = self.end = 0
        self._set_mask()

    def _empty(self, rows: int, columns: int) -> Tensor:
        shape = self.shape
        store = torch.empty(shape.n_layers, 2, rows, shape.n_kv_heads, columns, shape.d_head, device=self.device, dtype=self.dtype)
        if store.numel():
            large_pages(store)
        return store.zero_()  # what a mask hides must still be numbers

    def _set_mask(self) -> None:
        if len(self.unused):
            super()._set_mask()
        else:
            self.start, self.mask = self.end, None

    @property
    def n_rows(self) -> int:
        """Rows that are there."""
        return len(self.unused)

    @property
    def n_columns(self) -> int:
        """Columns that are used by any row."""
        return self.end - self.start

    def join(self, lengths: Sequence[int]) -> list[int]:
        """Makes room for rows whose first tokens, as many as `lengths` says, are about to be filled in. Returns their slots."""
        before = self.n_rows
        self._make_room(before + len(lengths), max(lengths))
        self.block = self.store[:, :, : before + len(lengths)]
        self.unused = torch.cat([self.unused, torch.tensor([self.end - length for length in lengths])])
        self._set_mask()
        return list(range(before, before + len(lengths)))

    def _make_room(self, rows: int, least: int) -> None:
        """Room for `rows` rows and for a column more, with `least` columns or more up to the last one."""
        have_rows, have_columns = self.store.shape[2], self.store.shape[4]
        if rows <= have_rows and max(self.end, least) < have_columns:
            if least > self.end:
                self._move(self.store, least - self.end)
            return
        end = max(self.n_columns, least)
        if rows > have_rows:  # twice as many as there were, so that a growing batch is copied few times
            self._move(self._empty(max(rows, min(2 * have_rows, rows + ROOM)), end + ROOM), end - self.end)
        elif end + LEAST_ROOM > have_columns:
            self._move(self._empty(have_rows, end + ROOM), end - self.end)
        else:  # the oldest columns are no longer used
            self._move(self.store, end - self.end)

    def _move(self, target: Tensor, shift: int) -> None:
        """Copies what is there into a store, `shift` columns further right."""
        if self.n_rows:
            inside = target.data_ptr() == self.store.data_ptr()
            for kept, to in zip(self.block, target, strict=True):  # layer by layer: what lies in its own way is copied first
                moved = kept[..., self.start : self.end, :]
                to[:, : self.n_rows, :, self.start + shift : self.end + shift] = moved.clone() if inside else moved
            self.unused = self.unused + shift
        self.end += shift
        self.width = self.end
        self.store, self.block = target, target[:, :, : self.n_rows]
        self._set_mask()

    def advance(self) -> Tensor | None:
        """Makes room for one more column; returns what is to be added to the scores."""
        if self.end == self.store.shape[4]:
            self._make_room(self.n_rows, 0)
        self.end += 1
        return None if self.mask is None else self.mask[..., self.start : self.end]

    def place(self, row: int, states: Tensor) -> None:
        """Gives a row its prompt, which ends at the last column. states: [layer, 2, n_kv_heads, pos, d_head]."""
        self.block[:, :, row, :, self.end - states.shape[3] : self.end] = states

    def drop(self, gone: Sequence[int]) -> list[int]:
        """Takes slots out. Returns for each remaining slot the slot whose row it holds now; with the last row all memory goes."""
        left = super().drop(gone) if len(set(gone)) < self.n_rows else []
        if not left:
            self._clear()
        return left
