"""What attention does inside: the patterns of every head, the map to its values, and how far a norm scales what it reads.

The plain model runs with its own written-out attention for the length of a pass, since fused kernels do not say where they looked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.errors import ModelError
from emosteer.models.architecture import before_norm, part, parts
from emosteer.models.hooks import reading
from emosteer.models.model import Model
from emosteer.models.sites import Site, Z

EAGER = "eager"


@dataclass(frozen=True, eq=False)
class Seen:
    """One forward pass from the inside.

    patterns: per layer [row, head, query pos, key pos], rows of each query add up to 1; stream: per layer [row, pos, d_model], the
    residual stream that the layer reads; values: what was asked for, site -> [row, pos, width].
    """

    patterns: tuple[Tensor, ...]
    stream: tuple[Tensor, ...]
    values: dict[Site, Tensor]


@contextlib.contextmanager
def written_out(model: Model) -> Iterator[None]:
    """Attention that keeps its patterns, for the length of the block.

    Raises:
        ModelError: if this architecture has none.
    """
    before = model.hf.config._attn_implementation
    try:
        model.hf.set_attn_implementation(EAGER)
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"{model.name} cannot show where its heads look: {error}") from error
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


@contextlib.contextmanager
def _no_hook_left(model: Model) -> Iterator[None]:
    """Takes out again what transformers hooks into a model that is asked for its inner values: the fast pass writes for models that nothing
    is hooked into alone."""
    modules = list(model.hf.modules())
    before = [(set(module._forward_hooks), set(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, (hooks, names) in zip(modules, before, strict=True):
            for key in module._forward_hooks.keys() - hooks:
                module._forward_hooks.pop(key)
            if "_output_capturing_hooks_installed" not in names:  # so that they come back when they are asked for
                vars(module).pop("_output_capturing_hooks_installed", None)


@torch.no_grad()
def see(model: Model, ids: Tensor, mask: Tensor, positions: Tensor, sites: Sequence[Site] = ()) -> Seen:
    """One pass of the plain model, with everything that attention does.

    Args:
        ids, mask, positions: as `Model.run` takes them.
        sites: what else to read.

    Raises:
        ModelError: if the model does not hand out its patterns, or lies on several devices.
    """
    if model.spread:
        raise ModelError(f"{model.name} lies on several devices; where its heads look is read on one, so leave out --device-map")
    store: dict[Site, Tensor] = {}
    hooks = {site: reading(store, site, None) for site in sites}
    with written_out(model), _no_hook_left(model), model.hooks(hooks, bridge=False) as body:
        out = body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )
    found, n = getattr(out, "attentions", None), model.shape.n_layers
    if not found or len(found) != n or any(pattern is None for pattern in found):
        raise ModelError(f"{model.name} does not show where its heads look; its layers keep no attention patterns")
    return Seen(tuple(found), tuple(out.hidden_states[:n]), store)


def value_weights(model: Model, layer: int, seen: Seen) -> Tensor:
    """The map from what a layer's attention reads, behind its norm, to the value of each head. Shape [n_heads, d_head, d_model].

    Heads that share a value have the same map. Where one matrix holds queries, keys and values, it is tried in the orders that there are;
    whatever is found is proved on a pass: the values, weighed by the patterns, must be what the heads put out.

    Args:
        seen: a pass in which `z` of the layer was read.

    Raises:
        ModelError: if nothing gives what the heads put out (values that are normed or gated).
    """
    shape, block = model.shape, model.layers[layer]
    norm = None if model.family.attn_norm is None else part(block, model.family.attn_norm)
    read = seen.stream[layer] if norm is None else norm(seen.stream[layer])
    z = seen.values[Site(layer, Z)].float().unflatten(-1, (shape.n_heads, shape.d_head))
    for weight, bias in _candidates(model, layer):
        value = torch.einsum("bpm,hdm->bphd", read.float(), weight) + bias
        made = torch.einsum("bhqk,bkhd->bqhd", seen.patterns[layer].float(), value)
        tolerance = 1e-3 if model.dtype == torch.float32 and not model.quantised else 5e-2
        if float((made - z).abs().max()) <= tolerance * float(z.abs().max().clamp_min(1e-6)):
            return weight
    raise ModelError(
        f"what the heads of layer {layer} of {model.name} put out is not their values weighed by their patterns; there are no edges "
        "between them"
    )


def _candidates(model: Model, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Value maps [n_heads, d_head, d_model] and biases [n_heads, d_head] that a layer may have."""
    shape, family = model.shape, model.family
    linears = parts(model.layers[layer], family.qkv)
    weights = [model.matrix(linear).float() for linear in linears]
    biases = [getattr(linear, "bias", None) for linear in linears]
    zeros = [w.new_zeros(len(w)) if bias is None else bias.to(w) for w, bias in zip(weights, biases, strict=True)]
    both = [torch.cat([weight, bias[:, None]], dim=1) for weight, bias in zip(weights, zeros, strict=True)]
    width = shape.n_kv_heads * shape.d_head
    if len(both) == 3:
        orders = [both[2]]
    else:
        fused = both[0]
        each = fused.unflatten(0, (-1, shape.d_head))  # in turn for every head, or for every group of heads that share a value
        group = shape.n_heads // shape.n_kv_heads + 2
        turns = [each[group - 1 :: group].flatten(0, 1)] if len(each) % group == 0 else []
        orders = [fused[-width:], *turns]
    for order in orders:
        if len(order) == width:
            heads = order.unflatten(0, (shape.n_kv_heads, shape.d_head)).repeat_interleave(shape.n_heads // shape.n_kv_heads, 0)
            yield heads[..., :-1], heads[..., -1]


def frozen_scale(model: Model, path: str | None, layer: int, states: Tensor) -> Tensor:
    """What a norm multiplies its input by at each position, gain and centring apart: with it held, the norm is linear. Shape [row, pos].

    Args:
        path: of the norm in its layer; None, where there is none, gives ones.
        states: what the norm reads [row, pos, d_model].
    """
    if path is None:
        return torch.ones(states.shape[:-1], device=states.device)
    norm = part(model.layers[layer], path)
    with torch.no_grad():
        out = (norm(states) - norm(torch.zeros_like(states))).float()
    read = (states.float() * before_norm(model.family, norm, out)).sum(-1)
    return out.square().sum(-1) / read.clamp_min(torch.finfo(torch.float32).tiny)


def behind_norm(model: Model, path: str | None, layer: int, vectors: Tensor, scale: Tensor) -> Tensor:
    """What becomes of parts of a norm's input, its scale held at what it is for their sum. Shape [row, pos, d_model], as `vectors`.

    Args:
        path: of the norm in its layer; None, where there is none, changes nothing. scale: of `frozen_scale`, [row, pos].
    """
    if path is None:
        return vectors
    eye = torch.eye(model.shape.d_model, device=vectors.device)
    return (vectors @ before_norm(model.family, part(model.layers[layer], path), eye).T) * scale[..., None]
