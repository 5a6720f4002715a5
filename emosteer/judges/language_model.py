"""A judge from any local language model, without training: how likely each label is as its answer to "which emotion is this?".

The label's first token after the chat template is compared with how likely it is after texts that say nothing (contextual calibration,
Zhao et al. 2021): a small model prefers some labels whatever it reads. Never the model that is steered: it would judge itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from emosteer.base.errors import ModelError
from emosteer.base.files import sha256_text
from emosteer.base.progress import note
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.models.memory import halve_on_oom
from emosteer.models.model import Model

#: Changed whenever the question or its reading is: opinions that are kept go by it.
QUESTION = 2
_ASK = (
    "Which emotion does the writer of this message express: anger, sadness, happiness, fear, surprise or disgust? "
    "If the message expresses none of them, the answer is neutral.\nMessage: {text}\nAnswer with one word."
)
#: Texts that say nothing.
EMPTY = ("", "N/A", "The", "...")
BATCH = 16
#: Words of a text that are read.
LONGEST = 160


@dataclass(frozen=True, eq=False)
class LanguageModelJudge:
    """A model and the first token of each label. tokens: one per label, all different."""

    model: Model
    tokens: tuple[int, ...]

    @classmethod
    def load(cls, reference: str, device: str = "auto") -> LanguageModelJudge:
        """Loads the model as every command does.

        Raises:
            ModelError: if it cannot be had, or its tokenizer starts two labels alike.
        """
        return cls.of(Model.load(reference, device=device))

    @classmethod
    def of(cls, model: Model) -> LanguageModelJudge:
        """The judge of a model in memory; errors as for `load`."""
        return cls(model, label_tokens(model, LABELS))

    @property
    def name(self) -> str:
        """As it is named on the command line."""
        return f"lm:{self.model.name}"

    @property
    def key(self) -> str:
        """A hash of the model, its precision and the question."""
        return "lm-" + sha256_text(repr([self.model.sha256, self.model.template_sha256, self.model.precision, QUESTION, _ASK]))[:16]

    @property
    def weights(self) -> frozenset[str]:
        """Hashes of its weights."""
        return frozenset([self.model.sha256])

    @cached_property
    def prior(self) -> Tensor:
        """Mean log-probabilities of the labels after texts that say nothing. Shape [label]."""
        # of the logarithms: whatever a label is always preferred by then cancels exactly
        return self._log_shares(EMPTY).mean(0)

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text, in order; texts of similar length are read together.

        Raises:
            OutOfMemory: if not even one text fits.
        """
        opinions: list[Opinion] = [Opinion(None, "not judged")] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))

        def compute(index: list[int]) -> list[tuple[int, list[float]]]:
            shares = (self._log_shares([texts[i] for i in index]) - self.prior).softmax(-1)
            return list(zip(index, shares.tolist(), strict=True))

        for start in range(0, len(order), BATCH):
            for part in halve_on_oom(order[start : start + BATCH], compute, note, "texts"):
                for i, shares in part:
                    opinions[i] = Opinion({label: round(share, 6) for label, share in zip(LABELS, shares, strict=True)})
                    if done is not None:
                        done(i, opinions[i])
        return opinions

    def _log_shares(self, texts: Sequence[str]) -> Tensor:
        """Log-probabilities of the labels' first tokens, as far as they are answers at all. Shape [text, label]."""
        asked = [_ASK.format(text=" ".join(text.split()[:LONGEST])) for text in texts]
        return label_log_shares(self.model, [[{"role": "user", "content": question}] for question in asked], self.tokens)


def label_tokens(model: Model, labels: Sequence[str]) -> tuple[int, ...]:
    """The first token of each label as an answer, all different.

    Raises:
        ModelError: if the tokenizer starts two labels alike.
    """
    ids = [model.text_ids(label) for label in labels]
    first = tuple(row[0] for row in ids if row)
    if len(set(first)) < len(labels):
        raise ModelError(
            f"the tokenizer of {model.name} does not tell the labels {', '.join(labels)} apart by their first token; use another model"
        )
    return first


@torch.no_grad()
def label_log_shares(model: Model, conversations: Sequence[Sequence[Mapping[str, str]]], tokens: Sequence[int]) -> Tensor:
    """Log-probabilities of the labels' first tokens as the next reply, as far as they are answers at all. Shape [conversation, label].

    Args:
        tokens: as `label_tokens` gives them.
    """
    prompts = [model.prompt_ids(messages) for messages in conversations]
    width = max(map(len, prompts))
    rows = torch.tensor([ids + [model.pad_id] * (width - len(ids)) for ids in prompts], device=model.device)
    hidden = model.run(rows, bridge=False)  # padded on the right and causal: the padding is never seen
    last = hidden[torch.arange(len(prompts)), torch.tensor([len(ids) - 1 for ids in prompts])]
    return model.logits(last).float()[:, list(tokens)].log_softmax(-1).cpu()
