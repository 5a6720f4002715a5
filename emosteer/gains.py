"""How much each head should add: gains learned on the reply bank, by their effect on the final score.

A circuit adds `gain[e, h] * delta_bar[e, h]` at each head. The mean contrast `delta_bar` says in which direction a head tells emotions
apart; it does not say how much of it the rest of the model turns into emotional *text*, and for some heads it is the wrong way round.
The gains are found by gradient descent on what is wanted in the end: under the circuit of emotion e, the bank's reply in e should become
likely, and neither the reply in another emotion to the same prompt nor the reply in e to another prompt should: the first keeps
emotions apart, the second keeps replies to the point. Nothing but one number per head and emotion is free; the model's weights, and the
directions, stay as they are. Then the weakest heads are dropped and the rest is fitted on. docs/CIRCUITS.md says what it gave.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from emosteer.activations import Row, make_batch
from emosteer.attribution import written_direction
from emosteer.errors import DataError, UsageError
from emosteer.model import Edit, Model
from emosteer.naming import name_direction
from emosteer.progress import bar
from emosteer.prompts import plain
from emosteer.scenarios import Bank, Group
from emosteer.sites import ATTN_OUT, RESID_MID, Site


@dataclass(frozen=True)
class GainSettings:
    """steps: of Adam, each on `groups` scenario-events; rate: its learning rate, in units of strength; start: every gain at first;
    contrast: weight of what should not become likely (in turn: the other emotion's reply, the other prompt's reply); keep: share of
    heads left after half of the steps; dtype: what a float32 model is read in meanwhile (a copy; half the time, and one number per
    head does not need more), "float32" for none.
    """

    steps: int = 48
    groups: int = 4
    rate: float = 0.3
    start: float = 2.0
    contrast: float = 0.3
    keep: float = 0.5
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.keep <= 1:
            raise UsageError(f"expected --gain-steps of at least 0 and --keep above 0 and up to 1, found {self.steps} and {self.keep}")


@dataclass(frozen=True, eq=False)
class Gains:
    """values: [emotion, layer, n_heads], 0 for heads that are left out; curve: mean nats per token of the wanted replies, by step."""

    values: Tensor
    curve: tuple[float, ...]


def without_names(model: Model, emotions: Sequence[str], z_delta: Tensor) -> Tensor:
    """Takes out of each head's contrast what lifts the emotion's own name directly, head by head, so that no gain can bring it back.

    Args:
        z_delta: [emotion, layer, n_heads * d_head].
    """
    heads = z_delta.unflatten(-1, (model.shape.n_heads, model.shape.d_head)).clone()
    for e, emotion in enumerate(emotions):
        direction = name_direction(model, emotion)
        if direction is None:
            continue
        for layer in range(model.shape.n_layers):
            written = model.w_o(layer).float() @ written_direction(model, layer, RESID_MID, direction).float()
            written = written.to(heads) / written.norm(dim=-1, keepdim=True).clamp_min(1e-12).to(heads)
            heads[e, layer] -= (heads[e, layer] * written).sum(-1, keepdim=True) * written
    return heads.flatten(-2)


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
    draw, waiting, curve = random.Random(settings.seed), list[Group](), []
    with bar("learning gains (steps)", settings.steps) as advance:
        for step in range(settings.steps):
            if step == settings.steps // 2:
                mask = strongest_mask(gains.detach(), written, settings.keep)
            optimiser.param_groups[0]["lr"] = settings.rate * min(1.0, 2 * (settings.steps - step) / settings.steps)
            total = 0.0
            for _ in range(settings.groups):
                if not waiting:
                    waiting = draw.sample(usable, len(usable))
                group = waiting.pop()
                wanted = [bank[group.key][emotion] for emotion in emotions]
                unwanted = _unwanted(group, usable, bank, emotions, step, draw)
                own, other = _costs(model, group, wanted, unwanted, gains * mask, written, instruction)
                ((own.sum() - settings.contrast * other.sum()) / settings.groups).backward()
                total += own.mean().item() / settings.groups
            optimiser.step()
            optimiser.zero_grad()
            curve.append(round(total, 4))
            advance(1)
    return Gains((gains.detach() * mask).cpu(), tuple(curve))


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


def _unwanted(group: Group, groups: Sequence[Group], bank: Bank, emotions: Sequence[str], step: int, draw: random.Random) -> list[str]:
    """For each emotion a reply that its circuit should not make likely: in even steps another emotion's to the same prompt, in odd
    ones the same emotion's to another scenario."""
    n = len(emotions)
    elsewhere = [other for other in groups if other.key.scenario != group.key.scenario]
    if step % 2 and elsewhere:
        other = draw.choice(elsewhere)
        return [bank[other.key][emotion] for emotion in emotions]
    shift = 1 + (step // 2) % (n - 1)  # every other emotion takes its turn
    return [bank[group.key][emotions[(e + shift) % n]] for e in range(n)]


def _costs(
    model: Model, group: Group, wanted: Sequence[str], unwanted: Sequence[str], gains: Tensor, written: Tensor, instruction: str
) -> tuple[Tensor, Tensor]:
    """Mean nats per token, under each emotion's circuit, of its wanted and its unwanted reply. Shapes [emotion].

    One forward pass: the prompt stands once, all replies behind it see it but not each other.
    """
    n = len(wanted)
    prompt = model.prompt_ids(plain(group.text, instruction))
    ending = [model.tokenizer.eos_token_id] if model.tokenizer.eos_token_id is not None else []
    segments = [(e, model.text_ids(text) + ending) for texts in (wanted, unwanted) for e, text in enumerate(texts)]
    ids, positions, owner, vector, target = list(prompt[:-1]), list(range(len(prompt) - 1)), [0] * (len(prompt) - 1), [], []
    for number, (emotion, reply) in enumerate(segments, start=1):
        ids += [prompt[-1], *reply[:-1]]
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(reply))
        owner += [number] * len(reply)
        vector += [emotion] * len(reply)
        target += reply
    window, longest = getattr(model.hf.config, "sliding_window", None), 1 + max(positions)
    if window is not None and longest > window:  # the mask is taken as it is, so that a reply would see further back than it does alone
        raise DataError(f"{group.key}: {longest} tokens do not fit the sliding window of {model.name} ({window}); use --gain-steps 0")
    row = Row(tuple(ids), tuple(positions), tuple(owner), ((len(prompt) - 1,),))
    batch = make_batch(model, [row])
    hidden = model.run(
        batch.ids, _edits(gains, written, len(prompt) - 1, vector), attention_mask=batch.mask, position_ids=batch.positions, bridge=False
    )
    logits = model.logits(hidden[0, len(prompt) - 1 :]).float()
    costs = cross_entropy(logits, torch.tensor(target, device=logits.device), reduction="none")
    sizes = [len(reply) for _, reply in segments]
    means = torch.stack([part.mean() for part in costs.split(sizes)])
    return means[:n], means[n:]


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
