"""The embedded judge: its features, its heads, its file, the texts that it is fitted on, and the judge that is shipped."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError, DataError
from emosteer.base.files import sha256_file
from emosteer.judges import training as judge_training
from emosteer.judges.embedded import (
    ASSET,
    ENCODER,
    KIND,
    MAX_TOKENS,
    EmbeddedJudge,
    LinearHead,
    SentenceEncoder,
    fit_head,
    load_heads,
    save_heads,
)
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.judges.soundness import FAULTS, SOUND
from emosteer.judges.training import FILES, FOREIGN, HELD_OUT, Example, measure_emotions, read_examples, train
from emosteer.scenarios.scenarios import data_path, read_bank
from tests.helpers.judge_setup import FILLERS, TELLING, card_of, real_encoder, tiny_encoder
from tests.helpers.precision import eps_of, product_bound

PROVENANCE = Provenance(ENCODER, "", "", "by a test")


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return tiny_encoder()


def sentences(count: int, low: int = 1, high: int = 12, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice([*FILLERS, *TELLING.values()]) for _ in range(draw.randint(low, high))) for _ in range(count)]


# ---- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_by_hand(encoder: SentenceEncoder, text: str) -> Tensor:
    """One text alone, nothing padded: mean and spread of every layer."""
    ids = torch.tensor([[encoder.tokenizer.get_vocab().get(word, 1) for word in text.split()[:MAX_TOKENS]]])
    layers = [layer[0].double() for layer in encoder.model(input_ids=ids, output_hidden_states=True).hidden_states]
    parts = [layer.mean(0) for layer in layers] + [layer.std(0, correction=0) for layer in layers]
    return torch.cat([part / part.norm().clamp_min(1e-12) for part in parts])


def test_features_are_the_statistics_of_each_text_alone(encoder: SentenceEncoder) -> None:
    """Whatever stands beside a text in the batch, shorter or longer, and in whatever order."""
    texts = [*sentences(70, high=30), " ".join(["cry"] * 3 + ["we"] * (MAX_TOKENS + 20))]  # more than one batch; one is cut
    found = encoder.features(texts)
    wanted = torch.stack([features_by_hand(encoder, text) for text in texts])
    assert found.shape == (71, 2 * 3 * 16) and wanted.std(0).mean() > 0.05, "texts differ"
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=0)
    for some in ([texts[3]], [texts[3], texts[-1]], [texts[-1], texts[5], texts[3]]):
        torch.testing.assert_close(encoder.features(some)[some.index(texts[3])], found[3], atol=2e-5, rtol=0)


def test_embeddings_are_unit_means_of_the_last_layer(encoder: SentenceEncoder) -> None:
    texts = sentences(5)
    found = encoder(texts)
    for row, text in zip(found, texts, strict=True):
        last = features_by_hand(encoder, text)[2 * 16 : 3 * 16]  # already of unit length
        torch.testing.assert_close(row.double(), last, atol=2e-5, rtol=0)


def test_empty_texts_and_no_texts(encoder: SentenceEncoder) -> None:
    found = encoder.features(["", "  ", ".", "cry"])
    for row, alike in enumerate((True, True, True, False)):
        # unit vectors, whose rows of a batch may be summed in different orders; the bound is that of features beside others, above
        assert (bool((found[row] - found[2]).abs().max() <= 2e-5)) is alike
    assert encoder.features([]).shape == (0, 0)


# ---- heads -----------------------------------------------------------------------------------------------------------


def clouds(spread: float, per_class: int = 20) -> tuple[Tensor, Tensor]:
    """Points around three centres."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(8, 3, generator=draw))[0].T
    answers = torch.arange(3).repeat(per_class)
    return normalize(centres[answers] + spread * torch.randn(len(answers), 8, generator=draw), dim=-1), answers


def test_a_head_separates_what_is_separable() -> None:
    x, answers = clouds(0.1)
    head = fit_head(x[:30], answers[:30], "abc")
    assert head.labels == ("a", "b", "c") and head.weight.shape == (3, 8)
    found = head.probabilities(x)
    assert torch.equal(found.argmax(-1), answers), "the half that it has not seen, too"
    torch.testing.assert_close(found.sum(-1), torch.ones(60))
    noise = fit_head(x[:30], answers[:30][torch.randperm(30, generator=torch.Generator().manual_seed(1))], "abc")
    assert (noise.probabilities(x[30:]).argmax(-1) == answers[30:]).float().mean() < 0.7


def test_two_fits_agree_bit_for_bit() -> None:
    x, answers = clouds(0.6)
    first = fit_head(x, answers, "abc")
    with torch.no_grad():
        again = fit_head(x.clone(), answers.clone(), "abc")
    for part in ("mean", "scale", "weight", "bias"):
        assert torch.equal(getattr(first, part), getattr(again, part)) and not getattr(first, part).requires_grad


def test_a_head_is_the_minimum_of_the_ridge_loss() -> None:
    """Its gradient vanishes up to the rounding to half precision; for another ridge it does not."""
    x, answers = clouds(0.8)

    def slope(ridge: float) -> float:
        head = fit_head(x, answers, "abc", ridge=1e-3)
        standard = (x - x.mean(0)) / ((x.std(0) + 1e-4) * 8**0.5)
        weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
        loss = cross_entropy(standard @ weight.T + bias, answers) + ridge * weight.square().sum()
        return max(float(part.abs().max()) for part in torch.autograd.grad(loss, [weight, bias]))

    assert slope(1e-3) < 1e-4 < 1e-3 < slope(3e-3)


def test_a_feature_that_never_changes_does_no_harm() -> None:
    x, answers = clouds(0.1)
    head = fit_head(torch.cat([x, torch.full((60, 1), 0.3)], 1), answers, "abc")
    assert torch.equal(head.probabilities(torch.cat([x, torch.full((60, 1), 0.3)], 1)).argmax(-1), answers)


# ---- the file --------------------------------------------------------------------------------------------------------


def heads(seed: int = 0, width: int = 6 * 16) -> dict[str, LinearHead]:
    draw = torch.Generator().manual_seed(seed)

    def make(labels: tuple[str, ...]) -> LinearHead:
        weight = torch.randn(len(labels), width, generator=draw).half().float()
        bias = torch.randn(len(labels), generator=draw).half().float()
        return LinearHead(labels, 0.1 * torch.randn(width, generator=draw), torch.rand(width, generator=draw) + 0.5, weight, bias)

    return {"emotion": make(LABELS), "soundness": make((SOUND, *FAULTS))}


def test_heads_come_back_as_they_were_saved(tmp_path: Path) -> None:
    path, made = tmp_path / "judge.safetensors", heads()
    save_heads(path, made, {"fitted_on": 3, "deep": {"x": [1.5]}}, PROVENANCE)
    back = load_heads(path)
    assert list(back) == list(made)
    for name, head in made.items():
        assert back[name].labels == head.labels
        for part in ("mean", "scale", "weight", "bias"):
            assert torch.equal(getattr(back[name], part), getattr(head, part)), (name, part)
    assert card_of(path) == {"fitted_on": 3, "deep": {"x": [1.5]}}
    again = tmp_path / "again.safetensors"
    save_heads(again, made, {"fitted_on": 3, "deep": {"x": [1.5]}}, PROVENANCE)
    assert sha256_file(again) == sha256_file(path), "the same heads, the same bytes"


def test_a_fitted_head_loses_nothing_by_being_saved(tmp_path: Path) -> None:
    x, answers = clouds(0.6)
    head = fit_head(x, answers, "abc")
    save_heads(tmp_path / "j.safetensors", {"emotion": head}, {}, PROVENANCE)
    back = load_heads(tmp_path / "j.safetensors")["emotion"]
    assert all(torch.equal(getattr(back, part), getattr(head, part)) for part in ("mean", "scale", "weight", "bias"))
    # no probability moves by more than the logits do, and the softmax of up to 1 is off by a few eps itself
    bound = product_bound((x - head.mean) * head.scale, head.weight.T).max() + 4 * eps_of(x.dtype)
    assert (back.probabilities(x) - head.probabilities(x)).abs().max() <= bound


def test_files_that_are_no_judge_are_refused(tmp_path: Path, encoder: SentenceEncoder) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ArtifactError, match="does not exist"):
        load_heads(path)
    save_heads(path, heads(), {}, PROVENANCE)
    whole = artifacts.load(path, KIND)

    def rewritten(name: str, kind: str = KIND, **changes: object) -> Path:
        fields, tensors = {**whole.fields, **changes}, dict(whole.tensors)
        lost = fields.pop("lost", None)
        tensors.pop(lost, None)
        fields.pop(lost, None)
        artifacts.save(tmp_path / name, kind, fields, tensors, PROVENANCE)
        return tmp_path / name

    assert load_heads(rewritten("same")).keys() == {"emotion", "soundness"}
    with pytest.raises(ArtifactError, match="expected an artefact of kind 'judge', found 'directions'"):
        load_heads(rewritten("kind", "directions"))
    with pytest.raises(ArtifactError, match="reads the encoder minilm-l12, expected all-minilm-l6-v2; run `make judge`"):
        load_heads(rewritten("encoder", encoder="minilm-l12"))
    for lost in ("emotion.bias", "soundness.mean", "labels", "encoder"):
        with pytest.raises(ArtifactError, match="lacks a part of a judge .*run `make judge`"):
            load_heads(rewritten("part", lost=lost))
    with pytest.raises(ArtifactError, match="lacks a part of a judge"):
        load_heads(rewritten("labels", labels=["emotion"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        EmbeddedJudge.load(path, encoder)


# ---- the judge -------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(tmp_path: Path, encoder: SentenceEncoder) -> EmbeddedJudge:
    save_heads(tmp_path / "judge.safetensors", heads(), {}, PROVENANCE)
    return EmbeddedJudge.load(tmp_path / "judge.safetensors", encoder)


def test_opinions_are_the_heads_probabilities(judge: EmbeddedJudge, encoder: SentenceEncoder) -> None:
    texts, told = sentences(9, seed=3), list[tuple[int, Opinion]]()
    found = judge.opinions(texts, lambda index, opinion: told.append((index, opinion)))
    head = heads()["emotion"]
    wanted = torch.stack([((features_by_hand(encoder, t) - head.mean) * head.scale) @ head.weight.double().T + head.bias for t in texts])
    for opinion, row in zip(found, wanted.softmax(-1), strict=True):
        assert opinion.probabilities is not None and tuple(opinion.probabilities) == LABELS == judge.labels
        assert list(opinion.probabilities.values()) == pytest.approx(row.tolist(), abs=2e-3)
        assert opinion.emotion() == LABELS[int(row.argmax())] and not opinion.problem
    assert told == list(enumerate(found)) and len({opinion.emotion() for opinion in found}) > 1
    assert judge.opinions([]) == [] and judge.probabilities([]).shape == (0, 7)


def test_the_key_follows_the_file(judge: EmbeddedJudge, tmp_path: Path, encoder: SentenceEncoder) -> None:
    """Cached opinions of another head must not be taken for this one's."""
    same = tmp_path / "same.safetensors"
    save_heads(same, heads(), {}, PROVENANCE)
    assert EmbeddedJudge.load(same, encoder).key == judge.key
    save_heads(same, heads(seed=1), {}, PROVENANCE)
    assert EmbeddedJudge.load(same, encoder).key != judge.key
    assert judge.name == "embedded" and judge.key.startswith("embedded-")


# ---- judge texts -----------------------------------------------------------------------------------------------------

SHIPPED = [data_path(name) for name in FILES]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return read_examples(SHIPPED)


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_enough_texts_of_every_label(examples: list[Example]) -> None:
    counts = Counter(example.label for example in examples)
    assert set(counts) == set(LABELS) and min(counts.values()) >= 250
    held = Counter(example.label for example in examples if example.held_out)
    assert min(held.values()) >= 30, "enough to measure on, of every label"


def test_the_bank_shares_no_text_with_the_judge(examples: list[Example]) -> None:
    """Compared by words alone. A judge that knew the bank would know what circuits are made from."""
    bank = {plain(text) for replies in read_bank(data_path("replies/train.jsonl")).values() for text in replies.values()}
    mine = Counter(plain(example.text) for example in examples)
    foreign = {plain(json.loads(line)["text"]) for line in data_path(FOREIGN).read_text(encoding="utf-8").splitlines()}
    assert len(bank) == 2880 and not bank & mine.keys() and not bank & foreign and not foreign & mine.keys()
    twice = [text for text, count in mine.items() if count > 1]
    assert not twice, f"texts that differ in punctuation alone could stand on both sides of the split: {twice[:3]}"


def test_held_out_membership_depends_on_the_text_alone(examples: list[Example]) -> None:
    for example in examples[::50]:
        others = [replace(example, label=label, register=register) for label in LABELS for register in ("reply", "", "messages")]
        assert {other.held_out for other in others} == {example.held_out}
        assert read_examples(SHIPPED[:1])[0].held_out == examples[0].held_out, "whatever else is read"
    share = sum(example.held_out for example in examples) / len(examples)
    assert share == pytest.approx(HELD_OUT, abs=0.02)
    assert {example.held_out for example in examples[:60]} == {True, False}


@pytest.mark.parametrize(
    ("rows", "where"),
    [
        ([{"label": "anger", "text": "a b"}, {"label": "joy", "text": "c d"}], ":2: expected 'label' to be one of anger, .*neutral"),
        ([{"label": "anger", "text": "  "}], ":1: expected 'label' .*'text' a text that is not empty"),
        ([{"label": "anger"}], ":1: expected"),
        ([{"label": "anger", "text": 3}], ":1: expected"),
        ([{"label": "anger", "text": "a b"}, {"label": "fear", "text": "a b"}], ":2: this text is there twice"),
    ],
)
def test_bad_judge_texts_are_named(tmp_path: Path, rows: list[dict[str, object]], where: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=f"texts.jsonl{where}"):
        read_examples([path])


def test_a_text_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"label": "anger", "text": "never again"}\n')
    with pytest.raises(DataError, match="b.jsonl:1: this text is there twice"):
        read_examples([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_measures_of_the_emotion_head_by_hand() -> None:
    """A head that hands through what it is given: features are log-probabilities."""
    n = len(LABELS)
    head = LinearHead(LABELS, torch.zeros(n), torch.ones(n), torch.eye(n), torch.zeros(n))
    sure = 0.94 * torch.eye(n) + 0.01 * (1 - torch.eye(n))
    guesses = [(0, 0), (0, 0), (0, 6), (1, 1), (2, 2), (3, 0), (4, 4), (5, 5), (6, 6), (6, 1)]  # (answer, guess)
    answers = torch.tensor([answer for answer, _ in guesses])
    found = measure_emotions(head, sure[[guess for _, guess in guesses]].log(), answers, ["x"] * 3 + ["y"] * 7)
    assert found["n"] == 10 and found["accuracy"] == 0.7
    assert found["by_register"] == {"x": {"n": 3, "accuracy": round(2 / 3, 4)}, "y": {"n": 7, "accuracy": round(5 / 7, 4)}}
    assert (
        found["confusion"]["anger"] == {**dict.fromkeys(LABELS, 0), "anger": 2, "neutral": 1} and found["confusion"]["fear"]["anger"] == 1
    )
    f1 = [2 * 2 / (2 * 2 + 1 + 1), 2 / (2 + 1), 1, 0, 1, 1, 2 / (2 + 1 + 1)]  # 2 hits / (2 hits + missed + wrongly taken)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 7, abs=1e-4)
    assert found["expected_calibration_error"] == pytest.approx(0.94 - 0.7, abs=1e-4)
    # six-way leaves neutral out: of the eight emotional texts the one judged neutral is a tie among the rest, which anger wins
    assert found["accuracy_six_way"] == round(7 / 8, 4)


# ---- fitting, whole --------------------------------------------------------------------------------------------------


def write_texts(path: Path, flipped: bool = False) -> list[Example]:
    """Texts of every label, each with its telling word. flipped: held-out texts (and only those) get a wrong label."""
    draw, rows = random.Random(0), dict[str, str]()
    for label, word in TELLING.items():
        for _ in range(40):
            words = draw.choices(FILLERS, k=draw.randint(7, 11))
            words[2:6] = [word] * 4
            draw.shuffle(words)
            rows[" ".join(words)] = label
    found = [Example(label, "made", text) for text, label in rows.items()]
    if flipped:
        found = [replace(e, label=LABELS[(LABELS.index(e.label) + 1) % 7]) if e.held_out else e for e in found]
    path.write_text("".join(json.dumps(vars(e)) + "\n" for e in found))
    return found


def test_training_fits_on_the_kept_and_measures_on_the_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoder: SentenceEncoder
) -> None:
    monkeypatch.setattr(judge_training, "SentenceEncoder", lambda: encoder)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("".join(json.dumps({"text": f"[UNK] nada {i}"}) + "\n" for i in range(30)))
    texts = write_texts(tmp_path / "texts.jsonl")
    out = tmp_path / "judge.safetensors"
    card = train([tmp_path / "texts.jsonl"], foreign, out)
    assert card == card_of(out)
    kept, held = [e for e in texts if not e.held_out], [e for e in texts if e.held_out]
    assert (card["fitted_on"], card["emotions"]["n"]) == (len(kept), len(held)) and len(held) > 20
    head = load_heads(out)["emotion"]
    right = head.probabilities(encoder.features([e.text for e in held])).argmax(-1) == torch.tensor([LABELS.index(e.label) for e in held])
    assert card["emotions"]["accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-4) and right.float().mean() > 0.8
    assert {SOUND, "order", "repetition", "symbols", "language"} == card["soundness"].keys()
    provenance = artifacts.load(out, KIND).provenance
    assert provenance.data == {name: sha256_file(tmp_path / name) for name in ("texts.jsonl", "foreign.jsonl")}

    again = tmp_path / "again.safetensors"
    train([tmp_path / "texts.jsonl"], foreign, again)
    assert sha256_file(again) == sha256_file(out), "the same texts, the same bytes"

    write_texts(tmp_path / "texts.jsonl", flipped=True)
    wrong = train([tmp_path / "texts.jsonl"], foreign, again)
    for part in ("mean", "scale", "weight", "bias"):
        assert torch.equal(getattr(load_heads(again)["emotion"], part), getattr(head, part)), "held-out answers reach no head"
    assert wrong["emotions"]["accuracy"] < 0.2, "and are what the card measures"


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_the_shipped_judge_loads() -> None:
    found = load_heads(ASSET)
    assert found["emotion"].labels == LABELS and found["soundness"].labels == (SOUND, *FAULTS)
    width = 2 * 7 * 384  # mean and spread, six layers and the embeddings
    assert all(head.weight.shape == (len(head.labels), width) and head.mean.shape == (width,) for head in found.values())
    assert ASSET.stat().st_size < 2**20, "it travels in the package"


def test_the_shipped_judge_was_fitted_on_the_texts_as_they_are(examples: list[Example]) -> None:
    provenance = artifacts.load(ASSET, KIND).provenance
    here = {path.name: sha256_file(path) for path in (*SHIPPED, data_path(FOREIGN))}
    assert provenance.data == here, "data/judge/ has changed since the judge was fitted: run `make judge`"
    card = card_of()
    assert card["fitted_on"] == sum(not e.held_out for e in examples) and card["emotions"]["n"] == sum(e.held_out for e in examples)


def test_the_shipped_card_is_good_enough_and_agrees_with_itself() -> None:
    card = card_of()
    emotions, sound = card["emotions"], card["soundness"]
    assert emotions["accuracy"] >= 0.92
    confusion = torch.tensor([[emotions["confusion"][row][column] for column in LABELS] for row in LABELS])
    assert confusion.sum() == emotions["n"]
    hits = confusion.diag()
    assert emotions["accuracy"] == pytest.approx((hits.sum() / confusion.sum()).item(), abs=1e-4)
    recall, precision = hits / confusion.sum(1), hits / confusion.sum(0)
    f1 = 2 * recall * precision / (recall + precision)
    assert emotions["macro_f1"] == pytest.approx(f1.mean().item(), abs=1e-4) and f1.min() > 0.85
    assert sound[SOUND]["called_unsound"] <= 0.03 and all(sound[fault]["called_unsound"] >= 0.97 for fault in FAULTS)


def test_the_shipped_judge_does_as_its_card_says(examples: list[Example]) -> None:
    held = [example for example in examples if example.held_out][::4]
    judge = EmbeddedJudge.load(encoder=real_encoder())
    found = judge.probabilities([example.text for example in held])
    answers = torch.tensor([LABELS.index(example.label) for example in held])
    share = (found.argmax(-1) == answers).float().mean().item()
    assert len(held) > 200 and share == pytest.approx(card_of()["emotions"]["accuracy"], abs=0.04)
    assert one_hot(found.argmax(-1), 7).sum(0).min() > 10, "every label is used"


def test_the_shipped_judge_hears_plain_cases() -> None:
    judge = EmbeddedJudge.load(encoder=real_encoder())
    said = {
        "anger": "How dare they do that to you again! I'm furious, they should be ashamed of themselves.",
        "sadness": "I'm so sorry. I sat there with tears in my eyes and my heart is so heavy.",
        "happiness": "That's wonderful, I'm so happy for you! I'm grinning from ear to ear.",
        "fear": "I'm terrified. My hands are shaking and I don't dare to open the door.",
        "surprise": "Wait, what? I never saw that coming, my jaw just dropped!",
        "disgust": "Ugh, that's revolting, the smell of it turns my stomach.",
        "neutral": "The office is open from nine to five. You can bring the form on Monday.",
    }
    assert [opinion.emotion() for opinion in judge.opinions(list(said.values()))] == list(said)
