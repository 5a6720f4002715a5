"""Under what replies are written: unsteered, the circuit along its dial, other steering, prompts and sentences. And which prompts each
meets. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emosteer.circuits.methods import CIRCUIT, METHODS, NONE
from emosteer.side_effects.settings import SENTENCES, EffectsSettings

if TYPE_CHECKING:
    from emosteer.circuits.circuit import Circuit

#: Stands for all emotions of a method together.
ALL = "all"


@dataclass(frozen=True)
class Condition:
    """One way of writing. method: of `circuits.methods`, or of `settings.SENTENCES`; emotion: "none" where there is none; intensity: of the
    dial, None where it has no meaning; strength: None where nothing is steered; part: (place, of how many): the share of the prompts that
    meet it, as `deal` says."""

    method: str
    emotion: str = NONE
    intensity: float | None = None
    strength: float | None = None
    place: int = 0
    of: int = 1
    each: int = 1

    def meets(self, n_prompts: int) -> list[int]:
        """Which of some prompts it is tried on: of `of` conditions each prompt meets `each`, in turn, so that all meet equally many."""
        return [i for i in range(n_prompts) if (self.place - i) % self.of < self.each]


def conditions_of(circuit: Circuit, settings: EffectsSettings, n_sentences: int) -> list[Condition]:
    """Everything that is tried, the unsteered model first.

    Args:
        n_sentences: of each kind.

    Raises:
        ArtifactError: if the circuit has no dial or lacks a part that a method adds.
    """
    emotions = circuit.emotions
    each = min(settings.per_prompt or len(emotions), len(emotions))
    found = [Condition(NONE)]
    for method in settings.methods:
        if method in SENTENCES:
            every = min(settings.per_prompt or n_sentences, n_sentences)
            found += [Condition(method, NONE, None, None, place, n_sentences, every) for place in range(n_sentences)]
            continue
        part, added = METHODS[method].strength, METHODS[method].vectors
        if added is not None:
            circuit.require(added)
        for intensity in settings.intensities if method == CIRCUIT else (None,):
            for place, emotion in enumerate(emotions):
                strength = None
                if intensity is not None:
                    strength = circuit.strength_at(emotion, intensity)
                elif part is not None:
                    strength = round(circuit.default_strength_of(part, emotion), 6)
                found.append(Condition(method, emotion, intensity, strength, place, len(emotions), each))
    return found


@dataclass(frozen=True)
class Line:
    """What a row of the tables is about: some conditions taken together."""

    method: str
    emotion: str
    intensity: float | None
    members: tuple[int, ...]


def lines_of(conditions: Sequence[Condition]) -> list[Line]:
    """The rows: for every method and intensity all of its conditions together, then one by one where they differ by emotion."""
    groups: dict[tuple[str, float | None], list[int]] = {}
    for index, condition in enumerate(conditions):
        if condition.method != NONE:
            groups.setdefault((condition.method, condition.intensity), []).append(index)
    lines = []
    for (method, intensity), members in groups.items():
        lines.append(Line(method, ALL, intensity, tuple(members)))
        if method not in SENTENCES:
            lines += [Line(method, conditions[i].emotion, intensity, (i,)) for i in members]
    return lines
