"""Fine-tuning on a tiny random encoder: what is drawn, what learns and what does not, and the temperature."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from emosteer.base.errors import DataError
from emosteer.judges import fine_tuning
from emosteer.judges.adapters import Adapter, TunedJudge
from emosteer.judges.embedded import SentenceEncoder
from emosteer.judges.fine_tuning import FineTuneSettings, Sampler, calibrated, fine_tune, quicker_dtype
from emosteer.judges.protocol import LABELS
from tests.helpers.judge_setup import FILLERS, TELLING, tiny_adapter, tiny_encoder

SETTINGS = FineTuneSettings(steps=220, batch=24, rate=2e-2, warmup=5, rank=4, layers=2, dropout=0.0, dtype="float32")


def telling_texts(each: int, seed: int) -> list[tuple[str, str]]:
    """Texts of filling words, each with the telling word of its label three times."""
    draw, texts = random.Random(seed), list[tuple[str, str]]()
    for label, word in TELLING.items():
        for _ in range(each):
            words = draw.choices(FILLERS, k=draw.randint(2, 6)) + [word] * 3
            draw.shuffle(words)
            texts.append((" ".join(words), label))
    return texts


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[SentenceEncoder]:
    """Fine-tuning loads tiny encoders, which are collected here."""
    loaded = list[SentenceEncoder]()

    def load() -> SentenceEncoder:
        loaded.append(tiny_encoder())
        return loaded[-1]

    monkeypatch.setattr(fine_tuning, "SentenceEncoder", load)
    return loaded


# ---- drawing -------------------------------------------------------------------------------------------------------


def within(count: int, share: float, total: int) -> bool:
    """Whether a count is what a share gives, give or take five standard deviations."""
    return abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5


def test_sources_are_drawn_at_their_shares_whatever_their_size() -> None:
    sources = {"large": [(f"large {n}", "a") for n in range(90)], "small": [("small", "a")], "plain": [("plain", "a")] * 3}
    drawn = Sampler(sources, {"large": 0.5, "small": 1.5}, 0.5, seed=1).draw(4000)
    counts = Counter(text.split()[0] for text, _ in drawn)
    # of 0.5 + 1.5 + 1 (none is given for "plain")
    assert within(counts["large"], 1 / 6, 4000) and within(counts["small"], 1 / 2, 4000) and within(counts["plain"], 1 / 3, 4000)


@pytest.mark.parametrize(("balance", "rare"), [(0.0, 4 / 104), (0.5, 2 / 12), (1.0, 1 / 2)])
def test_labels_are_drawn_by_a_power_of_their_number(balance: float, rare: float) -> None:
    """100 and 4 texts: 100:4 as they occur, 10:2 by their roots, 1:1 balanced."""
    texts = [(f"often {n}", "a") for n in range(100)] + [(f"rare {n}", "b") for n in range(4)]
    drawn = Sampler({"one": texts}, {}, balance, seed=2).draw(4000)
    assert within(sum(label == "b" for _, label in drawn), rare, 4000)
    each = Counter(text for text, label in drawn if label == "b")
    assert len(each) == 4 and all(within(count, 1 / 4, each.total()) for count in each.values()), "texts of one label alike"


def test_draws_are_sorted_by_length_and_depend_on_the_seed_alone() -> None:
    sources = {"one": telling_texts(9, 0), "two": telling_texts(5, 1)}
    first, again, other = (Sampler(sources, {}, 0.5, seed) for seed in (3, 3, 4))
    drawn = first.draw(50)
    assert drawn == again.draw(50) != other.draw(50) and first.draw(50) == again.draw(50) != drawn
    assert [len(text) for text, _ in drawn] == sorted(len(text) for text, _ in drawn) and len(drawn) == 50
    assert set(drawn) <= {*sources["one"], *sources["two"]}


def test_a_source_without_texts_is_refused() -> None:
    with pytest.raises(DataError, match="the source 'empty' has no text to fit a judge on"):
        Sampler({"one": [("a", "a")], "empty": []}, {}, 0.5, 0)


# ---- learning ------------------------------------------------------------------------------------------------------


def test_planted_words_are_learned_and_carry_over(encoders: list[SentenceEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = list[float]()
    plain = fine_tuning._loss

    def noted(*arguments: object) -> torch.Tensor:
        loss = plain(*arguments)  # type: ignore[arg-type]
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(fine_tuning, "_loss", noted)
    adapter = fine_tune({"made": telling_texts(30, 0)}, {}, SETTINGS)
    assert len(losses) == 2 * SETTINGS.steps and sum(losses[-20:]) < 0.5 * sum(losses[:20])
    held = telling_texts(10, 1)
    answers = torch.tensor([LABELS.index(label) for _, label in held])

    def right(one: Adapter) -> float:
        found = TunedJudge.of(tiny_encoder(), one, "tuned").probabilities([text for text, _ in held])
        return (found.argmax(-1) == answers).float().mean().item()

    assert right(adapter) > 0.85
    without = replace(adapter, up={path: torch.zeros_like(up) for path, up in adapter.up.items()})
    assert right(without) < 0.5, "the adapters have learned, not the head alone"


def test_only_adapters_and_head_change(encoders: list[SentenceEncoder]) -> None:
    settings = replace(SETTINGS, steps=4, layers=1)
    adapter = fine_tune({"made": telling_texts(4, 0)}, {}, settings, labels=LABELS)
    [encoder] = encoders
    before = tiny_encoder().model.state_dict()
    after = {name.replace(".linear.", "."): value for name, value in encoder.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    extra = {name for name in after if name not in before}
    assert extra == {f"{path}.{part}" for path in adapter.down for part in ("down", "up")} and len(adapter.down) == 6
    assert all(path.startswith("encoder.layer.1.") for path in adapter.down), "of the last layer alone"
    still = fine_tune({"made": telling_texts(4, 0)}, {}, replace(settings, rate=0.0))
    for path in adapter.down:
        assert not torch.equal(adapter.down[path], still.down[path]) and adapter.up[path].any() and not still.up[path].any()
    assert not torch.equal(adapter.weight, still.weight) and not torch.equal(adapter.bias, still.bias)
    assert not any(part.requires_grad for part in (*adapter.down.values(), *adapter.up.values(), adapter.weight, adapter.bias))
    assert not encoder.model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits(encoders: list[SentenceEncoder], dtype: str) -> None:
    settings = replace(SETTINGS, steps=6, dtype=dtype)
    sources = {"made": telling_texts(6, 0)}
    first, again = fine_tune(sources, {}, settings), fine_tune(sources, {}, settings)
    for name, value in again.tensors().items():
        assert torch.equal(value, first.tensors()[name]), name
    assert fine_tune(sources, {}, replace(settings, seed=1)).key != first.key


@pytest.mark.parametrize("slow", fine_tuning.DTYPES)
def test_the_faster_precision_is_found_by_measuring(
    encoders: list[SentenceEncoder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], slow: str
) -> None:
    """By the processor's time of one step in each, of which one is made to take longer here."""
    now, plainly = [0.0], fine_tuning._loss

    def loss(*arguments: Any) -> Tensor:
        now[0] += 2.0 if arguments[-1].dtype == slow else 0.5
        return plainly(*arguments)

    monkeypatch.setattr(fine_tuning, "_loss", loss)
    monkeypatch.setattr(fine_tuning.time, "process_time", lambda: now[0])
    (faster,) = set(fine_tuning.DTYPES) - {slow}
    assert quicker_dtype() == faster
    said = capsys.readouterr().err
    assert f"fine-tuning in {faster}" in said and f"2.00 s in {slow}" in said and f"0.50 s in {faster}" in said


def test_learning_goes_on_from_an_adapter(encoders: list[SentenceEncoder]) -> None:
    sources, brief = {"made": telling_texts(8, 0)}, replace(SETTINGS, steps=3)
    first = fine_tune(sources, {}, brief)
    still = fine_tune(sources, {}, replace(brief, rate=0.0, seed=5), start=first)
    assert still.key == first.key, "with no rate it stays where it began"
    onward = fine_tune(sources, {}, brief, start=first)
    assert onward.key not in (first.key, fine_tune(sources, {}, brief).key)
    moved, size = onward.weight - first.weight, first.weight.abs().max()
    assert 0 < moved.abs().max() < size, "it began there"
    with pytest.raises(ValueError, match="in the layers that it was learned in"):
        fine_tune(sources, {}, replace(brief, layers=1), start=first)


def test_labels_may_be_others(encoders: list[SentenceEncoder]) -> None:
    texts = [(text, "yes" if label in LABELS[:3] else "no") for text, label in telling_texts(20, 0)]
    adapter = fine_tune({"made": texts}, {}, SETTINGS, labels=("yes", "no"))
    held = telling_texts(5, 2)
    found = TunedJudge.of(tiny_encoder(), adapter, "two").probabilities([text for text, _ in held]).argmax(-1).tolist()
    hits = [index == (0 if label in LABELS[:3] else 1) for index, (_, label) in zip(found, held, strict=True)]
    assert adapter.weight.shape[0] == 2 and sum(hits) > 0.85 * len(hits)


def test_a_batch_of_one_text_is_read(encoders: list[SentenceEncoder]) -> None:
    assert fine_tune({"made": telling_texts(1, 0)}, {}, replace(SETTINGS, steps=2, batch=1)).labels == LABELS


def test_every_step_reads_what_was_drawn_and_no_longer_than_told(encoders: list[SentenceEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[tuple[int, int]]()
    plain = SentenceEncoder.tokens

    def tokens(self: SentenceEncoder, texts: list[str], longest: int = 160) -> object:
        batch = plain(self, texts, longest)
        read.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(SentenceEncoder, "tokens", tokens)
    long = [(" ".join([word] * 50), label) for label, word in TELLING.items()]
    fine_tune({"made": long}, {}, replace(SETTINGS, steps=3, batch=9, longest=20))
    assert read == [(4, 20), (5, 20)] * 3


# ---- the temperature -----------------------------------------------------------------------------------------------


def test_a_planted_temperature_is_found() -> None:
    """Answers drawn from softmax(logits): of logits twice as large the temperature is 2, and the head is divided by it."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 7, generator=draw)
    answers = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    adapter = tiny_adapter()
    for planted in (0.8, 1.0, 2.0):
        found = calibrated(adapter, planted * logits, answers, torch.ones(len(answers)))
        temperature = (adapter.weight / found.weight).median().item()
        assert temperature == pytest.approx(planted, abs=0.08)
        torch.testing.assert_close(found.bias * temperature, adapter.bias)
        assert found.down is adapter.down and found.up is adapter.up and found.labels == adapter.labels


def test_weights_say_which_texts_count() -> None:
    draw = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(8000, 7, generator=draw)
    answers = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
    both, answers = torch.cat([logits, 3 * logits]), answers.repeat(2)
    adapter = tiny_adapter()
    for weights, planted in ((torch.tensor([1.0, 0.0]), 1.0), (torch.tensor([0.0, 1.0]), 3.0)):
        found = calibrated(adapter, both, answers, weights.repeat_interleave(8000))
        assert (adapter.weight / found.weight).median().item() == pytest.approx(planted, abs=0.12)


def test_the_temperature_is_the_likeliest_of_the_grid() -> None:
    draw = torch.Generator().manual_seed(2)
    logits, answers = 3 * torch.randn(40, 7, generator=draw), torch.randint(7, (40,), generator=draw)
    weights = torch.rand(40, generator=draw)
    adapter = tiny_adapter()
    found = (adapter.weight / calibrated(adapter, logits, answers, weights).weight).median().item()

    def loss(t: float) -> float:
        return float((functional.cross_entropy(logits.double() / t, answers, reduction="none") * weights).sum())

    assert loss(found) <= min(loss(0.5 + 0.05 * step) for step in range(71)) + 1e-9
