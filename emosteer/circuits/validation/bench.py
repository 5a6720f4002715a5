"""Where trials are run: one prompt, asked in one way for one emotion, with every set of units that is tried on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emosteer.circuits.assemble import DEFAULT_STRENGTH
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.validation.replays import Intervention, Passage, Readout, Source, capture, replay, sites_of
from emosteer.circuits.validation.settings import MEAN, NEUTRALLY, ValidateSettings
from emosteer.circuits.validation.trials import (
    ADD,
    CLEAN,
    KEEP,
    NEUTRAL_ASKED,
    OWN,
    READING,
    SWAPPED,
    Sets,
    Trial,
    focus_of,
)
from emosteer.circuits.validation.unit_sets import UnitSet, written_lengths
from emosteer.models.model import Model
from emosteer.models.sites import Site, Z
from emosteer.scenarios.prompts import elicit, plain
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group
from emosteer.scenarios.splits import stable_share

#: What is measured of a trial. Followed: how many more nats per token the other emotions' replies cost than the wanted one, and the
#: stream's projection on the emotion's directions over all replies. Read: projection of the emotion's own reply on its directions less
#: that on the others', the same of another emotion's reply, nats per token of the neutral reply, and how many more a neutral reply to
#: another prompt costs.
FOLLOWED = ("margin", "projection")
READ = ("reading", "other reading", "cost", "answer")


@dataclass(frozen=True, eq=False)
class References:
    """means: site -> [width], of units while neutral replies are written to plain prompts; removed: [emotion, layer, head], how long what a
    head's mean ablation takes out of the stream is while an emotion is followed (root mean square); contrasts: [emotion, layer, width],
    mean contrasts of heads, which swaps add."""

    means: Source
    removed: Tensor
    contrasts: Tensor


def passage_of(model: Model, messages: Sequence[dict[str, str]], replies: Sequence[str], longest: int) -> Passage:
    """Token ids of a prompt and of the beginnings of replies, their end-of-text tokens left out where they are cut."""
    ending = [model.tokenizer.eos_token_id] if model.tokenizer.eos_token_id is not None else []
    texts = [tuple((model.text_ids(reply) + ending)[:longest]) for reply in replies]
    return Passage(tuple(model.prompt_ids(messages)), tuple(texts))


def readout_of(circuit: Circuit, device: torch.device) -> Readout:
    """The circuit's own directions in the stable late layers."""
    band = tuple(circuit.metrics.get("band") or range(2 * circuit.vectors.shape[1] // 3, circuit.vectors.shape[1]))
    return Readout(band, circuit.vectors[:, list(band)].to(device).float())


def neutral_means(model: Model, groups: Sequence[Group], bank: Bank, instruction: str, neurons: bool, longest: int) -> dict[Site, Tensor]:
    """Means of all units while the bank's neutral replies (all its replies, where it has none) are written to plain prompts, nobody
    asking for an emotion."""
    sites, totals = sites_of(model, neurons), dict[Site, Tensor]()
    for group in groups:
        replies = [bank[group.key][NEUTRAL]] if NEUTRAL in bank[group.key] else list(bank[group.key].values())
        seen = capture(model, passage_of(model, plain(group.text, instruction, group.earlier), replies, longest), sites)
        for site in sites:
            totals[site] = totals.get(site, torch.zeros(())) + seen[site].float().mean(0).cpu()
    return {site: total / len(groups) for site, total in totals.items()}


def removed_by_heads(
    model: Model, groups: Sequence[Group], bank: Bank, circuit: Circuit, means: Source, elicitation: str, longest: int
) -> Tensor:
    """How much each head's mean ablation takes out of the stream while each emotion is followed. Shape [emotion, layer, head]."""
    shape, sites = model.shape, sites_of(model, False)
    total = torch.zeros(len(circuit.emotions), shape.n_layers, shape.n_heads)
    for e, emotion in enumerate(circuit.emotions):
        for group in groups:
            asked = elicit(elicitation, group.text, emotion, circuit.instruction, group.earlier)
            seen = capture(model, passage_of(model, asked, [bank[group.key][emotion]], longest), sites)
            for site in sites:
                gone = (seen[site].float().cpu() - means[site]).unflatten(-1, (shape.n_heads, shape.d_head))
                total[e, site.layer] += written_lengths(model, site.layer, gone).square().mean(0)
    return (total / len(groups)).sqrt()


@dataclass(frozen=True, eq=False)
class Bench:
    """All that trials need.

    groups: the prompts that are tried; halves: which half of the prompt kinds each belongs to; sets: by emotion.
    """

    model: Model
    circuit: Circuit
    bank: Bank
    groups: Sequence[Group]
    halves: Sequence[int]
    sets: Sequence[Sets]
    references: References
    readout: Readout
    settings: ValidateSettings

    def run(self, place: int, elicitation: str, asked: str, trials: Sequence[Trial]) -> list[list[float]]:
        """The figures (`FOLLOWED` or `READ`) of trials that share a prompt, how it asks, and the emotion.

        Args:
            place: of the prompt among the groups.
        """
        group, emotions = self.groups[place], self.circuit.emotions
        e = emotions.index(asked)
        others = self._others(group, e)
        replies = self._replies(place, elicitation, asked, [emotions[other] for other in others])
        passage = passage_of(self.model, self._messages(group, elicitation, asked), replies, self.settings.reply_tokens)
        sources: dict[str, Source] = {MEAN: self.references.means}
        found: list[list[float]] = [[] for _ in trials]
        for (action, kind, who), places in _batches(trials).items():
            if who:
                behind = passage if who == CLEAN else self._behind(passage, group, elicitation, None)
                costs, seen = (one.expand(len(places), *one.shape[1:]) for one in self._replay(behind, [None], {}, False))
            else:
                if kind not in sources:
                    sources[kind] = self._source(kind, passage, group, elicitation, e)
                chosen = [self._intervention(trials[index], place, action) for index in places]
                costs, seen = self._replay(passage, chosen, sources[kind], action == ADD)
            for index, cost, projections in zip(places, costs, seen, strict=True):
                found[index] = _read(cost, projections, e, others[0]) if elicitation == READING else _followed(cost, projections, e)
        return found

    def _replay(
        self, passage: Passage, interventions: Sequence[Intervention | None], source: Source, adding: bool
    ) -> tuple[Tensor, Tensor]:
        tokens = self.settings.row_tokens
        done = replay(self.model, passage, interventions, source, self.readout, adding=adding, row_tokens=tokens)
        return done.costs, done.projections

    def _others(self, group: Group, e: int) -> list[int]:
        """The emotions whose replies the wanted one is compared with; by turns, so that over the prompts each counts about as often."""
        n = len(self.circuit.emotions)
        first = int(stable_share(f"others/{group.key}", self.settings.seed) * (n - 1))
        count = min(self.settings.others, n - 1)
        return [(e + 1 + (first + step * max(1, (n - 1) // count)) % (n - 1)) % n for step in range(count)]

    def _replies(self, place: int, elicitation: str, asked: str, others: Sequence[str]) -> list[str]:
        group = self.groups[place]
        replies = self.bank[group.key]
        if elicitation != READING:
            return [replies[asked], *(replies[other] for other in others)]
        elsewhere = self.bank[self.groups[(place + 1) % len(self.groups)].key]
        calm = NEUTRAL if NEUTRAL in replies and NEUTRAL in elsewhere else others[-1]
        return [replies[asked], replies[others[0]], replies[calm], elsewhere[calm]]

    def _messages(self, group: Group, elicitation: str, asked: str | None) -> list[dict[str, str]]:
        how = "reply" if elicitation in (READING, SWAPPED) else elicitation
        return elicit(how, group.text, asked, self.circuit.instruction, group.earlier)

    def _behind(self, passage: Passage, group: Group, elicitation: str, asked: str | None) -> Passage:
        """The same replies behind the prompt that asks for another emotion, or for neutrality."""
        return replace(passage, prompt=tuple(self.model.prompt_ids(self._messages(group, elicitation, asked))))

    def _source(self, kind: str, passage: Passage, group: Group, elicitation: str, e: int) -> Source:
        if elicitation == SWAPPED:
            return {Site(layer, Z): self.references.contrasts[e, layer] for layer in range(self.model.shape.n_layers)}
        n, shift = len(self.circuit.emotions), int(stable_share(f"other/{group.key}", self.settings.seed) * 2**20)
        asked = None if kind == NEUTRALLY else self.circuit.emotions[(e + 1 + shift % (n - 1)) % n]
        sites = sites_of(self.model, bool(len(self.circuit.neuron_index)))
        return capture(self.model, self._behind(passage, group, elicitation, asked), sites)

    def _intervention(self, trial: Trial, place: int, action: str) -> Intervention:
        sets = self.sets[self.circuit.emotions.index(trial.emotion)]
        if action != ADD:
            units = sets.of(trial.size, trial.who, self.halves[place])
            return Intervention(units.outside(sets.holds_neurons) if action == KEEP else units, trial.dose)
        lender = trial.who.removeprefix("heads of ")
        if lender in self.circuit.emotions:
            theirs = self.sets[self.circuit.emotions.index(lender)]
            units = theirs.of(focus_of(theirs, self.settings), OWN)  # whose circuit may be smaller or larger than the focus
        else:
            units = sets.of(trial.size, trial.who)
        wanted = self._added(sets.of(trial.size, OWN), trial.emotion)
        heads = UnitSet(units.heads, units.neurons[:, :0])
        return Intervention(heads, DEFAULT_STRENGTH * wanted / max(self._added(units, trial.emotion), 1e-12))

    def _added(self, units: UnitSet, emotion: str) -> float:
        """How long the vectors are that a set's heads add with an emotion's contrasts: root of the sum over layers of squared lengths."""
        shape, contrast = self.model.shape, self.references.contrasts[self.circuit.emotions.index(emotion)]
        total = 0.0
        for layer in units.heads.any(1).nonzero().flatten().tolist():
            z = contrast[layer].unflatten(-1, (shape.n_heads, shape.d_head)) * units.heads[layer][:, None]
            total += torch.einsum("hd,hdm->m", z, self.model.w_o(layer).float().cpu()).square().sum().item()
        return total**0.5


def _batches(trials: Sequence[Trial]) -> dict[tuple[str, str, str], list[int]]:
    """Trials that go through the model together: (action, kind, baseline) -> their places."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for index, trial in enumerate(trials):
        who = trial.who if trial.who in (CLEAN, NEUTRAL_ASKED) else ""
        found.setdefault((trial.action, trial.kind, who), []).append(index)
    return found


def _followed(costs: Tensor, projections: Tensor, e: int) -> list[float]:
    """costs: [reply], the wanted one first; projections: [reply, emotion]."""
    return [(costs[1:].mean() - costs[0]).item(), projections[:, e].mean().item()]


def _read(costs: Tensor, projections: Tensor, e: int, other: int) -> list[float]:
    """costs, projections: of the own reply, another emotion's, the neutral one and another prompt's neutral one."""

    def told(reply: Tensor, emotion: int) -> float:
        return (reply[emotion] - (reply.sum() - reply[emotion]) / (len(reply) - 1)).item()

    return [told(projections[0], e), told(projections[1], other), costs[2].item(), (costs[3] - costs[2]).item()]
