"""What moves a probe: a system line that names an emotion, and steering, each beside its control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emosteer.base.seeds import torch_seed
from emosteer.directions.activations import TokenRow
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.probing.measures import share
from emosteer.probing.reading import frame, passes, text_row
from emosteer.probing.training import Fitted
from emosteer.scenarios.emotions import NEUTRAL

#: Shares of the circuit's default strength that are tried.
DOSES = (0.5, 1.0)
SYSTEM, CIRCUIT, RANDOM = "system line", "circuit", "random vectors"


@dataclass(frozen=True, eq=False)
class Steering:
    """What a circuit adds at its default strength: site -> [emotion, d_model]."""

    emotions: tuple[str, ...]
    vectors: Mapping[Site, Tensor]


def system_line(label: str) -> str:
    """A system line that puts the reader in an emotion."""
    return f"You feel strong {label}."


def adding(vectors: Mapping[Site, Tensor]) -> dict[Site, Edit]:
    """Edits that add a vector [d_model] at every position of a site."""

    def edit(vector: Tensor) -> Edit:
        return lambda activation: activation + vector.to(activation)

    return {site: edit(vector) for site, vector in vectors.items()}


def as_long(vectors: Mapping[Site, Tensor], seed: int) -> dict[Site, Tensor]:
    """Random vectors of the same lengths at the same sites."""
    drawn = torch.Generator().manual_seed(torch_seed(seed))
    found = {}
    for site in sorted(vectors):
        random = torch.randn(vectors[site].shape, generator=drawn)
        found[site] = random / random.norm() * vectors[site].float().norm().cpu()
    return found


def readings(
    model: Model, rows: Sequence[TokenRow], site: Site, probe: Fitted, budget: int, edits: Mapping[Site, Edit] | None = None
) -> Tensor:
    """Probabilities [text, run, label] that a probe of a site reads in texts."""
    found: list[tuple[list[int], Tensor]] = []
    for index, states in passes(model, rows, [site], budget, edits):
        found.append((index, probe.logits(states[site].float().cpu()).softmax(-1)[:, 0]))
    order = torch.tensor([i for index, _ in found for i in index]).argsort()
    return torch.cat([values for _, values in found])[order]


def malleability(
    model: Model,
    texts: Sequence[tuple[str, str, str]],
    labels: Sequence[str],
    site: Site,
    probe: Fitted,
    steering: Steering | None,
    *,
    read: str,
    longest: int,
    budget: int,
    seed: int,
    advance: Callable[[float], None],
) -> dict[str, Any]:
    """How far the probe's probability of a label rises when the model is put in that emotion, on texts of other labels.

    Args:
        texts: (text, label, group); probe: its first run was fitted to true labels, the others to shuffled ones.
        steering: None leaves it out.

    Returns:
        texts, site, and rows {"how", "dose", "label"} with the probability before and after, its rise with an interval, the share of texts
        read as the label before and after, and the rise of the shuffled probes.
    """

    def rows_with(system: str | None) -> list[TokenRow]:
        before = frame(model, system)
        return [text_row(model, before, text, read, longest) for text, _, _ in texts]

    plain = rows_with(None)
    before = readings(model, plain, site, probe, budget)
    found = []
    for how, dose, label, rows, edits in _conditions(labels, steering, plain, rows_with, seed):
        after = readings(model, rows, site, probe, budget, edits)
        found.append({"how": how, "dose": dose, "label": label, **_moved(before, after, labels.index(label), texts, label)})
        advance(1)
    return {"texts": len(texts), "site": str(site), "rows": found}


def n_conditions(labels: Sequence[str], steering: Steering | None) -> int:
    """How many there are: for progress."""
    felt = [label for label in labels if label != NEUTRAL]
    return len(felt) + (2 * len(DOSES) * len([label for label in felt if label in steering.emotions]) if steering else 0)


def _conditions(
    labels: Sequence[str],
    steering: Steering | None,
    plain: list[TokenRow],
    rows_with: Callable[[str | None], list[TokenRow]],
    seed: int,
) -> Iterator[tuple[str, float | None, str, list[TokenRow], dict[Site, Edit]]]:
    """(how, dose, label, rows, edits) of everything that is tried."""
    for label in (label for label in labels if label != NEUTRAL):
        yield SYSTEM, None, label, rows_with(system_line(label)), {}
        if steering is None or label not in steering.emotions:
            continue
        e = steering.emotions.index(label)
        for dose in DOSES:
            vectors = {site: dose * values[e].float().cpu() for site, values in steering.vectors.items()}
            yield CIRCUIT, dose, label, plain, adding(vectors)
            yield RANDOM, dose, label, plain, adding(as_long(vectors, seed + e))


def _moved(before: Tensor, after: Tensor, target: int, texts: Sequence[tuple[str, str, str]], label: str) -> dict[str, Any]:
    """What became of a label's reading in the texts that have another label."""
    others = [i for i, (_, own, _) in enumerate(texts) if own != label]
    old, new = before[others], after[others]
    rise = new[:, :, target] - old[:, :, target]
    groups = [texts[i][2] for i in others]

    def read_as(values: Tensor) -> float:
        return round(float((values[:, 0].argmax(-1) == target).double().mean()), 6)

    return {
        "before": round(float(old[:, 0, target].mean()), 6),
        "after": round(float(new[:, 0, target].mean()), 6),
        "rise": share(rise[:, 0].tolist(), groups, -1.0),
        "rise_shuffled": round(float(rise[:, 1:].mean()), 6) if rise.shape[1] > 1 else 0.0,
        "read_before": read_as(old),
        "read_after": read_as(new),
    }
