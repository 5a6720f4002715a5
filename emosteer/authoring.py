"""New scenarios for a user's own domain, written by a language model: linted, kept one by one, resumable. No torch here.

Every answer is checked before it counts. What was wrong with a refused one goes back to the author, in the same
conversation; what was accepted is on the disk before the next request leaves.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol

import httpx

from emosteer.errors import DataError, EmosteerError, UsageError
from emosteer.files import write_error
from emosteer.scenarios import Limits, Problem, Scenario, lint_scenarios, near_duplicates, parse_scenario, read_scenarios

Message = dict[str, str]

#: Fit any domain; `--themes` replaces them.
THEMES = ("colleagues", "people served", "equipment", "schedule", "money", "training", "rules and records", "the way there and back")
#: One per request, in turn, so that two scenarios of a theme do not start from the same idea. A prime number of them.
ANGLES = (
    "a delivery or a handover",
    "a wrong entry in a record",
    "an appointment that may be put off",
    "a request to somebody who decides",
    "a tool in daily use",
    "a sum that is owed",
    "doing a task for the first time",
    "a stranger at the door or on the line",
    "a message that waits for an answer",
    "weather or traffic",
    "an inspection whose result is due",
    "something lost or found",
    "a room or a cupboard that is shared",
    "a promise somebody made last month",
    "a change of plan at short notice",
    "food and drink",
    "the last hour before closing",
)
#: So many scenarios given up in a row mean that the author cannot do it; going on would only cost.
PATIENCE = 5
SHOWN_OPENINGS = 6
LONGEST_ANSWER = 20_000

SYSTEM = """\
You write short everyday situations for a language study. Each item is one situation and three different things that happened next.

scenario: {scenario[0]} to {scenario[1]} words, first person ("I", "my"). An ordinary situation with a place, a person and one concrete
detail (a number, a time, an object). Something is at stake and nothing says yet how it ends.
positive, neutral, negative: {event[0]} to {event[1]} words each, first person. Each one continues the scenario by itself and does not
know of the other two.
- positive: the outcome is clearly good for me.
- neutral: the matter takes its ordinary course; I gain nothing and lose nothing.
- negative: the outcome is clearly bad for me.

Rules:
- Tell only what a camera or a microphone would record: who did what, what was said, what a letter or a screen showed.
- No word for a feeling or a mood anywhere, not even a denied one (no "happy", "upset", "worried", "relieved", "surprised", "felt",
  "love"), no smiles, tears or shouting, no verdict ("great", "terrible", "unfortunately"), no exclamation mark. The reader must be able
  to guess the feeling from the facts.
- The three outcomes have about the same length and the same amount of detail.
- Write plainly, as a person would tell it. No names of real companies or people.

Answer with one JSON object and nothing else, every value a text:
{{"scenario": "...", "positive": "...", "neutral": "...", "negative": "..."}}"""


@dataclass(frozen=True)
class AuthorRequest:
    """One conversation to continue. messages: chat messages, the last one the user's; seed: another one for every request."""

    messages: tuple[Message, ...]
    seed: int


class Author(Protocol):
    """Whoever writes: an HTTP endpoint, a local model, a script in a test."""

    def write(self, request: AuthorRequest) -> str:
        """Returns the answer as it came.

        Raises:
            EmosteerError: if there is none to be had; the run stops.
        """
        ...


@dataclass(frozen=True)
class LocalAuthor:
    """A model on this machine. complete: (messages, seed) -> text."""

    complete: Callable[[list[Message], int], str]

    def write(self, request: AuthorRequest) -> str:
        """Returns the model's answer."""
        return self.complete(list(request.messages), request.seed)


@dataclass(frozen=True)
class AuthorEvent:
    """What just happened. kind: "accepted", "refused" (one answer) or "rejected" (given up); held: scenarios in the file by now."""

    kind: str
    held: int
    wanted: int
    message: str


@dataclass
class AuthorReport:
    """What a run came to.

    accepted, rejected: scenarios; reasons: rule -> answers that it refused; attempts: answers had; held: scenarios in the file.
    """

    accepted: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    held: int = 0
    interrupted: bool = False


# ---- an OpenAI-compatible endpoint ---------------------------------------------------------------------------------


class _TryAgain(Exception):
    """A failure that may pass. after: seconds that the server asked to wait."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class OpenAIAuthor:
    """Any server with POST {base_url}/chat/completions. The key is sent as a Bearer token and stands in no message."""

    #: Dropped one by one when a server refuses them: not every endpoint knows them all.
    OPTIONAL = ("response_format", "max_tokens", "seed", "temperature")

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.9,
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

        Raises:
            UsageError: if the address is no http(s) URL or the key cannot be sent in a header.
        """
        self.url, self.shown = _endpoint(base_url)
        self.model, self.key_env, self.timeout = model, key_env, timeout
        self.tries, self.backoff, self.longest_wait, self.notify = tries, backoff, longest_wait, notify or (lambda message: None)
        self._key = os.environ.get(key_env, "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise UsageError(f"the key in ${key_env} holds a character that cannot be sent (a space, a line break, ...); set it again")
        self._fields: dict[str, Any] = {"response_format": {"type": "json_object"}, "max_tokens": 2048, "temperature": temperature}
        self._dropped: set[str] = set()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)))

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def write(self, request: AuthorRequest) -> str:
        """Asks until there is an answer.

        Raises:
            EmosteerError: at once if asking again cannot help, otherwise after `tries` requests.
        """
        for turn in range(self.tries):
            try:
                return self._ask(request)
            except _TryAgain as error:
                problem = str(error)
                if turn + 1 < self.tries:
                    pause = self.backoff * 2**turn * random.uniform(0.5, 1.0)  # jitter, or all clients come back at the same moment
                    pause = max(0.0, min(self.longest_wait, max(error.after, pause)))
                    self.notify(f"{problem}; asking again in {pause:.0f} s")
                    time.sleep(pause)
        raise EmosteerError(f"{self.shown} {problem}, {self.tries} times; check --base-url and that the server is up")

    def _ask(self, request: AuthorRequest) -> str:
        while True:
            fields = {**self._fields, "seed": request.seed}
            body = {"model": self.model, "messages": list(request.messages)}
            body |= {name: value for name, value in fields.items() if name not in self._dropped}
            try:
                response = self._client.post(self.url, json=body)
            except httpx.TimeoutException as error:
                raise _TryAgain(f"did not answer within {self.timeout:g} s") from error
            except httpx.HTTPError as error:
                what = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke the connection"
                raise _TryAgain(f"{what} ({self._clean(str(error)) or type(error).__name__})") from error
            refused = self._refused_field(response)
            if refused is None:
                return self._content(response)
            self._dropped.add(refused)

    def _refused_field(self, response: httpx.Response) -> str | None:
        """The optional field to try without: the one that the complaint names, or else response_format."""
        left = [name for name in self.OPTIONAL if name not in self._dropped]
        if response.status_code not in (400, 422):
            return None
        named = [name for name in left if name in response.text] or [name for name in left if name == "response_format"]
        return named[0] if named else None

    def _content(self, response: httpx.Response) -> str:
        code = response.status_code
        if code != 200:
            raise self._failure(response)
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            kind = response.headers.get("content-type", "no content type")
            found = f"{kind}: {self._clean(response.text)[:80]}"
            raise _TryAgain(f"answered something else than a chat completion ({found})") from error
        return content if isinstance(content, str) else ""

    def _failure(self, response: httpx.Response) -> Exception:
        code, said = response.status_code, self._clean(_complaint(response))
        answered = f"answered {code}" + (f" ({said[:200]})" if said else "")
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


def _endpoint(base_url: str) -> tuple[str, str]:
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
        except (ValueError, TypeError):
            return 0.0
    return seconds if not math.isnan(seconds) else 0.0


# ---- one answer ----------------------------------------------------------------------------------------------------


def parse_answer(text: str) -> dict[str, Any] | None:
    """The first JSON object with a "scenario" (else the first at all) in an answer; fences, prose and thoughts around it are ignored."""
    text = re.sub(r"<think>.*?</think>", "", text[:LONGEST_ANSWER], flags=re.DOTALL)
    decoder, objects = json.JSONDecoder(strict=False), []
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        value = {str(name).strip().lower(): item for name, item in value.items()}
        if "scenario" in value:
            return value
        objects.append(value)
    return objects[0] if objects else None


def check_answer(text: str, identity: str, theme: str, taken: Sequence[Scenario], limits: Limits) -> tuple[Scenario | None, list[Problem]]:
    """Makes an answer a scenario, or says what is wrong with it: form, lints, likeness to the scenarios already taken."""
    row = parse_answer(text)
    if row is None:
        return None, [Problem(identity, "not JSON", "the answer holds no complete JSON object")]
    events = row.get("event", row.get("events", row))
    if isinstance(events, dict):
        events = {name: " ".join(item.split()) if isinstance(item, str) else item for name, item in events.items()}
    told = row.get("scenario")
    told = " ".join(told.split()) if isinstance(told, str) else told
    try:
        scenario = parse_scenario({"skeleton_id": identity, "theme": theme, "scenario": told, "event": events}, "the answer")
    except DataError as error:
        return None, [Problem(identity, "form", str(error))]
    problems = lint_scenarios([scenario], limits)
    for other in taken:
        # Pair by pair: exact however many there are, and linear in them.
        pair = near_duplicates({other.id: _whole(other), identity: _whole(scenario)}, limits.overlap)
        problems += [Problem(identity, p.rule, f'too close to one that is taken: "{other.text}"') for p in pair]
    return (None if problems else scenario), problems


def _whole(scenario: Scenario) -> str:
    return " ".join([scenario.text, *scenario.events.values()])


def _first_messages(domain: str, theme: str, angle: str, taken: Sequence[Scenario], limits: Limits) -> list[Message]:
    lines = [f"Domain: {domain}", f"Theme: {theme}", f"Start from: {angle}"]
    if taken:
        lines += ["", "These openings are taken; choose another place, another person and another object:"]
        lines += [f"- {' '.join(s.text.split()[:14])} ..." for s in taken[-SHOWN_OPENINGS:]]
    system = SYSTEM.format(scenario=limits.scenario_words, event=limits.event_words)
    user = "\n".join([*lines, "", "Write one item for this domain and theme, as JSON."])
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def _complain(answer: str, problems: Sequence[Problem]) -> list[Message]:
    reasons = "\n".join(f"- {p.rule}: {p.message}" for p in problems)
    fix = "Write it again with all of this mended (for an emotion word: tell what could be seen or heard instead)."
    user = f"This was refused:\n{reasons}\n{fix} Answer with the JSON object only."
    return [{"role": "assistant", "content": answer[:2000].strip() or "(nothing)"}, {"role": "user", "content": user}]


# ---- the file ------------------------------------------------------------------------------------------------------


class _Log:
    """The growing file: read once, then one whole line at a time."""

    #: How each line that was written here starts: what tells a line cut off by a kill from a file of another kind.
    START = b'{"skeleton_id"'

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.created = not path.exists()
            if not self.created and not path.is_file():
                raise UsageError(f"expected --out to name a file, found {path}, which is none")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # no permission? say so before a request is paid for
            self._mend()
        except OSError as error:
            raise write_error(path, error) from error
        self.scenarios = read_scenarios(path) if path.read_bytes().strip() else []
        self.size = path.stat().st_size

    def _mend(self) -> None:
        """Cuts off a last line that a kill left torn; ends a whole one that lacks its line break."""
        data = self.path.read_bytes()
        start = data.rfind(b"\n") + 1
        tail = data[start:]
        if not tail.strip():
            return
        try:
            json.loads(tail)
        except ValueError:
            if tail.startswith(self.START) or self.START.startswith(tail):
                os.truncate(self.path, start)
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")

    def append(self, scenario: Scenario) -> None:
        line = (json.dumps(scenario.to_row(), ensure_ascii=False) + "\n").encode()
        if not self.path.exists() or self.path.stat().st_size != self.size:
            raise EmosteerError(f"{self.path} was changed by somebody else while scenarios were written to it; run one command per file")
        try:
            with self.path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.size)  # what fitted of the line; failing that, the next run cuts it off
            raise write_error(self.path, error) from error
        self.scenarios.append(scenario)
        self.size += len(line)

    def close(self) -> None:
        if self.created and self.size == 0:
            self.path.unlink(missing_ok=True)


# ---- the run -------------------------------------------------------------------------------------------------------


def author_scenarios(
    author: Author,
    domain: str,
    count: int,
    out: Path | str,
    themes: Sequence[str] = THEMES,
    limits: Limits | None = None,
    seed: int = 0,
    attempts: int = 4,
    on_event: Callable[[AuthorEvent], None] | None = None,
) -> AuthorReport:
    """Has scenarios written until `out` holds `count`, each appended as soon as it is accepted; call it again to go on.

    Args:
        domain: what the scenarios are about, in a few words.
        themes: each gets the same share.
        limits: what the lints hold the answers to.
        attempts: answers per scenario; each refused one is followed by the reasons.
        on_event: is told of each answer's fate.

    Returns:
        The counts of this run; Ctrl-C ends it early and sets `interrupted`.

    Raises:
        UsageError: for a domain, count, theme or number of attempts that makes no sense.
        DataError: if `out` holds something else than scenarios.
        EmosteerError: if the author cannot be asked, `PATIENCE` scenarios in a row were given up, or `out` cannot be written. `out`
            keeps what was accepted.
    """
    domain, themes = " ".join(domain.split()), tuple(dict.fromkeys(theme.strip() for theme in themes if theme.strip()))
    slug = re.sub(r"[\W_]+", "-", domain.lower())[:40].strip("-")
    if not slug or not themes:
        raise UsageError(
            f"expected a {'domain in words' if not slug else 'theme'}, found nothing; --domain and --themes say what to write about"
        )
    if count < 1 or attempts < 1:
        raise UsageError(f"expected at least one scenario and one attempt, found {count} and {attempts}")
    log = _Log(Path(out))
    run = _Run(
        author, domain, slug, _shuffled(themes, seed), _shuffled(ANGLES, seed), limits or Limits(), seed, attempts, on_event, log, count
    )
    try:
        run.go()
    except KeyboardInterrupt:
        run.report.interrupted = True
    finally:
        log.close()
    run.report.held = len(log.scenarios)
    return run.report


def _shuffled(items: Sequence[str], seed: int) -> list[str]:
    return random.Random(f"{seed}/{len(items)}").sample(list(items), len(items))


@dataclass
class _Run:
    """The loop of `author_scenarios` and its state."""

    author: Author
    domain: str
    slug: str
    themes: list[str]
    angles: list[str]
    limits: Limits
    seed: int
    attempts: int
    on_event: Callable[[AuthorEvent], None] | None
    log: _Log
    wanted: int
    report: AuthorReport = field(default_factory=AuthorReport)

    def go(self) -> None:
        given_up: Counter[str] = Counter()
        in_a_row = 0
        while (held := len(self.log.scenarios)) < self.wanted:
            # The theme that has least; one that fails falls behind, so that it cannot hold up the others.
            shares = Counter(s.theme for s in self.log.scenarios) + given_up
            theme = min(self.themes, key=lambda name: shares[name])
            scenario = self._one(theme, held + self.report.rejected)
            if scenario is not None:
                self.log.append(scenario)
                self.report.accepted += 1
                in_a_row = 0
                self._tell("accepted", scenario.text)
                continue
            given_up[theme] += 1
            self.report.rejected += 1
            in_a_row += 1
            self._tell("rejected", f"given up after {self.attempts} answers")
            if in_a_row == PATIENCE:
                why = ", ".join(f"{rule} x{n}" for rule, n in self.report.reasons.most_common())
                raise EmosteerError(
                    f"stopped after {PATIENCE} scenarios in a row were given up ({why}); {self._kept()}, perhaps with another --model"
                )

    def _one(self, theme: str, turn: int) -> Scenario | None:
        """One scenario, or None when every attempt was refused."""
        taken = self.log.scenarios
        numbers = [int(m[1]) for s in taken if (m := re.fullmatch(re.escape(self.slug) + r"-(\d{1,9})", s.id))]
        identity = f"{self.slug}-{max(numbers, default=0) + 1:04d}"
        angle = self.angles[(turn + turn // len(self.angles)) % len(self.angles)]
        messages = _first_messages(self.domain, theme, angle, taken, self.limits)
        for attempt in range(self.attempts):
            try:
                answer = self.author.write(AuthorRequest(tuple(messages), self.seed + 1000 * turn + attempt))
            except EmosteerError as error:
                raise type(error)(f"{error}; {self._kept()}") from error
            self.report.attempts += 1
            scenario, problems = check_answer(answer, identity, theme, taken, self.limits)
            if scenario is not None:
                return scenario
            self.report.reasons.update({p.rule for p in problems})
            self._tell("refused", "; ".join(f"{p.rule}: {p.message}" for p in problems))
            messages += _complain(answer, problems)
        return None

    def _kept(self) -> str:
        return f"{self.log.path} keeps {len(self.log.scenarios)} of {self.wanted} scenarios: run the same command again to go on"

    def _tell(self, kind: str, message: str) -> None:
        if self.on_event is not None:
            self.on_event(AuthorEvent(kind, len(self.log.scenarios), self.wanted, message))
