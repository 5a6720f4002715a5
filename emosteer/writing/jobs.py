"""Jobs: what is to be written, and how a job becomes a prompt, a steering plan and a row of the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from emosteer.base.errors import UsageError
from emosteer.circuits.arcs import Arc, strengths_along
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, METHODS, NONE
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Reply, Request
from emosteer.generation.steering import Course, SteeringPlan, plan_for
from emosteer.models.sites import Site
from emosteer.scenarios.examples import as_fields, preceded, shown
from emosteer.scenarios.prompts import elicit, unsaid
from emosteer.scenarios.scenarios import Group, GroupKey, Message


@dataclass(frozen=True)
class Job:
    """One reply to write. messages: the conversation that it answers, the user's turn last; strength: of the steering, None where the
    method has none; course: of a mixture or an arc, whose label is then the emotion, the strength of each of the circuit's emotions at
    each token, as long as it changes ([token][emotion])."""

    id: str
    skeleton_id: str | None
    valence: str | None
    messages: tuple[Message, ...]
    emotion: str
    method: str
    strength: float | None
    course: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def of(cls, group: Group, emotion: str, method: str, strength: float | None) -> Job:
        """The job of a scenario-event, or of a prompt of another kind, which has no valence."""
        said = (*group.earlier, Message("user", group.text))
        return cls(f"{group.key}/{emotion}", group.key.scenario, group.key.valence or None, said, emotion, method, strength)

    @property
    def text(self) -> str:
        """The user's last turn."""
        return self.messages[-1].content

    @property
    def key(self) -> str:
        """What makes a reply the same reply (`job_key`)."""
        return _key(self.id, self.emotion, self.method, self.strength, self.text if len(self.messages) == 1 else self.messages)


def jobs_for(
    name: str,
    group: Group,
    emotions: Sequence[str],
    method: str,
    strength: float | None,
    circuit: Circuit | None,
    dialled: Mapping[str, float],
    earlier: tuple[Message, ...] = (),
) -> list[Job]:
    """One job per emotion for a scenario-event, or for a text (whose group key is empty).

    Args:
        name: of the scenario-event or text, the first part of each job's id; strength: None takes the circuit's default of the method;
            dialled: emotion -> strength, where an intensity was asked for; earlier: what was said before the text.
    """
    key, messages = group.key, (*group.earlier, *earlier, Message("user", group.text))
    jobs, part = [], METHODS[method].strength
    for emotion in emotions:
        how = dialled.get(emotion, strength)
        if how is None and circuit is not None and part is not None:
            how = circuit.default_strength_of(part, emotion)
        jobs.append(Job(f"{name}/{emotion}", key.scenario or None, key.valence or None, messages, emotion, method, how))
    return jobs


def felt_job(name: str, messages: tuple[Message, ...], arc: Arc, circuit: Circuit, tokens: int, group: GroupKey | None = None) -> Job:
    """The job of a reply that feels a mixture or an arc, weakened where it is more than the text bears.

    Args:
        name: the first part of the job's id; tokens: the longest reply; group: the scenario-event that it answers.

    Raises:
        UsageError: for an emotion that the circuit does not know. ArtifactError: if it has no dial.
    """
    course = strengths_along(arc, circuit.emotions, circuit.strength_at, tokens)
    label, key = arc.within.label, group or GroupKey("", "")
    kept = tuple(tuple(strengths) for strengths in course)
    return Job(f"{name}/{label}", key.scenario or None, key.valence or None, messages, label, CIRCUIT, None, kept)


class Asked(Protocol):
    """What turns messages into tokens: a model, or its tokenizer where no model is loaded."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


@dataclass(frozen=True)
class Work:
    """How jobs are written. order: their batches (indices of jobs), in the order of a single process; write: writes one, and yields its
    replies with their indices as soon as they are there."""

    order: Sequence[list[int]]
    write: Callable[[list[int]], Iterator[list[tuple[int, Reply]]]]


class ReplyWriter(Protocol):
    """Who writes jobs, whatever the engine. circuit: None where nothing is steered; marks: what stands in each of its rows as well."""

    @property
    def circuit(self) -> Circuit | None: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def marks(self) -> Mapping[str, Any]: ...

    def run_key(self, circuit_sha256: str = "") -> str: ...

    def work(self, jobs: Sequence[Job]) -> Work: ...

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]: ...

    def stream(self, job: Job) -> Iterator[str]: ...


def request_of(
    model: Asked, job: Job, instruction: str, elicitation: str = "tone", guides: bool = False, circuit: Circuit | None = None
) -> Request:
    """The job's prompt as tokens. Every method but a prompt gets the plain prompt, so that methods are compared alike, and, where it
    steers, the circuit's examples before it; what is asked and the instruction stand in the user's last turn.

    Args:
        guides: whether the prompt guides the reply, so that its empty form is needed, too.
    """
    asked = elicitation if METHODS[job.method].asks else None
    examples = examples_for(job, circuit, instruction) if circuit is not None else ()
    return asked_request(model, job.id, asked, job.text, job.emotion, instruction, job.messages[:-1], guides, examples)


def examples_for(job: Job, circuit: Circuit, instruction: str) -> tuple[Message, ...]:
    """The turns that stand before a job's prompt: examples of the emotions that it adds something for, in the order in which they come,
    the strongest first; none for a reply that is unsteered, or steered away from an emotion."""
    course = strengths_of(job, circuit)
    begins = {}
    for number, emotion in enumerate(circuit.emotions):
        token = next((token for token, strengths in enumerate(course) if strengths[number] > 0), None)
        if token is not None:
            begins[emotion] = token, -course[token][number]
    return shown(circuit.examples, sorted(begins, key=lambda emotion: begins[emotion]), instruction)


def examples_mark(circuit: Circuit | None) -> list[object]:
    """What the key of a run says of a circuit's examples, which may be left out: nothing where it shows none, so that the keys of files
    from before there were any stay."""
    return [as_fields(circuit.examples)] if circuit is not None and circuit.examples else []


def asked_request(
    model: Asked,
    key: str,
    elicitation: str | None,
    text: str,
    emotion: str,
    instruction: str,
    earlier: Sequence[Message],
    guides: bool,
    examples: Sequence[Message] = (),
) -> Request:
    """A prompt as tokens, with its empty form where the prompt guides the reply.

    Args:
        key: what the reply's seed is drawn from; elicitation: how the prompt asks for the emotion; None is the plain prompt; examples:
            turns that stand before the conversation, also where nothing is said in it.
    """
    how = elicitation or "reply"
    ids = tuple(model.prompt_ids(elicit(how, text, emotion, instruction, preceded(earlier, examples))))
    return Request(key, ids, tuple(model.prompt_ids(unsaid(how, emotion, instruction, earlier, examples))) if guides else ())


def plan_of(jobs: Sequence[Job], circuit: Circuit | None, vectors: Mapping[Site, Tensor], positions: str = "reply") -> SteeringPlan:
    """The steering of a batch, one emotion and strength per row."""
    if not vectors or circuit is None:
        return SteeringPlan.none(len(jobs))
    if any(job.course is not None for job in jobs):
        return _course_plan(jobs, circuit, vectors, positions)
    steered = [METHODS[job.method].steers for job in jobs]
    index = [circuit.index(job.emotion) if on else -1 for job, on in zip(jobs, steered, strict=True)]
    return replace(plan_for(vectors, index, [job.strength or 0.0 for job in jobs]), positions=positions)


def _course_plan(jobs: Sequence[Job], circuit: Circuit, vectors: Mapping[Site, Tensor], positions: str) -> SteeringPlan:
    """The steering of a batch in which some replies feel a mixture or an arc.

    Raises:
        UsageError: for an arc that is to act at all positions.
    """
    rows = [strengths_of(job, circuit) for job in jobs]
    longest = max(map(len, rows))
    if longest > 1 and positions != "reply":
        raise UsageError("an arc changes from token to token of the reply and cannot act at all positions; leave --positions out")
    weights = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    return replace(SteeringPlan.over(Course(vectors, weights)), positions=positions)


def strengths_of(job: Job, circuit: Circuit) -> tuple[tuple[float, ...], ...]:
    """The strength of each of the circuit's emotions at each token, as long as it changes: [token][emotion]."""
    if job.course is not None:
        return job.course
    strengths = [0.0] * len(circuit.emotions)
    if METHODS[job.method].steers and job.strength:
        strengths[circuit.index(job.emotion)] = job.strength
    return (tuple(strengths),)


def felt_in(job: Job, circuit: Circuit | None) -> tuple[str, ...]:
    """The emotions that a reply is to voice: those that are added, or the one that its prompt asks for; none for an unsteered reply, and
    for one that is steered away from an emotion."""
    if circuit is None or METHODS[job.method].asks:
        return () if job.emotion == NONE else (job.emotion,)
    course = strengths_of(job, circuit)
    return tuple(name for number, name in enumerate(circuit.emotions) if any(strengths[number] > 0 for strengths in course))


def said_in(messages: Sequence[Message]) -> str:
    """What was said, as one text (as `Group.said`)."""
    return " ".join(message.content for message in messages if message.role != "system")


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
        **({"messages": [message._asdict() for message in job.messages]} if len(job.messages) > 1 else {}),
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "n_tokens": reply.n_tokens,
        "run": run,
        **(marks or {}),
    }


def job_key(row: Mapping[str, Any]) -> str:
    """What makes the reply in a row the same reply: id, emotion, method, strength and prompt text, or the whole conversation."""
    turns = row.get("messages")
    asked = [(turn["role"], turn["content"]) for turn in turns] if turns else row.get("prompt")
    return _key(row.get("id"), row.get("emotion"), row.get("method"), row.get("strength"), asked)


def _key(*parts: Any) -> str:
    return json.dumps(parts)
