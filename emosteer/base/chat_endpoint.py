"""A client of OpenAI-compatible chat endpoints: patient with what may pass, brief about what cannot, silent about the key. No torch."""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from emosteer.base.errors import EmosteerError, UsageError

Message = dict[str, str]
LONGEST_ANSWER = 20_000


class _TryAgain(Exception):
    """A failure that may pass. after: seconds that the server asked to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Endpoint:
    """Any server with POST {base_url}/chat/completions. The key is sent as a Bearer token and never appears in a message."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
        tries: int = 5,
        backoff: float = 1.0,
        longest_wait: float = 60.0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """Checks the address and the key; connects to nothing yet.

        Args:
            key_env: the environment variable that holds the key; a local server may need none.
            tries: requests per answer; pauses of about `backoff` x 1, 2, 4, ... seconds lie between them, or what Retry-After asks for.
            longest_wait: no pause is longer.
            notify: is told of each failure that is tried again.

        Raises:
            UsageError: if the address is no http(s) URL or the key cannot be sent in a header.
        """
        self.url, self.shown = _addresses(base_url)
        self.model, self.key_env, self.timeout = model, key_env, timeout
        self.tries, self.backoff, self.longest_wait, self.notify = tries, backoff, longest_wait, notify or (lambda message: None)
        self._key = os.environ.get(key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise UsageError(f"the key in ${key_env} holds a character that cannot be sent (a space, a line break, ...); set it again")
        self._dropped: set[str] = set()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def chat(
        self,
        messages: Sequence[Message],
        *,
        seed: int,
        temperature: float,
        max_tokens: int,
        json_mode: bool,
        schema: Mapping[str, Any] | None = None,
    ) -> str:
        """Has the conversation continued; asks until there is an answer.

        The settings are wishes: one that the server refuses, and that it then answers without, is left out from then on, since not
        every endpoint knows them all. Threads may share an endpoint.

        Args:
            json_mode: ask for one JSON object as the answer.
            schema: ask for one that obeys this JSON schema; where the server knows no schemas, as with `json_mode`.

        Returns:
            The answer's text; empty if the server answered without one.

        Raises:
            EmosteerError: at once if asking again cannot help, otherwise after `tries` requests.
        """
        # In the order in which they are given up when a complaint names several.
        settings: dict[str, Any] = {"response_format": {"type": "json_object"}} if json_mode or schema else {}
        settings |= {"max_tokens": max_tokens, "seed": seed, "temperature": temperature}
        for turn in range(self.tries):
            try:
                return self._ask(list(messages), settings, schema)
            except _TryAgain as error:
                problem = str(error)
                if turn + 1 < self.tries:
                    pause = self.backoff * 2**turn * random.uniform(0.5, 1.0)  # jitter, or all clients come back at the same moment
                    pause = max(0.0, min(self.longest_wait, max(error.after, pause)))
                    self.notify(f"{problem}; asking again in {pause:.0f} s")
                    time.sleep(pause)
        raise EmosteerError(f"{self.shown} {problem}, {self.tries} times; check --base-url and that the server is up")

    def _ask(self, messages: list[Message], settings: dict[str, Any], schema: Mapping[str, Any] | None) -> str:
        dropped = set(self._dropped)
        while True:
            sent = {name: value for name, value in settings.items() if name not in dropped}
            if schema and "response_format" in sent and "json_schema" not in dropped:
                named = {"name": "answer", "strict": True, "schema": schema}
                sent["response_format"] = {"type": "json_schema", "json_schema": named}
            try:
                response = self._client.post(self.url, json={"model": self.model, "messages": messages, **sent})
            except httpx.TimeoutException as error:
                raise _TryAgain(f"did not answer within {self.timeout:g} s") from error
            except httpx.HTTPError as error:
                what = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection"
                raise _TryAgain(f"{what} ({self._clean(str(error)) or type(error).__name__})") from error
            refused = _refused_setting(response, sent)
            if refused is None:
                if response.status_code == 200:  # otherwise it was the text that the server refused, not the setting
                    self._dropped |= dropped
                return self._content(response)
            dropped.add(refused)

    def _content(self, response: httpx.Response) -> str:
        if response.status_code != 200:
            raise self._failure(response)
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            kind = response.headers.get("content-type", "no content type")
            start = f"{kind}: {self._clean(response.text)[:80]}"
            raise _TryAgain(f"answered something else than a chat completion ({start})") from error
        return content if isinstance(content, str) else ""

    def _failure(self, response: httpx.Response) -> Exception:
        code, complaint = response.status_code, self._clean(_complaint(response))
        answered = f"answered {code}" + (f" ({complaint[:200]})" if complaint else "")
        if (code in (408, 409, 425, 429) or code >= 500) and "insufficient_quota" not in response.text:
            return _TryAgain(answered, _retry_after(response.headers.get("retry-after", "")))
        key = f"the key in ${self.key_env}" if self._key else f"${self.key_env}, which is not set: this server wants a key"
        check = {
            401: key,
            403: f"{key}, and that it may use the model '{self.model}'",
            404: f"--base-url (most end in /v1) and --model '{self.model}'",
            429: "the account behind the key: its quota is used up",
        }
        return EmosteerError(f"{self.shown} {answered}; check {check.get(code, '--base-url and --model')}")

    def _clean(self, text: str) -> str:
        """One line without the key: servers and proxies like to repeat what they were sent."""
        return " ".join((text.replace(self._key, "[key]") if self._key else text).split())


def _addresses(base_url: str) -> tuple[str, str]:
    """(address to post to, address to show: without user, password and query)."""
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL as error:
        raise UsageError(f"--base-url is not a URL ({error}); expected one like http://127.0.0.1:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"expected --base-url to be like http://127.0.0.1:8000/v1, found '{url.copy_with(userinfo=b'', query=None)}'")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    shown = url.copy_with(userinfo=b"", query=None, fragment=None, path=path or "/")
    return str(url.copy_with(fragment=None, path=f"{path}/chat/completions")), str(shown)


def _refused_setting(response: httpx.Response, sent: Mapping[str, Any]) -> str | None:
    """The setting to try without: the one that the complaint names, or else response_format, whose schema goes first."""
    if response.status_code not in (400, 422):
        return None
    named = [name for name in sent if name in response.text]
    refused = next(iter(named), "response_format" if "response_format" in sent else None)
    schema = refused == "response_format" and sent["response_format"]["type"] == "json_schema"
    return "json_schema" if schema else refused


def _complaint(response: httpx.Response) -> str:
    """The message in an error's body, whatever its shape."""
    try:
        error = response.json().get("error", "")
        return str(error.get("message", "") if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        return "" if "<" in response.text else response.text


def _retry_after(value: str) -> float:
    """Seconds from a Retry-After header: a number or a date; 0 if it is neither."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if not math.isnan(seconds) else 0.0


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in an answer, in order, also those inside others; fences, prose and thoughts around them are ignored."""
    text = re.sub(r"<think>.*?</think>", "", text[:LONGEST_ANSWER], flags=re.DOTALL)
    decoder = json.JSONDecoder(strict=False)
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        yield {str(name).strip().lower(): item for name, item in value.items()}
