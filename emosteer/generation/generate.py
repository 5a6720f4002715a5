"""Batched generation under a steering plan: KV cache, a different emotion and strength per row, seeds per row.

`steps` yields one column of tokens after the other for the whole batch; whatever wants replies consumes it: `generate` for whole ones,
`streaming.stream` for text as it is written. The plain model writes; the bridge would be slower. A row's text depends on its prompt,
plan, seed and decoding alone: sampling noise is drawn per row, so batch size and neighbours do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.base.errors import DataError
from emosteer.base.seeds import seed_of
from emosteer.generation.decoding import Decoding
from emosteer.generation.engines import Engine, engine_for
from emosteer.generation.guidance import GuidedEngine
from emosteer.generation.steering import SteeringPlan
from emosteer.models.interventions import RowEdits
from emosteer.models.model import Model
from emosteer.models.tokens import reply_text

#: How many of the likeliest tokens are sorted when sampling; a nucleus that is larger is found among all.
LIKELY = 1024


@dataclass(frozen=True)
class Request:
    """One reply to write. key: what its seed is drawn from; ids: the prompt's tokens; empty: those of the prompt with nothing said in it,
    which guidance needs."""

    key: str
    ids: tuple[int, ...]
    empty: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What was written. finish_reason: "stop" (the model ended it) or "length" (cut off); ids: its tokens, no stop token."""

    key: str
    text: str
    ids: tuple[int, ...]
    finish_reason: str

    @property
    def n_tokens(self) -> int:
        """Tokens of the reply."""
        return len(self.ids)


@dataclass(frozen=True)
class Step:
    """One column of tokens. tokens: row -> the token it wrote, stop tokens left out; ended: row -> why it wrote its last one
    ("stop" or "length"). Rows are places in the batch; those that ended earlier are in neither."""

    tokens: Mapping[int, int]
    ended: Mapping[int, str]


def generate(
    model: Model,
    requests: Sequence[Request],
    plan: SteeringPlan | None = None,
    decoding: Decoding | None = None,
    *,
    row_edits: RowEdits | None = None,
) -> list[Reply]:
    """Writes one batch of replies, in the order of the requests. Arguments and errors as for `steps`."""
    written: list[list[int]] = [[] for _ in requests]
    reasons: dict[int, str] = {}
    for step in steps(model, requests, plan, decoding, row_edits=row_edits):
        for row, token in step.tokens.items():
            written[row].append(token)
        reasons |= step.ended
    return [
        Reply(request.key, reply_text(model.tokenizer, ids), tuple(ids), reasons[row])
        for row, (request, ids) in enumerate(zip(requests, written, strict=True))
    ]


@torch.no_grad()
def steps(
    model: Model,
    requests: Sequence[Request],
    plan: SteeringPlan | None = None,
    decoding: Decoding | None = None,
    *,
    row_edits: RowEdits | None = None,
) -> Generator[Step, None, None]:
    """Writes one batch, token by token. Between two steps the model is as it was: nothing is hooked into it, and other generations may
    run. Closing the generator early gives back the memory of the batch.

    Args:
        plan: what is added per row; None adds nothing.
        row_edits: unit edits on top (ablation and enhancement curves), without guidance.

    Raises:
        DataError: if a prompt with its reply does not fit the model's context.
    """
    decoding = decoding or Decoding()
    plan = plan or SteeringPlan.none(len(requests))
    if decoding.chooses:
        raise ValueError("replies are chosen where whole ones are there (`writing.best_of`), not token by token")
    if plan.n_rows != len(requests):
        raise ValueError(f"the plan has {plan.n_rows} rows, the batch {len(requests)}")
    if not requests:
        return
    check_lengths(requests, decoding, model.shape.context, model.name)
    batch = _Batch(model, requests, decoding)
    engine = _engine(model, requests, plan, row_edits, decoding)
    tokens: Tensor | None = None
    while batch.alive:
        if plan.course is not None and plan.course.moves_at(batch.n_steps):
            engine.steer(plan.course.rows(batch.alive).at(batch.n_steps))
        tokens, step = batch.take(engine.step(tokens))
        yield step
        kept = [place for place, row in enumerate(batch.alive) if row not in step.ended]
        if len(kept) < len(batch.alive):
            tokens = batch.keep(kept, tokens)
            if kept:
                engine.keep(kept)


def _engine(model: Model, requests: Sequence[Request], plan: SteeringPlan, row_edits: RowEdits | None, decoding: Decoding) -> Engine:
    """What turns the batch's tokens into logits; where the prompt guides, over a second row for each request."""
    prompts, longest = [request.ids for request in requests], decoding.max_new_tokens
    if not decoding.guides:
        return engine_for(model, prompts, plan, row_edits, longest)
    if row_edits is not None or not all(request.empty for request in requests):
        raise ValueError("guidance needs every request's empty prompt, and edits of units know nothing of its rows")
    doubled = plan.rows([*range(len(requests))] * 2)
    rows = engine_for(model, [*prompts, *(request.empty for request in requests)], doubled, None, longest)
    return GuidedEngine(rows, len(requests), decoding.guidance)


def check_lengths(requests: Sequence[Request], decoding: Decoding, context: int, name: str) -> None:
    """Refuses what a model has no positions for.

    Args:
        context: positions of the model; name: what it is called.

    Raises:
        DataError: naming the first prompt that is too long.
    """
    for request in requests:
        longest = max(len(request.ids), len(request.empty))
        if longest + decoding.max_new_tokens > context:
            raise DataError(
                f"the prompt '{request.key}' has {longest} tokens; with {decoding.max_new_tokens} new ones it exceeds the "
                f"context of {name} ({context}); shorten it or lower --max-new-tokens"
            )


class _Batch:
    """What chooses the tokens of a batch. Rows that end leave it, so that the others go on faster. alive: the rows still there."""

    def __init__(self, model: Model, requests: Sequence[Request], decoding: Decoding) -> None:
        self.stop_ids, self.decoding = model.stop_ids, decoding
        device = model.device
        width = max(len(request.ids) for request in requests) if decoding.penalise_prompt else 0
        # What is penalised of each row: its prompt, filled up with its first token, where that is, and room for its reply.
        prompts = [request.ids[:width] for request in requests]
        seen = [[*ids, *[r.ids[0]] * (width - len(ids) + decoding.max_new_tokens)] for r, ids in zip(requests, prompts, strict=True)]
        self.seen = torch.tensor(seen, device=device)
        self.noise = _noise(requests, decoding).to(device) if decoding.temperature > 0 else None
        self.alive = list(range(len(requests)))
        self.width, self.n_steps = width, 0

    def take(self, logits: Tensor) -> tuple[Tensor, Step]:
        """Chooses one token for every row that is alive. Returns the tokens [row], stop tokens included, and the step."""
        noise = None if self.noise is None else self.noise[:, self.n_steps]
        end = self.width + self.n_steps
        tokens = choose(logits.float(), self.seen[:, :end], noise, self.decoding)
        self.seen[:, end] = tokens
        self.n_steps += 1
        written, ended = {}, {}
        for row, token in zip(self.alive, tokens.tolist(), strict=True):
            if token in self.stop_ids:
                ended[row] = "stop"
            else:
                written[row] = token
                if self.n_steps == self.decoding.max_new_tokens:
                    ended[row] = "length"
        return tokens, Step(written, ended)

    def keep(self, kept: Sequence[int], tokens: Tensor) -> Tensor:
        """Lets the rows go that have ended; returns the tokens of the others. kept: places among those alive."""
        index = torch.tensor(kept, dtype=torch.long, device=tokens.device)
        self.alive, self.seen = [self.alive[place] for place in kept], self.seen[index]
        if self.noise is not None:
            self.noise = self.noise[index]
        return tokens[index]


def choose(logits: Tensor, seen: Tensor, noise: Tensor | None, decoding: Decoding) -> Tensor:
    """The next token of every row: repetition penalty, temperature and nucleus in Hugging Face's order. Shape [row].

    Args:
        logits: [row, d_vocab], float32; seen: the tokens of prompt and reply so far, as a mask [row, d_vocab] or, which is cheaper,
            as token ids [row, n] in any order, repeated or not.
        noise: [row], a uniform number in [0, 1) per row; None is greedy.
    """
    if decoding.repetition_penalty != 1:
        listed = seen.dtype != torch.bool
        scores = logits.gather(1, seen) if listed else logits
        scores = torch.where(scores > 0, scores / decoding.repetition_penalty, scores * decoding.repetition_penalty)
        logits = logits.scatter(1, seen, scores) if listed else torch.where(seen, scores, logits)
    if noise is None:
        return logits.max(-1).indices  # several times as fast as argmax on a processor
    probabilities = (logits / decoding.temperature).softmax(-1)
    if decoding.top_p == 1 or probabilities.shape[1] < 4 * LIKELY:
        return _draw(probabilities, noise, decoding.top_p)[0]
    # Sorting the whole vocabulary costs more than the model's own work: the likeliest tokens do wherever the nucleus ends among them.
    likely = probabilities.topk(LIKELY).indices.sort(-1).values
    places, least = _draw(probabilities.gather(1, likely), noise, decoding.top_p)
    tokens = likely.gather(1, places[:, None])[:, 0]
    rest = (least <= probabilities.gather(1, likely).amin(-1)).nonzero()[:, 0]
    if len(rest):
        tokens[rest] = _draw(probabilities[rest], noise[rest], decoding.top_p)[0]
    return tokens


def _draw(probabilities: Tensor, noise: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The token of every row at its place in the nucleus, likeliest first, and the probability of the nucleus' last token."""
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    outside = before >= top_p
    probabilities = probabilities.masked_fill(outside, 0)  # the first token always stays
    heaped = probabilities.cumsum(-1)
    target = noise[:, None] * heaped[:, -1:]
    token = order.gather(1, torch.searchsorted(heaped, target, right=True).clamp_max(order.shape[1] - 1))[:, 0]
    return token, probabilities.masked_fill(outside, torch.inf).amin(-1)


def _noise(requests: Sequence[Request], decoding: Decoding) -> Tensor:
    """Uniform numbers [row, step]."""
    return torch.stack([noise_of(request, decoding) for request in requests])


def noise_of(request: Request, decoding: Decoding) -> Tensor:
    """Uniform numbers [step] of one request, drawn from its own seed."""
    generator = torch.Generator().manual_seed(seed_of(decoding.seed, request.key))
    return torch.rand(decoding.max_new_tokens, generator=generator)


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Indices of the requests in batches of similar prompt length, longest first, so that little is padded."""
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].ids), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def completer(
    reference: str, *, device: str = "auto", dtype: str = "auto", temperature: float = 0.9, max_new_tokens: int = 400
) -> Callable[[list[dict[str, str]], int], str]:
    """Loads a model and returns `complete(messages, seed) -> text`; authoring uses it."""
    model = Model.load(reference, device=device, dtype=dtype)

    def complete(messages: list[dict[str, str]], seed: int) -> str:
        decoding = Decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_p=0.95, repetition_penalty=1.05, seed=seed)
        return generate(model, [Request("author", tuple(model.prompt_ids(messages)))], decoding=decoding)[0].text

    return complete
