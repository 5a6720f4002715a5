"""What rounding can do to a result, for tests to bound differences with: other processors, threads, batches and places in memory sum in
other orders, and the last bits follow.

A computed sum of n products is the exact sum of products that are each off by at most n half-eps (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). So two ways of summing are at most n eps apart, times the sum of the products' sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from emosteer.models.model import Model
from emosteer.models.sites import Head, Unit
from tests.conftest import SIZES


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def product_bound(a: Tensor, b: Tensor, eps: float | None = None) -> Tensor:
    """How far two computations of `a @ b` may be apart, entry by entry."""
    return a.shape[-1] * (eps or eps_of(a.dtype)) * (a.abs() @ b.abs())


def forward_bound(values: Tensor) -> float:
    """How far two computations of a tiny model's logits or states may be apart.

    Roundings go either way, so that those of sums that follow one another grow as the root of their number: in float32, of 848 terms,
    29 eps of the largest value. The bound is four times that, 1.4e-5. In bfloat16 a sum is rounded once, when it is done: 27 roundings
    of half an eps, 8 %.
    """
    width, layers = SIZES["hidden_size"], SIZES["num_hidden_layers"]
    sums = [width] * 7 + [SIZES["intermediate_size"]]  # two norms; q/k/v; scores and their mean; heads; gate or up; neurons
    if values.dtype == torch.float32:
        spread = (layers * sum(sums) + width) ** 0.5 * eps_of(values.dtype)
    else:
        spread = (layers * (len(sums) + 1)) ** 0.5 * eps_of(values.dtype) / 2
    return 4 * spread * float(values.abs().max())


def assert_forward(found: Tensor, expected: Tensor, what: str = "") -> None:
    """Two computations of a tiny model's logits or states: `found` in the model's precision, `expected` in that or a higher one."""
    assert found.shape == expected.shape, what
    error, bound = (found.double() - expected.double()).abs().max().item(), forward_bound(found)
    assert error <= bound, f"{what}: {error:.1e} apart, rounding explains {bound:.1e}"


def contribution_bounds(model: Model, ids: Tensor, units: Sequence[Unit], v_mid: Tensor, v_post: Tensor) -> Tensor:
    """How far each unit's contribution along a direction may be off when the model computes in its own precision. Shape [unit].

    Every sum of the forward pass is the exact one of slightly other weights. Roundings go either way, so that a sum of n terms is as good
    as weights that are off by the root of n half-eps each, independently; what that does to the contribution is the root of the sum over
    all weights of the squared weight * slope (slopes: the same model in float64). The bound is four such deviations. Cancellation is in
    it: a contribution of nearly zero that is made of large terms has a large bound.
    """
    shape, half_eps = model.shape, eps_of(model.dtype) / 2
    longest = max(shape.d_model, shape.d_mlp, shape.n_heads * shape.d_head, ids.shape[1])
    hf = copy.deepcopy(model.hf).double()
    seen: dict[tuple[int, str], Tensor] = {}
    for layer, block in enumerate(hf.model.layers):
        for kind, module in (("z", block.self_attn.o_proj), ("mlp", block.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _, args, key=(layer, kind): seen.__setitem__(key, args[0][0, -1]))
    with torch.enable_grad():
        for parameter in hf.parameters():
            parameter.requires_grad_(True)
        hf(input_ids=ids, use_cache=False)
        found = []
        for unit in units:
            block = hf.model.layers[unit.layer]
            if isinstance(unit, Head):
                part = slice(unit.index * shape.d_head, (unit.index + 1) * shape.d_head)
                value = v_mid[unit.layer].double() @ (block.self_attn.o_proj.weight[:, part] @ seen[unit.layer, "z"][part])
            else:
                value = seen[unit.layer, "mlp"][unit.index] * (v_post[unit.layer].double() @ block.mlp.down_proj.weight[:, unit.index])
            parameters = list(hf.parameters())
            slopes = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [(slope * p).square().sum() for slope, p in zip(slopes, parameters, strict=True) if slope is not None]
            found.append(4 * half_eps * longest**0.5 * torch.stack(squares).sum().sqrt().item())
    return torch.tensor(found, dtype=torch.float64)
