"""The same model, asked: which label does it find likeliest as its answer, with no example and with some?

Read as the zero-shot judge reads (`judges.language_model`): the labels' first tokens, less what they get after texts that say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.errors import ModelError
from emosteer.base.files import sha256_text
from emosteer.base.jsonl import KeyedLog
from emosteer.base.progress import bar
from emosteer.judges.language_model import BATCH, EMPTY, LONGEST, label_log_shares, label_tokens
from emosteer.models.model import Model
from emosteer.probing.texts import Texts
from emosteer.scenarios.emotions import NEUTRAL

Turns = list[dict[str, str]]
ZERO, FEW = "zero-shot", "few-shot"


def question(labels: Sequence[str], text: str) -> str:
    """What the model is asked."""
    felt = [label for label in labels if label != NEUTRAL]
    none = f"If the message expresses none of them, the answer is {NEUTRAL}.\n" if NEUTRAL in labels else ""
    shown = " ".join(text.split()[:LONGEST])
    return (
        f"Which emotion does the writer of this message express: {', '.join(felt[:-1])} or {felt[-1]}?\n{none}"
        f"Message: {shown}\nAnswer with one word."
    )


def examples(texts: Texts, shots: int) -> list[tuple[str, str]]:
    """So many training texts of each label with it, label after label: of the first in order the shortest that are not very short."""
    found = []
    for turn in range(shots):
        for label in texts.labels:
            own = [texts.texts[i].text for i in texts.train if texts.texts[i].label == label][:20]
            found.append((sorted(own, key=lambda text: (len(text.split()) < 5, len(text)))[turn % len(own)], label))
    return found


def conversation(labels: Sequence[str], shown: Sequence[tuple[str, str]], text: str) -> Turns:
    """The question about a text, after the examples with their answers."""
    turns: Turns = []
    for example, label in shown:
        turns += [{"role": "user", "content": question(labels, example)}, {"role": "assistant", "content": label}]
    return [*turns, {"role": "user", "content": question(labels, text)}]


def asked(model: Model, texts: Texts, chosen: Sequence[int], shots: int, log: Path) -> dict[str, Tensor]:
    """What the model answers about some texts: way of asking -> probabilities [text, label].

    Args:
        log: JSON-lines file that answers are kept in, so that the same call goes on.

    Raises:
        ModelError: if the tokenizer starts two labels alike, or a text with its examples does not fit the context.
    """
    tokens = label_tokens(model, texts.labels)
    shown: dict[str, list[tuple[str, str]]] = {ZERO: []} | ({FEW: examples(texts, shots)} if shots else {})
    for name, some in shown.items():
        longest = max(len(model.prompt_ids(conversation(texts.labels, some, texts.texts[i].text))) for i in chosen)
        if longest > model.shape.context:
            raise ModelError(
                f"{name}, a text takes {longest} tokens, and the context of {model.name} is {model.shape.context}; lower --shots"
            )
    kept = KeyedLog(log)
    return {name: _answers(model, texts, chosen, some, tokens, kept, name) for name, some in shown.items()}


def _answers(
    model: Model,
    texts: Texts,
    chosen: Sequence[int],
    shown: Sequence[tuple[str, str]],
    tokens: Sequence[int],
    kept: KeyedLog,
    name: str,
) -> Tensor:
    wanted = [*EMPTY, *(texts.texts[i].text for i in chosen)]
    talks = [conversation(texts.labels, shown, text) for text in wanted]
    keys = [sha256_text(repr([model.sha256, model.precision, model.template_sha256, tokens, talk])) for talk in talks]
    todo = sorted((i for i, key in enumerate(keys) if key not in kept.rows), key=lambda i: len(wanted[i]))
    size = max(1, BATCH // (1 + len(shown)))  # an example is about as long as a question
    with bar(f"ask, {name} (texts)", len(wanted), len(wanted) - len(todo)) as advance:
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            rows: list[list[float]] = label_log_shares(model, [talks[i] for i in some], tokens).tolist()
            kept.add({keys[i]: {"log_shares": row} for i, row in zip(some, rows, strict=True)})
            advance(len(some))
    shares = torch.tensor([_row(kept.rows[key]) for key in keys])
    return (shares[len(EMPTY) :] - shares[: len(EMPTY)].mean(0)).softmax(-1)


def _row(row: dict[str, Any]) -> list[float]:
    return [float(value) for value in row["log_shares"]]
