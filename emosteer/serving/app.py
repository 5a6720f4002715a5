"""The server: routes, streams, and what is said when something is wrong. `make_app` is an ASGI application; `run` serves it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emosteer.base.progress import note
from emosteer.judges.reader import Reader
from emosteer.serving.answers import Answer
from emosteer.serving.asking import Served, Wanted, chat_asks, completion_asks
from emosteer.serving.describing import described, models_of
from emosteer.serving.errors import RequestError
from emosteer.serving.guard import HEADERS, check_number, check_request, read_body
from emosteer.serving.metrics import Metrics
from emosteer.serving.readings import reading_of
from emosteer.serving.requests import ChatRequest, CompletionRequest, ReadingRequest, Writes, parse
from emosteer.serving.settings import ServeSettings
from emosteer.serving.writer_thread import Part, WriterThread, Writing

PLAYGROUND = Path(__file__).parent / "playground"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Result = TypeVar("Result")


class Server:
    """What the routes share."""

    def __init__(self, served: Served, writer: WriterThread, reader: Reader, metrics: Metrics, settings: ServeSettings) -> None:
        self.served, self.writer, self.reader, self.metrics, self.settings = served, writer, reader, metrics, settings
        self.mailbox: _Mailbox | None = None

    # ---- completions -----------------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        arrived, wanted = time.monotonic(), parse(ChatRequest, await read_body(request, self.settings))
        check_number(wanted.n or 1, 1, self.settings)
        asked = await self._prepared(request, arrived, lambda: chat_asks(self.served, wanted), wanted.personality is not None)
        usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        return await self._answer(request, arrived, wanted, asked, usage, chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions"""
        arrived, wanted = time.monotonic(), parse(CompletionRequest, await read_body(request, self.settings))
        check_number(wanted.n or 1, 1 if isinstance(wanted.prompt, str) else len(wanted.prompt), self.settings)
        asked = await self._prepared(request, arrived, lambda: completion_asks(self.served, wanted), wanted.personality is not None)
        usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        return await self._answer(request, arrived, wanted, asked, usage, chat=False)

    async def _prepared(self, request: Request, arrived: float, prepare: Callable[[], Wanted], judged: bool) -> Wanted:
        """What a request asks for; where a judge has to read for it, between two steps."""
        return await self._called(request, arrived, prepare) if judged else prepare()

    async def _called(self, request: Request, arrived: float, work: Callable[[], Result]) -> Result:
        """What the writer's thread does for a request, unless its client leaves before that."""
        return await _unless_left(request, asyncio.wrap_future(self.writer.call(work, arrived)))

    async def _answer(self, request: Request, arrived: float, wanted: Writes, asked: Wanted, usage: bool, *, chat: bool) -> Response:
        answer = Answer(self.served.model.tokenizer, wanted.model, asked, chat=chat)
        parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self.mailbox = self.mailbox or _Mailbox(asyncio.get_running_loop())
        writings = [
            Writing(ask, self.mailbox.deliverer(parts, index), wanted.stops, raw=not chat, arrived=arrived)
            for index, ask in enumerate(asked.asks)
        ]
        self.writer.submit(*writings)
        if wanted.stream:
            return _Stream(self._events(answer, parts, len(writings), usage), lambda: self.writer.cancel(*writings))
        try:
            return JSONResponse(await _unless_left(request, asyncio.ensure_future(self._collect(answer, parts, writings))))
        finally:
            self.writer.cancel(*writings)

    async def _collect(self, answer: Answer, parts: asyncio.Queue[tuple[int, Part]], writings: Sequence[Writing]) -> dict[str, Any]:
        left = len(writings)
        while left:
            index, part = await parts.get()
            if part.error is not None:
                raise part.error
            answer.choices[index].add(part)
            left -= part.ended is not None
        return answer.whole()

    async def _events(self, answer: Answer, parts: asyncio.Queue[tuple[int, Part]], left: int, usage: bool) -> AsyncIterator[str]:
        """The pieces as server-sent events."""
        for first in answer.first():
            yield _event(first)
        while left:
            index, part = await parts.get()
            if part.error is not None:
                yield _event(part.error.body())
                return
            left -= part.ended is not None
            if (piece := answer.piece(index, part)) is not None:
                yield _event(piece)
        if usage:
            yield _event(answer.last())
        yield "data: [DONE]\n\n"

    # ---- what is there -----------------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": models_of(self.served)})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        name = request.path_params["name"]
        for entry in models_of(self.served):
            if entry["id"] == name:
                return JSONResponse(entry)
        raise RequestError(f"the model '{name[:60]}' does not exist here", status=404, param="model", code="model_not_found")

    async def emotions(self, request: Request) -> Response:
        """GET /v1/emotions"""
        return JSONResponse(described(self.served, self.settings))

    async def readings(self, request: Request) -> Response:
        """POST /v1/readings"""
        arrived, wanted = time.monotonic(), parse(ReadingRequest, await read_body(request, self.settings))
        return JSONResponse(await self._called(request, arrived, reading_of(self.served, self.reader, wanted)))

    async def health(self, request: Request) -> Response:
        """GET /healthz"""
        alive = self.writer.alive
        state = {"status": "ok" if alive else "stopped", "running": self.writer.n_running, "waiting": self.writer.n_waiting}
        return JSONResponse(state, status_code=200 if alive else 503)

    async def counters(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ---- every request -------------------------------------------------------------------------------------------------------------

    def guarded(self, handler: Handler) -> Handler:
        """A handler behind the guard, whose refusals are error objects and whose faults are none of the client's business."""

        async def handle(request: Request) -> Response:
            try:
                check_request(request, self.settings)
                return await handler(request)
            except RequestError as error:
                return refusal(error)
            except HTTPException as error:
                return refusal(RequestError(str(error.detail), status=error.status_code))
            except Exception as error:
                note(f"{request.url.path}: unexpected {type(error).__name__}: {str(error)[:200]}")
                return refusal(RequestError("the server failed", status=500))

        return handle


class _Stream(StreamingResponse):
    """Server-sent events. However it ends, a client that went away included, `over` is called."""

    def __init__(self, body: AsyncIterator[str], over: Callable[[], None]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.over()


def refusal(error: RequestError) -> JSONResponse:
    """A refusal as it is sent."""
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(error.status, {})
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class _Mailbox:
    """Carries parts from the writer's thread to the event loop, which is woken once for what a step brings to all replies."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[asyncio.Queue[tuple[int, Part]], tuple[int, Part]]] = deque()
        self._called = False

    def deliverer(self, parts: asyncio.Queue[tuple[int, Part]], index: int) -> Callable[[Part], None]:
        """What puts the parts of one reply into its queue; to be called by the writer's thread alone."""

        def deliver(part: Part) -> None:
            self._posted.append((parts, (index, part)))
            if not self._called:
                self._called = True
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    self._loop.call_soon_threadsafe(self._hand_out)

        return deliver

    def _hand_out(self) -> None:
        self._called = False  # before the parts are taken out: one that is posted from now on may miss them
        while self._posted:
            parts, item = self._posted.popleft()
            parts.put_nowait(item)


async def _unless_left(request: Request, work: asyncio.Future[Result]) -> Result:
    """What some work brings. It is cancelled when the client leaves.

    Raises:
        RequestError: if he did.
    """
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise RequestError("the client left", status=499)
        return await work
    finally:
        work.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Frame:
    """Headers of every answer, and the count of answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def framed(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                new = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *((name, value) for name, value in new if name not in present)]
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, framed)


def make_app(served: Served, writer: WriterThread, reader: Reader, metrics: Metrics, settings: ServeSettings) -> Starlette:
    """The application. It starts the writer, and stops it when it ends."""
    server = Server(served, writer, reader, metrics, settings)

    def page(name: str, kind: str) -> Handler:
        async def send(request: Request) -> Response:
            return FileResponse(PLAYGROUND / name, media_type=kind)

        return send

    table: list[tuple[str, Handler, str]] = [
        ("/v1/chat/completions", server.chat, "POST"),
        ("/v1/completions", server.complete, "POST"),
        ("/v1/readings", server.readings, "POST"),
        ("/v1/models", server.models, "GET"),
        ("/v1/models/{name:path}", server.model, "GET"),
        ("/v1/emotions", server.emotions, "GET"),
        ("/healthz", server.health, "GET"),
        ("/metrics", server.counters, "GET"),
        ("/", page("index.html", "text/html"), "GET"),
        ("/playground.js", page("playground.js", "text/javascript"), "GET"),
        ("/playground.css", page("playground.css", "text/css"), "GET"),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        metrics.watch(lambda: writer.n_running, lambda: writer.n_waiting, lambda: writer.batch.n_rows)
        writer.start()
        try:
            yield
        finally:
            await asyncio.to_thread(writer.stop)

    async def unknown(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        wrong = {404: f"there is nothing at {request.url.path[:80]}", 405: f"{request.method} is not served at {request.url.path[:80]}"}
        return refusal(RequestError(wrong.get(status, "the server failed"), status=status))

    middleware = [Middleware(_Frame, metrics=metrics, paths=frozenset(path for path, _, _ in table))]
    if settings.cors:
        methods, fields = ["GET", "POST"], ["authorization", "content-type"]
        middleware.append(Middleware(CORSMiddleware, allow_origins=list(settings.cors), allow_methods=methods, allow_headers=fields))
    return Starlette(
        routes=[Route(path, server.guarded(handler), methods=[method]) for path, handler, method in table],
        middleware=middleware,
        exception_handlers={404: unknown, 405: unknown, 500: unknown},
        lifespan=lifespan,
    )
