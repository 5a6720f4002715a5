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
from emosteer.judges.answers import Answered, labelled_pairs
from emosteer.judges.check_training import (
    FACTOR,
    ReadReply,
    as_strict,
    beside_readers,
    boundary,
    drawn,
    factor_together,
    fit_answers,
    fit_soundness,
    folds_of,
    half_each,
    left_out_margins,
    measure_answers,
    measure_soundness,
    read_replies,
    set_by,
)
from emosteer.judges.embedded import LinearHead, fit_head
from emosteer.judges.protocol import LABELS
from emosteer.judges.soundness import FAULTS, SENSE, SOUND, SoundnessHeads, verdicts_of
from emosteer.judges.sources import held_out
from tests.helpers.judge_setup import FEATURES, FILLERS, tiny_encoder


def test_replies_that_were_read_are_held_out_by_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "text": f"text {n}", "label": LABELS[n % 7], "answers": n % 3 == 0, "sound": n % 2 == 0} for n in range(60)]
    path = tmp_path / "read.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = read_replies(path)
    assert {reply.pair[1] for reply in replies[True]} == {str(row["text"]) for row in rows if held_out(str(row["prompt"]))} and replies[
        True
    ]
    assert {(*reply.pair, reply.answers, reply.sound, reply.label) for part in replies.values() for reply in part} == {
        (row["prompt"], row["text"], row["answers"], row["sound"], row["label"]) for row in rows
    }
    kept = next(row for row in rows if not held_out(str(row["prompt"])))
    (tmp_path / "more.jsonl").write_text(json.dumps({**kept, "text": "another", "held_out": True, "method": "circuit"}))
    both = read_replies(path, tmp_path / "more.jsonl")
    assert sum(map(len, both.values())) == 61 and len(both[True]) == len(replies[True]) + 2, "with all replies to its prompt"
    assert {(reply.pair[1], reply.method) for reply in both[True] if reply.pair[0] == kept["prompt"]} == {
        ("another", "circuit"),
        (kept["text"], ""),
    }
    for wrong in ({"answers": "yes"}, {"sound": None}, {"prompt": 3}, {"text": None}):
        path.write_text(json.dumps({**rows[0], **wrong}))
        with pytest.raises(DataError, match=r"read.jsonl:1: expected 'prompt' and 'text' to be texts, 'answers' and 'sound' true or false"):
            read_replies(path)
    for unknown in ("joy", None):
        path.write_text(json.dumps({**rows[0], "label": unknown}))
        with pytest.raises(DataError, match=f"read.jsonl:1: expected 'label' to be one of anger, .*neutral, found '{unknown}'"):
            read_replies(path)


@pytest.mark.parametrize(("made", "read"), [(10, 3), (2, 3), (5, 0), (0, 4)])
def test_both_halves_count_alike(made: int, read: int) -> None:
    counts = half_each(made, read)
    assert len(counts) == made + read and counts[:made].sum() == pytest.approx(float(made > 0))
    assert counts[made:].sum() == pytest.approx(float(read > 0)) and len({*counts[:made].tolist()}) <= 1


def test_counts_are_what_repeating_an_example_would_do() -> None:
    torch.manual_seed(0)
    shown, places = torch.randn(12, 3), torch.arange(12) % 2
    counts = torch.ones(12)
    counts[3] = 4
    repeated = torch.tensor([*range(12), 3, 3, 3])
    once, often = fit_head(shown, places, ("a", "b"), 1e-2, counts=counts), fit_head(shown[repeated], places[repeated], ("a", "b"), 1e-2)
    # the two standardise differently, which the ridge sees a little
    torch.testing.assert_close(once.probabilities(shown), often.probabilities(shown), atol=0.03, rtol=0)
    assert (once.probabilities(shown) - fit_head(shown, places, ("a", "b"), 1e-2).probabilities(shown)).abs().max() > 0.05


def test_no_more_than_so_many_are_drawn_and_always_the_same() -> None:
    assert drawn("abc", 3) == ["a", "b", "c"] and drawn(range(100), 5) == drawn(range(100), 5) and len({*drawn(range(100), 5)}) == 5


def test_a_head_is_set_as_strict_as_the_readers() -> None:
    """The bias alone moves, and the boundary falls between the last text that passes and the first that does not."""
    head = LinearHead(("no", "yes"), torch.zeros(1), torch.ones(1), torch.tensor([[0.0], [1.0]]), torch.zeros(2))
    margins = torch.tensor([3.0, 1.0, 2.0, -1.0, 0.5])
    for least in (0.5, 0.65):
        for wanted in range(6):
            strict = as_strict(head, "yes", margins, torch.arange(5) < wanted, least)
            passed = strict.probabilities(margins[:, None])[:, 1] >= least
            assert passed.sum() == wanted and (not wanted or passed[margins.argsort(descending=True)[:wanted]].all())
            assert torch.equal(strict.weight, head.weight)
    assert as_strict(head, "yes", torch.zeros(0), torch.zeros(0), 0.5) is head


def test_left_out_replies_are_seen_by_heads_that_never_saw_their_prompt() -> None:
    torch.manual_seed(0)
    shown, seen = torch.randn(9, 2), list[list[bool]]()

    def fit(rows: Tensor) -> LinearHead:
        seen.append(rows.tolist())
        return LinearHead(("no", "yes"), torch.zeros(2), torch.ones(2), torch.tensor([[0.0, 0.0], [1.0, float(len(seen))]]), torch.zeros(2))

    head, margins = left_out_margins(fit, shown, "yes", [0, 2, 0, 2, 2, 0], 6)
    assert seen == [[True] * 9, [True] * 3 + [False, True, False, True, True, False], [True] * 3 + [True, False, True, False, False, True]]
    assert head.weight[1, 1] == 1
    expected = [shown[3 + i] @ torch.tensor([1.0, 2.0 if fold == 0 else 3.0]) for i, fold in enumerate([0, 2, 0, 2, 2, 0])]
    torch.testing.assert_close(margins, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_a_prompt_is_in_one_fold() -> None:
    read = [ReadReply((f"p{n % 9}", f"t{n}"), True, True) for n in range(40)]
    folds = folds_of(read)
    assert {(reply.pair[0], fold) for reply, fold in zip(read, folds, strict=True)} == {(f"p{n}", folds[n]) for n in range(9)}
    assert len({*folds}) > 2


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
        foreign = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.9])
        fine = torch.tensor([0.95, 0.02, 0.01, 0.01, 0.01])
        return torch.stack([foreign if "nada" in text else fine for text in texts]).clamp_min(1e-6).log()


def content(width: int) -> LinearHead:
    """A head that finds sense in everything."""
    return LinearHead((SOUND, SENSE), torch.zeros(width), torch.ones(width), torch.zeros(2, width), torch.tensor([9.0, 0.0]))


def test_soundness_is_measured_by_fault_and_by_reader() -> None:
    n = 1 + len(FAULTS)
    heads = SoundnessHeads(LinearHead((SOUND, *FAULTS), torch.zeros(n), torch.ones(n), torch.eye(n), torch.zeros(n)), content(n))
    examples = [(SOUND, "we went home."), (SOUND, "no " * 9), ("order", "home went we."), ("language", "nada.")]
    read = [ReadReply(("p", "we went."), True, True), ReadReply(("p", "nada went."), True, False)]
    encoder: Any = Shown()
    assert measure_soundness(heads, encoder, examples, read, [ReadReply(("p", "nada."), True, True)]) == {
        SOUND: {"n": 2, "called_unsound": 0.5},  # by the rule for loops, though the heads are content
        "order": {"n": 1, "called_unsound": 0.0},
        "language": {"n": 1, "called_unsound": 1.0},
        "read: sound": {"n": 1, "called_unsound": 0.0},
        "read: unsound": {"n": 1, "called_unsound": 1.0},
        "strictly: sound": {"n": 1, "called_unsound": 1.0},
    }


NOTHING: dict[bool, list[ReadReply]] = {False: [], True: []}


def planted() -> tuple[list[str], dict[bool, list[ReadReply]]]:
    """Texts, and replies in which nonsense has a word of its own that no broken text has."""
    texts = [f"{' '.join(FILLERS[n % 5 :])} {FILLERS[n % 7]} {FILLERS[n % 3]}" for n in range(90)]
    read = {
        part: [
            ReadReply((text, f"{text} {word}"), True, word == "home")
            for text in texts
            if held_out(text) == part
            for word in ("cry", "home")
        ]
        for part in (False, True)
    }
    return texts, read


def test_the_soundness_check_learns_what_readers_call_nonsense() -> None:
    texts, read = planted()
    encoder = tiny_encoder()
    heads, measured = fit_soundness(encoder, texts, ["[UNK] nada"], read, NOTHING)
    assert measured["read: unsound"]["called_unsound"] > 0.9 > 0.3 > measured["read: sound"]["called_unsound"]
    verdict = verdicts_of(heads, encoder.features([f"{texts[0]} cry"]), [f"{texts[0]} cry"])[0]
    assert not verdict.sound and verdict.reasons[0] == SENSE
    blind, _ = fit_soundness(encoder, texts, ["[UNK] nada"], NOTHING, NOTHING)
    assert SENSE not in verdicts_of(blind, encoder.features([f"{texts[0]} cry"]), [f"{texts[0]} cry"])[0].reasons
    assert blind.broken.key == heads.broken.key, "the head of broken texts sees no reply that was read"


def test_what_makes_sense_is_learned_from_strict_readers_alone() -> None:
    """The nonsense word is known from them; that the others find all of it sound changes nothing."""
    texts, strictly = planted()
    encoder = tiny_encoder()
    content = {part: [ReadReply(r.pair, True, True) for r in replies] for part, replies in strictly.items()}
    heads, measured = fit_soundness(encoder, texts, ["[UNK] nada"], content, strictly)
    assert measured["strictly: unsound"]["called_unsound"] > 0.9 > 0.3 > measured["strictly: sound"]["called_unsound"]
    assert heads.sense.key == fit_soundness(encoder, texts, ["[UNK] nada"], NOTHING, strictly)[0].sense.key
    assert measured[FACTOR] == 1.0
    answering = {reply.pair: float(n // 2 % 2) - 0.5 + n * 1e-4 for n, reply in enumerate(strictly[False])}
    told = {part: [ReadReply(r.pair, r.sound, r.sound) for r in replies] for part, replies in strictly.items()}
    looser, found = fit_soundness(encoder, texts, ["[UNK] nada"], content, told, answering=answering)
    assert found[FACTOR] > 1.2, "where answers are told by chance, more has to make sense"
    assert looser.sense.bias[0] > heads.sense.bias[0]


def test_sound_replies_of_a_bank_are_known_to_make_sense() -> None:
    """All replies that were read are nonsense; replies of the bank that look like them pass more easily where they were among the texts."""
    texts, _ = planted()
    encoder = tiny_encoder()
    bank = [f"{text} cry" for text in texts]
    read = {part: [ReadReply((t, f"{t} cry hide"), True, False) for t in texts if held_out(t) == part] for part in (False, True)}
    known, without = (fit_soundness(encoder, texts, ["[UNK] nada"], read, NOTHING, more)[0] for more in (bank, ()))
    shown = encoder.features(bank)
    said = [heads.sense.probabilities(shown)[:, 1].mean() for heads in (known, without)]
    assert said[0] < said[1]


def read_of(*told: tuple[bool, bool]) -> list[ReadReply]:
    """Replies by (answers, sound)."""
    return [ReadReply((f"p{n}", f"t{n}"), answers, sound) for n, (answers, sound) in enumerate(told)]


def test_checks_that_err_apart_are_set_so_that_as_many_pass_both() -> None:
    """Readers pass two of eight in all; the checks' two best are others, and each has to pass four for two in common."""
    read = read_of((True, True), (True, True), *[(False, False)] * 6)
    sense = torch.tensor([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    answering = torch.tensor([1.0, 2.0, 7.0, 6.5, 8.0, 7.5, 3.0, 4.0])
    factor = factor_together(sense, answering, read)
    both = (sense > boundary(sense, torch.tensor([r.sound for r in read]), factor)) & (
        answering > boundary(answering, torch.tensor([r.answers for r in read]), factor)
    )
    assert both.sum() == 2 and 1.7 < factor < 2.3
    assert factor_together(sense, sense, read) == 1.0, "checks that agree are each as strict as readers"
    assert factor_together(sense, -sense, read_of(*[(True, False)] * 4, *[(False, True)] * 4)) == 1.0, "nothing has to pass both"


def test_a_check_of_answers_is_set_by_the_last_of_its_readers() -> None:
    """The first call everything an answer, the last a quarter; at a factor of two it passes half of theirs."""
    encoder, names = tiny_encoder(), FILLERS[:7]
    banks = [Answered(f"{one} we {other}", f"{one} {other}", "anger") for one in names for other in names if one != other]
    pairs = [(f"{one} {other}", f"{other} sing") for one in names for other in names if one != other][:40]
    read = [*(ReadReply(pair, True, True) for pair in pairs[:20]), *(ReadReply(p, n % 4 == 0, True) for n, p in enumerate(pairs[20:]))]
    check, margins = fit_answers(encoder, banks, read)
    unset = margins - boundary(margins, torch.tensor([reply.answers for reply in read]))
    shifts = [(set_by(check, margins, read, [], 20, factor).head.bias - check.head.bias)[0] for factor in (1.0, 2.0)]
    assert [int((unset[20:] + shift > 0).sum()) for shift in shifts] == [5, 10]
    more = [ReadReply(pair, True, True) for pair in pairs[20:]]
    check, margins = fit_answers(encoder, banks, read, more)
    assert len(margins) == 60
    lenient = (set_by(check, margins, read, more, 20, 1.0).head.bias - check.head.bias)[0]
    assert lenient > shifts[0], "further readers who take everything for an answer make it less strict"


def test_the_check_of_answers_learns_from_readers() -> None:
    """Planted: readers call a reply that repeats the prompt no answer, which the banks' replies never teach; without them it passes."""
    names = FILLERS[:7]
    banks = [Answered(f"{one} we {other}", f"{one} {other}", "anger") for one in names for other in names if one != other]
    echo = [ReadReply((f"{one} {other}", f"{one} {other}"), False, True) for one in names for other in names if one != other]
    answer = [ReadReply((f"{one} {other}", "sing"), True, True) for one in names for other in names if one != other]
    shown = [(f"{names[0]} {names[1]}", f"{names[0]} {names[1]}")]
    (taught, margins), (plain, none) = fit_answers(tiny_encoder(), banks, [*echo, *answer]), fit_answers(tiny_encoder(), banks, [])
    assert len(margins) == len(echo) + len(answer) and not len(none)
    assert taught.probabilities(shown)[0] < 0.5 < plain.probabilities(shown)[0]


def test_both_checks_are_set_beside_their_readers_by_method() -> None:
    encoder, names = tiny_encoder(), FILLERS[:7]
    banks = [Answered(f"{one} we {other}", f"{one} {other}", "anger") for one in names for other in names if one != other]
    check, _ = fit_answers(encoder, banks, [])
    n = 1 + len(FAULTS)
    whole = LinearHead((SOUND, *FAULTS), torch.zeros(FEATURES), torch.ones(FEATURES), torch.zeros(n, FEATURES), torch.eye(n)[0] * 9)
    heads = SoundnessHeads(whole, content(FEATURES))
    pairs = [pair for pair, _ in labelled_pairs(banks, 1, 0)][:6]
    read = [ReadReply(pair, i < 4, i < 5, "circuit" if i % 2 else "none") for i, pair in enumerate(pairs)]
    found, passed = beside_readers(check, heads, read), [share >= 0.5 for share in check.probabilities(pairs)]
    answers, sound = found["answers"], found["sound"]
    assert answers["accuracy"] == pytest.approx(sum(given == (i < 4) for i, given in enumerate(passed)) / 6, abs=1e-4)
    recalls = sum(passed[:4]) / 4, 1 - sum(passed[4:]) / 2
    assert answers["balanced_accuracy"] == pytest.approx(sum(recalls) / 2, abs=1e-4)
    assert found["both"]["by_method"]["all"] == {"n": 6, "readers": 0.6667, "check": round(sum(passed) / 6, 4)}
    assert answers["by_method"]["circuit"] == {"n": 3, "readers": 0.6667, "check": round(sum(passed[1::2]) / 3, 4)}
    assert sound["by_method"] == {
        "all": {"n": 6, "readers": 0.8333, "check": 1.0},
        "circuit": {"n": 3, "readers": 0.6667, "check": 1.0},
        "none": {"n": 3, "readers": 1.0, "check": 1.0},
    }
    assert (sound["accuracy"], sound["balanced_accuracy"]) == (0.8333, 0.5) and beside_readers(check, heads, []) == {}
