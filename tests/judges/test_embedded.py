"""The linear judge: the encoder's features, heads fitted on them, and opinions."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from emosteer.judges.embedded import MAX_TOKENS, LinearJudge, SentenceEncoder, fit_head
from emosteer.judges.protocol import LABELS, Opinion
from tests.helpers.judge_setup import FILLERS, TELLING, tiny_encoder, tiny_heads


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


# ---- the judge -------------------------------------------------------------------------------------------------------


def test_opinions_are_the_heads_probabilities(encoder: SentenceEncoder) -> None:
    head = tiny_heads()["emotion"]
    judge = LinearJudge(encoder, head)
    texts, told = sentences(9, seed=3), list[tuple[int, Opinion]]()
    found = judge.opinions(texts, lambda index, opinion: told.append((index, opinion)))
    wanted = torch.stack([((features_by_hand(encoder, t) - head.mean) * head.scale) @ head.weight.double().T + head.bias for t in texts])
    for opinion, row in zip(found, wanted.softmax(-1), strict=True):
        assert opinion.probabilities is not None and tuple(opinion.probabilities) == LABELS == judge.labels
        assert list(opinion.probabilities.values()) == pytest.approx(row.tolist(), abs=2e-3)
        assert opinion.emotion() == LABELS[int(row.argmax())] and not opinion.problem
    assert told == list(enumerate(found)) and len({opinion.emotion() for opinion in found}) > 1
    assert judge.opinions([]) == [] and judge.probabilities([]).shape == (0, 7)


def test_the_key_follows_the_head(encoder: SentenceEncoder) -> None:
    """Cached opinions of another head must not be taken for this one's."""
    judge = LinearJudge(encoder, tiny_heads()["emotion"])
    assert LinearJudge(encoder, tiny_heads()["emotion"]).key == judge.key != LinearJudge(encoder, tiny_heads(1)["emotion"]).key
    assert judge.name == "linear" and judge.key.startswith("linear-")
