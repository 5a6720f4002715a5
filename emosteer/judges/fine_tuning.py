"""Fits an adapter (`adapters`) and its head to texts of several sources, so that no source's style stands for an emotion.

Every step draws its texts source by source at fixed shares, and inside a source the rare labels more often than they occur: a label's
share goes with the power `1 - balance` of its number of texts. Only the adapters and the head learn; layers below the adapted ones are
read without gradients.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emosteer.base.errors import DataError
from emosteer.base.progress import bar, note
from emosteer.base.seeds import torch_seed
from emosteer.judges.adapters import Adapter, linear_layers, pooled
from emosteer.judges.embedded import SentenceEncoder
from emosteer.judges.protocol import LABELS

#: What an encoder can compute in while it learns. bfloat16 takes half the time where a processor has units for it, and twelve times as
#: long where it has none.
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class FineTuneSettings:
    """steps: of AdamW, each on `batch` texts; rate: at its highest, after `warmup` steps, then along a cosine to 0; rank: of the adapters
    in the last `layers` layers; balance: 0 draws a source's labels as they occur, 1 equally often; longest: tokens of a text that are
    read; dtype: what the encoder computes in meanwhile, one of `DTYPES`."""

    steps: int = 1000
    batch: int = 64
    rate: float = 2e-3
    warmup: int = 40
    rank: int = 32
    layers: int = 4
    balance: float = 0.4
    smoothing: float = 0.05
    dropout: float = 0.1
    longest: int = 96
    seed: int = 0
    dtype: str = "bfloat16"


class _Adapted(nn.Module):
    """A linear layer that stays as it is, and what is added to it."""

    def __init__(self, linear: nn.Linear, rank: int, noise: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, generator=noise) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))  # nothing is added at first

    def forward(self, states: Tensor) -> Tensor:
        added: Tensor = functional.linear(functional.linear(states, self.down), self.up)
        return self.linear(states) + added


Texts = Mapping[str, Sequence[tuple[str, str]]]


class Sampler:
    """Draws (text, label) from sources at fixed shares."""

    def __init__(self, sources: Texts, shares: Mapping[str, float], balance: float, seed: int) -> None:
        """sources: name -> (text, label); shares: name -> share of the draws, 1 where none is given.

        Raises:
            DataError: if a source has no text.
        """
        self._draw = random.Random(seed)
        self._names = list(sources)
        self._shares = [shares.get(name, 1.0) for name in self._names]
        self._by_label: dict[str, dict[str, list[str]]] = {}
        for name, texts in sources.items():
            if not texts:
                raise DataError(f"the source '{name}' has no text to fit a judge on")
            by_label: dict[str, list[str]] = {}
            for text, label in texts:
                by_label.setdefault(label, []).append(text)
            self._by_label[name] = by_label
        self._weights = {name: [len(texts) ** (1 - balance) for texts in labels.values()] for name, labels in self._by_label.items()}

    def draw(self, count: int) -> list[tuple[str, str]]:
        """Some texts with their labels, the shortest first."""
        drawn = []
        for name in self._draw.choices(self._names, self._shares, k=count):
            label = self._draw.choices(list(self._by_label[name]), self._weights[name])[0]
            drawn.append((self._draw.choice(self._by_label[name][label]), label))
        return sorted(drawn, key=lambda pair: len(pair[0]))


def fine_tune(
    sources: Texts,
    shares: Mapping[str, float],
    settings: FineTuneSettings,
    what: str = "judge",
    labels: Sequence[str] = LABELS,
    start: Adapter | None = None,
) -> Adapter:
    """Fits an adapter to texts; a fresh encoder is loaded, since it is changed while it learns.

    Args:
        sources, shares: as for `Sampler`; what: for the progress bar; labels: what the texts are labelled with; start: an adapter of the
            same rank, layers and labels that learning goes on from, instead of from nothing.

    Raises:
        DataError: if a source has no text.
    """
    sampler, encoder = Sampler(sources, shares, settings.balance, settings.seed), SentenceEncoder()
    noise = torch.Generator().manual_seed(torch_seed(settings.seed))
    model = encoder.model.requires_grad_(False)
    places = {path: _Adapted(linear, settings.rank, noise) for path, linear in linear_layers(model, settings.layers)}
    for path, place in places.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, place)
    head = nn.Linear(2 * model.config.hidden_size, len(labels))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=noise) / head.in_features**0.5)
        head.bias.zero_()
    if start is not None:
        _begin_at(start, places, head)
    learned = [parameter for place in places.values() for parameter in (place.down, place.up)] + list(head.parameters())
    optimiser = torch.optim.AdamW(learned, lr=settings.rate, weight_decay=0.01)
    torch.manual_seed(torch_seed(settings.seed))  # dropout
    model.train()
    with torch.enable_grad(), bar(f"{what} (steps)", settings.steps) as advance:
        for step in range(settings.steps):
            rate = min(1.0, (step + 1) / settings.warmup) * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))
            optimiser.param_groups[0]["lr"] = settings.rate * rate
            drawn = sampler.draw(settings.batch)
            half = len(drawn) // 2
            for part in filter(None, (drawn[:half], drawn[half:])):  # the short and the long ones apart: little padding
                (_loss(encoder, model, head, part, labels, settings) * (len(part) / len(drawn))).backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            advance(1)
    model.eval()
    down = {path: place.down.detach() for path, place in places.items()}
    up = {path: place.up.detach() for path, place in places.items()}
    return Adapter(tuple(labels), down, up, head.weight.detach(), head.bias.detach())


def quicker_dtype() -> str:
    """The one of `DTYPES` that a small step of fine-tuning takes less processor time in, on this machine."""
    encoder = SentenceEncoder()
    model = encoder.model.requires_grad_(False)
    for _, linear in linear_layers(model, FineTuneSettings.layers):
        linear.weight.requires_grad_(True)
    head = nn.Linear(2 * model.config.hidden_size, len(LABELS))
    texts = [("She said that the train was late again, and that nobody had told her.", LABELS[-1])] * 8

    def seconds(dtype: str) -> float:
        begin = time.process_time()  # of all threads, so that other work on the machine does not decide
        with torch.enable_grad():
            _loss(encoder, model, head, texts, LABELS, FineTuneSettings(dtype=dtype)).backward()
        return time.process_time() - begin

    taken = {dtype: min(seconds(dtype) for _ in range(3)) for dtype in DTYPES}
    fastest = min(taken, key=taken.__getitem__)
    note(f"fine-tuning in {fastest}: a small step takes " + ", ".join(f"{s:.2f} s in {dtype}" for dtype, s in taken.items()))
    return fastest


def _begin_at(start: Adapter, places: Mapping[str, _Adapted], head: nn.Linear) -> None:
    """Copies an adapter into what is to be learned."""
    if start.down.keys() != places.keys():
        raise ValueError("an adapter is learned on in the layers that it was learned in")
    with torch.no_grad():
        for path, place in places.items():
            place.down.copy_(start.down[path])
            place.up.copy_(start.up[path])
        head.weight.copy_(start.weight)
        head.bias.copy_(start.bias)


def _loss(
    encoder: SentenceEncoder,
    model: Any,
    head: nn.Linear,
    part: Sequence[tuple[str, str]],
    labels: Sequence[str],
    settings: FineTuneSettings,
) -> Tensor:
    tokens = encoder.tokens([text for text, _ in part], settings.longest)
    dtype = getattr(torch, settings.dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        states = pooled(model(**tokens).last_hidden_state, tokens["attention_mask"])
        logits = head(functional.dropout(states, settings.dropout))
    answers = torch.tensor([labels.index(label) for _, label in part])
    return functional.cross_entropy(logits.float(), answers, label_smoothing=settings.smoothing)


def calibrated(adapter: Adapter, logits: Tensor, answers: Tensor, weights: Tensor) -> Adapter:
    """The adapter with its head divided by the temperature that makes held-out texts likeliest.

    Args:
        logits: [text, label] of texts that nothing was fitted on; answers: [text]; weights: [text], so that every source counts alike.
    """
    grid = torch.linspace(0.5, 4.0, 141, dtype=torch.float64)
    losses = [functional.cross_entropy(logits.double() / t, answers, reduction="none") @ weights.double() for t in grid]
    best = grid[int(torch.stack(losses).argmin())].item()
    return Adapter(adapter.labels, adapter.down, adapter.up, adapter.weight / best, adapter.bias / best)
