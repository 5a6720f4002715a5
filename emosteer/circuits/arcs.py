"""What a reply is to feel: mixtures of emotions with intensities, and arcs that lead from one mixture to the next. Plain numbers, no torch.

sadness:40 + anger:20                a mixture; a negative intensity asks for less of an emotion
fear:80 -> happiness:60              an arc, even in its intensities over the reply's tokens
anger:60 -> neutral -> sadness:50    over as many stops as wanted, at equal distances
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from emosteer.base.errors import UsageError
from emosteer.circuits.dial import MOST_TOGETHER, check_intensity
from emosteer.scenarios.emotions import emotion_key
from emosteer.scenarios.scenarios import NEUTRAL

#: Tokens that an arc takes unless told otherwise, about as many as a reply of two sentences has. Shorter replies end on their way, longer
#: ones stay where it ended.
ARC_TOKENS = 24
#: The most emotions in a mixture and stops in an arc that are read: more are a mistake.
MOST = 64
_PART = re.compile(r"(?P<name>.*[^\s:@=])\s*[:@=]\s*(?P<number>[+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)")
_EXAMPLE = "such as 'sadness:40 + anger:20'"


@dataclass(frozen=True)
class Mixture:
    """Emotions with their intensities, -100 to 100; those of 0 are left out. Empty is neutral."""

    intensities: Mapping[str, float]

    @classmethod
    def of(cls, intensities: Mapping[str, float]) -> Mixture:
        """Checks a mixture.

        Raises:
            UsageError: for an intensity that is none, or too many emotions.
        """
        if len(intensities) > MOST:
            raise UsageError(f"expected a mixture of at most {MOST} emotions, found {len(intensities)}")
        for emotion, value in intensities.items():
            check_intensity(value, f"the intensity of {emotion}", signed=True)
        named = {emotion_key(emotion): float(value) for emotion, value in intensities.items()}
        if len(named) < len(intensities):
            raise UsageError(f"an emotion is there twice in the mixture of {', '.join(intensities)[:60]}")
        return cls({emotion: value for emotion, value in named.items() if value})

    @classmethod
    def parse(cls, text: str) -> Mixture:
        """Reads "sadness:40 + anger:20"; "neutral" is the mixture of nothing.

        Raises:
            UsageError: naming the part that is no emotion with its intensity, or that comes twice.
        """
        if text.strip().casefold() == NEUTRAL:
            return cls({})
        found: dict[str, float] = {}
        for part in re.split(r"[,+](?![0-9.])", text):
            match = _PART.fullmatch(part.strip())
            name = emotion_key(match["name"]) if match else ""
            if match is None or not name:
                raise UsageError(f"expected EMOTION:INTENSITY, several with +, {_EXAMPLE}, found '{part.strip()[:60]}'")
            if name in found:
                raise UsageError(f"'{name[:60]}' is there twice in the mixture '{text.strip()[:60]}'")
            try:
                found[name] = float(match["number"])
            except ValueError:
                raise UsageError(f"expected the intensity of {name[:60]} to be a number, found '{match['number'][:60]}'") from None
        return cls.of(found)

    @property
    def label(self) -> str:
        """The mixture as `parse` reads it."""
        return " + ".join(f"{emotion}:{value:g}" for emotion, value in self.intensities.items()) or NEUTRAL

    def scaled(self, factor: float) -> Mixture:
        """The same mixture, stronger or weaker."""
        return Mixture.of({emotion: value * factor for emotion, value in self.intensities.items()})

    @property
    def within(self) -> Mixture:
        """The same mixture, weakened where it is more than the text bears, so that its intensities, signs apart, add up to the dial's
        end at most."""
        together = sum(map(abs, self.intensities.values()))
        if together <= MOST_TOGETHER:
            return self
        return Mixture.of({name: math.trunc(value * MOST_TOGETHER / together * 10) / 10 for name, value in self.intensities.items()})

    def toward(self, other: Mixture, share: float) -> Mixture:
        """What lies between two mixtures; a share of 0 is this one, of 1 the other."""
        names = dict.fromkeys([*self.intensities, *other.intensities])
        mine, theirs = self.intensities, other.intensities
        return Mixture.of({name: _between(mine.get(name, 0.0), theirs.get(name, 0.0), share) for name in names})


def _between(one: float, other: float, share: float) -> float:
    """Exactly the one where both are equal, and never beyond either: rounding must not leave the dial."""
    return min(max(one + share * (other - one), min(one, other)), max(one, other))


@dataclass(frozen=True)
class Arc:
    """Mixtures that follow each other within a reply. tokens: how many it takes from the first to the last, where it then stays; one
    mixture alone stays all along."""

    stops: tuple[Mixture, ...]
    tokens: int = ARC_TOKENS

    def __post_init__(self) -> None:
        if not 1 <= len(self.stops) <= MOST:
            raise UsageError(f"expected an arc of 1 to {MOST} mixtures, found {len(self.stops)}")
        if self.tokens < 2:
            raise UsageError(f"expected an arc to take at least 2 tokens, found {self.tokens}")

    @classmethod
    def parse(cls, text: str, tokens: int = ARC_TOKENS) -> Arc:
        """Reads "fear:80 -> happiness:60", or a mixture alone.

        Raises:
            UsageError: naming the part that cannot be read.
        """
        if not text.strip():
            raise UsageError(f"expected a mixture of emotions, {_EXAMPLE}, or an arc such as 'fear:80 -> happiness:60', found nothing")
        return cls(tuple(Mixture.parse(stop) for stop in re.split("->|\N{RIGHTWARDS ARROW}", text)), tokens)

    @property
    def moves(self) -> bool:
        """Whether anything changes from token to token."""
        return len(set(stop.label for stop in self.stops)) > 1

    @property
    def emotions(self) -> tuple[str, ...]:
        """Every emotion that it names."""
        return tuple(dict.fromkeys(emotion for stop in self.stops for emotion in stop.intensities))

    @property
    def label(self) -> str:
        """The arc as `parse` reads it, and over how many tokens where that is not the usual number: what names it in files."""
        path = " -> ".join(stop.label for stop in self.stops)
        return f"{path} in {self.tokens} tokens" if self.moves and self.tokens != ARC_TOKENS else path

    def at(self, token: int) -> Mixture:
        """The mixture at a token of the reply, the first of which is 0."""
        place = min(token / (self.tokens - 1), 1.0) * (len(self.stops) - 1)
        before = min(math.floor(place), len(self.stops) - 2) if len(self.stops) > 1 else 0
        return self.stops[before].toward(self.stops[before + 1], place - before) if len(self.stops) > 1 else self.stops[0]

    @property
    def within(self) -> Arc:
        """The same arc, its mixtures weakened where they are more than the text bears."""
        return Arc(tuple(stop.within for stop in self.stops), self.tokens)

    def scaled(self, factor: float) -> Arc:
        """The same arc, stronger or weaker throughout."""
        return Arc(tuple(stop.scaled(factor) for stop in self.stops), self.tokens)


def strengths_along(arc: Arc, emotions: Sequence[str], strength_at: Callable[[str, float], float], tokens: int) -> list[list[float]]:
    """The strength of each emotion at each token of a reply, as long as it changes: [token][emotion].

    Args:
        arc: as asked for, weakened here where it is more than the text bears; emotions: of the circuit; strength_at: (emotion, intensity)
            -> strength, its dial; tokens: the longest reply.

    Raises:
        UsageError: for an emotion that the circuit does not know. ArtifactError: if it has no dial.
    """
    mixtures = [arc.within.at(token).intensities for token in range(min(arc.tokens, tokens) if arc.moves else 1)]
    for name in arc.emotions:
        strength_at(name, 0.0)
    return [[strength_at(name, mixture[name]) if name in mixture else 0.0 for name in emotions] for mixture in mixtures]
