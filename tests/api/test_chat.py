"""The chat: what is felt goes into the replies, commands change it, and what is wrong changes nothing; by pipe and in a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emosteer.api.chat import COMMANDS, Chat, completions
from emosteer.api.steered_model import SteeredModel
from emosteer.base.errors import DataError, EmosteerError, ModelError, UsageError
from emosteer.cli import chat as chat_command
from tests.helpers.dialled import endless_model

SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def steered() -> SteeredModel:
    return endless_model()


@pytest.fixture
def chat(steered: SteeredModel) -> Chat:
    return Chat(steered, dict(SHORT), lambda texts: [{"anger": 1.0} if "stop" in text else {} for text in texts])  # type: ignore[arg-type]


def say(chat: Chat, text: str) -> str:
    return "".join(chat.reply(text))


def test_what_is_felt_is_what_generate_writes_in_the_conversation(chat: Chat, steered: SteeredModel) -> None:
    said: list[dict[str, str]] = []

    def expect(text: str, felt: str, **options: Any) -> None:
        said.append({"role": "user", "content": text})
        reply = say(chat, text)
        assert reply == steered.generate(said, **SHORT, **options).text and chat.turns[-1].felt == felt
        said.append({"role": "assistant", "content": reply})

    expect("the train was late", "neutral")
    assert chat.command("/emotion Anger") == "feels anger"
    expect("the boss said stop", "anger", emotion="anger")
    assert chat.command("/emotion fear -40") == "feels fear:-40"
    expect("we waited", "fear:-40", emotion="fear", intensity=-40)
    assert chat.command("/mix sadness:80 + anger:40").startswith("feels sadness:80 + anger:40; that is more than the text bears")
    expect("my flat", "sadness:66.6 + anger:33.3", mix="sadness:66.6 + anger:33.3")
    assert chat.command("/arc fear:80 -> happiness:60") == "feels fear:80 -> happiness:60"
    expect("never", "fear:80 -> happiness:60", arc="fear:80 -> happiness:60")
    chat.command("/emotion anger 80")
    assert chat.command("/fade 1") == "feels anger:80, half after 1 replies"
    expect("no", "anger:80", mix="anger:80")
    expect("yes", "anger:40", mix="anger:40")
    chat.command("/emotion neutral")
    chat.command("/fade off")
    assert "mood of stability:-1" in chat.command("/personality stability:-1")
    chat.command("/emotion fear")
    assert chat.command("/personality neutral").endswith("; give fear an intensity, or it is not felt beside a personality")
    assert "not felt" not in chat.command("/personality off")
    chat.command("/emotion neutral")
    chat.command("/personality stability:-1")
    expect("stop", chat._felt("stop")[0], mix=chat._felt("stop")[0])
    assert chat.turns[-1].felt.startswith("anger:")


def test_a_reply_that_is_ended_early_is_kept_as_far_as_it_came(chat: Chat) -> None:
    pieces = chat.reply("the train was late")
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert chat.turns[-1].reply == first.strip()
    with pytest.raises(EmosteerError, match="not empty"):
        say(chat, " ")
    assert len(chat.turns) == 1


def test_undo_reset_history_and_save(chat: Chat, tmp_path: Path) -> None:
    chat.system = "keep calm"
    first = say(chat, "the train was late")
    say(chat, "my flat")
    assert chat.command("/undo") == "taken back: my flat" and len(chat.turns) == 1
    assert chat.command("/history") == f"you: the train was late\n(neutral) {first}"
    path = tmp_path / "talk.json"
    assert chat.command(f"/save {path}") == f"1 turns -> {path}"
    row = json.loads(path.read_text())
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"] and row["felt"] == ["neutral"]
    chat.command("/reset")
    assert chat.command("/history") == "nothing was said yet" and all(f"/{name}" in chat.command("/help") for name in COMMANDS)


def test_compare_writes_under_every_emotion_and_changes_nothing(chat: Chat, steered: SteeredModel) -> None:
    chat.command("/emotion fear 60")
    found = chat.compare("the boss said stop")
    assert [name for name, _ in found] == ["neutral", *steered.emotions] and not chat.turns
    for name, reply in found:
        options = {} if name == "neutral" else {"emotion": name, "intensity": 60}
        assert reply.text == steered.generate("the boss said stop", **SHORT, **options).text  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/emotin fear", "unknown command '/emotin'.*emotion"),
        ("/emotion", "expected /emotion NAME"),
        ("/emotion feer", "unknown emotion 'feer'.*fear"),
        ("/emotion fear strong", "such as /emotion fear 60"),
        ("/emotion fear 101", "between -100 and 100"),
        ("/mix fear", "EMOTION:INTENSITY"),
        ("/mix fear:1 -> anger:2", "use /arc"),
        ("/arc feer:60", "unknown emotion 'feer'"),
        ("/fade soon", "expected a number"),
        ("/fade 0", "above 0"),
        ("/personality kindness:1", "unknown trait"),
        ("/undo all", "takes nothing"),
        ("/undo", "nothing to take back"),
        ("/save", "expected /save FILE"),
        ("/save talk.json", "nothing to save"),
        ("/save .", "there already"),
    ],
)
def test_wrong_commands_change_nothing(chat: Chat, line: str, message: str) -> None:
    chat.command("/emotion anger 50")
    with pytest.raises(UsageError, match=message):
        chat.command(line)
    assert chat.label == "anger:50" and not chat.turns


def test_words_complete() -> None:
    known = ("anger", "fear", "sadness")
    assert completions("/e", known) == ["/emotion"] and completions("/re", known) == ["/retry", "/reset"]
    assert completions("/emotion f", known) == ["fear"] and completions("/mix fear:20 + sa", known) == ["sadness:"]
    assert completions("/arc ", known) == ["anger:", "fear:", "sadness:"] and completions("hello", known) == []
    assert completions("/personality st", known) == ["stability:"] and completions("/emotion fear 6", known) == []


def test_in_a_terminal_lines_are_typed_completed_and_ended(chat: Chat) -> None:
    pytest.importorskip("prompt_toolkit", reason="prompt-toolkit is not installed; it comes with emosteer[chat]")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from emosteer.cli.chat import _Reader, _session, _typed

    reader = _Reader("none")
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("/emotion fear 60\nhello\nnot this\x03bye\n\x04")
        assert list(_typed(chat, reader)) == ["/emotion fear 60", "hello", "bye"]
        session = _session(chat, reader)
        assert session.completer is not None
        for line, expected in (("/emo", ("/emotion", -4)), ("/mix fear:2 + sad", ("sadness:", -3)), ("/emotion ", ("anger", 0))):
            first = next(iter(session.completer.get_completions(Document(line), CompleteEvent())))
            assert (first.text, first.start_position) == expected
        chat.command("/emotion fear 60")
        reader.last = "fear 80%"
        assert callable(session.bottom_toolbar) and "feels fear:60  |  last reply read as fear 80%" in str(session.bottom_toolbar())


def test_through_a_pipe_the_command_answers_line_by_line(
    steered: SteeredModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import emosteer.api.loading as loading
    from emosteer.cli import main as cli

    monkeypatch.setattr(loading, "load", lambda *_, **__: steered)

    def run(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as end:
            cli.main(["chat", "--judge", "none", "--max-new-tokens", "8", *arguments])
        shown = capsys.readouterr()
        return int(str(end.value.code)), shown.out, shown.err

    anger = steered.generate("the boss said stop", "anger", intensity=50, **SHORT).text
    plain = steered.generate("the boss said stop", **SHORT).text
    code, out, err = run("the boss said stop\n\n/emotion neutral\n/retry\n/compare\n/quit\nnever\n", "-e", "anger", "--intensity", "50")
    lines = out.splitlines()
    assert code == 0 and lines[:3] == [anger, "feels neutral", plain] and "feels anger:50" in err
    assert lines[3].split() == ["feels", "reply", "read", "as"] and [line.split()[0] for line in lines[4:]] == [
        "neutral",
        *steered.emotions,
    ]
    assert run("/emotin\n")[0] == 2 and run("hello\n", "-e", "anger", "--mix", "fear:2")[0] == 2


def test_a_judge_that_cannot_be_had_costs_no_reply(chat: Chat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that of a turn nor those that are compared."""
    reader = chat_command._Reader("embedded")

    def lacking() -> None:
        raise ModelError("cannot download the encoder")

    assert reader.reader is not None
    monkeypatch.setattr(reader.reader, "judges", lacking)
    assert chat_command._carry_out(chat, reader, "/compare the boss said stop", interactive=False)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["neutral", *chat.model.emotions]
    assert err.count("no judge reads the replies: cannot download the encoder") == 1
    assert chat_command._carry_out(chat, reader, "the boss said stop", interactive=False) and len(chat.turns) == 1


def test_what_cannot_be_written_again_is_not_lost(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = chat_command._Reader("none")
    chat_command._carry_out(chat, reader, "the boss said stop", interactive=False)
    kept, since = list(chat.turns), chat.felt_since

    def fails(self: Chat, text: str) -> Iterator[str]:
        raise UsageError("this circuit is not calibrated")

    monkeypatch.setattr(Chat, "reply", fails)
    with pytest.raises(UsageError, match="not calibrated"):
        chat_command._carry_out(chat, reader, "/retry", interactive=False)
    assert chat.turns == kept and chat.felt_since == since


def test_bytes_that_are_no_text_end_a_piped_chat_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n\xff\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="not UTF-8"):
        list(chat_command._piped())
