"""What each method of the contest adds, the random controls included: vectors per site and emotion, at strength 1.

- random-heads: as many heads (and neurons) per emotion, drawn from the whole model, each with its own true contrast. Controls the
  selection: would any heads do?
- random-circuit: as many heads and neurons in each layer as the circuit has there, and in each a random vector; together they write as
  much into the residual stream of each layer as the circuit does. Controls the size: would any push do?
- random-direction: residual steering along random unit vectors, the true ones turned by one random rotation, so that lengths and the
  angles between layers and between emotions stay. Controls the direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from emosteer.attribution.unit_scores import unit_mask
from emosteer.base.errors import ArtifactError
from emosteer.base.files import sha256_text
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.faithfulness import Mask, contrasts_of, random_units
from emosteer.circuits.methods import METHODS, Part
from emosteer.circuits.name_sparing import spare_names, without_names
from emosteer.directions.directions import Directions
from emosteer.generation.steering import compile_units, residual_vectors
from emosteer.models.model import Model
from emosteer.models.sites import Head, Site

Vectors = Mapping[Site, Tensor]


def vectors_of(model: Model, circuit: Circuit, directions: Directions | None, method: str, seed: int) -> Vectors:
    """What a method adds at strength 1: site -> [emotion, d_model]; nothing for prompts and `none`.

    Raises:
        ArtifactError: if random-heads lacks the directions, or they are another model's or lack an emotion; if the circuit lacks what the
            method adds.
    """
    row = METHODS[method]
    if row.built:
        return BUILDERS[method](model, circuit, directions, seed)
    return circuit.added(row.vectors, model) if row.vectors is not None else {}


def random_heads(model: Model, circuit: Circuit, directions: Directions | None, seed: int) -> Vectors:
    """As many units per emotion as the circuit has, drawn at random, with their true contrast; names spared as in the circuit."""
    if directions is None:
        raise ArtifactError(
            "random-heads needs the directions that the circuit was made from; run `emosteer extract`, or name --directions"
        )
    added = []
    for emotion in circuit.emotions:
        units = circuit.units(emotion)
        n_heads = sum(isinstance(unit, Head) for unit in units)
        drawn = random_units(model, n_heads, len(units) - n_heads, f"random-heads/{seed}/{emotion}")
        added.append(_contrasts(model, circuit, directions, emotion, unit_mask(model, drawn)))
    return _on_cpu(compile_units(model, torch.stack([z for z, _ in added]), torch.stack([mlp for _, mlp in added])))


def _contrasts(model: Model, circuit: Circuit, directions: Directions, emotion: str, mask: Mask) -> Mask:
    """What units add with their true contrast, kept from the name in the way of the circuit: learned heads one by one."""
    spare, place = spares_names(circuit), directions.index(emotion)
    if not (spare and circuit.learned_gains):
        return contrasts_of(model, directions, place, mask, spare)
    z = without_names(model, [emotion], directions.z.mean[place][None]) * mask[0]
    return z[0], spare_names(model, [emotion], z, (directions.mlp.mean[place] * mask[1])[None])[1][0]


def spares_names(circuit: Circuit) -> bool:
    """Whether the circuit was kept from writing its emotions' names. Files of learned heads that do not tell their precision say False of
    it, whatever was done: nothing had to be taken out afterwards."""
    told = circuit.provenance.params
    return bool(told.get("spare_names", True)) or (circuit.learned_gains and "dtype" not in told)


def random_circuit(model: Model, circuit: Circuit, seed: int) -> Vectors:
    """Random units, as many in each layer as the circuit has there, that write random vectors of the circuit's size."""
    shape, heads = model.shape, circuit.heads
    lengths = circuit.z_delta.unflatten(-1, (shape.n_heads, shape.d_head)).norm(dim=-1)  # [emotion, layer, head]
    z, mlp, sizes = torch.zeros_like(circuit.z_delta), torch.zeros_like(circuit.mlp_delta()), circuit.mlp_delta()
    for e, emotion in enumerate(circuit.emotions):
        noise = torch.Generator().manual_seed(int(sha256_text(f"random-circuit/{seed}/{emotion}")[:15], 16))
        for layer in range(shape.n_layers):
            own = lengths[e, layer][heads[e, layer]]
            places = torch.randperm(shape.n_heads, generator=noise)[: len(own)]
            drawn = torch.randn(len(own), shape.d_head, generator=noise)
            blocks = z[e, layer].view(shape.n_heads, shape.d_head)  # a view: writing to it writes to z
            blocks[places] = drawn / drawn.norm(dim=-1, keepdim=True) * own[:, None]
            neurons = sizes[e, layer][sizes[e, layer] != 0]
            signs = 1.0 - 2 * torch.randint(2, (len(neurons),), generator=noise)
            mlp[e, layer, torch.randperm(shape.d_mlp, generator=noise)[: len(neurons)]] = neurons.abs() * signs
    # the circuit's heads agree with each other and random ones do not: what they write together is brought to the same length
    written = _on_cpu(compile_units(model, z, mlp))
    return {site: _as_long(written[site], true) for site, true in circuit.steering(model).items() if site in written}


def random_direction(circuit: Circuit, seed: int) -> Vectors:
    """Residual steering with all directions turned by one random rotation."""
    noise = torch.Generator().manual_seed(int(sha256_text(f"random-direction/{seed}")[:15], 16))
    q, r = torch.linalg.qr(torch.randn(*(circuit.vectors.shape[-1],) * 2, generator=noise, dtype=torch.float64))
    rotation = q * r.diagonal().sign()  # uniform over all rotations
    turned = (circuit.vectors.double() @ rotation).float()
    return residual_vectors(turned, circuit.rms, circuit.residual_layers)


#: What makes the vectors of a method, where they are not the circuit's own: (model, circuit, its directions, seed) -> vectors.
BUILDERS: Mapping[str, Callable[[Model, Circuit, Directions | None, int], Vectors]] = {
    "random-heads": random_heads,
    "random-circuit": lambda model, circuit, _, seed: random_circuit(model, circuit, seed),
    "random-direction": lambda _model, circuit, _directions, seed: random_direction(circuit, seed),
}


def added_key(circuit: Circuit, directions: Directions | None, method: str, seed: int) -> str:
    """A hash of everything that decides what a method adds; empty for prompts and `none`. Metrics and default strengths are left out."""
    row, parts = METHODS[method], list[object]()
    if row.vectors is Part.UNITS:
        parts += [_hash([circuit.z_delta, circuit.neuron_index, circuit.neuron_delta, circuit.heads])]
    if row.vectors is Part.STREAM:
        parts += [_hash([circuit.vectors, circuit.rms]), circuit.residual_layers]
    if row.vectors is Part.LEARNED_STREAM:
        parts += [_hash(list(circuit.learned_stream().values())), circuit.residual_layers]
    if row.needs_directions and directions is not None:
        parts += [_hash([directions.z.mean, directions.mlp.mean]), spares_names(circuit)]
    if row.built:
        parts += [method, seed]
    return sha256_text(json.dumps([parts, circuit.emotions])) if parts else ""


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _on_cpu(vectors: Vectors) -> Vectors:
    return {site: value.cpu() for site, value in vectors.items()}


def _as_long(value: Tensor, true: Tensor) -> Tensor:
    """Vectors [emotion, d_model] scaled to the lengths of others; a zero one stays zero."""
    lengths = value.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 0, value / lengths * true.norm(dim=-1, keepdim=True), 0.0)
