"""One-pass contributions against real ablation on a real model.

The contribution is computed as `ablate` computes it, from one pass in the model's own precision. The truth is a real zero-ablation of
each unit in float64: in float32 the residual stream's massive entries (thousands) leave a drop of 1e-3 only two or three digits.
Ablating a unit of layer l changes nothing before l, and the projection is read at l: so layer l alone is run again, from the
inputs that the clean pass gave it, once per unit.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import head_contributions, neuron_contributions
from emosteer.directions.directions import Directions
from emosteer.models.hooks import hooked
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z

#: Rows of one layer that are run at once.
ROWS = 64
#: Positional and keyword arguments of a decoder layer.
LayerInputs = tuple[tuple[Any, ...], dict[str, Any]]


def sampled_units(model: Model, n_neurons: int, seed: int) -> list[Unit]:
    """Every head, and a random sample of neurons."""
    shape = model.shape
    drawn = random.Random(f"{seed}/verify").sample(range(shape.n_layers * shape.d_mlp), min(n_neurons, shape.n_layers * shape.d_mlp))
    heads: list[Unit] = [Head(layer, i) for layer in range(shape.n_layers) for i in range(shape.n_heads)]
    return heads + [Neuron(i // shape.d_mlp, i % shape.d_mlp) for i in drawn]


@torch.no_grad()
def one_pass(model: Model, ids: Tensor, units: Sequence[Unit], v_mid: Tensor, v_post: Tensor) -> Tensor:
    """Contributions of units at the last position, from one forward pass. Shape [unit].

    Args:
        ids: [1, pos]; v_mid, v_post: [layer, d_model].
    """
    layers = range(model.shape.n_layers)
    seen = model.read(ids, [Site(layer, kind) for layer in layers for kind in (Z, MLP_POST)])
    z, mlp = (torch.stack([seen[Site(layer, kind)][0, -1].double() for layer in layers]) for kind in (Z, MLP_POST))
    heads = head_contributions(model, z, v_mid.to(z))
    neurons = neuron_contributions(model, mlp, v_post.to(mlp))
    return torch.stack([(heads if isinstance(unit, Head) else neurons)[unit.layer, unit.index] for unit in units]).cpu()


@torch.no_grad()
def real_drops(model: Model, inputs: Sequence[LayerInputs], units: Sequence[Unit], v_mid: Tensor, v_post: Tensor) -> Tensor:
    """Drops of the projection at each unit's own layer when the unit is zero-ablated. Shape [unit].

    Args:
        inputs: what each layer received in the clean pass. Only the layer at hand is copied to float64, on the CPU.
    """
    drops = torch.zeros(len(units), dtype=torch.float64)
    by_site: dict[Site, list[int]] = {}
    for index, unit in enumerate(units):
        by_site.setdefault(Site(unit.layer, RESID_MID if isinstance(unit, Head) else RESID_POST), []).append(index)
    for site, members in by_site.items():
        v = (v_mid if site.kind == RESID_MID else v_post)[site.layer].double()
        for start in range(0, len(members), ROWS):
            chunk = members[start : start + ROWS]
            after = _run_layer(model, site, inputs[site.layer], [[], *([units[i]] for i in chunk)])
            drops[chunk] = (after[0] - after[1:]) @ v
    return drops


@torch.no_grad()
def layer_inputs(model: Model, ids: Tensor) -> list[LayerInputs]:
    """Arguments of every decoder layer in a clean pass, in float64 on the CPU."""
    inputs: list[LayerInputs] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append((_double(args), _double(kwargs)))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in model.layers]
    try:
        model.run(ids, bridge=False)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    if isinstance(value, (tuple, list)):
        return type(value)(_double(item) for item in value)
    return {key: _double(item) for key, item in value.items()} if isinstance(value, dict) else value


def _run_layer(model: Model, site: Site, inputs: LayerInputs, rows: Sequence[Sequence[Unit]]) -> Tensor:
    """Runs one decoder layer, in float64, on as many copies of its input as there are rows, each with its own units zeroed, and
    reads a site at the last position. [row, d_model]."""
    args, kwargs = inputs
    hidden = args[0] if args else kwargs["hidden_states"]
    kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    layer = copy.deepcopy(model.layers[site.layer]).cpu().double()
    if not model.family.has_neurons:  # experts are behind all that is read here, and not all of their code has float64
        setattr(layer, model.family.mlp, torch.nn.Identity())
    edits = replace_units(model, rows, device=torch.device("cpu"))
    store: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        for where, edit in edits.items():
            stack.enter_context(hooked(layer, where.kind, edit, model.family))
        stack.enter_context(hooked(layer, site.kind, lambda activation: store.append(activation[:, -1]), model.family))
        layer(hidden.expand(len(rows), -1, -1), *args[1:], **kwargs)
    return store[0]


def verify(model: Model, directions: Directions, prompts: Sequence[Sequence[int]], n_neurons: int, seed: int = 0) -> dict[str, Any]:
    """Compares every head and a sample of neurons on several prompts, each with another emotion's directions.

    Returns:
        For heads and neurons: the number of units; relative errors `|contribution - drop| / |drop|`, largest and median, and the share
        of them up to 1e-4; and the largest error as a share of the prompt's largest drop. The few units with a large relative error
        are those whose contribution is nearly zero, a sum of large terms that cancel: there the pass's own precision shows.
    """
    units = sampled_units(model, n_neurons, seed)
    is_head = torch.tensor([isinstance(unit, Head) for unit in units])
    kinds = {"heads": is_head, "neurons": ~is_head}
    errors: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    largest = dict.fromkeys(kinds, 0.0)
    for index, prompt in enumerate(prompts):
        emotion = index % len(directions.emotions)
        v_mid, v_post = directions.at(RESID_MID)[emotion], directions.at(RESID_POST)[emotion]
        ids = torch.tensor([list(prompt)], device=model.device)
        error = one_pass(model, ids, units, v_mid, v_post).double()
        truth = real_drops(model, layer_inputs(model, ids), units, v_mid, v_post)
        error = (error - truth).abs()
        for kind, mine in kinds.items():
            if mine.any():
                errors[kind].append(error[mine] / truth[mine].abs().clamp_min(1e-12))
                largest[kind] = max(largest[kind], (error[mine].max() / truth[mine].abs().max()).item())
    result: dict[str, Any] = {"prompts": len(prompts), "dtype": model.precision.removeprefix("torch.")}
    for kind, values in errors.items():
        if values:
            whole = torch.cat(values)
            result[kind] = {
                "units": len(whole) // len(prompts),
                "max_relative_error": whole.max().item(),
                "median_relative_error": whole.median().item(),
                "share_within_1e-4": (whole <= 1e-4).double().mean().item(),
                "max_error_to_largest": largest[kind],
            }
    return result
