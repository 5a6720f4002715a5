"""A judge behind an OpenAI-compatible endpoint, asked in parallel, cached, retried. No torch here."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emosteer.base.chat_endpoint import Endpoint
from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.base.files import sha256_text
from emosteer.base.jsonl import JsonlLog
from emosteer.base.progress import note
from emosteer.judges.protocol import LABELS, Opinion
from emosteer.judges.questions import PROMPT_VERSION, Question, blind
from emosteer.scenarios.scenarios import NEUTRAL

ANSWER_TOKENS = 2_048


class OpenAIJudge:
    """Any model behind an OpenAI-compatible endpoint. Threads ask, the caller's thread keeps and tells.

    After `patience` requests in a row without a usable answer (30, or 4 per thread) it stops asking: what is left is missing. It stays
    so; a new judge, or the same command again, asks for what is missing and for nothing else.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: Path | None = None,
        parallel: int = 8,
        attempts: int = 3,
        patience: int | None = None,
        timeout: float = 60.0,
        tries: int = 4,
        notify: Callable[[str], None] = note,
        **connection: Any,
    ) -> None:
        """Checks the address and the key and opens the cache; connects to nothing yet.

        Args:
            cache: file that keeps every answer; None keeps them for the life of this judge only.
            attempts: answers per question, each with another seed, before a model that talks nonsense is let off.
            tries: requests per answer where the server fails; `connection`: key_env, backoff and longest_wait of `Endpoint`.

        Raises:
            UsageError: if the address, the key or a number makes no sense. DataError, EmosteerError: if the cache cannot be used.
        """
        patience = max(30, 4 * parallel) if patience is None else patience
        if min(parallel, attempts, patience, tries) < 1:
            raise UsageError("expected parallel, attempts, patience and tries to be at least 1")
        self.endpoint = Endpoint(base_url, model, timeout=timeout, tries=tries, notify=self._pause, **connection)
        self.name = f"openai:{model}"
        self.key = sha256_text(json.dumps([self.endpoint.shown, model, PROMPT_VERSION]))[:16]
        self.parallel, self.attempts, self.patience, self.notify = parallel, attempts, patience, notify
        self._cache = Path(cache) if cache is not None else None
        self._log = JsonlLog(self._cache, first_key="key") if self._cache is not None else None
        self._known = _answers(self._log) if self._log is not None else {}
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._given_up = ""

    def close(self) -> None:
        """Closes the connections; removes a cache that stayed empty."""
        self.endpoint.close()
        if self._log is not None:
            self._log.close()

    # ---- the question ----------------------------------------------------------------------------------------------

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        """One blind opinion per text, in order; a call that failed is one without probabilities. An empty text is neutral, unasked.

        Raises:
            EmosteerError: if the cache cannot be written.
        """
        opinions = [Opinion({label: float(label == NEUTRAL) for label in LABELS})] * len(texts)

        def heard(index: int, answer: Any, problem: str) -> None:
            opinions[index] = Opinion(answer, problem)
            if done is not None:
                done(index, opinions[index])

        asked = {index: blind(text) for index, text in enumerate(texts) if text.strip()}
        if done is not None:
            for index in sorted(set(range(len(texts))) - set(asked)):
                done(index, opinions[index])
        self._ask_all(asked, heard)
        return opinions

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _key_of(self, question: Question) -> str:
        return sha256_text(json.dumps([self.key, question.kind, question.text]))

    def _ask_all(self, questions: Mapping[int, Question], heard: Callable[[int, Any, str], None]) -> None:
        """Tells `heard` (index, answer or None, problem) of every question, known ones first; equal ones are asked once."""
        places: dict[str, list[int]] = {}
        for index, question in questions.items():
            places.setdefault(self._key_of(question), []).append(index)
        for key in places.keys() & self._known.keys():
            for index in places.pop(key):
                heard(index, self._known[key], "")
        for key, answer, problem in self._in_parallel({key: questions[where[0]] for key, where in places.items()}):
            if answer is not None:
                self._keep(key, answer)
            for index in places[key]:
                heard(index, answer, problem)

    def _in_parallel(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Any, str]]:
        """(key, answer or None, problem) as they come. Daemon threads: whoever presses Ctrl-C waits for no slow server."""
        waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[str, Any, str] | BaseException] = queue.SimpleQueue()
        over = threading.Event()
        for key in questions:
            waiting.put(key)

        def work() -> None:
            try:
                while not over.is_set():
                    key = waiting.get_nowait()
                    results.put((key, *self._ask(questions[key])))
            except queue.Empty:
                return
            except BaseException as error:  # whatever it is, the caller must not wait for ever
                results.put(error)

        for _ in range(min(self.parallel, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        try:
            left = set(questions)
            while left:
                try:
                    # once it has stopped asking, what hangs in flight is not waited for
                    result = results.get(timeout=1.0 if self._given_up else None)
                except queue.Empty:
                    break
                if isinstance(result, BaseException):
                    raise result
                left.discard(result[0])
                yield result
            yield from ((key, None, self._given_up) for key in questions if key in left)
        finally:
            over.set()

    def _ask(self, question: Question) -> tuple[Any, str]:
        """(answer, "") or (None, problem)."""
        problem = ""
        for attempt in range(self.attempts):
            if self._given_up:
                return None, self._given_up
            try:
                # a server that is deterministic at temperature 0 would repeat its nonsense
                answer = self.endpoint.chat(
                    question.messages,
                    seed=attempt,
                    temperature=0.0 if attempt == 0 else 0.5,
                    max_tokens=ANSWER_TOKENS,
                    json_mode=True,
                    schema=question.schema,
                )
            except EmosteerError as error:
                problem = str(error).encode("utf-8", "replace").decode("utf-8")  # a server may send half a character
                self._failed(problem)
                return None, self._given_up or problem
            try:
                parsed = question.parse(answer)
            except ValueError as error:
                problem = f"{self.endpoint.model} gave no usable answer, {self.attempts} times (last: {error})"
                self._failed(problem)
                continue
            with self._lock:
                self._in_a_row = 0
            return parsed, ""
        return None, problem

    def _pause(self, message: str) -> None:
        """Told of every failed request that would be tried again; being told to slow down is no failure."""
        if not message.startswith("answered 429"):
            self._failed(f"{self.endpoint.shown} {message.rsplit(';', 1)[0]}")
        if self._given_up:
            raise EmosteerError(self._given_up)

    def _failed(self, problem: str) -> None:
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row < self.patience or self._given_up:
                return
            self._given_up = f"the judge stopped after {self._in_a_row} failed requests in a row (last: {problem})"
            self.notify(f"{self._given_up}; what is left is missing, the same command again asks for it")

    def _keep(self, key: str, answer: Any) -> None:
        """Puts an answer on disk; takes in what another process has added meanwhile.

        Raises:
            EmosteerError: if the disk is full or the file has become something else.
        """
        self._known[key] = answer
        if self._log is None or self._cache is None:
            return
        row = {"key": key, "judge": self.name, "answer": answer}
        try:
            self._log.append(row)
        except EmosteerError:
            self._log = JsonlLog(self._cache, first_key="key")  # where it is the disk, this fails in the same way
            self._known = _answers(self._log) | self._known
            self._log.append(row)


def _answers(log: JsonlLog) -> dict[str, Any]:
    """What a cache holds, by key; booleans answer a yes/no question that earlier versions could ask.

    Raises:
        DataError: if a line is no answer of a judge.
    """
    for number, row in enumerate(log.rows, 1):
        if not isinstance(row.get("key"), str) or not isinstance(row.get("answer"), (dict, bool)):
            raise DataError(
                f"expected a judge's answers (key, answer) in {log.path}, found something else in row {number}; name another --cache"
            )
    return {row["key"]: row["answer"] for row in log.rows}
