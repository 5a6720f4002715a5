"""A server on a tiny model, on a real port, in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn

from emosteer.api.steered_model import SteeredModel
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.judges.reader import Reader
from emosteer.serving.run import application, listen
from emosteer.serving.settings import ServeSettings
from emosteer.serving.writer_thread import WriterThread


class WordJudge:
    """Reads "stop" as anger, and all else as neutral."""

    name, key = "words", "1"

    def opinions(self, texts: Sequence[str], done: Any = None) -> list[Opinion]:
        return [Opinion({**dict.fromkeys(LABELS, 0.0), "anger" if "stop" in text else "neutral": 1.0}) for text in texts]

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        return [Soundness(True, (), 0.0) for _ in texts]


def word_reading() -> Reader:
    """A reader by that judge."""
    reading = Reader("words")
    judge = WordJudge()
    reading._loaded = judge, judge
    return reading


@dataclass(frozen=True)
class Running:
    """A server that runs. url: without a path."""

    url: str
    writer: WriterThread
    server: uvicorn.Server


@contextlib.contextmanager
def running(steered: SteeredModel, **settings: Any) -> Iterator[Running]:
    """Serves for the length of the block."""
    assert steered.circuit is not None
    chosen = ServeSettings(port=0, **settings)
    app, writer = application(steered.model, steered.circuit, chosen, word_reading())
    socket = listen(chosen)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < until and thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", writer, server)
    finally:
        server.should_exit = True
        thread.join(30)
        socket.close()
        assert not thread.is_alive() and not writer.alive


def settles(done: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits until something is so, and fails where it does not come about."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)
