"""Learning what to add, on the reply bank, by its effect on the final score: the loop that every learned contender goes through.

Under what is learned for emotion e, the bank's reply in e should become likely, and above all likelier than the bank's replies in the
other emotions to the same prompt, and than the neutral one where the bank has it: what is read as neutral has failed like what is read as
another emotion. The preference saturates: what is told apart already pulls no more.

What is added is the same for every prompt, and the cheapest way to an emotion is to say what it says anywhere. So the prompt has to go on
mattering: how much dearer the same emotion's reply to *another* prompt is than the own one may not shrink below what it is without
steering (`content`).

What is free, and where it is added, is a `Parametrisation`: outputs of heads (`head_outputs.py`), gains of heads (`gains.py`), or vectors
of the residual stream (`learned_residual.py`). Draws, objective, steps and schedule are the same for all, so that what differs between
their results is the place and not the training. The model's weights stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from emosteer.base.errors import DataError
from emosteer.base.progress import bar
from emosteer.circuits.precision import reader
from emosteer.circuits.settings import GainSettings
from emosteer.directions.activations import TokenRow, make_batch
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

    def kept(self, values: Tensor) -> Tensor:
        """Ones for the values that are learned on after half of the steps, zeros for those that are dropped."""
        ...

    def added(self, values: Tensor) -> Mapping[Site, Tensor]:
        """What they add: site -> [emotion, d_model]. Gradients flow through it to the values."""
        ...


@dataclass(frozen=True, eq=False)
class Learned:
    """values: as the parametrisation has them, 0 for those that were dropped; curve, margin: by step, mean nats per token of the wanted
    replies, and how many more the other emotions' replies cost; kept: how many more than without steering the replies to another prompt
    cost beyond the own ones, empty where that was not asked for."""

    values: Tensor
    curve: tuple[float, ...]
    margin: tuple[float, ...]
    kept: tuple[float, ...] = ()

    @property
    def trace(self) -> dict[str, list[float]]:
        """How learning went, as a circuit's metrics hold it."""
        return {"curve": list(self.curve), "margin": list(self.margin), **({"kept": list(self.kept)} if self.kept else {})}


def learn(
    model: Model,
    what: Parametrisation,
    groups: Sequence[Group],
    bank: Bank,
    emotions: Sequence[str],
    instruction: str,
    settings: GainSettings,
) -> Learned:
    """Fits the values of a parametrisation; for one seed the draws of scenario-events and comparisons are the same for all of them.

    Args:
        groups: scenario-events of train; those that the bank lacks an emotion's reply to are left out.

    Raises:
        DataError: if no scenario-event has a reply in every emotion, or a prompt and its reply exceed the model's sliding window.
    """
    usable = [group for group in groups if set(emotions) <= bank.get(group.key, {}).keys()]  # as in `extract`: complete groups only
    if not usable:
        raise DataError("no scenario-event has bank replies in every emotion to learn gains from; give --replies, or --gain-steps 0")
    model = reader(model, settings.dtype)
    values = what.start().requires_grad_()
    mask = torch.ones_like(values)
    optimiser = torch.optim.Adam([values], lr=what.rate, betas=(0.9, 0.95))
    draw, waiting, trace = random.Random(settings.seed), list[Group](), torch.zeros(settings.steps, 3)
    with bar(f"learning {what.label} (steps)", settings.steps) as advance:
        for step in range(settings.steps):
            if step == settings.steps // 2:
                mask = what.kept(values.detach())
            optimiser.param_groups[0]["lr"] = what.rate * min(1.0, 2 * (settings.steps - step) / settings.steps)
            for _ in range(settings.groups):
                if not waiting:
                    waiting = draw.sample(usable, len(usable))
                compared = Compared.draw(waiting.pop(), usable, bank, emotions, settings, draw)
                lost, told = loss(model, compared, what.added(values * mask), instruction, settings)
                (lost / settings.groups).backward()
                trace[step] += told / settings.groups
            optimiser.step()
            optimiser.zero_grad()
            advance(1)
    curve, margin, kept = ([round(value, 4) for value in column] for column in trace.T.tolist())
    return Learned((values.detach() * mask).cpu(), tuple(curve), tuple(margin), tuple(kept) if settings.content else ())


@dataclass(frozen=True)
class Compared:
    """What one prompt's learning compares. wanted: its reply in each emotion; shifts: of the other emotions that it is told from; neutral:
    its neutral reply, or none; elsewhere: another prompt's reply in each emotion, or none."""

    group: Group
    wanted: Sequence[str]
    shifts: Sequence[int]
    neutral: Sequence[str]
    elsewhere: Sequence[str]

    @classmethod
    def draw(
        cls, group: Group, usable: Sequence[Group], bank: Bank, emotions: Sequence[str], settings: GainSettings, draw: random.Random
    ) -> Compared:
        """usable: the prompts that the other one is drawn from."""
        replies = bank[group.key]
        neutral = [replies[NEUTRAL]] if NEUTRAL in replies and settings.others else []
        shifts = draw.sample(range(1, len(emotions)), min(settings.others - len(neutral), len(emotions) - 1))
        others = [other for other in usable if other is not group] if settings.content else []
        elsewhere = bank[draw.choice(others).key] if others else {}
        return cls(group, [replies[e] for e in emotions], shifts, neutral, [elsewhere[e] for e in emotions] if elsewhere else [])


def loss(model: Model, compared: Compared, added: Mapping[Site, Tensor], instruction: str, settings: GainSettings) -> tuple[Tensor, Tensor]:
    """What is minimised for one prompt, and the figures [curve, margin, kept] of `Learned`."""
    group, wanted, elsewhere = compared.group, compared.wanted, compared.elsewhere
    costs = reply_costs(model, group, wanted, compared.shifts, added, instruction, compared.neutral, elsewhere)
    told = costs[:-1] if elsewhere else costs
    figures = torch.stack([told[0].mean(), (told[1:] - told[0]).mean(), torch.zeros_like(told[0, 0])]).detach().cpu()
    if not elsewhere:
        return objective(told, settings), figures
    with torch.no_grad():
        plain = reply_costs(model, group, wanted, (), {}, instruction, (), elsewhere)
    kept = (costs[-1] - costs[0]) - (plain[-1] - plain[0])
    figures[2] = kept.mean().item()
    return objective(told, settings) + settings.content * softplus(-settings.sharpness * kept).sum(), figures


def objective(costs: Tensor, settings: GainSettings) -> Tensor:
    """Likely, and told from the other replies. costs: [1 + other, emotion], the wanted reply first."""
    preference = softplus(settings.sharpness * (costs[0] - costs[1:])).mean(0)
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
