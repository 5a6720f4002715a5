"""The whole run of `heads`: the strongest heads of each emotion, what they do, and the edges between them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance, versions
from emosteer.base.errors import ArtifactError, ModelError
from emosteer.base.progress import note
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.checks import Pair, check_text, drawn_pairs, text_row_of
from emosteer.circuits.heads.heads import HeadStudy
from emosteer.circuits.heads.pages import make_pages
from emosteer.circuits.heads.paths import Paths, Targets, contrast, edges_into, targets_of
from emosteer.circuits.heads.reading import Readings, complete_groups, described_heads, read
from emosteer.circuits.heads.settings import HeadSettings
from emosteer.circuits.heads.writing import vocabulary
from emosteer.directions.activations import make_batch, rows_of, tokenize_group
from emosteer.directions.directions import Directions
from emosteer.models.attention import see
from emosteer.models.model import Model
from emosteer.models.sites import Head, Site, Z
from emosteer.scenarios.scenarios import Bank, Group

METHOD = "heads of a circuit: attention, direct effect on logits, texts by contribution, direct paths through values"
#: An edge must exceed this share of the edges with shuffled labels.
FLOOR = 0.99


def study(
    model: Model,
    circuit: Circuit,
    directions: Directions,
    groups: Sequence[Group],
    bank: Bank,
    settings: HeadSettings,
    *,
    data: Mapping[str, str] | None = None,
    parents: Mapping[str, str] | None = None,
) -> HeadStudy:
    """Reads replies of the bank and says what the strongest heads of each emotion do.

    Args:
        groups, bank: what is read; directions: with the emotions of the circuit, in its order.
        data: file name -> sha256; parents: artefact kind -> sha256.

    Raises:
        ArtifactError: if circuit and directions have other emotions, or the circuit has no head. DataError: if the bank has too few
            complete prompts. ModelError: if the model does not show where its heads look.
    """
    length = described_lengths(model, circuit, directions)
    strongest = [ranked(length[e]) for e in range(len(circuit.emotions))]
    chosen = [(e, head) for e, heads in enumerate(strongest) for head in heads[: settings.described]]
    read_groups, labels = complete_groups(groups, bank, circuit.emotions, settings.groups)
    described = described_heads(model, directions, chosen)
    nodes = [heads[: settings.nodes] for heads in strongest]
    notes: list[str] = []
    targets = graph_targets(model, directions, nodes, read_groups[0], bank, notes)
    readings = read(model, directions, read_groups, bank, labels, described, targets, settings.seed)
    paths = readings.paths
    edges = None if targets is None or paths is None else _edges(model, targets, paths, nodes, settings)
    checks = {} if edges is None or targets is None else _checks(model, directions, readings, targets, nodes, edges.kept, settings)
    vocab = vocabulary(model, circuit.emotions, complete_groups(groups, bank, circuit.emotions, len(groups))[0], bank)
    pages, texts = make_pages(model, circuit, directions, readings, described, read_groups, vocab, length, targets, settings)
    return HeadStudy(
        emotions=tuple(circuit.emotions),
        labels=labels,
        length=length,
        contrast=contrasts_of(readings.contributions, len(circuit.emotions)),
        told=told_apart(readings.contributions, len(circuit.emotions)),
        attention=readings.attention,
        at_start=readings.at_start,
        even=readings.even,
        even_at_start=readings.even_at_start,
        edge_index=torch.zeros(0, 5, dtype=torch.long) if edges is None else edges.index,
        edge_weight=torch.zeros(0) if edges is None else edges.weight,
        n_groups=len(read_groups),
        pages=pages,
        texts=texts,
        checks=checks,
        edge_floor={} if edges is None else {name: edges.floor[e] for e, name in enumerate(circuit.emotions)},
        notes=tuple(notes),
        provenance=_provenance(model, settings, data or {}, parents or {}),
    )


def _provenance(model: Model, settings: HeadSettings, data: Mapping[str, str], parents: Mapping[str, str]) -> Provenance:
    return Provenance(
        model=model.name,
        model_sha256=model.sha256,
        template_sha256=model.template_sha256,
        method=METHOD,
        params={**asdict(settings), "dtype": model.precision, "device": model.device.type},
        seed=settings.seed,
        data=dict(data),
        parents=dict(parents),
        versions=versions(),
    )


def described_lengths(model: Model, circuit: Circuit, directions: Directions) -> Tensor:
    """`added_lengths`, once it is sure that there is something to describe.

    Raises:
        ArtifactError: as `study`.
    """
    if tuple(circuit.emotions) != tuple(directions.emotions):
        raise ArtifactError(
            f"expected directions of {', '.join(circuit.emotions)}, as in the circuit, found {', '.join(directions.emotions)}; give those "
            "that it was made from with --directions"
        )
    length = added_lengths(model, circuit)
    empty = [emotion for e, emotion in enumerate(circuit.emotions) if not (length[e] > 0).any()]
    if empty:
        raise ArtifactError(f"expected a circuit with heads, found none for {', '.join(empty)}; there is nothing to describe")
    return length


def added_lengths(model: Model, circuit: Circuit) -> Tensor:
    """How long what the circuit adds at each head is in the stream, at strength 1. Shape [emotion, layer, head]; 0 outside it."""
    shape = model.shape
    z = circuit.z_delta.float().unflatten(-1, (shape.n_heads, shape.d_head))
    layers = [
        torch.einsum("ehd,hdm->ehm", z[:, layer].to(model.device), model.w_o(layer).float()).norm(dim=-1) for layer in range(shape.n_layers)
    ]
    return torch.stack(layers, dim=1).cpu() * circuit.heads


def ranked(length: Tensor) -> list[Head]:
    """Heads of a circuit by what they add, longest first. length: [layer, head]."""
    order = length.flatten().argsort(descending=True, stable=True).tolist()
    return [Head(i // length.shape[1], i % length.shape[1]) for i in order if length.flatten()[i] > 0]


def contrasts_of(contributions: Tensor, n_emotions: int) -> Tensor:
    """Mean contribution in an emotion's replies less that in all emotions' replies. [group, label, emotion, ...] -> [emotion, ...]."""
    of_emotions = contributions[:, :n_emotions].mean(0)
    return contrast(of_emotions)[range(n_emotions), range(n_emotions)]


def told_apart(contributions: Tensor, n_emotions: int) -> Tensor:
    """Share of the other replies to the same prompt in which a head contributes less along an emotion's direction than in that emotion's
    reply, ties as halves: .5 is chance. [group, label, emotion, ...] -> [emotion, ...]."""
    rows = []
    for e in range(n_emotions):
        own = contributions[:, e : e + 1, e]
        others = contributions[:, [k for k in range(contributions.shape[1]) if k != e], e]
        rows.append(((own > others).float() + 0.5 * (own == others).float()).mean((0, 1)))
    return torch.stack(rows)


def graph_targets(
    model: Model, directions: Directions, nodes: Sequence[Sequence[Head]], group: Group, bank: Bank, notes: list[str]
) -> Targets | None:
    """What edges lead to; None, with a note, where there is no graph."""
    heads = sorted({head for some in nodes for head in some})
    if not heads:
        notes.append("no graph was asked for")
        return None
    sample = tokenize_group(model, group, "reply", directions.emotions[:1], bank[group.key], directions.instruction)
    batch = make_batch(model, rows_of(sample, packed=False)[:1])
    seen = see(model, batch.ids, batch.mask, batch.positions, [Site(layer, Z) for layer in range(model.shape.n_layers)])
    try:
        return targets_of(model, directions, heads, seen)
    except ModelError as error:
        notes.append(str(error))
        note(notes[-1])
        return None


# ---- edges -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Edges:
    """Kept edges. rows: (pair, weight), by emotion, strongest first; floor: by emotion."""

    rows: tuple[tuple[tuple[Pair, float], ...], ...]
    floor: tuple[float, ...]

    @property
    def kept(self) -> list[list[Pair]]:
        """The pairs of each emotion."""
        return [[pair for pair, _ in some] for some in self.rows]

    @property
    def index(self) -> Tensor:
        """[edge, 5], as in `HeadStudy`."""
        ends = [(p.emotion, p.source.layer, p.source.index, p.target.layer, p.target.index) for some in self.kept for p in some]
        return torch.tensor(ends, dtype=torch.long).reshape(-1, 5)

    @property
    def weight(self) -> Tensor:
        """[edge]."""
        return torch.tensor([weight for some in self.rows for _, weight in some])


def _edges(model: Model, targets: Targets, paths: Paths, nodes: Sequence[Sequence[Head]], settings: HeadSettings) -> _Edges:
    """Edges between the nodes of each emotion, pruned: those that shuffled labels hardly reach, the strongest of them."""
    real, shuffled = (contrast(edges_into(model, targets, arrived)) for arrived in (paths.z, paths.shuffled))
    place = {head: i for i, head in enumerate(targets.heads)}
    rows, floors = [], []
    for e, heads in enumerate(nodes):
        pairs = [Pair(a, b, e) for b in heads for a in heads if a.layer < b.layer]
        ends = [(place[p.target], e, p.source.layer, p.source.index) for p in pairs]
        weights, null = (torch.stack([table[e][end] for end in ends]) if ends else torch.zeros(0) for table in (real, shuffled))
        floor = null.abs().quantile(FLOOR).item() if ends else 0.0
        strongest = weights.abs().argsort(descending=True, stable=True).tolist()[: settings.edges]
        rows.append(tuple((pairs[i], weights[i].item()) for i in strongest if weights[i].abs() > floor))
        floors.append(floor)
    return _Edges(tuple(rows), tuple(floors))


def _checks(
    model: Model,
    directions: Directions,
    readings: Readings,
    targets: Targets,
    nodes: Sequence[Sequence[Head]],
    kept: Sequence[Sequence[Pair]],
    settings: HeadSettings,
) -> dict[str, Any]:
    """Some edges patched for real, on one text of their emotion each."""
    draw = random.Random(f"checks/{settings.seed}")
    each, rows = settings.checked // len(nodes), []
    for e, heads in enumerate(nodes):
        chosen = drawn_pairs(kept[e], heads, e, each, draw)
        if not chosen:
            continue
        text = draw.choice([text for text in readings.texts if text.label == e])
        pairs = [pair for pair, _ in chosen]
        estimate, truth = check_text(model, directions, text_row_of(text.ids, text.first), pairs, targets)
        rows += [(was, a, b) for (_, was), a, b in zip(chosen, estimate.tolist(), truth.tolist(), strict=True)]
    if len(rows) < 4:
        return {}
    table = torch.tensor([(a, b) for _, a, b in rows], dtype=torch.float64)
    was_kept = torch.tensor([was for was, _, _ in rows])
    large = table[:, 0].abs() >= table[:, 0].abs().median()
    return {
        "n": len(rows),
        "correlation": _correlation(table),
        "correlation_kept": _correlation(table[was_kept]),
        "correlation_random": _correlation(table[~was_kept]),
        "slope": round(float((table[:, 0] * table[:, 1]).sum() / table[:, 0].square().sum().clamp_min(1e-30)), 4),
        "same_sign": round(float((table[large, 0].sign() == table[large, 1].sign()).double().mean()), 4),
    }


def _correlation(table: Tensor) -> float:
    """Pearson's, 0 where there is nothing to correlate. table: [row, 2]."""
    if len(table) < 2 or not (table.std(0) > 0).all():
        return 0.0
    return round(float(torch.corrcoef(table.T)[0, 1]), 4)
