"""How much each head should add: gains learned on the reply bank, by their effect on the final score.

A circuit adds `gain[e, h] * delta_bar[e, h]` at each head. The mean contrast `delta_bar` says in which direction a head tells emotions
apart; it does not say how much of it the rest of the model turns into emotional *text*, and for some heads it is the wrong way round.
The gains are found by gradient descent on what is wanted in the end: under the circuit of emotion e, the bank's reply in e should become
likely, and above all likelier than the bank's replies in the other emotions to the same prompt. The preference saturates: what is told
apart already pulls no more. Nothing but one number per head and emotion is free; the model's weights, and the directions, stay as they
are. Then the weakest heads are dropped and the rest is fitted on. docs/CIRCUITS.md says what it gave.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from emosteer.base.errors import DataError
from emosteer.base.progress import bar
from emosteer.circuits.settings import GainSettings
from emosteer.directions.activations import TokenRow, make_batch
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Bank, Group


@dataclass(frozen=True, eq=False)
class Gains:
    """values: [emotion, layer, n_heads], 0 for heads that are left out; curve, margin: by step, mean nats per token of the wanted
    replies, and how many more the other emotions' replies cost."""

    values: Tensor
    curve: tuple[float, ...]
    margin: tuple[float, ...]


def learn_gains(
    model: Model, z_delta: Tensor, groups: Sequence[Group], bank: Bank, emotions: Sequence[str], instruction: str, settings: GainSettings
) -> Gains:
    """Fits one gain per head and emotion.

    Args:
        z_delta: [emotion, layer, n_heads * d_head], the contrast that a gain of 1 adds.
        groups: scenario-events of train; those that the bank lacks an emotion's reply to are left out.

    Raises:
        DataError: if no scenario-event has a reply in every emotion, or a prompt and its reply exceed the model's sliding window.
    """
    usable = [group for group in groups if set(emotions) <= bank.get(group.key, {}).keys()]  # as in `extract`: complete groups only
    if not usable:
        raise DataError("no scenario-event has bank replies in every emotion to learn gains from; give --replies, or --gain-steps 0")
    written = _written(model, z_delta)
    model = _reader(model, settings.dtype)
    gains = torch.full(written.shape[:3], settings.start, device=model.device, requires_grad=True)
    mask = torch.ones_like(gains)
    optimiser = torch.optim.Adam([gains], lr=settings.rate, betas=(0.9, 0.95))
    draw, waiting, curve, margin = random.Random(settings.seed), list[Group](), list[float](), list[float]()
    with bar("learning gains (steps)", settings.steps) as advance:
        for step in range(settings.steps):
            if step == settings.steps // 2:
                mask = strongest_mask(gains.detach(), written, settings.keep)
            optimiser.param_groups[0]["lr"] = settings.rate * min(1.0, 2 * (settings.steps - step) / settings.steps)
            total = apart = 0.0
            for _ in range(settings.groups):
                if not waiting:
                    waiting = draw.sample(usable, len(usable))
                group = waiting.pop()
                shifts = draw.sample(range(1, len(emotions)), min(settings.others, len(emotions) - 1))
                replies = [bank[group.key][emotion] for emotion in emotions]
                costs = _costs(model, group, replies, shifts, gains * mask, written, instruction)
                (_loss(costs, settings) / settings.groups).backward()
                total += costs[0].mean().item() / settings.groups
                apart += (costs[1:] - costs[0]).mean().item() / settings.groups
            optimiser.step()
            optimiser.zero_grad()
            curve.append(round(total, 4))
            margin.append(round(apart, 4))
            advance(1)
    return Gains((gains.detach() * mask).cpu(), tuple(curve), tuple(margin))


def _loss(costs: Tensor, settings: GainSettings) -> Tensor:
    """What is minimised. costs: [1 + other, emotion], the wanted reply first."""
    preference = softplus(settings.sharpness * (costs[0] - costs[1:])).mean(0)
    return (costs[0] + settings.preference * preference).sum()


def _reader(model: Model, dtype: str) -> Model:
    """The model to take gradients through: a copy in lower precision where the model is in float32 and one is wanted."""
    if model.dtype != torch.float32 or dtype == "float32" or model.spread:  # a copy of a spread model would run the original's layers
        return model
    return Model(copy.deepcopy(model.hf).to(getattr(torch, dtype)), model.tokenizer, model.name, model.sha256)


def strongest_mask(gains: Tensor, written: Tensor, keep: float) -> Tensor:
    """Ones for the share of heads, per emotion, that write most: |gain| times the length of what gain 1 writes."""
    size = (gains.abs() * written.norm(dim=-1)).flatten(1)
    index = size.topk(max(1, round(size.shape[1] * keep)), dim=1).indices
    return torch.zeros_like(size).scatter_(1, index, 1.0).view_as(gains)


def _written(model: Model, z_delta: Tensor) -> Tensor:
    """What each head writes at gain 1. Shape [emotion, layer, n_heads, d_model], float32, on the model's device."""
    heads = z_delta.to(model.device).float().unflatten(-1, (model.shape.n_heads, model.shape.d_head))
    return torch.stack([torch.einsum("ehd,hdm->ehm", heads[:, i], model.w_o(i).float()) for i in range(model.shape.n_layers)], 1)


def _costs(
    model: Model, group: Group, replies: Sequence[str], shifts: Sequence[int], gains: Tensor, written: Tensor, instruction: str
) -> Tensor:
    """Mean nats per token, under each emotion's circuit, of its own reply and of those that stand `shifts` further in the list of
    emotions. Shape [1 + shift, emotion].

    One forward pass: the prompt stands once, all replies behind it see it but not each other.

    Args:
        replies: one per emotion.
    """
    n = len(replies)
    prompt = model.prompt_ids(plain(group.text, instruction, group.earlier))
    ending = [model.tokenizer.eos_token_id] if model.tokenizer.eos_token_id is not None else []
    texts = [model.text_ids(reply) + ending for reply in replies]
    segments = [(emotion, texts[(emotion + shift) % n]) for shift in (0, *shifts) for emotion in range(n)]
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
        batch.ids, _edits(gains, written, len(prompt) - 1, vector), attention_mask=batch.mask, position_ids=batch.positions, bridge=False
    )
    logits = model.logits(hidden[0, len(prompt) - 1 :]).float()
    costs = cross_entropy(logits, torch.tensor(target, device=logits.device), reduction="none")
    sizes = [len(reply) for _, reply in segments]
    return torch.stack([part.mean() for part in costs.split(sizes)]).view(-1, n)


def _edits(gains: Tensor, written: Tensor, start: int, vector: Sequence[int]) -> Mapping[Site, Edit]:
    """Adds each reply position's emotion at every attention output; gradients flow to the gains."""
    added = torch.einsum("elh,elhm->elm", gains, written)
    index = torch.tensor(vector, device=gains.device)

    def edit_at(layer: int) -> Edit:
        def edit(activation: Tensor) -> Tensor:
            shifted = activation.clone()
            shifted[:, start:] += added[index, layer].to(activation.dtype)
            return shifted

        return edit

    return {Site(layer, ATTN_OUT): edit_at(layer) for layer in range(written.shape[1])}
