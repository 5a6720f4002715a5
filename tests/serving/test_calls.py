"""What is asked of the writer's thread beside replies (readings, judged turns): it is bounded as these are, takes turns with the steps, and
is not done for somebody who has left; and a reading's cost grows as its reply does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="starlette is not installed; it comes with emosteer[serve]")

from emosteer.api.steered_model import SteeredModel  # noqa: E402
from emosteer.serving import readings  # noqa: E402
from emosteer.serving.errors import RequestError  # noqa: E402
from emosteer.serving.readings import MOST_DECODED, pieces_of  # noqa: E402
from emosteer.serving.writer_thread import WriterThread  # noqa: E402
from tests.helpers.dialled import endless_model  # noqa: E402
from tests.helpers.server import Running, running, settles  # noqa: E402

MESSAGES = [{"role": "user", "content": "the boss said stop"}]
READING = {"messages": MESSAGES, "reply": "stop the train"}


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return endless_model()


@pytest.fixture
def served(steered: SteeredModel) -> Iterator[Running]:
    with running(steered, max_batch=2, max_queue=2) as server:
        yield server


def held_up(writer: WriterThread) -> threading.Event:
    """The thread is busy from now on until the event is set."""
    begun, held = threading.Event(), threading.Event()
    writer.call(lambda: (begun.set(), held.wait(60)))
    assert begun.wait(60)
    return held


def test_more_calls_than_may_wait_are_refused(served: Running) -> None:
    held = held_up(served.writer)
    waiting = [served.writer.call(lambda number=number: number) for number in range(3)]  # one is next, two wait
    for path, body in (
        ("readings", READING),
        ("chat/completions", {"model": "tiny-llama", "messages": MESSAGES, "personality": "neutral"}),
    ):
        answer = httpx.post(f"{served.url}/v1/{path}", json=body, timeout=30)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"]
    waiting[1].cancel()
    waiting.append(served.writer.call(lambda: 3))  # whoever has left takes no place
    held.set()
    assert [call.result(60) for call in waiting if not call.cancelled()] == [0, 2, 3]


def test_one_call_is_done_in_each_step(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, done = served.writer.batch, list[str]()
    step = batch.step
    monkeypatch.setattr(batch, "step", lambda: (done.append("step"), time.sleep(0.02), step())[2])
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": 40}
        answer = pool.submit(httpx.post, served.url + "/v1/chat/completions", json=body, timeout=60)
        settles(lambda: served.writer.n_running == 1)
        calls = [served.writer.call(lambda: done.append("call")) for _ in range(3)]
        assert answer.result().status_code == 200
    assert all(call.done() for call in calls)
    places = [place for place, what in enumerate(done) if what == "call"]
    assert len(places) == 3 and all(later - earlier >= 2 for earlier, later in zip(places, places[1:], strict=False)), done


def test_nothing_is_read_for_a_client_that_has_left(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    read, seen = readings.read_tokens, list[int]()
    monkeypatch.setattr(readings, "read_tokens", lambda *rest: (seen.append(1), read(*rest))[1])
    held = held_up(served.writer)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/v1/readings", json=READING, timeout=httpx.Timeout(5, read=0.3))
    settles(lambda: all(call.future.cancelled() for call in served.writer._calls))
    held.set()
    assert served.writer.call(lambda: len(seen)).result(60) == 0
    assert httpx.post(served.url + "/v1/readings", json=READING, timeout=30).status_code == 200 and len(seen) == 1


def test_a_call_whose_time_is_over_is_not_done(served: Running) -> None:
    held = held_up(served.writer)
    served.writer.settings = replace(served.writer.settings, timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, served.url + "/v1/readings", json=READING, timeout=60)
        settles(lambda: len(served.writer._calls) == 1)
        time.sleep(0.3)
        held.set()
        assert answer.result().status_code == 503 and answer.result().json()["error"]["code"] == "timeout"


def test_whoever_waits_when_it_stops_is_told_so(steered: SteeredModel) -> None:
    """Also beside a call that was cancelled, which takes no answer."""
    waiting: list[Future[Any]] = []
    with running(steered) as server:
        held = held_up(server.writer)
        waiting += [server.writer.call(lambda: None) for _ in range(3)]
        waiting[1].cancel()
        server.writer._stop = True
        held.set()
        settles(lambda: not server.writer.alive)
        assert not server.writer._calls
    for call, error in zip(waiting, (RequestError, CancelledError, RequestError), strict=True):
        with pytest.raises(error):
            call.result(0)


class Bytes:
    """A tokenizer whose tokens are bytes, and beyond them words; it counts what it decodes."""

    WORDS = (" the", " train", "\u00e9t", "\N{CAT FACE}")

    def __init__(self) -> None:
        self.n_decoded = 0

    def decode(self, ids: list[int]) -> str:
        self.n_decoded += len(ids)
        return b"".join(bytes([one]) if one < 256 else self.WORDS[one - 256].encode() for one in ids).decode(errors="replace")


@pytest.mark.parametrize(
    "ids",
    [
        [256, 257, *"caf\u00e9 \N{CAT FACE}".encode(), 258, 259, 0xC3],
        [0xF0, 0x9F, 256, 0x90, 0xB1, 257],
        [256, *[0xFF] * 3 * MOST_DECODED, *"\N{CAT FACE}".encode(), 257],
        [256, *"\N{REPLACEMENT CHARACTER}".encode() * 2 * MOST_DECODED, *"\u00e9".encode(), 257],
        [],
    ],
)
def test_the_pieces_of_a_reply_are_the_whole(ids: list[int], steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Bytes()
    monkeypatch.setattr(steered.model, "tokenizer", tokenizer)
    assert "".join(pieces_of(steered.model, ids)) == tokenizer.decode(ids)


def test_a_piece_comes_with_the_last_token_of_its_character(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steered.model, "tokenizer", Bytes())
    cat = [*"\N{CAT FACE}".encode()]
    assert pieces_of(steered.model, [256, *cat, 257, 0xC3]) == [" the", "", "", "", "\N{CAT FACE}", " train", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("token", [256, 0xFF])
def test_a_reply_is_decoded_in_time_that_grows_as_it_does(token: int, steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Bytes()
    monkeypatch.setattr(steered.model, "tokenizer", tokenizer)
    pieces_of(steered.model, [token] * 4000)
    assert tokenizer.n_decoded <= 4000 * 2 * MOST_DECODED


def test_no_table_over_the_vocabulary_is_made_for_a_whole_reply(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(steered) as server:
        usual = httpx.post(server.url + "/v1/readings", json={**READING, "reply": "stop the train " * 5}, timeout=30).json()
        sizes, logits = list[int](), steered.model.logits
        monkeypatch.setattr(readings, "TOGETHER", 4)
        monkeypatch.setattr(steered.model, "logits", lambda hidden: (sizes.append(len(hidden)), logits(hidden))[1])
        parted = httpx.post(server.url + "/v1/readings", json={**READING, "reply": "stop the train " * 5}, timeout=30).json()
    assert max(sizes) == 4 and sum(sizes) == len(usual["tokens"]) >= 15
    for one, other in zip(parted["tokens"], usual["tokens"], strict=True):
        assert one["text"] == other["text"] and one["surprise"] == pytest.approx(other["surprise"], abs=1e-5)
