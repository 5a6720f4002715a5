"""Guidance by the prompt: what is written leans away from what would be written if nothing had been said.

Steering pulls every reply towards what the emotion says anywhere, and small models then answer the emotion and not the prompt. So each
prompt has a second row, the same prompt with nothing said in it, steered alike; what the two expect next is compared, and what the
prompt makes likelier is made likelier still: `logits + (scale - 1) * (log p(token | prompt) - log p(token | nothing said))`. That is
classifier-free guidance for language models (Sanchez et al. 2023, arXiv 2306.17806; context-aware decoding, Shi et al. 2023, arXiv
2305.14739, is the same form). Since both rows are steered, what the emotion alone would say cancels, and what it says to this prompt stays.

A difference of logarithms knows nothing of tokens that both rows find impossible: only tokens that the prompt's own row finds
plausible may be written (as in contrastive decoding, Li et al. 2022, arXiv 2210.15097).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from emosteer.generation.engines import Engine
    from emosteer.models.sites import Site

#: A token may be written if its probability is at least this share of the likeliest token's.
PLAUSIBLE = 0.1


def guided(logits: Tensor, empty: Tensor, scale: float) -> Tensor:
    """Logits that lean towards the prompt; implausible tokens have minus infinity. Shape [row, d_vocab], float32.

    Args:
        logits: [row, d_vocab], after the prompt; empty: the same after the prompt with nothing said; scale: 1 leaves the logits alone.
    """
    logits = logits.float()
    here, there = logits.log_softmax(-1), empty.float().log_softmax(-1)
    outside = here < here.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
    # In place: a table of all tokens for every row is memory that the system clears before it is written to for the first time.
    return there.sub_(here).mul_(1 - scale).add_(logits).masked_fill_(outside, -math.inf)


class GuidedEngine:
    """An engine of twice the rows, seen as one of the rows: those of the prompts first, then, in the same order, those where nothing is
    said. Both get every token that is written."""

    def __init__(self, engine: Engine, n_rows: int, scale: float) -> None:
        """engine: with 2 * n_rows rows."""
        self.engine, self.n_rows, self.scale = engine, n_rows, scale

    def step(self, tokens: Tensor | None) -> Tensor:
        """Logits [row, d_vocab] after one more token per row."""
        logits = self.engine.step(None if tokens is None else torch.cat([tokens, tokens]))
        return guided(logits[: self.n_rows], logits[self.n_rows :], self.scale)

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows at the given places, each with its other one."""
        self.engine.keep([*kept, *(self.n_rows + place for place in kept)])
        self.n_rows = len(kept)

    def steer(self, vectors: Mapping[Site, Tensor]) -> None:
        """Steers each row, and its other one alike."""
        self.engine.steer({site: torch.cat([value, value]) for site, value in vectors.items()})
