"""The HeadStudy: a page for each of the strongest heads of every emotion, and the edges between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.circuits.heads import schema
from emosteer.scenarios.emotions import find_emotion

KIND = "heads"
Page = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class HeadStudy:
    """The product of `heads`.

    labels: of the replies that were read, the emotions first; length: [emotion, layer, head], how long what the circuit adds at a head is
    in the stream, 0 outside the circuit; contrast: [emotion, layer, head], the head's mean contribution along the direction in replies of
    the emotion less that in all emotions' replies to the same prompts; told: [emotion, layer, head], share of the other replies to the same
    prompt in which it contributes less than in the emotion's; attention: [label, layer, head, class], over a reply's positions; at_start:
    [layer, head, class], at t* of plain prompts; even, even_at_start: [class], of a head that looks everywhere alike (the classes are
    `reading.CLASSES`); edge_index: [edge, 5] (emotion, layer, head, later layer, head) and edge_weight: [edge]; pages: one of each
    described head; texts: what they fire on, {"label", "prompt", "tokens"}; checks: edges patched for real; edge_floor: emotion -> weight
    that 99 % of the edges stay below when the replies' labels are shuffled; notes: what was left out, and why.
    """

    emotions: tuple[str, ...]
    labels: tuple[str, ...]
    length: Tensor
    contrast: Tensor
    told: Tensor
    attention: Tensor
    at_start: Tensor
    even: Tensor
    even_at_start: Tensor
    edge_index: Tensor
    edge_weight: Tensor
    n_groups: int
    pages: Sequence[Page]
    texts: Sequence[Mapping[str, Any]]
    checks: Mapping[str, Any]
    edge_floor: Mapping[str, float]
    notes: tuple[str, ...]
    provenance: Provenance

    def index(self, emotion: str) -> int:
        """Position of an emotion.

        Raises:
            UsageError: if there are no heads of it.
        """
        return self.emotions.index(find_emotion(emotion, self.emotions, "this file holds"))

    def of(self, emotion: str) -> list[Page]:
        """The pages of an emotion, strongest head first."""
        name = self.emotions[self.index(emotion)]
        return [page for page in self.pages if page["emotion"] == name]

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        fields = {
            "emotions": list(self.emotions),
            "labels": list(self.labels),
            "n_groups": self.n_groups,
            "pages": [dict(page) for page in self.pages],
            "texts": [dict(text) for text in self.texts],
            "checks": dict(self.checks),
            "edge_floor": dict(self.edge_floor),
            "notes": list(self.notes),
        }
        artifacts.save(path, KIND, fields, {name: getattr(self, name) for name in schema.TENSORS}, self.provenance)

    @classmethod
    def load(cls, path: Path) -> HeadStudy:
        """Reads the artefact back.

        Raises:
            ArtifactError: if it is not one.
        """
        return cls.from_artifact(artifacts.load(path, KIND))

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> HeadStudy:
        """Makes the value from a loaded artefact of kind "heads".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        tuples = {name: tuple(found.fields[name]) for name in ("emotions", "labels", "notes")}
        return cls(**{**found.fields, **tuples, **found.tensors, "provenance": found.provenance})


def overview(study: HeadStudy) -> list[dict[str, Any]]:
    """Per emotion, means over its described heads beside what chance, random outputs or all heads give: whether there is anything to read.

    told, told_all: share told apart by the described heads, and by all heads of the model; cosine: of what the circuit adds with what the
    head writes by itself; words_added, words_own: standard deviations by which the emotion's words are raised, by what is added and by
    the head itself, and words_random: by random outputs of the same heads; words_first_added, words_first_own: share of the heads that
    raise this emotion's words more than any other emotion's; bank_*: the same of the tokens that the bank's replies of this emotion use
    more; attention: a share for each class, at the positions of a reply.
    """
    rows = []
    for e, emotion in enumerate(study.emotions):
        pages = study.of(emotion)

        def mean(read: Any, pages: list[Page] = pages) -> float:
            return round(sum(float(read(page)) for page in pages) / len(pages), 4)

        row: dict[str, Any] = {"emotion": emotion, "heads": len(pages), "told": mean(lambda p: p["told"])}
        row |= {"told_all": round(study.told[e].mean().item(), 4), "cosine": mean(lambda p: p["cosine"])}
        for name in ("words", "bank"):
            for what in ("added", "own"):
                lifts = [page[name][what] for page in pages]
                row[f"{name}_{what}"] = round(sum(values[e] for values in lifts) / len(pages), 4)
                row[f"{name}_first_{what}"] = round(sum(values[e] == max(values) for values in lifts) / len(pages), 4)
            row[f"{name}_random"] = mean(lambda p, name=name: p[name]["random"])
        where = torch.tensor([[page["layer"], page["head"]] for page in pages])
        row["attention"] = study.attention[e, where[:, 0], where[:, 1]].mean(0).tolist()
        rows.append(row)
    return rows
