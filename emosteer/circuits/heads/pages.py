"""One page for each described head: plain values, ready to be kept and shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from emosteer.base.seeds import torch_seed
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.paths import Targets, contrast, edges_into
from emosteer.circuits.heads.reading import Described, Readings
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.heads.writing import Vocabulary, ends, lift, logit_changes, written
from emosteer.directions.directions import Directions
from emosteer.models.model import Model
from emosteer.models.sites import RESID_MID
from emosteer.models.tokens import raw_text
from emosteer.scenarios.scenarios import Group

#: Looks that a token must have been open to before its mean attention is told, and heads that a head reads most from.
LEAST_CHANCES, READS = 100, 8


def make_pages(
    model: Model,
    circuit: Circuit,
    directions: Directions,
    readings: Readings,
    described: Described,
    groups: Sequence[Group],
    vocab: Vocabulary,
    length: Tensor,
    targets: Targets | None,
    settings: HeadSettings,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The pages, and the texts that they show.

    Args:
        groups: those that were read; length: [emotion, layer, head].
    """
    n, shape = len(circuit.emotions), model.shape
    added, own = (_outputs(table, described, shape.d_head) for table in (circuit.z_delta, directions.z.mean))
    vectors = {name: written(model, described.heads, z) for name, z in (("added", added), ("own", own))}
    draw = torch.randn(
        len(described.heads), settings.random, shape.d_head, generator=torch.Generator().manual_seed(torch_seed(settings.seed + 1))
    )  # the same for every kind of lift
    changes = {name: logit_changes(model, rows) for name, rows in vectors.items()}
    by_chance = logit_changes(model, written(model, described.heads, draw).flatten(0, 1))
    lifts = {kind: _lifts(changes, by_chance, groups_of_tokens, described) for kind, groups_of_tokens in (("words", vocab.words), ("bank", vocab.bank))}  # fmt: skip # noqa: E501
    v_mid = directions.at(RESID_MID).to(vectors["added"])
    sources, reads = _arrivals(model, circuit, readings, described, targets)
    contributions = readings.contributions
    mean = contrast(contributions[:, :n].mean(0))
    shown = _Shown(model, readings, groups)
    pages, ranks = [], [0] * n
    for entry, (e, head) in enumerate(zip(described.emotions, described.heads, strict=True)):
        ranks[e] += 1
        scores = contributions[:, :, e, head.layer, head.index]
        others = [k for k in range(scores.shape[1]) if k != e]
        above = (scores[:, e : e + 1] > scores[:, others]).float() + 0.5 * (scores[:, e : e + 1] == scores[:, others]).float()
        pages.append(
            {
                "emotion": circuit.emotions[e],
                "layer": head.layer,
                "head": head.index,
                "rank": ranks[e],
                "length": _short(length[e, head.layer, head.index]),
                "contribution": _short(mean[e, e, head.layer, head.index]),
                "told": _short(above.mean()),
                "cosine": _short(cosine_similarity(vectors["added"][entry], vectors["own"][entry], dim=0)),
                "along": _short(cosine_similarity(vectors["added"][entry], v_mid[e, head.layer], dim=0)),
                **{name: ends(changes[name][entry], vocab, e, settings.tokens) for name in ("added", "own")},
                **{kind: found[entry] for kind, found in lifts.items()},
                "looks": _looks(readings, entry, vocab, settings.tokens),
                "fires": shown.fires(entry, scores, settings.texts),
                "sources": sources[entry],
                "reads": reads[entry],
            }
        )
    return pages, shown.texts


def _short(value: Tensor) -> float:
    """Five significant digits."""
    return float(f"{value.item():.5g}")


def _outputs(table: Tensor, described: Described, d_head: int) -> Tensor:
    """A head's part of values by emotion and layer. [emotion, layer, n_heads * d_head] -> [entry, d_head]."""
    heads = table.float().unflatten(-1, (-1, d_head))
    return torch.stack([heads[e, head.layer, head.index] for e, head in zip(described.emotions, described.heads, strict=True)])


def _lifts(changes: dict[str, Tensor], by_chance: Tensor, groups: Sequence[Tensor], described: Described) -> list[dict[str, Any]]:
    found = {name: lift(rows, groups) for name, rows in changes.items()}
    chance = lift(by_chance, groups).unflatten(0, (len(described.heads), -1))
    rows = []
    for entry, e in enumerate(described.emotions):
        row: dict[str, Any] = {name: [_short(value) for value in values[entry]] for name, values in found.items()}
        random = chance[entry, :, e]
        rows.append({**row, "random": _short(random.mean()), "random_high": _short(random.quantile(0.95))})
    return rows


def _looks(readings: Readings, entry: int, vocab: Vocabulary, count: int) -> list[list[Any]]:
    """Tokens of prompts and replies that the head pays most attention to whenever they can be seen: [text, mean attention, chances]."""
    enough = readings.chances >= min(float(LEAST_CHANCES), readings.chances.max().item())
    mean = (readings.looks[entry] / readings.chances.clamp_min(1)).masked_fill(~enough, -1)
    best = mean.topk(min(count, int(enough.sum()))).indices.tolist()
    return [
        [_plain(vocab.texts.get(token, "")) or "\u23b5", _short(mean[token].clamp(0, 1)), int(readings.chances[token])] for token in best
    ]


def _arrivals(
    model: Model, circuit: Circuit, readings: Readings, described: Described, targets: Targets | None
) -> tuple[list[dict[str, float] | None], list[list[list[Any]]]]:
    """For each described head where its contrast comes from directly, and the heads that it reads most from."""
    paths = readings.paths
    if targets is None or paths is None:
        return [None] * len(described.heads), [[] for _ in described.heads]
    edges = contrast(edges_into(model, targets, paths.z))
    parts = contrast(torch.einsum("etsm,tkm->etks", paths.stream, targets.reads.cpu()))
    place = {head: i for i, head in enumerate(targets.heads)}
    sources: list[dict[str, float] | None] = []
    reads = []
    for e, head in zip(described.emotions, described.heads, strict=True):
        into = edges[e, place[head], e]
        embeddings, heads, mlps = parts[e, place[head], e]
        mine = into[circuit.heads[e]].sum()
        sources.append({"embeddings": _short(embeddings), "circuit": _short(mine), "heads": _short(heads - mine), "mlps": _short(mlps)})
        best = into.abs().flatten().topk(min(READS, into.numel())).indices.tolist()
        rows = [(i // into.shape[1], i % into.shape[1]) for i in best if into.flatten()[i] != 0]
        reads.append([[a, b, _short(into[a, b]), bool(circuit.heads[e, a, b])] for a, b in rows])
    return sources, reads


def _plain(text: str) -> str:
    """Text that a file and a terminal take."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class _Shown:
    """The texts that pages show, each kept once."""

    def __init__(self, model: Model, readings: Readings, groups: Sequence[Group]) -> None:
        self._model, self._readings, self._groups = model, readings, groups
        self._places: dict[int, int] = {}
        self.texts: list[dict[str, Any]] = []

    def fires(self, entry: int, scores: Tensor, count: int) -> dict[str, Any]:
        """The texts at both ends of what a head adds, no prompt twice on one end. scores: [group, label]."""
        order = scores.flatten().argsort(descending=True, stable=True).tolist()
        picked = {"most": self._apart(order, scores.shape[1], count), "least": self._apart(order[::-1], scores.shape[1], count)}
        courses = {i: self._readings.courses[i][entry] for numbers in picked.values() for i in numbers}
        peak = max(course.abs().max().item() for course in courses.values())
        rows = {
            end: [
                [self._place(i), _short(scores.flatten()[i]), [round(v / (peak or 1.0), 2) for v in courses[i].tolist()]] for i in numbers
            ]
            for end, numbers in picked.items()
        }
        return {**rows, "peak": float(f"{peak:.5g}")}

    def _apart(self, order: Sequence[int], labels: int, count: int) -> list[int]:
        chosen: list[int] = []
        for number in order:
            if len(chosen) < count and number // labels not in {i // labels for i in chosen}:
                chosen.append(number)
        return chosen

    def _place(self, number: int) -> int:
        if number not in self._places:
            self._places[number] = len(self.texts)
            text = self._readings.texts[number]
            tokens = [_plain(raw_text(self._model.tokenizer, [token])) for token in text.ids[text.first :]]
            said = _plain(self._groups[text.group].text)
            self.texts.append({"label": self._readings.labels[text.label], "prompt": said, "tokens": tokens})
        return self._places[number]
