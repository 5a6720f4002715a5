"""Scores of all heads and neurons from one pass, against zero-ablating head after head, prompt after prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.results import Bar, Row
from bench.timing import median
from bench.workload import Workbench, settings
from emosteer.attribution.unit_scores import head_contributions, neuron_contributions
from emosteer.directions.activations import Sample, read_states
from emosteer.directions.extract import extract
from emosteer.models.interventions import replace_units
from emosteer.models.model import Model
from emosteer.models.sites import MLP_POST, RESID_MID, RESID_POST, Head, Neuron, Site, Unit, Z

FAMILY = "attribution"


@torch.no_grad()
def one_pass(model: Model, prompts: Sequence[tuple[int, ...]], v_mid: Tensor, v_post: Tensor) -> tuple[Tensor, Tensor]:
    """Contributions of every head and neuron at the last position of every prompt, from one forward pass over all of them.

    Args:
        v_mid, v_post: [emotion, layer, d_model].

    Returns:
        heads [prompt, emotion, layer, head] and neurons [prompt, emotion, layer, neuron].
    """
    shape = model.shape
    samples = [Sample(None, "", (prompt,), ((),)) for prompt in prompts]  # type: ignore[arg-type]
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, MLP_POST)]
    states = read_states(model, samples, sites)
    z, mlp = (torch.stack([states[Site(layer, kind)] for layer in range(shape.n_layers)], dim=2) for kind in (Z, MLP_POST))
    return head_contributions(model, z, v_mid), neuron_contributions(model, mlp, v_post)


@torch.no_grad()
def ablated(model: Model, prompt: tuple[int, ...], unit: Unit) -> Tensor:
    """The last position's residual behind the unit's sublayer, with the unit set to zero: one forward pass. Shape [d_model]."""
    site = Site(unit.layer, RESID_MID if isinstance(unit, Head) else RESID_POST)
    seen = model.read(torch.tensor([prompt]), [site], edits=replace_units(model, [[unit]]), bridge=False)
    return seen[site][0, -1]


@torch.no_grad()
def clean(model: Model, prompt: tuple[int, ...]) -> dict[Site, Tensor]:
    """The last position's residuals of the untouched model: site -> [d_model]."""
    sites = [Site(layer, kind) for layer in range(model.shape.n_layers) for kind in (RESID_MID, RESID_POST)]
    return {site: value[0, -1] for site, value in model.read(torch.tensor([prompt]), sites, bridge=False).items()}


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the comparison gave. loop_seconds: of all heads and prompts together; one_pass_seconds: [round], of all prompts;
    head_error, neuron_error: largest difference, relative to the largest drop of the same layer, prompt and emotion."""

    loop_seconds: float
    one_pass_seconds: tuple[float, ...]
    loop_passes: int
    head_error: float
    neuron_error: float


def compare(
    model: Model,
    prompts: Sequence[tuple[int, ...]],
    v_mid: Tensor,
    v_post: Tensor,
    neurons: int = 64,
    tick: Callable[[], None] = lambda: None,
) -> Comparison:
    """The loop over all heads, one layer at a time, with one timed one-pass run between layers; some neurons checked as well, untimed."""
    shape = model.shape
    base = [clean(model, prompt) for prompt in prompts]
    one_pass(model, prompts, v_mid, v_post)  # warm
    drops = torch.zeros(len(prompts), v_mid.shape[0], shape.n_layers, shape.n_heads)
    loop, once, passes = 0.0, [], 0
    for layer in range(shape.n_layers):
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            for head in range(shape.n_heads):
                # subtracted before projecting: the residual's massive entries would drown the difference otherwise
                fall = base[index][Site(layer, RESID_MID)] - ablated(model, prompt, Head(layer, head))
                drops[index, :, layer, head] = v_mid[:, layer] @ fall
                passes += 1
        loop += time.perf_counter() - start
        start = time.perf_counter()
        found = one_pass(model, prompts, v_mid, v_post)
        once.append(time.perf_counter() - start)
        tick()
    head_error = _error(found[0], drops)
    return Comparison(loop, tuple(once), passes, head_error, _neuron_error(model, prompts, base, found[1], v_post, neurons))


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry along the last dimension."""
    return ((found - expected).abs() / expected.abs().amax(-1, keepdim=True)).max().item()


def _neuron_error(
    model: Model, prompts: Sequence[tuple[int, ...]], base: list[dict[Site, Tensor]], found: Tensor, v: Tensor, n: int
) -> float:
    """The same for the neurons with the largest contributions of as many layers as there is room for, on the first prompt."""
    table = found[0]  # [emotion, layer, neuron]
    worst = 0.0
    for layer in torch.linspace(0, model.shape.n_layers - 1, min(model.shape.n_layers, max(1, n // 8))).long().tolist():
        chosen = table[:, layer].abs().amax(0).topk(8).indices.tolist()
        falls = torch.stack([base[0][Site(layer, RESID_POST)] - ablated(model, prompts[0], Neuron(layer, i)) for i in chosen], dim=1)
        worst = max(worst, _error(table[:, layer, chosen], v[:, layer] @ falls))
    return worst


def run(bench: Workbench) -> Iterator[Row]:
    """The rows of this family."""
    model = bench.model()
    data = bench.data(bench.pick(6, 4))
    directions = extract(model, data.groups, settings(), bank=data.bank)
    v_mid, v_post = directions.at(RESID_MID), directions.at(RESID_POST)
    prompts = [request.ids for request in bench.requests(bench.pick(2, 1))]
    found = compare(model, prompts, v_mid, v_post, neurons=bench.pick(64, 16))
    shape = model.shape
    one = median(found.one_pass_seconds)
    speed = found.loop_seconds / one
    units = shape.n_layers * (shape.n_heads + shape.d_mlp)
    length = sum(map(len, prompts)) / len(prompts)
    yield Row.of(
        f"{FAMILY}.speed",
        "attribution: all heads (and neurons) in one pass, against zero-ablating every head for every prompt",
        speed,
        Bar(150),
        spread=f"{found.loop_seconds / max(found.one_pass_seconds):.0f} to {found.loop_seconds / min(found.one_pass_seconds):.0f}",
        note=f"{len(prompts)} prompts of {length:.0f} tokens, {shape.n_layers * shape.n_heads} heads: loop {found.loop_seconds:.1f} s, "
        f"one pass {one:.2f} s; the one pass also scores all neurons and all emotions; the loop is without unembedding",
    )
    yield Row.of(
        f"{FAMILY}.passes",
        "attribution: forward passes of the head loop for one of ours",
        found.loop_passes,
        note=f"the prompts make one batch; with the neurons the loop would need {units * len(prompts):,} passes",
    )
    yield Row.of(
        f"{FAMILY}.agreement",
        "attribution: largest difference to real ablation, relative to the layer's largest drop",
        max(found.head_error, found.neuron_error),
        Bar(1e-4, "", at_least=False),
        note=f"every head {found.head_error:.1e}, {bench.pick(64, 16)} neurons {found.neuron_error:.1e}; float32",
    )
