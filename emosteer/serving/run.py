"""Serves a model and its circuit until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from emosteer.base import stopping
from emosteer.base.errors import EmosteerError
from emosteer.base.progress import note
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import Part
from emosteer.judges.reader import Reader
from emosteer.models.model import Model
from emosteer.serving.app import make_app
from emosteer.serving.asking import Served
from emosteer.serving.metrics import Metrics
from emosteer.serving.settings import ServeSettings
from emosteer.serving.writer_thread import WriterThread


def application(model: Model, circuit: Circuit, settings: ServeSettings, reader: Reader | None = None) -> tuple[Any, WriterThread]:
    """The application of a server, and who writes for it."""
    reads, metrics = reader or Reader(settings.judge), Metrics()
    longest = max(1, min(settings.max_tokens, model.shape.context - 1))
    served = Served(model, circuit, model.name, longest, reads.shares)
    writer = WriterThread(model, circuit.added(Part.UNITS, model), settings, metrics)
    return make_app(served, writer, reads, metrics, settings), writer


def serve(model: Model, circuit: Circuit, settings: ServeSettings, ready: Callable[[str], None]) -> None:
    """Serves. SIGINT and SIGTERM end it: nobody new is let in, and running replies have `settings.grace` seconds to be finished.

    Args:
        ready: is told the address once clients can come.

    Raises:
        EmosteerError: if the address cannot be had.
    """
    app, _ = application(model, circuit, settings)
    listening = listen(settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.grace)),
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = uvicorn.Server(config)

    def end(*_: object) -> None:
        server.should_exit = True

    with stopping.handed_over():
        # uvicorn ends on these signals and then raises them again, for whoever was there before it: for us all is done by then. One that
        # comes before uvicorn listens to them counts as well.
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            host, port = listening.getsockname()[:2]
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            server.run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            listening.close()
    note("stopped")


def listen(settings: ServeSettings) -> socket.socket:
    """The socket of an address.

    Raises:
        EmosteerError: if it is taken, or not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        found = socket.create_server(address[:2], family=family, backlog=512)
        # asyncio sets it only on sockets whose protocol was named; without it every answer waits 40 ms for an acknowledgement
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise EmosteerError(f"cannot listen at {settings.host}:{settings.port}: {error.strerror or error}; try another --port") from None
    return found
