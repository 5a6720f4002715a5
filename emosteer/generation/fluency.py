"""How likely a text is by itself: mean nats per token under the plain, unsteered model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from emosteer.models.model import Model

#: Nats per token that an empty reply counts for: it is a broken one.
EMPTY_NLL = 10.0


@torch.no_grad()
def reply_nll(model: Model, texts: Sequence[str], batch_size: int = 32) -> list[float]:
    """Mean negative log-likelihood per token of each text alone (no prompt; behind BOS where the model has one), in nats.

    An empty text gives nan.
    """
    bos = model.tokenizer.bos_token_id
    start = [bos] if bos is not None else [model.pad_id]
    ids = [start + model.text_ids(text) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [float("nan")] * len(ids)
    for first in range(0, len(order), batch_size):
        index = [i for i in order[first : first + batch_size] if len(ids[i]) > 1]
        if not index:
            continue
        width = max(len(ids[i]) for i in index)
        rows = torch.tensor([ids[i] + [model.pad_id] * (width - len(ids[i])) for i in index], device=model.device)
        hidden = model.run(rows, bridge=False)  # padded on the right and causal: the padding is never seen
        for row, i in enumerate(index):
            size = len(ids[i])
            logits = model.logits(hidden[row, : size - 1]).float()
            found[i] = cross_entropy(logits, rows[row, 1:size]).item()
    return found
