"""Peak memory of exporting a checkpoint, against its largest shard and a fixed overhead.

    python bench/export_memory.py                    # a random Llama of about 3 GB in bfloat16, made in a temporary folder
    python bench/export_memory.py --model FOLDER     # a model of your own

The fixed overhead is the peak of exporting a tiny model with the same command: Python, torch and transformers. The bar is 1.5 times
the largest shard on top of it. Needs twice the model's size on disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emosteer.base.artifacts import Provenance
from emosteer.circuits.circuit import Circuit
from emosteer.export.checkpoint import _NORMS, _PROJECTIONS
from emosteer.export.forms import read_config
from emosteer.export.tensors import Planned, shards, write_shard
from emosteer.models.weights import resolve as weights

#: Runs a command and prints what it used at most, in KB, after its own output.
MEASURED = "import resource, subprocess, sys; rc = subprocess.run(sys.argv[1:]).returncode; "
MEASURED += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(rc)"


def random_pieces(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Random rows, a few at a time."""
    width = shape[1] if len(shape) > 1 else 1
    for start in range(0, shape[0], 4096):
        yield 0.02 * torch.randn(min(4096, shape[0] - start), width, dtype=torch.float32).bfloat16()


def make_model(folder: Path, layers: int, d_model: int, d_mlp: int, vocab: int) -> None:
    """A random Llama in bfloat16, written without ever holding it."""
    folder.mkdir()
    sizes = {"self_attn.k_proj": (d_model // 4, d_model), "self_attn.v_proj": (d_model // 4, d_model), "mlp.down_proj": (d_model, d_mlp)}
    sizes |= {"mlp.gate_proj": (d_mlp, d_model), "mlp.up_proj": (d_mlp, d_model)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d_model), "lm_head.weight": (vocab, d_model)}
    shapes["model.norm.weight"] = (d_model,)
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": sizes.get(part, (d_model, d_model)) for part in _PROJECTIONS}
        shapes |= {f"model.layers.{layer}.{part}.weight": (d_model,) for part in _NORMS}
    plan = [Planned(name, "BF16", shape, functools.partial(random_pieces, shape)) for name, shape in shapes.items()]
    files = shards(plan, 10**9)
    where = {}
    for number, tensors in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        write_shard(folder / name, tensors, lambda done: None)
        where |= {tensor.name: name for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    heads = d_model // 64
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": d_model}
    config |= {"intermediate_size": d_mlp, "vocab_size": vocab, "num_attention_heads": heads, "num_key_value_heads": heads // 4}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (folder / "tokenizer_config.json").write_text("{}")


def random_circuit(folder: Path, path: Path) -> None:
    """A circuit in every layer: a quarter of the heads and some neurons."""
    found, config = weights.resolve(str(folder)), read_config(folder)
    layers, heads, d_mlp = config.num_hidden_layers, config.num_attention_heads, config.intermediate_size
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    chosen = torch.rand(1, layers, heads) < 0.25
    neurons = (torch.rand(1, layers, d_mlp) < 0.002).nonzero()
    made: dict[str, Any] = dict(emotions=("random",), heads=chosen, residual_layers=(), residual_strength=1.0, d_mlp=d_mlp)
    made |= dict(z_delta=(torch.randn(1, layers, heads, d_head) * chosen[..., None]).flatten(2), neuron_index=neurons)
    made |= dict(neuron_delta=torch.randn(len(neurons)), strength=torch.ones(1), importance=torch.ones(1, layers, 2))
    made |= dict(vectors=torch.zeros(1, layers, config.hidden_size), rms=torch.ones(layers), preset="random", instruction="", metrics={})
    Circuit(**made, provenance=Provenance(found.name, found.sha256, "", "random")).save(path)


def export(folder: Path, room: Path, shard_size: str) -> dict[str, Any]:
    """Exports in a process of its own; its facts, peak in bytes and seconds."""
    random_circuit(folder, room / "circuit.safetensors")
    command = [sys.executable, "-m", "emosteer", "export", "--model", str(folder), "--circuit", str(room / "circuit.safetensors")]
    command += ["--emotion", "random", "--out", str(room / "out"), "--shard-size", shard_size, "--force", "--json"]
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    text, peak = done.stdout.rstrip().rsplit("\n", 1)
    return {**json.loads(text), "peak": int(peak) * 1024, "seconds": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="A folder of safetensors; a random Llama if not given.")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--shard-size", default="1GB")
    parser.add_argument("--room", type=Path, help="Where to put temporary files.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.room) as name:
        room = Path(name)
        os.environ["EMOSTEER_CACHE"] = str(room / "cache")
        make_model(room / "tiny", 2, 128, 256, 100)
        overhead = export(room / "tiny", room, options.shard_size)["peak"]
        if options.model is None:
            make_model(room / "big", options.layers, 2048, 5632, 32_000)
        facts = export(options.model or room / "big", room, options.shard_size)
    bar = 1.5 * facts["largest_shard"] + overhead
    print(f"model        {facts['bytes'] / 1e6:8,.0f} MB in {facts['shards']} shards, exported in {facts['seconds']:.0f} s")
    print(f"largest      {facts['largest_shard'] / 1e6:8,.0f} MB")
    print(f"overhead     {overhead / 1e6:8,.0f} MB (the same command on a tiny model)")
    print(f"peak         {facts['peak'] / 1e6:8,.0f} MB: overhead + {(facts['peak'] - overhead) / 1e6:,.0f} MB")
    print(f"bar          {bar / 1e6:8,.0f} MB (1.5 x largest shard + overhead): {'met' if facts['peak'] <= bar else 'MISSED'}")


if __name__ == "__main__":
    main()
