"""In which precision gradients are taken: measured, because processors differ by more than an order of magnitude in it.

A copy in bfloat16 takes half the time of float32 where the processor has units for it, and several times as long where it has none.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

from emosteer.base.progress import note
from emosteer.models.devices import slow_in_bfloat16
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site

#: Tokens of the trial, repeats of it (the fastest counts: what else happens only slows), and the seconds below which no copy is worth
#: making, nor a trial of one.
TOKENS, REPEATS, QUICK = 128, 3, 0.05
#: Where the first step takes so many times as long as one in the other precision, which is more than making room can be, it has lost.
LOST = 4


def chosen_dtype(model: Model, wanted: str, say: Callable[[str], None] = note) -> str:
    """The precision to take gradients in, by name: as wanted, or for "auto" the faster one, found by one short step in each where the
    processor has units for bfloat16.

    Args:
        say: told what was found.

    Returns:
        "auto" never; for a model that is not read in float32, or that no copy can be made of (spread, quantised), its own.
    """
    if wanted != "auto":
        return wanted
    if model.dtype != torch.float32 or model.spread or model.quantised:
        return str(model.dtype).removeprefix("torch.")
    if slow_in_bfloat16(model.device):  # to try it would take minutes
        return "float32"
    exact = step_seconds(model)
    if exact < QUICK:
        return "float32"
    rough = step_seconds(reader(model, "bfloat16"), exact)
    faster = "bfloat16" if rough < exact else "float32"
    say(f"gradients in {faster}: a step of {TOKENS} tokens takes {exact:.2f} s in float32, {rough:.2f} s in bfloat16")
    return faster


def reader(model: Model, dtype: str) -> Model:
    """The model to take gradients through: a copy in lower precision where the model is in float32 and one is wanted."""
    dtype = chosen_dtype(model, dtype)
    if model.dtype != torch.float32 or dtype == "float32" or model.quantised:
        return model
    if model.spread:  # a copy would run the original's layers
        return model
    return Model(copy.deepcopy(model.hf).to(getattr(torch, dtype)), model.tokenizer, model.name, model.sha256)


def step_seconds(model: Model, against: float = float("inf")) -> float:
    """How long one forward and backward pass of a short sequence takes, from the first layer's vectors to the logits and back.

    On a CPU the time that the process computes, all threads together, so that other work on the machine does not decide; else the time
    that passes.

    Args:
        against: seconds to be faster than; a first step of `LOST` times that is not repeated.
    """
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    ids = torch.arange(min(TOKENS, model.shape.context), device=model.device).remainder(model.shape.d_vocab)[None]

    def step() -> float:
        begin = clock()
        free = torch.zeros(model.shape.d_model, device=model.device, requires_grad=True)

        def edit(activation: Tensor) -> Tensor:
            return activation + free.to(activation.dtype)

        model.logits(model.run(ids, {Site(0, ATTN_OUT): edit}, bridge=False)).float().logsumexp(-1).mean().backward()
        assert free.grad is not None
        free.grad.sum().item()  # waits for a GPU
        return clock() - begin

    first = step()  # it also makes room and chooses kernels
    if first > LOST * against:
        return first
    return min(step() for _ in range(REPEATS))
