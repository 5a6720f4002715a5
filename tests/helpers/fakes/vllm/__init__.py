"""A stand-in for vLLM: the few names that `emosteer/vllm_worker.py` uses, computed greedily in numpy, one prompt after the other.

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file

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
    assert args.dtype == "float32"
    model = Llama(Path(args.model))

    def write(ids: list[int], params: SamplingParams) -> tuple[list[int], str]:
        reply: list[int] = []
        while len(reply) < params.max_tokens:
            scores = model.logits(ids + reply)
            for token in set(ids + reply):
                scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
            reply.append(int(scores.argmax()))
            if reply[-1] in params.stop_token_ids:
                return reply, "stop"
        return reply, "length"

    return write


class Llama:
    """A Llama with biases, read from a folder and computed in numpy, which starts in no time."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name: str, x: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def logits(self, ids: list[int]) -> Any:
        """Of the token that follows."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
            y = self.norm(f"{name}.post_attention_layernorm", x)
            gate, up = self.linear(f"{name}.mlp.gate_proj", y), self.linear(f"{name}.mlp.up_proj", y)
            x = x + self.linear(f"{name}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return self.linear("lm_head", self.norm("model.norm", x[-1]))

    def attention(self, name: str, x: Any) -> Any:
        size, width, heads = len(x), self.config["head_dim"], self.config["num_attention_heads"]
        angles = np.arange(size)[:, None] / self.config["rope_theta"] ** (np.arange(0, width, 2) / width)
        cos, sin = np.cos(angles), np.sin(angles)

        def split(part: str, turn: bool) -> Any:
            """[head, pos, width], turned by position; keys and values stand for as many queries as share them."""
            y = self.linear(f"{name}.{part}_proj", x).reshape(size, -1, width).swapaxes(0, 1)
            first, second = y[..., : width // 2], y[..., width // 2 :]
            y = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1) if turn else y
            return y.repeat(heads // len(y), 0)

        queries, keys, values = split("q", True), split("k", True), split("v", False)
        scores = queries @ keys.swapaxes(1, 2) / width**0.5 + np.triu(np.full((size, size), -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ values
        return self.linear(f"{name}.o_proj", mixed.swapaxes(0, 1).reshape(size, -1))
