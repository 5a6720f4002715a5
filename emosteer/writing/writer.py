"""Jobs -> replies on disk: what `generate` does once model and circuit are there. Resumable; each reply is kept as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emosteer.base.files import sha256_text
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import METHODS
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request, batches
from emosteer.generation.steering import SteeringPlan
from emosteer.generation.streaming import stream
from emosteer.judges.choosing.chooser import Chooser
from emosteer.models.memory import is_out_of_memory, single_item_too_large
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.writing.best_of import Asked, rows_of, write_batch
from emosteer.writing.jobs import Job, Work, examples_mark, felt_in, plan_of, request_of, said_in
from emosteer.writing.resumable import halving
from emosteer.writing.settings import BATCH_SIZE


@dataclass(frozen=True)
class Writer:
    """The built-in engine: a model, a circuit and a decoding, ready to write jobs of one method. positions: where steering acts
    (`SteeringPlan`); chooser: who chooses where the decoding writes several candidates."""

    model: Model
    circuit: Circuit | None
    decoding: Decoding
    instruction: str
    method: str
    batch_size: int = BATCH_SIZE
    elicitation: str = "tone"
    positions: str = "reply"
    chooser: Chooser | None = None

    @property
    def marks(self) -> Mapping[str, Any]:
        """Nothing beside what `row_of` writes."""
        return {}

    def run_key(self, circuit_sha256: str = "") -> str:
        """A short hash of everything that shapes a reply beside the job itself."""
        parts = [
            self.model.sha256,
            self.model.template_sha256,
            self.model.precision,
            circuit_sha256,
            self.decoding.shaping,
            self.instruction,
            self.method,
            self.elicitation,
            *([self.positions] if self.positions != "reply" else []),
            *examples_mark(self.circuit),
            *(["control tokens"] if self.model.control_tokens else []),
            *([self.chooser.key] if self.chooser is not None else []),
        ]
        return sha256_text(json.dumps(parts, sort_keys=True))[:12]

    def stream(self, job: Job) -> Iterator[str]:
        """The text of one job's reply, in pieces as it is written; in one piece where it is chosen among several.

        Raises:
            OutOfMemory: if it does not fit in memory.
        """
        if self.decoding.chooses:
            yield from (reply.text for _, reply in self.write([job]))
            return
        try:
            yield from (piece.text for piece in stream(self.model, self.requests([job]), self.plan([job]), self.decoding))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise single_item_too_large() from error
            raise

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]:
        """Writes all jobs, in batches of similar length; yields each as its batch ends."""
        work = self.work(jobs)
        for batch in work.order:
            for done in work.write(batch):
                yield from ((jobs[i], reply) for i, reply in done)

    def requests(self, jobs: Sequence[Job]) -> list[Request]:
        """The jobs' prompts."""
        return [request_of(self.model, job, self.instruction, self.elicitation, self.decoding.guides, self.circuit) for job in jobs]

    def plan(self, jobs: Sequence[Job]) -> SteeringPlan:
        """The steering of some jobs, written as one batch."""
        return plan_of(jobs, self.circuit, self._vectors(), self.positions)

    def _vectors(self) -> dict[Site, Tensor]:
        """What the method adds at strength 1: site -> [emotion, d_model]; nothing where it does not steer."""
        part = METHODS[self.method].vectors
        if self.circuit is None or part is None:
            return {}
        return self.circuit.added(part, self.model)

    def work(self, jobs: Sequence[Job]) -> Work:
        """The jobs in batches of similar length."""
        requests, vectors = self.requests(jobs), self._vectors()

        def compute(batch: list[int]) -> list[tuple[int, Reply]]:
            members = [jobs[i] for i in batch]
            plan = plan_of(members, self.circuit, vectors, self.positions)
            asked = [Asked(said_in(job.messages), felt_in(job, self.circuit)) for job in members]
            written = write_batch(self.model, [requests[i] for i in batch], plan, self.decoding, asked, self.chooser)
            return list(zip(batch, written, strict=True))

        return Work(list(batches(requests, rows_of(self.batch_size, self.decoding))), halving(compute))
