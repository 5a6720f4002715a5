"""The graph of a circuit's heads as plain JSON, for other tools (docs/CIRCUITS.md has the schema). No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emosteer.circuits.heads.heads import HeadStudy

SCHEMA, VERSION = "emosteer/heads-graph", 1
METHOD = (
    "direct path through values: mean over read positions i of sum_j pattern[i, j] * norm_scale[j] * (written by source at j) . (read by "
    "target), contrast between emotions; patterns and norm scales held"
)


def graph(study: HeadStudy) -> dict[str, Any]:
    """Nodes and edges of every emotion: described heads, and heads that a kept edge joins; edges by weight, strongest first."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "model": study.provenance.model,
        "model_sha256": study.provenance.model_sha256,
        "parents": dict(study.provenance.parents),
        "method": METHOD,
        "prompts": study.n_groups,
        "layers": study.length.shape[1],
        "heads": study.length.shape[2],
        "checks": dict(study.checks),
        "emotions": {emotion: _of(study, e) for e, emotion in enumerate(study.emotions)},
    }


def _of(study: HeadStudy, e: int) -> dict[str, Any]:
    mine = study.edge_index[:, 0] == e
    edges: list[dict[str, Any]] = sorted(
        (
            {"source": f"L{a}H{i}", "target": f"L{b}H{j}", "weight": _short(weight)}
            for (_, a, i, b, j), weight in zip(study.edge_index[mine].tolist(), study.edge_weight[mine].tolist(), strict=True)
        ),
        key=lambda edge: -abs(edge["weight"]),
    )
    ranks = {(page["layer"], page["head"]): page["rank"] for page in study.of(study.emotions[e])}
    joined = {(a, i) for _, a, i, _, _ in study.edge_index[mine].tolist()} | {(b, j) for _, _, _, b, j in study.edge_index[mine].tolist()}
    nodes = [
        {
            "id": f"L{layer}H{head}",
            "kind": "head",
            "layer": layer,
            "head": head,
            "rank": ranks.get((layer, head)),
            "length": _short(study.length[e, layer, head].item()),
            "contribution": _short(study.contrast[e, layer, head].item()),
            "told": _short(study.told[e, layer, head].item()),
        }
        for layer, head in sorted({*ranks, *joined})
    ]
    return {"floor": study.edge_floor.get(study.emotions[e]), "nodes": nodes, "edges": edges}


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
