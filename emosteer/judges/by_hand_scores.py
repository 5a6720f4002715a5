"""What judges, and other readers, say of texts that a person has labelled (`by_hand`). No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from emosteer.base.errors import DataError
from emosteer.judges.by_hand import HAND_LABELS, NOT_TEXT, HandLabel, Row, Sheet, Source
from emosteer.judges.panel import UNDECIDED, Reading, krippendorff_alpha
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.scenarios.scenarios import EMOTIONS, NEUTRAL

#: The panel's name beside its judges'.
PANEL = "panel"


def score(
    sheet: Sheet,
    labels: Mapping[str, HandLabel],
    opinions: Mapping[str, Mapping[str, Opinion]],
    verdicts: Mapping[str, Soundness],
) -> Row:
    """Judges against the person. Shares are of 1, None where there is nothing to take a share of.

    Agreement, recall, precision and alpha are over what the person read as text; what is "not text" to them is compared with the
    soundness verdicts instead. A judge's label is its likeliest, neutral included, but for six_way.

    Args:
        opinions: judge's name -> hash of a text -> its opinion, for every labelled text; verdicts: hash -> whether it is sound.
    """
    hand = {sha256: given.label for sha256, given in labels.items()}
    read = {sha256: label for sha256, label in hand.items() if label != NOT_TEXT}
    said = {name: {sha256: opinion.emotion() for sha256, opinion in one.items()} for name, one in opinions.items()}
    panel = {sha256: Reading({name: one[sha256] for name, one in opinions.items()}).label for sha256 in hand}
    answered = [given.answers for given in labels.values() if given.answers is not None]
    return {
        "texts": len(sheet.cards),
        "labelled": len(hand),
        "labels": {label: sum(given == label for given in hand.values()) for label in HAND_LABELS},
        "answers": {"asked": len(answered), "yes": sum(answered)},
        "judges": {name: _judge_score(read, said[name], opinions[name]) for name in opinions},
        PANEL: {"agreement": _share_equal(read, panel), "confusion": confusion(read, panel, LABELS, (*LABELS, UNDECIDED))},
        "soundness": {
            "not_text": len(hand) - len(read),
            "unsound_of_not_text": sum(not verdicts[sha256].sound for sha256 in hand.keys() - read.keys()),
            "text": len(read),
            "sound_of_text": sum(verdicts[sha256].sound for sha256 in read),
        },
        "targets": _target_scores(sheet.sources, hand, {**said, **({PANEL: panel} if len(said) > 1 else {})}),
    }


def _judge_score(read: Mapping[str, str], said: Mapping[str, str | None], opinions: Mapping[str, Opinion]) -> Row:
    there = {sha256: label for sha256, label in read.items() if said[sha256] is not None}
    emotional = {sha256: label for sha256, label in there.items() if label != NEUTRAL}
    six = {sha256: opinions[sha256].emotion(EMOTIONS) for sha256 in emotional}
    emotions = {}
    for label in LABELS:
        person, judge = ({sha256 for sha256 in there if one[sha256] == label} for one in (there, said))
        both = len(person & judge)
        emotions[label] = {
            "person": len(person),
            "judge": len(judge),
            "recall": both / len(person) if person else None,
            "precision": both / len(judge) if judge else None,
        }
    return {
        "n": len(there),
        "missing": len(read) - len(there),
        "agreement": _share_equal(there, said),
        "n_emotional": len(emotional),
        "six_way": _share_equal(emotional, six),
        "alpha": krippendorff_alpha([(label, said[sha256]) for sha256, label in there.items()]),
        "emotions": emotions,
    }


def _target_scores(sources: Sequence[Source], hand: Mapping[str, str], said: Mapping[str, Mapping[str, str | None]]) -> list[Row]:
    """How many lines are read as their target, by the person and by judges: for every method, and then for all (method None).

    difference: the judge's share minus the person's, over the lines that both read.
    """
    lines = [source for source in sources if source.target in EMOTIONS and source.sha256 in hand]
    methods = sorted({line.method for line in lines if line.method is not None})
    rows = []
    for method in (*methods, None) if len(methods) > 1 else (None,):
        here = [line for line in lines if method is None or line.method == method]
        judges = {}
        for name, one in said.items():
            both = [line for line in here if one[line.sha256] is not None]
            shares = [_share([by[line.sha256] == line.target for line in both]) for by in (one, hand)]
            difference = None if shares[0] is None or shares[1] is None else shares[0] - shares[1]
            judges[name] = {"n": len(both), "share": shares[0], "difference": difference}
        if here:
            person = _share([hand[line.sha256] == line.target for line in here])
            rows.append({"method": method, "n": len(here), "person": person, "judges": judges})
    return rows


def compare(labels: Mapping[str, HandLabel], others: Mapping[str, HandLabel]) -> Row:
    """Two readers on the texts that both labelled, "not text" among the labels.

    Raises:
        DataError: if they labelled no text in common.
    """
    first, second = ({sha256: one[sha256].label for sha256 in labels if sha256 in others} for one in (labels, others))
    if not first:
        raise DataError("the two readers have labelled no text in common; label the same texts, with the same --seed and --count")
    answers = [(labels[sha256].answers, others[sha256].answers) for sha256 in first]
    answers = [pair for pair in answers if None not in pair]
    return {
        "n": len(first),
        "only_first": len(labels) - len(first),
        "only_second": len(others) - len(first),
        "agreement": _share_equal(first, second),
        "alpha": krippendorff_alpha([(first[sha256], second[sha256]) for sha256 in first]),
        "confusion": confusion(first, second, HAND_LABELS, HAND_LABELS),
        "answers": {"n": len(answers), "agreement": _share([one == other for one, other in answers])},
    }


def confusion(
    first: Mapping[str, str], second: Mapping[str, str | None], rows: Sequence[str], columns: Sequence[str]
) -> dict[str, dict[str, int]]:
    """first's label -> second's label -> number of texts; rows for labels that first gives, all columns."""
    counts = Counter((label, second[sha256]) for sha256, label in first.items())
    return {row: {column: counts[row, column] for column in columns} for row in rows if row in first.values()}


def _share_equal(first: Mapping[str, str], second: Mapping[str, str | None]) -> float | None:
    """Over the texts on which the second says something."""
    return _share([second[sha256] == label for sha256, label in first.items() if second[sha256] is not None])


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None
