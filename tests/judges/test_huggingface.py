"""The Hugging Face judge on tiny random classifiers built here, against logits taken one text at a time."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from emosteer.base.errors import ModelError, UsageError
from emosteer.judges import huggingface as hf_judge
from emosteer.judges.huggingface import SYNONYMS, HfJudge, Mapped, our_label, refuse_same_weights
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.models.weights.resolve import resolve
from emosteer.scenarios.scenarios import EMOTIONS
from tests.conftest import SIZES, WORDS, build, tiny_tokenizer

EKMAN = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
GO_EMOTIONS = {
    "admiration": "happiness", "amusement": "happiness", "anger": "anger", "annoyance": "anger", "approval": None, "caring": None,
    "confusion": "surprise", "curiosity": None, "desire": None, "disappointment": "sadness", "disapproval": "anger", "disgust": "disgust",
    "embarrassment": "sadness", "excitement": "happiness", "fear": "fear", "gratitude": "happiness", "grief": "sadness",
    "joy": "happiness", "love": "happiness", "nervousness": "fear", "optimism": "happiness", "pride": "happiness", "realization": None,
    "relief": "happiness", "remorse": "sadness", "sadness": "sadness", "surprise": "surprise", "neutral": "neutral",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(hf_judge, "note", found.append)
    return found


def classifier(folder: Path, labels: Sequence[str], *, several: bool = False, llama: bool = False, seed: int = 0) -> Any:
    """Writes a random classifier to a folder; returns the model."""
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}, "num_labels": len(labels)}
    names |= {"problem_type": "multi_label_classification" if several else None}
    small = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    if llama:
        model: Any = LlamaForSequenceClassification(LlamaConfig(**SIZES, **names))
    else:
        bert = BertConfig(**small, num_hidden_layers=2, max_position_embeddings=40, initializer_range=0.5, pad_token_id=2, **names)
        model = BertForSequenceClassification(bert)
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def random_texts(count: int, longest: int = 12) -> list[str]:
    draw = random.Random(3)
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, longest))) for _ in range(count)]


def logits_of(model: Any, text: str, limit: int = 38) -> list[float]:
    """One text alone, no padding."""
    ids = tiny_tokenizer()(text)["input_ids"][:limit]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].tolist()


def softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


# ---- opinions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("llama", [False, True])
def test_one_label_per_text_is_a_softmax_renamed(tmp_path: Path, llama: bool) -> None:
    model = classifier(tmp_path / "c", EKMAN, llama=llama)
    texts = random_texts(70)
    heard: dict[int, Opinion] = {}
    found = HfJudge.load(str(tmp_path / "c"), "cpu").opinions(texts, lambda index, opinion: heard.update({index: opinion}))
    assert heard == dict(enumerate(found))
    for text, opinion in zip(texts, found, strict=True):
        shares = dict(zip(EKMAN, softmax(logits_of(model, text)), strict=True))
        shares["happiness"] = shares.pop("joy")
        assert opinion.probabilities == pytest.approx(shares, abs=1e-4) and list(opinion.probabilities) == list(LABELS)
    assert len({opinion.emotion() for opinion in found}) > 2


def test_labels_of_one_emotion_are_added_up_and_foreign_ones_left_out(tmp_path: Path, notes: list[str]) -> None:
    labels = ("Joy", "annoyance", "amusement", "anger", "nervousness", "caring", "grief", "LABEL_7")
    model = classifier(tmp_path / "c", labels)
    found = HfJudge.load(str(tmp_path / "c"), "cpu").opinions(random_texts(20))
    for text, opinion in zip(random_texts(20), found, strict=True):
        shares = dict(zip(labels, softmax(logits_of(model, text)), strict=True))
        kept = 1 - shares["caring"] - shares["LABEL_7"]
        wanted = {
            "happiness": (shares["Joy"] + shares["amusement"]) / kept,
            "anger": (shares["annoyance"] + shares["anger"]) / kept,
            "fear": shares["nervousness"] / kept,
            "sadness": shares["grief"] / kept,
        }
        assert opinion.probabilities == pytest.approx({**dict.fromkeys(LABELS, 0.0), **wanted}, abs=1e-4)
    assert notes[0].endswith("labels that are none of ours are ignored: caring, LABEL_7")
    assert notes[1].endswith("has no label for surprise, disgust, neutral: always 0")


@pytest.mark.parametrize("neutral", [True, False])
def test_several_labels_per_text_are_sigmoids(tmp_path: Path, notes: list[str], neutral: bool) -> None:
    labels = ["joy", "love", "anger", "fear", "sadness", "surprise", "disgust", *(["neutral"] if neutral else [])]
    model = classifier(tmp_path / "c", labels, several=True)
    judge = HfJudge.load(str(tmp_path / "c"), "cpu")
    assert judge.notes == () and notes == []
    for text, opinion in zip(random_texts(20), judge.opinions(random_texts(20)), strict=True):
        present = {label: 1 / (1 + math.exp(-value)) for label, value in zip(labels, logits_of(model, text), strict=True)}
        wanted = {emotion: present[emotion] for emotion in ("anger", "fear", "sadness", "surprise", "disgust")}
        wanted["happiness"] = max(present["joy"], present["love"])
        wanted["neutral"] = present["neutral"] if neutral else math.prod(1 - share for share in wanted.values())
        total = sum(wanted.values())
        assert opinion.probabilities == pytest.approx({label: share / total for label, share in wanted.items()}, abs=1e-4)


def test_long_and_empty_texts(tmp_path: Path) -> None:
    model = classifier(tmp_path / "c", EKMAN)
    long = " ".join(WORDS * 4)
    found = HfJudge.load(str(tmp_path / "c"), "cpu").opinions([long, "", "cry"])
    best = softmax(logits_of(model, long))
    assert found[0].probabilities is not None and found[0].probabilities["anger"] == pytest.approx(best[0], abs=1e-4)
    assert all(opinion.probabilities is not None for opinion in found)


def test_extreme_and_broken_logits() -> None:
    labels = list(EKMAN)
    for several in (False, True):
        mapped = Mapped.of(labels, several, "x")
        extreme = mapped.shares(torch.tensor([[-900.0] * 7, [900.0] + [-900.0] * 6]))
        torch.testing.assert_close(extreme.sum(1), torch.ones(2, dtype=torch.float64))
        assert extreme[1, LABELS.index("anger")] > 0.99
    # what the model gives to labels that are none of ours must not drown the rest
    mapped = Mapped.of([*labels, "curiosity"], False, "x")
    shares = mapped.shares(torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 900]]))
    assert shares[0, LABELS.index("happiness")].item() == pytest.approx(math.exp(3) / (math.exp(3) + 6))


def test_a_classifier_without_numbers_is_missing_not_wrong(tmp_path: Path) -> None:
    model = classifier(tmp_path / "c", EKMAN)
    with torch.no_grad():
        model.classifier.bias.fill_(math.nan)
    model.save_pretrained(tmp_path / "c")
    [found] = HfJudge.load(str(tmp_path / "c"), "cpu").opinions(["cry"])
    assert found.probabilities is None and "gave no numbers" in found.problem


# ---- names ---------------------------------------------------------------------------------------------------------


def test_labels_of_known_datasets() -> None:
    assert {label: our_label(label) for label in GO_EMOTIONS} == GO_EMOTIONS
    others = {
        "Happy": "happiness", "no_emotion": "neutral", "SADNESS 😥": "sadness", "worry": "fear", "anger/annoyance": "anger",
        "optimism": "happiness", "anger/joy": None, "joy & love": "happiness", "trust": None, "anticipation": None, "LABEL_3": None,
        "": None, "fear or panic": "fear",
    }  # fmt: skip
    assert {label: our_label(label) for label in others} == others
    assert set(SYNONYMS) == set(LABELS)
    names = [name for some in SYNONYMS.values() for name in some]
    assert len(set(names)) == len(names) and all(our_label(name) for name in names)


def test_too_few_emotions_are_listed() -> None:
    with pytest.raises(ModelError, match=r"at least 4 of .*, found 0 in org/x \(LABEL_0, LABEL_1\); choose an emotion classifier"):
        Mapped.of(["LABEL_0", "LABEL_1"], False, "org/x")
    with pytest.raises(ModelError, match="found 3 in x"):
        Mapped.of(["joy", "anger", "fear", "neutral", "calm"], False, "x")
    found = Mapped.of(["joy", "anger", "fear", "sadness"], False, "x")
    assert found.notes == ("x has no label for surprise, disgust, neutral: always 0",)


# ---- trust ---------------------------------------------------------------------------------------------------------


def test_the_key_follows_weights_labels_and_tokenizer_and_not_the_place(tmp_path: Path) -> None:
    key: Callable[[str], str] = lambda name: HfJudge.load(str(tmp_path / name), "cpu").key  # noqa: E731
    classifier(tmp_path / "a", EKMAN)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert key("a") == key("b")
    classifier(tmp_path / "c", EKMAN, seed=1)
    config = json.loads((tmp_path / "b/config.json").read_text())
    config["id2label"] |= {"0": "fear", "2": "anger"}
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    (tmp_path / "d/tokenizer.json").write_text((tmp_path / "d/tokenizer.json").read_text().replace('"slam"', '"spam"'))
    assert len({key(name) for name in "abcd"}) == 4


def test_pickles_are_refused(tmp_path: Path) -> None:
    classifier(tmp_path / "c", EKMAN)
    (tmp_path / "c/model.safetensors").rename(tmp_path / "c/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model.bin; emosteer reads only safetensors"):
        HfJudge.load(str(tmp_path / "c"), "cpu")


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    """transformers would give it a random head, and the random head opinions."""
    model = build("llama")
    model.hf.config.id2label = dict(enumerate(EKMAN))
    model.hf.save_pretrained(tmp_path / "c")
    model.tokenizer.save_pretrained(tmp_path / "c")
    with pytest.raises(ModelError, match="c is no text-classification model: its weights lack score.weight"):
        HfJudge.load(str(tmp_path / "c"), "cpu")


def test_damaged_and_missing_models_are_one_line(tmp_path: Path) -> None:
    classifier(tmp_path / "c", EKMAN)
    (tmp_path / "c/model.safetensors").write_bytes(b"\x08\x00\x00\x00")
    with pytest.raises(ModelError, match="cannot load c as a text classifier"):
        HfJudge.load(str(tmp_path / "c"), "cpu")
    with pytest.raises(ModelError, match=r"found 'smollm2-135m'; is it \./smollm2-135m\?"):
        HfJudge.load("smollm2-135m", "cpu")
    with pytest.raises(UsageError, match="unknown device"):
        HfJudge.load(str(tmp_path / "c"), "tpu9")


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        raise hub.LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(ModelError, match="org/classifier is not complete in the local hub cache and the hub cannot be reached; go online"):
        HfJudge.load("org/classifier", "cpu")


def test_a_hub_id_with_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier(tmp_path / "c", EKMAN)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: str(tmp_path / "c"))
    judge = HfJudge.load("org/classifier", "cpu")
    assert judge.name == "hf:org/classifier" and judge.opinions(["cry"])[0].emotion() in LABELS


def test_a_judge_with_the_steered_models_weights_is_refused(tmp_path: Path) -> None:
    classifier(tmp_path / "a", EKMAN)
    classifier(tmp_path / "b", EKMAN, seed=1)
    judge = HfJudge.load(str(tmp_path / "a"), "cpu")
    refuse_same_weights([judge], resolve(str(tmp_path / "b")).sha256)
    refuse_same_weights([object()], resolve(str(tmp_path / "a")).sha256)
    with pytest.raises(UsageError, match="judge hf:a has the weights of the steered model itself"):
        refuse_same_weights([judge], resolve(str(tmp_path / "a")).sha256)


def test_all_six_can_be_said(tmp_path: Path) -> None:
    """A bias per label in turn: the emotion that is judged is the one the bias stands for."""
    labels = ("joy", "worry", "annoyance", "grief", "shock", "contempt", "no emotion")
    wanted = ("happiness", "fear", "anger", "sadness", "surprise", "disgust", "neutral")
    model = classifier(tmp_path / "c", labels)
    for column, emotion in enumerate(wanted):
        with torch.no_grad():
            model.classifier.bias.copy_(torch.eye(7)[column] * 100)
        model.save_pretrained(tmp_path / "c")
        [found] = HfJudge.load(str(tmp_path / "c"), "cpu").opinions(["the desk"])
        assert found.emotion() == emotion
    assert set(wanted) == set(LABELS) and set(EMOTIONS) < set(wanted)
