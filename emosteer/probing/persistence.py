"""How long an emotion can be read after its passage: the same probe among neutral tokens, beside what words alone tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.directions.activations import TokenRow
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.probing import training
from emosteer.probing.measures import share
from emosteer.probing.reading import frame, read_shards, text_row
from emosteer.probing.settings import ProbeSettings
from emosteer.probing.texts import Texts
from emosteer.scenarios.contamination import likeliest, log_shares
from emosteer.scenarios.emotions import NEUTRAL
from emosteer.scenarios.scenarios import data_path, read_bank
from emosteer.scenarios.scripts import words
from emosteer.scenarios.shipped import BANK
from emosteer.scenarios.splits import stable_share

#: Positions at the end of what was read that a probe reads the mean of.
WINDOW = 8
#: Different runs of neutral text; which of them a text gets says nothing of its label.
FILLERS = 8


def neutral_tokens(model: Model, count: int, seed: int) -> list[list[int]]:
    """Runs of neutral text as tokens: neutral replies of the shipped bank in an order of each run's own. Shape [run, token]."""
    replies = sorted(reply for row in read_bank(data_path(BANK)).values() for label, reply in row.items() if label == NEUTRAL)
    runs = []
    for run in range(FILLERS):
        ids: list[int] = []
        for reply in sorted(replies, key=lambda reply: stable_share(f"filler/{run}/{reply}", seed)):
            if len(ids) >= count:
                break
            ids += model.text_ids(f" {reply}")
        runs.append(ids[:count])
    return runs


def rows_after(model: Model, texts: Sequence[str], longest: int, distances: Sequence[int], seed: int) -> list[TokenRow]:
    """Each text with neutral text behind it, read over the last `WINDOW` positions up to every distance. At distance 0 these are the
    passage's own last tokens; from `WINDOW` on, all of them are neutral."""
    before, fillers = frame(model), neutral_tokens(model, max(distances), seed)
    rows = []
    for text in texts:
        row = text_row(model, before, text, "last", longest)
        filler = fillers[int(stable_share(f"filler of/{text}", seed) * FILLERS)]
        size, end = len(row.ids) + len(filler), len(row.ids)
        reads = tuple(tuple(range(max(end + distance - WINDOW, len(before)), end + distance)) for distance in distances)
        rows.append(TokenRow((*row.ids, *filler), tuple(range(size)), (0,) * size, reads))
    return rows


def persistence(
    model: Model, texts: Texts, chosen: Sequence[int], site: Site, decay: float, folder: Path, settings: ProbeSettings
) -> dict[str, Any]:
    """Accuracy by distance, every text read by probes that were fitted to other groups' texts.

    Args:
        chosen: the texts that are followed, of two groups at least; site: where they are read; decay: the penalty.

    Returns:
        distances, texts, window, and per distance with intervals: "fitted" (a probe fitted at the distance), "transferred" (the one fitted
        at distance 0), "shuffled" (fitted at the distance to shuffled labels), "lexical" (naive Bayes on the words that the window holds).
        Distance 0 is there whether it was asked for or not.
    """
    room = model.shape.context - len(frame(model)) - settings.longest
    distances = tuple(sorted({0, *(distance for distance in settings.distances if distance <= room)}))
    some = [texts.texts[i] for i in chosen]
    groups = [text.group for text in some]
    rows = rows_after(model, [text.text for text in some], settings.longest, distances, settings.seed)
    names = [f"after {distance}" for distance in distances]
    place = folder / "-".join(map(str, distances))  # states at other distances are others
    states = read_shards(model, rows, [site], place, budget=settings.batch_tokens, names=names, described="follow (texts)")
    labels = torch.tensor([texts.labels.index(text.label) for text in some])
    held = held_out(groups, settings.folds + 1, settings.seed)  # the more is fitted to, the better; no text is set aside here
    n_folds = len(held)
    dealt = torch.stack([labels, training.shuffled(labels, torch.ones(len(labels), dtype=torch.bool), settings.seed)])
    runs = training.Runs(dealt.repeat_interleave(n_folds, 0), (~held).float().repeat(2, 1), torch.full((1, 2 * n_folds), decay))
    readers, curves = [], []
    for name in names:
        readers.append(training.fit(_of(states, name), runs, len(texts.labels), epochs=settings.epochs, seed=settings.seed))
        own = _cross_fitted(readers[-1], _of(states, name), held)
        first = _cross_fitted(readers[0], _of(states, name), held)
        curves.append({"fitted": own[0] == labels, "shuffled": own[1] == labels, "transferred": first[0] == labels})
    lexical = _lexical(model, rows, labels, held, len(texts.labels))
    points = []
    for distance, hits, words_alone in zip(distances, curves, lexical, strict=True):
        told = {name: share(hit.double().tolist(), groups) for name, hit in hits.items()}
        points.append({"distance": distance, **told, "lexical": share(words_alone, groups)})
    return {"texts": len(some), "window": WINDOW, "site": str(site), "longest": room, "points": points}


def held_out(groups: Sequence[str], n_folds: int, seed: int) -> Tensor:
    """Which texts each fold holds out: whole groups, drawn, or dealt by turns where the draw would hold out all of them at once and leave
    nothing to fit to. Shape [fold, text], folds without a text left out.

    Args:
        groups: by text, two different ones at least.
    """
    drawn = {group: stable_share(f"follow/{group}", seed) for group in groups}
    folds = {group: min(int(place * n_folds), n_folds - 1) for group, place in drawn.items()}
    if len(set(folds.values())) == 1:
        folds = {group: place % n_folds for place, group in enumerate(sorted(drawn, key=lambda group: drawn[group]))}
    return torch.tensor([[folds[group] == fold for group in groups] for fold in sorted(set(folds.values()))])


def _of(states: Any, name: str) -> training.Shards:
    return lambda: states.shards(name)


def _cross_fitted(fitted: training.Fitted, shards: training.Shards, held: Tensor) -> Tensor:
    """What each text is read as by the run that did not see it, with true and with shuffled labels. Shape [2, text]."""
    everything = torch.ones(held.shape[1], dtype=torch.bool)
    read = training.probabilities(shards, fitted, everything)[0].argmax(-1).unflatten(0, (2, len(held)))
    return read.gather(1, held.long().argmax(0).expand(2, 1, -1))[:, 0]


def _lexical(model: Model, rows: Sequence[TokenRow], labels: Tensor, held: Tensor, n_labels: int) -> list[list[float]]:
    """Per distance the hits of naive Bayes on which words the window holds, ties shared, fitted to the other folds."""
    found = []
    for place in range(len(rows[0].reads)):
        said = [frozenset(words(str(model.tokenizer.decode([row.ids[p] for p in row.reads[place]])).lower())) for row in rows]
        hits = [0.0] * len(rows)
        for fold in held:
            fitted = (~fold).nonzero()[:, 0].tolist()
            scores = log_shares([str(int(labels[i])) for i in fitted], [said[i] for i in fitted], [str(n) for n in range(n_labels)])
            for i in fold.nonzero()[:, 0].tolist():
                best = likeliest(said[i], scores, n_labels)
                hits[i] = (int(labels[i]) in best) / len(best)
        found.append(hits)
    return found
