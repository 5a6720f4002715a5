"""Does a reply answer its prompt: the pairs that the check is fitted on, the hand-made pairs, and the check itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from emosteer.base.errors import ArtifactError, DataError
from emosteer.base.files import read_jsonl
from emosteer.judges.answers import (
    ANSWERS,
    NOT,
    PAIR_LABELS,
    WORDS_WEIGH,
    AnswerCheck,
    Answered,
    embedding_in,
    feature_count,
    feature_weights,
    labelled_pairs,
    pair_features,
    rambling,
)
from emosteer.judges.embedded import LinearHead, SentenceEncoder, fit_head
from emosteer.judges.pair_words import pair_words
from emosteer.judges.protocol import ANSWERED
from emosteer.judges.storage import load_heads, save_judges
from emosteer.scenarios.contamination import content_words
from emosteer.scenarios.scenarios import EMOTIONS, data_path
from tests.helpers.judge_setup import FEATURES, FILLERS, PROVENANCE, WIDTH, card_of, tiny_encoder, tiny_heads

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


def fitted(pairs: Sequence[tuple[tuple[str, str], str]], encoder: SentenceEncoder) -> LinearHead:
    places = torch.tensor([PAIR_LABELS.index(label) for _, label in pairs])
    shown = pair_features([pair for pair, _ in pairs], encoder)
    return fit_head(shown, places, PAIR_LABELS, weights=feature_weights(shown.shape[1]))


def test_the_features_by_hand() -> None:
    pairs = [("my desk is in it", "the desk, the desk again"), ("where is it", "hm"), ("my desk is in it", "hm")]
    encoder = tiny_encoder()
    rows = pair_features(pairs, encoder)
    one, other = encoder([text for text in pairs[0]])
    words = pair_words(*pairs[0])
    assert rows.shape == (3, FEATURES + 2 * WIDTH + 1 + len(words)) == (3, feature_count(encoder))
    torch.testing.assert_close(rows[:, :FEATURES], encoder.features([reply for _, reply in pairs]))
    torch.testing.assert_close(rows[0, FEATURES : FEATURES + WIDTH], one * other)
    torch.testing.assert_close(rows[0, FEATURES + WIDTH : FEATURES + 2 * WIDTH], (one - other).abs())
    torch.testing.assert_close(rows[0, FEATURES + 2 * WIDTH :], torch.tensor([float(one @ other), *words]))
    weights = feature_weights(rows.shape[1])
    assert weights.tolist() == [1.0] * (FEATURES + 2 * WIDTH) + [WORDS_WEIGH] * (1 + len(words))


def test_the_embedding_is_part_of_the_features() -> None:
    encoder = tiny_encoder()
    texts = ["i was in it", "why not you"]
    for embedding, features in zip(encoder(texts), encoder.features(texts), strict=True):
        torch.testing.assert_close(embedding_in(features, WIDTH), embedding)


def test_it_learns_to_tell_answers_apart_and_is_read_back(tmp_path: Path) -> None:
    """Planted: what answers takes up a word of its prompt."""
    names, encoder = FILLERS[:12], tiny_encoder()
    replies = [Answered(f"{one} at {other}", f"{one} of {tone}", tone) for one in names for other in names for tone in ("cry", "sing")]
    head = fitted(labelled_pairs(replies, 2, seed=0), encoder)
    save_judges(tmp_path / "j.safetensors", tiny_heads() | {"answers": head}, {}, {}, PROVENANCE)
    check = AnswerCheck(encoder, load_heads(tmp_path / "j.safetensors")["answers"])
    fresh = labelled_pairs(replies, 1, seed=9)
    said = check.probabilities([pair for pair, _ in fresh])
    right = [(share >= ANSWERED) == (label == ANSWERS) for share, (_, label) in zip(said, fresh, strict=True)]
    assert sum(right) / len(right) > 0.7 and min(said) < 0.2 < 0.8 < max(said), "a check that says one thing to everything is none"
    assert check.key == f"answers-{check.head.key}" and check.probabilities([]) == []


def test_a_file_without_the_check_is_refused(tmp_path: Path) -> None:
    save_judges(tmp_path / "j.safetensors", tiny_heads(), {}, {}, PROVENANCE)
    with pytest.raises(ArtifactError, match="holds no check of answers; run `make judge`"):
        AnswerCheck.load(tmp_path / "j.safetensors", tiny_encoder())


def test_a_check_of_another_version_is_refused(tmp_path: Path) -> None:
    save_judges(tmp_path / "j.safetensors", tiny_heads() | {"answers": tiny_heads()["emotion"]}, {}, {}, PROVENANCE)
    with pytest.raises(ArtifactError, match=f"on {FEATURES} features, expected {feature_count(tiny_encoder())}; run `make judge`"):
        AnswerCheck.load(tmp_path / "j.safetensors", tiny_encoder())


def test_the_shipped_check_follows_its_readers_and_tells_hand_made_pairs_apart() -> None:
    """About as strict as the readers of models' replies, on prompts that were held out, by method too, and with the check of soundness as
    strict readers; ramblings are its weak side."""
    rows, beside, strictly = card_of()["answers"], card_of()["readers"]["answers"], card_of()["strict readers"]["both"]
    called = {relation: row["called_answer"] for relation, row in rows.items()}
    assert called["read: answers"] > 2 * called["read: does not"]
    assert called["right"] > max(called["rambling"], 2 * called["other-event"]) and called["other-scenario"] < 0.05
    assert beside["balanced_accuracy"] > 0.65
    wide, other = strictly["by_method"]["all"], card_of()["strict readers of development prompts"]["both"]["by_method"]["all"]
    assert wide["readers"] < wide["check"] < wide["readers"] + 0.1, "between the two kinds of strict readers that it is set by"
    assert other["readers"] - 0.1 < other["check"] < other["readers"]
    many = [row for row in beside["by_method"].values() if row["n"] >= 60]
    assert len(many) >= 3 and all(row["check"] == pytest.approx(row["readers"], abs=0.2) for row in many)
