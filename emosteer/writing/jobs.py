"""Jobs: what is to be written, and how a job becomes a prompt, a steering plan and a row of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from emosteer.circuits.circuit import Circuit
from emosteer.generation.generate import Decoding, Reply, Request
from emosteer.generation.steering import SteeringPlan, plan_for
from emosteer.models.sites import Site
from emosteer.scenarios.prompts import elicit, plain
from emosteer.scenarios.scenarios import Group


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


def jobs_for(
    name: str,
    group: Group,
    emotions: Sequence[str],
    method: str,
    strength: float | None,
    circuit: Circuit | None,
    dialled: Mapping[str, float],
) -> list[Job]:
    """One job per emotion for a scenario-event, or for a text (whose group key is empty).

    Args:
        name: of the scenario-event or text, the first part of each job's id; strength: None takes the circuit's default of the method;
            dialled: emotion -> strength, where an intensity was asked for.
    """
    jobs = []
    for emotion in emotions:
        how = dialled.get(emotion, strength)
        if how is None and circuit is not None and method == "circuit":
            how = circuit.default_strength(emotion)
        elif how is None and circuit is not None and method == "residual":
            how = circuit.residual_strength
        key = group.key
        jobs.append(Job(f"{name}/{emotion}", key.scenario or None, key.valence or None, group.text, emotion, method, how))
    return jobs


class Asked(Protocol):
    """What turns messages into tokens: a model, or its tokenizer where no model is loaded."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]: ...


class ReplyWriter(Protocol):
    """Who writes jobs, whatever the engine. circuit: None where nothing is steered; marks: what stands in each of its rows as well."""

    @property
    def circuit(self) -> Circuit | None: ...

    @property
    def decoding(self) -> Decoding: ...

    @property
    def marks(self) -> Mapping[str, Any]: ...

    def run_key(self, circuit_sha256: str = "") -> str: ...

    def write(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Reply]]: ...

    def stream(self, job: Job) -> Iterator[str]: ...


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
    return replace(plan_for(vectors, index, [job.strength or 0.0 for job in jobs]), positions=positions)


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


def job_key(row: Any) -> str:
    """What makes a reply the same reply: id, emotion, method, strength and prompt text."""
    get = row.get
    text = get("prompt") if "prompt" in row else get("text")
    return json.dumps([get("id"), get("emotion"), get("method"), get("strength"), text])
