"""Weights held in few bits: how they are asked for, how they are called, and what a linear map of them multiplies by.

What is stored in such a map means nothing without the code that unpacks it, and every scheme stores it in another way. So nothing is read
from it: the map itself is asked, by the vectors of the identity (`dense_weight`). Whether that is what it does to activations is proved at
load, layer by layer.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import UsageError

#: What plain weights can be loaded in, beside the precisions of torch; by bitsandbytes, which transformers calls.
QUANTISED = ("int8", "nf4")
#: Bytes of unpacked weights that are kept: all output weights of a model of about a billion parameters.
ROOM = 2**30
#: Largest relative error of a gradient that passes back through packed weights.
QUANTISED_GRADIENT = 0.1
#: Vectors of the identity that a linear map is asked at a time.
ROWS = 2048


def loading_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told so that linear maps are held in few bits.

    Args:
        name: one of `QUANTISED`; dtype: of the computation.

    Raises:
        UsageError: if the package that does it is not installed.
    """
    missing = [package for package in ("bitsandbytes", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"--dtype {name} needs the package {missing[0]}, which is not installed; run `pip install 'emosteer[quantised]'`")
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four}


@torch.no_grad()
def dense_weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """What a linear map multiplies by, asked of the map itself. Shape [out, in].

    Args:
        linear: a module with `in_features`, a weight of whatever form, and a bias or none; dtype: of its inputs.
    """
    n, bias = linear.in_features, getattr(linear, "bias", None)
    parts, device = [], linear.weight.device
    for start in range(0, n, ROWS):
        asked = linear(torch.eye(min(ROWS, n - start), n, dtype=dtype, device=device).roll(start, 1))
        parts.append(asked if bias is None else asked - bias)
    return torch.cat(parts).to(dtype).T


class Unpacked:
    """What linear maps multiply by, kept as far as there is room: every prompt of an attribution asks for all layers."""

    def __init__(self, room: int = ROOM) -> None:
        """room: bytes."""
        self.room = room
        self._kept: dict[Any, Tensor] = {}

    def get(self, linear: Any, dtype: torch.dtype) -> Tensor:
        """As `dense_weight`."""
        if linear in self._kept:
            return self._kept[linear]
        weight = dense_weight(linear, dtype)
        if weight.nbytes <= self.room:
            self.room -= weight.nbytes
            self._kept[linear] = weight
        return weight


def keep_differentiable(model: Any) -> None:
    """Keeps 4-bit maps from laying out their weights for inference, a form through which no gradient passes; on some processors they do so
    at the first pass, for good."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def gradient_error(linear: Any, weight: Tensor, dtype: torch.dtype) -> float:
    """How far the gradient that a linear map passes back is from its weight's, relative to the largest entry; infinite where none passes.

    Args:
        weight: what it multiplies by [out, in]; dtype: of its inputs.
    """
    with torch.enable_grad():
        asked = torch.zeros(1, linear.in_features, dtype=dtype, device=weight.device, requires_grad=True)
        signs = torch.ones(len(weight), dtype=dtype, device=weight.device)
        signs[::2] = -1
        written = linear(asked)
        if not written.requires_grad:
            return float("inf")
        (found,) = torch.autograd.grad((written * signs).sum(), [asked], allow_unused=True)
    if found is None:
        return float("inf")
    expected = signs @ weight.to(dtype)
    return float((found[0] - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def silence() -> None:
    """Keeps bitsandbytes from logging one line per product about precisions, which it converts as it should."""
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
