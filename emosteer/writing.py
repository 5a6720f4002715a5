"""Jobs -> replies on disk: what `generate` does once model and circuit are there. Resumable; each reply is kept as it is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from emosteer.activations import halve_on_oom
from emosteer.circuit import Circuit
from emosteer.errors import EmosteerError, UsageError
from emosteer.files import sha256_text, write_jsonl
from emosteer.generation import Decoding, Reply, Request, batches, generate
from emosteer.jsonl import JsonlLog, whole_rows
from emosteer.model import Model
from emosteer.progress import bar, note
from emosteer.prompts import elicit, plain
from emosteer.scenarios import Group
from emosteer.sites import Site
from emosteer.steering import SteeringPlan, scaled
from emosteer.workers import ALONE, Crew, part, parts


@dataclass(frozen=True)
class Job:
    """One reply to write. text: the user's text; strength: of the steering, None where the method has none."""

    id: str
    skeleton_id: str | None
    valence: str | None
    text: str
    emotion: str
    method: str
    strength: float | None

    @classmethod
    def of(cls, group: Group, emotion: str, method: str, strength: float | None) -> Job:
        """The job of a scenario-event."""
        return cls(f"{group.key}/{emotion}", group.key.scenario, group.key.valence, group.text, emotion, method, strength)


class Asked(Protocol):
    """What turns messages into tokens: a model, or its tokenizer where no model is loaded."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


class Author(Protocol):
    """Who writes jobs, whatever the engine. circuit: None where nothing is steered; marks: what stands in each of its rows as well."""

    @property
    def circuit(self) -> Circuit | None: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def marks(self) -> Mapping[str, Any]: ...

    def run_key(self, circuit_sha256: str = "") -> str: ...

    def write(self, jobs: Sequence[Job], on_token: Callable[[str], None] | None = None) -> Iterator[tuple[Job, Reply]]: ...


def request_of(model: Asked, job: Job, instruction: str, elicitation: str = "tone") -> Request:
    """The job's prompt as tokens. Every method but `prompt` gets the plain prompt, so that methods are compared alike."""
    asked = job.method == "prompt"
    messages = elicit(elicitation, job.text, job.emotion, instruction) if asked else plain(job.text, instruction)
    return Request(job.id, tuple(model.prompt_ids(messages)))


def plan_of(jobs: Sequence[Job], circuit: Circuit | None, vectors: Mapping[Site, Tensor], positions: str = "reply") -> SteeringPlan:
    """The steering of a batch, one emotion and strength per row."""
    if not vectors or circuit is None:
        return SteeringPlan.none(len(jobs))
    steered = [job.method in ("circuit", "residual") for job in jobs]
    index = [circuit.index(job.emotion) if on else -1 for job, on in zip(jobs, steered, strict=True)]
    return replace(scaled(vectors, index, [job.strength or 0.0 for job in jobs]), positions=positions)


def row_of(job: Job, reply: Reply, run: str, marks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is written per reply. run: which settings it belongs to; marks: of the author."""
    return {
        "id": job.id,
        "skeleton_id": job.skeleton_id,
        "valence": job.valence,
        "emotion": job.emotion,
        "method": job.method,
        "strength": job.strength,
        "prompt": job.text,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "n_tokens": reply.n_tokens,
        "run": run,
        **(marks or {}),
    }


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

    def write(self, jobs: Sequence[Job], on_token: Callable[[str], None] | None = None) -> Iterator[tuple[Job, Reply]]:
        """Writes all jobs, in batches of similar length; yields each as its batch ends. `on_token` streams a single job."""
        requests = self.requests(jobs)
        for done in self.write_batches(jobs, requests, batches(requests, self.batch_size), on_token):
            yield from ((jobs[i], reply) for i, reply in done)

    def requests(self, jobs: Sequence[Job]) -> list[Request]:
        """The jobs' prompts."""
        return [request_of(self.model, job, self.instruction, self.elicitation) for job in jobs]

    def write_batches(
        self,
        jobs: Sequence[Job],
        requests: Sequence[Request],
        wanted: Iterable[list[int]],
        on_token: Callable[[str], None] | None = None,
    ) -> Iterator[list[tuple[int, Reply]]]:
        """Writes some batches (indices of jobs); yields each with its replies (its halves, where it does not fit in memory)."""
        vectors: dict[Site, Tensor] = {}
        if self.circuit is not None and self.method in ("circuit", "residual"):
            vectors = self.circuit.steering(self.model) if self.method == "circuit" else self.circuit.residual()

        def compute(index: list[int]) -> list[tuple[int, Reply]]:
            plan = plan_of([jobs[i] for i in index], self.circuit, vectors, self.positions)
            return list(zip(index, generate(self.model, [requests[i] for i in index], plan, self.decoding, on_token=on_token), strict=True))

        for index in wanted:
            yield from halve_on_oom(index, compute, note, "replies")


def write_file(
    writer: Author, jobs: Sequence[Job], out: Path, circuit_sha256: str = "", *, fresh: bool = False, crew: Crew = ALONE
) -> list[dict[str, Any]]:
    """Writes jobs to a JSONL file, in whatever order they finish; goes on where an earlier run stopped.

    Args:
        crew: the processes that share the batches; the file is the same as one process's.

    Returns:
        All rows of the file that belong to the jobs, in the order of the jobs.

    Raises:
        UsageError: if the file holds replies of other settings. EmosteerError: if it cannot be written.
    """
    run, share = writer.run_key(circuit_sha256), shares_of(out)
    if fresh and crew.lead:
        for path in (out, *parts(share).values()):
            path.unlink(missing_ok=True)
    crew.meet()
    if not crew.alone or parts(share):
        if not isinstance(writer, Writer):
            raise UsageError(f"{out} was begun by several processes; finish it with the built-in engine, or --fresh to replace it")
        return _write_shared(writer, jobs, out, run, crew)
    log, keys = _opened(out, run)
    todo = [job for job in jobs if job_key(vars(job)) not in keys]
    if len(todo) < len(jobs):
        note(f"going on: {len(jobs) - len(todo)} of {len(jobs)} replies are there")
    with bar("generate (replies)", len(jobs), len(jobs) - len(todo)) as advance:
        for job, reply in writer.write(todo):
            row = row_of(job, reply, run, writer.marks)
            log.append(row)
            keys[job_key(row)] = row
            advance(1)
    return [keys[job_key(vars(job))] for job in jobs]


def shares_of(out: Path) -> Path:
    """Where several processes keep their replies until all are there (process 0's file, see `workers.part`)."""
    return out.with_name(out.name + ".partial")


def _opened(path: Path, run: str) -> tuple[JsonlLog, dict[str, dict[str, Any]]]:
    """A file of replies, and its rows by key.

    Raises:
        UsageError: if it holds replies of other settings.
    """
    log = JsonlLog(path)
    if any(row.get("run") != run for row in log.rows):
        raise UsageError(
            f"{path} holds replies of another run (other model, circuit, decoding or method); name another --out, or --fresh to replace it"
        )
    return log, {job_key(row): row for row in log.rows}


def _write_shared(writer: Writer, jobs: Sequence[Job], out: Path, run: str, crew: Crew) -> list[dict[str, Any]]:
    """As one process would go on from what `out` holds: the same batches, appended in the same order. Until all are there they are kept
    beside it, by each process what it wrote; a batch that a killed process left in part is written again, whole."""
    if crew.lead:
        _opened(out, run)  # ends a torn line, which two at a time must not
    crew.meet()
    keys = _opened(out, run)[1]
    todo = [job for job in jobs if job_key(vars(job)) not in keys]
    names, requests = [job_key(vars(job)) for job in todo], writer.requests(todo)
    order = list(batches(requests, writer.batch_size))
    log, mine = _opened(part(shares_of(out), crew.rank), run)
    crew.meet()  # all have ended the torn lines of their files

    def there() -> dict[str, dict[str, Any]]:
        rows = (row for path in parts(shares_of(out)).values() for row in whole_rows(path))
        return {job_key(row): row for row in rows if row.get("run") == run}

    known = there()
    crew.kept = lambda: f"{len(keys) + len(there())} of {len(jobs)} replies are kept in {out} and {shares_of(out)}*"
    crew.meet()  # nobody writes before all have read
    if len(todo) < len(jobs) or known:
        note(f"going on: {len(jobs) - len(todo) + len(known)} of {len(jobs)} replies are there")
    missing = [index for index in order if any(names[i] not in known for i in index)]
    with bar("generate (replies)", len(jobs), len(jobs) - sum(map(len, missing))) as advance:
        for done in writer.write_batches(todo, requests, crew.claim(missing)):
            log.append(*(row_of(todo[i], reply, run) for i, reply in done if names[i] not in mine))
            advance(len(done) * crew.world)
    crew.meet()
    if crew.lead:
        known = there()
        lost = [name for name in names if name not in known]
        if lost:
            raise EmosteerError(f"{len(lost)} replies are in no file {shares_of(out)}*: do all processes see the same disk? Run it again")
        rows = [*keys.values(), *(known[names[i]] for index in order for i in index)]
        write_jsonl(out, rows)
        for path in parts(shares_of(out)).values():
            path.unlink(missing_ok=True)
    crew.meet()
    keys = _opened(out, run)[1]
    return [keys[job_key(vars(job))] for job in jobs]


def job_key(row: Any) -> str:
    """What makes a reply the same reply: id, emotion, method, strength and prompt text."""
    get = row.get
    text = get("prompt") if "prompt" in row else get("text")
    return json.dumps([get("id"), get("emotion"), get("method"), get("strength"), text])
