"""A steering plan on the plain Hugging Face model, whoever calls it: `with steered(model, plan): model.hf.generate(**inputs)`.

It acts where `generate` acts: at the last position of the prompt and at every token after it. That asks for a KV cache (one pass over
the prompt, then one token per pass) and for prompts padded on the left; a pass that is neither is refused, since it would be steered at
the wrong positions without a word.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from emosteer.base.errors import UsageError
from emosteer.generation.steering import SteeringPlan
from emosteer.models.hooks import Edit
from emosteer.models.model import Model

#: Models inside a block of `steered`.
_STEERED: weakref.WeakSet[Model] = weakref.WeakSet()


@contextlib.contextmanager
def steered(model: Model, plan: SteeringPlan) -> Iterator[None]:
    """Steers the plain model for the length of the block; whatever happens inside, nothing is left when it ends.

    A plan of one row steers every row of a batch; one of several rows asks for as many prompts (each may be written several times:
    beams, `num_return_sequences`).

    Raises:
        UsageError: for a block inside another, and, from within, for a pass that cannot be steered as `generate` steers.
    """
    refuse_steered(model)
    plan = plan.to(model.device, model.dtype)
    guard = model.body.register_forward_pre_hook(_guard(plan), with_kwargs=True)
    _STEERED.add(model)
    try:
        with model.hooks({site: _edit(value, plan) for site, value in plan.vectors.items()}, bridge=False):
            yield
    finally:
        _STEERED.discard(model)
        guard.remove()


def refuse_steered(model: Model) -> None:
    """Refuses whatever would be measured or written under the steering of somebody's block as well as its own.

    Raises:
        UsageError: inside a block of `steered`.
    """
    if model in _STEERED:
        raise UsageError(
            f"{model.name} is being steered by a `with ...steering(...)` block, which cannot hold another one, nor generate or measure; "
            "end the block first, or call m.hf inside it"
        )


def _edit(value: Tensor, plan: SteeringPlan) -> Edit:
    """value: [row, d_model], added to rows of the plan."""

    def add(activation: Tensor) -> Tensor:
        rows = value.repeat_interleave(len(activation) // plan.n_rows, 0)[:, None]
        if activation.shape[1] == 1 or plan.positions == "all":
            return activation + rows
        shifted = activation.clone()
        shifted[:, -1:] += rows
        return shifted

    return add


def _guard(plan: SteeringPlan) -> Any:
    """A forward pre-hook that refuses passes whose positions are not those of a prompt or of one new token."""

    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        tokens = next(part for part in given if part is not None)
        n_rows, n_new = tokens.shape[:2]
        if n_rows % plan.n_rows:
            raise UsageError(f"the block steers {plan.n_rows} rows, each its own way; expected a batch of as many prompts, found {n_rows}")
        if plan.positions == "all":
            return
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # transformers renamed it in 5.24
        n_past = 0 if cache is None else int(cache.get_seq_length())
        if cache is None and not _caches(module, kwargs):
            raise UsageError("steering the reply alone needs the KV cache, which tells prompt and reply apart; leave out use_cache=False")
        mask = kwargs.get("attention_mask")
        padded = ~mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else tokens.new_zeros(n_rows, 1).bool()
        if (n_past and n_new > 1) or padded.all(-1).any():  # a row of nothing but padding is the first chunk of a shorter prompt
            raise UsageError(
                f"expected one new token per pass after the prompt, found {n_new}: prompts in chunks, prompts that go on from a cache and "
                "assisted decoding cannot be steered at the reply alone"
            )
        if not n_past and padded[:, -1].any():
            raise UsageError("expected prompts padded on the left, found padding at the end; set tokenizer.padding_side = 'left'")

    return check


def _caches(body: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a pass without a cache makes one."""
    asked = kwargs.get("use_cache")
    return bool(getattr(body.config, "use_cache", True) if asked is None else asked)
