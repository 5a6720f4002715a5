"""The zero-shot judge on a tiny random model, against plain forward passes of one text at a time."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emosteer.base.errors import ModelError, UsageError
from emosteer.judges import language_model
from emosteer.judges.huggingface import refuse_same_weights
from emosteer.judges.language_model import _ASK, BATCH, EMPTY, LONGEST, LanguageModelJudge
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.models.model import Model
from tests.conftest import SIZES, TEMPLATE, WORDS, build

TEXTS = ["we cry alone", "please stop", "", "the boss came back and we laugh and sing again", "nine weeks !", "what ? no { } {text}"]


@pytest.fixture(scope="module")
def judge() -> LanguageModelJudge:
    return LanguageModelJudge.of(build("llama"))


@torch.no_grad()
def logits_by_hand(judge: LanguageModelJudge, text: str) -> Tensor:
    """Of the labels' tokens after one text alone, unpadded, through the model's own forward. In double precision."""
    model = judge.model
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": _ASK.format(text=text)}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    row = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return row[[model.tokenizer.get_vocab().get(label, 0) for label in LABELS]]


def by_hand(judge: LanguageModelJudge, text: str) -> Tensor:
    empty = torch.stack([logits_by_hand(judge, nothing).log_softmax(-1) for nothing in EMPTY]).mean(0)
    return (logits_by_hand(judge, text).log_softmax(-1) - empty).softmax(-1)


def test_probabilities_are_those_of_plain_passes_less_what_empty_texts_give(judge: LanguageModelJudge) -> None:
    texts = [*TEXTS, *(f"{word} {other}" for word in WORDS[:5] for other in WORDS[20:25])]
    assert len(texts) > BATCH, "more than one batch"
    told = dict[int, Opinion]()
    opinions = judge.opinions(texts, told.__setitem__)
    for index, (text, opinion) in enumerate(zip(texts, opinions, strict=True)):
        assert opinion.probabilities is not None and tuple(opinion.probabilities) == LABELS and told[index] is opinion
        assert list(opinion.probabilities.values()) == pytest.approx(by_hand(judge, text).tolist(), abs=1e-4)
    assert len(told) == len(texts) and len({opinion.emotion() for opinion in opinions}) > 1 and judge.opinions([]) == []


def test_a_text_is_read_up_to_so_many_words(judge: LanguageModelJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    long = " ".join(["cry"] * LONGEST)
    monkeypatch.setattr(language_model, "LONGEST", 5)
    first, cut = judge.opinions(["cry cry\n cry   cry cry", long])
    assert first == cut != judge.opinions(["cry cry"])[0]


def test_a_label_that_is_always_preferred_is_calibrated_away() -> None:
    """An unembedding that likes one label whatever it reads: without the calibration nothing else would be said."""
    plain = LanguageModelJudge.of(build("llama"))
    biased = build("llama")
    token = biased.tokenizer.get_vocab()["disgust"]
    biased.hf.lm_head = torch.nn.Linear(32, SIZES["vocab_size"], bias=True)
    with torch.no_grad():
        biased.hf.lm_head.weight.copy_(plain.model.hf.lm_head.weight)
        biased.hf.lm_head.bias.zero_()
        biased.hf.lm_head.bias[token] = 25.0
    leaning = LanguageModelJudge(biased, plain.tokens)
    raw = leaning._log_shares(TEXTS)
    assert (raw.argmax(-1) == LABELS.index("disgust")).all() and raw.exp()[:, LABELS.index("disgust")].min() > 0.99
    for mended, usual in zip(leaning.opinions(TEXTS), plain.opinions(TEXTS), strict=True):
        assert mended.probabilities == pytest.approx(usual.probabilities, abs=1e-4)


def starts_alike() -> Model:
    """A model that spells words by letters, as it were: surprise and sadness both begin with "s"."""
    special = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *letters])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    return Model.from_hf(LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 32})), tokenizer, "letters")


def test_labels_that_start_alike_are_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer of letters does not tell the labels anger, .*neutral apart by their first token"):
        LanguageModelJudge.of(starts_alike())


def test_it_may_not_judge_the_model_that_is_steered(judge: LanguageModelJudge) -> None:
    assert judge.name == "lm:tiny-llama" and judge.weights == {judge.model.sha256}
    with pytest.raises(UsageError, match="judge lm:tiny-llama has the weights of the steered model itself"):
        refuse_same_weights([object(), judge], judge.model.sha256)
    refuse_same_weights([judge], "another")


def test_the_key_follows_model_and_question(judge: LanguageModelJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    key = judge.key
    assert LanguageModelJudge.of(build("llama")).key == key != LanguageModelJudge.of(build("qwen2")).key
    monkeypatch.setattr(language_model, "QUESTION", 99)
    assert judge.key != key
