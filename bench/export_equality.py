"""Is an exported checkpoint the steered model? Its logits in plain transformers against the built-in engine, float32, all positions.

    python bench/export_equality.py --model smollm2-135m
    python bench/export_equality.py --model MODEL.gguf --random      # without a circuit: random contrasts, for the arithmetic alone

Prints one JSON object: the largest difference of any logit, how much steering changes them, the same for strength 0 (which must be
no difference at all), and how far a llama.cpp control vector is from the circuit (KL divergence of next tokens, nats).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.places import require_circuit
from emosteer.export.checkpoint import export_checkpoint
from emosteer.export.llamacpp import residual_form
from emosteer.export.vectors import ExportRequest
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.models.weights import resolve as weights

TEXTS = (
    "My landlord came by this morning about the lease. Keep the reply to at most two sentences.",
    "I handed in the report I had been working on for three weeks. My manager read it in front of the whole team.",
)
REPLY = "That sounds like a lot to take in at once. Tell me what happened next, and how you"


def random_circuit(model: Model, share: float = 0.25) -> Circuit:
    """Contrasts at random: a quarter of the heads, each writing about a tenth of the length of its usual output, and some neurons."""
    shape, draw = model.shape, torch.Generator().manual_seed(0)
    heads = torch.rand(1, shape.n_layers, shape.n_heads, generator=draw) < share
    z = 0.1 * torch.randn(1, shape.n_layers, shape.n_heads, shape.d_head, generator=draw) * heads[..., None]
    neurons = (torch.rand(1, shape.n_layers, shape.d_mlp, generator=draw) < 0.002).nonzero()
    return Circuit(
        emotions=("random",),
        heads=heads,
        z_delta=z.flatten(2),
        neuron_index=neurons,
        neuron_delta=0.1 * torch.randn(len(neurons), generator=draw),
        strength=torch.ones(1),
        importance=torch.ones(1, shape.n_layers, 2),
        vectors=torch.zeros(1, shape.n_layers, shape.d_model),
        rms=torch.ones(shape.n_layers),
        residual_layers=(),
        residual_strength=1.0,
        d_mlp=shape.d_mlp,
        preset="random",
        instruction="",
        metrics={},
        provenance=Provenance(model.name, model.sha256, "", "random"),
    )


@torch.no_grad()
def engine_logits(model: Model, ids: list[list[int]], vectors: dict[Site, Tensor]) -> list[Tensor]:
    """Logits [pos, vocab] of each text under the vectors, added at every position."""
    edits = {site: (lambda x, v=value: x + v) for site, value in vectors.items()}
    return [model.logits(model.run(torch.tensor([row]), edits, bridge=False))[0] for row in ids]


@torch.no_grad()
def folder_logits(folder: Path, ids: list[list[int]]) -> list[Tensor]:
    """The same of a folder in plain transformers."""
    from transformers import AutoModelForCausalLM

    hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [hf(torch.tensor([row])).logits[0] for row in ids]


def largest(first: list[Tensor], second: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def divergence(first: list[Tensor], second: list[Tensor]) -> float:
    p, q = torch.cat(first).log_softmax(-1), torch.cat(second).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--emotion", default="sadness")
    parser.add_argument("--strength", type=float)
    parser.add_argument("--circuit", type=Path)
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    model = Model.load(options.model, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "random.safetensors"
        if options.random:
            random_circuit(model).save(path)
        circuit, path = (Circuit.load(path, model), path) if options.random else require_circuit(model, options.circuit)
        emotion = "random" if options.random else options.emotion
        strength = circuit.default_strength(emotion) if options.strength is None else options.strength
        e = circuit.index(emotion)
        vectors = {site: strength * value[e] for site, value in circuit.steering(model).items()}
        ids = []
        for text in TEXTS:
            chat = [{"role": "user", "content": text}]
            prompt = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids.append(model.text_ids(prompt) + model.text_ids(REPLY))
        plain, steered = engine_logits(model, ids, {}), engine_logits(model, ids, vectors)
        after = residual_form(vectors, model.shape.n_layers, model.shape.d_model)
        vector = engine_logits(model, ids, {Site(n, "resid_post"): value for n, value in enumerate(after, 1)})
        del model
        gc.collect()
        found, done = weights.resolve(options.model), {}
        for how in (strength, 0.0):
            export_checkpoint(ExportRequest(found, circuit, path, emotion, how), Path(room) / "out", precision="float32", force=True)
            done[how] = folder_logits(Path(room) / "out", ids)
        same_tokens = _tokens(found.path) == _tokens(Path(room) / "out")
    result = {
        "model": found.name,
        "emotion": emotion,
        "strength": strength,
        "positions": sum(map(len, ids)),
        "largest_logit": max(value.abs().max().item() for value in steered),
        "largest_difference": largest(done[strength], steered),
        "largest_change_by_steering": largest(steered, plain),
        "strength_0_bit_for_bit": all(torch.equal(a, b) for a, b in zip(done[0.0], plain, strict=True)),
        "same_tokens": same_tokens,
        "kl_of_steering": divergence(steered, plain),
        "kl_left_by_control_vector": divergence(steered, vector),
    }
    print(json.dumps(result, indent=2))


def _tokens(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer(text + " Ünïcödé 12345\n\n<|im_end|>")["input_ids"] for text in TEXTS]


if __name__ == "__main__":
    main()
