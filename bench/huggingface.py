"""Generation against Hugging Face `generate`: same model, prompts, precision and decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.results import Bar, Row
from bench.timing import interleaved, median, ratio
from bench.workload import Workbench, decoding, endless
from emosteer.generation.generate import Request, generate
from emosteer.models.model import Model

FAMILY = "huggingface"
BATCH, NEW_TOKENS = 32, 48


def left_padded(requests: Sequence[Request], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask [row, pos], padded on the left as `generate` wants it."""
    width = max(len(request.ids) for request in requests)
    ids = torch.tensor([[pad] * (width - len(request.ids)) + list(request.ids) for request in requests])
    mask = torch.tensor([[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in requests])
    return {"input_ids": ids, "attention_mask": mask}


def hugging_face(bench: Workbench, dtype: str) -> Any:
    """The model as Hugging Face loads it, apart from ours: sdpa attention, no hooks, no wrapper."""
    from transformers import AutoModelForCausalLM

    from emosteer.models.weights import resolve as weights

    path = weights.resolve(bench.reference).path
    hf: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True, attn_implementation="sdpa")
    hf.eval().requires_grad_(False)
    hf.generation_config.eos_token_id = None  # replies of full length, like ours
    return hf


def generate_theirs(hf: Any, batch: dict[str, Tensor], tokens: int, pad: int) -> Tensor:
    """Their greedy replies with the same repetition penalty. Shape [row, pos]."""
    with torch.no_grad():
        out: Tensor = hf.generate(**batch, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.1, pad_token_id=pad)
    return out[:, batch["input_ids"].shape[1] :]


def run(bench: Workbench) -> Iterator[Row]:
    """One row per precision."""
    for dtype in ("float32", "bfloat16"):
        if bench.wants(f"{FAMILY}.{dtype}"):
            yield _row(bench, dtype)


def _row(bench: Workbench, dtype: str) -> Row:
    model: Model = bench.model(dtype)
    size, tokens = bench.pick(BATCH, 4), bench.pick(NEW_TOKENS, 6)
    requests = bench.requests(size)
    hf, batch = hugging_face(bench, dtype), left_padded(requests, model.pad_id)
    with endless(model):
        work = {
            "theirs": lambda: generate_theirs(hf, batch, tokens, model.pad_id),
            "ours": lambda: generate(model, requests, None, decoding(tokens)),
        }
        seconds = interleaved(work, bench.pick(3, 1), warmup=1)
        same = sum(
            list(reply.ids) == row.tolist()
            for reply, row in zip(
                generate(model, requests, None, decoding(tokens)), generate_theirs(hf, batch, tokens, model.pad_id), strict=True
            )
        )
    found = ratio(seconds["theirs"], seconds["ours"])
    rate = {name: size * tokens / median(times) for name, times in seconds.items()}
    length = sum(len(request.ids) for request in requests) / size
    return Row.of(
        f"{FAMILY}.{dtype}",
        f"generation, batch {size}, {tokens} new tokens, {dtype}: tokens/s of Hugging Face `generate`",
        found.value,
        Bar(1.5),
        spread=found,
        note=f"ours {rate['ours']:.0f} tokens/s, theirs {rate['theirs']:.0f}; prompts of {length:.0f}; {same} of {size} replies identical",
    )
