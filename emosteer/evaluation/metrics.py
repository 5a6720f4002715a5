"""What is measured of a reply, as tables [scenario-event, emotion] that `resampling` takes; NaN where a judge said nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.circuits.methods import NONE
from emosteer.generation.fluency import EMPTY_NLL
from emosteer.judges.jury import Jury
from emosteer.judges.protocol import LABELS, Encoder
from emosteer.judges.soundness import repetition
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.words import name_pattern, stem_pattern
from emosteer.writing.contest_writer import Cell
from emosteer.writing.resumable import Row

#: A reply is on topic if it is nearer to its own prompt than to at least this share of as many other prompts.
ON_TOPIC_SHARE, ON_TOPIC_OTHERS = 0.9, 10

Table = dict[str, Tensor]


def judged_rows(cells: Sequence[Cell], replies: Sequence[Row], jury: Jury, what: str) -> list[Row]:
    """Replies with what the judges say of them: the lines of test-replies.jsonl. judged: the likeliest label, neutral included."""
    texts = list(dict.fromkeys(reply["text"] for reply in replies))
    opinions, verdicts = jury.opinions(texts, what), jury.verdicts(texts, what)
    rows = []
    for cell, reply in zip(cells, replies, strict=True):
        opinion, verdict, key = opinions[reply["text"]], verdicts[reply["text"]], cell.group.key
        rows.append(
            {
                "id": f"{key}/{cell.emotion}",
                "skeleton_id": key.scenario,
                "valence": key.valence,
                "theme": cell.group.theme,
                "emotion": cell.emotion,
                "method": cell.method,
                "strength": cell.strength,
                "prompt": cell.group.text,
                **{name: reply[name] for name in ("text", "finish_reason", "n_tokens", "nll")},
                "probabilities": None if opinion.probabilities is None else dict(opinion.probabilities),
                "judged": opinion.emotion(),
                "sound": verdict.sound,
                "reasons": list(verdict.reasons),
            }
        )
    return rows


def table_of(rows: Sequence[Row], groups: Sequence[Group], emotions: Sequence[str]) -> Table:
    """Metric -> [group, emotion]. Unsteered replies, one per group, count for every emotion as if it had been the target.

    Args:
        rows: of one method, one per group and emotion (or per group), in any order.
    """
    place = {(row["skeleton_id"], row["valence"], row["emotion"]): row for row in rows}
    values = []
    for group in groups:
        key = group.key.scenario, group.key.valence
        own = [place.get((*key, emotion)) or place[*key, NONE] for emotion in emotions]
        values.append([measure(row, emotion, emotions) for row, emotion in zip(own, emotions, strict=True)])
    return {name: torch.tensor([[cell[name] for cell in line] for line in values], dtype=torch.float64) for name in values[0][0]}


def measure(row: Mapping[str, Any], target: str, emotions: Sequence[str]) -> dict[str, float]:
    """The figures of one reply. accuracy: whether the likeliest emotion, neutral left out, is the target; match: P(target) >= 0.5."""
    text, shares = row["text"], row["probabilities"]
    nan = float("nan")
    judged = {"accuracy": nan, "match": nan, "probability": nan}
    if shares is not None:
        among = [shares.get(emotion, 0.0) for emotion in emotions]
        share = among[emotions.index(target)]
        judged = {"accuracy": float(share > 0 and among.index(max(among)) == emotions.index(target)), "match": float(share >= 0.5)}
        judged["probability"] = share
    return {
        **judged,
        "nll": EMPTY_NLL if row["nll"] is None else row["nll"],
        "names": float(bool(stem_pattern(target).search(text))),
        "synonyms": float(bool(name_pattern(target).search(text))),
        "sound": float(row["sound"]),
        "repetition": repetition(re.findall(r"\w+", text.lower())),
        "unfinished": float(row["finish_reason"] == "length"),
        "n_tokens": float(row["n_tokens"]),
    }


def content_tables(
    rows: Mapping[str, Sequence[Row]], groups: Sequence[Group], emotions: Sequence[str], encoder: Encoder, seed: int
) -> dict[str, Table]:
    """What became of the content, by method. on_topic: whether the reply is nearer to its own prompt than to 9 of 10 prompts of other
    scenarios, the same ten for all methods (NaN where there is no other scenario); kept: cosine with the unsteered reply."""
    prompts, plain = [group.text for group in groups], {_group(row): row["text"] for row in rows[NONE]}
    texts = list(dict.fromkeys([*prompts, *(row["text"] for some in rows.values() for row in some)]))
    place, vectors = {text: i for i, text in enumerate(texts)}, encoder(texts).double()
    others = [_others(groups, group, seed) for group in groups]
    tables: dict[str, Table] = {}
    for method, some in rows.items():
        reply = {(*_group(row), row["emotion"]): vectors[place[row["text"]]] for row in some}
        on_topic, kept = torch.full((2, len(groups), len(emotions)), float("nan"), dtype=torch.float64)
        for g, group in enumerate(groups):
            key = group.key.scenario, group.key.valence
            own = torch.stack([reply[(*key, NONE if (*key, NONE) in reply else emotion)] for emotion in emotions])
            kept[g] = own @ vectors[place[plain[key]]]
            if others[g]:
                nearer = own @ vectors[place[group.text]][:, None] > own @ torch.stack([vectors[place[text]] for text in others[g]]).T
                on_topic[g] = (nearer.double().mean(1) >= ON_TOPIC_SHARE - 1e-9).double()
        tables[method] = {"on_topic": on_topic, "kept": kept}
    return tables


def _group(row: Row) -> tuple[str, str]:
    return row["skeleton_id"], row["valence"]


def _others(groups: Sequence[Group], group: Group, seed: int) -> list[str]:
    """Prompts of other scenarios; another event of the same one would be hardly told apart."""
    known = [other.text for other in groups if other.key.scenario != group.key.scenario]
    return random.Random(f"on-topic/{seed}/{group.key}").sample(known, min(ON_TOPIC_OTHERS, len(known)))


def confusion(rows: Sequence[Row], emotions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Target -> judged label, neutral included -> share of the judged replies. An unsteered reply stands in every target's row."""
    labels, found = (*emotions, *(label for label in LABELS if label not in emotions)), {}
    for target in emotions:
        judged = [row["judged"] for row in rows if row["emotion"] in (target, NONE) and row["judged"] is not None]
        found[target] = {label: round(judged.count(label) / len(judged), 6) if judged else 0.0 for label in labels}
    return found
