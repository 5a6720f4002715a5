"""One pass over replies of the bank: where every head looks, what it adds along each direction, and what reaches it from where.

A state is read at the positions that write a reply's tokens (docs/METHOD.md section 3), so that all figures are of the same places as the
directions. Everything is a sum over prompts; no activation outlives its batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import head_contributions, written_direction
from emosteer.base.errors import DataError
from emosteer.base.progress import bar
from emosteer.circuits.heads.paths import Paths, Targets, followed
from emosteer.directions.activations import Sample, TokenRow, make_batch, read_positions, rows_of, tokenize_group
from emosteer.directions.directions import Directions
from emosteer.models.attention import Seen, see
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, RESID_MID, Head, Site, Z
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group
from emosteer.scenarios.splits import spread

#: What a head can look at. start: the first token of all, where many heads look when they have nothing to do; template: what the chat
#: template writes, system line included; prompt: what was said; instruction: the line behind it; reply: what has been written; itself:
#: the token that the head has just read.
CLASSES = ("start", "template", "prompt", "instruction", "reply", "itself")
START, TEMPLATE, PROMPT, INSTRUCTION, REPLY, ITSELF = range(len(CLASSES))


@dataclass(frozen=True, eq=False)
class Text:
    """One reply of the bank behind its prompt. first: the length of the prompt; classes: one of each token but `itself`; row, places: where
    its tokens stand in the batch that it is read in."""

    group: int
    label: int
    ids: tuple[int, ...]
    first: int
    classes: tuple[int, ...]
    row: int
    places: tuple[int, ...]

    @property
    def queries(self) -> list[int]:
        """Which of its tokens are read: those that write the reply."""
        return list(read_positions(self.first, len(self.ids) - self.first))


@dataclass(frozen=True, eq=False)
class Described:
    """The heads with a page, one entry for each emotion's. direction: [entry, d_head], what of the head's output is written along the
    emotion's direction."""

    emotions: tuple[int, ...]
    heads: tuple[Head, ...]
    direction: Tensor


@dataclass(eq=False)
class Readings:
    """Sums over prompts, divided in the end.

    attention: [label, layer, head, class], mean over a reply's positions and over replies; at_start: [layer, head, class], at t*, where the
    first token is written, of plain prompts; even, even_at_start: [class], the same of a head that looks everywhere alike; contributions:
    [group, label, emotion, layer, head], what each head adds along each emotion's direction; courses: per text [entry, read pos], the same
    position by position for the described heads; looks, chances: [entry, token], attention paid to a token of prompt or reply, and how
    often it could have been paid; paths: what reaches the targets, None without any.
    """

    texts: list[Text]
    labels: tuple[str, ...]
    attention: Tensor
    at_start: Tensor
    even: Tensor
    even_at_start: Tensor
    contributions: Tensor
    looks: Tensor
    chances: Tensor
    paths: Paths | None
    courses: list[Tensor] = field(default_factory=list)


def described_heads(model: Model, directions: Directions, chosen: Sequence[tuple[int, Head]]) -> Described:
    """(emotion, head) pairs, with what each reads of a head's output."""
    v_mid = directions.at(RESID_MID).to(model.device).float()
    rows = []
    for emotion, head in chosen:
        along = written_direction(model, head.layer, RESID_MID, v_mid[emotion, head.layer])
        rows.append(model.w_o(head.layer)[head.index].float() @ along.float())
    return Described(tuple(e for e, _ in chosen), tuple(head for _, head in chosen), torch.stack(rows))


def complete_groups(groups: Sequence[Group], bank: Bank, emotions: Sequence[str], count: int) -> tuple[list[Group], tuple[str, ...]]:
    """Prompts whose replies are all there, evenly drawn, and the labels of the replies: the emotions, and neutral where every one has it.

    Raises:
        DataError: if fewer than two prompts have a reply in every emotion.
    """
    whole = [group for group in groups if all(emotion in bank.get(group.key, {}) for emotion in emotions)]
    chosen = spread(whole, count)
    if len(chosen) < 2:
        raise DataError(f"expected at least 2 prompts with a reply in each of {', '.join(emotions)}, found {len(chosen)} in the bank")
    neutral = all(NEUTRAL in bank[group.key] for group in chosen)
    return chosen, (*emotions, NEUTRAL) if neutral else tuple(emotions)


def token_classes(model: Model, group: Group, instruction: str, sample: Sample, label: int) -> tuple[int, ...]:
    """The class of every token of a prompt and its reply. What of the prompt is what is found by leaving it out: tokens that the two
    conversations do not share at their ends were said; of those shared at the end, the instruction goes when it is left out as well."""
    ids = sample.prompts[label]
    empty, bare = (model.prompt_ids(plain("", line)) for line in (instruction, ""))
    head, tail = _shared(ids, empty), _shared(ids[::-1], empty[::-1])
    tail = min(tail, len(ids) - head)
    closing = min(_shared(empty[::-1], bare[::-1]), tail)
    classes = [TEMPLATE] * head + [PROMPT] * (len(ids) - head - tail) + [INSTRUCTION] * (tail - closing) + [TEMPLATE] * closing
    classes[0] = START
    return (*classes, *[REPLY] * len(sample.replies[label]))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def read(
    model: Model,
    directions: Directions,
    groups: Sequence[Group],
    bank: Bank,
    labels: Sequence[str],
    described: Described,
    targets: Targets | None,
    seed: int,
) -> Readings:
    """Reads every prompt with its replies.

    Args:
        groups: with a reply in each of the labels, the first of which are the directions' emotions; targets: heads that edges lead to.

    Raises:
        DataError: if a prompt with its reply does not fit the context. ModelError: if the model does not show its attention.
    """
    shape, n, entries = model.shape, len(directions.emotions), len(described.heads)
    heads = (shape.n_layers, shape.n_heads)
    found = Readings(
        [],
        tuple(labels),
        torch.zeros(len(labels), *heads, len(CLASSES)),
        torch.zeros(*heads, len(CLASSES)),
        torch.zeros(len(CLASSES)),
        torch.zeros(len(CLASSES)),
        torch.zeros(len(groups), len(labels), n, *heads),
        torch.zeros(entries, model.shape.d_vocab),
        torch.zeros(model.shape.d_vocab),
        Paths.empty(model, targets, n) if targets else None,
    )
    draw = random.Random(f"heads/{seed}")
    v_mid = directions.at(RESID_MID).to(model.device).float()
    sites = [Site(layer, kind) for layer in range(shape.n_layers) for kind in (Z, ATTN_OUT)]
    with bar("read (prompts)", len(groups)) as advance:
        for index, group in enumerate(groups):
            sample = tokenize_group(model, group, "reply", labels, bank[group.key], directions.instruction)
            rows, places = rows_and_places(model, sample)
            texts = [_text(model, group, directions.instruction, sample, index, label, *places[label]) for label in range(len(labels))]
            batch = make_batch(model, rows)
            seen = see(model, batch.ids, batch.mask, batch.positions, sites)
            _look(found, seen, texts)
            z = torch.stack([batch.average(seen.values[Site(layer, Z)]).float() for layer in range(shape.n_layers)], dim=1)
            found.contributions[index] = head_contributions(model, z[:, None], v_mid[None]).cpu()
            _follow_tokens(found, seen, texts, described)
            if found.paths is not None and targets is not None:
                found.paths.add(followed(model, seen, batch, targets), draw.sample(range(n), n))
            found.texts += texts
            advance(1)
    for total in (found.attention, found.at_start, found.even, found.even_at_start):
        total /= len(groups)
    if found.paths is not None:
        found.paths.divide(len(groups))
    return found


def rows_and_places(model: Model, sample: Sample) -> tuple[list[TokenRow], list[tuple[int, tuple[int, ...]]]]:
    """The sequences of a prompt with its replies, packed into one where the model's window holds it, and for each reply its row and where
    its tokens, prompt and all, stand in it."""
    packed = sample.packs and (model.window is None or sample.cost < model.window)
    rows = rows_of(sample, packed)
    if not packed:
        return rows, [(label, tuple(range(len(row.ids)))) for label, row in enumerate(rows)]
    segments = rows[0].segments
    return rows, [(0, tuple(i for i, s in enumerate(segments) if s in (0, label + 1))) for label in range(len(sample.replies))]


def _text(model: Model, group: Group, instruction: str, sample: Sample, index: int, label: int, row: int, places: tuple[int, ...]) -> Text:
    ids, classes = sample.prompts[label] + sample.replies[label], token_classes(model, group, instruction, sample, label)
    return Text(index, label, ids, len(sample.prompts[label]), classes, row, places)


def class_shares(pattern: Tensor, classes: Sequence[int], queries: Sequence[int]) -> Tensor:
    """Attention by class, a query's own position apart.

    Args:
        pattern: [head, query, key], of the queries alone and of all tokens; queries: which tokens the queries are.

    Returns:
        [head, query, class].
    """
    rows, own = pattern.float().clone(), torch.arange(len(queries), device=pattern.device)
    where = torch.tensor(queries, device=pattern.device)
    itself = rows[:, own, where].clone()
    rows[:, own, where] = 0
    onehot = torch.nn.functional.one_hot(torch.tensor(classes, device=pattern.device), len(CLASSES)).float()
    shares = rows @ onehot
    shares[..., ITSELF] = itself
    return shares


def pattern_of(seen: Seen, layer: int, text: Text, heads: slice | list[int] = slice(None)) -> Tensor:
    """Where heads look in one text: [head, query, key], its read positions by its tokens."""
    places = torch.tensor(text.places, device=seen.patterns[layer].device)
    return seen.patterns[layer][text.row, heads][:, places[text.queries]][:, :, places].float()


def _look(found: Readings, seen: Seen, texts: Sequence[Text]) -> None:
    """Adds where the heads look in the texts of one prompt."""
    for text in texts:
        for layer in range(len(seen.patterns)):
            shares = class_shares(pattern_of(seen, layer, text), text.classes, text.queries).cpu()
            found.attention[text.label, layer] += shares.mean(1)
            if text.label == 0:
                found.at_start[layer] += shares[:, 0]
        even = torch.ones(1, len(text.ids), len(text.ids)).tril() / torch.arange(1, len(text.ids) + 1)[:, None]
        shares = class_shares(even[:, text.queries], text.classes, text.queries)[0]
        found.even += shares.mean(0) / len(texts)
        if text.label == 0:
            found.even_at_start += shares[0]


def _follow_tokens(found: Readings, seen: Seen, texts: Sequence[Text], described: Described) -> None:
    """Adds what the described heads do position by position: along their directions, and which tokens they look at."""
    d_head = described.direction.shape[-1]
    for text in texts:
        where = torch.tensor(text.queries)
        keys = torch.tensor([j for j, kind in enumerate(text.classes) if kind in (PROMPT, INSTRUCTION, REPLY)])
        ids = torch.tensor(text.ids)[keys]
        earlier = (where[:, None] > keys[None]).float()  # a look at itself is no look
        found.chances.index_add_(0, ids, earlier.sum(0))
        read = [text.places[i] for i in text.queries]
        course = torch.zeros(len(described.heads), len(read))
        for entry, head in enumerate(described.heads):
            z = seen.values[Site(head.layer, Z)][text.row, read].float()
            course[entry] = (z[:, head.index * d_head : (head.index + 1) * d_head] @ described.direction[entry].to(z)).cpu()
            pattern = pattern_of(seen, head.layer, text, [head.index])[0].cpu()
            found.looks[entry].index_add_(0, ids, (pattern[:, keys] * earlier).sum(0))
        found.courses.append(course)
