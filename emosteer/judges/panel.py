"""Several judges that err differently: what they say together, with neutral allowed, and how far they agree. No torch here.

One judge knows its authors. A panel's reading is the label whose mean probability over its judges is the highest, neutral among the
labels: a judge that is sure counts for more than one that wavers, which agrees with blind readers better than a majority of votes does
(docs/JUDGES.md has both figures). Where half of the judges or more said nothing, the panel is undecided, and an undecided reply counts as
one that does not carry the emotion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from emosteer.judges.protocol import EmotionJudge, Opinion

#: What a panel says where half of its judges or more said nothing, and what its majority is where no label has more than half of the votes.
UNDECIDED = "undecided"
#: How several judges become one opinion: part of a panel's key.
RULE = "mean"


@dataclass(frozen=True)
class Reading:
    """What a panel says of one text. opinions: judge's name -> its opinion, missing ones (`Opinion.probabilities` None) among them."""

    opinions: Mapping[str, Opinion]

    @property
    def votes(self) -> dict[str, str]:
        """Judge's name -> the label it gives, neutral allowed; judges that said nothing are left out."""
        labels = {name: opinion.emotion() for name, opinion in self.opinions.items()}
        return {name: label for name, label in labels.items() if label is not None}

    @property
    def label(self) -> str | None:
        """The label with the highest mean probability, `UNDECIDED` where half of the judges or more said nothing, None where all did.

        Counted are the judges that were asked, so that judges that failed never make a minority decide.
        """
        shares = self.probabilities
        if shares is None:
            return None
        return max(shares, key=lambda label: shares[label]) if 2 * len(self.votes) > len(self.opinions) else UNDECIDED

    @property
    def majority(self) -> str | None:
        """The label that more than half of the judges that were asked give, `UNDECIDED` where none has so many, None where no judge said
        anything: how far the judges' labels agree, which is not what the panel says (`label`)."""
        votes = self.votes
        if not votes:
            return None
        label, count = max(Counter(votes.values()).items(), key=lambda item: item[1])
        return label if 2 * count > len(self.opinions) else UNDECIDED

    @property
    def probabilities(self) -> dict[str, float] | None:
        """Label -> mean probability over the judges that said something; None where none did."""
        given = [opinion.probabilities for opinion in self.opinions.values() if opinion.probabilities is not None]
        labels = dict.fromkeys(label for shares in given for label in shares)
        return {label: sum(shares.get(label, 0.0) for shares in given) / len(given) for label in labels} if given else None

    @property
    def problem(self) -> str:
        """Why a judge said nothing; empty where all spoke."""
        return next((opinion.problem or "no reason given" for opinion in self.opinions.values() if opinion.probabilities is None), "")

    def row(self) -> dict[str, Mapping[str, float] | None]:
        """Judge's name -> label -> probability, None where it said nothing: what is written to files."""
        return {name: opinion.probabilities for name, opinion in self.opinions.items()}


@dataclass(frozen=True, eq=False)
class Panel:
    """Several judges as one: its probabilities are their mean, and it says what is likeliest by them."""

    judges: tuple[EmotionJudge, ...]

    @property
    def name(self) -> str:
        """The judges' names."""
        return ", ".join(judge.name for judge in self.judges)

    @property
    def key(self) -> str:
        """The judges' keys and, of several, how they become one opinion."""
        keys = ", ".join(judge.key for judge in self.judges)
        return f"{RULE} of {keys}" if len(self.judges) > 1 else keys

    def readings(self, texts: Sequence[str]) -> list[Reading]:
        """Every judge's opinion of each text, in order."""
        by_judge = {judge.name: judge.opinions(texts) for judge in self.judges}
        return [Reading({name: opinions[i] for name, opinions in by_judge.items()}) for i in range(len(texts))]

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text; missing only where every judge's is, and with a problem where any is: what the others say is not yet the
        panel's opinion."""
        opinions = []
        for index, reading in enumerate(self.readings(texts)):
            shares = reading.probabilities
            opinions.append(Opinion(shares, reading.problem, reading.label))
            if done is not None:
                done(index, opinions[-1])
        return opinions


def krippendorff_alpha(ratings: Sequence[Sequence[str | None]]) -> float | None:
    """Krippendorff's alpha for nominal labels: 1 is perfect agreement, 0 what chance gives, below 0 worse than chance.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability". Texts that fewer than two judges labelled say nothing.

    Args:
        ratings: per text the judges' labels, None where one said nothing.

    Returns:
        None where no text has two labels, or where only one label was ever given (agreement cannot be told from chance).
    """
    units = [[label for label in row if label is not None] for row in ratings]
    units = [labels for labels in units if len(labels) > 1]
    totals: Counter[str] = Counter()
    disagreement = 0.0
    for labels in units:
        counts = Counter(labels)
        totals.update(counts)
        disagreement += sum(count * (len(labels) - count) for count in counts.values()) / (len(labels) - 1)
    n = totals.total()
    expected = sum(count * (n - count) for count in totals.values())
    return None if not expected else 1 - (n - 1) * disagreement / expected


def pairwise_agreement(ratings: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], float]:
    """(judge, judge) -> share of the texts that both labelled on which they give the same label."""
    names = sorted({name for row in ratings for name in row})
    shares: dict[tuple[str, str], float] = {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = [row[first] == row[second] for row in ratings if first in row and second in row]
            if both:
                shares[first, second] = sum(both) / len(both)
    return shares
