"""Does a reply answer its prompt: the pairs that the check is fitted on, the hand-made pairs, and the check itself."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from emosteer.base.errors import ArtifactError, DataError
from emosteer.base.files import read_jsonl
from emosteer.judges import answers as module
from emosteer.judges.answers import ANSWERS, NOT, PAIR_LABELS, AnswerCheck, Answered, pair_of, pair_texts, rambling
from emosteer.judges.storage import save_judges
from emosteer.scenarios.contamination import content_words
from emosteer.scenarios.scenarios import EMOTIONS, data_path
from tests.helpers.judge_setup import PROVENANCE, tiny_adapter, tiny_encoder, tiny_heads

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
    pairs = pair_texts(replies, 3, seed=0)
    assert Counter(label for _, label in pairs) == {ANSWERS: 3 * len(replies), NOT: 3 * len(replies)}
    tones = Counter[tuple[str, str]]()
    for pair, label in pairs:
        prompt, _, reply = pair.partition(module._BORDER)
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
        for pair, label in pair_texts(replies, 4, seed):
            prompt, _, reply = pair.partition(module._BORDER)
            mine = next(one.reply for one in replies if one.prompt == prompt)
            assert (reply == mine) == (label == ANSWERS)


def test_siblings_other_prompts_and_rambling_all_occur() -> None:
    wrong = Counter[str]()
    for pair, label in pair_texts(answered(), 6, seed=1):
        prompt, _, reply = pair.partition(module._BORDER)
        if label == NOT:
            number, other = int(prompt.split()[-1]), reply.split()[-1]
            kind = "rambling" if len(reply.split()) != 4 or not other.isdigit() or reply.split()[1] != "reply" else "another"
            wrong["sibling" if kind == "another" and int(other) // 3 == number // 3 else kind] += 1
    assert set(wrong) == {"sibling", "another", "rambling"} and min(wrong.values()) > 0.1 * wrong.total()


def test_pairs_depend_on_the_seed_alone() -> None:
    assert pair_texts(answered(), 2, 0) == pair_texts(answered(), 2, 0) != pair_texts(answered(), 2, 1)


def test_one_prompt_alone_is_too_little() -> None:
    with pytest.raises(DataError, match="expected replies of 'fear' to at least two prompts, found one: 'prompt'"):
        pair_texts([Answered("prompt", "a", "fear"), Answered("prompt", "b", "fear")], 1, 0)


def test_the_hand_made_pairs_are_whole() -> None:
    """What the check is measured on: relations of both kinds, and no pair that answers twice."""
    rows = [row for _, row in read_jsonl(data_path("judge/answer_pairs.jsonl"))]
    assert len(rows) >= 200 and all(isinstance(row[name], str) and row[name] for row in rows for name in ("prompt", "reply", "relation"))
    by_relation = {relation: {row["answers"] for row in rows if row["relation"] == relation} for relation in {r["relation"] for r in rows}}
    assert all(len(said) == 1 for said in by_relation.values()) and {True, False} <= set().union(*by_relation.values())
    assert len({(row["prompt"], row["reply"]) for row in rows}) == len(rows)


# ---- the check -----------------------------------------------------------------------------------------------------


def test_the_check_reads_pairs_with_its_own_adapter(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    adapter = tiny_adapter(PAIR_LABELS, encoder=encoder)
    path = tmp_path / "judge.safetensors"
    save_judges(path, tiny_heads(), {"answers": adapter}, {}, PROVENANCE)
    check = AnswerCheck.load(path, encoder)
    pairs = [("we cry", "sing it"), ("we cry", "slam the desk and hide"), ("", "sing"), ("the desk", "")]
    column = check.judge.probabilities([pair_of(*pair) for pair in pairs])[:, PAIR_LABELS.index(ANSWERS)]
    assert check.probabilities(pairs) == column.tolist() and len(set(column.tolist())) == 4
    assert check.key == f"answers-{adapter.key}" and check.probabilities([]) == []
    assert check.probabilities([("sing it", "we cry")]) != check.probabilities(pairs[:1]), "which is the prompt matters"


def test_the_column_goes_by_its_name(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    adapter = tiny_adapter(PAIR_LABELS, encoder=encoder)
    turned = type(adapter)(PAIR_LABELS[::-1], adapter.down, adapter.up, adapter.weight.flip(0), adapter.bias.flip(0))
    found = []
    for one in (adapter, turned):
        save_judges(tmp_path / "j.safetensors", tiny_heads(), {"answers": one}, {}, PROVENANCE)
        found.append(AnswerCheck.load(tmp_path / "j.safetensors", encoder).probabilities([("we cry", "sing it")]))
    torch.testing.assert_close(*map(torch.tensor, found))


def test_a_file_without_the_check_is_refused(tmp_path: Path) -> None:
    save_judges(tmp_path / "j.safetensors", tiny_heads(), {}, {}, PROVENANCE)
    with pytest.raises(ArtifactError, match="holds no judge 'answers'; run `make judge`"):
        AnswerCheck.load(tmp_path / "j.safetensors", tiny_encoder())
