"""What is felt over the turns of a conversation: an emotion that fades, or a mood that moves with what the other one says. No torch.

A mood is a point of valence, arousal and dominance, each -1 to 1, where every emotion of the shipped sets has its place
(`scenarios.taxonomies`). Each turn of the other one moves it by the place of what that turn expresses, more or less so on each axis by
the personality; between turns it returns towards neutral. The weights of the personality's traits on the three axes are Mehrabian's
(1996). That is the form of "Automatically Select Emotion for Response via Personality-affected Emotion Transition" (Wen et al. 2021), where
the movement is predicted by a network fitted to dialogues of series; here it is read by a judge, and nothing is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from emosteer.base.errors import UsageError, suggest
from emosteer.circuits.arcs import Mixture
from emosteer.scenarios.taxonomies import TAXONOMIES, Place, place_of

#: Turns after which half of a mood is left, unless told otherwise.
HALF_LIFE = 2.0
#: The intensity of a mood as far from neutral as an emotion's place: the strongest that most replies bear (docs/RESULTS.md, the dial).
FULL = 75.0
#: Emotions of a mixture that is read off a mood, and the least intensity that is worth an emotion.
NEAREST, LEAST = 2, 5.0


@dataclass(frozen=True)
class Personality:
    """The five traits, -1 to 1. stability: emotional stability, the opposite of neuroticism."""

    openness: float = 0.0
    conscientiousness: float = 0.0
    extraversion: float = 0.0
    agreeableness: float = 0.0
    stability: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not -1 <= value <= 1:
                raise UsageError(f"expected {name} between -1 and 1, found {value:g}")

    @classmethod
    def of(cls, traits: Mapping[str, float]) -> Personality:
        """A personality by its traits' names; what is not named is 0.

        Raises:
            UsageError: for an unknown trait or a number outside -1 to 1.
        """
        known = [field.name for field in fields(cls)]
        for name in traits:
            if name not in known:
                raise UsageError(f"unknown trait '{name[:60]}'{suggest(name, known)}; expected some of {', '.join(known)}")
        return cls(**{name: float(value) for name, value in traits.items()})

    @classmethod
    def parse(cls, text: str) -> Personality:
        """Reads "extraversion:0.5, stability:-1"; "neutral" is the one of zeros.

        Raises:
            UsageError: naming the part that cannot be read.
        """
        if text.strip().casefold() == "neutral":
            return cls()
        traits: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = part.replace("=", ":").partition(":")
            try:
                traits[name.strip()] = float(number)
            except ValueError:
                raise UsageError(f"expected TRAIT:NUMBER, such as extraversion:0.5, found '{part.strip()[:60]}'") from None
        return cls.of(traits)

    @property
    def weights(self) -> tuple[float, float, float]:
        """What multiplies a movement of valence, arousal and dominance: 1 without a personality, and never less than 0, which would turn
        a movement round."""
        o, c, e, a, s = self.openness, self.conscientiousness, self.extraversion, self.agreeableness, self.stability
        traits = (0.21 * e + 0.59 * a + 0.19 * s, 0.15 * o + 0.30 * a - 0.57 * s, 0.25 * o + 0.17 * c + 0.60 * e - 0.32 * a)
        return (max(0.0, 1 + traits[0]), max(0.0, 1 + traits[1]), max(0.0, 1 + traits[2]))

    @property
    def label(self) -> str:
        """The personality as `parse` reads it."""
        return ", ".join(f"{name}:{value:g}" for name, value in vars(self).items() if value) or "neutral"


@dataclass(frozen=True)
class Mood:
    """A point of valence, arousal and dominance."""

    place: Place = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, mixture: Mixture) -> Mood:
        """The mood of a mixture.

        Raises:
            UsageError: for an emotion whose place is not known.
        """
        for emotion in mixture.intensities:
            if place_of(emotion) is None:
                sets = f"{', '.join(TAXONOMIES[:-1])} and {TAXONOMIES[-1]}"
                raise UsageError(f"the valence, arousal and dominance of '{emotion}' are not known; moods know the emotions of {sets}")
        return cls().moved({emotion: value / FULL for emotion, value in mixture.intensities.items()}, Personality())

    def moved(self, shares: Mapping[str, float], personality: Personality) -> Mood:
        """The mood after something was said. shares: emotion -> how much of it was expressed; those without a place are passed over."""
        placed = [(share, place) for emotion, share in shares.items() if (place := place_of(emotion)) is not None]
        sums = [sum(share * place[axis] for share, place in placed) for axis in range(3)]
        moves = zip(self.place, sums, personality.weights, strict=True)
        v, a, d = (max(-1.0, min(1.0, at + weight * step)) for at, step, weight in moves)
        return Mood((v, a, d))

    def faded(self, turns: float, half_life: float) -> Mood:
        """The mood some turns later, on its way back to neutral."""
        v, a, d = (left(turns, half_life) * value for value in self.place)
        return Mood((v, a, d))

    def mixture(self, emotions: Sequence[str]) -> Mixture:
        """The mood as a mixture of the emotions (of those given) that lie nearest to its direction."""
        length = math.hypot(*self.place)
        near = {}
        places = {emotion: place for emotion in emotions if (place := place_of(emotion)) is not None}
        for emotion, place in places.items():
            if length:
                near[emotion] = sum(a * b for a, b in zip(self.place, place, strict=True)) / (length * math.hypot(*place))
        nearest = sorted((e for e in near if near[e] > 0), key=lambda e: -near[e])[:NEAREST]
        weights = {emotion: near[emotion] ** 8 for emotion in nearest}  # a power, so that the nearer one has most of it
        total = sum(weights.values())
        size = {emotion: FULL * min(1.0, length / math.hypot(*places[emotion])) for emotion in nearest}
        found = {emotion: size[emotion] * weight / total for emotion, weight in weights.items()}
        return Mixture.of({emotion: round(value, 1) for emotion, value in found.items() if value >= LEAST})


def left(turns: float, half_life: float) -> float:
    """The share of a feeling that is left after some turns.

    Raises:
        UsageError: for a half-life that is not above 0.
    """
    if not (0 < half_life < math.inf):
        raise UsageError(f"expected the turns after which half of a feeling is left to be a number above 0, found {half_life:g}")
    return float(2 ** (-turns / half_life))
