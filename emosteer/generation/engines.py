"""What turns tokens into the next logits, one step at a time: the lean forward pass, or the Hugging Face one with hooks.

An engine holds the rows of a batch that are still being written, in their order; `keep` lets the others go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from emosteer.generation.cuda_graphs import RecordedStep, recorder_for
from emosteer.generation.hooked_proof import require_cached
from emosteer.generation.kv_cache import RowCache, cache_name, growing_cache
from emosteer.generation.lean_forward import Lean, lean_of
from emosteer.generation.prefix_tree import chunks, pack
from emosteer.generation.steering import STEERED_KINDS, Injector, SteeringPlan
from emosteer.models.hooks import Edit
from emosteer.models.interventions import RowEdits
from emosteer.models.model import Model
from emosteer.models.sites import MLP_OUT, RESID_POST, Site

#: Distinct prompt tokens computed at once; more would only take memory.
PROMPT_TOKENS = 2048
#: Replies of fewer tokens are not worth the recording of a step.
RECORDED = 16


class Engine(Protocol):
    """One batch on its way."""

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits [row, d_vocab] after one more token per row; None at first, for the prompts."""

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows at the given places among those that are there, in that order."""

    def steer(self, vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else from the next step on. vectors: site of the plan -> [row that is there, d_model]."""


def engine_for(model: Model, prompts: Sequence[Sequence[int]], plan: SteeringPlan, row_edits: RowEdits | None, steps: int) -> Engine:
    """The fastest engine that does what is asked.

    Args:
        prompts: token ids; steps: how many tokens are written at most.
    """
    plan = plan.to(model.device, model.dtype)
    simple = (
        row_edits is None and (plan.positions == "reply" or not plan.vectors) and all(site.kind in STEERED_KINDS for site in plan.vectors)
    )
    lean = lean_of(model) if simple else None
    if lean is not None:
        return LeanEngine(lean, prompts, plan, steps)
    return hooked_engine(model, prompts, plan, row_edits)


def hooked_engine(model: Model, prompts: Sequence[Sequence[int]], plan: SteeringPlan, row_edits: RowEdits | None = None) -> HookedEngine:
    """The engine for every model, once it is proved on this one.

    Raises:
        ModelError: if the model writes something else with its cache than without.
    """

    def made(prompts: Sequence[Sequence[int]], plan: SteeringPlan, row_edits: RowEdits | None) -> HookedEngine:
        return HookedEngine(model, prompts, Injector(plan, model.device, model.dtype), row_edits)

    require_cached(model, lambda trial: made(trial, SteeringPlan.none(len(trial)), None))
    return made(prompts, plan, row_edits)


class LeanEngine:
    """Prompts in two parts: all tokens but the last are free of steering, so that rows share what they have in common; the last
    one is a step like any other."""

    def __init__(self, lean: Lean, prompts: Sequence[Sequence[int]], plan: SteeringPlan, steps: int) -> None:
        """Nothing is computed yet."""
        self.lean, self.prompts, self.steps = lean, prompts, steps
        device = lean.model.device
        self.positions = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.sites = list(plan.vectors)
        self.vectors = torch.stack(list(plan.vectors.values())) if self.sites else None
        self.slot = list(range(len(prompts)))  # of each row: where the cache holds it
        self.order: Tensor | None = None  # the same, unless nothing has moved
        self.row: Tensor | None = None  # of each slot: its row, or any where its row has ended
        self.record = recorder_for(device) if steps >= RECORDED else None
        self.recorded: RecordedStep | None = None
        self._add()

    def _add(self) -> None:
        vectors = {} if self.vectors is None else dict(zip(self.sites, self.vectors, strict=True))
        self.added = self.lean.added(vectors)

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits after one more token per row."""
        if tokens is None:
            self._read()
            tokens = torch.tensor([prompt[-1] for prompt in self.prompts], device=self.positions.device)
        if self.row is not None:
            tokens = tokens[self.row]
        hidden = self._hidden(tokens)
        self.positions = self.positions + 1
        return self.lean.logits(hidden if self.order is None else hidden[self.order])

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Final-normed states [slot, d_model] after one more token per slot."""
        if self.recorded is not None and self.recorded.fits():
            return self.recorded.step(tokens, self.positions)
        hidden = self.lean.step(tokens, self.positions, self.cache, self.added)
        if self.record is not None:
            state = self.lean, self.cache, tokens, self.positions, self.added, hidden
            self.recorded = RecordedStep.proved(*state, self.record)
            self.record = self.record if self.recorded else None
        return hidden

    def _read(self) -> None:
        lean, device = self.lean, self.positions.device
        lean.prepare(len(self.prompts))
        heads = [prompt[:-1] for prompt in self.prompts]
        self.cache = RowCache(lean.shape, [len(head) for head in heads], self.steps, device, lean.model.dtype)
        for rows in chunks(heads, PROMPT_TOKENS):
            packed = pack([heads[row] for row in rows], self.cache.width, device)

            def keep(layer: int, keys: Tensor, values: Tensor, rows: list[int] = rows, nodes: Tensor = packed.rows) -> None:
                self.cache.fill(layer, rows, nodes, keys, values)

            lean.read(packed, keep)

    def keep(self, kept: Sequence[int]) -> None:
        """Lets the other rows go; few slots move, and `order` remembers which. A recording goes on with the slots it has until half of
        them are idle: to record again costs more than a few rows for nothing."""
        slots, device = [self.slot[row] for row in kept], self.positions.device
        n_slots = len(self.positions)
        if self.recorded is None or 2 * len(slots) <= n_slots:
            self.recorded = None
            moved = self.cache.drop(sorted(set(range(n_slots)) - set(slots)))
            now = {old: new for new, old in enumerate(moved)}
            slots, n_slots = [now[slot] for slot in slots], len(slots)
            index = torch.tensor(moved, device=device)
            self.positions = self.positions[index]
            if self.vectors is not None:
                self.vectors = self.vectors[:, index]
                self._add()
        self.slot = slots
        self.order = torch.tensor(slots, device=device)
        self.row = torch.zeros(n_slots, dtype=torch.long, device=device)
        self.row[self.order] = torch.arange(len(slots), device=device)

    def steer(self, vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else from the next step on; in place, where a recording finds it."""
        assert self.vectors is not None
        slots = torch.tensor(self.slot, device=self.positions.device)
        for place, site in enumerate(self.sites):
            self.vectors[place, slots] = vectors[site].to(self.vectors)
        kinds = {site.kind for site in self.sites}
        if {MLP_OUT, RESID_POST} <= kinds:  # their sums are copies
            self.recorded = None
            self._add()


class HookedEngine:
    """The Hugging Face forward pass, prompts padded on the left. What changes it is hooked in for the length of a step: whoever takes
    the steps may use the model in between."""

    def __init__(self, model: Model, prompts: Sequence[Sequence[int]], injector: Injector, row_edits: RowEdits | None) -> None:
        """injector, row_edits: told which rows are still there."""
        self.model, self.injector, self.row_edits = model, injector, row_edits
        self.edits = _combine(injector.edits(), row_edits.edits() if row_edits else {})
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), model.pad_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):  # padded on the left: every row's last position is t*
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        self.cache, self.cache_name = growing_cache(model.hf.config), cache_name(model.body)
        self.alive = torch.arange(len(prompts), device=model.device)

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits after one more token per row."""
        if tokens is not None:
            self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        with self.model.hooks(self.edits, bridge=False) as body:
            hidden = body(
                input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, use_cache=True, **{self.cache_name: self.cache}
            ).last_hidden_state
        return self.model.logits(hidden[:, -1])

    def keep(self, kept: Sequence[int]) -> None:
        """Lets the other rows go."""
        index = torch.tensor(kept, device=self.alive.device)
        self.alive, self.mask, self.positions = self.alive[index], self.mask[index], self.positions[index]
        self.cache.batch_select_indices(index.cpu() if self.model.spread else index)  # a spread model's cache is on many devices
        self.injector.keep(self.alive)
        if self.row_edits:
            self.row_edits.keep(self.alive)

    def steer(self, vectors: Mapping[Site, Tensor]) -> None:
        """Adds something else from the next step on."""
        self.injector.steer(vectors)


def _combine(first: Mapping[Site, Edit], second: Mapping[Site, Edit]) -> dict[Site, Edit]:
    edits = dict(first)
    for site, edit in second.items():
        edits[site] = _both(edits[site], edit) if site in edits else edit
    return edits


def _both(first: Edit, second: Edit) -> Edit:
    def edit(activation: Tensor) -> Tensor | None:
        middle = first(activation)
        last = second(activation if middle is None else middle)
        return middle if last is None else last

    return edit
