"""The slow and simple way, for tests to compare with: the plain Hugging Face model, bare torch hooks, no cache, no batch; circuits unit
by unit; every unit ablated for real."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.attribution.unit_scores import UnitScores, head_contributions, neuron_contributions
from emosteer.models.hooks import Edit
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z
from tests.helpers.precision import forward_bound

#: (layer, kind) -> function of the activation [batch, pos, width]; kinds as in emosteer.models.sites.
Changes = Mapping[tuple[int, str], Callable[[Tensor], Tensor]]


def _place(hf: Any, layer: int, kind: str) -> tuple[nn.Module, bool]:
    block = hf.model.layers[layer]
    return {
        "z": (block.self_attn.o_proj, True),
        "mlp_post": (block.mlp.down_proj, True),
        "attn_out": (block.self_attn.o_proj, False),
        "mlp_out": (block.mlp.down_proj, False),
        "resid_post": (block, False),
        "resid_mid": (getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm), True),
    }[kind]


@contextlib.contextmanager
def changed(hf: Any, changes: Changes) -> Iterator[None]:
    """Replaces activations of a Hugging Face model by functions of themselves."""
    with contextlib.ExitStack() as stack:
        for (layer, kind), change in changes.items():
            module, before = _place(hf, layer, kind)
            if before:
                handle = module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]), *args[1:]))
            else:
                handle = module.register_forward_hook(
                    lambda _, args, out, change=change: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
                )
            stack.callback(handle.remove)
        yield


def seen(hf: Any, ids: Sequence[int], places: Sequence[tuple[int, str]], changes: Changes | None = None) -> dict[tuple[int, str], Tensor]:
    """Activations [pos, width] of one unpadded sequence, changed ones as they were after the change."""
    found: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str], change: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
        def look(activation: Tensor) -> Tensor:
            new = change(activation) if change else activation
            found[place] = new[0].detach().clone()
            return new

        return look

    both = {place: keep(place, (changes or {}).get(place)) for place in (*places, *(changes or {}))}
    with changed(hf, both), torch.no_grad():
        hf(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return found


def greedy(
    model: Model, prompt: Sequence[int], changes: Changes, steps: int, stops: frozenset[int], penalty: float = 1.0
) -> tuple[tuple[int, ...], list[Tensor]]:
    """Greedy decoding of one row, the whole sequence computed again for every token. `changes` act at t* and later.

    Returns:
        The reply's tokens without its stop token, and the logits [d_vocab] of every step.
    """

    def late(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        start = len(prompt) - 1
        return lambda x: torch.cat([x[:, :start], change(x[:, start:])], dim=1)

    ids, trace = list(prompt), []
    with changed(model.hf, {place: late(change) for place, change in changes.items()}), torch.no_grad():
        for _ in range(steps):
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            trace.append(logits)
            scores = logits.clone()
            for token in set(ids):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            first, second = scores.topk(2).values
            assert first - second > 2 * forward_bound(logits), "these two tokens are too close for a text that no rounding changes"
            token = int(scores.argmax())
            if token in stops:
                break
            ids.append(token)
    return tuple(ids[len(prompt) :]), trace


def unit_edits(z_delta: Tensor, mlp_delta: Tensor) -> dict[Site, Edit]:
    """The same modulation at unit level: `z` and `mlp_post` shifted by constants. The slow form that `compile_units` equals.

    Args:
        z_delta: [layer, n_heads * d_head] or [row, layer, ...]; mlp_delta alike.
    """

    def shift(delta: Tensor) -> Edit:
        value = delta[:, None] if delta.dim() == 2 else delta
        return lambda activation: activation + value.to(activation)

    edits: dict[Site, Edit] = {}
    for layer in range(z_delta.shape[-2]):
        for kind, delta in ((Z, z_delta[..., layer, :]), (MLP_POST, mlp_delta[..., layer, :])):
            if delta.any():
                edits[Site(layer, kind)] = shift(delta)
    return edits


@torch.no_grad()
def ablation_drops(model: Model, ids: Tensor, position: int, units: Sequence[Unit], v_mid: Tensor, v_post: Tensor) -> tuple[Tensor, Tensor]:
    """For each unit: its one-pass contribution, and the drop of the projection at its own layer when it is really zero-ablated.

    Args:
        ids: one prompt [1, pos]; position: where both are read; v_mid, v_post: [layer, d_model].

    Returns:
        (contribution [unit], drop [unit]).
    """
    shape = model.shape
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, MLP_POST, RESID_MID, RESID_POST)]
    base = {site: value[0, position].float() for site, value in model.read(ids, sites).items()}
    stacked = {kind: torch.stack([base[Site(layer, kind)] for layer in range(shape.n_layers)]) for kind in (Z, MLP_POST)}
    tables = UnitScores(
        head_contributions(model, stacked[Z], v_mid.to(model.device))[None],
        neuron_contributions(model, stacked[MLP_POST], v_post.to(model.device))[None],
    )
    drops = torch.zeros(len(units))
    by_site: dict[Site, list[int]] = {}
    for index, unit in enumerate(units):
        by_site.setdefault(Site(unit.layer, RESID_MID if isinstance(unit, Head) else RESID_POST), []).append(index)
    for site, members in by_site.items():
        v = (v_mid if site.kind == RESID_MID else v_post)[site.layer].to(model.device)
        for start in range(0, len(members), 32):
            chosen = members[start : start + 32]
            edits = replace_units(model, [[units[i]] for i in chosen])
            after = model.read(ids.expand(len(chosen), -1), [site], edits=edits)[site][:, position].float()
            # the difference is taken before projecting: the residual's massive entries would drown it otherwise
            drops[chosen] = ((base[site] - after) @ v).cpu()
    return torch.tensor([tables.of(0, unit) for unit in units]), drops


def parse_unit(text: str) -> Unit:
    """Reads ``L3H7`` or ``L3N1024`` back into a Head or a Neuron."""
    parts = re.fullmatch(r"L(\d+)([HN])(\d+)", text)
    assert parts, text
    return (Head if parts[2] == "H" else Neuron)(int(parts[1]), int(parts[3]))
