"""What is fitted beside the judges of emotions: replies that were read, both checks half from them, and how they are measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.judges.answers import Answered
from emosteer.judges.check_training import (
    ReadReply,
    as_often,
    fit_answers,
    fit_soundness,
    measure_answers,
    measure_soundness,
    read_replies,
)
from emosteer.judges.embedded import LinearHead
from emosteer.judges.soundness import FAULTS, SENSE, SOUND, verdicts_of
from emosteer.judges.sources import held_out
from tests.helpers.judge_setup import FILLERS, tiny_encoder


def test_replies_that_were_read_are_held_out_by_their_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "text": f"text {n}", "label": "anger", "answers": n % 3 == 0, "sound": n % 2 == 0} for n in range(60)]
    path = tmp_path / "read.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = read_replies(path)
    assert {reply.pair[1] for reply in replies[True]} == {str(row["text"]) for row in rows if held_out(str(row["text"]))} and replies[True]
    assert {(*reply.pair, reply.answers, reply.sound) for part in replies.values() for reply in part} == {
        (row["prompt"], row["text"], row["answers"], row["sound"]) for row in rows
    }
    (tmp_path / "more.jsonl").write_text(json.dumps({**rows[0], "text": "another"}))
    both = read_replies(path, tmp_path / "more.jsonl")
    assert sum(map(len, both.values())) == 61 and {r.pair[1] for part in both.values() for r in part} > {"another"}
    for wrong in ({"answers": "yes"}, {"sound": None}, {"prompt": 3}, {"text": None}):
        path.write_text(json.dumps({**rows[0], **wrong}))
        with pytest.raises(DataError, match=r"read.jsonl:1: expected 'prompt' and 'text' to be texts, 'answers' and 'sound' true or false"):
            read_replies(path)


@pytest.mark.parametrize(("made", "read", "times"), [(10, 3, 3), (2, 3, 1), (5, 0, 5)])
def test_both_halves_count_alike(made: int, read: int, times: int) -> None:
    assert as_often(made, read).tolist() == [*range(made), *[*range(made, made + read)] * times]


class Told:
    """Says what the reply tells it to."""

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [{"yes": 0.9, "half": 0.5, "no": 0.1}[reply] for _, reply in pairs]


def test_answers_are_measured_by_relation_and_by_reader() -> None:
    pairs = [
        {"prompt": "p", "reply": reply, "relation": relation}
        for relation, replies in {"right": ["yes", "half", "no"], "other-event": ["no", "yes", "no", "no"]}.items()
        for reply in replies
    ]
    read = [ReadReply(("p", "yes"), True, True), ReadReply(("p", "no"), True, True), ReadReply(("p", "no"), False, True)]
    assert measure_answers(Told(), pairs, read) == {  # type: ignore[arg-type]
        "right": {"n": 3, "called_answer": 0.6667},
        "other-event": {"n": 4, "called_answer": 0.25},
        "read: answers": {"n": 2, "called_answer": 0.5},
        "read: does not": {"n": 1, "called_answer": 0.0},
    }


class Shown:
    """Features by the text alone: what the head shall say of it."""

    def features(self, texts: Sequence[str]) -> Tensor:
        foreign = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.9, 0.0])
        fine = torch.tensor([0.95, 0.01, 0.01, 0.0, 0.01, 0.02])
        return torch.stack([foreign if "nada" in text else fine for text in texts]).clamp_min(1e-6).log()


def test_soundness_is_measured_by_fault_and_by_reader() -> None:
    n = 1 + len(FAULTS)
    head = LinearHead((SOUND, *FAULTS), torch.zeros(n), torch.ones(n), torch.eye(n), torch.zeros(n))
    examples = [(SOUND, "we went home."), (SOUND, "no " * 9), ("order", "home went we."), ("language", "nada.")]
    read = [ReadReply(("p", "we went."), True, True), ReadReply(("p", "nada went."), True, False)]
    encoder: Any = Shown()
    assert measure_soundness(head, encoder, examples, read) == {
        SOUND: {"n": 2, "called_unsound": 0.5},  # by the rule for loops, though the head is content
        "order": {"n": 1, "called_unsound": 0.0},
        "language": {"n": 1, "called_unsound": 1.0},
        "read: sound": {"n": 1, "called_unsound": 0.0},
        "read: unsound": {"n": 1, "called_unsound": 1.0},
    }


def test_the_soundness_head_learns_what_readers_call_nonsense() -> None:
    """Planted: nonsense has a word of its own that no broken text has."""
    texts = [f"{' '.join(FILLERS[n % 5 :])} {FILLERS[n % 7]} {FILLERS[n % 3]}" for n in range(90)]
    read = {part: [ReadReply(("we", f"{text} cry"), True, False) for text in texts if held_out(text) == part] for part in (False, True)}
    fine = {part: [ReadReply(("we", f"{text} home"), True, True) for text in texts if held_out(text) == part] for part in (False, True)}
    encoder = tiny_encoder()
    head, measured = fit_soundness(encoder, texts, ["[UNK] nada"], {part: [*read[part], *fine[part]] for part in read})
    assert measured["read: unsound"]["called_unsound"] > 0.9 > 0.3 > measured["read: sound"]["called_unsound"]
    verdict = verdicts_of(head, encoder.features([f"{texts[0]} cry"]), [f"{texts[0]} cry"])[0]
    assert not verdict.sound and SENSE in verdict.reasons
    blind, _ = fit_soundness(encoder, texts, ["[UNK] nada"], {False: fine[False], True: []})
    assert verdicts_of(blind, encoder.features([f"{texts[0]} cry"]), [f"{texts[0]} cry"])[0].reasons != verdict.reasons


def test_the_check_of_answers_learns_from_readers() -> None:
    """Planted: readers call a reply that repeats the prompt no answer, which the banks' replies never teach; without them it passes."""
    names = FILLERS[:7]
    banks = [Answered(f"{one} we {other}", f"{one} {other}", "anger") for one in names for other in names if one != other]
    echo = [ReadReply((f"{one} {other}", f"{one} {other}"), False, True) for one in names for other in names if one != other]
    shown = [(f"{names[0]} {names[1]}", f"{names[0]} {names[1]}")]
    taught, plain = fit_answers(tiny_encoder(), banks, echo), fit_answers(tiny_encoder(), banks, [])
    assert taught.probabilities(shown)[0] < 0.5 < plain.probabilities(shown)[0]
