"""Which sets of units are tried on what: the plan of `validate`, by emotion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.circuits.circuit import Circuit
from emosteer.circuits.validation.settings import FEW, MEAN, NECESSARY, READ, SUFFICIENT, SWAPS, ValidateSettings
from emosteer.circuits.validation.unit_sets import UnitSet, circuit_sets, largest, lengths, matched, matched_in_size, taken
from emosteer.models.model import Model

#: What is done to a set: its units are ablated, or all that is outside it is and the set alone carries the emotion.
ABLATE, KEEP = "ablate", "keep"
#: Nothing done: under the prompt that asks for the emotion, and under the one that asks for neutrality.
CLEAN, NEUTRAL_ASKED = "clean", "asked for neutrality"
#: Who is tried, beside "random:3" and "sized:3": the circuit's own units; no unit at all, so that with `KEEP` everything is held.
OWN, NOTHING = "circuit", "nothing"
#: Sizes that are no share: the whole circuit; its units that most emotions share, and the others, at the focus; as many as at the focus by
#: the ranking of the half of the prompt kinds that the prompt belongs to, and of the other half.
WHOLE, CORE, REST, SAME_HALF, OTHER_HALF = "whole", "core", "rest", "same half", "other half"
#: The sets of the two rankings that the last two mean.
HALVES = ("half 0", "half 1")
#: Nobody asks: the contrasts of a set of heads are added, the circuit's own or those of "heads of anger", at equal length.
SWAPPED, ADD, CONTRAST = "plain", "add", "contrast"
#: The text is read instead of asked for.
READING = "reading"
#: A unit is in the core if it is in the circuits of this share of the emotions.
CORE_SHARE = 2 / 3


@dataclass(frozen=True)
class Trial:
    """One intervention. emotion: whose circuit; asked: the emotion that the prompt asks for, or that the text has; elicitation: how, or
    "reading"; size: a share of all heads as a percentage ("5%"), or one of the sizes above; who: "circuit", "random:3" (matched in layer
    and number), "sized:3" (in what is taken away, too), "clean" and the like; action and kind: what is done, and what takes the units'
    place."""

    emotion: str
    asked: str
    elicitation: str
    size: str = ""
    who: str = CLEAN
    action: str = ""
    kind: str = ""
    dose: float = 1.0


@dataclass(frozen=True, eq=False)
class Sets:
    """The sets that one emotion's trials name. own: size -> units; removed: [layer, head], what each head's ablation takes away."""

    emotion: str
    own: Mapping[str, UnitSet]
    removed: Tensor
    seed: int

    def of(self, size: str, who: str, half: int = 0) -> UnitSet:
        """The units of a trial. half: that the prompt belongs to."""
        size = {SAME_HALF: HALVES[half], OTHER_HALF: HALVES[1 - half]}.get(size, size)
        mine = self.own[size]
        if who == NOTHING:
            return mine.without(mine)
        if who == OWN:
            return mine
        seed = f"{self.seed}/{self.emotion}/{size}/{who}"
        return matched(mine, seed) if who.startswith("random") else matched_in_size(mine, self.removed, seed)

    def size_here(self, size: str) -> str:
        """A size as this emotion has it: the whole circuit where that is no larger."""
        return size if size in self.own else WHOLE

    def taken(self, size: str, who: str, halves: Sequence[int]) -> float:
        """What the ablation of a set's heads takes out of the stream, in the mean over prompts. halves: that the prompts belong to."""
        counts = Counter(halves if size in (SAME_HALF, OTHER_HALF) else [0])
        return sum(n * taken(self.of(size, who, half), self.removed) for half, n in counts.items()) / counts.total()

    @property
    def holds_neurons(self) -> bool:
        """Whether neurons are held where a set alone is to carry the emotion. Decided by the whole circuit, so that every set, and none
        at all, is tried against the same background."""
        return bool(self.own[WHOLE].neurons.any())

    def count(self, size: str) -> int:
        """Units of a set."""
        return len(self.of(size, OWN))


def label(share: float) -> str:
    """A share as a size: 0.05 -> "5%"."""
    return f"{100 * share:g}%"


def sets_of(
    model: Model,
    circuit: Circuit,
    removed: Tensor,
    ranked: Sequence[Sequence[UnitSet]],
    settings: ValidateSettings,
) -> list[Sets]:
    """The sets of every emotion.

    Args:
        removed: [emotion, layer, head], what a head's ablation takes away; ranked: by half of the prompt kinds, the best
            heads by its ranking, by emotion; empty where a half has no prompt.
    """
    wholes = [circuit_sets(circuit, e) for e in range(len(circuit.emotions))]
    sizes = [lengths(model, circuit, e) for e in range(len(circuit.emotions))]
    focus = [largest(whole, size, settings.focus) for whole, size in zip(wholes, sizes, strict=True)]
    core = core_of(focus)
    made = []
    for e, emotion in enumerate(circuit.emotions):
        own = {WHOLE: wholes[e]}
        for share in sorted({*settings.sizes, settings.focus}):
            if round(share * wholes[e].heads.numel()) < wholes[e].heads.sum():
                own[label(share)] = largest(wholes[e], sizes[e], share)
        own |= {CORE: focus[e].both(core), REST: focus[e].without(core)}
        own |= {size: sets[e] for size, sets in zip(HALVES, ranked, strict=bool(ranked))}
        made.append(Sets(emotion, {size: units for size, units in own.items() if len(units)}, removed[e], settings.seed))
    return made


def core_of(sets: Sequence[UnitSet]) -> UnitSet:
    """The units that most of the sets share."""
    least = max(2, -int(-CORE_SHARE * len(sets) // 1))
    return UnitSet(*(torch.stack([part(one) for one in sets]).sum(0) >= least for part in (lambda s: s.heads, lambda s: s.neurons)))


def focus_of(sets: Sets, settings: ValidateSettings) -> str:
    """The size at which everything is measured: the focus, or the whole circuit where it is no larger."""
    return sets.size_here(label(settings.focus))


def focus_label(sets: Sequence[Sets], settings: ValidateSettings) -> str:
    """What the focus of all emotions together is called: whole where no emotion's circuit is larger."""
    return label(settings.focus) if any(focus_of(one, settings) != WHOLE for one in sets) else WHOLE


def plan(sets: Sets, emotions: Sequence[str], settings: ValidateSettings) -> list[Trial]:
    """All trials of one emotion's circuit."""
    e, tone = sets.emotion, settings.elicitations[0]
    trials: list[Trial] = []
    for how in settings.elicitations:
        trials += [Trial(e, e, how), Trial(e, e, how, who=NEUTRAL_ASKED)]
    parts = {
        NECESSARY: lambda: [*_ablated(sets, settings), *_others(sets, emotions, tone, settings)],
        SUFFICIENT: lambda: _kept(sets, tone, settings),
        READ: lambda: [Trial(e, e, READING), *_tried(sets, e, READING, focus_of(sets, settings), _everybody(settings), ABLATE, MEAN)],
        SWAPS: lambda: _swapped(sets, emotions, settings),
    }
    for part in settings.parts:
        trials += parts[part]()
    return list(dict.fromkeys(trials))


def _tried(sets: Sets, asked: str, how: str, size: str, who: Sequence[str], action: str, kind: str, dose: float = 1.0) -> list[Trial]:
    """The trials of a size, none where the emotion has no such set."""
    there = HALVES[0] if size in (SAME_HALF, OTHER_HALF) else size
    return [Trial(sets.emotion, asked, how, size, one, action, kind, dose) for one in who if there in sets.own]


def _everybody(settings: ValidateSettings, randoms: int | None = None) -> list[str]:
    count = settings.randoms if randoms is None else min(randoms, settings.randoms)
    return [OWN, *(f"random:{i}" for i in range(count))]


def _ablated(sets: Sets, settings: ValidateSettings) -> list[Trial]:
    """Under prompts for the emotion: every size, the kinds and doses of the focus, core and rest, the rankings of halves."""
    e, (tone, *more), (kind, *_) = sets.emotion, settings.elicitations, settings.kinds
    focus, few = focus_of(sets, settings), _everybody(settings, FEW)
    replaced = [(tone, one) for one in settings.kinds] + [(how, kind) for how in more]
    trials = [one for how, by in replaced if by != MEAN for one in _tried(sets, e, how, WHOLE, [NOTHING], KEEP, by)]
    for size in (size for size in sets.own if size not in (CORE, REST, *HALVES)):
        for one in settings.kinds if size in (focus, WHOLE) else [kind]:
            trials += _tried(sets, e, tone, size, _everybody(settings), ABLATE, one)
    for dose in settings.doses:
        trials += _tried(sets, e, tone, focus, few, ABLATE, kind, dose)
    trials += _tried(sets, e, tone, focus, [who.replace("random", "sized") for who in few[1:]], ABLATE, kind)
    for size in (CORE, REST, SAME_HALF, OTHER_HALF):
        trials += _tried(sets, e, tone, size, few, ABLATE, kind)
    for how in more:
        trials += _tried(sets, e, how, focus, _everybody(settings), ABLATE, kind)
    return trials


def _others(sets: Sets, emotions: Sequence[str], tone: str, settings: ValidateSettings) -> list[Trial]:
    """Under prompts for other emotions."""
    trials: list[Trial] = []
    for other in (other for other in emotions if other != sets.emotion):
        trials.append(Trial(sets.emotion, other, tone))
        for size in dict.fromkeys((focus_of(sets, settings), WHOLE)):
            trials += [one for kind in settings.kinds for one in _tried(sets, other, tone, size, [OWN], ABLATE, kind)]
    return trials


def _kept(sets: Sets, tone: str, settings: ValidateSettings) -> list[Trial]:
    """All held but the set."""
    trials: list[Trial] = []
    for kind in settings.held:
        trials += _tried(sets, sets.emotion, tone, WHOLE, [NOTHING], KEEP, kind)
        for size in dict.fromkeys((focus_of(sets, settings), WHOLE)):
            trials += _tried(sets, sets.emotion, tone, size, _everybody(settings), KEEP, kind)
        for size in (CORE, REST):
            trials += _tried(sets, sets.emotion, tone, size, _everybody(settings, FEW), KEEP, kind)
    return trials


def _swapped(sets: Sets, emotions: Sequence[str], settings: ValidateSettings) -> list[Trial]:
    """Nobody asks, and contrasts are added."""
    e, lenders = sets.emotion, [f"heads of {other}" for other in emotions if other != sets.emotion]
    who = [OWN, *lenders, *_everybody(settings, FEW)[1:]]
    return [Trial(e, e, SWAPPED), *_tried(sets, e, SWAPPED, focus_of(sets, settings), who, ADD, CONTRAST)]
