"""`generate --engine vllm`: the same jobs and rows as the built-in engine, written by vLLM from exported checkpoints.

One checkpoint per emotion and strength, and one vLLM process after the other, so that each has the whole memory and none can take the
command down with it. A checkpoint's biases act at every position, the prompt's included; rows say so (`positions`: "all").
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emosteer.base.errors import ModelError, UsageError, first_line
from emosteer.base.files import sha256_text
from emosteer.base.seeds import seed_of
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import METHODS, VLLM
from emosteer.export.cached import cached_checkpoint
from emosteer.export.vectors import ExportRequest
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request, check_lengths
from emosteer.models import tokens
from emosteer.models.architecture import context_of
from emosteer.models.chat_templates import template_of
from emosteer.models.weights.resolve import Weights
from emosteer.serving.vllm_process import Task, find_python, run
from emosteer.writing.jobs import Job, Work, request_of

PRECISIONS = ("float32", "bfloat16", "float16")
#: Options of vLLM that emosteer sets itself, and those that say where and how fast it computes: resuming may change the latter.
OURS = ("model", "tokenizer", "dtype", "seed", "skip_tokenizer_init")
RESOURCES = (
    *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "gpu_memory_utilization", "max_model_len"),
    *("kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens", "enforce_eager", "cpu_offload_gb", "disable_log_stats"),
)


@dataclass(frozen=True, eq=False)
class Served:
    """A model that vLLM will load: what emosteer must know of it without its weights. dtype: of the computation; control_tokens: as of
    `Model`."""

    weights: Weights
    tokenizer: Any
    stop_ids: frozenset[int]
    context: int
    dtype: str
    control_tokens: bool = False

    @classmethod
    def of(cls, found: Weights, dtype: str = "auto", control_tokens: bool = False) -> Served:
        """Reads tokenizer and configuration.

        Args:
            dtype: "auto" is bfloat16, on whatever device.

        Raises:
            UsageError: for an unknown dtype. ModelError: if they cannot be read.
        """
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        if dtype not in ("auto", *PRECISIONS):
            raise UsageError(f"unknown dtype '{dtype}'; expected auto, {', '.join(PRECISIONS)}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(found.path, local_files_only=True)
            config = AutoConfig.from_pretrained(found.path, local_files_only=True)
            settings = GenerationConfig.from_model_config(config)
            with contextlib.suppress(OSError):  # a folder need not have them
                settings = GenerationConfig.from_pretrained(found.path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot read tokenizer and configuration of {found.name} in {found.path}: {first_line(error)}") from error
        stops = tokens.stop_ids(tokenizer, settings.eos_token_id)
        kind = "bfloat16" if dtype == "auto" else dtype
        return cls(found, tokenizer, stops, context_of(config), kind, control_tokens)

    @property
    def name(self) -> str:
        """Of the model."""
        return self.weights.name

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return self.weights.sha256

    @property
    def template_sha256(self) -> str:
        """Hash of the chat template's text, as `Model` has it."""
        return sha256_text(template_of(self.tokenizer))

    @property
    def reference(self) -> str:
        """What the user called it."""
        return self.weights.reference

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, the same as the built-in engine's."""
        return tokens.prompt_ids(self.tokenizer, messages, control=self.control_tokens)


def check_method(method: str) -> None:
    """Refuses what is no checkpoint.

    Raises:
        UsageError: for residual steering, and whatever else has no exported form.
    """
    if method not in VLLM:
        raise UsageError(
            f"--method {method} cannot be written into a checkpoint, which is what vLLM loads; expected {', '.join(VLLM)} "
            "with --engine vllm, or leave --engine away"
        )


@dataclass(frozen=True, eq=False)
class VllmWriter:
    """A served model, a circuit and a decoding, ready to write jobs of one method; an `Author` as `writing.Writer` is.

    found: circuit and its file, None where nothing is steered; batch_size: replies written at once, None leaves it to vLLM;
    options: of vLLM's `EngineArgs`.
    """

    served: Served
    found: tuple[Circuit, Path] | None
    decoding: Decoding
    instruction: str
    method: str
    batch_size: int | None = None
    elicitation: str = "tone"
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = ""

    def __post_init__(self) -> None:
        check_method(self.method)
        if taken := sorted(set(OURS) & set(self.options)):
            raise UsageError(f"--engine-option {taken[0]} is set by emosteer; use its own option (--model, --dtype, --seed)")

    @property
    def circuit(self) -> Circuit | None:
        """What steers, if anything does."""
        return self.found[0] if self.found and METHODS[self.method].steers else None

    @property
    def marks(self) -> Mapping[str, Any]:
        """What tells its rows from the built-in engine's."""
        return {"engine": "vllm", **({"positions": "all"} if self.circuit is not None else {})}

    def run_key(self, circuit_sha256: str = "") -> str:
        """A short hash of everything that shapes a reply beside the job itself."""
        parts = [
            "vllm",
            self.served.sha256,
            self.served.template_sha256,
            self.served.dtype,
            circuit_sha256,
            self.decoding.shaping,
            self.instruction,
            self.method,
            self.elicitation,
            {name: value for name, value in self.options.items() if name not in RESOURCES},
            *(["control tokens"] if self.served.control_tokens else []),
        ]
        return sha256_text(json.dumps(parts, sort_keys=True))[:12]

    def stream(self, job: Job) -> Iterator[str]:
        """The text of one job's reply, in one piece. Errors as for `write`."""
        yield from (reply.text for _, reply in self.write([job]))

    def work(self, jobs: Sequence[Job]) -> Work:
        """All jobs at once: vLLM makes its own batches, and each reply is there when it ends."""

        def write(batch: list[int]) -> Iterator[list[tuple[int, Reply]]]:
            return ([found] for found in self._written([jobs[i] for i in batch]))

        return Work([list(range(len(jobs)))], write)

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Writes all jobs, one checkpoint after the other; yields each reply as it ends.

        Raises:
            DataError: if a prompt does not fit the model's context. EmosteerError: if vLLM is not there or fails.
        """
        return ((jobs[place], reply) for place, reply in self._written(jobs))

    def _written(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Reply]]:
        python = self.python or find_python()
        requests = [request_of(self.served, job, self.instruction, self.elicitation) for job in jobs]
        check_lengths(requests, self.decoding, self.served.context, self.served.name)
        groups: dict[tuple[str, float] | None, list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault((job.emotion, job.strength) if self._steered(job) and job.strength else None, []).append(index)
        longest = max((len(request.ids) for request in requests), default=0) + self.decoding.max_new_tokens
        for kind, members in groups.items():
            folder, what = (self.served.weights.path, "no steering") if kind is None else (self.checkpoint(*kind), kind[0])
            for place, reply in run(python, self.task(folder, [requests[i] for i in members], longest), what):
                yield members[place], self._reply(requests[members[place]], reply)

    def _steered(self, job: Job) -> bool:
        return self.circuit is not None and METHODS[job.method].steers

    def checkpoint(self, emotion: str, strength: float) -> Path:
        """The exported folder of an emotion."""
        if self.found is None:
            raise ValueError("nothing to export: there is no circuit")
        circuit, path = self.found
        return cached_checkpoint(ExportRequest(self.served.weights, circuit, path, emotion, strength), self.served.dtype)

    def task(self, folder: Path, requests: Sequence[Request], longest: int) -> Task:
        """What vLLM is asked. longest: positions that the longest reply and its prompt take, of all groups (so that they compile alike)."""
        how = self.decoding
        engine: dict[str, Any] = {
            "max_model_len": min(self.served.context, -(-longest // 512) * 512),
            **({} if self.batch_size is None else {"max_num_seqs": self.batch_size}),
            "disable_log_stats": True,
            **self.options,
            "model": str(folder),
            "dtype": self.served.dtype,
            "seed": 0,
        }
        sampling = {
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "repetition_penalty": how.repetition_penalty,
            "stop_token_ids": sorted(self.served.stop_ids),
            "detokenize": False,
        }
        return Task(engine, sampling, [{"ids": list(r.ids), "seed": seed_of(how.seed, r.key)} for r in requests])

    def _reply(self, request: Request, said: Mapping[str, Any]) -> Reply:
        ids = list(said["ids"])
        if ids and ids[-1] in self.served.stop_ids:  # vLLM counts it among the reply's tokens
            ids.pop()
        reason = "stop" if said["finish_reason"] == "stop" else "length"
        return Reply(request.key, tokens.reply_text(self.served.tokenizer, ids), tuple(ids), reason)
