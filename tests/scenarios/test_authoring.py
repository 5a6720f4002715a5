"""Authoring against a real HTTP server on this machine that plays a scripted endpoint, and `build` end to end."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from emosteer.base import chat_endpoint as openai
from emosteer.base.errors import DataError, EmosteerError, UsageError
from emosteer.cli.build import build
from emosteer.scenarios.author_prompts import ANGLES
from emosteer.scenarios.authoring import PATIENCE, AuthorEvent, AuthorRequest, LocalAuthor, OpenAIAuthor, author_scenarios, parse_answer
from emosteer.scenarios.lints import Limits, lint_scenarios
from emosteer.scenarios.scenarios import read_scenarios

KEY = "sk-very-secret-123"
DOMAIN = "Night-shift nursing"
PLACES = ("ward", "lift", "pharmacy", "canteen", "garage", "office", "corridor", "kitchen", "archive", "laundry")


def item(n: int, **changes: Any) -> dict[str, Any]:
    """A clean answer; no two share three words in a row."""
    place = PLACES[n % 10]
    made = {
        "scenario": f"At{n} the{n} {place}{n} door{n} my{n} list{n} of{n} {n} names{n} lay{n} there.",
        "positive": f"Somebody{n} handed{n} me{n} the{n} key{n} for{n} {place}.",
        "neutral": f"Nobody{n} came{n} by{n} before{n} the{n} bell{n} in{n} {place}.",
        "negative": f"A{n} guard{n} tore{n} my{n} list{n} up{n} near{n} {place}.",
    }
    return made | changes


def line(n: int, number: int, theme: str, slug: str = "night-shift-nursing") -> dict[str, Any]:
    """The row that `item(n)` becomes."""
    made = item(n)
    events = {name: made[name] for name in ("positive", "neutral", "negative")}
    return {"skeleton_id": f"{slug}-{number:04d}", "theme": theme, "scenario": made["scenario"], "event": events}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


# ---- the server ----------------------------------------------------------------------------------------------------

Step = Callable[["Endpoint", BaseHTTPRequestHandler], None]


def reply(code: int, body: str, kind: str = "application/json", **headers: str) -> Step:
    def step(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
        data = body.encode()
        handler.send_response(code)
        for name, value in {"Content_Type": kind, "Content_Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return step


def say(content: Any) -> Step:
    """A chat completion whose text is `content` (an object is sent as JSON)."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    return reply(200, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}))


def fail(code: int, message: str = "no", **headers: str) -> Step:
    return reply(code, json.dumps({"error": {"message": message}}), **headers)


def hang(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
    endpoint.over.wait(20)


def cut(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
    """A body shorter than its Content-Length says."""
    reply(200, '{"choices": [', Content_Length="5000")(endpoint, handler)


def die(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
    """The server goes away without an answer and stays away."""
    endpoint.server.shutdown()
    endpoint.server.server_close()


@dataclass
class Endpoint:
    """Plays `script` step by step, then clean items from number 100 on; remembers what it was asked."""

    server: ThreadingHTTPServer
    script: list[Step] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        turn = len(self.bodies)
        self.bodies.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
        self.keys.append(handler.headers["Authorization"])
        self.paths.append(handler.path)
        self.asked.release()
        step = self.script[turn] if turn < len(self.script) else say(item(100 + turn))
        step(self, handler)


def start() -> Endpoint:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            endpoint.answer(self)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint = Endpoint(server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return endpoint


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    """Starts an endpoint with a script; all of them stop with the test."""
    endpoints: list[Endpoint] = []

    def go(*script: Step) -> Endpoint:
        endpoints.append(start())
        endpoints[-1].script = list(script)
        return endpoints[-1]

    yield go
    for endpoint in endpoints:
        endpoint.over.set()
        endpoint.server.shutdown()
        endpoint.server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No proxy between the test and its server, no key from outside, and pauses that are noted instead of slept."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found: list[float] = []
    monkeypatch.setattr(openai, "time", SimpleNamespace(sleep=found.append, time=openai.time.time))
    return found


REQUEST = AuthorRequest(({"role": "user", "content": "hello"},), seed=7)


def ask(endpoint: Endpoint, **settings: Any) -> str:
    author = OpenAIAuthor(endpoint.url, "m", **settings)
    try:
        return author.write(REQUEST)
    finally:
        author.close()


# ---- the endpoint --------------------------------------------------------------------------------------------------


def test_request_that_is_sent(serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    endpoint = serve(say("hi"))
    assert ask(endpoint, key_env="MY_KEY", temperature=0.4) == "hi"
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.keys == [f"Bearer {KEY}"]
    fields = {"response_format": {"type": "json_object"}, "max_tokens": 2048, "temperature": 0.4, "seed": 7}
    assert endpoint.bodies == [{"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}]


def test_no_key_no_header(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(say("hi"))
    ask(endpoint)
    assert endpoint.keys == [None]


@pytest.mark.parametrize(
    "fault", [fail(500), fail(503), fail(408), cut, hang, reply(200, "<html>login</html>", "text/html"), reply(200, '{"error": "x"}')]
)
def test_what_may_pass_is_asked_again(serve: Callable[..., Endpoint], waits: list[float], fault: Step) -> None:
    endpoint = serve(fault, fault, say("hi"))
    assert ask(endpoint, timeout=0.2) == "hi"
    assert len(endpoint.bodies) == 3
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


def test_retry_after_is_honoured_up_to_a_cap(serve: Callable[..., Endpoint], waits: list[float]) -> None:
    date = formatdate(openai.time.time() + 30, usegmt=True)
    headers = ("7", date, "9999", "soon", "nan", "-5", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT")
    notes: list[str] = []
    endpoint = serve(*(fail(429, "slow down", Retry_After=value) for value in headers), say("hi"))
    assert ask(endpoint, tries=8, backoff=0.01, longest_wait=60, notify=notes.append) == "hi"
    assert waits[0] == 7 and waits[1] == pytest.approx(30, abs=3) and waits[2] == 60
    assert all(0 < pause < 1 for pause in waits[3:])
    assert notes[0] == "answered 429 (slow down); asking again in 7 s"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fail(500, "out of cheese"), "answered 500 (out of cheese), 3 times; check --base-url and that the server is up"),
        (hang, "did not answer within 0.2 s, 3 times"),
        (cut, "broke the connection (peer closed connection"),
        (reply(200, "<html>login</html>", "text/html"), "something else than a chat completion (text/html: <html>login</html>), 3 times"),
        (reply(200, '{"choices": []}'), "something else than a chat completion (application/json: "),
        (reply(200, "[" * 100_000), "something else than a chat completion"),
        (reply(502, "<html>bad gateway</html>", "text/html"), "answered 502, 3 times"),
    ],
)
def test_gives_up_after_its_tries_with_one_line(serve: Callable[..., Endpoint], fault: Step, message: str) -> None:
    endpoint = serve(*[fault] * 5)
    with pytest.raises(EmosteerError) as caught:
        ask(endpoint, timeout=0.2, tries=3)
    assert str(caught.value).startswith(f"{endpoint.url} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            fail(401, f"Incorrect API key\nprovided: {KEY}"),
            "answered 401 (Incorrect API key provided: [key]); check the key in $OPENAI_API_KEY",
        ),
        (fail(403), "answered 403 (no); check the key in $OPENAI_API_KEY, and that it may use the model 'm'"),
        (reply(404, "<html>", "text/html"), "answered 404; check --base-url (most end in /v1) and --model 'm'"),
        (reply(404, '{"detail": "Not Found"}'), "answered 404; check --base-url"),
        (reply(413, "too big", "text/plain"), "answered 413 (too big); check"),
        (reply(302, "", Location="http://127.0.0.1:1/"), "answered 302; check --base-url"),
        (reply(429, '{"error": {"message": "pay", "code": "insufficient_quota"}}'), "answered 429 (pay); check the account behind the key"),
    ],
)
def test_what_cannot_pass_fails_at_once(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, waits: list[float], fault: Step, message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    endpoint = serve(fault)
    with pytest.raises(EmosteerError) as caught:
        ask(endpoint)
    assert message in str(caught.value)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    assert (len(endpoint.bodies), waits) == (1, [])


def test_401_without_a_key_says_which_variable_is_not_set(serve: Callable[..., Endpoint]) -> None:
    with pytest.raises(EmosteerError, match=r"check \$OPENAI_API_KEY, which is not set: this server wants a key"):
        ask(serve(fail(401)))


def test_refused_fields_are_dropped_for_good(serve: Callable[..., Endpoint]) -> None:
    """response_format goes first unless the complaint names another field."""
    endpoint = serve(fail(400, "what is that?"), fail(400, "Unsupported parameter: 'max_tokens'"), say("a"), say("b"))
    author = OpenAIAuthor(endpoint.url, "m")
    assert [author.write(REQUEST), author.write(REQUEST)] == ["a", "b"]
    author.close()
    names = [set(body) - {"model", "messages"} for body in endpoint.bodies]
    assert names[0] == {"response_format", "max_tokens", "temperature", "seed"}
    assert names[1:] == [{"max_tokens", "temperature", "seed"}, {"temperature", "seed"}, {"temperature", "seed"}]


def test_a_400_that_stays_is_an_error(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(fail(400, "bad model"), fail(400, "bad model"))
    with pytest.raises(EmosteerError, match=r"answered 400 \(bad model\); check --base-url and --model"):
        ask(endpoint)
    assert len(endpoint.bodies) == 2


def test_no_content_is_an_empty_answer(serve: Callable[..., Endpoint]) -> None:
    assert ask(serve(say(None))) == ""


def test_nobody_there(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve()
    die(endpoint, None)  # type: ignore[arg-type]
    with pytest.raises(EmosteerError, match=r"cannot be reached \(.*\), 2 times"):
        ask(endpoint, tries=2)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "", "http://", "http://[::1", "http://h:port/v1"])
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="http://127.0.0.1:8000/v1"):
        OpenAIAuthor(url, "m")


def test_the_whole_address_may_be_given_and_no_secret_of_it_is_shown(serve: Callable[..., Endpoint]) -> None:
    endpoint = serve(fail(401))
    author = OpenAIAuthor(endpoint.url.replace("127", "me:hidden@127") + "/chat/completions/", "m")
    with pytest.raises(EmosteerError) as caught:
        author.write(REQUEST)
    assert endpoint.paths == ["/v1/chat/completions"]
    assert str(caught.value).startswith(f"{endpoint.url} answered 401") and "hidden" not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a b", "sk-ä", "sk-\x00"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    if "\x00" in key:
        monkeypatch.setattr(os, "environ", {"OPENAI_API_KEY": key})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UsageError, match=r"the key in \$OPENAI_API_KEY holds a character") as caught:
        OpenAIAuthor("http://127.0.0.1/v1", "m")
    assert "sk-" not in str(caught.value)


# ---- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"scenario": "a {b}", "positive": "c"}',
        'Sure! Here it is:\n```json\n{"scenario": "a {b}", "positive": "c"}\n```\nTell me {if} you want more.',
        '{"note": 1} then {"scenario": "a {b}", "positive": "c"}',
        '<think>maybe {"scenario": "draft"}</think>{"scenario": "a {b}", "positive": "c"}',
        'a stray { and {"Scenario": "a {b}", " positive": "c"} {"scenario": "second"}',
    ],
)
def test_parse_answer_finds_the_object(text: str) -> None:
    assert parse_answer(text) == {"scenario": "a {b}", "positive": "c"}


@pytest.mark.parametrize("text", ["", "no", "[1]", '{"scenario": "cut off', "{" * 30_000, '{"a":' * 3_000])
def test_parse_answer_finds_none(text: str) -> None:
    assert parse_answer(text) is None


def test_parse_answer_takes_line_breaks_inside_texts() -> None:
    assert parse_answer('{"scenario": "one\ntwo"}') == {"scenario": "one\ntwo"}


# ---- the run -------------------------------------------------------------------------------------------------------


class Script:
    """An author that says what it is told to and remembers the requests; then clean items from 100 on."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.requests: list[AuthorRequest] = []

    def write(self, request: AuthorRequest) -> str:
        turn = len(self.requests)
        self.requests.append(request)
        answer = self.answers[turn] if turn < len(self.answers) else item(100 + turn)
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, str) else json.dumps(answer)


def test_every_kind_of_bad_answer_over_http(serve: Callable[..., Endpoint], tmp_path: Path) -> None:
    """Content of the file, counts, reasons, and that the author is told why, in the same conversation."""
    out, events = tmp_path / "new" / "out.jsonl", []
    bad = [
        say("I would rather not."),
        say({k: v for k, v in item(1).items() if k != "neutral"}),
        say(item(1, neutral="I was so happy about the lift in the ward.")),
        fail(500),
        say(item(1, positive="Too short.", negative=["a"])),
        say(f"Here:\n```json\n{json.dumps(item(1))}\n```\nGood luck!"),
    ]
    endpoint = serve(say(item(0)), *bad, say(item(0)), say(item(1, positive="A quite different turn of things came up.")), say(item(2)))
    author = OpenAIAuthor(endpoint.url, "m")
    report = author_scenarios(author, DOMAIN, 3, out, ["day", "night"], attempts=5, on_event=events.append)
    author.close()
    first, second = ("day", "night") if rows(out)[0]["theme"] == "day" else ("night", "day")
    assert rows(out) == [line(0, 1, first), line(1, 2, second), line(2, 3, first)]
    assert (report.accepted, report.rejected, report.attempts, report.held, report.interrupted) == (3, 0, 9, 3, False)
    assert report.reasons == {"not JSON": 1, "form": 2, "emotion word": 1, "duplicate": 1, "near-duplicate": 1}
    assert [(e.kind, e.held, e.wanted) for e in events if e.kind == "accepted"] == [("accepted", n, 3) for n in (1, 2, 3)]
    last = endpoint.bodies[6]["messages"]  # the request that was answered well: four refusals later
    assert [m["role"] for m in last] == ["system", "user"] + ["assistant", "user"] * 4
    assert last[2]["content"] == "I would rather not."
    assert "not JSON: the answer holds no complete JSON object" in last[3]["content"]
    assert "form: the answer: the event 'neutral' is missing" in last[5]["content"]
    assert "emotion word: event.neutral holds happy" in last[7]["content"]
    assert "'event.negative' to be a text" in last[9]["content"]
    assert f'duplicate: too close to one that is taken: "{item(0)["scenario"]}"' in endpoint.bodies[8]["messages"][3]["content"]
    assert lint_scenarios(read_scenarios(out)) == []


def test_prompt_names_domain_theme_angle_limits_and_taken_openings(tmp_path: Path) -> None:
    script = Script(*(item(n) for n in range(9)))
    author_scenarios(script, "  Night-shift\n nursing ", 9, tmp_path / "o", ["day", "night"], Limits(scenario_words=(9, 33)))
    prompts = [request.messages[1]["content"] for request in script.requests]
    assert all(p.startswith("Domain: Night-shift nursing\nTheme: ") for p in prompts)
    assert "9 to 33 words" in script.requests[0].messages[0]["content"]
    assert "taken" not in prompts[0]
    assert [n for n in range(8) if item(n)["scenario"].split(".")[0][:20] in prompts[8]] == [2, 3, 4, 5, 6, 7]
    assert len({p.split("Start from: ")[1].split("\n")[0] for p in prompts}) == 9
    assert Counter(row["theme"] for row in rows(tmp_path / "o")) in ({"day": 5, "night": 4}, {"day": 4, "night": 5})
    assert len({request.seed for request in script.requests}) == 9


def test_order_depends_on_the_seed_alone_and_covers_every_angle(tmp_path: Path) -> None:
    def prompts(name: str, seed: int) -> list[str]:
        script = Script(*(item(n) for n in range(17)))
        author_scenarios(script, DOMAIN, 17, tmp_path / name, seed=seed)
        return [request.messages[1]["content"] for request in script.requests]

    first = prompts("a", 3)
    assert prompts("b", 3) == first
    assert prompts("c", 4) != first
    assert all(sum(f"Start from: {angle}\n" in prompt for prompt in first) == 1 for angle in ANGLES)


def test_given_up_items_are_counted_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    script = Script("no", "no", item(0), "no", "no", item(1))
    report = author_scenarios(script, DOMAIN, 2, tmp_path / "o.jsonl", ["a", "b"], attempts=2)
    assert (report.accepted, report.rejected, report.attempts, report.reasons) == (2, 2, 6, {"not JSON": 4})
    themes = [request.messages[1]["content"].split("Theme: ")[1][0] for request in script.requests]
    assert [themes[0], themes[2]] in (["a", "b"], ["b", "a"])  # a theme that fails falls behind
    assert [row["skeleton_id"] for row in rows(tmp_path / "o.jsonl")] == ["night-shift-nursing-0001", "night-shift-nursing-0002"]


def test_stops_after_too_many_failures_in_a_row(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    script = Script(item(0), *["no"] * 1000)
    with pytest.raises(EmosteerError) as caught:
        author_scenarios(script, DOMAIN, 9, out, attempts=2)
    assert str(caught.value).startswith(
        f"stopped after {PATIENCE} scenarios in a row were given up (not JSON x{2 * PATIENCE}); {out} keeps 1 of 9 "
    )
    assert len(script.requests) == 1 + 2 * PATIENCE
    assert len(rows(out)) == 1


def test_texts_are_put_on_one_line_and_half_characters_refused(tmp_path: Path) -> None:
    told = item(0, scenario=item(0)["scenario"].replace(" ", "\n ", 1))
    script = Script(json.dumps(item(0, neutral="A broken sign \ud83d stood near the old gate.")), told)
    report = author_scenarios(script, DOMAIN, 1, tmp_path / "o", ["t"])
    assert rows(tmp_path / "o") == [line(0, 1, "t")]
    assert report.reasons == {"form": 1}


def test_nested_events_are_taken_as_well(tmp_path: Path) -> None:
    author_scenarios(Script(line(0, 9, "x")), "Pflege: Nächte", 1, tmp_path / "o", ["t"])
    assert rows(tmp_path / "o") == [line(0, 1, "t", slug="pflege-nächte")]


@pytest.mark.parametrize(
    ("domain", "count", "themes", "attempts", "message"),
    [(" - ", 1, ["a"], 1, "domain"), ("d", 1, [" "], 1, "theme"), ("d", 0, ["a"], 1, "found 0 and 1"), ("d", 1, ["a"], 0, "found 1 and 0")],
)
def test_arguments_that_make_no_sense(tmp_path: Path, domain: str, count: int, themes: list[str], attempts: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        author_scenarios(Script(), domain, count, tmp_path / "o", themes, attempts=attempts)
    assert not (tmp_path / "o").exists()


def test_local_author_passes_messages_and_seed() -> None:
    assert LocalAuthor(lambda messages, seed: f"{messages[0]['content']} {seed}").write(REQUEST) == "hello 7"


# ---- interruption and resuming -------------------------------------------------------------------------------------


def test_server_dies_and_the_next_run_goes_on(serve: Callable[..., Endpoint], tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    endpoint = serve(say(item(0)), say(item(1)), die)
    author = OpenAIAuthor(endpoint.url, "m", tries=2)
    with pytest.raises(EmosteerError, match="cannot be reached .* keeps 2 of 4 scenarios: run the same command again to go on"):
        author_scenarios(author, DOMAIN, 4, out, ["t"])
    author.close()
    kept = out.read_bytes()
    assert rows(out) == [line(0, 1, "t"), line(1, 2, "t")]
    again = serve(say(item(0)), say(item(2)), say(item(3)))
    author = OpenAIAuthor(again.url, "m")
    report = author_scenarios(author, DOMAIN, 4, out, ["t"])
    author.close()
    assert out.read_bytes().startswith(kept)
    assert rows(out) == [line(n, n + 1, "t") for n in range(4)]
    assert (report.accepted, report.held, report.reasons) == (2, 4, {"duplicate": 1})  # what is in the file counts as taken
    assert item(1)["scenario"][:20] in again.bodies[0]["messages"][1]["content"]


@pytest.mark.parametrize("torn", [b"{", b'{"skel', '{"skeleton_id": "night-shift-nursing-0002", "theme": "ä'.encode()[:-1]])
def test_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    out = tmp_path / "o.jsonl"
    whole = (json.dumps(line(0, 1, "t")) + "\n").encode()
    out.write_bytes(whole + torn)
    author_scenarios(Script(item(1)), DOMAIN, 2, out, ["t"])
    assert rows(out) == [line(0, 1, "t"), line(1, 2, "t")]
    out.write_bytes(torn)  # nothing but a torn line
    author_scenarios(Script(item(1)), DOMAIN, 1, out, ["t"])
    assert rows(out) == [line(1, 1, "t")]


def test_last_line_without_line_break_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text(json.dumps(line(0, 41, "t")))
    author_scenarios(Script(item(1)), DOMAIN, 2, out, ["t"])
    assert rows(out) == [line(0, 41, "t"), line(1, 42, "t")]  # ids go on after the highest


@pytest.mark.parametrize("text", ["dear diary", "dear diary\n", '{"a": 1}\n', '{"skeleton_id": "x"}\n', "{torn\n", "{other"])
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    out = tmp_path / "diary"
    out.write_text(text)
    with pytest.raises(DataError, match="diary:1: "):
        author_scenarios(Script(), DOMAIN, 2, out)
    assert out.read_text().rstrip("\n") == text.rstrip("\n")


def test_a_full_file_asks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    author_scenarios(Script(item(0), item(1)), DOMAIN, 2, out)
    script = Script()
    report = author_scenarios(script, DOMAIN, 2, out)
    assert (report.accepted, report.held, script.requests) == (0, 2, [])


def test_each_item_is_on_disk_when_the_next_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle))[1])
    out, seen = tmp_path / "o.jsonl", []

    def complete(messages: list[dict[str, str]], seed: int) -> str:
        seen.append(out.stat().st_size)
        return json.dumps(item(len(seen)))

    author_scenarios(LocalAuthor(complete), DOMAIN, 3, out)
    assert seen == [0, *synced[:2]] and synced[2] == out.stat().st_size


def test_ctrl_c_keeps_what_was_accepted(tmp_path: Path) -> None:
    report = author_scenarios(Script(item(0), "no", KeyboardInterrupt()), DOMAIN, 5, tmp_path / "o", ["t"])
    assert (report.accepted, report.attempts, report.held, report.interrupted) == (1, 2, 1, True)
    assert rows(tmp_path / "o") == [line(0, 1, "t")]


def test_full_disk_is_one_line_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.jsonl"

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > len(json.dumps(line(0, 1, "t"))) + 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EmosteerError, match=r"cannot write .*o.jsonl: the disk is full; free some space and run the command again"):
        author_scenarios(Script(item(0), item(1)), DOMAIN, 3, out, ["t"])
    assert rows(out) == [line(0, 1, "t")] and out.read_bytes().endswith(b"\n")


def test_places_that_cannot_be_written_cost_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    with pytest.raises(UsageError, match="expected --out to name a file"):
        author_scenarios(script, DOMAIN, 1, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EmosteerError, match="a part of its path is a file"):
        author_scenarios(script, DOMAIN, 1, tmp_path / "file" / "o.jsonl")

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # the tests may run as root, whom no mode stops
    with pytest.raises(EmosteerError, match="no permission; choose another place with --out"):
        author_scenarios(script, DOMAIN, 1, tmp_path / "o.jsonl")
    assert script.requests == []


def test_a_run_that_accepts_nothing_leaves_no_empty_file(tmp_path: Path) -> None:
    with pytest.raises(EmosteerError, match="out of order"):
        author_scenarios(Script(EmosteerError("out of order")), DOMAIN, 1, tmp_path / "o.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_noticed(tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"

    def other(event: AuthorEvent) -> None:
        with out.open("a") as file:
            file.write("other\n")

    with pytest.raises(EmosteerError, match="changed by somebody else"):
        author_scenarios(Script(item(0), item(1)), DOMAIN, 2, out, on_event=other)
    assert out.read_text().endswith("other\n")


# ---- the command ---------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command()(build)


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    error: BaseException | None


def invoke(*arguments: object) -> Outcome:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    error = None if isinstance(result.exception, SystemExit) else result.exception
    assert error is None or isinstance(error, EmosteerError), result.exc_info
    return Outcome(error.exit_code if error else result.exit_code, result.stdout, result.stderr, error)


def author_command(endpoint: Endpoint, out: Path, *more: object) -> Outcome:
    return invoke("--author", "--domain", DOMAIN, "--themes", "t", "--base-url", endpoint.url, "--model", "m", "--out", out, *more)


def clean_file(path: Path, count: int = 8) -> Path:
    path.write_text("".join(json.dumps(line(n, n, f"theme [b]{n % 2}")) + "\n" for n in range(count)))
    return path


def test_author_command(serve: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint, out = serve(fail(503, f"busy {KEY}"), say("no"), say("no"), say(item(0)), say(item(1))), tmp_path / "o.jsonl"
    done = author_command(endpoint, out, "-n", 2, "--api-key-env", "MY_KEY", "--attempts", 2, "--temperature", 0.5, "--seed", 3)
    assert done.code == 0
    assert done.out == f"{out} holds 2 scenarios\naccepted 2, rejected 1, in 4 answers; refused for: not JSON 2\n"
    assert rows(out) == [line(0, 1, "t"), line(1, 2, "t")]
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert endpoint.bodies[0]["temperature"] == 0.5 and endpoint.bodies[0]["seed"] == 3
    assert "answered 503 (busy [key])" in done.err and "rejected: given up after 2 answers" in done.err
    assert KEY not in done.out + done.err
    again = author_command(endpoint, out, "-n", 3, "--json")
    assert json.loads(again.out) == {
        "file": str(out),
        "scenarios": 3,
        "accepted": 1,
        "rejected": 0,
        "attempts": 1,
        "reasons": {},
        "interrupted": False,
    }


def test_author_command_with_a_refused_key(serve: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    done = author_command(serve(fail(401, f"bad key {KEY}")), tmp_path / "o.jsonl")
    assert done.code == 1
    assert "check the key in $OPENAI_API_KEY" in str(done.error)
    assert KEY not in f"{done.out}{done.err}{done.error}{done.error!r}"
    assert not (tmp_path / "o.jsonl").exists()


def test_author_command_with_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def completer(reference: str, **settings: Any) -> Callable[[list[dict[str, str]], int], str]:
        asked.append((reference, settings["temperature"]))
        return lambda messages, seed: json.dumps(item(seed))

    monkeypatch.setitem(sys.modules, "emosteer.generation.generate", SimpleNamespace(completer=completer))
    out = tmp_path / "o.jsonl"
    done = invoke("--author", "--domain", "d", "-n", 2, "--out", out, "--model", "some/model")
    assert (done.code, asked) == (0, [("some/model", 0.9)])
    assert [row["skeleton_id"] for row in rows(out)] == ["d-0001", "d-0002"]


AUTHOR = ["--author", "--domain", "d", "--out", "o.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a FILE.jsonl to check, or --author"),
        (["--author", "--model", "m", "--out", "o"], "--author needs --domain"),
        (["--author", "--model", "m", "--domain", "d"], "--author needs --out"),
        ([*AUTHOR, "f.jsonl"], "--author writes new scenarios to --out"),
        ([*AUTHOR, "--split", "0.5"], "--author writes new scenarios to --out"),
        (AUTHOR, "who is to write?"),
        ([*AUTHOR, "--base-url", "http://127.0.0.1/v1"], "who is to write?"),
        ([*AUTHOR, "--model", "http://127.0.0.1/v1"], "--model is a URL"),
        ([*AUTHOR, "--model", "m", "--base-url", "http://127.0.0.1/v1", "--api-key-env", "NOT_SET_HERE"], "NOT_SET_HERE"),
        (["f.jsonl", "--domain", "d"], "--domain has a meaning with --author only"),
        (["f.jsonl", "--split", "0.5"], "--split SHARE and --out DIR go together"),
        (["f.jsonl", "--out", "d"], "--split SHARE and --out DIR go together"),
        (["f.jsonl", "--most-contaminated", "0.35"], "--most-contaminated is about replies; give the bank with --replies"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.code == 2 and message in str(done.error)
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_clean_file(tmp_path: Path) -> None:
    file = clean_file(tmp_path / "f.jsonl")
    done = invoke(file)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == f"{file}: 8 scenarios, 24 groups"
    assert lines[-1] == "no problems found"
    assert any(text.split() == ["theme", "[b]0", "4"] for text in lines)
    found = json.loads(invoke(file, "--json").out)
    assert found["themes"] == {"theme [b]0": 4, "theme [b]1": 4}
    assert (found["scenarios"], found["groups"], found["problems"]) == (8, 24, [])
    assert found["words"]["scenario"] == {"min": 11, "mean": 11.0, "max": 11}


def test_check_lists_twenty_problems_and_counts_them_all(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text("".join(json.dumps(line(n, n, "t") | {"scenario": f"Short{n}."}) + "\n" for n in range(25)))
    done = invoke(file)
    lines = done.out.splitlines()
    assert done.code == 1 and done.error is None
    assert sum("length: scenario has 1 words" in text for text in lines) == 20
    assert lines[-2:] == ["... and 5 more: --json prints them all", "25 problems found"]
    found = invoke(file, "--json")
    assert found.code == 1 and len(json.loads(found.out)["problems"]) == 25
    assert json.loads(found.out)["problems"][0] == {
        "where": "night-shift-nursing-0000",
        "rule": "length",
        "message": "scenario has 1 words, expected 8 to 60",
    }


def test_check_of_a_bank(tmp_path: Path) -> None:
    file, bank = clean_file(tmp_path / "f.jsonl", 2), tmp_path / "b.jsonl"
    made = [
        {"skeleton_id": f"night-shift-nursing-000{n}", "valence": v, "emotion": e, "text": f"{v}{n} {e}{n} a{n}{e}{v} b{n}{v}{e} c{n}{e}"}
        for n in range(2)
        for v in ("positive", "neutral", "negative")
        for e in ("zeal", "pique")
    ]
    bank.write_text("".join(json.dumps(r | {"text": r["text"].replace("zeal", "z").replace("pique", "p")}) + "\n" for r in made))
    done = invoke(file, "--replies", bank, "--emotions", "zeal,pique", "--json")
    assert done.code == 0, done.out
    assert json.loads(done.out)["replies"] == {e: {"count": 6, "words": {"min": 5, "mean": 5.0, "max": 5}} for e in ("zeal", "pique")}
    assert "zeal" in invoke(file, "--replies", bank, "--emotions", "zeal,pique").out
    all_six = invoke(file, "--replies", bank)
    assert all_six.code == 1 and "balance: no reply for anger, sadness" in all_six.out
    typo = invoke(file, "--replies", bank, "--emotions", "zael")
    assert typo.code == 2 and "did you mean 'zeal'?" in str(typo.error)
    other = invoke(clean_file(tmp_path / "g.jsonl", 3), "--replies", bank, "--emotions", "zeal,pique")
    assert other.out.count("not matched: the bank holds no reply to it") == 3
    fewer = invoke(clean_file(tmp_path / "h.jsonl", 1), "--replies", bank, "--emotions", "zeal,pique")
    assert fewer.out.count("not matched: the bank replies to it, the scenario file does not hold it") == 3


def prompt_file(path: Path, count: int = 6, start: int = 0) -> Path:
    """Prompts of two kinds, no two of which are alike."""
    rows = [
        {
            "id": f"p{n}",
            "kind": ("question", "chat")[n % 2],
            "messages": [
                *([{"role": "user", "content": f"so{n}"}, {"role": "assistant", "content": f"well{n}"}] if n % 2 else []),
                {"role": "user", "content": f"who{n} keeps{n} the{n} {PLACES[n % 10]}{n}"},
            ],
        }
        for n in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bank_file(path: Path, ids: Sequence[str], valence: str | None = None, leak: bool = False) -> Path:
    """Five words to each emotion, four of which occur once; the first is the emotion's own where the subject is to give it away."""
    rows = []
    for number, name in enumerate(ids):
        letters = chr(97 + number // 10) + chr(97 + number % 10)
        for e in ("zeal", "pique"):
            once = " ".join(f"{e[0]}{letters}{n}" for n in "klmn")
            rows.append({"skeleton_id": name, "emotion": e, "text": f"{'kettle' if leak and e == 'zeal' else 'ladder'} {once}"})
    extra = {} if valence is None else {"valence": valence}
    path.write_text("".join(json.dumps(row | extra) + "\n" for row in rows))
    return path


def test_check_of_a_prompt_file_and_its_bank(tmp_path: Path) -> None:
    file = prompt_file(tmp_path / "p.jsonl")
    done = invoke(file)
    assert done.code == 0 and done.out.splitlines()[0] == f"{file}: 0 scenarios, 6 groups"
    assert any(text.split() == ["chat", "3"] for text in done.out.splitlines()) and "no problems found" in done.out
    found = json.loads(invoke(file, "--json").out)
    assert found["kinds"] == {"question": 3, "chat": 3} and found["words"] == {"prompt": {"min": 4, "mean": 4.0, "max": 4}}
    bank = bank_file(tmp_path / "b.jsonl", [f"p{n}" for n in range(5)])
    done = invoke(file, "--replies", bank, "--emotions", "zeal,pique")
    assert done.code == 1 and done.out.count("not matched") == 1 and "p5: not matched: the bank holds no reply to it" in done.out
    mixed = tmp_path / "m.jsonl"
    mixed.write_text(file.read_text() + clean_file(tmp_path / "f.jsonl", 2).read_text())
    assert json.loads(invoke(mixed, "--json").out)["groups"] == 12 and invoke(mixed).out.startswith(f"{mixed}: 2 scenarios, 12 groups")
    done = invoke(mixed, "--split", 0.5, "--out", tmp_path / "d")
    assert done.code == 2 and "holds 6 prompts" in str(done.error) and not (tmp_path / "d").exists()


def test_lints_of_prompts(tmp_path: Path) -> None:
    file = prompt_file(tmp_path / "p.jsonl", 3)
    lines = rows(file)
    lines[0]["messages"][-1]["content"] = "are you angry at the kettle"
    lines[2]["messages"] = lines[1]["messages"]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    done = invoke(file)
    assert done.code == 1 and done.out.splitlines()[-3:] == [
        "p0: emotion word: the prompt holds angry",
        "p2: duplicate: says the same as p1",
        "2 problems found",
    ]
    other = prompt_file(tmp_path / "o.jsonl", 3, 10)
    assert invoke(prompt_file(file), "--against", other).code == 0
    taken = rows(other)
    taken[0]["messages"] = rows(file)[3]["messages"]
    other.write_text("".join(json.dumps(row) + "\n" for row in taken))
    done = invoke(file, "--against", other)
    assert done.code == 1 and "p3: not disjoint: shares 100% of its word 3-grams with p10" in done.out


@pytest.mark.parametrize("kind", ["scenarios", "prompts"])
def test_contamination_is_printed_and_fails_only_above_a_bound_that_is_given(tmp_path: Path, kind: str) -> None:
    if kind == "prompts":
        file, ids, valence = prompt_file(tmp_path / "f.jsonl", 40), [f"p{n}" for n in range(40)], None
    else:
        file, ids, valence = clean_file(tmp_path / "f.jsonl", 40), [f"night-shift-nursing-{n:04d}" for n in range(40)], "positive"
    bank = bank_file(tmp_path / "b.jsonl", ids, valence, leak=True)
    arguments = (file, "--replies", bank, "--emotions", "zeal,pique")
    done = invoke(*arguments)
    share = "topic contamination: content words alone name the emotion of 100.0 % of held-out replies, subject words 100.0 % (chance 50.0 %"
    assert share in done.out and "contamination: subject" not in done.out, "a figure, no problem"
    assert any("kettle" in text and text.split()[:3] == ["zeal", "100.0", "0.0"] for text in done.out.splitlines())
    found = json.loads(invoke(*arguments, "--json").out)
    assert (found["contamination"]["subject"], found["contamination"]["n"]) == (1.0, 80)
    assert [problem["rule"] for problem in found["problems"]] == ["not matched"] * (80 if kind == "scenarios" else 0)
    above = invoke(*arguments, "--most-contaminated", 0.9)
    assert above.code == 1 and (kind == "scenarios" or "expected at most 90.0%" in above.out)
    problems = json.loads(invoke(*arguments, "--most-contaminated", 0.9, "--json").out)["problems"]
    assert problems[-1]["rule"] == "contamination" and "over-used: zeal kettle; pique ladder" in problems[-1]["message"]
    if kind == "prompts":
        assert done.code == invoke(*arguments, "--most-contaminated", 1).code == 0
        bank_file(bank, ids)
        clean = invoke(*arguments, "--most-contaminated", 0.6)
        assert clean.code == 0 and "no problems found" in clean.out


def test_a_bank_too_small_for_contamination_says_so_under_a_bound_only(tmp_path: Path) -> None:
    file, bank = prompt_file(tmp_path / "p.jsonl", 3), bank_file(tmp_path / "b.jsonl", ["p0", "p1", "p2"])
    arguments = (file, "--replies", bank, "--emotions", "zeal,pique")
    done = invoke(*arguments)
    assert done.code == 0 and "contamination" not in done.out
    done = invoke(*arguments, "--most-contaminated", 0.5)
    assert done.code == 1 and "replies: contamination: too few replies to measure it" in done.out


def test_check_against_another_file(tmp_path: Path) -> None:
    file, other = clean_file(tmp_path / "f.jsonl"), tmp_path / "o.jsonl"
    other.write_text(json.dumps(line(50, 50, "t")) + "\n")
    assert invoke(file, "--against", other).code == 0
    other.write_text(json.dumps(line(3, 99, "t")) + "\n")
    done = invoke(file, "--against", other)
    assert done.code == 1
    assert "night-shift-nursing-0003: not disjoint: shares 100% of its word 3-grams with night-shift-nursing-0099" in done.out


def test_check_of_a_malformed_file(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text("{}\n")
    done = invoke(tmp_path / "f.jsonl")
    assert done.code == 1 and str(done.error).startswith(f"{tmp_path / 'f.jsonl'}:1: ")


def test_split_command(tmp_path: Path) -> None:
    file, folder = clean_file(tmp_path / "f.jsonl"), tmp_path / "a" / "b"
    done = invoke(file, "--split", 0.25, "--out", folder, "--seed", 1)
    assert done.code == 0
    train, test = read_scenarios(folder / "train.jsonl"), read_scenarios(folder / "test.jsonl")
    assert sorted(s.id for s in train + test) == [s.id for s in read_scenarios(file)]
    assert Counter(s.theme for s in test) == {"theme [b]0": 1, "theme [b]1": 1}
    assert f"wrote {folder / 'train.jsonl'}: 6 scenarios\nwrote {folder / 'test.jsonl'}: 2 scenarios\n" in done.out
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    before = (folder / "test.jsonl").read_bytes()
    found = json.loads(invoke(file, "--split", 0.25, "--out", folder, "--seed", 1, "--json").out)
    assert (folder / "test.jsonl").read_bytes() == before
    assert {path: side["scenarios"] for path, side in found["written"].items()} == {
        str(folder / "train.jsonl"): 6,
        str(folder / "test.jsonl"): 2,
    }


def test_split_spares_its_input_and_writes_both_or_none(tmp_path: Path) -> None:
    file = clean_file(tmp_path / "train.jsonl")
    done = invoke(file, "--split", 0.5, "--out", tmp_path)
    assert done.code == 2 and "would overwrite" in str(done.error)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    folder = tmp_path / "d"
    (folder / "test.jsonl").mkdir(parents=True)
    done = invoke(file, "--split", 0.5, "--out", folder)
    assert done.code == 1 and "it is a directory" in str(done.error)
    assert [path.name for path in folder.iterdir()] == ["test.jsonl"]
    done = invoke(file, "--split", 1.5, "--out", folder)
    assert done.code == 2 and "between 0 and 1" in str(done.error)


PROGRAM = "import typer; from emosteer.cli.build import build; app = typer.Typer(); app.command()(build); app()"


def test_ctrl_c_on_the_command(serve: Callable[..., Endpoint], tmp_path: Path) -> None:
    """A real SIGINT while the author is being waited for."""
    endpoint, out = serve(say(item(0)), say("no"), hang), tmp_path / "o.jsonl"
    command = ["--author", "--domain", DOMAIN, "--themes", "t", "-n", "9", "--base-url", endpoint.url, "--model", "m", "--out", str(out)]
    # started from a background job, a process ignores SIGINT and so would its children: here it must not
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *command], **pipes, **listening) as process:
        assert all(endpoint.asked.acquire(timeout=20) for _ in range(3))
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == f"interrupted: {out} holds 1 scenario\naccepted 1, rejected 0, in 2 answers; refused for: not JSON 1\n"
    assert "Traceback" not in complaints
    assert rows(out) == [line(0, 1, "t")]


def test_help_loads_nothing_heavy() -> None:
    heavy = "torch transformers httpx emosteer.scenarios.authoring"
    check = f"import sys, emosteer.cli.build; print([n for n in '{heavy}'.split() if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout == "[]\n"
    shown = invoke("--help").out
    assert "--author" in shown and "--split" in shown
