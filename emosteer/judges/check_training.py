"""What `make judge` fits beside the judges of emotions: the check for sound text and the check for answers, and how they are measured.

Both learn from texts that are made for them (sound texts broken on purpose, replies put to other prompts) and from replies that models
wrote and readers read: what models get wrong is seldom what can be broken on purpose. They are then set together, as strict as the
readers: on prompts that were left out, as many replies pass both as readers find sound and an answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.base.files import read_jsonl
from emosteer.judges.answers import ANSWERS, NOT, PAIR_LABELS, AnswerCheck, Answered, Pair, feature_weights, labelled_pairs, pair_features
from emosteer.judges.broken_texts import soundness_examples, still_sound
from emosteer.judges.embedded import LinearHead, SentenceEncoder, fit_head
from emosteer.judges.protocol import ANSWERED, LABELS
from emosteer.judges.soundness import FAULTS, SENSE, SOUND, THRESHOLD, SoundnessHeads, verdicts_of
from emosteer.judges.sources import HELD_OUT, held_out
from emosteer.scenarios.scenarios import NEUTRAL
from emosteer.scenarios.splits import stable_share

#: Of the check of answers, chosen with prompts left out (docs/JUDGES.md).
ANSWER_RIDGE = 2e-4
#: Pairs that are made for it, drawn from all that could be.
MADE = 6000
#: Of the head that tells sense from no sense; texts that are known to make sense, drawn for it from all that could be, and their weight
#: beside the replies that were read. Fewer of them, and sound texts in the manner of the reply banks do not pass.
SENSE_RIDGE, SENSIBLE, SENSIBLE_SHARE = 1e-4, 4000, 0.35
#: In the card of the check of soundness: how many times more replies than readers both checks pass, each by itself.
FACTOR = "factor"
#: Parts of the prompts that are left out in turn to find how strict a check is.
FOLDS = 5


@dataclass(frozen=True)
class ReadReply:
    """A model's reply with its prompt, what a blind reader said (whether it answers, whether it is understandable English, and which
    emotion it voices), and how it was written."""

    pair: Pair
    answers: bool
    sound: bool
    method: str = ""
    label: str = NEUTRAL


def read_replies(*paths: Path) -> dict[bool, list[ReadReply]]:
    """Models' replies that were read, of all files; True: those that nothing is fitted on.

    A prompt is held out with all of its replies: where a line says so (`"held_out": true`), else by its hash.

    Raises:
        DataError: naming file and line, if a prompt is missing, what was said of it is neither true nor false, or a label is unknown.
    """
    found: list[ReadReply] = []
    apart: set[str] = set()
    for path, (number, row) in [(file, line) for file in paths for line in read_jsonl(file, "replies that were read")]:
        prompt, text, answers, sound = (row.get(name) for name in ("prompt", "text", "answers", "sound"))
        if not (isinstance(prompt, str) and isinstance(text, str) and isinstance(answers, bool) and isinstance(sound, bool)):
            raise DataError(f"{path}:{number}: expected 'prompt' and 'text' to be texts, 'answers' and 'sound' true or false")
        label = row.get("label")
        if label not in LABELS:
            raise DataError(f"{path}:{number}: expected 'label' to be one of {', '.join(LABELS)}, found {str(label)[:40]!r}")
        found.append(ReadReply((prompt, text), answers, sound, str(row.get("method", "")), label))
        if row.get("held_out") is True or held_out(prompt):
            apart.add(prompt)
    return {part: [reply for reply in found if (reply.pair[0] in apart) == part] for part in (False, True)}


def half_each(made: int, read: int) -> Tensor:
    """How much each example counts, the made ones first: both halves alike."""
    return torch.cat([torch.full((size,), 1 / size) for size in (made, read) if size])


def drawn(examples: Sequence[Any], most: int = MADE) -> list[Any]:
    """At most so many, the same ones every time."""
    return random.Random(0).sample(list(examples), most) if len(examples) > most else list(examples)


def as_strict(head: LinearHead, label: str, margins: Tensor, readers: Tensor, least: float, factor: float = 1.0) -> LinearHead:
    """The head with one label's bias moved so that it gives as many texts at least `least` of that label as readers give it.

    Args:
        margins: [text], log odds of the label as heads see them that were not fitted on the text's prompt; readers: [text], true or false;
            factor: as many times more (`factor_together`).
    """
    if not len(margins):
        return head
    bias = head.bias.clone()
    bias[head.labels.index(label)] += torch.tensor(least).logit() - boundary(margins, readers, factor)
    return replace(head, bias=bias.half().float())


def boundary(margins: Tensor, readers: Tensor, factor: float = 1.0) -> Tensor:
    """The margin from which on as many texts lie as readers pass, times a factor."""
    wanted = min(len(margins), round(factor * int(readers.sum())))
    order = margins.sort(descending=True).values
    # between the last that passes and the first that does not; all or none pass where readers are of one mind
    edges = torch.cat([order[:1] + 1, order, order[-1:] - 1])
    return (edges[wanted] + edges[wanted + 1]) / 2


def factor_together(sense: Tensor, answering: Tensor, read: Sequence[ReadReply]) -> float:
    """How many times more replies each check passes than readers do, so that as many pass *both* as readers find both sound and an answer.

    For readers the two go together: what answers makes sense. Two checks that err each on its own, and are each as strict as readers, pass
    far fewer of both.

    Args:
        sense, answering: [reply], margins of replies that were left out.
    """
    told = [torch.tensor([getattr(reply, name) for reply in read]) for name in ("sound", "answers")]
    wanted, factor = int((told[0] & told[1]).sum()), 1.0
    while int(((sense > boundary(sense, told[0], factor)) & (answering > boundary(answering, told[1], factor))).sum()) < wanted:
        factor += 0.02
    return round(factor, 2)


def left_out_margins(
    fit: Callable[[Tensor], LinearHead], features: Tensor, label: str, folds: Sequence[int], read: int
) -> tuple[LinearHead, Tensor]:
    """A head of all examples, and the log odds of a label for the read ones, each seen by a head that was fitted on no read reply to its
    prompt. Examples that were made are fitted on in every fold, whatever their prompt.

    Args:
        fit: of a mask over the examples; features: [example, feature], the read ones last; folds: of the read ones.
    """
    made = len(features) - read
    parts = torch.tensor([-1] * made + list(folds))
    head, margins = fit(torch.ones(len(features), dtype=torch.bool)), torch.zeros(read)
    for fold in sorted({*folds}):
        inside = parts == fold
        margins[inside[made:]] = margins_of(fit(~inside), features[inside], label)
    return head, margins


def margins_of(head: LinearHead, features: Tensor, label: str) -> Tensor:
    """Log odds of a label. Shape [text]."""
    return head.probabilities(features)[:, head.labels.index(label)].clamp(1e-6, 1 - 1e-6).logit()


def folds_of(read: Sequence[ReadReply]) -> list[int]:
    """The part of the prompts that each reply belongs to."""
    return [int(FOLDS * stable_share(f"fold/{reply.pair[0]}", 0)) for reply in read]


# ---- soundness ---------------------------------------------------------------------------------------------------------------------

Read = Mapping[bool, Sequence[ReadReply]]


def fit_soundness(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    foreign: Sequence[str],
    read: Read,
    strictly: Read,
    replies: Sequence[str] = (),
    answering: Mapping[Pair, float] | None = None,
    also: Sequence[ReadReply] = (),
) -> tuple[SoundnessHeads, dict[str, Any]]:
    """Both heads of the check, and what it does on texts that were held out.

    Args:
        texts: sound ones; foreign: in other languages; read, strictly: as `read_replies` gives them; what makes sense is learned from the
            second alone, where there are any: readers agree on what that is where they were told to be strict, and hardly where not.
            replies: further texts that make sense, of the reply banks. answering: margins of the check of answers for the second and for
            `also`, left out: both checks are then set together, by the factor that is measured (`factor_together`). also: replies that the
            check is set by beside the second, and not fitted on.
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
    shown, places = encoder.features([text for _, text in made[False]]), torch.tensor([names.index(label) for label, _ in made[False]])
    sound = [row for row, (label, _) in zip(shown, made[False], strict=True) if label == SOUND]
    sensible = [text for text in replies if not held_out(text)]
    more = encoder.features([*sensible, *still_sound(sensible, random.Random(0))]) if sensible else shown[:0]
    sense, factor = fit_sense(encoder, drawn([*sound, *more], SENSIBLE), strictly[False] or read[False], answering, also)
    heads = SoundnessHeads(fit_head(shown, places, names), sense)
    apart = [(SOUND, text) for text in replies if held_out(text)]
    return heads, {**measure_soundness(heads, encoder, [*made[True], *apart], read[True], strictly[True]), FACTOR: factor}


def fit_sense(
    encoder: SentenceEncoder,
    sensible: Sequence[Tensor],
    read: Sequence[ReadReply],
    answering: Mapping[Pair, float] | None = None,
    also: Sequence[ReadReply] = (),
) -> tuple[LinearHead, float]:
    """The head that tells sense from no sense, as strict as the readers, and the factor that it passes more.

    Args:
        sensible: features of texts that make sense, [feature] each; answering, also: as for `fit_soundness`.
    """
    labels = SOUND, SENSE
    if not read:
        return LinearHead(labels, *_content(sensible[0])), 1.0
    shown = torch.stack([*sensible, *encoder.features([reply.pair[1] for reply in read])])
    places = torch.tensor([0] * len(sensible) + [labels.index(SOUND if reply.sound else SENSE) for reply in read])
    shares = SENSIBLE_SHARE, 1 - SENSIBLE_SHARE
    counts = torch.cat([torch.full((len(part),), share / len(part)) for share, part in zip(shares, (sensible, read), strict=True) if part])

    def fit(rows: Tensor) -> LinearHead:
        return fit_head(shown[rows], places[rows], labels, SENSE_RIDGE, counts=counts[rows])

    head, margins = left_out_margins(fit, shown, SOUND, folds_of(read), len(read))
    told, factor = [*read, *also], 1.0
    if also:
        margins = torch.cat([margins, margins_of(head, encoder.features([reply.pair[1] for reply in also]), SOUND)])
    if answering is not None:
        factor = factor_together(margins, torch.tensor([answering[reply.pair] for reply in told]), told)
    return as_strict(head, SOUND, margins, torch.tensor([reply.sound for reply in told]), 1 - THRESHOLD, factor), factor


def _content(features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, scale, weight and bias of a head that finds sense in everything: what can be learned where nothing was read."""
    return torch.zeros_like(features), torch.ones_like(features), torch.zeros(2, len(features)), torch.tensor([9.0, 0.0])


def measure_soundness(
    heads: SoundnessHeads,
    encoder: SentenceEncoder,
    examples: Sequence[tuple[str, str]],
    read: Sequence[ReadReply] = (),
    strictly: Sequence[ReadReply] = (),
) -> dict[str, Any]:
    """The share that is called unsound, by heads and rules together: of each kind of examples, and by what readers said of replies."""
    said = [
        (f"{how}: {'sound' if r.sound else 'unsound'}", r.pair[1]) for how, part in (("read", read), ("strictly", strictly)) for r in part
    ]
    examples = [*examples, *said]
    texts = [text for _, text in examples]
    unsound = [not verdict.sound for verdict in verdicts_of(heads, encoder.features(texts), texts)]
    total = Counter(label for label, _ in examples)
    called = Counter(label for (label, _), bad in zip(examples, unsound, strict=True) if bad)
    names = [f"{how}: {word}" for how in ("read", "strictly") for word in ("sound", "unsound")]
    return {
        label: {"n": total[label], "called_unsound": round(called[label] / total[label], 4)}
        for label in (SOUND, *FAULTS, *names)
        if total[label]
    }


# ---- answers -----------------------------------------------------------------------------------------------------------------------


def fit_answers(
    encoder: SentenceEncoder, answered: Sequence[Answered], read: Sequence[ReadReply], also: Sequence[ReadReply] = ()
) -> tuple[AnswerCheck, Tensor]:
    """The check of answers, as strict as the readers, and its margins for what they read, each left out [read, then also].

    Args:
        answered: replies of the banks with their prompts; read: models' replies; also: further ones, to prompts that nothing is fitted on.
    """
    made = drawn(labelled_pairs(answered, 1, 0))
    pairs = [*made, *((reply.pair, ANSWERS if reply.answers else NOT) for reply in read)]
    shown, places = pair_features([pair for pair, _ in pairs], encoder), torch.tensor([PAIR_LABELS.index(label) for _, label in pairs])
    counts, weights = half_each(len(made), len(read)), feature_weights(shown.shape[1])

    def fit(rows: Tensor) -> LinearHead:
        return fit_head(shown[rows], places[rows], PAIR_LABELS, ANSWER_RIDGE, weights, counts[rows])

    head, margins = left_out_margins(fit, shown, ANSWERS, folds_of(read), len(read))
    check = AnswerCheck(encoder, as_strict(head, ANSWERS, margins, torch.tensor([reply.answers for reply in read]), ANSWERED))
    if also:
        margins = torch.cat([margins, margins_of(head, pair_features([reply.pair for reply in also], encoder), ANSWERS)])
    return check, margins


def set_by(
    check: AnswerCheck, margins: Tensor, read: Sequence[ReadReply], also: Sequence[ReadReply], last: int, factor: float
) -> AnswerCheck:
    """A check of answers that was set by all readers of `read`, set by the last of them and by those of `also`, and a factor less strict.

    Args:
        margins: [reply], as `fit_answers` gives them; last: how many replies at the end of `read` the check is set by.
    """
    told = torch.tensor([reply.answers for reply in [*read, *also]])
    last += len(also)
    moved = boundary(margins[: len(read)], told[: len(read)]) - boundary(margins[-last:], told[-last:], factor)
    bias = check.head.bias.clone()
    bias[check.head.labels.index(ANSWERS)] += moved
    return replace(check, head=replace(check.head, bias=bias.half().float()))


def measure_answers(check: AnswerCheck, pairs: Sequence[Mapping[str, Any]], read: Sequence[ReadReply] = ()) -> dict[str, Any]:
    """By relation of the hand-made pairs, and by what a reader said of models' replies: the share that is called an answer."""
    names = {True: "read: answers", False: "read: does not"}
    pairs = [*pairs, *({"prompt": r.pair[0], "reply": r.pair[1], "relation": names[r.answers]} for r in read)]
    shares = check.probabilities([(pair["prompt"], pair["reply"]) for pair in pairs])
    relations = dict.fromkeys(pair["relation"] for pair in pairs)
    called = {r: [share >= ANSWERED for share, pair in zip(shares, pairs, strict=True) if pair["relation"] == r] for r in relations}
    return {relation: {"n": len(hits), "called_answer": round(sum(hits) / len(hits), 4)} for relation, hits in called.items()}


# ---- beside readers ----------------------------------------------------------------------------------------------------------------


def beside_readers(check: AnswerCheck, soundness: SoundnessHeads, read: Sequence[ReadReply]) -> dict[str, Any]:
    """Both checks, and what passes both, against the readers of replies that were held out: the share of replies on which they agree, the
    mean of that over what readers pass and what they do not, and, by method ("all" first), how many pass by readers and by the check."""
    if not read:
        return {}
    texts = [reply.pair[1] for reply in read]
    verdicts = verdicts_of(soundness, check.encoder.features(texts), texts)
    said = {
        "answers": [share >= ANSWERED for share in check.probabilities([reply.pair for reply in read])],
        "sound": [verdict.sound for verdict in verdicts],
    }
    told = {name: [bool(getattr(reply, name)) for reply in read] for name in said}
    for who in (said, told):
        who["both"] = [answers and sound for answers, sound in zip(who["answers"], who["sound"], strict=True)]
    return {name: _agreement(told[name], given, [reply.method for reply in read]) for name, given in said.items()}


def _agreement(readers: Sequence[bool], check: Sequence[bool], methods: Sequence[str]) -> dict[str, Any]:
    both = list(zip(readers, check, strict=True))
    recalls = [_share([given == value for read, given in both if read == value]) for value in (True, False)]
    known = [recall for recall in recalls if recall is not None]
    by_method = {}
    for method in ("all", *sorted({*methods})):
        here = [pair for pair, name in zip(both, methods, strict=True) if method in ("all", name)]
        by_method[method] = {"n": len(here), "readers": _share([read for read, _ in here]), "check": _share([given for _, given in here])}
    return {
        "accuracy": _share([read == given for read, given in both]),
        "balanced_accuracy": round(sum(known) / len(known), 4),
        "by_method": by_method,
    }


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
