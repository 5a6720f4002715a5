"""The thread that writes: it alone uses the model. Requests come in from elsewhere, join the running batch in their order, and are told
what is written as it comes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from emosteer.base.errors import EmosteerError
from emosteer.base.progress import note
from emosteer.generation.kv_cache import position_bytes
from emosteer.generation.running_batch import Ask, RunningBatch, Written
from emosteer.generation.streaming import RowText
from emosteer.models.memory import is_out_of_memory, release_memory
from emosteer.models.model import Model
from emosteer.models.sites import Site
from emosteer.models.tokens import lead_in, raw_text
from emosteer.serving.errors import RequestError, busy, stopping, too_late
from emosteer.serving.metrics import Metrics
from emosteer.serving.settings import ServeSettings
from emosteer.serving.stop_strings import StopStrings

Result = TypeVar("Result")
#: While half of the places are taken or more, others join every so many steps: prompts that are read together share their beginnings, and
#: large products are faster than small ones.
JOIN_EVERY = 4
#: Tokens of prompts after which the others wait for the next step: whoever is written for waits while prompts are read.
READ_AT_ONCE = 512
#: Seconds of idleness after which freed memory goes back to the system.
IDLE = 5.0


@dataclass(frozen=True)
class Part:
    """The next part of a reply. tokens: those that are new, with their log-probabilities where they were asked for; ended: "stop" or
    "length" in the last one; error: instead of all that, why there is no more."""

    text: str = ""
    tokens: tuple[Written, ...] = ()
    ended: str | None = None
    error: RequestError | None = None


@dataclass(eq=False)
class Writing:
    """One reply on its way. deliver: is given its parts, from the writer's thread; raw: whether white space at the ends belongs to it."""

    ask: Ask
    deliver: Callable[[Part], None]
    stops: tuple[str, ...] = ()
    raw: bool = False
    arrived: float = field(default_factory=time.monotonic)
    n_tokens: int = 0
    ticket: int = -1
    gone: bool = False

    @property
    def positions(self) -> int:
        """Of the cache, at most."""
        return max(len(self.ask.request.ids), len(self.ask.request.empty)) + self.ask.decoding.max_new_tokens

    @property
    def rows(self) -> int:
        """Rows of the model's batch."""
        return 1 + self.ask.decoding.guides


@dataclass(eq=False)
class _Call:
    """Something that is to be done with the model between two steps."""

    work: Callable[[], Any]
    arrived: float
    future: Future[Any] = field(default_factory=Future)

    def answer(self) -> None:
        """Does it, unless nobody waits for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except BaseException as error:
            self.future.set_exception(error)

    def refuse(self, error: RequestError) -> None:
        """Says why it is not done, unless nobody waits for it any more: a future that was cancelled takes no exception."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class _Text:
    """A reply's text as it comes: tokens to characters, up to a stop sequence, which white space may be. At the end of a reply that is not
    raw white space waits: it goes if nothing follows it."""

    def __init__(self, model: Model, writing: Writing) -> None:
        before = lead_in(model.tokenizer, writing.ask.request.ids) if writing.raw else ()

        def read(tokenizer: Any, ids: Sequence[int]) -> str:
            text = raw_text(tokenizer, ids, before)
            return text if writing.raw else text.lstrip()

        self.row = RowText(model.tokenizer, read)
        self.stops = StopStrings(writing.stops)
        self.raw, self.held = writing.raw, ""

    def part(self, written: Written) -> Part:
        """What a step brought."""
        text = self.stops.push(self.row.push(written.token)) if written.token is not None else ""
        tokens = () if written.token is None else (written,)
        if not self.stops.stopped and written.ended:
            text += self.stops.push(self.row.rest())
            text += "" if self.stops.stopped else self.stops.rest()
        text = self.held + text
        sent = text if self.raw or self.stops.stopped else text.rstrip()
        self.held = text[len(sent) :]
        return Part(sent, tokens, "stop" if self.stops.stopped else written.ended)


class WriterThread:
    """Writes for everybody. All methods may be called from any thread."""

    def __init__(self, model: Model, vectors: Mapping[Site, Tensor], settings: ServeSettings, metrics: Metrics) -> None:
        """vectors: site -> [emotion, d_model], at strength 1."""
        self.model, self.settings, self.metrics = model, settings, metrics
        self.cells = int(settings.cache_gb * 2**30 / position_bytes(model.shape, model.dtype))
        self.batch = RunningBatch(model, vectors, self.cells)
        self._changed = threading.Condition()
        self._waiting: deque[Writing] = deque()
        self._calls: deque[_Call] = deque()
        self._running: dict[int, tuple[Writing, _Text]] = {}
        self._since = 0  # steps since anybody joined
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    # ---- from elsewhere ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to write."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the step that is being taken; whoever is not finished is told so."""
        with self._changed:
            self._stop = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether anybody writes."""
        return self._thread.is_alive()

    @property
    def n_waiting(self) -> int:
        """Replies that wait for their turn."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Replies that are being written."""
        return len(self._running)

    def submit(self, *writings: Writing) -> None:
        """Takes replies in, all or none.

        Raises:
            RequestError: if the queue is full, one is larger than the memory for keys and values, or the writer is stopping.
        """
        for writing in writings:
            if writing.rows * writing.positions > self.cells:
                limit = self.cells // writing.rows
                message = f"prompt and reply need {writing.positions} positions, of which the server has memory for {limit} (--cache-gb)"
                raise RequestError(message, code="context_length_exceeded")
        with self._changed:
            if self._stop or not self.alive:
                raise stopping()
            free = self.settings.max_batch - len(self._running)
            if len(self._waiting) + len(writings) > self.settings.max_queue + max(free, 0):
                raise busy(len(self._waiting))
            self._waiting.extend(writings)
            self._changed.notify()

    def cancel(self, *writings: Writing) -> None:
        """Lets replies go; of those that are finished nothing remains to be let go."""
        with self._changed:
            for writing in writings:
                writing.gone = True
            self._changed.notify()

    def call(self, work: Callable[[], Result], arrived: float | None = None) -> Future[Result]:
        """Has something done with the model between two steps, one such call in each, unless the future is cancelled before its turn.

        Args:
            arrived: when the request came (`time.monotonic`), from which on its time is counted; now, where nothing is said.

        Raises:
            RequestError: if as many calls are waiting as replies may, or the writer is stopping.
        """
        call = _Call(work, time.monotonic() if arrived is None else arrived)
        with self._changed:
            if self._stop or not self.alive:
                raise stopping()
            self._forget_cancelled()
            if len(self._calls) > self.settings.max_queue:  # one of them is next, and waits for nobody
                raise busy(len(self._calls), "calls")
            self._calls.append(call)
            self._changed.notify()
        return call.future

    def _forget_cancelled(self) -> None:
        self._calls = deque(call for call in self._calls if not call.future.cancelled())

    # ---- the thread ----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_work():
                try:
                    self._go_on()
                except (Exception, SystemExit) as error:  # whatever it is, the next requests are to be served
                    self._fail(error)
        finally:
            self._say_farewell()

    def _has_work(self) -> bool:
        """Waits for something to do; false at the end."""
        with self._changed:
            patience: float | None = IDLE
            # Whoever comes between the end of the patience and the next wait notifies nobody: so all is looked at again before each.
            while not (self._stop or self._waiting or self._calls or self._running):
                if not self._changed.wait(patience):
                    release_memory()
                    patience = None
            return not self._stop

    def _go_on(self) -> None:
        self._let_go()
        with self._changed:
            call = self._calls.popleft() if self._calls else None
        if call is not None:  # one alone: all who are written for wait meanwhile
            call.answer()
        self._admit()
        self._step()

    def _say_farewell(self) -> None:
        with self._changed:
            self._stop = True  # from here on nobody comes in, also where it was not told to stop
        for writing in self._all():
            writing.deliver(Part(error=stopping()))
        for call in self._calls:
            call.refuse(stopping())
        self._calls.clear()
        self._waiting.clear()
        self._running.clear()
        self.batch.clear()

    def _all(self) -> list[Writing]:
        """Everybody who is not finished."""
        with self._changed:
            return [*self._waiting, *(writing for writing, _ in self._running.values())]

    def _let_go(self) -> None:
        """Those whose client has left, and those whose time is over."""
        now, limit = time.monotonic(), self.settings.timeout
        for writing in self._all():
            late = now - writing.arrived > limit
            if not (writing.gone or late):
                continue
            if writing.ticket >= 0:
                self.batch.cancel(writing.ticket)
                del self._running[writing.ticket]
            else:
                with self._changed:
                    self._waiting.remove(writing)
            self.metrics.cancelled.labels("timeout" if late else "client").inc()
            if late and not writing.gone:
                writing.deliver(Part(error=too_late(limit)))
        with self._changed:
            self._forget_cancelled()
            overdue = [call for call in self._calls if now - call.arrived > limit]
            self._calls = deque(call for call in self._calls if now - call.arrived <= limit)
        for call in overdue:
            call.refuse(too_late(limit))

    def _fits(self, writing: Writing) -> bool:
        """Whether there is room for one more, in the order in which they came."""
        if not self._running:
            return True
        if len(self._running) >= self.settings.max_batch:
            return False
        longest = max(writing.positions, *(other.positions for other, _ in self._running.values()))
        return (self.batch.n_rows + writing.rows) * longest <= self.cells

    def _admit(self) -> None:
        self._since += 1
        if 2 * len(self._running) >= self.settings.max_batch and self._since < JOIN_EVERY:
            return
        unread = READ_AT_ONCE
        while self._waiting and unread > 0 and self._fits(self._waiting[0]):
            with self._changed:
                writing = self._waiting.popleft()
            unread -= len(writing.ask.request.ids)
            try:
                text = _Text(self.model, writing)
                writing.ticket = self.batch.join(writing.ask)
            except EmosteerError as error:
                writing.deliver(Part(error=RequestError(str(error), code="context_length_exceeded")))
                continue
            except (Exception, SystemExit) as error:  # it is in no list at the moment, so that nobody else tells it
                writing.deliver(Part(error=_given_up(error)))
                raise
            self._running[writing.ticket] = writing, text
            self._since = 0 if unread > 0 else JOIN_EVERY  # whoever waits for the reading alone joins before the next step
            self.metrics.waited.observe(time.monotonic() - writing.arrived)

    def _step(self) -> None:
        if not self._running:
            return
        begun = time.monotonic()
        found = self.batch.step()
        self.metrics.steps.observe(time.monotonic() - begun)
        self.metrics.tokens.inc(sum(written.token is not None for written in found))
        for written in found:
            writing, text = self._running[written.ticket]
            part = text.part(written)
            writing.n_tokens += len(part.tokens)
            if writing.n_tokens == 1 and part.tokens:
                self.metrics.first.observe(time.monotonic() - writing.arrived)
            if part.ended:
                if not written.ended:  # a stop sequence, of which the batch knows nothing
                    self.batch.cancel(written.ticket)
                del self._running[written.ticket]
            if not writing.gone:
                writing.deliver(part)

    def _fail(self, error: BaseException) -> None:
        """Nobody's reply can go on: the rows share their step. All are told before anything else, which may fail as well."""
        for writing, _ in self._running.values():
            writing.deliver(Part(error=_given_up(error)))
        self._running.clear()
        self.batch.clear()
        with contextlib.suppress(Exception, SystemExit):  # nobody reads what is noted any more
            note(f"the step failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); its replies are given up")


def _given_up(error: BaseException) -> RequestError:
    """What is told of an error of the model's."""
    lacking = is_out_of_memory(error)
    message = "out of memory; try fewer requests at a time (--max-batch, --cache-gb)" if lacking else "the model failed in this step"
    return RequestError(message, status=503 if lacking else 500, code="step_failed")
