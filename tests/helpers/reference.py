"""The slow and simple way, for tests to compare with: the plain Hugging Face model, bare torch hooks, no cache, no batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emosteer.models.model import Model
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
