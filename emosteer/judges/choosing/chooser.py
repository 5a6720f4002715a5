"""Which of several replies to a prompt is the best: three linear heads on what a small model makes of each (`reading`).

They say how likely a reply makes sense, answers what was said, and voices each emotion; the product is its chance of being good, and the
likeliest is taken. The heads were fitted on replies that models wrote and strict readers read (`training`). The chooser is no judge: it
shares no weights with the panel, which judges what was chosen, and nothing is reported of how good it finds its own choice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Provenance
from emosteer.base.errors import ArtifactError
from emosteer.base.files import sha256_text
from emosteer.base.progress import note
from emosteer.judges import schema
from emosteer.judges.choosing.reading import Pair, feature_count, read_replies
from emosteer.judges.embedded import LinearHead
from emosteer.judges.storage import heads_in, tensors_of
from emosteer.models.model import Model

KIND = "chooser"
ASSET = Path(__file__).parents[2] / "assets" / "chooser.safetensors"
#: The packaged model that reads.
READER = "smollm2-135m"
#: The heads, and what the first two tell apart.
SENSE, ANSWER, EMOTION = "sense", "answer", "emotion"
YES, NO = "yes", "no"


@dataclass(frozen=True, eq=False)
class Chooser:
    """The model that reads, unsteered, and the heads by name."""

    model: Model
    heads: Mapping[str, LinearHead]

    @classmethod
    def load(cls, steered: Model | None = None, path: Path = ASSET) -> Chooser:
        """The shipped chooser.

        Args:
            steered: the model that writes; where it is the reader's own, it reads as well, and nothing more is loaded.

        Raises:
            ArtifactError: if the file is missing, damaged, or reads another model's states. ModelError: if the reader cannot be had.
        """
        found = artifacts.load(path, KIND)
        heads = heads_of(found)
        if steered is not None and steered.sha256 == found.provenance.model_sha256:
            model = steered
        else:
            model = _packaged("auto" if steered is None else str(steered.device))
            artifacts.require_model(found.provenance, model.sha256, model.name, "this chooser")
        size = feature_count(model)
        for name, head in heads.items():
            if head.weight.shape[1] != size:
                raise ArtifactError(f"{path} reads {head.weight.shape[1]} features for '{name}', expected {size}; run `make chooser`")
        return cls(model, heads)

    @cached_property
    def key(self) -> str:
        """A hash of everything that shapes a choice."""
        return sha256_text("-".join([self.model.sha256, self.model.precision, *(self.heads[name].key for name in sorted(self.heads))]))[:12]

    def chances(self, pairs: Sequence[Pair], wanted: Sequence[Collection[str]]) -> Tensor:
        """Per (what was said, reply) the chance that the reply makes sense, answers, and voices one of the wanted emotions. Shape [pair].

        Args:
            wanted: per pair the emotions; where the head knows none of them (or none is wanted), the emotion does not count. An empty
                reply has no chance.
        """
        chances = torch.zeros(len(pairs))
        written = [i for i, (_, reply) in enumerate(pairs) if reply.strip()]
        if not written:
            return chances
        places_of = {pair: place for place, pair in enumerate(dict.fromkeys(pairs[i] for i in written))}  # each is read once
        features = read_replies(self.model, list(places_of))[[places_of[pairs[i]] for i in written]]
        sense, answer = (self.heads[name].probabilities(features)[:, self.heads[name].labels.index(YES)] for name in (SENSE, ANSWER))
        emotion, labels = self.heads[EMOTION].probabilities(features), self.heads[EMOTION].labels
        voiced = torch.ones(len(written))
        for row, i in enumerate(written):
            places = [labels.index(name) for name in wanted[i] if name in labels]
            if places:
                voiced[row] = emotion[row, places].sum()
        chances[written] = sense * answer * voiced
        return chances


@lru_cache(maxsize=1)
def _packaged(device: str) -> Model:
    """The packaged reader; it stays in memory for the next call."""
    note(f"replies are chosen by {READER}, which reads them")
    return Model.load(READER, device=device)


def heads_of(found: artifacts.Artifact) -> dict[str, LinearHead]:
    """The heads in a chooser's file.

    Raises:
        ArtifactError: if one is missing or malformed.
    """
    fields = schema.check(found)
    missing = [name for name in (SENSE, ANSWER, EMOTION) if name not in fields.labels]
    if missing:
        raise ArtifactError(f"{found.path} holds no head '{missing[0]}'; run `make chooser`")
    for name in (SENSE, ANSWER):
        if set(fields.labels[name]) != {YES, NO}:
            raise ArtifactError(f"{found.path}: expected the labels of '{name}' to be {YES} and {NO}; run `make chooser`")
    return heads_in(found)


def save_chooser(path: Path, heads: Mapping[str, LinearHead], card: Mapping[str, Any], provenance: Provenance) -> None:
    """Writes heads and card to one file."""
    fields = {"labels": {name: list(head.labels) for name, head in heads.items()}, "encoder": READER, "card": dict(card)}
    artifacts.save(path, KIND, fields, tensors_of(heads), provenance)
