"""From a request to the replies that are to be written: the model's name, what is to be felt, the prompt, how tokens are chosen."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from emosteer.base.errors import DataError, suggest
from emosteer.circuits.arcs import Arc
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, NONE
from emosteer.generation.decoding import GUIDANCE, Decoding
from emosteer.generation.generate import Request, check_lengths
from emosteer.generation.running_batch import Ask
from emosteer.models.model import Model
from emosteer.models.tokens import text_prefix
from emosteer.scenarios.conversations import parse_messages
from emosteer.scenarios.emotions import emotion_key
from emosteer.scenarios.prompts import instruction_for
from emosteer.scenarios.scenarios import Group, GroupKey, Message
from emosteer.serving.errors import RequestError, refusing
from emosteer.serving.requests import ChatRequest, CompletionRequest, Feels, Writes
from emosteer.writing.feelings import Feeling, Reader
from emosteer.writing.jobs import Job, asked_request, examples_for, felt_job, jobs_for, strengths_of

#: The name of a text that `emosteer generate` is given: what its reply's seed is drawn from.
TEXT = "text"


@dataclass(frozen=True)
class Served:
    """What a server has. name: of the model, for clients; longest: the most tokens of a reply; read: reads users' turns."""

    model: Model
    circuit: Circuit
    name: str
    longest: int
    read: Reader


@dataclass(frozen=True)
class Wanted:
    """Replies to write. felt: what they feel, as it was weakened where it was too much, for each prompt where that differs; strength: of a
    single emotion; asks: one per choice, those of a prompt together; n: choices of each prompt."""

    felt: str | tuple[str, ...]
    strength: float | None
    asks: tuple[Ask, ...]
    n: int = 1


def felt_fields(served: Served, wanted: Feels, model: str) -> Feels:
    """What is to be felt, also where the model's name says it: "NAME:anger", "NAME:anger@60", "NAME:sadness@40+anger@20",
    "NAME:fear@80->happiness@60".

    Raises:
        RequestError: for another model, and where both say something.
    """
    name, colon, feeling = model[: len(served.name)], model[len(served.name) :][:1], model[len(served.name) + 1 :]
    if name != served.name or colon not in ("", ":") or (colon and not feeling.strip()):
        hint = suggest(model, [served.name])
        message = f"the model '{model[:60]}' does not exist here{hint}; expected {served.name}, or {served.name}:EMOTION@INTENSITY"
        raise RequestError(message, status=404, param="model", code="model_not_found")
    if not colon:
        return wanted
    if any(given is not None for given in (wanted.emotion, wanted.mix, wanted.arc, wanted.vad)):
        raise RequestError("the model's name asks for an emotion, and so does the request; expected one of the two", param="model")
    if not any(mark in feeling for mark in "@:=+>\N{RIGHTWARDS ARROW}"):
        return wanted.model_copy(update={"emotion": feeling})
    arc = Arc.parse(feeling)
    if len(arc.stops) == 1 and len(arc.emotions) == 1 and wanted.strength is None and wanted.intensity is None:
        [(emotion, intensity)] = arc.stops[0].intensities.items()
        return wanted.model_copy(update={"emotion": emotion, "intensity": intensity})
    return wanted.model_copy(update={"arc": feeling} if arc.moves else {"mix": feeling})


def job_for(served: Served, feels: Feels, messages: tuple[Message, ...], longest: int) -> Job:
    """The job of one reply, named as `emosteer generate` names that of a text, so that it has the same seed.

    Raises:
        EmosteerError: for what makes no sense, or what the circuit does not know.
    """
    circuit, emotion = served.circuit, emotion_key(feels.emotion) if feels.emotion is not None else None
    feeling = Feeling.of(feels.mix, feels.arc, feels.arc_tokens, feels.fade, feels.personality, feels.vad)
    if feeling is not None:
        if feels.strength is not None:
            raise RequestError("mix, arc, fade, personality and vad go by intensities; leave the strength out", param="strength")
        felt = feeling.starting(() if emotion is None else (emotion,), feels.intensity)[0]
        return felt_job(TEXT, messages, felt.now(messages, circuit.emotions, served.read), circuit, longest)
    if feels.strength is not None and feels.intensity is not None:
        raise RequestError("expected an intensity or a strength, found both", param="strength")
    if emotion is None:
        if feels.strength is not None or feels.intensity is not None:
            raise RequestError("an intensity or a strength asks for an emotion", param="emotion")
        emotion = NONE
    group, earlier = Group(GroupKey("", ""), "", messages[-1].content), messages[:-1]
    if emotion == NONE:
        return jobs_for(TEXT, group, (NONE,), NONE, None, None, {}, earlier)[0]
    emotion = circuit.emotions[circuit.index(emotion)]
    dialled = {} if feels.intensity is None else {emotion: circuit.strength_at(emotion, feels.intensity)}
    return jobs_for(TEXT, group, (emotion,), CIRCUIT, feels.strength, circuit, dialled, earlier)[0]


def decoding_of(served: Served, wanted: Writes, guidance: float, asked: int | None) -> Decoding:
    """How tokens are chosen: as `emosteer generate` does where the request says nothing; but a sampled reply without a seed is another
    one each time."""
    longest = served.longest if asked is None else asked
    if asked is not None and asked > served.longest:
        raise RequestError(f"max_tokens: expected at most {served.longest} (--max-tokens of the server), found {asked}", param="max_tokens")
    usual = Decoding.usual()
    return Decoding(
        max_new_tokens=min(longest, usual.max_new_tokens) if asked is None else longest,
        temperature=usual.temperature if wanted.temperature is None else wanted.temperature,
        top_p=usual.top_p if wanted.top_p is None else wanted.top_p,
        repetition_penalty=usual.repetition_penalty if wanted.repetition_penalty is None else wanted.repetition_penalty,
        seed=secrets.randbits(48) if wanted.seed is None and wanted.temperature else wanted.seed or 0,
        guidance=guidance if wanted.guidance is None else wanted.guidance,
        penalise_prompt=usual.penalise_prompt,
    )


def chat_asks(served: Served, wanted: ChatRequest) -> Wanted:
    """The replies that a conversation asks for.

    Raises:
        RequestError: naming what is wrong.
    """
    if wanted.max_tokens is not None and wanted.max_completion_tokens is not None:
        raise RequestError("expected max_tokens or max_completion_tokens, found both", param="max_tokens")
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = _said(wanted)
    decoding = decoding_of(served, wanted, GUIDANCE, wanted.max_completion_tokens or wanted.max_tokens)
    job = _felt(served, wanted, messages, decoding.max_new_tokens)
    instruction = instruction_for(wanted.instruction, served.circuit.instruction)
    examples = examples_for(job, served.circuit, instruction)
    with refusing("messages"):
        request = asked_request(
            served.model, job.id, None, job.text, job.emotion, instruction, job.messages[:-1], decoding.guides, examples
        )
    likeliest = (wanted.top_logprobs or 0) if wanted.logprobs else None
    n = wanted.n or 1
    return Wanted(job.emotion, job.strength, _choices(served, job, request, decoding, n, likeliest, "messages"), n)


def completion_asks(served: Served, wanted: CompletionRequest) -> Wanted:
    """The texts that go on from prompts: no template, no instruction, and no guidance, as there is no prompt with nothing said."""
    if wanted.guidance not in (None, 1):
        raise RequestError("a text that goes on has no guidance; use /v1/chat/completions", param="guidance")
    decoding = decoding_of(served, wanted, 1.0, wanted.max_tokens)
    prompts = [wanted.prompt] if isinstance(wanted.prompt, str) else wanted.prompt
    prefix = text_prefix(served.model.tokenizer)
    served = replace(served, circuit=served.circuit.without_examples())  # nothing stands before a text that goes on
    asks, felt = list[Ask](), list[str]()
    for number, prompt in enumerate(prompts):
        with refusing("prompt"):
            ids = (*prefix, *served.model.text_ids(prompt))
        if not ids:
            raise RequestError("the prompt is empty", param="prompt")
        job = _felt(served, wanted, (Message("user", prompt),), decoding.max_new_tokens)  # a personality follows each of them
        felt.append(job.emotion)
        key = job.id if not number else f"{job.id}/{number}"
        asks += _choices(served, job, Request(key, ids), decoding, wanted.n or 1, wanted.logprobs, "prompt")
    return Wanted(felt[0] if len({*felt}) == 1 else tuple(felt), job.strength, tuple(asks), wanted.n or 1)


def said(messages: Sequence[dict[str, str]]) -> tuple[Message, ...]:
    """A conversation, once it is sure that a reply can follow it.

    Raises:
        RequestError: naming the message that is out of order.
    """
    with refusing("messages"):
        return parse_messages(list(messages), "messages")


def _said(wanted: ChatRequest) -> tuple[Message, ...]:
    return said([message.plain() for message in wanted.messages])


def _felt(served: Served, wanted: Writes, messages: tuple[Message, ...], longest: int) -> Job:
    with refusing("emotion", "invalid_emotion"):
        return job_for(served, felt_fields(served, wanted, wanted.model), messages, longest)


def _choices(served: Served, job: Job, request: Request, decoding: Decoding, n: int, likeliest: int | None, param: str) -> tuple[Ask, ...]:
    """The same prompt several times, each choice with a seed of its own. param: the field that the prompt stands in."""
    try:
        check_lengths([request], decoding, served.model.shape.context, served.name)
    except DataError as error:
        raise RequestError(str(error).replace("--max-new-tokens", "max_tokens"), param=param, code="context_length_exceeded") from None
    weights = None if job.emotion == NONE else torch.tensor(strengths_of(job, served.circuit))
    keys = [request.key if not number else f"{request.key}#{number}" for number in range(n)]
    return tuple(Ask(replace(request, key=key), decoding, weights, likeliest) for key in keys)
