"""The server on a real port, called by the real OpenAI client and by plain HTTP: the texts are those of `generate`, whoever shares their
steps; every wrong request gets its 4xx; whoever leaves frees its rows."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("starlette", reason="starlette is not installed; it comes with emosteer[serve]")
openai = pytest.importorskip("openai", reason="the openai client is not installed; it comes with emosteer[dev]")

from emosteer.api.steered_model import SteeredModel  # noqa: E402
from emosteer.base.errors import EmosteerError, UsageError  # noqa: E402
from emosteer.cli import main as cli  # noqa: E402
from emosteer.generation.decoding import Decoding  # noqa: E402
from emosteer.generation.generate import Request  # noqa: E402
from emosteer.generation.running_batch import Ask, Written  # noqa: E402
from emosteer.models import tokens as model_tokens  # noqa: E402
from emosteer.models.model import Model  # noqa: E402
from emosteer.models.sites import RESID_POST, Site  # noqa: E402
from emosteer.scenarios.examples import Exchange  # noqa: E402
from emosteer.serving import writer_thread  # noqa: E402
from emosteer.serving.answers import Answer  # noqa: E402
from emosteer.serving.asking import Wanted  # noqa: E402
from emosteer.serving.run import listen, serve  # noqa: E402
from emosteer.serving.settings import ServeSettings  # noqa: E402
from emosteer.serving.stop_strings import StopStrings  # noqa: E402
from emosteer.serving.writer_thread import JOIN_EVERY, Part, Writing  # noqa: E402
from tests.helpers.dialled import dialled_circuit, endless_model  # noqa: E402
from tests.helpers.server import Running, running, settles  # noqa: E402

ROOT = Path(__file__).parents[2]
TEXT = "the boss said stop"
NAME = "tiny-llama"
CHAT = [
    {"role": "user", "content": "the train was late"},
    {"role": "assistant", "content": "which train"},
    {"role": "user", "content": TEXT},
]


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return endless_model()


@pytest.fixture(scope="module")
def served(steered: SteeredModel) -> Iterator[Running]:
    with running(steered, max_batch=8, max_queue=64) as server:
        yield server
        assert httpx.get(server.url + "/healthz").json() == {"status": "ok", "running": 0, "waiting": 0}
        assert server.writer.batch.n_rows == 0, "every row is free in the end"


@pytest.fixture(scope="module")
def client(served: Running) -> Any:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def ask(served: Running, path: str = "/v1/chat/completions", /, **fields: Any) -> httpx.Response:
    body = {"model": NAME, **({"messages": [{"role": "user", "content": TEXT}]} if "chat" in path else {}), **fields}
    return httpx.post(served.url + path, json=body, timeout=30)


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---- texts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"emotion": "anger"}, {"emotion": "anger"}),
        ({"emotion": "Anger", "intensity": 60}, {"emotion": "anger", "intensity": 60}),
        ({"emotion": " \uff21NGER "}, {"emotion": "anger"}),
        ({"emotion": "Anger ", "intensity": 60}, {"emotion": "anger", "intensity": 60}),
        ({"emotion": "Anger ", "temperature": 1.5, "seed": 3}, {"emotion": "anger", "temperature": 1.5, "seed": 3}),
        ({"emotion": "Anger ", "intensity": 80, "fade": 1}, {"emotion": "anger", "intensity": 80, "fade": 1}),
        ({"emotion": "fear", "intensity": -40}, {"emotion": "fear", "intensity": -40}),
        ({"emotion": "fear", "strength": 1.5}, {"emotion": "fear", "strength": 1.5}),
        ({"mix": {"sadness": 40, "anger": 20}}, {"mix": "sadness:40 + anger:20"}),
        ({"mix": {"SADNESS ": 40, "\uff21nger": 20}}, {"mix": "sadness:40 + anger:20"}),
        ({"arc": "fear:80 -> happiness:60", "arc_tokens": 8}, {"arc": "fear:80 -> happiness:60", "arc_tokens": 8}),
        ({"vad": [-0.64, 0.6, -0.43]}, {"mix": "fear:75"}),
        ({"vad": "-0.32,0.3,-0.215"}, {"vad": (-0.32, 0.3, -0.215)}),
        ({"model": f"{NAME}:anger"}, {"emotion": "anger"}),
        ({"model": f"{NAME}: Anger "}, {"emotion": "anger"}),
        ({"model": f"{NAME}:anger@60"}, {"emotion": "anger", "intensity": 60}),
        ({"model": f"{NAME}: Anger @60"}, {"emotion": "anger", "intensity": 60}),
        ({"model": f"{NAME}:sadness@40+anger@20"}, {"mix": "sadness:40 + anger:20"}),
        ({"model": f"{NAME}:Fear @80 -> Happiness @60"}, {"arc": "fear:80 -> happiness:60"}),
        ({"model": f"{NAME}:fear@80->happiness@60"}, {"arc": "fear:80 -> happiness:60"}),
        (
            {"emotion": "anger", "temperature": 0.9, "top_p": 0.8, "seed": 7},
            {"emotion": "anger", "temperature": 0.9, "top_p": 0.8, "seed": 7},
        ),
        ({"emotion": "anger", "guidance": 1, "repetition_penalty": 1.4}, {"emotion": "anger", "guidance": 1.0, "repetition_penalty": 1.4}),
        (
            {"messages": CHAT, "emotion": "anger", "intensity": 80, "fade": 1},
            {"prompts": CHAT, "emotion": "anger", "intensity": 80, "fade": 1},
        ),
        ({"messages": CHAT, "instruction": "", "max_tokens": 30}, {"prompts": CHAT, "instruction": "", "max_new_tokens": 30}),
    ],
)
def test_a_reply_is_that_of_generate(served: Running, steered: SteeredModel, fields: dict[str, Any], options: dict[str, Any]) -> None:
    fields = {"max_tokens": 12, **fields}
    options = {"prompts": TEXT, "max_new_tokens": 12, **options}
    answer = ask(served, **fields).json()
    expected = steered.generate(**options)
    assert answer["choices"][0]["message"]["content"] == expected.text and answer["choices"][0]["finish_reason"] == expected.finish_reason
    assert answer["usage"]["completion_tokens"] == expected.n_tokens and answer["model"] == fields.get("model", NAME)
    streamed = events(ask(served, **fields, stream=True))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == expected.text
    assert [event["choices"][0]["finish_reason"] for event in streamed[-2:]] == [None, expected.finish_reason]
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"


def test_prompts_end_with_the_instruction_of_the_circuit(steered: SteeredModel) -> None:
    assert steered.circuit is not None
    other = replace(steered, circuit=replace(steered.circuit, instruction="no ."))
    with running(other, max_batch=2) as server:
        assert ask(server, emotion="anger", max_tokens=12).json()["choices"][0]["message"]["content"] == (
            steered.generate(TEXT, "anger", instruction="no .", max_new_tokens=12).text
        )
        assert httpx.get(server.url + "/v1/emotions").json()["instruction"] == "no ."


def test_replies_stand_behind_the_circuit_s_examples(steered: SteeredModel) -> None:
    """As those of `generate` do; an unsteered reply stands behind none."""
    assert steered.circuit is not None
    other = replace(steered, circuit=replace(steered.circuit, examples={"anger": (Exchange("why was it", "slam the door"),)}))
    with running(other, max_batch=2) as server:
        said, plain = (
            ask(server, max_tokens=12, **feels).json()["choices"][0]["message"]["content"] for feels in ({"emotion": "anger"}, {})
        )
    assert said == other.generate(TEXT, "anger", max_new_tokens=12).text != steered.generate(TEXT, "anger", max_new_tokens=12).text
    assert plain == steered.generate(TEXT, max_new_tokens=12).text


def test_the_official_client_chats_streams_and_chooses(client: Any, steered: SteeredModel) -> None:
    messages = [{"role": "user", "content": TEXT}]
    whole = client.chat.completions.create(model=f"{NAME}:anger@60", messages=messages, max_tokens=12)
    expected = steered.generate(TEXT, "anger", intensity=60, max_new_tokens=12).text
    assert whole.choices[0].message.content == expected and whole.object == "chat.completion"
    usage = {"include_usage": True}
    stream = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=12, stream=True, stream_options=usage, extra_body={"emotion": "anger", "intensity": 60}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    several = client.chat.completions.create(model=f"{NAME}:anger", messages=messages, n=3, temperature=1.2, seed=1, max_tokens=12)
    texts = [choice.message.content for choice in several.choices]
    assert [choice.index for choice in several.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts[0] == steered.generate(TEXT, "anger", temperature=1.2, seed=1, max_new_tokens=12).text
    again = client.chat.completions.create(model=f"{NAME}:anger", messages=messages, n=3, temperature=1.2, seed=1, max_tokens=12)
    assert [choice.message.content for choice in again.choices] == texts and several.usage.completion_tokens == 36
    free = {client.chat.completions.create(model=NAME, messages=messages, temperature=1.5).choices[0].message.content for _ in range(4)}
    assert len(free) > 1, "without a seed a sampled reply is another one each time"
    assert [model.id for model in client.models.list()][:2] == [NAME, f"{NAME}:anger"]
    assert client.models.retrieve(f"{NAME}:fear").owned_by == "emosteer"


def test_stop_sequences_cut_also_across_tokens(client: Any, served: Running) -> None:
    messages = [{"role": "user", "content": TEXT}]
    full = client.chat.completions.create(model=NAME, messages=messages, max_tokens=20, temperature=1.5, seed=3).choices[0].message.content
    words = full.split()
    assert len(words) >= 8
    stop = f"{words[4]} {words[5]}"
    for stream in (False, True):
        made = client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=20, temperature=1.5, seed=3, stop=[stop, "nowhere"], stream=stream
        )
        if stream:
            pieces = [(chunk.choices[0].delta.content or "", chunk.choices[0].finish_reason) for chunk in made]
            text, reason = "".join(text for text, _ in pieces), pieces[-1][1]
        else:
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert text == full[: full.index(stop)] and reason == "stop"


@pytest.mark.parametrize("stops", [("b c",), ("aab", "x"), ("aaa",), ()])
def test_stop_strings_in_any_pieces(stops: tuple[str, ...]) -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("aab c") for _ in range(12))
        cut, sent, left = StopStrings(stops), "", text
        while left and not cut.stopped:
            size = draw.randrange(1, 4)
            sent, left = sent + cut.push(left[:size]), left[size:]
        sent += "" if cut.stopped else cut.rest()
        ends = [text.index(stop) for stop in stops if stop in text]
        assert sent == text[: min(ends, default=len(text))] and cut.stopped == bool(ends)


def test_plain_completions_go_on_from_a_text(client: Any, steered: SteeredModel) -> None:
    made = client.completions.create(model=f"{NAME}:anger@50", prompt=["the boss", "my flat"], max_tokens=6, logprobs=2, n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3] and made.choices[0].text == made.choices[1].text
    assert made.choices[0].text != made.choices[2].text and len(made.choices[0].logprobs.tokens) == 6
    assert made.usage.completion_tokens == 24 and made.usage.prompt_tokens == 2 * 2
    best = made.choices[0].logprobs
    assert all(value <= max(top.values()) <= 0 for value, top in zip(best.token_logprobs, best.top_logprobs, strict=True))
    streamed = client.completions.create(model=f"{NAME}:anger@50", prompt="the boss", max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == made.choices[0].text
    twice = client.completions.create(model=NAME, prompt=["the boss", "the boss"], max_tokens=1, n=3)
    assert len(twice.choices) == 6 and twice.usage.prompt_tokens == 2 * 2, "each prompt counts, though it is the same one"


def test_a_completion_s_tokens_stand_where_they_do_also_in_a_stream(client: Any) -> None:
    """While a text waits that may be the beginning of a stop sequence, its tokens are told all the same."""
    asked: dict[str, Any] = {"model": NAME, "prompt": "the boss", "max_tokens": 12, "logprobs": 0, "temperature": 1.5, "seed": 3}
    whole = client.completions.create(**asked).choices[0]
    stop = whole.text[3:40] + "|"
    streamed = [chunk.choices[0] for chunk in client.completions.create(**asked, stop=stop, stream=True)]
    assert any(choice.logprobs and choice.logprobs.tokens and not choice.text for choice in streamed), "some text waits"
    offsets = [offset for choice in streamed if choice.logprobs for offset in choice.logprobs.text_offset]
    assert "".join(choice.text for choice in streamed) == whole.text
    assert len(offsets) == 12 and offsets == whole.logprobs.text_offset


def llama_like(*words: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words whose decoder takes a text's first space, as Llama 2's does."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(("<s>", *words))}, unk_token="<s>"))
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def written_parts(tokenizer: Any, prompt: list[int], reply: list[int], stops: tuple[str, ...] = (), raw: bool = False) -> list[Part]:
    """The parts of a reply that the last of its tokens ends."""
    asked = Ask(Request("text", tuple(prompt)), Decoding(len(reply)))
    text = writer_thread._Text(SimpleNamespace(tokenizer=tokenizer), Writing(asked, lambda part: None, stops, raw))  # type: ignore[arg-type]
    last = len(reply) - 1
    parts = [text.part(Written(0, token, "length" if place == last else None)) for place, token in enumerate(reply)]
    ends = [place for place, part in enumerate(parts) if part.ended]
    return parts[: ends[0] + 1]


def test_the_first_space_of_a_completion_is_its_own() -> None:
    tokenizer = llama_like("\u2581is", "\u2581Paris", "\u2581and", "Pa", ".")
    said = {raw: [part.text for part in written_parts(tokenizer, [0, 1], [2, 3, 5], raw=raw)] for raw in (True, False)}
    assert said == {True: [" Paris", " and", "."], False: ["Paris", " and", "."]}
    assert [part.text for part in written_parts(tokenizer, [0, 1], [4, 3], raw=True)] == ["Pa", " and"]
    assert [part.text for part in written_parts(tokenizer, [0], [2, 3], raw=True)] == ["Paris", " and"], "nothing was said before it"
    asked = Ask(Request("text", (0, 1)), Decoding(2), likeliest=1)
    answer = Answer(tokenizer, NAME, Wanted("none", None, (asked,)), chat=False)
    answer.choices[0].add(Part(" Paris and", (Written(0, 2, None, -1.0, ((4, -0.5),)), Written(0, 3, "length", -1.0)), "length"))
    told = answer.whole()["choices"][0]["logprobs"]
    assert told["tokens"] == [" Paris", " and"] and told["text_offset"] == [0, 6] and told["top_logprobs"][0] == {"Pa": -0.5}
    assert bytes(answer._token(2, -1.0)["bytes"]) == b" Paris"


def test_white_space_can_stop_a_reply() -> None:
    tokenizer = llama_like("\u2581Yes", ".", "\n", "\u2581", "\u2581No")

    def said(reply: list[int], *stops: str) -> tuple[str, str | None, int]:
        parts = written_parts(tokenizer, [0], reply, stops)
        return "".join(part.text for part in parts), parts[-1].ended, len(parts)

    assert said([1, 2, 3, 5], "\n") == ("Yes.", "stop", 3), "as soon as it is there"
    assert said([1, 2, 3], "\n") == ("Yes.", "stop", 3)
    assert said([1, 2, 3, 3, 5], "\n\n") == ("Yes.", "stop", 4)
    assert said([3, 1, 2, 4, 5, 2], "No") == ("Yes.  ", "stop", 5), "what stands before it stays"
    assert said([3, 4, 1, 2, 3, 5, 3, 4]) == ("Yes.\n No", "length", 8), "at the ends of a reply white space is none of it"
    assert said([1, 2, 3, 4], "\n\n") == ("Yes.", "length", 4)


def test_logprobs_come_token_by_token(client: Any) -> None:
    messages = [{"role": "user", "content": TEXT}]
    made = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, logprobs=True, top_logprobs=3).choices[0]
    content = made.logprobs.content
    assert len(content) == 5 and all(0 < len(token.top_logprobs) <= 3 for token in content)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in content)
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=5, logprobs=True, stream=True)
    tokens = [token.logprob for chunk in stream if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert tokens == [token.logprob for token in content]


def test_the_bytes_of_a_token_are_its_own() -> None:
    """Not those of the sign for a part of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    answer = Answer(PreTrainedTokenizerFast(tokenizer_object=core), NAME, Wanted("none", None, ()), chat=True)
    cat = [alphabet.index(character) for character in core.pre_tokenizer.pre_tokenize_str("🐱")[0][0]]
    shown = [answer._chat_token(Written(0, token, None, -1.0, ((token, -1.0),))) for token in cat]
    assert bytes(byte for one in shown for byte in one["bytes"]) == "🐱".encode()
    assert all(one["top_logprobs"][0]["bytes"] == one["bytes"] for one in shown)


def test_a_personality_follows_what_the_user_says(served: Running, steered: SteeredModel) -> None:
    made = ask(served, personality="neutral", max_tokens=8).json()
    assert made["emosteer"]["felt"].startswith("anger:"), "the judge reads the user's 'stop' as anger"
    assert made["choices"][0]["message"]["content"] == steered.generate(TEXT, mix=made["emosteer"]["felt"], max_new_tokens=8).text


def test_a_personality_follows_each_of_several_texts(served: Running) -> None:
    def texts(prompt: Any) -> tuple[Any, list[str]]:
        made = ask(served, "/v1/completions", prompt=prompt, personality="neutral", max_tokens=8).json()
        return made["emosteer"]["felt"], [choice["text"] for choice in made["choices"]]

    calm, angry = texts("the train was late"), texts(TEXT)
    assert angry[0].startswith("anger:") and not calm[0].startswith("anger:")
    assert texts(["the train was late", TEXT]) == ([calm[0], angry[0]], calm[1] + angry[1])
    assert texts([TEXT, TEXT]) == (angry[0], 2 * angry[1])


def test_many_at_once_and_each_gets_its_own_text(served: Running, steered: SteeredModel) -> None:
    """Forty requests of all kinds, more than may run at once; a fifth hangs up on its way."""
    draw = random.Random(0)
    cases = []
    for index in range(40):
        emotion = draw.choice([*steered.emotions, None])
        cases.append((f"{TEXT} {draw.choice(['now', 'home', 'alone'])}", emotion, draw.choice([3, 9, 20]), index % 5 == 4))

    def call(case: tuple[str, str | None, int, bool]) -> str | None:
        text, emotion, tokens, leaves = case
        body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 200 if leaves else tokens}
        body |= {"emotion": emotion, "intensity": 60} if emotion else {}
        if not leaves:
            return str(httpx.post(served.url + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"])
        with httpx.stream("POST", served.url + "/v1/chat/completions", json={**body, "stream": True}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
        return None

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(call, cases))
    for (text, emotion, tokens, leaves), reply in zip(cases, found, strict=True):
        options = {"intensity": 60} if emotion else {}
        assert leaves or reply == steered.generate(text, emotion, max_new_tokens=tokens, **options).text  # type: ignore[arg-type]
    settles(lambda: served.writer.n_running + served.writer.n_waiting == 0)
    assert served.writer.batch.n_rows == 0


def test_a_client_that_leaves_frees_its_rows_at_once(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a stream, while it waits for a whole reply, and before its turn."""
    usual = served.writer.batch.step
    monkeypatch.setattr(served.writer.batch, "step", lambda: time.sleep(0.02) or usual())
    metric = served.writer.metrics.cancelled.labels("client")
    before = metric._value.get()
    body = {"model": NAME, "messages": [{"role": "user", "content": TEXT}], "max_tokens": 200, "n": 4}
    with httpx.stream("POST", served.url + "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()  # held: one that is let go closes the stream, and the client has left
        assert response.status_code == 200 and next(lines)
        settles(lambda: served.writer.batch.n_rows == 8)
    settles(lambda: served.writer.batch.n_rows == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + "/v1/chat/completions", json={**body, "n": 20}, timeout=httpx.Timeout(5, read=0.5))
    settles(lambda: metric._value.get() - before == 24)
    assert served.writer.n_running + served.writer.n_waiting == 0


def test_whoever_comes_while_an_idle_server_frees_memory_is_not_forgotten(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's first wait is over and its second has not begun: nobody is there to be woken."""
    came, answers = threading.Event(), list[Any]()
    monkeypatch.setattr(writer_thread, "IDLE", 0.05)
    with running(steered) as server:

        def arrives() -> None:  # in the writer's own thread, which holds the lock: exactly between the two waits
            if not came.is_set():
                answers.append(server.writer.call(lambda: "done"))
                came.set()

        monkeypatch.setattr(writer_thread, "release_memory", arrives)
        assert came.wait(20) and answers[0].result(timeout=20) == "done"


def test_a_batch_that_is_half_full_lets_others_join_together(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(steered, max_batch=4) as server:
        batch, steps, joined = server.writer.batch, [0], list[tuple[int, int]]()
        step, join = batch.step, batch.join

        def counted() -> Any:
            steps[0] += 1
            return step()

        def noted(asked: Any) -> int:
            joined.append((steps[0], batch.n_requests))
            return join(asked)

        monkeypatch.setattr(batch, "step", counted)
        monkeypatch.setattr(batch, "join", noted)
        with concurrent.futures.ThreadPoolExecutor(14) as pool:
            answers = list(pool.map(lambda tokens: ask(server, max_tokens=tokens), [9, 14, 21, 30, 11, 17, 8, 25, 13, 19, 10, 23, 16, 12]))
        assert all(answer.status_code == 200 for answer in answers)
    times = sorted({at for at, _ in joined})
    late = [(before, at) for before, at in zip(times, times[1:], strict=False) if min(n for t, n in joined if t == at) >= 2]
    assert len(joined) == 14 and late and all(at - before >= JOIN_EVERY - 1 for before, at in late)


def test_many_prompts_at_once_are_read_over_several_steps(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's first token waits until all are read, and nobody is kept waiting once there is room."""
    monkeypatch.setattr(writer_thread, "READ_AT_ONCE", 20)
    with running(steered, max_batch=8) as server:
        batch, here = server.writer.batch, list[int]()
        step = batch.step
        monkeypatch.setattr(batch, "step", lambda: (here.append(batch.n_requests), step())[1])
        held, calls = threading.Event(), 8
        server.writer.call(lambda: held.wait(20))
        with concurrent.futures.ThreadPoolExecutor(calls) as pool:
            answers = [pool.submit(ask, server, max_tokens=12) for _ in range(calls)]
            settles(lambda: server.writer.n_waiting == calls)
            held.set()
            found = {answer.result().json()["choices"][0]["message"]["content"] for answer in answers}
    assert found == {steered.generate(TEXT, max_new_tokens=12).text}
    new = [after - before for before, after in zip([0, *here], here, strict=False)]
    joined = list(itertools.takewhile(lambda count: count > 0, new))
    assert len(joined) >= 2 and sum(joined) == calls and max(joined) < calls, "step after step, until all are there"


# ---- refusals ------------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt-4"}, 404, "the model 'gpt-4' does not exist here"),
    ({"model": f"{NAME}:"}, 404, "does not exist"),
    ({"model": f"{NAME}:angr"}, 400, "unknown emotion 'angr' (did you mean 'anger'?)"),
    ({"model": f"{NAME}:anger@101"}, 400, "between -100 and 100, found 101"),
    ({"model": f"{NAME}:anger@60", "emotion": "fear"}, 400, "expected one of the two"),
    ({"model": 5}, 400, "model: input should be a valid string, found 5"),
    ({"messages": []}, 400, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "user"}]}, 400, "messages.0.content: field required"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "expected 'role' to be system or user"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "message 1"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "stop " * 400}]}, 400, "exceeds the context"),
    ({"emotion": "angr"}, 400, "did you mean 'anger'"),
    ({"emotion": "anger", "intensity": 100.5}, 400, "between -100 and 100"),
    ({"emotion": "anger", "intensity": "60"}, 400, 'intensity: input should be a valid number, found "60"'),
    ({"emotion": "anger", "intensity": 60, "strength": 1}, 400, "found both"),
    ({"intensity": 60}, 400, "asks for an emotion"),
    ({"mix": {"angr": 40}}, 400, "unknown emotion 'angr'"),
    ({"vad": [0.1, 0.2]}, 400, "vad"),
    ({"vad": [0.1, 0.2, 3]}, 400, "three numbers from -1 to 1"),
    ({"vad": [0.1, 0.2, 0.3], "mix": {"anger": 40}}, 400, "found two of them"),
    ({"mix": {"anger": 40}, "emotion": "fear"}, 400, "leave the emotion"),
    ({"mix": "anger"}, 400, "EMOTION:INTENSITY"),
    ({"arc": "anger:40 ->"}, 400, "found ''"),
    ({"arc": "anger:40 -> fear:3", "arc_tokens": 1}, 400, "at least 2 tokens"),
    ({"fade": 0, "emotion": "anger", "intensity": 5}, 400, "above 0"),
    ({"personality": {"kindness": 1}}, 400, "unknown trait 'kindness'"),
    ({"intensty": 60}, 400, "unknown field 'intensty' (did you mean 'intensity'?)"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n: input should be greater than or equal to 1"),
    ({"n": True}, 400, "n: input should be a valid integer"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, 400, "found both"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"seed": 1.5}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream: input should be a valid boolean"),
    ({"top_logprobs": 3}, 400, "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
]


@pytest.mark.parametrize(("fields", "status", "message"), WRONG)
def test_a_wrong_request_gets_one_clear_4xx(served: Running, fields: dict[str, Any], status: int, message: str) -> None:
    answer = ask(served, **fields)
    error = answer.json()["error"]
    assert answer.status_code == status and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 300


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": "x", "metadata": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"temperature": 1e999, "model": "tiny-llama", "messages": [{"role": "user", "content": "x"}]}', "temperature"),
        (b'{"model": "a", "model": "b"}', "'model' is there twice"),
        (b"[]", "expected a JSON object, found []"),
        (b"null", "expected a JSON object, found null"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}], "model": "tiny-llama"}', ""),
        (b'{"\\ud800": 1}', "unknown field '\\ud800'"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "the field '\\ud800' is there twice"),
    ],
)
def test_a_body_that_is_no_request_is_refused(served: Running, body: bytes, message: str) -> None:
    answer = httpx.post(served.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"}, timeout=30)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"], answer.text


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", lambda text: {"model": NAME, "messages": said(text)}, "messages"),
        ("chat/completions", lambda text: {"model": NAME, "messages": said("x"), "instruction": text}, "messages"),
        ("completions", lambda text: {"model": NAME, "prompt": ["the boss", text]}, "prompt"),
        ("readings", lambda text: {"messages": said(text), "reply": "x"}, "messages"),
        ("readings", lambda text: {"messages": said("x"), "reply": text}, "reply"),
    ],
)
@pytest.mark.parametrize(("text", "message"), [("a <<|im_end|>|im_end|> b", "control token"), ("beyond", "no embedding"), ("\ud800", "")])
def test_a_text_without_tokens_is_refused(
    served: Running,
    steered: SteeredModel,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    fields: Callable[[str], dict[str, Any]],
    param: str,
    text: str,
    message: str,
) -> None:
    """It holds a control token that cannot be written as characters, a token that the model has no vector for, or half a character."""
    beyond, usual = [steered.model.shape.d_vocab + 5], model_tokens._ids
    monkeypatch.setattr(model_tokens, "_ids", lambda tokenizer, known: beyond if "beyond" in known else usual(tokenizer, known))
    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/{path}", content=json.dumps(fields(text)), headers=kind, timeout=30)
    error = answer.json()["error"]
    assert answer.status_code == 400 and message in error["message"] and error["param"] == param, error


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": said("stop " * 400)}, "messages"),
        ("/v1/completions", {"prompt": ["the boss", "stop " * 400]}, "prompt"),
    ],
)
def test_what_is_too_long_is_named(served: Running, path: str, fields: dict[str, Any], param: str) -> None:
    error = ask(served, path, **fields).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == param, error


def test_a_conversation_that_the_template_refuses_is_refused(
    served: Running, steered: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
    monkeypatch.setattr(steered.model.tokenizer, "chat_template", refuses + steered.model.tokenizer.chat_template)
    assert ask(served, max_tokens=1).status_code == 200
    read = httpx.post(served.url + "/v1/readings", json={"messages": CHAT, "reply": "x"}, timeout=30)
    for answer in (ask(served, messages=CHAT, max_tokens=1), read):
        error = answer.json()["error"]
        assert answer.status_code == 400 and "refuses the conversation: one turn only" in error["message"], error


def test_hundreds_of_malformed_requests_get_as_many_4xx(served: Running) -> None:
    draw = random.Random(1)
    good = {
        "model": NAME,
        "messages": CHAT,
        "emotion": "anger",
        "intensity": 50,
        "temperature": 1.0,
        "stop": ["x"],
        "n": 1,
        "max_tokens": 2,
    }
    junk: list[Any] = ["", "x" * 300, -1, 10**40, 1.5, None, True, [], {}, [[]], {"a": {}}, "\x00", "null", [None], -(10**9)]
    statuses: dict[int, int] = {}
    with httpx.Client(base_url=served.url, timeout=30) as http:
        for _ in range(300):
            broken: dict[str, Any] = dict(good)
            kind = draw.randrange(5)
            if kind == 4:
                broken[draw.choice(["n", "max_tokens", "temperature", "intensity", "top_p", "seed"])] = draw.choice(["", "1", [], {}, [1]])
            elif kind == 0:
                broken[draw.choice(["modl", "__class__", "emotion ", "x" * 50, ""])] = 1
            elif kind == 1:
                broken.pop(draw.choice(["model", "messages"]))
            elif kind == 2:
                name = draw.choice(
                    [name for name in good if name not in ("n", "stop", "temperature", "intensity", "max_tokens", "emotion")]
                )
                broken[name] = draw.choice(junk)
            data = json.dumps(broken).encode()
            if kind == 3:
                data = data[: draw.randrange(len(data))]
            answer = http.post("/v1/chat/completions", content=data, headers={"content-type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"], (broken, answer.text)
    assert sum(statuses.values()) == 300 and set(statuses) == {400, 404}


def test_the_client_sees_the_protocols_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist here") as missing:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": TEXT}])
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="unknown emotion"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": TEXT}], extra_body={"emotion": "angr"})


def test_paths_methods_and_kinds_of_body(served: Running) -> None:
    answers = [
        (httpx.get(served.url + "/v2"), 404, "there is nothing at /v2"),
        (httpx.get(served.url + "/v1/chat/completions"), 405, "GET is not served"),
        (httpx.get(served.url + "/v1/models/gpt-4"), 404, "does not exist"),
        (httpx.post(served.url + "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415, "application/json"),
        (httpx.post(served.url + "/v1/completions", json={"model": NAME, "prompt": "x", "guidance": 2}), 400, "no guidance"),
        (httpx.post(served.url + "/v1/completions", json={"model": NAME, "prompt": [1, 2]}), 400, "prompt"),
        (httpx.post(served.url + "/v1/completions", json={"model": NAME, "prompt": "x", "echo": True}), 400, "echo"),
        (httpx.post(served.url + "/v1/completions", json={"model": NAME, "prompt": ""}), 400, "the prompt is empty"),
    ]
    for answer, status, message in answers:
        assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
        assert answer.headers["x-content-type-options"] == "nosniff" and "default-src 'none'" in answer.headers["content-security-policy"]


# ---- who may ask ---------------------------------------------------------------------------------------------------------------


def test_pages_of_others_and_foreign_names_are_kept_out(served: Running) -> None:
    url, body = served.url + "/v1/chat/completions", {"model": NAME, "messages": CHAT, "max_tokens": 1}
    assert httpx.post(url, json=body, headers={"origin": "https://evil.example"}).status_code == 403
    assert httpx.get(served.url + "/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert httpx.post(url, json=body, headers={"origin": served.url}).status_code == 200, "its own page"
    answer = httpx.options(url, headers={"origin": "https://evil.example", "access-control-request-method": "POST"})
    assert "access-control-allow-origin" not in answer.headers and answer.status_code == 405


def test_a_key_opens_and_cors_only_where_asked_for(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"max_queue": 0, "max_batch": 1, "max_body": 5000, "max_tokens": 40}
    with running(steered, api_key="secret", cors=("https://page.example",), **bounds) as server:
        url, body = server.url + "/v1/chat/completions", {"model": NAME, "messages": CHAT, "max_tokens": 1}
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Basic secret"}):
            for path in ("/v1/models", "/metrics", "/v1/emotions"):
                answer = httpx.get(server.url + path, headers=wrong)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        key = {"authorization": "Bearer secret"}
        assert httpx.get(server.url + "/healthz").status_code == 200 and httpx.get(server.url + "/").status_code == 200
        answer = httpx.post(url, json=body, headers={**key, "origin": "https://page.example", "host": "any.example"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"
        asked = {"origin": "https://other.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in httpx.options(url, headers=asked).headers
        metrics = httpx.get(server.url + "/metrics", headers=key).text
        assert 'emosteer_requests_total{path="/v1/chat/completions",status="200"} 1.0' in metrics
        assert "emosteer_first_token_seconds_count 1.0" in metrics and "emosteer_tokens_written_total 1.0" in metrics
        # the bounds
        usual, held = server.writer.batch.step, threading.Event()
        monkeypatch.setattr(server.writer.batch, "step", lambda: (held.wait(20), usual())[1])
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=key) as running_already:
            lines = running_already.iter_lines()
            next(lines)
            answer = httpx.post(url, json=body, headers=key)
            held.set()
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"]
        answer = httpx.post(url, json={**body, "user": "x" * 6000}, headers=key)
        assert answer.status_code == 413 and "5000 bytes" in answer.json()["error"]["message"]
        answer = httpx.post(url, content=iter([b"x" * 3000] * 3), headers={**key, "content-type": "application/json"})
        assert answer.status_code == 413, "also where the length is not announced"
        answer = httpx.post(url, json={**body, "max_tokens": 41}, headers=key)
        assert answer.status_code == 400 and "at most 40 (" in answer.json()["error"]["message"]


def test_more_replies_than_there_is_ever_room_for_are_no_matter_of_waiting(steered: SteeredModel) -> None:
    with running(steered, max_batch=2, max_queue=3) as server:
        assert ask(server, n=5, max_tokens=1).status_code == 200
        answer = ask(server, n=6, max_tokens=1)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == "n", error
        assert "n=6 asks for 6 replies; expected at most 5" in error["message"]
        for fields, param in (({"n": 3}, "n"), ({"prompt": ["a"] * 6}, "prompt")):
            answer = ask(server, "/v1/completions", **{"prompt": ["the boss", "my flat"], "max_tokens": 1, **fields})
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == param, error
            assert f"n={fields.get('n', 1)} for each of {len(fields.get('prompt', 'ab'))} prompts asks for 6 replies" in error["message"]


def test_time_and_memory_are_bounded_and_a_failing_step_ends_no_server(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(steered, cache_gb=1e-4) as server:
        patient = server.writer.settings
        cells = server.writer.cells
        answer = ask(server, max_tokens=220)
        assert answer.status_code == 400 and f"has memory for {cells // 2}" in answer.json()["error"]["message"]
        usual = server.writer.batch.step
        monkeypatch.setattr(server.writer.batch, "step", lambda: time.sleep(0.05) or usual())
        server.writer.settings = replace(patient, timeout=0.15)
        answer = ask(server, max_tokens=30)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
        streamed = [line for line in ask(server, max_tokens=30, stream=True).iter_lines() if line]
        assert json.loads(streamed[-1].removeprefix("data: "))["error"]["code"] == "timeout"

        server.writer.settings = patient

        def fails() -> Any:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")

        monkeypatch.setattr(server.writer.batch, "step", fails)
        answer = ask(server, max_tokens=2)
        assert answer.status_code == 503 and "out of memory" in answer.json()["error"]["message"]
        monkeypatch.setattr(server.writer.batch, "step", usual)
        assert ask(server, max_tokens=2).status_code == 200 and server.writer.batch.n_rows == 0


@pytest.mark.parametrize("fault", ["join", "cancel", "part", "note"])
def test_no_fault_of_the_writer_keeps_anybody_waiting(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Wherever it is: nobody would be answered any more. One that is noted on a screen that is gone ends in SystemExit."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("a fault")

    with running(steered) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        batch, step = server.writer.batch, server.writer.batch.step
        monkeypatch.setattr(batch, "step", lambda: time.sleep(0.05) or step())  # ten seconds, if nothing ends it
        waiting = pool.submit(ask, server, max_tokens=200)
        settles(lambda: server.writer.n_running == 1)
        with monkeypatch.context() as patch:
            if fault == "note":
                patch.setattr(writer_thread, "note", lambda message: sys.exit(1))
            where, name = {"part": (writer_thread._Text, "part"), "note": (batch, "step")}.get(fault, (batch, fault))
            patch.setattr(where, name, fails)
            if fault == "join":
                assert ask(server, max_tokens=2).status_code == 500, "also who was about to be written for"
            elif fault == "cancel":
                body = {"model": NAME, "messages": CHAT, "max_tokens": 200, "stream": True}
                with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=30) as leaves:
                    lines = leaves.iter_lines()  # held, or the client leaves at once
                    next(lines)
                    settles(lambda: server.writer.n_running == 2)  # who leaves before that has no row to free
            answer = waiting.result()
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "step_failed"
        assert server.writer.alive and ask(server, max_tokens=2).status_code == 200 and batch.n_rows == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writer_that_cannot_go_on_tells_everybody(steered: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()

    def fails() -> Any:
        held.wait(20)
        raise RuntimeError("a fault")

    with running(steered, max_batch=1) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(server.writer.batch, "step", fails)
        monkeypatch.setattr(server.writer.batch, "clear", fails)
        answers = [pool.submit(ask, server) for _ in range(2)]
        settles(lambda: server.writer.n_running == server.writer.n_waiting == 1)
        held.set()
        assert {answer.result().status_code for answer in answers} == {500, 503}
        settles(lambda: not server.writer.alive)
        assert ask(server).status_code == httpx.get(server.url + "/healthz").status_code == 503


def test_whoever_is_being_answered_when_it_stops_is_finished(steered: SteeredModel) -> None:
    with running(steered) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server, max_tokens=150)
        settles(lambda: server.writer.n_running == 1)
        server.server.should_exit = True
        assert waiting.result().json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "give an API key"),
        ({"host": "::"}, "give an API key"),
        ({"host": "example.com"}, "give an API key"),
        ({"api_key": " "}, "empty"),
        ({"api_key": "\u00e9"}, "ASCII"),
        ({"api_key": "secret "}, "begins or ends with white space"),
        ({"api_key": "\tsecret"}, "begins or ends with white space"),
        ({"port": 70000}, "--port"),
        ({"max_batch": 0}, "--max-batch"),
        ({"timeout": float("nan")}, "--timeout"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServeSettings(**settings)


def test_an_address_that_is_taken_is_said(served: Running) -> None:
    with pytest.raises(EmosteerError, match="cannot listen at 127.0.0.1"):
        listen(ServeSettings(port=int(served.url.rpartition(":")[2])))


# ---- what is read ----------------------------------------------------------------------------------------------------------------


def test_a_reading_tells_surprise_and_state_token_by_token(served: Running, steered: SteeredModel) -> None:
    import torch

    reply = "stop the train"
    found = httpx.post(served.url + "/v1/readings", json={"messages": CHAT, "reply": reply}, timeout=30).json()
    assert found["judge"]["label"] == "anger" and found["sound"] is True and found["problem"] is None
    assert "".join(token["text"] for token in found["tokens"]).strip() == reply
    [request] = steered._work(CHAT, None, {}).requests
    ids = [*request.ids, *steered.model.text_ids(reply)]
    n = len(request.ids)
    with torch.no_grad():
        logprobs = steered.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        states = steered.model.read(torch.tensor([ids]), [Site(1, RESID_POST)], bridge=False)[Site(1, RESID_POST)][0]
    assert steered.circuit is not None
    for place, token in enumerate(found["tokens"]):
        assert token["surprise"] == pytest.approx(-logprobs[n + place - 1, ids[n + place]].item(), abs=1e-4)
        for index, emotion in enumerate(steered.emotions):
            expected = states[n + place] @ steered.circuit.vectors[index, 1]
            assert token["along"][emotion] == pytest.approx(expected.item(), abs=1e-4)
    for wrong in ({"messages": CHAT, "reply": " "}, {"messages": CHAT}, {"messages": CHAT, "reply": "stop " * 300}):
        assert httpx.post(served.url + "/v1/readings", json=wrong).status_code == 400


def test_what_the_circuit_knows_is_told(served: Running, steered: SteeredModel) -> None:
    found = httpx.get(served.url + "/v1/emotions").json()
    assert [emotion["name"] for emotion in found["emotions"]] == list(steered.emotions) and found["most_together"] == 100
    assert steered.circuit is not None
    assert found["emotions"][0]["dial"]["50"] == steered.circuit.strength_at("anger", 50)
    assert len(found["emotions"][0]["heads"]) == int(steered.circuit.heads[0].sum())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_once_running_replies_are_finished(
    steered: SteeredModel, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    found: list[Any] = []

    def call(address: str) -> None:
        body = {"model": NAME, "messages": CHAT, "max_tokens": 150, "stream": True}
        with httpx.stream("POST", address + "/v1/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(os.getpid(), number)
            found.extend(line for line in lines if line)

    def ready(address: str) -> None:
        caller.append(threading.Thread(target=call, args=(address,)))
        caller[0].start()

    caller: list[threading.Thread] = []
    assert steered.circuit is not None
    before = signal.getsignal(number)
    serve(steered.model, steered.circuit, ServeSettings(port=0), ready)
    caller[0].join(10)
    assert found[-1] == "data: [DONE]" and '"finish_reason": "length"' in found[-2]
    assert signal.getsignal(number) is before and "stopped" in capsys.readouterr().err


#: The command, with a forced end that comes soon, and a model that writes slowly and on and on.
COMMAND = """
import sys, time
from emosteer.base import stopping
stopping.GRACE = 0.3
from emosteer.generation.running_batch import RunningBatch
from emosteer.models.model import Model
Model.stop_ids, step = frozenset(), RunningBatch.step
RunningBatch.step = lambda batch: (time.sleep(0.02), step(batch))[1]
from emosteer.cli.start import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_lets_running_replies_finish(steered: SteeredModel, tmp_path: Path, number: signal.Signals) -> None:
    """For as long as it was told, whatever ends other commands sooner."""
    steered.hf.save_pretrained(tmp_path / "tiny")
    steered.model.tokenizer.save_pretrained(tmp_path / "tiny")
    dialled_circuit(Model.load(str(tmp_path / "tiny"), device="cpu")).save(tmp_path / "circuit.safetensors")
    arguments = ["serve", "--model", "./tiny", "--circuit", "circuit.safetensors", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline()
        assert " at http://" in address, process.communicate()[1]
        name, url = address.split(" at ")[0], address.split(" at ")[1].split("/v1")[0]
        body = {"model": name, "messages": CHAT, "max_tokens": 100, "stream": True}
        with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            found = [line for line in lines if line]
        assert found[-1] == "data: [DONE]" and '"finish_reason": "length"' in found[-2]
        said = process.communicate(timeout=20)[1]
        assert process.returncode == 0 and said.splitlines()[-1] == "stopped", said
    finally:
        process.kill()


def test_a_signal_that_comes_before_the_server_listens_to_it_ends_it(steered: SteeredModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert steered.circuit is not None
    begun, again = time.monotonic(), threading.Timer(20, os.kill, (os.getpid(), signal.SIGTERM))
    again.start()
    serve(steered.model, steered.circuit, ServeSettings(port=0), lambda address: os.kill(os.getpid(), signal.SIGTERM))
    again.cancel()
    assert "stopped" in capsys.readouterr().err and time.monotonic() - begun < 15


def test_the_command_says_what_is_wrong_before_it_loads_a_model(capsys: pytest.CaptureFixture[str], served: Running) -> None:
    for arguments, message in (
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines; give an API key"),
        (["--engine", "vllm"], "docs/SERVING.md says how vLLM serves exported circuits"),
        (["--max-batch", "0"], "--max-batch must lie between 1 and 1024"),
        (["--port", served.url.rpartition(":")[2]], "try another --port"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["serve", "--model", "/nowhere", *arguments])
        assert end.value.code in (1, 2) and message in capsys.readouterr().err
