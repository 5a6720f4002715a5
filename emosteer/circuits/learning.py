"""Learning what to add, on the reply bank, by its effect on the final score: the loop that every learned contender goes through.

Under what is learned for emotion e, the bank's reply in e should become likely, and above all likelier than the bank's replies in the
other emotions to the same prompt, and than the neutral one where the bank has it: what is read as neutral has failed like what is read as
another emotion. The preference saturates: what is told apart already pulls no more.

What is added is the same for every prompt, and the cheapest way to an emotion is to say what it says anywhere. So the prompt has to go on
mattering: how much dearer the same emotion's reply to *another* prompt is than the own one may not shrink below what it is without
steering (`content`).

Where prompts lack replies, the emotions that are there are learned from and told from each other. Each is then compared with some emotions
more often than with others; `Comparisons` weighs that out, so that what an emotion is told from does not depend on what is missing.

What is free, and where it is added, is a `Parametrisation`: outputs of heads (`head_outputs.py`), of heads and neurons within a budget
(`unit_outputs.py`), gains of heads (`gains.py`), or vectors of the residual stream (`learned_residual.py`). Draws, objective, steps and
schedule are the same for all, so that what differs between their results is the place and not the training. The model's weights stay as
they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from emosteer.base.errors import DataError
from emosteer.base.progress import bar
from emosteer.circuits.precision import reader
from emosteer.circuits.schedule import Schedule
from emosteer.circuits.settings import GainSettings
from emosteer.directions.activations import TokenRow, make_batch
from emosteer.models.dense_attention import dense_attention
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import NEUTRAL, Bank, Group


class Parametrisation(Protocol):
    """What is learned, and what it adds where. label: for people; rate: Adam's, in the units of its values."""

    @property
    def label(self) -> str: ...

    @property
    def rate(self) -> float: ...

    def start(self) -> Tensor:
        """The values before the first step, on the model's device, float32. The first dimension is the emotion."""
        ...

    def kept(self, values: Tensor, share: float) -> Tensor:
        """Ones for the values that are learned on when a share of the units is left, zeros for those that are dropped."""
        ...

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What they add: site -> [emotion, d_model]. Gradients flow through it to the values."""
        ...


class Choice(Protocol):
    """Which units are left when some are dropped, where that is not for the parametrisation to say."""

    def see(self, values: Tensor, gradient: Tensor) -> None:
        """Told after every step's gradients, before the values move by them. Shapes as the parametrisation's values."""
        ...

    def kept(self, values: Tensor, share: float) -> Tensor:
        """As `Parametrisation.kept`."""
        ...


@dataclass(frozen=True, eq=False)
class Learned:
    """values: as the parametrisation has them, 0 for those that were dropped; curve, margin: by step, mean nats per token of the wanted
    replies, and how many more the other emotions' replies cost; kept: how many more than without steering the replies to another prompt
    cost beyond the own ones, empty where that was not asked for; incomplete: how many of the prompts lack an emotion's reply; replies:
    emotion -> prompts with a reply in it."""

    values: Tensor
    curve: tuple[float, ...]
    margin: tuple[float, ...]
    kept: tuple[float, ...] = ()
    groups: int = 0
    incomplete: int = 0
    replies: Mapping[str, int] = field(default_factory=dict)

    @property
    def trace(self) -> dict[str, Any]:
        """How learning went and what from, as a circuit's metrics hold it."""
        learned_from = {"groups": self.groups, "incomplete": self.incomplete, "replies": dict(self.replies)}
        trace = {"curve": list(self.curve), "margin": list(self.margin), "learned_from": learned_from}
        return {**trace, **({"kept": list(self.kept)} if self.kept else {})}


#: A comparison that prompts seldom allow counts at most this many times, lest one prompt decide what is learned.
MOST_WEIGHT = 4.0


@dataclass(frozen=True)
class Comparisons:
    """The prompts that can be learned from, and how much a comparison counts.

    usable: prompts with replies in two emotions or more; incomplete: how many of them lack an emotion; weights: [emotion, other], by
    which each other emotion counts the same for an emotion, 1 where all prompts are complete.
    """

    usable: Sequence[Group]
    bank: Bank
    emotions: Sequence[str]
    incomplete: int
    weights: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], bank: Bank, emotions: Sequence[str]) -> Comparisons:
        """Raises a DataError where an emotion has no reply beside one in another."""
        held = {group.key: [n for n, emotion in enumerate(emotions) if emotion in bank.get(group.key, {})] for group in groups}
        usable = [group for group in groups if len(held[group.key]) > 1]
        counts = torch.zeros(len(emotions), len(emotions))  # how often each is compared with each, one comparison a prompt
        for group in usable:
            mine = torch.tensor(held[group.key])
            counts[mine[:, None], mine] += 1 / (len(mine) - 1)
        counts.fill_diagonal_(0)
        lacking = [emotion for emotion, row in zip(emotions, counts, strict=True) if not row.any()]
        if lacking:
            named = f"{', '.join(lacking)} and in another emotion" if usable else "two emotions"
            raise DataError(f"no scenario-event has bank replies in {named} to learn from; give --replies, or --gain-steps 0")
        fair = counts.sum(1, keepdim=True) / (counts > 0).sum(1, keepdim=True)
        weights = torch.where(counts > 0, fair / counts, 0.0).clamp_max(MOST_WEIGHT)
        incomplete = sum(len(held[group.key]) < len(emotions) for group in usable)
        return cls(usable, bank, tuple(emotions), incomplete, weights)

    def held(self, group: Group) -> tuple[int, ...]:
        """The numbers of the emotions that a prompt has a reply in."""
        return tuple(number for number, emotion in enumerate(self.emotions) if emotion in self.bank[group.key])

    @property
    def replies(self) -> dict[str, int]:
        """Emotion -> prompts with a reply in it."""
        return {emotion: sum(emotion in self.bank[group.key] for group in self.usable) for emotion in self.emotions}


def learn(
    model: Model,
    what: Parametrisation,
    groups: Sequence[Group],
    bank: Bank,
    emotions: Sequence[str],
    instruction: str,
    settings: GainSettings,
    *,
    schedule: Schedule | None = None,
    choice: Choice | None = None,
    penalty: Callable[[Tensor, int], Tensor] | None = None,
    at_end: Callable[[int, Tensor], None] | None = None,
) -> Learned:
    """Fits the values of a parametrisation; for one seed the draws of scenario-events and comparisons are the same for all of them.

    Args:
        groups: scenario-events of train; those with replies in two emotions or more are learned from.
        schedule: when units are dropped and the rate comes down; one cut to `settings.keep` after half of the steps if not given. It
            has its own number of steps.
        choice: which units are left; the parametrisation's own if not given. penalty: (values, step) -> what is minimised besides.
        at_end: called with the number of steps and the values at every end of the schedule.

    Raises:
        DataError: if an emotion has no reply beside one in another, or a prompt and its reply exceed the model's sliding window.
    """
    data = Comparisons.of(groups, bank, emotions)
    model = reader(model, settings.dtype)
    values = what.start().requires_grad_()
    mask = torch.ones_like(values)
    optimiser = torch.optim.Adam([values], lr=what.rate, betas=(0.9, 0.95))
    plan = Schedule.halfway(settings.steps, settings.keep) if schedule is None else schedule
    draw, waiting, trace = random.Random(settings.seed), list[Group](), torch.zeros(plan.steps, 3)
    with dense_attention(model), bar(f"learning {what.label} (steps)", plan.steps) as advance:
        for step in range(plan.steps):
            if step in plan.cuts:
                mask = (choice or what).kept(values.detach() * mask, plan.cuts[step])
            optimiser.param_groups[0]["lr"] = what.rate * plan.rate(step)
            if penalty is not None:
                penalty(values, step).backward()
            for _ in range(settings.groups):
                if not waiting:
                    waiting = draw.sample(data.usable, len(data.usable))
                compared = Compared.draw(waiting.pop(), data, settings, draw)
                lost, told = loss(model, compared, what.added(values * mask), instruction, settings)
                (lost / settings.groups).backward()
                trace[step] += told / settings.groups
            if choice is not None and values.grad is not None:
                choice.see(values.detach() * mask, values.grad)
            optimiser.step()
            optimiser.zero_grad()
            if at_end is not None and step + 1 in plan.ends:
                at_end(step + 1, (values.detach() * mask).cpu())
            advance(1)
    curve, margin, kept = ([round(value, 4) for value in column] for column in trace.T.tolist())
    return Learned(
        (values.detach() * mask).cpu(),
        tuple(curve),
        tuple(margin),
        tuple(kept) if settings.content else (),
        len(data.usable),
        data.incomplete,
        data.replies,
    )


@dataclass(frozen=True)
class Compared:
    """What one prompt's learning compares. wanted: its reply in each emotion that it has one in; shifts: of the other emotions among these
    that it is told from; neutral: its neutral reply, or none; elsewhere: another prompt's reply in each of the emotions, or none; held: the
    numbers of the emotions, empty where it has them all; weights: [comparison, emotion], how much each counts, None where all count the
    same."""

    group: Group
    wanted: Sequence[str]
    shifts: Sequence[int]
    neutral: Sequence[str]
    elsewhere: Sequence[str]
    held: tuple[int, ...] = ()
    weights: Tensor | None = None

    @classmethod
    def draw(cls, group: Group, data: Comparisons, settings: GainSettings, draw: random.Random) -> Compared:
        """data: where the other prompt is drawn from, too."""
        replies, held = data.bank[group.key], data.held(group)
        neutral = [replies[NEUTRAL]] if NEUTRAL in replies and settings.others else []
        wanted = settings.others - len(neutral)
        shifts = draw.sample(range(1, len(held)), min(wanted, len(held) - 1))
        names = [data.emotions[number] for number in held]
        elsewhere = _elsewhere(group, names, data, draw) if settings.content else []
        weights = None
        if data.incomplete and shifts:
            others = torch.tensor([[held[(place + shift) % len(held)] for place in range(len(held))] for shift in shifts])
            # as many comparisons as a complete prompt has, and the neutral reply in its usual share
            full = min(wanted, len(data.emotions) - 1)
            rows = data.weights[torch.tensor(held), others] * full / len(shifts)
            weights = torch.cat([rows, torch.ones(len(neutral), len(held))])
            weights = weights * len(weights) / (full + len(neutral))
        whole = len(held) == len(data.emotions)
        return cls(group, [replies[e] for e in names], shifts, neutral, elsewhere, () if whole else held, weights)


def _elsewhere(group: Group, emotions: Sequence[str], data: Comparisons, draw: random.Random) -> list[str]:
    """Another prompt's replies in some emotions, from further prompts where it lacks one; none where an emotion is nowhere else."""
    others = [other for other in data.usable if other is not group]
    if not others:
        return []
    first, found = data.bank[draw.choice(others).key], list[str]()
    for emotion in emotions:
        rows = [data.bank[other.key] for other in others if emotion in data.bank[other.key]] if emotion not in first else [first]
        if not rows:
            return []
        found.append((draw.choice(rows) if rows[0] is not first else first)[emotion])
    return found


def loss(model: Model, compared: Compared, added: Mapping[Site, Tensor], instruction: str, settings: GainSettings) -> tuple[Tensor, Tensor]:
    """What is minimised for one prompt, and the figures [curve, margin, kept] of `Learned`."""
    group, wanted, elsewhere = compared.group, compared.wanted, compared.elsewhere
    costs = _compared_costs(model, compared, added, instruction)
    told = costs[:-1] if elsewhere else costs
    figures = torch.stack([told[0].mean(), (told[1:] - told[0]).mean(), torch.zeros_like(told[0, 0])]).detach().cpu()
    if not elsewhere:
        return objective(told, settings, compared.weights), figures
    with torch.no_grad():
        plain = reply_costs(model, group, wanted, (), {}, instruction, (), elsewhere)
    kept = (costs[-1] - costs[0]) - (plain[-1] - plain[0])
    figures[2] = kept.mean().item()
    return objective(told, settings, compared.weights) + settings.content * softplus(-settings.sharpness * kept).sum(), figures


def margins(model: Model, compared: Compared, added: Mapping[Site, Tensor], instruction: str) -> Tensor:
    """How many nats per token more the replies cost that one prompt's are compared with, by emotion that it has a reply in. Gradients flow
    to what is added."""
    costs = _compared_costs(model, replace(compared, elsewhere=()), added, instruction)
    return (costs[1:] - costs[0]).mean(0)


def _compared_costs(model: Model, compared: Compared, added: Mapping[Site, Tensor], instruction: str) -> Tensor:
    """`reply_costs` of what one prompt's learning compares, under what is added for the emotions that it has."""
    if compared.held:
        added = {site: value[list(compared.held)] for site, value in added.items()}
    return reply_costs(model, compared.group, compared.wanted, compared.shifts, added, instruction, compared.neutral, compared.elsewhere)


def objective(costs: Tensor, settings: GainSettings, weights: Tensor | None = None) -> Tensor:
    """Likely, and told from the other replies. costs: [1 + other, emotion], the wanted reply first; weights: [other, emotion]."""
    preferences = softplus(settings.sharpness * (costs[0] - costs[1:]))
    preference = (preferences if weights is None else preferences * weights.to(preferences)).mean(0)
    return (costs[0] + settings.preference * preference).sum()


def reply_costs(
    model: Model,
    group: Group,
    replies: Sequence[str],
    shifts: Sequence[int],
    added: Mapping[Site, Tensor],
    instruction: str,
    common: Sequence[str] = (),
    elsewhere: Sequence[str] = (),
) -> Tensor:
    """Mean nats per token, under what is added for each emotion, of its own reply, of those that stand `shifts` further in the list of
    emotions, of those that all are compared with, and of its reply to another prompt. Shape [1 + shift + common (+ 1), emotion].

    One forward pass: the prompt stands once, all replies behind it see it but not each other.

    Args:
        replies: one per emotion; added: site -> [emotion, d_model], wherever a token of a reply is written; common: replies in no
            emotion of the list, such as the neutral one; elsewhere: one per emotion, written to another prompt, or none.
    """
    n = len(replies)
    prompt = model.prompt_ids(plain(group.text, instruction, group.earlier))
    ending = [model.tokenizer.eos_token_id] if model.tokenizer.eos_token_id is not None else []
    texts = [model.text_ids(reply) + ending for reply in replies]
    segments = [(emotion, texts[(emotion + shift) % n]) for shift in (0, *shifts) for emotion in range(n)]
    segments += [(emotion, model.text_ids(reply) + ending) for reply in common for emotion in range(n)]
    segments += [(emotion, model.text_ids(reply) + ending) for emotion, reply in enumerate(elsewhere)]
    ids, positions, owner, vector, target = list(prompt[:-1]), list(range(len(prompt) - 1)), [0] * (len(prompt) - 1), [], []
    for number, (emotion, reply) in enumerate(segments, start=1):
        ids += [prompt[-1], *reply[:-1]]
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(reply))
        owner += [number] * len(reply)
        vector += [emotion] * len(reply)
        target += reply
    window, longest = model.window, 1 + max(positions)
    if window is not None and longest > window:  # the mask is taken as it is, so that a reply would see further back than it does alone
        raise DataError(f"{group.key}: {longest} tokens do not fit the sliding window of {model.name} ({window}); use --gain-steps 0")
    row = TokenRow(tuple(ids), tuple(positions), tuple(owner), ((len(prompt) - 1,),))
    batch = make_batch(model, [row])
    hidden = model.run(
        batch.ids, _edits(added, len(prompt) - 1, vector), attention_mask=batch.mask, position_ids=batch.positions, bridge=False
    )
    logits = model.logits(hidden[0, len(prompt) - 1 :]).float()
    costs = cross_entropy(logits, torch.tensor(target, device=logits.device), reduction="none")
    sizes = [len(reply) for _, reply in segments]
    return torch.stack([part.mean() for part in costs.split(sizes)]).view(-1, n)


def _edits(added: Mapping[Site, Tensor], start: int, vector: Sequence[int]) -> Mapping[Site, Edit]:
    """Adds each reply position's emotion at every site; gradients flow to what is added."""

    def adding(value: Tensor) -> Edit:
        index = torch.tensor(vector, device=value.device)

        def edit(activation: Tensor) -> Tensor:
            shifted = activation.clone()
            shifted[:, start:] += value[index].to(activation.dtype)
            return shifted

        return edit

    return {site: adding(value) for site, value in added.items()}
