"""A batch that never ends: requests join it between two steps and leave it at once, each with its own emotions, length and sampling.

What a request is written does not depend on who shares its steps: it is what `generate` writes for it alone. Guidance by the prompt is a
second row of the request's own (`generation.guidance`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, check_lengths, choose, noise_of
from emosteer.generation.guidance import guided
from emosteer.generation.joining_engines import joining_engine
from emosteer.generation.steering import Course, SteeringPlan
from emosteer.models.model import Model
from emosteer.models.sites import Site


@dataclass(frozen=True, eq=False)
class Ask:
    """One reply that is asked for. weights: [token, emotion], what multiplies each emotion's vector token by token, staying what it was at
    the last; None is unsteered. likeliest: of how many tokens the log-probabilities are wanted beside the written one's; None: of none."""

    request: Request
    decoding: Decoding
    weights: Tensor | None = None
    likeliest: int | None = None


@dataclass(frozen=True)
class Written:
    """What one step brought a request. token: None for the token that ended it; ended: "stop" or "length" in its last step; logprob: of the
    token, in nats, as guidance leaves the probabilities, before penalty and temperature; likeliest: the likeliest tokens with theirs."""

    ticket: int
    token: int | None
    ended: str | None = None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class _Row:
    """A request on its way. seen: what is penalised, its reply so far and, where that is, its prompt; written: the tokens of the reply."""

    ticket: int
    ask: Ask
    noise: Tensor | None
    seen: list[int]
    written: int = 0
    last: int = 0
    course: Course | None = field(default=None)

    @cached_property
    def settings(self) -> Decoding:
        """How its tokens are chosen, without what concerns it alone."""
        return replace(self.ask.decoding, max_new_tokens=1, seed=0)


class RunningBatch:
    """Requests that are being written. Not safe for threads: whoever has it takes its steps."""

    def __init__(self, model: Model, vectors: Mapping[Site, Tensor], bound: int | None = None) -> None:
        """vectors: what is added at weight 1, site -> [emotion, d_model]; empty where nothing is ever steered. bound: positions of keys and
        values, rows times the longest, beyond which no memory is taken to spare."""
        self.model, self.vectors, self.bound = model, dict(vectors), bound
        self.n_emotions = len(next(iter(vectors.values()))) if vectors else 0
        self._tickets = itertools.count()
        self._waiting: list[_Row] = []
        self.clear()

    def clear(self) -> None:
        """Lets everybody go."""
        self._waiting.clear()
        self._engine = joining_engine(self.model, list(self.vectors), self.bound)
        self._places: list[tuple[_Row, bool]] = []  # of each of the engine's rows: whose it is, and whether it is the empty one

    @property
    def n_requests(self) -> int:
        """Requests that are here."""
        return len(self._waiting) + sum(not empty for _, empty in self._places)

    @property
    def n_rows(self) -> int:
        """Rows of the model's batch, two for a request that its prompt guides."""
        return len(self._places) + sum(1 + row.ask.decoding.guides for row in self._waiting)

    def join(self, ask: Ask) -> int:
        """Takes a request in; it takes part in the next step. Returns its ticket.

        Raises:
            DataError: if its prompt with its reply does not fit the model's context.
        """
        check_lengths([ask.request], ask.decoding, self.model.shape.context, self.model.name)
        if ask.decoding.guides and not ask.request.empty:
            raise ValueError("guidance needs the request's empty prompt")
        noise = noise_of(ask.request, ask.decoding) if ask.decoding.temperature > 0 else None
        course = None if ask.weights is None else Course(self.vectors, ask.weights[None])
        row = _Row(next(self._tickets), ask, noise, list(ask.request.ids) if ask.decoding.penalise_prompt else [], course=course)
        self._waiting.append(row)
        return row.ticket

    def cancel(self, ticket: int) -> bool:
        """Lets a request go at once; False where it is not here any more."""
        before = self.n_requests
        self._waiting = [row for row in self._waiting if row.ticket != ticket]
        self._leave({ticket})
        return self.n_requests < before

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Writes one more token for everybody; those whose reply has ended leave."""
        self._admit()
        if not self._places:
            return []
        self._steer()
        tokens = torch.tensor([row.last for row, _ in self._places], device=self.model.device)
        groups = self._alike()
        # Logits come in the order in which they are wanted: to pick rows out of so large a table would copy them.
        logits = self._engine.step(tokens, [place for _, places in groups for place in places])
        parts = logits.split([len(places) for _, places in groups])
        found = [written for (rows, _), part in zip(groups, parts, strict=True) for written in self._choose(rows, part)]
        self._leave({written.ticket for written in found if written.ended})
        return sorted(found, key=lambda written: written.ticket)

    def _admit(self) -> None:
        """The waiting rows join the engine: the prompts, then the empty ones."""
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        joined = [(row, False) for row in rows] + [(row, True) for row in rows if row.ask.decoding.guides]
        prompts = [row.ask.request.empty if empty else row.ask.request.ids for row, empty in joined]
        weights = [row.ask.weights if row.ask.weights is not None else torch.zeros(1, self.n_emotions) for row, _ in joined]
        longest = max(map(len, weights))
        padded = torch.stack([torch.cat([each, each[-1:].expand(longest - len(each), -1)]) for each in weights])
        self._engine.join(prompts, SteeringPlan.over(Course(self.vectors, padded)))
        self._places += joined

    def _steer(self) -> None:
        """Gives the rows whose arc moves at this token what is added now."""
        moving = [
            (place, row.course.at(row.written))
            for place, (row, _) in enumerate(self._places)
            if row.course is not None and row.course.moves_at(row.written)
        ]
        if moving:
            vectors = {site: torch.cat([added[site] for _, added in moving]) for site in self.vectors}
            self._engine.steer([place for place, _ in moving], vectors)

    def _alike(self) -> list[tuple[list[_Row], list[int]]]:
        """The requests whose tokens are chosen alike (those of which nothing is penalised yet apart), with their places among the engine's
        rows, behind them those of their empty prompts where these guide."""
        empty = {row.ticket: place for place, (row, is_empty) in enumerate(self._places) if is_empty}
        groups: dict[tuple[Decoding, bool], tuple[list[_Row], list[int]]] = {}
        for place, (row, is_empty) in enumerate(self._places):
            if not is_empty:
                rows, places = groups.setdefault((row.settings, not row.seen), ([], []))
                rows.append(row)
                places.append(place)
        return [(rows, places + [empty[row.ticket] for row in rows if row.ticket in empty]) for rows, places in groups.values()]

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[Written]:
        """The next token of requests that are chosen alike. logits: [row, d_vocab], where they are guided those of their empty prompts
        behind."""
        decoding = rows[0].settings
        scores = logits[: len(rows)].float()
        if decoding.guides:
            scores = guided(scores, logits[len(rows) :], decoding.guidance)
        longest = max(len(row.seen) for row in rows)
        seen = torch.tensor([row.seen + row.seen[:1] * (longest - len(row.seen)) for row in rows], device=scores.device)
        noise = None
        if decoding.temperature > 0:
            noise = torch.stack([row.noise[row.written] for row in rows if row.noise is not None]).to(scores.device)
        tokens = choose(scores, seen, noise, decoding).tolist()
        return [self._write(row, token, scores[index]) for index, (row, token) in enumerate(zip(rows, tokens, strict=True))]

    def _write(self, row: _Row, token: int, scores: Tensor) -> Written:
        """A row goes on by a token."""
        row.seen.append(token)
        row.last, row.written = token, row.written + 1
        stops = token in self.model.stop_ids
        ended = "stop" if stops else "length" if row.written == row.ask.decoding.max_new_tokens else None
        if row.ask.likeliest is None:
            return Written(row.ticket, None if stops else token, ended)
        logprobs = scores.log_softmax(-1)
        top = logprobs.topk(min(row.ask.likeliest, len(logprobs))) if row.ask.likeliest else None
        pairs = () if top is None else zip(top.indices.tolist(), top.values.tolist(), strict=True)
        possible = tuple((int(other), float(value)) for other, value in pairs if value > -torch.inf)
        return Written(row.ticket, None if stops else token, ended, float(logprobs[token]), possible)

    def _leave(self, tickets: set[int]) -> None:
        kept = [place for place, (row, _) in enumerate(self._places) if row.ticket not in tickets]
        if len(kept) < len(self._places):
            self._places = [self._places[place] for place in kept]
            self._engine.keep(kept)
