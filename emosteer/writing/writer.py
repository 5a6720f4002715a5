"""Jobs -> replies on disk: what `generate` does once model and circuit are there. Resumable; each reply is kept as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emosteer.base.files import sha256_text
from emosteer.base.progress import note
from emosteer.circuits.circuit import Circuit
from emosteer.generation.generate import Decoding, Reply, Request, batches, generate
from emosteer.generation.steering import SteeringPlan
from emosteer.generation.streaming import stream
from emosteer.models.memory import halve_on_oom, is_out_of_memory, single_item_too_large
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.writing.jobs import Job, plan_of, request_of


@dataclass(frozen=True)
class Writer:
    """The built-in engine: a model, a circuit and a decoding, ready to write jobs of one method. positions: where steering acts
    (`SteeringPlan`)."""

    model: Model
    circuit: Circuit | None
    decoding: Decoding
    instruction: str
    method: str
    batch_size: int = 32
    elicitation: str = "tone"
    positions: str = "reply"

    @property
    def marks(self) -> Mapping[str, Any]:
        """Nothing beside what `row_of` writes."""
        return {}

    def run_key(self, circuit_sha256: str = "") -> str:
        """A short hash of everything that shapes a reply beside the job itself."""
        parts = [
            self.model.sha256,
            str(self.model.dtype),
            circuit_sha256,
            vars(self.decoding),
            self.instruction,
            self.method,
            self.elicitation,
            *([self.positions] if self.positions != "reply" else []),
        ]
        return sha256_text(json.dumps(parts, sort_keys=True))[:12]

    def stream(self, job: Job) -> Iterator[str]:
        """The text of one job's reply, in pieces as it is written.

        Raises:
            OutOfMemory: if it does not fit in memory.
        """
        try:
            yield from (piece.text for piece in stream(self.model, self.requests([job]), self.plan([job]), self.decoding))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise single_item_too_large() from error
            raise

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Writes all jobs, in batches of similar length; yields each as its batch ends."""
        requests = self.requests(jobs)
        for done in self.write_batches(jobs, requests, batches(requests, self.batch_size)):
            yield from ((jobs[i], reply) for i, reply in done)

    def requests(self, jobs: Sequence[Job]) -> list[Request]:
        """The jobs' prompts."""
        return [request_of(self.model, job, self.instruction, self.elicitation) for job in jobs]

    def plan(self, jobs: Sequence[Job]) -> SteeringPlan:
        """The steering of some jobs, written as one batch."""
        return plan_of(jobs, self.circuit, self._vectors(), self.positions)

    def _vectors(self) -> dict[Site, Tensor]:
        """What the method adds at strength 1: site -> [emotion, d_model]; nothing where it does not steer."""
        if self.circuit is None or self.method not in ("circuit", "residual"):
            return {}
        return self.circuit.steering(self.model) if self.method == "circuit" else self.circuit.residual()

    def write_batches(
        self, jobs: Sequence[Job], requests: Sequence[Request], wanted: Iterable[list[int]]
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Writes some batches (indices of jobs); yields each with its replies (its halves, where it does not fit in memory)."""
        vectors = self._vectors()

        def compute(index: list[int]) -> list[tuple[int, Reply]]:
            plan = plan_of([jobs[i] for i in index], self.circuit, vectors, self.positions)
            return list(zip(index, generate(self.model, [requests[i] for i in index], plan, self.decoding), strict=True))

        for index in wanted:
            yield from halve_on_oom(index, compute, note, "replies")
