"""Several judges that err differently: their majority, with neutral allowed, and how far they agree. No torch here.

One judge knows its authors. A panel's reading is the label that more than half of its judges give, neutral among the
labels; where no label has that many, the panel is undecided, and an undecided reply counts as one that does not carry the emotion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emosteer.judges.protocol import Opinion

#: The panel's reading where no label has more than half of the votes.
UNDECIDED = "undecided"


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
        """The majority's label, `UNDECIDED` where there is none, None where no judge said anything.

        A majority is of the judges that were asked, so that a judge that failed never makes a minority decide.
        """
        votes = self.votes
        if not votes:
            return None
        label, count = max(Counter(votes.values()).items(), key=lambda item: item[1])
        return label if 2 * count > len(self.opinions) else UNDECIDED

    def share(self, label: str) -> float | None:
        """Mean probability of a label over the judges that said something; None where none did."""
        shares = [opinion.probabilities.get(label, 0.0) for opinion in self.opinions.values() if opinion.probabilities is not None]
        return sum(shares) / len(shares) if shares else None


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
