"""Interventions on units, as pure edits: ablate (zero, mean, resample), patch, enhance. Each row of a batch may have its own.

Everything here returns site -> edit, to be used in `with model.hooks(edits)` or `model.run(ids, edits)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, Head, Site, Unit, Z


def unit_site(unit: Unit) -> Site:
    """Where a unit's activation is."""
    return Site(unit.layer, Z if isinstance(unit, Head) else MLP_POST)


def unit_slice(model: Model, unit: Unit) -> slice:
    """The unit's entries in its site's last dimension."""
    size = model.shape.d_head if isinstance(unit, Head) else 1
    return slice(unit.index * size, (unit.index + 1) * size)


def unit_masks(model: Model, rows: Sequence[Iterable[Unit]], device: torch.device | None = None) -> dict[Site, Tensor]:
    """Site -> [row, width], true at the entries of the row's units; on the model's device if none is given."""
    masks: dict[Site, Tensor] = {}
    for row, units in enumerate(rows):
        for unit in units:
            site = unit_site(unit)
            if site not in masks:
                masks[site] = torch.zeros(len(rows), model.width(site.kind), dtype=torch.bool, device=device or model.device)
            masks[site][row, unit_slice(model, unit)] = True
    return masks


def replace_units(
    model: Model,
    rows: Sequence[Iterable[Unit]],
    values: Mapping[Site, Tensor] | None = None,
    positions: Tensor | None = None,
    device: torch.device | None = None,
) -> dict[Site, Edit]:
    """Replaces each row's units by given values: zero ablation, mean ablation, resampling and patching are this with other values.

    Args:
        rows: the units of each row.
        values: site -> [width], [row, width] or [row, pos, width]; None is zero ablation.
        positions: [row, pos], where to act; None acts everywhere. Absolute positions of this very pass.
        device: where the edits will act, if not on the model's device.
    """
    masks = unit_masks(model, rows, device)
    return {site: _replacing(mask, None if values is None else values[site], positions) for site, mask in masks.items()}


def _replacing(mask: Tensor, value: Tensor | None, positions: Tensor | None) -> Edit:
    where = mask[:, None] if positions is None else mask[:, None] & positions.bool()[:, :, None]

    def edit(activation: Tensor) -> Tensor:
        if value is None:
            return activation.masked_fill(where, 0)
        new = value.to(activation)
        if new.dim() == 2:
            new = new[:, None]
        return torch.where(where, new, activation)

    return edit


class RowEdits:
    """Unit edits for generation, where rows leave the batch as they end and the prompt must stay as it was.

    Like steering, it acts where reply tokens are written: at the prompt's last position and at every later one.
    """

    def __init__(self, masks: Mapping[Site, Tensor], values: Mapping[Site, Tensor] | None, scale: float | None = None) -> None:
        """Replaces masked units by `values` (None: zero); with `scale`, adds `scale * values` to them instead (enhancement).

        Args:
            masks: site -> [row, width]; values: site -> [row, width].
        """
        self._masks, self._values, self._scale = dict(masks), dict(values) if values else None, scale
        self._rows: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        """Keeps the given rows (indices into the original batch)."""
        self._rows = rows

    def edits(self) -> dict[Site, Edit]:
        """Site -> edit, for the plain model."""
        return {site: self._edit(site) for site in self._masks}

    def _edit(self, site: Site) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            mask = self._masks[site]
            value = None if self._values is None else self._values[site]
            if self._rows is not None:
                mask, value = mask[self._rows], None if value is None else value[self._rows]
            new = activation.clone()
            last = activation[:, -1]
            if self._scale is not None and value is not None:
                new[:, -1] = torch.where(mask, last + self._scale * value.to(last), last)
            else:
                new[:, -1] = torch.where(mask, torch.zeros_like(last) if value is None else value.to(last), last)
            return new

        return edit
