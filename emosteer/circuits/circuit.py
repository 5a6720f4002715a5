"""The Circuit: which heads and neurons, what they add, at what strength, and how well it stands for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base import artifacts
from emosteer.base.artifacts import Identified, Provenance
from emosteer.base.errors import ArtifactError
from emosteer.base.schema import check_sizes
from emosteer.circuits import schema
from emosteer.circuits.dial import LESS, check_intensity, strength_for
from emosteer.circuits.methods import METHODS, Part, source_of
from emosteer.circuits.settings import learned_of
from emosteer.generation.steering import compile_units, residual_vectors
from emosteer.models.model import Model
from emosteer.models.sites import RESID_POST, Head, Neuron, Site, Unit
from emosteer.scenarios.emotions import find_emotion
from emosteer.scenarios.examples import Examples, as_fields, of_fields

KIND = "circuit"
#: Default strength of learned residual vectors: the one that they are learned at.
LEARNED_STRENGTH = 1.0


@dataclass(frozen=True, eq=False)
class Circuit:
    """The product of `circuit`: enough to steer, without any other file.

    heads: [emotion, layer, head], bool; z_delta: [emotion, layer, n_heads * d_head], mean contrast of the circuit's heads, zero
    elsewhere; neuron_index: [n, 3] (emotion, layer, neuron) and neuron_delta: [n]; strength: [emotion], the default; importance:
    [emotion, layer, 2], of the attention and MLP sublayers. For residual steering, the comparison: vectors [emotion, layer,
    d_model] (v_post, unit length), rms [layer], residual_layers and residual_strength. metrics: what `circuit` measured.
    learned_residual: [emotion, layer of residual_layers, d_model], vectors learned as the gains were, at strength 1; None where none
    were learned. examples: emotion -> exchanges that stand before a prompt that is steered (`scenarios.examples`).
    """

    emotions: tuple[str, ...]
    heads: Tensor
    z_delta: Tensor
    neuron_index: Tensor
    neuron_delta: Tensor
    strength: Tensor
    importance: Tensor
    vectors: Tensor
    rms: Tensor
    residual_layers: tuple[int, ...]
    residual_strength: float
    d_mlp: int
    preset: str
    instruction: str
    metrics: Mapping[str, Any]
    provenance: Provenance
    learned_residual: Tensor | None = None
    examples: Examples = field(default_factory=dict)

    def index(self, emotion: str) -> int:
        """Position of an emotion.

        Raises:
            UsageError: if the circuit has none for it.
        """
        return self.emotions.index(find_emotion(emotion, self.emotions, "this circuit knows"))

    def units(self, emotion: str) -> tuple[Unit, ...]:
        """The heads and neurons of an emotion, in the order of the model."""
        e = self.index(emotion)
        heads: list[Unit] = [Head(layer, head) for layer, head in self.heads[e].nonzero().tolist()]
        mine = self.neuron_index[self.neuron_index[:, 0] == e]
        return tuple(sorted(heads, key=str_order) + sorted((Neuron(layer, n) for _, layer, n in mine.tolist()), key=str_order))

    def mlp_delta(self) -> Tensor:
        """Mean contrast of the circuit's neurons, zero elsewhere. Shape [emotion, layer, d_mlp]."""
        dense = torch.zeros(len(self.emotions), self.z_delta.shape[1], self.d_mlp)
        if len(self.neuron_index):
            e, layer, neuron = self.neuron_index.T
            dense[e, layer, neuron] = self.neuron_delta.float()
        return dense

    def steering(self, model: Model) -> dict[Site, Tensor]:
        """The circuit compiled to constant vectors: site -> [emotion, d_model], at strength 1."""
        return {site: value.cpu() for site, value in compile_units(model, self.z_delta, self.mlp_delta()).items()}

    def residual(self) -> dict[Site, Tensor]:
        """Residual steering with the same directions: site -> [emotion, d_model], at strength 1 (one rms per layer)."""
        return residual_vectors(self.vectors, self.rms, self.residual_layers)

    def learned_stream(self) -> dict[Site, Tensor]:
        """Learned residual steering: site -> [emotion, d_model], at strength 1.

        Raises:
            ArtifactError: if the circuit has none.
        """
        if self.learned_residual is None:
            raise lacking(Part.LEARNED_STREAM)
        return {Site(layer, RESID_POST): self.learned_residual[:, place] for place, layer in enumerate(self.residual_layers)}

    def added(self, part: Part, model: Model) -> dict[Site, Tensor]:
        """What a method adds that takes a part of the circuit as it is: site -> [emotion, d_model], at strength 1.

        Raises:
            ArtifactError: if the circuit lacks this part.
        """
        if part is Part.UNITS:
            return self.steering(model)
        return self.residual() if part is Part.STREAM else self.learned_stream()

    def has(self, part: Part) -> bool:
        """Whether the circuit has a part; only the learned residual vectors can be missing."""
        return part is not Part.LEARNED_STREAM or self.learned_residual is not None

    def require(self, part: Part) -> None:
        """Refuses what the circuit lacks, before anything is written with it.

        Raises:
            ArtifactError: with the command that makes a circuit that has it.
        """
        if not self.has(part):
            raise lacking(part)

    def with_strength(self, strength: Sequence[float], residual_strength: float | None = None) -> Circuit:
        """The same circuit with other default strengths."""
        kept = self.residual_strength if residual_strength is None else residual_strength
        return replace(self, strength=torch.tensor(list(strength), dtype=torch.float32), residual_strength=kept)

    def without_examples(self) -> Circuit:
        """The same circuit, which shows none before a prompt, with the strengths and the dial that it had before it had examples: with them
        less steering suffices. Where it never had a dial without them, the strengths are those that it was made with, and the dial is the
        one that it has, whose strengths are then a little weak."""
        if not self.examples:
            return self
        metrics = {name: value for name, value in self.metrics.items() if name != "alone"}
        alone, dial = self.metrics.get("alone"), self.metrics.get("calibration")
        strengths = alone["strength"] if alone else dial["before"] if dial else None
        found = replace(self, examples={}, metrics={**metrics, **({"calibration": alone["calibration"]} if alone else {})})
        return found.with_strength([strengths[emotion] for emotion in self.emotions]) if strengths else found

    def default_strength(self, emotion: str) -> float:
        """The strength of an emotion when none is asked for."""
        return round(self.strength[self.index(emotion)].item(), 6)

    def default_strength_of(self, part: Part, emotion: str) -> float:
        """The same for steering by any part of the circuit; residual steering has one strength for all emotions, learned or plain: what is
        learned is learned at strength 1."""
        if part is Part.UNITS:
            return self.default_strength(emotion)
        return self.residual_strength if part is Part.STREAM else LEARNED_STRENGTH

    @property
    def learned_gains(self) -> bool:
        """Whether its heads were weighted by learned gains, which were learned at strength 1."""
        return learned_of(self.metrics) is not None

    @property
    def learned_outputs(self) -> bool:
        """Whether what its heads put out was learned, rather than gains."""
        return learned_of(self.metrics) == "outputs"

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` has fitted the intensity dial."""
        return "calibration" in self.metrics

    def strength_at(self, emotion: str, intensity: float) -> float:
        """The strength that gives an intensity of 0 (unsteered) to 100 (as strong as the text bears), as calibrated; a negative one asks
        for less of the emotion, by a negative strength (`circuits.dial.LESS`).

        Raises:
            UsageError: for an unknown emotion or an intensity outside -100 to 100. ArtifactError: if the circuit is not calibrated, or no
                strength was found that the text bears.
        """
        emotion = self.emotions[self.index(emotion)]
        check_intensity(intensity, signed=True)
        if intensity < 0:
            alone = self.without_examples()  # nothing is shown to what is steered away
            return -alone.strength_at(emotion, -intensity * LESS)
        if not self.calibrated:
            raise ArtifactError("this circuit is not calibrated, so that intensity has no meaning yet; run `emosteer calibrate` first")
        curve = self.metrics["calibration"]["emotions"][emotion]
        if len(curve["strength"]) < 2:
            raise ArtifactError(f"the calibration found no strength for {emotion} that the text bears; use --strength")
        return round(strength_for(curve["strength"], curve["fitted"], intensity), 6)

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        names = ["heads", "z_delta", "neuron_index", "neuron_delta", "strength", "importance", "vectors", "rms"]
        names += ["learned_residual"] * (self.learned_residual is not None)
        fields = {
            "emotions": list(self.emotions),
            "residual_layers": list(self.residual_layers),
            "residual_strength": self.residual_strength,
            "d_mlp": self.d_mlp,
            "preset": self.preset,
            "instruction": self.instruction,
            "metrics": dict(self.metrics),
            **({"examples": as_fields(self.examples)} if self.examples else {}),
        }
        artifacts.save(path, KIND, fields, {name: getattr(self, name) for name in names}, self.provenance)

    @classmethod
    def load(cls, path: Path, model: Identified | None = None) -> Circuit:
        """Reads the artefact back.

        Args:
            model: refuse a circuit that was made for other weights.

        Raises:
            ArtifactError: if it is not a circuit, is damaged, or is another model's.
        """
        found = artifacts.load(path, KIND)
        if model is None:
            return cls.from_artifact(found)
        artifacts.require_model(found.provenance, model.sha256, model.name, path)
        sizes = schema.check(found)
        if isinstance(model, Model):
            check_sizes(sizes, {**vars(model.shape), "width": model.shape.n_heads * model.shape.d_head}, model.name, path)
        return cls._of(found)

    @classmethod
    def from_artifact(cls, found: artifacts.Artifact) -> Circuit:
        """Makes the value from a loaded artefact of kind "circuit".

        Raises:
            ArtifactError: if a part is missing, nonsense, or does not fit the others.
        """
        schema.check(found)
        return cls._of(found)

    @classmethod
    def _of(cls, found: artifacts.Artifact) -> Circuit:
        fields = found.fields
        tuples = {name: tuple(fields[name]) for name in ("emotions", "residual_layers")}
        examples = of_fields(fields.get("examples", {}))
        return cls(**{**fields, **tuples, **found.tensors, "provenance": found.provenance, "examples": examples})


def lacking(part: Part) -> ArtifactError:
    """The refusal of a circuit that lacks a part."""
    return ArtifactError(f"this circuit has no {part.value}; make one that has them with `emosteer circuit --learn-residual`")


def default_strengths(circuit: Circuit, methods: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Method -> emotion -> default strength; controls have those of what they control, methods that steer nothing are left out."""
    parts = {method: METHODS[source_of(method)].strength for method in methods}
    return {
        method: {emotion: round(circuit.default_strength_of(part, emotion), 6) for emotion in circuit.emotions}
        for method, part in parts.items()
        if part is not None
    }


def str_order(unit: Unit) -> tuple[int, int]:
    """Sort key: the order of the model."""
    return unit.layer, unit.index


def overlap(circuit: Circuit) -> dict[str, dict[str, float]]:
    """Jaccard overlap of the units of every pair of emotions: emotion -> emotion -> share."""
    sets = {emotion: {str(unit) for unit in circuit.units(emotion)} for emotion in circuit.emotions}
    return {a: {b: len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for b in sets} for a in sets}
