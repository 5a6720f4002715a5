"""Chat templates of every shape, and tokens that a model has no vector for."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from emosteer.base.errors import DataError, ModelError
from emosteer.models.model import Model
from emosteer.models.tokens import prompt_ids, template_of
from tests.conftest import TEMPLATE, build, tiny_tokenizer

SAID = [{"role": "system", "content": "always anger"}, {"role": "user", "content": "the train"}]


def spoken(template: Any, messages: list[dict[str, str]] = SAID) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.decode(prompt_ids(tokenizer, messages)))


def test_of_several_templates_the_default_is_taken() -> None:
    other = TEMPLATE.replace("assistant", "user")
    assert spoken({"tool_use": other, "default": TEMPLATE}) == spoken(TEMPLATE) != spoken({"default": other})
    assert template_of(tiny_tokenizer()) == TEMPLATE
    with pytest.raises(ModelError, match="expected a chat template called 'default', found tool_use, rag"):
        spoken({"tool_use": TEMPLATE, "rag": TEMPLATE})
    model = build("llama")
    model.tokenizer.chat_template = {"default": TEMPLATE, "tool_use": other}
    assert model.template_sha256 == build("llama").template_sha256


def test_a_system_line_that_the_template_leaves_out_joins_the_first_turn() -> None:
    dropping = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    assert dropping != TEMPLATE
    assert "always anger the train" in spoken(dropping) and "system" not in spoken(dropping)
    assert "system always anger" in spoken(TEMPLATE)
    assert spoken(dropping, SAID[1:]) == spoken(TEMPLATE, SAID[1:])
    echoed = [SAID[0], {"role": "user", "content": "always anger"}]
    assert spoken(dropping, echoed).count("always anger") == 2, "though the user says the same"


def test_an_empty_system_line_is_no_fault_of_a_template_without_one() -> None:
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    assert spoken(refusing, [{"role": "system", "content": " "}, SAID[1]]) == spoken(TEMPLATE, SAID[1:])


def test_a_token_without_a_vector_is_refused_by_name() -> None:
    """As after adding a token without resizing the model."""
    plain = build("llama")
    tokenizer = deepcopy(plain.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["zephyr"])
    model = Model.from_hf(plain.hf, tokenizer, "larger")
    assert model.pad_id < model.shape.d_vocab, "rows are filled with a token that the model has"
    assert model.text_ids("the train") == plain.text_ids("the train")
    for call in (lambda: model.text_ids("the zephyr"), lambda: model.prompt_ids([{"role": "user", "content": "a zephyr"}])):
        with pytest.raises(DataError, match="larger has no embedding for the token 'zephyr'"):
            call()
