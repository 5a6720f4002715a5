"""The sentence encoder (all-MiniLM-L6-v2) of every judge that comes along, and the linear judge: a small head on the frozen encoder.

Offline once the encoder is there, blind, and independent: it shares no weights with a steered model and no text with the reply bank.
Linear heads read every layer of the encoder (mean and standard deviation over tokens), not only the last: what sentence embeddings are
trained for is the topic, while tone and word order live in the layers below. `make judge` fits the heads again, bit for bit on one
machine and with one build of torch; elsewhere the last bits differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from emosteer.judges.protocol import Opinion

ENCODER = "all-minilm-l6-v2"
KIND = "judge"
ASSET = Path(__file__).parents[1] / "assets" / "judge.safetensors"
MAX_TOKENS = 160
#: Weight of the squared head weights in the fit.
RIDGE = 3e-6


class SentenceEncoder:
    """all-MiniLM-L6-v2: sentence embeddings, and features of all its layers. Fetched on first use; float32, on the CPU."""

    def __init__(self) -> None:
        """Loads the encoder."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as hf_logging

        from emosteer.base.progress import note
        from emosteer.models.weights.resolve import packaged_folder

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        folder = packaged_folder(ENCODER, progress=note).path
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Sentence embeddings: mean over the tokens of the last layer, unit length. Shape [text, width]."""
        return self._run(texts, lambda layers, weight: normalize((layers[-1] * weight).sum(1) / weight.sum(1), dim=-1))

    def features(self, texts: Sequence[str]) -> Tensor:
        """Mean and standard deviation over tokens of every layer, each part of unit length. Shape [text, 2 * layers * width]."""
        return self._run(texts, _layer_statistics)

    def tokens(self, texts: Sequence[str], longest: int = MAX_TOKENS) -> Any:
        """A padded batch; an empty text is read as a full stop."""
        batch = [text if text.strip() else "." for text in texts]
        return self.tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")

    def _run(self, texts: Sequence[str], read: Callable[[tuple[Tensor, ...], Tensor], Tensor]) -> Tensor:
        def rows(batch: Sequence[str]) -> Tensor:
            tokens = self.tokens(batch)
            return read(self.model(**tokens, output_hidden_states=True).hidden_states, tokens["attention_mask"][..., None].float())

        return by_length(texts, rows)


@lru_cache(maxsize=1)
def shared_encoder() -> SentenceEncoder:
    """One encoder for all judges of a process that read with it and do not change it."""
    return SentenceEncoder()


@torch.no_grad()
def by_length(texts: Sequence[str], rows: Callable[[Sequence[str]], Tensor], batch_size: int = 64) -> Tensor:
    """One row per text, read in batches of similar length, so that little is padded. Shape [text, ...]; [0, 0] for no texts.

    Args:
        rows: what is read of a batch, [text, ...].
    """
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
    read: list[Tensor | None] = [None] * len(texts)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        for i, row in zip(index, rows([texts[i] for i in index]), strict=True):
            read[i] = row
    return torch.stack([row for row in read if row is not None]) if texts else torch.zeros(0, 0)


def _layer_statistics(layers: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    count = weight.sum(1)
    means = [(layer * weight).sum(1) / count for layer in layers]
    spreads = [(((layer - mean[:, None]).square() * weight).sum(1) / count).sqrt() for layer, mean in zip(layers, means, strict=True)]
    return torch.cat([normalize(part, dim=-1) for part in (*means, *spreads)], dim=-1)


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Multinomial logistic regression on standardised features. mean, scale: [feature]; weight: [label, feature]; bias: [label]."""

    labels: tuple[str, ...]
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @cached_property
    def key(self) -> str:
        """A short hash of the head: the same opinions, the same key."""
        parts = (self.mean, self.scale, self.weight, self.bias)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:12]

    def probabilities(self, features: Tensor) -> Tensor:
        """[text, label]."""
        return ((features - self.mean) * self.scale @ self.weight.T + self.bias).softmax(-1)


def fit_head(
    features: Tensor,
    answers: Tensor,
    labels: Sequence[str],
    ridge: float = RIDGE,
    weights: Tensor | None = None,
    counts: Tensor | None = None,
) -> LinearHead:
    """Fits a head by LBFGS: the loss is strictly convex in the weights, so the result does not depend on chance.

    Args:
        features: [text, feature]; answers: [text], indices of `labels`; weights: [feature], a larger one is held back less by the ridge;
            counts: [text], how much each text counts; all alike if not given.
    """
    mean = features.mean(0)
    scale = 1 / ((features.std(0) + 1e-4) * features.shape[1] ** 0.5)
    if weights is not None:
        scale = scale * weights
    x = (features - mean) * scale
    weight = torch.zeros(len(labels), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], lr=1.0, max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = x @ weight.T + bias
        wrong = (
            cross_entropy(logits, answers) if counts is None else cross_entropy(logits, answers, reduction="none") @ counts / counts.sum()
        )
        value = wrong + ridge * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    kept = [part.detach().half().float() for part in (weight, bias)]  # half precision is plenty, and hides the last bits of the fit
    return LinearHead(tuple(labels), mean, scale, kept[0], kept[1])


@dataclass(frozen=True, eq=False)
class LinearJudge:
    """Probabilities over the emotions and neutral from a linear head on the frozen encoder; soundness is another head of the same file
    (`soundness.SoundnessCheck`)."""

    encoder: SentenceEncoder
    head: LinearHead
    name: str = "linear"

    @property
    def key(self) -> str:
        """A hash of the head."""
        return f"{self.name}-{self.head.key}"

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The emotions, then neutral."""
        return self.head.labels

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """[text, label], blind."""
        return self.head.probabilities(self.encoder.features(texts)) if texts else torch.zeros(0, len(self.labels))

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text; never missing."""
        return opinions_of(self.probabilities(texts), self.labels, done)


def opinions_of(probabilities: Tensor, labels: Sequence[str], done: Callable[[int, Opinion], None] | None) -> list[Opinion]:
    """A local judge's probabilities [text, label] as opinions; `done` is told of each, as `EmotionJudge.opinions` promises."""
    opinions = [Opinion({label: round(p, 6) for label, p in zip(labels, row, strict=True)}) for row in probabilities.tolist()]
    for index, opinion in enumerate(opinions):
        if done is not None:
            done(index, opinion)
    return opinions
