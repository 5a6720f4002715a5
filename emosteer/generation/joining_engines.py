"""Engines whose rows come and go between steps: what turns the next token of every row into its next logits.

Models that the lean forward pass serves take their steps together, whenever their rows joined. For all others, rows that joined together
take steps together: slower, and the same text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from emosteer.generation.engines import PROMPT_TOKENS, HookedEngine, hooked_engine
from emosteer.generation.joining_cache import JoiningCache
from emosteer.generation.lean_forward import Lean, lean_of
from emosteer.generation.prefix_tree import chunks, pack, shared
from emosteer.generation.steering import STEERED_KINDS, SteeringPlan
from emosteer.models.model import Model
from emosteer.models.sites import Site

#: Positions of prompts whose keys and values are kept in case they come again, and how many have to come again to be worth it.
KEPT, LEAST_SHARED = 2048, 8


class JoiningEngine(Protocol):
    """Rows in the order in which they joined, those that left apart."""

    def join(self, prompts: Sequence[Sequence[int]], plan: SteeringPlan) -> None:
        """Adds rows behind those that are there. The plan is for them alone, at the positions of the reply."""

    def step(self, tokens: Tensor, wanted: Sequence[int]) -> Tensor:
        """One more token per row; for rows that have just joined, the last one of their prompt, whatever their token. Returns the logits
        [wanted, d_vocab] of the rows in the order in which they are wanted."""

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows at the given ascending places; all of them have taken a step."""

    def steer(self, rows: Sequence[int], vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else to some rows, which have taken a step, from the next one on. vectors: site -> [row, d_model]."""


def joining_engine(model: Model, sites: Sequence[Site], bound: int | None = None) -> JoiningEngine:
    """The fastest engine for a model and the sites that are steered. bound: see `JoiningCache`."""
    lean = lean_of(model) if all(site.kind in STEERED_KINDS for site in sites) else None
    return LeanJoiningEngine(lean, sites, bound) if lean is not None else CohortEngine(model)


#: A prompt without its last token.
_Head = tuple[int, ...]


class _Heads:
    """Keys and values [layer, 2, n_kv_heads, pos, d_head] of the prompts that were read last: all prompts share the template's beginning,
    several replies to one prompt all of it, and a conversation that goes on begins with what it was."""

    def __init__(self) -> None:
        self.kept: OrderedDict[_Head, Tensor] = OrderedDict()

    def find(self, head: _Head) -> Tensor | None:
        """What was kept of a prompt."""
        if head in self.kept:
            self.kept.move_to_end(head)
        return self.kept.get(head)

    def beginning(self, head: _Head) -> tuple[_Head, Tensor] | None:
        """The longest beginning of a prompt, not all of it, that was kept of another, where it is worth anything."""
        most, found = max(((shared(other, head[:-1]), other) for other in self.kept), default=(0, ()))
        return (head[:most], self.kept[found][..., :most, :]) if most >= LEAST_SHARED else None

    def keep(self, head: _Head, states: Tensor) -> None:
        """Keeps a prompt, and lets those go that were not met for longest."""
        if len(head) <= KEPT:
            self.kept[head] = states
            while sum(map(len, self.kept)) > KEPT:
                self.kept.popitem(last=False)


class LeanJoiningEngine:
    """All rows in one cache. A prompt is read without its last token, which is then a step like any other."""

    def __init__(self, lean: Lean, sites: Sequence[Site], bound: int | None = None) -> None:
        """sites: all that any row is ever steered at; bound: see `JoiningCache`."""
        self.lean, self.sites = lean, list(sites)
        model, device = lean.model, lean.model.device
        self.cache = JoiningCache(lean.shape, device, model.dtype, bound)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.vectors = torch.zeros(len(self.sites), 0, lean.shape.d_model, device=device, dtype=model.dtype)
        self.slot: list[int] = []  # of each row: where the cache holds it
        self.fresh: dict[int, int] = {}  # row -> the last token of its prompt, before its first step
        self.heads = _Heads()

    def join(self, prompts: Sequence[Sequence[int]], plan: SteeringPlan) -> None:
        """Adds rows; distinct beginnings of their prompts are computed once."""
        device = self.positions.device
        self.lean.prepare(len(self.slot) + len(prompts))
        heads = [tuple(prompt[:-1]) for prompt in prompts]
        slots = self.cache.join([len(head) for head in heads])
        known = {head: states for head in set(heads) if (states := self.heads.find(head)) is not None}
        for head, slot in zip(heads, slots, strict=True):
            if head in known:
                self.cache.place(slot, known[head])
        unread = [(head, slot) for head, slot in zip(heads, slots, strict=True) if head and head not in known]
        for rows in chunks([head for head, _ in unread], PROMPT_TOKENS):
            self._read([unread[row] for row in rows])
        self.fresh |= {len(self.slot) + row: prompt[-1] for row, prompt in enumerate(prompts)}
        self.slot += slots
        self.positions = torch.cat([self.positions, torch.tensor([len(head) for head in heads], device=device)])
        new = self.vectors.new_zeros(len(self.sites), len(prompts), self.vectors.shape[2])
        for place, site in enumerate(self.sites):
            if site in plan.vectors:
                new[place] = plan.vectors[site].to(new)
        self.vectors = torch.cat([self.vectors, new], dim=1)

    def _read(self, new: Sequence[tuple[_Head, int]]) -> None:
        """Computes the keys and values of some prompts for their slots, but for beginnings that were kept, and keeps them in case they come
        again."""
        heads = dict.fromkeys(head for head, _ in new)
        begun = dict(found for head in heads if (found := self.heads.beginning(head)) is not None)
        packed = pack([head for head, _ in new], max(map(len, heads)), self.positions.device, list(begun))
        shape = self.lean.shape
        known = self.vectors.new_empty(shape.n_layers, 2, packed.n_known, shape.n_kv_heads, shape.d_head) if begun else None
        for nodes, states in zip(packed.known, begun.values(), strict=True):
            assert known is not None
            known[:, :, nodes] = states.transpose(2, 3)
        read = self.lean.states(packed, known)
        fresh: dict[_Head, Tensor] = {}
        for row, (head, slot) in enumerate(new):
            if head not in fresh:
                fresh[head] = read[:, :, packed.rows[row, packed.rows.shape[1] - len(head) :]].transpose(2, 3)
                self.heads.keep(head, fresh[head])
            self.cache.place(slot, fresh[head])

    def step(self, tokens: Tensor, wanted: Sequence[int]) -> Tensor:
        """Logits of the rows that are wanted after one more token per row."""
        for row, token in self.fresh.items():
            tokens[row] = token
        self.fresh = {}
        order = torch.tensor(self.slot, device=tokens.device)
        by_slot = torch.empty_like(tokens)
        by_slot[order] = tokens
        added = self.lean.added(dict(zip(self.sites, self.vectors, strict=True)))
        hidden = self.lean.step(by_slot, self.positions, self.cache, added)
        self.positions = self.positions + 1
        return self.lean.logits(hidden[order[list(wanted)]])

    def keep(self, kept: Sequence[int]) -> None:
        """Lets the other rows go; few slots move."""
        slots = [self.slot[row] for row in kept]
        moved = self.cache.drop(sorted(set(range(len(self.slot))) - set(slots)))
        now = {old: new for new, old in enumerate(moved)}
        index = torch.tensor(moved, dtype=torch.long, device=self.positions.device)
        self.positions, self.vectors = self.positions[index], self.vectors[:, index]
        self.slot = [now[slot] for slot in slots]

    def steer(self, rows: Sequence[int], vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else to some rows from the next step on."""
        slots = torch.tensor([self.slot[row] for row in rows], device=self.positions.device)
        for place, site in enumerate(self.sites):
            if site in vectors:
                self.vectors[place, slots] = vectors[site].to(self.vectors)


class CohortEngine:
    """Rows that joined together are a batch of their own, by the Hugging Face forward pass."""

    def __init__(self, model: Model) -> None:
        """Nobody is there yet."""
        self.model = model
        self.cohorts: list[HookedEngine] = []
        self.sizes: list[int] = []
        self.n_begun = 0  # cohorts that have taken a step: the first ones

    def join(self, prompts: Sequence[Sequence[int]], plan: SteeringPlan) -> None:
        """Makes a batch of the new rows."""
        self.cohorts.append(hooked_engine(self.model, prompts, plan))
        self.sizes.append(len(prompts))

    def step(self, tokens: Tensor, wanted: Sequence[int]) -> Tensor:
        """Logits of the rows that are wanted after one more token per row."""
        parts = zip(self.cohorts, tokens.split(self.sizes), strict=True)
        logits = [cohort.step(part if index < self.n_begun else None) for index, (cohort, part) in enumerate(parts)]
        self.n_begun = len(self.cohorts)
        return torch.cat(logits)[list(wanted)]

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        """Of each cohort, the places among the given rows that are its own."""
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        spans = zip(starts, self.sizes, strict=True)
        return [[place for place, row in enumerate(rows) if start <= row < start + size] for start, size in spans]

    def keep(self, kept: Sequence[int]) -> None:
        """Lets the other rows go, and batches of which nobody is left."""
        start, left = 0, []
        for cohort, size, places in zip(self.cohorts, self.sizes, self._parts(kept), strict=True):
            if 0 < len(places) < size:
                cohort.keep([kept[place] - start for place in places])
            if places:
                left.append((cohort, len(places)))
            start += size
        self.cohorts, self.sizes = [cohort for cohort, _ in left], [size for _, size in left]
        self.n_begun = len(left)

    def steer(self, rows: Sequence[int], vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else to some rows from the next step on."""
        start = 0
        for cohort, size, places in zip(self.cohorts, self.sizes, self._parts(rows), strict=True):
            if places:
                cohort.injector.steer({site: value[places] for site, value in vectors.items()}, [rows[place] - start for place in places])
            start += size
