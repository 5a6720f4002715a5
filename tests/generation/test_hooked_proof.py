"""The hooked engine is proved before it writes, and one that lies is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emosteer.base.errors import ModelError
from emosteer.generation import hooked_proof
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.joining_engines import joining_engine
from emosteer.generation.steering import SteeringPlan
from emosteer.models.model import Model
from tests.conftest import build

ONCE = Decoding(max_new_tokens=4, guidance=1.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_true_models_pass_and_are_proved_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build(family), list[int]()
    monkeypatch.setattr("emosteer.generation.engines.lean_of", lambda model: None)  # the hooked engine writes every family

    def counted(*arguments: Any) -> int | None:
        made.append(1)
        return proved(*arguments)

    proved = hooked_proof._first_difference
    monkeypatch.setattr(hooked_proof, "_first_difference", counted)
    first, second = (generate(model, [Request("a", (1, 7, 9))], decoding=ONCE)[0].ids for _ in range(2))
    assert first == second and made == [1]


def lying(kind: str) -> Model:
    """A model of which one thing is wrong as soon as there is a cache."""
    model = build("gemma3")  # the hooked engine writes it
    forward = model.body.forward

    def wrong(*args: Any, attention_mask: Any = None, position_ids: Any = None, cache: Any = None, **rest: Any) -> Any:
        if cache is not None and kind == "padding":
            attention_mask = torch.ones_like(attention_mask)
        if cache is not None and kind == "positions" and position_ids.shape[1] == 1:
            position_ids = position_ids * 0
        if cache is not None and kind == "name":
            raise TypeError("forward() got an unexpected keyword argument 'cache'")
        return forward(*args, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **rest)

    model.body.forward = wrong
    return model


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("padding", "on tiny-gemma3 writes other tokens with its cache than without .step 1 of 3.; try another version"),
        ("positions", "on tiny-gemma3 writes other tokens with its cache than without .step 2 of 3.; try another version"),
        ("name", "on tiny-gemma3 cannot write with its cache: .* unexpected keyword argument 'cache'; try another version"),
    ],
)
def test_a_forward_pass_that_lies_is_refused_before_anything_is_written(kind: str, said: str) -> None:
    with pytest.raises(ModelError, match=f"transformers [0-9.]+ {said}"):
        generate(lying(kind), [Request("a", (1, 7, 9))], decoding=ONCE)


def test_a_running_batch_is_proved_as_well() -> None:
    with pytest.raises(ModelError, match="writes other tokens with its cache than without"):
        joining_engine(lying("padding"), []).join([(1, 7, 9)], SteeringPlan.none(1))
