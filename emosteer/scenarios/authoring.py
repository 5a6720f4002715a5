"""New scenarios for a user's own domain, written by a language model: linted, kept one by one, resumable. No torch here.

Every answer is checked before it counts. What was wrong with a refused one goes back to the author, in the same
conversation; what was accepted is on the disk before the next request leaves.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from emosteer.base.chat_endpoint import Endpoint, Message, json_objects
from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.base.jsonl import JsonlLog
from emosteer.scenarios.author_prompts import ANGLES, THEMES, complain, first_messages
from emosteer.scenarios.lints import Limits, Problem, lint_scenarios, near_duplicates
from emosteer.scenarios.scenarios import Scenario, parse_scenario, read_scenarios

__all__ = ["ANGLES", "PATIENCE", "THEMES", "ScenarioAuthor", "AuthorEvent", "AuthorReport", "AuthorRequest", "LocalAuthor", "OpenAIAuthor"]
__all__ += ["author_scenarios", "check_answer", "parse_answer"]

#: So many scenarios given up in a row mean that the author cannot do it; going on would only cost.
PATIENCE = 5
ANSWER_TOKENS = 2048


@dataclass(frozen=True)
class AuthorRequest:
    """One conversation to continue. messages: chat messages, the last one the user's; seed: another one for every request."""

    messages: tuple[Message, ...]
    seed: int


class ScenarioAuthor(Protocol):
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


class OpenAIAuthor:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, base_url: str, model: str, *, temperature: float = 0.9, **connection: Any) -> None:
        """Checks the address and the key; connects to nothing yet.

        Args:
            connection: key_env, timeout, tries, backoff, longest_wait and notify of `Endpoint`.

        Raises:
            UsageError: if the address is no http(s) URL or the key cannot be sent in a header.
        """
        self.endpoint, self.temperature = Endpoint(base_url, model, **connection), temperature

    def close(self) -> None:
        """Closes the connections."""
        self.endpoint.close()

    def write(self, request: AuthorRequest) -> str:
        """Asks until there is an answer.

        Raises:
            EmosteerError: at once if asking again cannot help, otherwise after the endpoint's number of tries.
        """
        return self.endpoint.chat(
            request.messages, seed=request.seed, temperature=self.temperature, max_tokens=ANSWER_TOKENS, json_mode=True
        )


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


# ---- one answer ----------------------------------------------------------------------------------------------------


def parse_answer(text: str) -> dict[str, Any] | None:
    """The first JSON object with a "scenario" (else the first at all) in an answer; fences, prose and thoughts around it are ignored."""
    objects = list(json_objects(text))
    return next((value for value in objects if "scenario" in value), objects[0] if objects else None)


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
        pair = pair or near_duplicates({other.id: other.text, identity: scenario.text}, limits.overlap)
        problems += [Problem(identity, p.rule, f'too close to one that is taken: "{other.text}"') for p in pair]
    return (None if problems else scenario), problems


def _whole(scenario: Scenario) -> str:
    return " ".join([scenario.text, *scenario.events.values()])


# ---- the run -------------------------------------------------------------------------------------------------------


def author_scenarios(
    author: ScenarioAuthor,
    domain: str,
    count: int,
    out: Path | str,
    themes: Sequence[str] = THEMES,
    limits: Limits | None = None,
    seed: int = 0,
    attempts: int = 4,
    on_event: Callable[[AuthorEvent], None] | None = None,
) -> AuthorReport:
    """Has scenarios written until `out` holds `count`, each appended as soon as it is accepted; call it again to continue.

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
    log = JsonlLog(Path(out), first_key="skeleton_id")
    run = _Run(
        author, domain, slug, _shuffled(themes, seed), _shuffled(ANGLES, seed), limits or Limits(), seed, attempts, on_event, log, count
    )
    try:
        run.go()
    except KeyboardInterrupt:
        run.report.interrupted = True
    finally:
        log.close()
    run.report.held = len(run.taken)
    return run.report


def _shuffled(items: Sequence[str], seed: int) -> list[str]:
    return random.Random(f"{seed}/{len(items)}").sample(list(items), len(items))


@dataclass
class _Run:
    """The loop of `author_scenarios` and its state. taken: the scenarios in the file."""

    author: ScenarioAuthor
    domain: str
    slug: str
    themes: list[str]
    angles: list[str]
    limits: Limits
    seed: int
    attempts: int
    on_event: Callable[[AuthorEvent], None] | None
    log: JsonlLog
    wanted: int
    report: AuthorReport = field(default_factory=AuthorReport)
    taken: list[Scenario] = field(init=False)

    def __post_init__(self) -> None:
        self.taken = read_scenarios(self.log.path) if self.log.rows else []

    def go(self) -> None:
        given_up: Counter[str] = Counter()
        in_a_row = 0
        while (held := len(self.taken)) < self.wanted:
            # The theme that has least; one that fails falls behind, so that it cannot hold up the others.
            shares = Counter(s.theme for s in self.taken) + given_up
            theme = min(self.themes, key=lambda name: shares[name])
            scenario = self._one(theme, held + self.report.rejected)
            if scenario is not None:
                self.log.append(scenario.to_row())
                self.taken.append(scenario)
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
        numbers = [int(m[1]) for s in self.taken if (m := re.fullmatch(re.escape(self.slug) + r"-(\d{1,9})", s.id))]
        identity = f"{self.slug}-{max(numbers, default=0) + 1:04d}"
        angle = self.angles[(turn + turn // len(self.angles)) % len(self.angles)]
        messages = first_messages(self.domain, theme, angle, self.taken, self.limits)
        for attempt in range(self.attempts):
            try:
                answer = self.author.write(AuthorRequest(tuple(messages), self.seed + 1000 * turn + attempt))
            except EmosteerError as error:
                raise type(error)(f"{error}; {self._kept()}") from error
            self.report.attempts += 1
            scenario, problems = check_answer(answer, identity, theme, self.taken, self.limits)
            if scenario is not None:
                return scenario
            self.report.reasons.update({p.rule for p in problems})
            self._tell("refused", "; ".join(f"{p.rule}: {p.message}" for p in problems))
            messages += complain(answer, problems)
        return None

    def _kept(self) -> str:
        return f"{self.log.path} keeps {len(self.taken)} of {self.wanted} scenarios: run the same command again to go on"

    def _tell(self, kind: str, message: str) -> None:
        if self.on_event is not None:
            self.on_event(AuthorEvent(kind, len(self.taken), self.wanted, message))
