"""What `make judge` fits beside the judges of emotions: the check for sound text and the check for answers, and how they are measured.

Both are fitted half on texts that are made for them (sound texts broken on purpose, replies put to other prompts) and half on replies that
models wrote and readers read: what models get wrong is seldom what can be broken on purpose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl
from emosteer.judges.answers import ANSWERS, NOT, PAIR_LABELS, AnswerCheck, Answered, Pair, labelled_pairs, pair_features
from emosteer.judges.broken_texts import soundness_examples
from emosteer.judges.embedded import LinearHead, SentenceEncoder, fit_head
from emosteer.judges.protocol import ANSWERED
from emosteer.judges.soundness import FAULTS, SENSE, SOUND, verdicts_of
from emosteer.judges.sources import HELD_OUT, held_out
from emosteer.scenarios.splits import stable_share

#: Of the check of answers: with this one it passes about as many of the models' replies as their reader does (docs/JUDGES.md).
ANSWER_RIDGE = 1e-3


@dataclass(frozen=True)
class ReadReply:
    """A model's reply with its prompt, and what a blind reader said: whether it answers, and whether it is understandable English."""

    pair: Pair
    answers: bool
    sound: bool


def read_replies(*paths: Path) -> dict[bool, list[ReadReply]]:
    """Models' replies that were read, of all files; True: those that nothing is fitted on.

    Raises:
        DataError: naming file and line, if a prompt is missing or what was said of a reply is neither true nor false.
    """
    replies: dict[bool, list[ReadReply]] = {False: [], True: []}
    for path, (number, row) in [(file, line) for file in paths for line in read_jsonl(file, "replies that were read")]:
        prompt, text, answers, sound = (row.get(name) for name in ("prompt", "text", "answers", "sound"))
        if not (isinstance(prompt, str) and isinstance(text, str) and isinstance(answers, bool) and isinstance(sound, bool)):
            raise DataError(f"{path}:{number}: expected 'prompt' and 'text' to be texts, 'answers' and 'sound' true or false")
        replies[held_out(text)].append(ReadReply((prompt, text), answers, sound))
    return replies


def as_often(made: int, read: int) -> Tensor:
    """Indices of examples, the made ones first, that repeat the read ones so that both halves count alike."""
    times = max(1, made // max(1, read))
    return torch.tensor([*range(made), *[*range(made, made + read)] * times])


# ---- soundness ---------------------------------------------------------------------------------------------------------------------


def fit_soundness(
    encoder: SentenceEncoder, texts: Sequence[str], foreign: Sequence[str], read: Mapping[bool, Sequence[ReadReply]]
) -> tuple[LinearHead, dict[str, Any]]:
    """The soundness head, and what it does on texts that were held out.

    Args:
        texts: sound ones; foreign: in other languages; read: as `read_replies` gives them.
    """
    names = (SOUND, *FAULTS)
    made = {
        part: soundness_examples(
            [text for text in texts if held_out(text) == part],
            [t for t in foreign if (stable_share(t, 0) < HELD_OUT) == part],
            seed=int(part),
        )
        for part in (False, True)
    }
    labelled = [*made[False], *((SOUND if reply.sound else SENSE, reply.pair[1]) for reply in read[False])]
    rows = as_often(len(made[False]), len(read[False]))
    shown, places = encoder.features([text for _, text in labelled]), torch.tensor([names.index(label) for label, _ in labelled])
    head = fit_head(shown[rows], places[rows], names)
    return head, measure_soundness(head, encoder, made[True], read[True])


def measure_soundness(
    head: LinearHead, encoder: SentenceEncoder, examples: Sequence[tuple[str, str]], read: Sequence[ReadReply] = ()
) -> dict[str, Any]:
    """The share that is called unsound, by head and rules together: of each kind of examples, and by what a reader said of replies."""
    names = {True: "read: sound", False: "read: unsound"}
    examples = [*examples, *((names[reply.sound], reply.pair[1]) for reply in read)]
    texts = [text for _, text in examples]
    unsound = [not verdict.sound for verdict in verdicts_of(head, encoder.features(texts), texts)]
    total = Counter(label for label, _ in examples)
    called = Counter(label for (label, _), bad in zip(examples, unsound, strict=True) if bad)
    return {
        label: {"n": total[label], "called_unsound": round(called[label] / total[label], 4)}
        for label in (SOUND, *FAULTS, *names.values())
        if total[label]
    }


# ---- answers -----------------------------------------------------------------------------------------------------------------------


def fit_answers(encoder: SentenceEncoder, answered: Sequence[Answered], read: Sequence[ReadReply]) -> AnswerCheck:
    """The check of answers.

    Args:
        answered: replies of the banks with their prompts; read: models' replies.
    """
    made = labelled_pairs(answered, 1, 0)
    pairs = [*made, *((reply.pair, ANSWERS if reply.answers else NOT) for reply in read)]
    rows = as_often(len(made), len(read))
    shown, places = pair_features([pair for pair, _ in pairs], encoder), torch.tensor([PAIR_LABELS.index(label) for _, label in pairs])
    return AnswerCheck(encoder, fit_head(shown[rows], places[rows], PAIR_LABELS, ANSWER_RIDGE))


def measure_answers(check: AnswerCheck, pairs: Sequence[Mapping[str, Any]], read: Sequence[ReadReply] = ()) -> dict[str, Any]:
    """By relation of the hand-made pairs, and by what a reader said of models' replies: the share that is called an answer."""
    names = {True: "read: answers", False: "read: does not"}
    pairs = [*pairs, *({"prompt": r.pair[0], "reply": r.pair[1], "relation": names[r.answers]} for r in read)]
    shares = check.probabilities([(pair["prompt"], pair["reply"]) for pair in pairs])
    relations = dict.fromkeys(pair["relation"] for pair in pairs)
    called = {r: [share >= ANSWERED for share, pair in zip(shares, pairs, strict=True) if pair["relation"] == r] for r in relations}
    return {relation: {"n": len(hits), "called_answer": round(sum(hits) / len(hits), 4)} for relation, hits in called.items()}
