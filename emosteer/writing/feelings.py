"""What a reply is to feel, as people ask for it, and what becomes of that over the turns of its conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from emosteer.base.errors import UsageError
from emosteer.base.progress import note
from emosteer.circuits.arcs import ARC_TOKENS, Arc, Mixture
from emosteer.circuits.moods import HALF_LIFE, Mood, Personality, left
from emosteer.circuits.points import mixture_at, parse_point
from emosteer.scenarios.scenarios import Message
from emosteer.scenarios.taxonomies import Place

#: Texts -> of each, how much of every emotion it expresses (probabilities).
Reader = Callable[[Sequence[str]], Sequence[Mapping[str, float]]]


@dataclass(frozen=True)
class Feeling:
    """A mixture or an arc, and how it changes over turns.

    arc: of the first reply of the conversation; None where only what the other one says counts. half_life: of what is felt, in replies;
    None leaves it as it is. personality: with one, what is felt follows the user's turns (`circuits.moods`). point: of valence, arousal
    and dominance, which takes the place of the arc, as near as the emotions come to it (`circuits.points`).
    """

    arc: Arc | None = None
    half_life: float | None = None
    personality: Personality | None = None
    point: Place | None = None

    @classmethod
    def of(
        cls,
        mix: Mapping[str, float] | str | None = None,
        arc: str | Arc | None = None,
        arc_tokens: int | None = None,
        half_life: float | None = None,
        personality: Mapping[str, float] | str | None = None,
        point: Sequence[float] | str | None = None,
    ) -> Feeling | None:
        """What is asked for, None for nothing of it.

        Raises:
            UsageError: for parts that exclude each other, or that cannot be read.
        """
        if mix is not None and arc is not None:
            raise UsageError("expected a mixture or an arc, found both; an arc may be of mixtures: 'fear:60 + anger:20 -> happiness:60'")
        if point is not None and (mix is not None or arc is not None):
            raise UsageError("expected a mixture, an arc or a point of valence, arousal and dominance, found two of them")
        if arc_tokens is not None and arc is None:
            raise UsageError("the number of tokens that an arc takes has no meaning without an arc")
        wanted: Arc | None = None
        if arc is not None:
            wanted = arc if isinstance(arc, Arc) else Arc.parse(arc, ARC_TOKENS if arc_tokens is None else arc_tokens)
        elif mix is not None:
            wanted = Arc((Mixture.parse(mix) if isinstance(mix, str) else Mixture.of(mix),))
        who = None
        if personality is not None:
            who = Personality.parse(personality) if isinstance(personality, str) else Personality.of(personality)
        if wanted is not None and wanted.moves and who is not None:
            raise UsageError(
                "a personality moves what is felt from turn to turn, an arc within a reply; expected one of the two, found both"
            )
        if half_life is not None:
            left(0, half_life)
        place = None if point is None else parse_point(point)
        if wanted is None and who is None and half_life is None and place is None:
            return None
        return cls(wanted, half_life, who, place)

    def starting(self, emotions: Sequence[str], intensity: float | None) -> list[Feeling]:
        """What is felt where single emotions are named beside it: one feeling for each, which starts with that emotion.

        Raises:
            UsageError: for emotions beside a mixture or an arc, without an intensity, or an intensity without emotions.
        """
        if not emotions and intensity is None:
            return [self]
        if self.arc is not None or self.point is not None:
            named = "a mixture or an arc names its emotions" if self.arc is not None else "a point says which emotions"
            raise UsageError(f"{named} and their intensities; leave the emotion and the intensity out")
        if not emotions or intensity is None:
            raise UsageError("what changes over turns starts from an emotion with an intensity, a mixture or an arc; name both, or neither")
        return [replace(self, arc=Arc((Mixture.of({emotion: intensity}),))) for emotion in emotions]

    def tell_weakened(self) -> None:
        """Says so where more was asked for than the text bears."""
        if self.arc is not None and self.arc.within != self.arc:
            note(f"'{self.arc.label}' is more than the text bears together (100 in all); weakened to '{self.arc.within.label}'")

    def tell_reached(self, emotions: Sequence[str]) -> None:
        """Says so where the emotions do not reach the point that was asked for."""
        found = None if self.point is None else mixture_at(self.point, emotions)
        if found is None or found.there:
            return
        asked, place = (",".join(f"{value:.2g}" for value in at) for at in (self.point or (), found.place))
        nearest = f"the nearest is {place} ({found.mixture.label}), {found.distance:.2f} away"
        note(f"{asked} is out of reach of {', '.join(emotions)}; {nearest}")

    def now(self, messages: Sequence[Message], emotions: Sequence[str], read: Reader | None) -> Arc:
        """What is felt when a conversation is answered.

        Args:
            messages: the conversation, the user's turn last; emotions: that can be felt; read: reads the user's turns, which only a
                personality needs.

        Raises:
            UsageError: if nothing was given that could fade, or an emotion's place is not known.
        """
        if self.personality is None:
            replies = sum(message.role == "assistant" for message in messages)
            share = 1.0 if self.half_life is None else left(replies, self.half_life)
            if self.point is not None:
                valence, arousal, dominance = (share * value for value in self.point)
                return Arc((mixture_at((valence, arousal, dominance), emotions).mixture,))
            if self.arc is None:
                raise UsageError("expected a mixture, an arc, or an emotion with an intensity that can fade over turns, found none")
            return self.arc if self.half_life is None else self.arc.scaled(share)
        assert read is not None
        start = Mood() if self.arc is None else Mood.of(self.arc.stops[0])
        mood = start if self.point is None else Mood(self.point)
        said = [message.content for message in messages if message.role == "user"]
        for turn, shares in enumerate(read(said)):
            mood = (mood.faded(1, self.half_life or HALF_LIFE) if turn else mood).moved(shares, self.personality)
        return Arc((mood.mixture(emotions),))
