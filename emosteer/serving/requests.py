"""What clients send: the fields of the OpenAI protocol that are served, and what asks for an emotion beside them. No torch here.

Types are taken strictly, unknown fields are refused: a misspelt `intensity` would otherwise be no steering, without a word. Fields of the
protocol that change nothing here (`user`, `metadata`, `store`, ...) are accepted; those that would change the reply and are not served are
refused unless they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emosteer.base.errors import suggest
from emosteer.serving.errors import RequestError

#: Replies to one request, stop sequences, log-probabilities for a token.
MOST_CHOICES, MOST_STOPS, MOST_LIKELY = 64, 16, 20

_Stop = Annotated[str, Field(min_length=1, max_length=200)]
_Amount = Annotated[float, Field(allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Feels(_Fields):
    """How a reply is to feel; `writing.feelings` and docs/SERVING.md say what each means."""

    emotion: str | None = None
    intensity: _Amount | None = None
    strength: _Amount | None = None
    mix: dict[str, _Amount] | str | None = None
    arc: str | None = None
    arc_tokens: int | None = None
    fade: _Amount | None = None
    personality: dict[str, _Amount] | str | None = None
    vad: Annotated[list[_Amount], Field(min_length=3, max_length=3)] | str | None = None


class StreamOptions(_Fields):
    """What a stream holds beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Writes(Feels):
    """What both kinds of completion share."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    guidance: Annotated[float, Field(ge=1, le=20)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    # of the protocol, without effect here
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    # of the protocol, and not served unless they ask for nothing
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Fields):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Any = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text; a developer's line is a system line."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(_Fields):
    """What a reply is to be: text."""

    type: Literal["text"]


class ChatRequest(Writes):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    instruction: str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    verbosity: Any = None
    reasoning_effort: Any = None


class CompletionRequest(Writes):
    """A request to /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ReadingRequest(_Fields):
    """A request to /v1/readings: a reply, and the conversation that it answers."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=2000)]
    reply: Annotated[str, Field(max_length=20_000)]
    instruction: str | None = None


Kind = TypeVar("Kind", bound=_Fields)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """A request's body as its fields.

    Raises:
        RequestError: naming the first field that is wrong, and how.
    """
    data = _read_json(body)
    if not isinstance(data, dict):
        raise RequestError(f"expected a JSON object, found {_shown(data)}")
    unknown = [name for name in data if name not in kind.model_fields]
    if unknown:
        name = str(unknown[0])[:60]
        raise RequestError(f"unknown field '{name}'{suggest(name, kind.model_fields)}", param=name, code="unknown_field")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise RequestError("the request is nested too deeply") from None


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    # a field of several types has one complaint for each, named by the type
    named = [part for part in path if part.isidentifier() or part.isdigit()][:4]
    param = ".".join(named)[:100]
    found = "" if first["type"] == "missing" else f", found {_shown(first['input'])}"
    message = str(first["msg"])
    return RequestError(f"{param}: {message[0].lower()}{message[1:]}{found}", param=param)


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except RequestError:
        raise
    except UnicodeDecodeError:
        raise RequestError("the request is not UTF-8 text") from None
    except RecursionError:
        raise RequestError("the request is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the request is not JSON: {str(error)[:100]}") from None


def _no_number(name: str) -> Any:
    raise RequestError(f"the request is not JSON: {name} is no number of it")


def _once(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"the field '{twice[:60]}' is there twice", param=twice[:60])
    return found


def _shown(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=True)[:60]
    except (TypeError, ValueError, RecursionError):
        return type(value).__name__
