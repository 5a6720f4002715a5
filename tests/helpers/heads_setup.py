"""A study of heads with invented values, for the report's tests and for tests of what is read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emosteer.base.artifacts import Provenance
from emosteer.circuits.heads.heads import HeadStudy

SUPPRESSED, OWN = "calm", "kettle"


def head_study(
    provenance: Provenance,
    emotions: Sequence[str],
    layers: int,
    heads: int,
    described: int = 2,
    text: str = "a plain reply",
) -> HeadStudy:
    """Heads 0, 1, ... of the layers in turn are described; each later one reads the one before it, with alternating signs.

    Args:
        text: a token of every text that heads fire on.
    """
    n, make = len(emotions), torch.Generator().manual_seed(0)
    shares = torch.rand(n + 1, layers, heads, 6, generator=make).softmax(-1)
    length = torch.rand(n, layers, heads, generator=make) + 0.1
    pages, edges, weights = [], [], []
    for e in range(n):
        for rank in range(described):
            layer, head = rank % layers, (rank + e) % heads
            pages.append(_page(emotions, e, layer, head, rank, n))
            if rank and layer:
                edges.append((e, layer - 1, (rank - 1 + e) % heads, layer, head))
                weights.append((-1.0) ** rank * 0.1 / rank)
        edges.append((e, 0, heads - 1 - e % heads, layers - 1, heads - 1))
        weights.append(0.02)
    tokens = [" It", " is", text, "."]
    return HeadStudy(
        emotions=tuple(emotions),
        labels=(*emotions, "neutral"),
        length=length,
        contrast=torch.randn(n, layers, heads, generator=make),
        told=torch.rand(n, layers, heads, generator=make),
        attention=shares,
        at_start=shares[0].clone(),
        even=torch.full((6,), 1 / 6),
        even_at_start=torch.full((6,), 1 / 6),
        edge_index=torch.tensor(edges),
        edge_weight=torch.tensor(weights),
        n_groups=12,
        pages=pages,
        texts=[{"label": label, "prompt": f"prompt of {label}", "tokens": tokens} for label in (*emotions, "neutral")],
        checks={"n": 8, "correlation": 0.91, "correlation_kept": 0.95, "correlation_random": 0.83, "slope": 0.97, "same_sign": 1.0},
        edge_floor=dict.fromkeys(emotions, 0.01),
        notes=(),
        provenance=provenance,
    )


def _page(emotions: Sequence[str], e: int, layer: int, head: int, rank: int, n: int) -> dict[str, Any]:
    word = emotions[e]
    own = {"promoted": [[OWN, 3.25, False]], "suppressed": [["tea", -2.0, False]]}
    lifts = {"added": [0.5 if k == e else 0.1 for k in range(n)], "own": [0.2] * n, "random": 0.01, "random_high": 0.3}
    return {
        "emotion": word,
        "layer": layer,
        "head": head,
        "rank": rank + 1,
        "length": 4.0 - rank,
        "contribution": 0.25,
        "told": 0.75,
        "cosine": 0.3,
        "along": -0.05,
        "added": {"promoted": [[word, 4.5, True], ["slam", 4.0, False]], "suppressed": [[SUPPRESSED, -3.5, False]]},
        "own": own,
        "words": lifts,
        "bank": lifts,
        "looks": [["door", 0.2, 120], [",", 0.05, 900]],
        "fires": {"most": [[e, 0.5, [0.1, 1.0, -0.2, 0.6]]], "least": [[n, -0.3, [0.0, -1.0, -0.3, -0.4]]], "peak": 1.5},
        "sources": {"embeddings": 0.05, "circuit": 0.1, "heads": -0.02, "mlps": 0.12},
        "reads": [[layer - 1, head, 0.1, True]] if layer else [],
    }
