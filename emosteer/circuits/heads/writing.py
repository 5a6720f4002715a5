"""What heads write, in words: vectors of the stream as changes of the logits, the final norm's scale apart.

This is the direct path to the logits alone. What early layers write mostly works through later ones, so a list of tokens that says nothing
is no proof that a head does nothing; and a list that says something has to be held against what random outputs of the same head give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.models.architecture import before_norm
from emosteer.models.model import Model
from emosteer.models.sites import Head
from emosteer.scenarios.scenarios import Bank, Group
from emosteer.scenarios.words import name_pattern, stem_pattern

#: Rows of the unembedding that are worked on at a time, and pseudo-counts of a token in the comparison of the bank's words.
_CHUNK, _PRIOR = 8192, 1.0
#: Tokens that a label of the bank uses more than the others, at most.
BANK_TOKENS = 60
_WORD_STARTS = ("\u0120", "\u2581")


@torch.no_grad()
def logit_changes(model: Model, vectors: Tensor) -> Tensor:
    """How far vectors of the stream raise every token's logit directly, less the mean over tokens, in standard deviations over tokens.

    Args:
        vectors: [n, d_model].

    Returns:
        [n, d_vocab], float32.
    """
    weight, parts = model.unembedding.weight, []
    for start in range(0, len(weight), _CHUNK):
        rows = before_norm(model.family, model.final_norm, weight[start : start + _CHUNK].to(model.device).float())
        parts.append(vectors.to(rows) @ rows.T)
    changes = torch.cat(parts, dim=-1)[:, : model.shape.d_vocab]
    changes -= changes.mean(-1, keepdim=True)
    return (changes / changes.std(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).cpu()


def written(model: Model, heads: Sequence[Head], outputs: Tensor) -> Tensor:
    """What outputs of heads [n, ..., d_head] write into the stream [n, ..., d_model]."""
    return torch.stack([z.to(model.device).float() @ model.w_o(h.layer)[h.index].float() for h, z in zip(heads, outputs, strict=True)])


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens as people see them. texts: token -> text; listed: those that may stand in a list, words of two letters and more; names:
    [emotion] -> tokens that are its name in one of its forms; words: [emotion] -> its names and synonyms; bank: [emotion] -> tokens that
    its replies use more than the others'."""

    texts: dict[int, str]
    listed: Tensor
    names: tuple[frozenset[int], ...]
    words: tuple[Tensor, ...]
    bank: tuple[Tensor, ...]


def vocabulary(model: Model, emotions: Sequence[str], groups: Sequence[Group], bank: Bank) -> Vocabulary:
    """The tokens of a model, and which of them belong to the emotions. Lists hold tokens that begin a word, where the tokenizer says so.

    Args:
        groups, bank: whose replies are compared.
    """
    known = dict(model.token_texts)
    patterns = [(stem_pattern(emotion), name_pattern(emotion)) for emotion in emotions]
    names = tuple(frozenset(token for token, text in known.items() if stem.fullmatch(text)) for stem, _ in patterns)
    words = tuple(torch.tensor([t for t, text in known.items() if name.fullmatch(text)], dtype=torch.long) for _, name in patterns)
    pieces = model.tokenizer.convert_ids_to_tokens(list(known))
    starts = {token for token, piece in zip(known, pieces, strict=True) if piece is not None and str(piece).startswith(_WORD_STARTS)}
    letters = [token for token, text in known.items() if len(text) > 1 and text[0].isalpha() and "\ufffd" not in text]
    listed = torch.zeros(model.shape.d_vocab, dtype=torch.bool)
    listed[[token for token in letters if token in starts or not starts]] = True
    return Vocabulary(known, listed, names, words, bank_tokens(model, emotions, groups, bank))


def bank_tokens(model: Model, emotions: Sequence[str], groups: Sequence[Group], bank: Bank) -> tuple[Tensor, ...]:
    """Tokens of an emotion's replies by log odds against those of the other emotions, in standard errors: the highest, from 2 on."""
    counts = torch.zeros(len(emotions), model.shape.d_vocab, dtype=torch.float64)
    for group in groups:
        for e, reply in enumerate(bank[group.key][emotion] for emotion in emotions):
            counts[e] += torch.bincount(torch.tensor(model.text_ids(reply), dtype=torch.long), minlength=model.shape.d_vocab)
    seen = counts.sum(0)
    own, other = counts + _PRIOR, seen - counts + _PRIOR
    odds = (own / (own.sum(-1, keepdim=True) - own)).log() - (other / (other.sum(-1, keepdim=True) - other)).log()
    z = (odds / (1 / own + 1 / other).sqrt()).masked_fill(seen < 3, 0.0)
    best = z.topk(min(BANK_TOKENS, z.shape[-1]))
    return tuple(tokens[values > 2] for tokens, values in zip(best.indices, best.values, strict=True))


def ends(changes: Tensor, vocab: Vocabulary, emotion: int, count: int) -> dict[str, list[list[object]]]:
    """The tokens that a vector promotes and suppresses most: [text, standard deviations, whether it is the emotion's name]; one spelling of
    each."""
    return {"promoted": _end(changes, vocab, emotion, count), "suppressed": _end(-changes, vocab, emotion, count, -1.0)}


def _end(changes: Tensor, vocab: Vocabulary, emotion: int, count: int, sign: float = 1.0) -> list[list[object]]:
    rows: dict[str, list[object]] = {}
    for token in changes.masked_fill(~vocab.listed, -torch.inf).topk(min(8 * count, len(changes))).indices.tolist():
        text = vocab.texts.get(token, "")
        if vocab.listed[token] and text.lower() not in rows and len(rows) < count:
            rows[text.lower()] = [text, round(sign * changes[token].item(), 2), token in vocab.names[emotion]]
    return list(rows.values())


def lift(changes: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Mean change of the tokens of each group. changes: [n, d_vocab]; returns [n, group], 0 for a group without tokens."""
    return torch.stack([changes[:, group].mean(-1) if len(group) else torch.zeros(len(changes)) for group in groups], dim=-1)
