"""What a model makes of replies, against the plain model, one reply at a time."""

from __future__ import annotations

import math

import pytest
import torch

from emosteer.judges.choosing import reading
from emosteer.judges.choosing.reading import DEPTHS, SURPRISES, feature_count, feature_weights, read_replies, sites_of, surprise
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site

PAIRS = [
    ("i waited nine weeks", "they never called ."),
    ("the train was late", "run ! run ! the door is home"),
    ("i waited nine weeks", "no"),
    ("the boss came back and said that the flat went home and not the office", "why"),
]


@torch.no_grad()
def by_hand(model: Model, said: str, reply: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States on the bridge and surprise from the Hugging Face model, each in one unpadded pass."""
    ids, written = model.prompt_ids([{"role": "user", "content": said}]), model.text_ids(reply)
    out = model.hf(input_ids=torch.tensor([[*ids, *written]]))
    parts = []
    for depth in DEPTHS:
        layer = max(round(model.shape.n_layers * depth), 1)
        site = Site(layer - 1, RESID_POST)
        state = model.read(torch.tensor([[*ids, *written]]), [site])[site][0, len(ids) :]
        part = torch.cat([state.mean(0), state[-1]])
        parts.append(part / part.norm())
    expected = out.logits[0].log_softmax(-1)
    ending = math.log(sum(expected[-1, stop].exp().item() for stop in model.stop_ids))
    costs = [-expected[len(ids) - 1 + place, token].item() for place, token in enumerate(written)]
    return torch.cat(parts), torch.tensor([sum(costs) / len(costs), max(costs), sum(costs[:5]) / len(costs[:5]), ending])


def test_features_are_those_of_the_plain_model_whatever_is_read_beside(family: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one padded batch, and in batches of one."""
    together = read_replies(family, PAIRS)
    assert together.shape == (len(PAIRS), feature_count(family)) and len(feature_weights(together.shape[1])) == together.shape[1]
    monkeypatch.setattr(reading, "BATCH_TOKENS", 1)
    assert torch.allclose(read_replies(family, PAIRS), together, atol=1e-4)
    for row, (said, reply) in zip(together, PAIRS, strict=True):
        states, figures = by_hand(family, said, reply)
        assert torch.allclose(row[:-SURPRISES], states, atol=1e-4)
        mine = row[-SURPRISES:]
        assert torch.allclose(torch.stack([mine[0], mine[2], mine[4], mine[13]]), figures, atol=1e-3)


def test_a_beginning_is_read_with_its_whole(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and as if it stood alone; behind other words, or where its tokens are others, it is read by itself."""
    said, whole = "i waited nine weeks", "they never called . run home ! why"
    pairs = [(said, "they never called ."), (said, whole), ("the train was late", "they never called ."), (said, "they run"), (said, whole)]
    rows: list[int] = []
    read = reading._read
    monkeypatch.setattr(reading, "_read", lambda model, some: (rows.append(len(some)), read(model, some))[1])
    together = read_replies(tiny, pairs)
    assert sum(rows) == 3
    alone = torch.cat([read_replies(tiny, [pair]) for pair in pairs])
    assert torch.allclose(together, alone, atol=1e-4) and not torch.allclose(together[0], together[1], atol=1e-2)


def test_nothing_is_hooked_once_replies_are_read(tiny: Model) -> None:
    """And no replies are no rows."""
    read_replies(tiny, PAIRS[:1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.hf.modules())
    assert read_replies(tiny, []).shape == (0, feature_count(tiny))


def test_surprise_of_tokens_by_hand() -> None:
    """Probabilities that are known: 1/2 and 1/4 of four tokens, then 1/8 with three likelier ones."""
    shares = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125], [0.4, 0.3, 0.175, 0.125]])
    found = surprise(shares.log(), torch.tensor([0, 1, 3]), torch.tensor(-2.0))
    assert len(found) == SURPRISES
    costs = [math.log(2), math.log(4), math.log(8)]
    doubt = [-sum(p * math.log(p) for p in row) for row in shares.tolist()]
    beyond = [cost - own for cost, own in zip(costs, doubt, strict=True)]
    assert found.tolist() == pytest.approx(
        [
            *(sum(costs) / 3, costs[2], costs[2], sum(costs) / 3, sum(costs) / 3, sum(costs) / 3),
            *(sum(doubt) / 3, sum(beyond) / 3, beyond[2]),
            *((math.log(1) + math.log(2) + math.log(4)) / 3, 1 / 3, 0.0),
            *(math.log(3), -2.0),
        ],
        abs=1e-6,
    )


def test_a_reply_of_one_token_has_every_figure() -> None:
    """No window of three, no spread; finite all the same."""
    found = surprise(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([1]), torch.tensor(-1.0))
    assert torch.isfinite(found).all() and found[0].item() == pytest.approx(math.log(2))


def test_the_sites_lie_inside_every_model(tiny: Model) -> None:
    """Three layers deep or thirty."""
    assert sites_of(tiny) == tuple(Site(layer, RESID_POST) for layer in (1, 1, 1))  # of three layers: 1.5, 1.95 and 2.4, from one on


def test_what_is_longer_is_read_in_part(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of what was said, the beginning of the reply."""
    monkeypatch.setattr(reading, "LONGEST", 20)
    long = read_replies(tiny, [("never home " * 9 + "i waited nine weeks", "they came back home ." + " run" * 40)])
    short = read_replies(tiny, [(("never home " * 9 + "i waited nine weeks")[-20:], ("they came back home ." + " run" * 40)[:20])])
    assert torch.equal(long, short)
