"""The best of several: each reply is written several times over, and the one that a chooser finds likeliest to be good is kept.

What steering breaks it does not break in every reply, nor in every sentence of one. So the candidates are all replies that were drawn, each
as it is and ended early after any of its sentences; which of them is good a chooser says, that reads them unsteered (`judges.choosing`);
one that names the emotion is taken only where all do. The reply that is kept is a whole one: where it was ended early it has stopped, as if
the model had ended it there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request, generate
from emosteer.generation.steering import SteeringPlan
from emosteer.judges.choosing.chooser import Chooser
from emosteer.models.model import Model
from emosteer.scenarios.words import stem_pattern

#: Where a sentence ends, closing quotes and brackets with it: before white space, or anywhere where the script has none between words.
_ENDS = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s)|[\u3002\uff01\uff1f][\u300d\u300f\u201d\uff09]*")
#: A full stop that ends no sentence.
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|e\.g|i\.e)\.$|(?:^|\s)\d{1,2}\.$")


@dataclass(frozen=True)
class Asked:
    """What a reply is to be: an answer to what was `said`, in one of the `wanted` emotions (none: in whatever mood)."""

    said: str
    wanted: Collection[str] = ()


def beginnings(text: str) -> list[str]:
    """A text ended after each of its sentences in turn, the whole of it last; nothing for an empty one."""
    found = [text[: match.end()].strip() for match in _ENDS.finditer(text)]
    whole = text.strip()
    return [*dict.fromkeys(part for part in found if part != whole and not _TITLE.search(part)), whole] if whole else []


def chooser_for(steered: Model, decoding: Decoding) -> Chooser | None:
    """The shipped chooser, where a decoding writes several candidates. Errors as for `Chooser.load`."""
    return Chooser.load(steered) if decoding.chooses else None


def rows_of(batch_size: int, decoding: Decoding) -> int:
    """Replies that are written at once, where so many candidates fit in a batch."""
    return max(1, batch_size // decoding.best_of)


def write_batch(
    model: Model, requests: Sequence[Request], plan: SteeringPlan, decoding: Decoding, asked: Sequence[Asked], chooser: Chooser | None
) -> list[Reply]:
    """Writes one batch, each reply by itself or as the best of several, as the decoding has it. Errors as for `generate`."""
    if not decoding.chooses:
        return generate(model, requests, plan, decoding)
    if chooser is None:
        raise ValueError("somebody has to choose among the candidates")
    return generate_best(model, requests, plan, decoding, asked, chooser)


def generate_best(
    model: Model, requests: Sequence[Request], plan: SteeringPlan, decoding: Decoding, asked: Sequence[Asked], chooser: Chooser
) -> list[Reply]:
    """Writes one batch, `decoding.best_of` candidates for each request, and keeps the best of each, in the order of the requests.

    Args:
        plan: one row per request.

    Raises:
        DataError: as `generate`.
    """
    each = decoding.best_of
    rows = [row for row in range(len(requests)) for _ in range(each)]
    drawn = [replace(requests[row], key=candidate_key(requests[row].key, place % each)) for place, row in enumerate(rows)]
    written = generate(model, drawn, plan.rows(rows), decoding.drawing)
    pairs, owners = [], []
    for place, reply in enumerate(written):
        for text in beginnings(reply.text):
            pairs.append((asked[rows[place]].said, text))
            owners.append(place)
    wanted = [asked[rows[place]].wanted for place in owners]
    named = [any(stem_pattern(name).search(text) for name in own) for (_, text), own in zip(pairs, wanted, strict=True)]
    chances = chooser.chances(pairs, wanted).tolist()
    kept: list[Reply] = []
    for row, request in enumerate(requests):
        mine = [i for i, place in enumerate(owners) if rows[place] == row]
        best = max(mine, key=lambda i: (not named[i], chances[i], -i), default=None)
        if best is None:  # all of them are empty
            kept.append(replace(written[row * each], key=request.key))
        else:
            kept.append(_ended(model, replace(written[owners[best]], key=request.key), pairs[best][1]))
    return kept


def candidate_key(key: str, place: int) -> str:
    """What a candidate's seed is drawn from: the first is what would be written if there were one."""
    return key if place == 0 else f"{key}/candidate {place}"


def _ended(model: Model, reply: Reply, text: str) -> Reply:
    """A reply that ends where a text ends that it begins with."""
    if text == reply.text.strip():
        return reply
    return Reply(reply.key, text, tuple(model.text_ids(text)), "stop")
