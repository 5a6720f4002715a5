"""A fine-tuned judge in two megabytes: low-rank adapters (Hu et al. 2021, LoRA) in the upper layers of the sentence encoder, and a head.

An adapter adds `up @ down` to the weight of a linear layer. Once merged, reading costs what the plain encoder costs. The encoder itself
is fetched as before and shared: only adapted layers exist twice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from emosteer.base.errors import ArtifactError
from emosteer.judges.embedded import SentenceEncoder, by_length, opinions_of
from emosteer.judges.protocol import Opinion


@dataclass(frozen=True, eq=False)
class Adapter:
    """What fine-tuning found. down, up: path of a linear layer in the encoder -> [rank, in] and [out, rank]; weight [label, 2 * width]
    and bias [label]: the head on `pooled` states, already divided by the calibration's temperature."""

    labels: tuple[str, ...]
    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    weight: Tensor
    bias: Tensor

    @cached_property
    def key(self) -> str:
        """A short hash: the same opinions, the same key."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()[:12]

    def tensors(self) -> dict[str, Tensor]:
        """Everything as it is stored: half precision, which is plenty."""
        named = {"weight": self.weight, "bias": self.bias}
        named |= {f"down.{path}": value for path, value in self.down.items()}
        named |= {f"up.{path}": value for path, value in self.up.items()}
        return {name: value.half().contiguous() for name, value in sorted(named.items())}

    @classmethod
    def of(cls, labels: Sequence[str], tensors: Mapping[str, Tensor]) -> Adapter:
        """What `tensors` gave.

        Raises:
            ArtifactError: if a part is missing or the parts do not fit each other.
        """
        try:
            parts = {
                kind: {n.removeprefix(f"{kind}."): v.float() for n, v in tensors.items() if n.startswith(f"{kind}.")}
                for kind in ("down", "up")
            }
            adapter = cls(tuple(labels), parts["down"], parts["up"], tensors["weight"].float(), tensors["bias"].float())
        except KeyError as error:
            raise ArtifactError(f"the judge's adapter lacks {error}; run `make judge`") from error
        if not adapter.fits:
            raise ArtifactError("the parts of the judge's adapter do not fit each other; run `make judge`")
        return adapter

    @property
    def fits(self) -> bool:
        """Whether the parts fit each other."""
        matrices = [self.weight, *self.down.values(), *self.up.values()]
        if self.down.keys() != self.up.keys() or any(part.ndim != 2 for part in matrices) or self.bias.ndim != 1:
            return False
        same_rank = all(self.down[path].shape[0] == self.up[path].shape[1] for path in self.down)
        return same_rank and self.weight.shape[0] == self.bias.shape[0] == len(self.labels)


def linear_layers(encoder: Any, n_layers: int) -> Iterator[tuple[str, nn.Linear]]:
    """(path, module) of every linear map in the last `n_layers` layers of the encoder."""
    first = len(encoder.encoder.layer) - n_layers
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and path.startswith("encoder.layer.") and int(path.split(".")[2]) >= first:
            yield path, module


def merged(encoder: Any, adapter: Adapter) -> Any:
    """The encoder with the adapter in its weights; whatever is not adapted is shared with the original.

    Raises:
        ArtifactError: if the adapter was made for another encoder.
    """
    places = dict(linear_layers(encoder, len(encoder.encoder.layer)))
    for path, down in adapter.down.items():
        # asked beforehand: what is not adapted is shared, and small parts would be added to any weight by broadcasting
        if path not in places or places[path].weight.shape != (adapter.up[path].shape[0], down.shape[1]):
            raise ArtifactError(f"the judge's adapter does not fit this encoder at {path}; run `make judge`")
    if adapter.weight.shape[1] != 2 * encoder.config.hidden_size:
        raise ArtifactError("the judge's head does not fit this encoder; run `make judge`")
    shared = [encoder.embeddings, *(layer for i, layer in enumerate(encoder.encoder.layer) if not _touches(adapter, i))]
    tuned = copy.deepcopy(encoder, {id(module): module for module in shared})
    for path, down in adapter.down.items():
        layer = tuned.get_submodule(path)
        with torch.no_grad():
            layer.weight = nn.Parameter(layer.weight + adapter.up[path] @ down, requires_grad=False)
    return tuned


def _touches(adapter: Adapter, layer: int) -> bool:
    return any(path.startswith(f"encoder.layer.{layer}.") for path in adapter.down)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum over a text's tokens. Shape [text, 2 * width].

    Args:
        states: [text, pos, width]; mask: [text, pos], 1 where there is a token.
    """
    weight = mask[..., None].to(states.dtype)
    mean = (states * weight).sum(1) / weight.sum(1)
    return torch.cat([mean, states.masked_fill(weight == 0, -1e4).amax(1)], dim=-1)


@dataclass(frozen=True, eq=False)
class TunedJudge:
    """Probabilities over the emotions and neutral from a fine-tuned encoder. encoder: the plain one; adapted: `merged`."""

    encoder: SentenceEncoder
    adapted: Any
    adapter: Adapter
    name: str

    @classmethod
    def of(cls, encoder: SentenceEncoder, adapter: Adapter, name: str) -> TunedJudge:
        """Merges the adapter; errors as for `merged`."""
        return cls(encoder, merged(encoder.model, adapter), adapter, name)

    @property
    def key(self) -> str:
        """A hash of the adapter and the head."""
        return f"{self.name}-{self.adapter.key}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The emotions, then neutral."""
        return self.adapter.labels

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """[text, label], blind."""

        def rows(batch: Sequence[str]) -> Tensor:
            tokens = self.encoder.tokens(batch)
            states = self.adapted(**tokens).last_hidden_state
            return functional.linear(pooled(states, tokens["attention_mask"]), self.adapter.weight, self.adapter.bias).softmax(-1)

        return by_length(texts, rows) if texts else torch.zeros(0, len(self.labels))

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One opinion per text; never missing."""
        return opinions_of(self.probabilities(texts), self.labels, done)
