"""The proof that a model is what its description says, on a short input, when it is loaded: whoever reads or edits a site may rely on it.

A no-op hook is the field's most common bug, and a wrong factor or a transposed matrix gives plausible numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from emosteer.base.errors import ModelError, first_line
from emosteer.models.architecture import Family, Shape, before_norm, part
from emosteer.models.memory import is_out_of_memory
from emosteer.models.quantised import QUANTISED_GRADIENT, gradient_error
from emosteer.models.sites import ATTN_OUT, KINDS, MLP_OUT, MLP_POST, RESID_MID, RESID_POST, Site, Z

#: Tokens of the input.
LENGTH = 8


class Hooked(Protocol):
    """What of a model the proof needs (`models.model.Model`)."""

    name: str
    hf: Any
    family: Family
    shape: Shape
    layers: Any
    residual_factor: float
    quantised: str | None

    @property
    def device(self) -> torch.device: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def final_norm(self) -> Any: ...  # noqa: D102
    def width(self, kind: str) -> int: ...  # noqa: D102
    def w_o(self, layer: int) -> Tensor: ...  # noqa: D102
    def w_down(self, layer: int) -> Tensor: ...  # noqa: D102
    def logits(self, hidden: Tensor) -> Tensor: ...  # noqa: D102
    def run(self, ids: Tensor, *, bridge: bool) -> Tensor: ...  # noqa: D102
    def read(self, ids: Tensor, sites: Sequence[Site], **options: Any) -> dict[Site, Tensor]: ...  # noqa: D102


@torch.no_grad()
def prove(model: Hooked) -> None:
    """Proves the plain model: every site fires, the residual identities hold, the weights by name write what is written, the logits are the
    model's own, and a direction of the logits is read from the stream as the gradient has it.

    Raises:
        ModelError: naming the architecture and what failed.
    """
    where, ids = f"{type(model.hf).__name__} ({model.name}, plain model)", _ids(model)
    seen = _seen(model, ids, where, bridge=False)
    if model.family.parallel:
        _prove_parallel(model, ids, seen, where)
    hidden = model.run(ids, bridge=False)
    own = model.hf(input_ids=ids, use_cache=False).logits.to(model.device)
    _close(model, model.logits(hidden), own, f"{where}: the logits are not the model's own")
    _prove_final_norm(model, seen[Site(model.shape.n_layers - 1, RESID_POST)][0, -1], where)


@torch.no_grad()
def prove_bridge(model: Hooked) -> None:
    """Proves the sites of the bridge in the same way, and that it computes what the plain model does, with an edit at every site too.

    Raises:
        ModelError: naming the architecture and what failed.
    """
    where, ids = f"{type(model.hf).__name__} ({model.name}, TransformerBridge)", _ids(model)
    seen, last = _seen(model, ids, where, bridge=True), Site(model.shape.n_layers - 1, RESID_POST)
    plain = model.read(ids, [last], bridge=False)[last]
    _close(model, seen[last], plain, f"{where}: the bridge's {last} differs from the plain model's")
    edits = {site: _stretched for site in seen if site != last}
    found, expected = (model.read(ids, [last], edits=edits, bridge=bridge)[last] for bridge in (True, False))
    _close(model, found, expected, f"{where}: an edit does in the bridge what it does not do in the plain model")


def _stretched(activation: Tensor) -> Tensor:
    return activation + 0.1 * activation.roll(1, -1)


def _ids(model: Hooked) -> Tensor:
    return torch.arange(1, LENGTH + 1, device=model.device).remainder(model.shape.d_vocab)[None]


def _seen(model: Hooked, ids: Tensor, where: str, *, bridge: bool) -> dict[Site, Tensor]:
    """Every site once, with the identities of each layer proved."""
    sites = [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in KINDS]
    try:
        seen = model.read(ids, sites, bridge=bridge)
    except (KeyError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{where}: a site cannot be hooked ({first_line(error)}); this architecture is not supported") from error
    silent = [str(site) for site in sites if site not in seen]
    if silent:
        raise ModelError(f"{where}: {len(silent)} sites never fired ({', '.join(silent[:3])} ...); this architecture is not supported")
    wrong = [(str(s), seen[s].shape[-1]) for s in sites if seen[s].shape != (1, LENGTH, model.width(s.kind))]
    if wrong:
        raise ModelError(f"{where}: site {wrong[0][0]} has width {wrong[0][1]}; this architecture is not supported")
    for layer in range(model.shape.n_layers):
        _prove_finite(model, layer, seen, where)
        _prove_layer(model, layer, seen, where)
    return seen


def _prove_finite(model: Hooked, layer: int, seen: Mapping[Site, Tensor], where: str) -> None:
    bad = [kind for kind in KINDS if not torch.isfinite(seen[Site(layer, kind)]).all()]
    if bad:
        kind = str(model.dtype).removeprefix("torch.")
        hint = "try --dtype bfloat16 or float32" if model.dtype == torch.float16 else "the weights are damaged, or not this model's"
        raise ModelError(f"{where}: {bad[0]} of layer {layer} is not finite in {kind}; {hint}")


def _prove_layer(model: Hooked, layer: int, seen: Mapping[Site, Tensor], where: str) -> None:
    block, family = model.layers[layer], model.family
    here = {kind: seen[Site(layer, kind)] for kind in KINDS}
    attn, mlp = here[ATTN_OUT], here[MLP_OUT]
    written: list[tuple[str, Tensor, str, Callable[[int], Tensor], str]] = []
    if _asked(model, layer):
        written.append((Z, attn, family.w_o, model.w_o, "attn_out of layer {} is not z W_O"))
    if _asked(model, layer) and family.w_down is not None:
        written.append((MLP_POST, mlp, family.w_down, model.w_down, "mlp_out of layer {} is not mlp_post W_down"))
    for kind, out, path, weights, message in written:
        linear, weight = part(block, path), weights(layer).flatten(0, -2)
        bias = getattr(linear, "bias", None)
        product = functional.linear(here[kind].to(weight.device), weight.T, None if bias is None else bias.to(weight.device))
        _close(model, product, out, f"{where}: {message.format(layer)}")
        if model.quantised and not gradient_error(linear, weight.T, model.dtype) <= QUANTISED_GRADIENT:
            raise ModelError(f"{where}: no true gradient passes the {model.quantised} weights of layer {layer}; try plain weights")
    if family.attn_post_norm is not None:
        attn = part(block, family.attn_post_norm)(attn)
    if family.mlp_post_norm is not None:
        mlp = part(block, family.mlp_post_norm)(mlp)
    attn, mlp = model.residual_factor * attn, model.residual_factor * mlp
    if layer > 0:
        before = seen[Site(layer - 1, RESID_POST)]
        _close(model, before + attn, here[RESID_MID], f"{where}: resid_mid of layer {layer} is not resid_pre + attention output")
    _close(model, here[RESID_MID] + mlp, here[RESID_POST], f"{where}: resid_post of layer {layer} is not resid_mid + MLP output")


def _asked(model: Hooked, layer: int) -> bool:
    """Whether the weights of a layer are compared with what they write: packed ones, which are slow to unpack, at three depths."""
    n = model.shape.n_layers
    return model.quantised is None or layer in (0, n // 2, n - 1)


def _prove_parallel(model: Hooked, ids: Tensor, seen: Mapping[Site, Tensor], where: str) -> None:
    """Whether the MLP of layer 0 is blind to what attention writes: parallel sublayers and those in turn add up to the same stream, and
    `resid_mid`, which tells them apart elsewhere, is no part of a parallel block."""
    attn, mlp = Site(0, ATTN_OUT), Site(0, MLP_OUT)
    changed = model.read(ids, [mlp], edits={attn: lambda activation: activation.roll(1, -1)}, bridge=False)[mlp]
    if not torch.equal(changed, seen[mlp]):
        raise ModelError(f"{where}: the MLP of layer 0 reads what attention writes; this architecture is not supported")


def _prove_final_norm(model: Hooked, state: Tensor, where: str) -> None:
    """Whether a direction behind the final norm is read from the stream by `before_norm`: its gradient is, but for the scale, and for what
    lies along the state itself, since the norm's scale depends on the state."""
    draw = torch.Generator().manual_seed(0)
    state = state.to(next((weight.device for weight in model.final_norm.parameters()), state.device))  # a spread model's is elsewhere
    direction = torch.randn(model.shape.d_model, generator=draw).to(state)
    with torch.enable_grad():
        leaf = state.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad((model.final_norm(leaf[None])[0].float() * direction.float()).sum(), leaf)
    read = before_norm(model.family, model.final_norm, direction)
    along = torch.stack([state.float(), torch.ones_like(state.float())], dim=1)
    basis = torch.linalg.qr(along)[0]
    found, expected = (vector.float() - basis @ (basis.T @ vector.float()) for vector in (read, gradient))
    cosine = functional.cosine_similarity(found, expected, dim=0).item()
    if not cosine > (1 - 1e-4 if model.dtype == torch.float32 else 0.99):
        raise ModelError(
            f"{where}: the final norm's gain is not what it should be (cosine {cosine:.2f}); this architecture is not supported"
        )


def _close(model: Hooked, found: Tensor, expected: Tensor, message: str) -> None:
    tolerance = 1e-4 if model.dtype == torch.float32 and model.quantised is None else 3e-2  # 8-bit maps round activations, too
    scale = expected.abs().max().clamp_min(1e-6)
    error = ((found.to(expected.device) - expected).abs().max() / scale).item()
    if not error <= tolerance:
        raise ModelError(f"{message} (relative error {error:.1e}); this architecture is not supported")
