"""The proof that transformers' forward pass with a cache and padded rows writes what it writes without either, before it is relied on.

What the cache is called, how it grows and how padding is hidden has changed between versions of transformers; where one of them does not
fit, replies would still look like text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from emosteer.base.errors import ModelError, first_line
from emosteer.generation.lean_forward import agree
from emosteer.models.memory import is_out_of_memory
from emosteer.models.model import Model

#: Tokens of the two rows that are written on: the second is padded on the left.
LENGTHS, STEPS = (7, 4), 3


class Steps(Protocol):
    """What of an engine the proof needs."""

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits [row, d_vocab] after one more token per row; None at first."""


@torch.no_grad()
def require_cached(model: Model, engine_of: Callable[[Sequence[Sequence[int]]], Steps]) -> None:
    """Proves the hooked engine on a model, once: every step's logits against the whole row computed anew, alone, without a cache.

    Args:
        engine_of: prompts -> the engine that would write them, with nothing injected.

    Raises:
        ModelError: if they differ by more than rounding.
    """
    if model.__dict__.get("_cache_is_proved"):
        return
    try:
        step = _first_difference(model, engine_of)
    except (TypeError, ValueError, RuntimeError) as error:  # of arguments or shapes that another version expects
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{_versions(model)} cannot write with its cache: {first_line(error)}; try another version") from error
    if step is not None:
        raise ModelError(
            f"{_versions(model)} writes other tokens with its cache than without (step {step + 1} of {STEPS}); try another version"
        )
    model.__dict__["_cache_is_proved"] = True


def _versions(model: Model) -> str:
    import transformers

    return f"transformers {transformers.__version__} on {model.name}"


def _first_difference(model: Model, engine_of: Callable[[Sequence[Sequence[int]]], Steps]) -> int | None:
    """The first step whose logits differ; None if none does."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(model.shape.d_vocab, (length + STEPS,), generator=draw).to(model.device) for length in LENGTHS]
    places = list(zip(rows, LENGTHS, strict=True))
    engine = engine_of([row[:length].tolist() for row, length in places])
    for step in range(STEPS):
        found = engine.step(None if step == 0 else torch.stack([row[length + step - 1] for row, length in places]))
        expected = torch.stack([_alone(model, row[: length + step]) for row, length in places])
        if model.quantised:  # 8-bit maps round activations, too
            found, expected = found.bfloat16(), expected.bfloat16()
        if not agree(found, expected):
            return step
    return None


def _alone(model: Model, row: Tensor) -> Tensor:
    """Logits [d_vocab] behind a row, computed at once."""
    logits: Tensor = model.logits(model.run(row[None], bridge=False)[0, -1])
    return logits
