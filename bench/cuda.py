"""`make cuda`: what a CUDA machine writes and reads per second, beside what its memory allows. Needs no network.

    python -m bench.cuda                  the embedded model, and random ones of Llama-3.2-1B's and of 8B's shape (minutes on one large GPU)
    python -m bench.cuda --quick          tiny random models, a few tokens, on whatever device there is: does everything run?

Every new token reads all weights once, and the keys and values of its row: the bound is how often per second the memory can be read so.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.results import Results, Row, show
from bench.workload import MODEL, decoding, endless
from emosteer.base.errors import EmosteerError
from emosteer.base.progress import note
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.cuda_graphs import SWITCH
from emosteer.generation.generate import Request, generate
from emosteer.generation.kv_cache import position_bytes
from emosteer.generation.steering import SteeringPlan, plan_for
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from emosteer.scenarios.scenarios import EMOTIONS
from emosteer.scenarios.shipped import read_data

FAMILY = "cuda"
BATCHES = (1, 8, 32, 128, 256)
#: Tokens of a prompt and of its reply; scenario-events that are extracted from.
PROMPT, REPLY, GROUPS = 48, 64, 96
#: Sizes of published models; weights are random, since speed does not depend on them.
SHAPES = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64),
    "8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    ),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """How much is measured. shapes: random models by name."""

    shapes: dict[str, dict[str, int]]
    batches: tuple[int, ...]
    prompt: int
    reply: int
    groups: int


FULL = Scale(SHAPES, BATCHES, PROMPT, REPLY, GROUPS)
QUICK = Scale({"tiny": TINY}, (1, 8), 12, 4, 2)


def random_model(shape: dict[str, int], tokenizer: object, name: str, device: torch.device) -> Model:
    """A Llama of a shape with random bfloat16 weights, made on the device."""
    config = LlamaConfig(**shape, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=name != "8B")
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            hf = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(kept)
    return Model(hf, tokenizer, f"random {name}", "0" * 64)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads, by copying a large block within it (a copy reads and writes)."""
    size = 2**30 if device.type == "cuda" else 2**26
    block = torch.zeros(size, dtype=torch.uint8, device=device)
    into = torch.empty_like(block)
    best = min(_seconds(lambda: into.copy_(block), device) for _ in range(5))
    return 2 * size / best


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_step(model: Model, batch: int, context: float) -> float:
    """What one step must read: all weights that multiply, and every row's keys and values."""
    own = {id(weight): weight.nbytes for weight in model.hf.parameters()}
    embedding = 0 if model.embedding.weight is model.unembedding.weight else model.embedding.weight.nbytes
    return sum(own.values()) - embedding + batch * context * position_bytes(model.shape, model.dtype)


def steered(model: Model, batch: int) -> SteeringPlan:
    """A vector at the attention output of every layer, another one per row."""
    draw = torch.Generator().manual_seed(0)
    n = model.shape.d_model
    vectors = {Site(layer, ATTN_OUT): 0.01 * torch.randn(len(EMOTIONS), n, generator=draw) for layer in range(model.shape.n_layers)}
    return plan_for(vectors, [row % len(EMOTIONS) for row in range(batch)], [1.0] * batch)


def writing(model: Model, name: str, scale: Scale, speed: float) -> Iterator[Row]:
    """Tokens per second of steered greedy replies, with recorded steps and without, and their share of the bound."""
    device = model.device
    for batch in scale.batches:
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(100, min(40_000, model.shape.d_vocab), (batch, scale.prompt), generator=draw).tolist()
        requests, plan = [Request(str(i), tuple(row)) for i, row in enumerate(ids)], steered(model, batch)
        rates = {}
        for graphs in ("1", "0") if device.type == "cuda" else ("0",):
            os.environ[SWITCH] = graphs
            with endless(model):
                tokens = batch * scale.reply
                generate(model, requests, plan, decoding(scale.reply))  # what is set up once is not counted
                rates[graphs] = tokens / _seconds(lambda r=requests, p=plan: generate(model, r, p, decoding(scale.reply)), device)
        os.environ.pop(SWITCH, None)
        bound = batch * speed / bytes_per_step(model, batch, scale.prompt + scale.reply / 2)
        best = max(rates.values())
        said = f"{rates['1']:,.0f} recorded, {rates['0']:,.0f} not" if "1" in rates else "not recorded: no CUDA device"
        yield Row.of(
            f"{FAMILY}.{name}.batch{batch}",
            f"{name}, batch {batch}: steered tokens/s, prompts included",
            best,
            unit="",
            note=f"{best / bound:.0%} of the bound of {bound:,.0f}; {said}; {scale.prompt} + {scale.reply} tokens",
        )


def reading(model: Model, name: str, scale: Scale) -> Row:
    """Tokens per second of an extraction, sums included."""
    data = read_data(None, None, limit=scale.groups)
    settings = Settings(EMOTIONS, batch_tokens=16384 if model.device.type == "cuda" else Settings.batch_tokens)
    tokens = sum(len(model.prompt_ids([{"role": "user", "content": group.text}])) for group in data.groups)
    tokens += sum(len(model.text_ids(text)) for group in data.groups for text in (data.bank or {})[group.key].values())
    seconds = _seconds(lambda: extract(model, data.groups, settings, bank=data.bank), model.device)
    return Row.of(
        f"{FAMILY}.{name}.extract",
        f"{name}: extraction, tokens/s",
        tokens / seconds,
        unit="",
        note=f"{len(data.groups)} groups, sums on the device",
    )


def measured(scale: Scale, device: torch.device) -> Iterator[Row]:
    """All rows, one model after the other."""
    speed = bandwidth(device)
    yield Row.of(f"{FAMILY}.memory", "memory, GB/s (copied within the device)", speed / 1e9, unit="")
    kind = "bfloat16" if device.type == "cuda" else "float32"
    embedded = Model.load(MODEL, device=str(device), dtype=kind)
    tokenizer = embedded.tokenizer
    yield reading(embedded, "135M", scale)
    yield from writing(embedded, "135M", scale, speed)
    del embedded
    for name, shape in scale.shapes.items():
        gc.collect()
        note(f"making random weights of the {name} shape")
        model = random_model(shape, tokenizer, name, device)
        yield reading(model, name, scale)
        yield from writing(model, name, scale, speed)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Measures and writes the table, into bench/gpu/ or --out; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny models on any device; written to artifacts/bench/gpu unless --out is given"
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    chosen = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not chosen.quick:
        print("bench: no CUDA device here; --quick tries everything on the CPU", file=sys.stderr)
        return 1
    folder = chosen.out or (Path("artifacts/bench/gpu") if chosen.quick else HERE / "gpu")
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "torch": torch.__version__}
    command = "python -m bench.cuda --quick" if chosen.quick else "make cuda"
    try:
        results = Results(folder, [FAMILY])
        for row in measured(QUICK if chosen.quick else FULL, device):
            signed = replace(row, command=command, machine=machine["device"], date=date.today().isoformat(), quick=chosen.quick)
            results.put(signed, machine)
            note(f"bench: {row.id} {row.figure}; {row.note}")
    except EmosteerError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    show(results.ordered())
    return 0


if __name__ == "__main__":
    sys.exit(main())
