"""Edges patched for real: what head A wrote is taken out of what the layer of head B reads, and of nothing else.

B's pattern, its values and the norm's scale are computed again. The estimate (`paths`) holds pattern and scale, so what the two differ by
is what A does to where B looks, and to how far the norm scales.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.attribution.unit_scores import written_direction
from emosteer.circuits.heads.paths import Targets, edges_into, followed
from emosteer.directions.activations import Batch, TokenRow, make_batch, read_positions
from emosteer.directions.directions import Directions
from emosteer.models.architecture import part
from emosteer.models.attention import behind_norm, frozen_scale, see
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_MID, Head, Site, Z


@dataclass(frozen=True)
class Pair:
    """An edge to check: from head `source` to head `target` along an emotion's direction."""

    source: Head
    target: Head
    emotion: int


@torch.no_grad()
def check_text(model: Model, directions: Directions, row: TokenRow, pairs: Sequence[Pair], targets: Targets) -> tuple[Tensor, Tensor]:
    """Estimate and truth of some edges on one text.

    Args:
        targets: heads that hold those of the pairs.

    Returns:
        ([pair], [pair]): the edge, and how far the target's contribution falls when that path alone is cut.
    """
    n_layers, batch = model.shape.n_layers, make_batch(model, [row])
    sites = [Site(layer, kind) for layer in range(n_layers) for kind in (Z, ATTN_OUT)]
    seen = see(model, batch.ids, batch.mask, batch.positions, sites)
    edges = edges_into(model, targets, followed(model, seen, batch, targets).z)[0]
    place = {head: i for i, head in enumerate(targets.heads)}
    estimate = torch.stack([edges[place[p.target], p.emotion, p.source.layer, p.source.index] for p in pairs])
    cuts: dict[int, Tensor] = {}
    for number, pair in enumerate(pairs):
        written = written_by(model, seen.values, pair.source)[0]
        cut = cuts.setdefault(pair.target.layer, torch.zeros(len(pairs), *written.shape, device=written.device))
        cut[number] = written
    many = make_batch(model, [row] * len(pairs))
    layers = sorted({pair.target.layer for pair in pairs})
    with contextlib.ExitStack() as stack:
        for layer, cut in cuts.items():
            stack.enter_context(_cutting(model, layer, cut))
        after = model.read(
            many.ids, [Site(layer, Z) for layer in layers], attention_mask=many.mask, position_ids=many.positions, bridge=False
        )
    v_mid = directions.at(RESID_MID).to(model.device).float()
    truth = [_fall(model, v_mid, pair, number, seen.values, after, batch, many) for number, pair in enumerate(pairs)]
    return estimate, torch.tensor(truth)


def written_by(model: Model, values: dict[Site, Tensor], head: Head) -> Tensor:
    """What one head wrote into the stream. Shape [row, pos, d_model]."""
    z = values[Site(head.layer, Z)].float().unflatten(-1, (model.shape.n_heads, model.shape.d_head))[..., head.index, :]
    written = z @ model.w_o(head.layer)[head.index].float()
    path = model.family.attn_post_norm
    scale = frozen_scale(model, path, head.layer, values[Site(head.layer, ATTN_OUT)])
    written = behind_norm(model, path, head.layer, written, scale)
    return model.residual_factor * written


def _fall(
    model: Model,
    v_mid: Tensor,
    pair: Pair,
    number: int,
    before: dict[Site, Tensor],
    after: dict[Site, Tensor],
    alone: Batch,
    many: Batch,
) -> float:
    """How far the target's contribution fell in one row."""
    site, d_head = Site(pair.target.layer, Z), model.shape.d_head
    entries = slice(pair.target.index * d_head, (pair.target.index + 1) * d_head)
    fall = alone.average(before[site])[0, entries] - many.average(after[site])[number, entries]
    along = written_direction(model, pair.target.layer, RESID_MID, v_mid[pair.emotion, pair.target.layer])
    return float(fall.float() @ (model.w_o(pair.target.layer)[pair.target.index].float() @ along.float()))


@contextlib.contextmanager
def _cutting(model: Model, layer: int, cut: Tensor) -> Iterator[None]:
    """Takes vectors [row, pos, d_model] out of what a layer's attention reads, norm included, for the length of the block."""
    reader = part(model.layers[layer], model.family.attn_norm or model.family.attention)
    handle = reader.register_forward_pre_hook(_less(cut), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _less(cut: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] - cut.to(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] - cut.to(kwargs["hidden_states"])}

    return hook


def text_row_of(ids: Sequence[int], first: int) -> TokenRow:
    """One text, read where its reply's tokens are written."""
    return TokenRow(tuple(ids), tuple(range(len(ids))), (0,) * len(ids), (read_positions(first, len(ids) - first),))


def drawn_pairs(kept: Sequence[Pair], heads: Sequence[Head], emotion: int, count: int, draw: random.Random) -> list[tuple[Pair, bool]]:
    """Edges to check: half of them kept ones, the others between any two heads in different layers. The flag says which are kept."""
    some = draw.sample(list(kept), min(len(kept), count - count // 2))
    free = [(a, b) for a in heads for b in heads if a.layer < b.layer]
    others = draw.sample(free, min(len(free), count - len(some)))
    return [(pair, True) for pair in some] + [(Pair(a, b, emotion), False) for a, b in others]
