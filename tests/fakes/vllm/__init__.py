"""A stand-in for vLLM: the few names that `emosteer/vllm_worker.py` uses, computed by plain transformers, one prompt after the other.

What it does is told by environment variables:
FAKE_VLLM_RECORD: file that gets a JSON line per engine: what it was asked.
FAKE_VLLM_MODE: "echo" (replies with the last tokens of the prompt and loads nothing), "broken" (fails while it loads), "stuck" (ends a
reply as vLLM does when it gives one up), or "killed:N" (dies of a signal after N replies and leaves a child behind). Else it writes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["EngineArgs", "LLMEngine", "SamplingParams"]
MODE, _, COUNT = os.environ.get("FAKE_VLLM_MODE", "").partition(":")


@dataclass
class EngineArgs:
    model: str
    dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 256
    disable_log_stats: bool = False
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    quantization: str | None = None


class LLMEngine:
    def __init__(self, args: EngineArgs) -> None:
        print("a line on stdout, as engines like to print them")
        if MODE == "broken":
            raise ValueError("no room for\nthe KV cache")
        self.args, self.left, self.steps = args, 0, 0
        self.requests: list[tuple[str, list[int], SamplingParams]] = []
        self.running: Iterator[Any] | None = None

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert params.output_kind is RequestOutputKind.FINAL_ONLY and not params.detokenize
        self.requests.append((request_id, prompt["prompt_token_ids"], params))
        self.left += 1

    def has_unfinished_requests(self) -> bool:
        if self.running is None:
            self._record()
            self.running = self._replies()
        return self.left > 0

    def step(self) -> list[Any]:
        """Every other step ends nothing, as most steps of a real engine."""
        self.steps += 1
        if self.steps % 2:
            return [SimpleNamespace(finished=False, request_id="0", outputs=[])]
        self.left -= 1
        return [next(self.running)]  # type: ignore[arg-type]

    def _record(self) -> None:
        if path := os.environ.get("FAKE_VLLM_RECORD"):
            asked = [{"ids": ids, **asdict(params), "output_kind": None} for _, ids, params in self.requests]
            with open(path, "a") as file:
                file.write(json.dumps({"engine": asdict(self.args), "requests": asked, "path": sys.path}) + "\n")

    def _replies(self) -> Iterator[Any]:
        write = _echo if MODE in ("echo", "stuck") else _writer(self.args)
        for number, (request_id, ids, params) in enumerate(reversed(self.requests)):  # engines end replies in whatever order
            if MODE == "killed" and number == int(COUNT):
                _die()
            reply, reason = write(ids, params)
            part = SimpleNamespace(token_ids=tuple(reply), finish_reason="abort" if MODE == "stuck" else reason)
            yield SimpleNamespace(finished=True, request_id=request_id, outputs=[part])


def _echo(ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
    return [*ids[-2:], params.stop_token_ids[0]], "stop"


def _die() -> None:
    if os.fork() == 0:  # a child that holds the pipe, as an engine's own processes may
        time.sleep(120)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def _writer(args: EngineArgs) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))

    @torch.no_grad()
    def write(ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
        row, punish = torch.tensor([ids]), RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        draw = torch.Generator().manual_seed(params.seed or 0)
        for _ in range(params.max_tokens):
            scores = punish(row, model(row).logits[:, -1].float())[0]
            if params.temperature:
                token = torch.multinomial((scores / params.temperature).softmax(-1), 1, generator=draw)
            else:
                token = scores.argmax(-1, keepdim=True)
            row = torch.cat([row, token[None]], 1)
            if token.item() in params.stop_token_ids:
                return row[0, len(ids) :].tolist(), "stop"
        return row[0, len(ids) :].tolist(), "length"

    return write
