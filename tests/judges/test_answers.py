"""Does a reply answer its prompt: the pairs that the check is fitted on, the hand-made pairs, and the check itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emosteer.base.errors import ArtifactError, DataError
from emosteer.base.files import read_jsonl
from emosteer.judges.answers import ANSWERS, NOT, PAIR_LABELS, AnswerCheck, Answered, labelled_pairs, pair_features, rambling
from emosteer.judges.embedded import LinearHead, fit_head
from emosteer.judges.protocol import ANSWERED
from emosteer.judges.storage import load_heads, save_judges
from emosteer.scenarios.contamination import content_words
from emosteer.scenarios.scenarios import EMOTIONS, data_path
from tests.helpers.judge_setup import PROVENANCE, card_of, tiny_encoder, tiny_heads

PROMPT = "My train was late and the office had closed when I arrived."
REPLY = "The kettle you bought leaks again, so take it back to the shop."


def answered(prompts: int = 12) -> list[Answered]:
    """Replies in every tone to each prompt; each prompt has two siblings."""
    found = []
    for n in range(prompts):
        for tone in EMOTIONS:
            siblings = tuple(f"{tone} reply number {m}" for m in range(n // 3 * 3, n // 3 * 3 + 3) if m != n)
            found.append(Answered(f"prompt number {n}", f"{tone} reply number {n}", tone, siblings))
    return found


# ---- texts to fit on -----------------------------------------------------------------------------------------------


def test_rambling_holds_the_prompts_words_in_every_way() -> None:
    """Shuffled, put into another reply, strung together; each way is drawn, none says anything to the prompt."""
    rng, mine, theirs = random.Random(0), set(content_words(PROMPT)), set(content_words(REPLY))
    ways = Counter[str]()
    for _ in range(300):
        words = rambling(PROMPT, REPLY, rng)
        held = set(content_words(words))
        assert held & mine, words
        if set(PROMPT.split()) <= set(words.split()):
            ways["shuffled"] += 1
            assert words != PROMPT and len(words.split()) > len(PROMPT.split()) and not held & theirs
        elif len(words.split()) == len(REPLY.split()) and words.split()[0] == "The" and "so" in words.split():
            ways["put in"] += 1
            assert len(held & theirs) < len(theirs)
        else:
            ways["strung"] += 1
            assert held <= mine and len([w for w in words.split() if w[0].isupper()]) >= 2
    assert set(ways) == {"shuffled", "put in", "strung"} and min(ways.values()) > 60


def test_a_prompt_without_content_words_is_rambled_too() -> None:
    rng = random.Random(1)
    assert all(set(rambling("Is it so?", REPLY, rng).split()) for _ in range(30))


def test_pairs_are_balanced_and_tone_tells_nothing() -> None:
    """Of each reply as many pairs that answer as not, and what does not answer has the tone of what does."""
    replies = answered()
    pairs = labelled_pairs(replies, 3, seed=0)
    assert Counter(label for _, label in pairs) == {ANSWERS: 3 * len(replies), NOT: 3 * len(replies)}
    tones = Counter[tuple[str, str]]()
    for pair, label in pairs:
        prompt, reply = pair
        assert prompt.startswith("prompt number")
        for tone in EMOTIONS:
            tones[tone, label] += tone in reply.split()
    for tone in EMOTIONS:
        # some of what does not answer rambles, and may have lost its tone's name with its other words
        assert tones[tone, ANSWERS] == 36 and 20 <= tones[tone, NOT] <= 36


def test_a_reply_never_counts_as_not_answering_its_own_prompt() -> None:
    """Neither by chance, nor as its own sibling, nor where another prompt has the same reply."""
    replies = [Answered(f"prompt {n}", "same words" if n < 5 else f"words {n}", "fear", ("same words", f"other {n}")) for n in range(7)]
    for seed in range(20):
        for pair, label in labelled_pairs(replies, 4, seed):
            prompt, reply = pair
            mine = next(one.reply for one in replies if one.prompt == prompt)
            assert (reply == mine) == (label == ANSWERS)


def test_siblings_other_prompts_and_rambling_all_occur() -> None:
    wrong = Counter[str]()
    for pair, label in labelled_pairs(answered(), 6, seed=1):
        prompt, reply = pair
        if label == NOT:
            number, other = int(prompt.split()[-1]), reply.split()[-1]
            kind = "rambling" if len(reply.split()) != 4 or not other.isdigit() or reply.split()[1] != "reply" else "another"
            wrong["sibling" if kind == "another" and int(other) // 3 == number // 3 else kind] += 1
    assert set(wrong) == {"sibling", "another", "rambling"} and min(wrong.values()) > 0.1 * wrong.total()


def test_pairs_depend_on_the_seed_alone() -> None:
    assert labelled_pairs(answered(), 2, 0) == labelled_pairs(answered(), 2, 0) != labelled_pairs(answered(), 2, 1)


def test_one_prompt_alone_is_too_little() -> None:
    with pytest.raises(DataError, match="expected replies of 'fear' to at least two prompts, found one: 'prompt'"):
        labelled_pairs([Answered("prompt", "a", "fear"), Answered("prompt", "b", "fear")], 1, 0)


def test_the_hand_made_pairs_are_whole() -> None:
    """What the check is measured on: relations of both kinds, and no pair that answers twice."""
    rows = [row for _, row in read_jsonl(data_path("judge/answer_pairs.jsonl"))]
    assert len(rows) >= 200 and all(isinstance(row[name], str) and row[name] for row in rows for name in ("prompt", "reply", "relation"))
    by_relation = {relation: {row["answers"] for row in rows if row["relation"] == relation} for relation in {r["relation"] for r in rows}}
    assert all(len(said) == 1 for said in by_relation.values()) and {True, False} <= set().union(*by_relation.values())
    assert len({(row["prompt"], row["reply"]) for row in rows}) == len(rows)


# ---- the check -----------------------------------------------------------------------------------------------------


def bags(texts: Sequence[str]) -> Tensor:
    """Unit vectors of letter counts."""
    rows = torch.tensor([[float(text.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
    return torch.nn.functional.normalize(rows + 1e-3, dim=-1)


def fitted(pairs: Sequence[tuple[tuple[str, str], str]]) -> LinearHead:
    places = torch.tensor([PAIR_LABELS.index(label) for _, label in pairs])
    return fit_head(pair_features([pair for pair, _ in pairs], bags), places, PAIR_LABELS)


def test_the_features_by_hand() -> None:
    pairs = [("my invoice is late", "the invoice, the invoice again"), ("where is it", "hm")]
    rows = pair_features(pairs, bags)
    one, other = bags([text for text in pairs[0]])
    assert rows.shape == (2, 2 * 26 + 9)
    torch.testing.assert_close(rows[0, :26], one * other)
    torch.testing.assert_close(rows[0, 26:52], (one - other).abs())
    shares = rows[0, 52:].tolist()
    assert shares[0] == pytest.approx(float(one @ other)) and shares[1] == 1.0, "its only content word is the prompt's"
    assert shares[3] == pytest.approx(2 / 5) and shares[4] == pytest.approx(1 / 2), "invoice twice"
    assert shares[6] == pytest.approx(1 - 3 / 5) and shares[7] == pytest.approx(5 / 60)


def test_it_learns_to_tell_answers_apart_and_is_read_back(tmp_path: Path) -> None:
    head = fitted(labelled_pairs(answered(), 6, seed=0))
    save_judges(tmp_path / "j.safetensors", tiny_heads() | {"answers": head}, {}, {}, PROVENANCE)
    check = AnswerCheck(bags, load_heads(tmp_path / "j.safetensors")["answers"])
    fresh = labelled_pairs(answered(), 3, seed=9)
    said = check.probabilities([pair for pair, _ in fresh])
    right = [(share >= ANSWERED) == (label == ANSWERS) for share, (_, label) in zip(said, fresh, strict=True)]
    assert sum(right) / len(right) > 0.7 and min(said) < 0.2 < 0.8 < max(said), "a check that says one thing to everything is none"
    assert check.key == f"answers-{check.head.key}" and check.probabilities([]) == []


def test_a_file_without_the_check_is_refused(tmp_path: Path) -> None:
    save_judges(tmp_path / "j.safetensors", tiny_heads(), {}, {}, PROVENANCE)
    with pytest.raises(ArtifactError, match="holds no check of answers; run `make judge`"):
        AnswerCheck.load(tmp_path / "j.safetensors", tiny_encoder())


def test_the_shipped_check_follows_its_reader_and_tells_hand_made_pairs_apart() -> None:
    """As strict as the reader of models' replies, on those that were held out; ramblings are its weak side. Measured by `make judge`."""
    rows = card_of()["answers"]
    called = {relation: row["called_answer"] for relation, row in rows.items()}
    assert called["read: answers"] > 2 * called["read: does not"]
    assert called["right"] > max(called["rambling"], 3 * called["other-event"]) and called["other-scenario"] < 0.05
    yes, no = rows["read: answers"]["n"], rows["read: does not"]["n"]
    passed = (yes * called["read: answers"] + no * called["read: does not"]) / (yes + no)
    assert passed == pytest.approx(yes / (yes + no), abs=0.05), "it passes as many as the reader"
