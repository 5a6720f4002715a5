"""What is measured of a reply, as tables [prompt, emotion] that `bootstrap` takes; NaN where no judge said anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emosteer.circuits.methods import NONE
from emosteer.generation.fluency import EMPTY_NLL
from emosteer.judges.jury import Jury
from emosteer.judges.panel import UNDECIDED, Reading, krippendorff_alpha, pairwise_agreement
from emosteer.judges.protocol import ANSWERED, LABELS, Encoder, Opinion
from emosteer.judges.soundness import repetition
from emosteer.scenarios.contamination import FOLDS, Text, contamination
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.scripts import words
from emosteer.scenarios.words import name_pattern, stem_pattern
from emosteer.writing.contest_writer import Cell
from emosteer.writing.resumable import Row

Table = dict[str, Tensor]


def judged_rows(cells: Sequence[Cell], replies: Sequence[Row], jury: Jury, what: str) -> list[Row]:
    """Replies with what the jury says of them: the lines of test-replies.jsonl. judged: the panel's label, neutral included; opinions: each
    judge's; probabilities: their mean; answers: how probable it is that the reply answers its prompt."""
    texts = list(dict.fromkeys(reply["text"] for reply in replies))
    readings, verdicts = jury.readings(texts, what), jury.verdicts(texts, what)
    pairs = [(cell.group.said, reply["text"]) for cell, reply in zip(cells, replies, strict=True)]
    answering = jury.answering(pairs, what)
    rows = []
    for cell, reply in zip(cells, replies, strict=True):
        reading, verdict, key = readings[reply["text"]], verdicts[reply["text"]], cell.group.key
        rows.append(
            {
                "id": f"{key}/{cell.emotion}",
                "skeleton_id": key.scenario,
                "valence": key.valence,
                "theme": cell.group.theme,
                "kind": cell.group.kind,
                "emotion": cell.emotion,
                "method": cell.method,
                "strength": cell.strength,
                "prompt": cell.group.said,
                **{name: reply[name] for name in ("text", "finish_reason", "n_tokens", "nll")},
                "probabilities": reading.probabilities,
                "opinions": reading.row(),
                "judged": reading.label,
                "answers": answering[cell.group.said, reply["text"]],
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
    """The figures of one reply.

    good: the panel reads the target, and the reply is sound, answers its prompt and does not name the emotion; emotion: the panel reads
    the target, neutral allowed; accuracy: the emotion with the highest mean probability, neutral left out, is the target (how replies
    were counted before there was a panel: it takes any trace of style for the emotion); probability: the mean P(target).
    """
    text, shares = row["text"], row["probabilities"]
    named, answers = bool(stem_pattern(target).search(text)), row["answers"] >= ANSWERED
    judged = dict.fromkeys(("good", "emotion", "accuracy", "probability"), float("nan"))
    if shares is not None:
        among = [shares.get(emotion, 0.0) for emotion in emotions]
        share = among[emotions.index(target)]
        carries = row["judged"] == target
        judged = {
            "good": float(carries and row["sound"] and answers and not named),
            "emotion": float(carries),
            "accuracy": float(share > 0 and among.index(max(among)) == emotions.index(target)),
            "probability": share,
        }
    return {
        **judged,
        "answers": float(answers),
        "nll": EMPTY_NLL if row["nll"] is None else row["nll"],
        "names": float(named),
        "synonyms": float(bool(name_pattern(target).search(text))),
        "sound": float(row["sound"]),
        "repetition": repetition(words(text)),
        "unfinished": float(row["finish_reason"] == "length"),
        "n_tokens": float(row["n_tokens"]),
    }


def kept_tables(rows: Mapping[str, Sequence[Row]], groups: Sequence[Group], emotions: Sequence[str], encoder: Encoder) -> dict[str, Tensor]:
    """How much of the content was kept, by method: cosine with the unsteered reply [group, emotion]."""
    plain = {_group(row): row["text"] for row in rows[NONE]}
    texts = list(dict.fromkeys(row["text"] for lines in rows.values() for row in lines))
    place, vectors = {text: i for i, text in enumerate(texts)}, encoder(texts).double()
    tables: dict[str, Tensor] = {}
    for method, lines in rows.items():
        reply = {(*_group(row), row["emotion"]): vectors[place[row["text"]]] for row in lines}
        kept = torch.full((len(groups), len(emotions)), float("nan"), dtype=torch.float64)
        for g, group in enumerate(groups):
            key = group.key.scenario, group.key.valence
            own = torch.stack([reply[(*key, NONE if (*key, NONE) in reply else emotion)] for emotion in emotions])
            kept[g] = own @ vectors[place[plain[key]]]
        tables[method] = kept
    return tables


def _group(row: Row) -> tuple[str, str]:
    return row["skeleton_id"], row["valence"]


def judge_shares(rows: Sequence[Row], emotions: Sequence[str]) -> dict[str, float | None]:
    """Judge's name -> share of the replies in which it alone reads the target, neutral allowed. An unsteered reply counts for every
    emotion. None where the judge said nothing of any."""
    shares: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row["opinions"]):
        hits = []
        for row in rows:
            given = row["opinions"].get(name)
            if given is not None:
                label = max(given, key=lambda one: given[one])
                hits.append(label == row["emotion"] if row["emotion"] != NONE else (label in emotions) / len(emotions))
        shares[name] = round(sum(hits) / len(hits), 6) if hits else None
    return shares


def contamination_of(rows: Sequence[Row]) -> Row | None:
    """How far the subject gives the emotion of replies away (`scenarios.contamination`); None for unsteered replies and where there are
    too few prompts."""
    texts = [Text(row["text"], row["emotion"], f"{row['skeleton_id']}/{row['valence']}") for row in rows if row["emotion"] != NONE]
    if len({text.group for text in texts}) < FOLDS or len({text.emotion for text in texts}) < 2:
        return None
    measured = contamination(texts)
    return {
        **{name: round(getattr(measured, name), 6) for name in ("accuracy", "subject", "chance")},
        "by_emotion": {emotion: round(share, 6) for emotion, share in measured.by_emotion.items()},
        "overused": {emotion: [vars(word) for word in words] for emotion, words in measured.overused.items()},
        "phrases": {emotion: round(share, 6) for emotion, share in measured.phrases.items()},
        "n": measured.n,
    }


def agreement_of(rows: Sequence[Row]) -> Row:
    """How far the judges agree over the replies: Krippendorff's alpha, shares of equal labels by pair, share without a majority."""
    votes = {row["text"]: Reading({name: Opinion(shares) for name, shares in row["opinions"].items()}) for row in rows}
    ratings = [reading.votes for reading in votes.values()]
    names = sorted({name for row in ratings for name in row})
    alpha = krippendorff_alpha([[row.get(name) for name in names] for row in ratings])
    undecided = [reading.majority == UNDECIDED for reading in votes.values()]
    return {
        "judges": names,
        "alpha": None if alpha is None else round(alpha, 4),
        "pairs": {f"{a} - {b}": round(share, 4) for (a, b), share in pairwise_agreement(ratings).items()},
        "undecided": round(sum(undecided) / len(undecided), 4) if undecided else None,
        "n": len(ratings),
    }


def confusion(rows: Sequence[Row], emotions: Sequence[str]) -> dict[str, dict[str, float]]:
    """Target -> judged label, neutral included -> share of the judged replies. An unsteered reply stands in every target's row; a target
    of which nothing was judged has none."""
    labels, found = (*emotions, *(label for label in (*LABELS, UNDECIDED) if label not in emotions)), {}
    for target in emotions:
        judged = [row["judged"] for row in rows if row["emotion"] in (target, NONE) and row["judged"] is not None]
        if judged:
            found[target] = {label: round(judged.count(label) / len(judged), 6) for label in labels}
    return found
