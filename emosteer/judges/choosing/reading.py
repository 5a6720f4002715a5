"""What a small model makes of a reply to a prompt: its states while it reads the reply, and how far each token surprised it.

A language model has learned to expect sense. So a reply is read once more, unsteered, behind nothing but what was said: in a few layers of
the middle the mean over its tokens and the state at its last one are kept, and of its tokens' surprise some figures. Linear heads on these
(`chooser`) agree with readers a little better than heads on the judges' encoder do (docs/CIRCUITS.md, "The best of several"), and share
nothing with these, who judge what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.models.hooks import reading
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Site

#: (what was said, the reply)
Pair = tuple[str, str]
#: Which layers are read, as parts of the model's depth.
DEPTHS = (0.5, 0.65, 0.8)
#: Characters of what was said (its end) and of a reply (its beginning) that are read.
LONGEST = 2000
#: Tokens, padding included, that are read at once.
BATCH_TOKENS = 4096
#: Figures of surprise (`surprise`), and how much more they may weigh in a head than one of the many parts of a state.
SURPRISES, SURPRISE_WEIGHS = 14, 8.0
#: A token is unlikely where so many others were likelier; tokens that are looked at together; tokens at either end of a reply.
UNLIKELY, WINDOW, ENDS = 50, 3, 5


def sites_of(model: Model) -> tuple[Site, ...]:
    """The places whose states are read, the deepest last."""
    layers = (min(max(round(model.shape.n_layers * depth), 1), model.shape.n_layers) - 1 for depth in DEPTHS)
    return tuple(Site(layer, RESID_POST) for layer in layers)


def feature_count(model: Model) -> int:
    """How many features `read_replies` gives with a model."""
    return 2 * len(DEPTHS) * model.shape.d_model + SURPRISES


def feature_weights(features: int) -> Tensor:
    """For `fit_head`: how much each feature may weigh. Shape [feature]."""
    return torch.cat([torch.ones(features - SURPRISES), torch.full((SURPRISES,), SURPRISE_WEIGHS)])


@torch.no_grad()
def read_replies(model: Model, pairs: Sequence[Pair]) -> Tensor:
    """Reads replies behind what was said.

    Args:
        model: the reader, unsteered; pairs: what was said, as one text, and a reply that is not empty.

    Returns:
        [pair, feature], float32 on the CPU: of each layer the mean over the reply's tokens and the state at its last token, together of
        unit length, then `surprise`.
    """
    prompts = {said: model.prompt_ids([{"role": "user", "content": said[-LONGEST:]}]) for said in dict.fromkeys(said for said, _ in pairs)}
    replies = [model.text_ids(reply.strip()[:LONGEST]) for _, reply in pairs]
    rows = _rows([(prompts[said], reply) for (said, _), reply in zip(pairs, replies, strict=True)])
    found: dict[int, Tensor] = {}
    for batch in _batches([len(row.said) + len(row.reply) for row in rows]):
        found |= _read(model, [rows[i] for i in batch])
    return torch.stack([found[i] for i in range(len(pairs))]) if pairs else torch.zeros(0, feature_count(model))


@dataclass(frozen=True)
class _Row:
    """What is read in one go: a reply behind what was said, and the pairs whose replies it is or begins with (place -> tokens), since a
    causal model is in the same state there."""

    said: list[int]
    reply: list[int]
    ends: dict[int, int]


def _rows(texts: Sequence[tuple[list[int], list[int]]]) -> list[_Row]:
    """The texts as few rows."""
    rows: list[_Row] = []
    order = sorted(range(len(texts)), key=lambda i: (texts[i][0], texts[i][1]), reverse=True)  # a text comes after those that begin with it
    for place in order:
        said, reply = texts[place]
        last = rows[-1] if rows else None
        if last is not None and last.said == said and last.reply[: len(reply)] == reply:
            last.ends[place] = len(reply)
        else:
            rows.append(_Row(said, reply, {place: len(reply)}))
    return rows


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows in batches of similar length that hold `BATCH_TOKENS` at most, one row at least."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _read(model: Model, rows: Sequence[_Row]) -> dict[int, Tensor]:
    """Place -> features, of rows that are read as one batch: padded on the right and causal, so that the padding is never seen."""
    width = max(len(row.said) + len(row.reply) for row in rows)
    ids = [[*row.said, *row.reply, *[model.pad_id] * (width - len(row.said) - len(row.reply))] for row in rows]
    tokens, sites = torch.tensor(ids, device=model.device), sites_of(model)
    states: dict[Site, Tensor] = {}
    hidden = model.run(tokens, {site: reading(states, site, None) for site in sites}, bridge=False)
    stops, found = torch.tensor(sorted(model.stop_ids), device=model.device), {}
    for number, row in enumerate(rows):
        begin, end = len(row.said), len(row.said) + len(row.reply)
        expected = model.logits(hidden[number, begin - 1 : end]).float().log_softmax(-1)
        written, layers = tokens[number, begin:end], [states[site][number, begin:end].float() for site in sites]
        for place, size in row.ends.items():
            parts = [torch.cat([layer[:size].mean(0), layer[size - 1]]) for layer in layers]
            ending = expected[size, stops].logsumexp(0) if len(stops) else expected.new_zeros(())
            figures = surprise(expected[:size], written[:size], ending)
            found[place] = torch.cat([*(part / part.norm() for part in parts), figures]).cpu()
    return found


def surprise(expected: Tensor, written: Tensor, ending: Tensor) -> Tensor:
    """Figures of how far a reply's tokens surprise the reader, in nats but where they are shares. Shape [SURPRISES].

    Args:
        expected: [token, d_vocab], log-probabilities before each token; written: [token], the tokens; ending: log-probability that the
            reply ends where it does.
    """
    cost = -expected.gather(1, written[:, None])[:, 0]
    doubt = -(expected.exp() * expected).sum(-1)
    likelier = (expected > -cost[:, None]).sum(-1)
    most, beyond = max(1, len(cost) // 4), cost - doubt
    run = cost.unfold(0, WINDOW, 1).mean(-1).max() if len(cost) >= WINDOW else cost.max()
    figures = (
        *(cost.mean(), cost.topk(most).values.mean(), cost.max(), run, cost[:ENDS].mean(), cost[-ENDS:].mean()),
        *(doubt.mean(), beyond.mean(), beyond.topk(most).values.mean()),
        *((likelier + 1).log().mean(), (likelier == 0).float().mean(), (likelier > UNLIKELY).float().mean()),
        *(cost.new_tensor(len(cost)).log(), ending),
    )
    return torch.stack([figure.to(cost) for figure in figures])
