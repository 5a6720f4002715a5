"""Batched generation under a steering plan: KV cache, a different emotion and strength per row, seeds per row.

The plain model writes; the bridge would be slower. A row's text depends on its prompt, plan, seed and decoding alone: sampling
noise is drawn per row, so batch size and neighbours do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emosteer.cache import growing_cache
from emosteer.errors import DataError, UsageError
from emosteer.interventions import RowEdits
from emosteer.model import Edit, Model
from emosteer.sites import Site
from emosteer.steering import Injector, SteeringPlan


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; the same for every method compared.

    temperature: 0 is greedy; top_p: nucleus, 1 is all; repetition_penalty: 1 is none (small models loop without one), applied to
    the tokens of prompt and reply as Hugging Face does.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1, found {self.max_new_tokens}"),
            (0 <= self.temperature < float("inf"), f"--temperature must be a number of at least 0, found {self.temperature}"),
            (0 < self.top_p <= 1, f"--top-p must lie between 0 and 1, found {self.top_p}"),
            (0 < self.repetition_penalty < float("inf"), f"--repetition-penalty must be above 0, found {self.repetition_penalty}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)


@dataclass(frozen=True)
class Request:
    """One reply to write. key: what its seed is drawn from; ids: the prompt's tokens."""

    key: str
    ids: tuple[int, ...]


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


OnToken = Callable[[str], None]


@torch.no_grad()
def generate(
    model: Model,
    requests: Sequence[Request],
    plan: SteeringPlan | None = None,
    decoding: Decoding | None = None,
    *,
    row_edits: RowEdits | None = None,
    on_token: OnToken | None = None,
) -> list[Reply]:
    """Writes one batch of replies.

    Args:
        plan: what is added per row; None adds nothing.
        row_edits: unit edits on top (ablation and enhancement curves).
        on_token: for a batch of one, receives each piece of text as it is written.

    Raises:
        DataError: if a prompt with its reply does not fit the model's context.
    """
    decoding = decoding or Decoding()
    plan = plan or SteeringPlan.none(len(requests))
    if plan.n_rows != len(requests):
        raise ValueError(f"the plan has {plan.n_rows} rows, the batch {len(requests)}")
    if not requests:
        return []
    for request in requests:
        if len(request.ids) + decoding.max_new_tokens > model.shape.context:
            raise DataError(
                f"the prompt '{request.key}' has {len(request.ids)} tokens; with {decoding.max_new_tokens} new ones it exceeds the "
                f"context of {model.name} ({model.shape.context}); shorten it or lower --max-new-tokens"
            )
    batch = _Batch(model, requests, decoding)
    injector = Injector(plan, model.device, model.dtype)
    combined = _combine(injector.edits(), row_edits.edits() if row_edits else {})
    stream = _Stream(model, on_token) if on_token and len(requests) == 1 else None
    with model.hooks(combined, bridge=False):
        for _ in range(decoding.max_new_tokens):
            batch.step()
            if stream:
                stream.push(batch.written[0])
            kept = batch.drop_finished()
            if kept is None:
                break
            injector.keep(kept)
            if row_edits:
                row_edits.keep(kept)
    if stream:
        stream.flush(batch.written[0])
    return batch.replies()


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


class _Batch:
    """The state of one batch while it is written. Rows that end leave the batch, so that the others go on faster."""

    def __init__(self, model: Model, requests: Sequence[Request], decoding: Decoding) -> None:
        self.model, self.requests, self.decoding = model, requests, decoding
        device = model.device
        width = max(len(request.ids) for request in requests)
        ids = torch.full((len(requests), width), model.pad_id)
        mask = torch.zeros((len(requests), width), dtype=torch.long)
        seen = torch.zeros((len(requests), model.shape.d_vocab), dtype=torch.bool)
        for row, request in enumerate(requests):  # padded on the left: every row's last position is t*
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
            seen[row, list(request.ids)] = True
        self.ids, self.mask, self.seen = ids.to(device), mask.to(device), seen.to(device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        self.noise = _noise(requests, decoding).to(device) if decoding.temperature > 0 else None
        self.cache = growing_cache(model.hf.config)
        self.alive = torch.arange(len(requests), device=device)
        self.written: list[list[int]] = [[] for _ in requests]
        self.reason = ["length"] * len(requests)
        self.stop = torch.tensor(sorted(model.stop_ids), device=device)
        self.steps = 0

    def step(self) -> None:
        """One forward pass and one token for every row that is alive."""
        hidden = self.model.body(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        logits = self.model.logits(hidden[:, -1]).float()
        noise = None if self.noise is None else self.noise[self.alive, self.steps]
        tokens = choose(logits, self.seen, noise, self.decoding)
        self.seen.scatter_(1, tokens[:, None], True)
        self.ids = tokens[:, None]
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.ended = torch.isin(tokens, self.stop)
        for row, token, ended in zip(self.alive.tolist(), tokens.tolist(), self.ended.tolist(), strict=True):
            if ended:
                self.reason[row] = "stop"
            else:
                self.written[row].append(token)
        self.steps += 1

    def drop_finished(self) -> Tensor | None:
        """Removes ended rows; returns the rows that go on, or None when all have ended."""
        if not bool(self.ended.any()):
            return self.alive
        keep = (~self.ended).nonzero()[:, 0]
        if not len(keep):
            return None
        self.alive = self.alive[keep]
        self.ids, self.mask, self.positions, self.seen = self.ids[keep], self.mask[keep], self.positions[keep], self.seen[keep]
        self.cache.batch_select_indices(keep)
        return self.alive

    def replies(self) -> list[Reply]:
        decode = self.model.tokenizer.decode
        return [
            Reply(request.key, decode(ids, skip_special_tokens=True).strip(), tuple(ids), reason)
            for request, ids, reason in zip(self.requests, self.written, self.reason, strict=True)
        ]


def choose(logits: Tensor, seen: Tensor, noise: Tensor | None, decoding: Decoding) -> Tensor:
    """The next token of every row: repetition penalty, temperature and nucleus in Hugging Face's order. Shape [row].

    Args:
        logits: [row, d_vocab], float32; seen: [row, d_vocab], the tokens of prompt and reply so far.
        noise: [row], a uniform number in [0, 1) per row; None is greedy.
    """
    if decoding.repetition_penalty != 1:
        punished = torch.where(logits > 0, logits / decoding.repetition_penalty, logits * decoding.repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if noise is None:
        return logits.argmax(-1)
    probabilities, order = (logits / decoding.temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= decoding.top_p, 0)  # the first token always stays
    heaped = probabilities.cumsum(-1)
    target = noise[:, None] * heaped[:, -1:]
    return order.gather(1, torch.searchsorted(heaped, target, right=True).clamp_max(order.shape[1] - 1))[:, 0]


def _noise(requests: Sequence[Request], decoding: Decoding) -> Tensor:
    """Uniform numbers [row, step], drawn from each row's own seed."""
    import hashlib

    rows = []
    for request in requests:
        digest = hashlib.sha256(f"{decoding.seed}/{request.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(decoding.max_new_tokens, generator=generator))
    return torch.stack(rows)


class _Stream:
    """Turns growing token lists into text pieces that join to the reply's text; incomplete last characters are held back."""

    def __init__(self, model: Model, on_token: OnToken) -> None:
        self.decode, self.on_token, self.sent = model.tokenizer.decode, on_token, ""

    def push(self, ids: Sequence[int]) -> None:
        text = self.decode(ids, skip_special_tokens=True).strip()  # white space at the end waits: the reply's text may end before it
        if not text.endswith("\ufffd"):
            self._send(text)

    def flush(self, ids: Sequence[int]) -> None:
        self._send(self.decode(ids, skip_special_tokens=True).strip())

    def _send(self, text: str) -> None:
        if len(text) > len(self.sent):
            self.on_token(text[len(self.sent) :])
            self.sent = text


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
