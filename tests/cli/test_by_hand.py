"""`emosteer judge --by-hand` as a reader meets it: lines on stdin, single keys on a pseudo-terminal, and the scores; judges are fakes."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.files import sha256_text
from emosteer.cli import main as cli
from emosteer.judges import registry
from emosteer.judges.by_hand import draw, sheet_of
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.judges.soundness import SoundnessCheck
from emosteer.scenarios.scenarios import EMOTIONS

try:
    import pty
    import termios
except ImportError:  # there are no pseudo-terminals on Windows
    pty = None  # type: ignore[assignment]

#: Texts and prompts that name no emotion; everything else of a line is to be hidden.
TEXTS = {
    "Get out of my flat!": "anger",
    "I miss her so.": "sadness",
    "My hands shake.": "fear",
    "It was a day.": "neutral",
    "the the": "disgust",
}
ROWS = [
    {
        "id": f"s{n}/positive/{EMOTIONS[n]}",
        "emotion": EMOTIONS[n],
        "method": f"method-{n}",
        "prompt": f"The bus is late, {n}.",
        "text": text,
        "judged": label,
        "probabilities": {label: 1.0},
        "strength": 7.25,
    }
    for n, (text, label) in enumerate(TEXTS.items())
]
ORDER = [card.text for card in draw(sheet_of([(row["text"], row) for row in ROWS]))]
HIDDEN = ("method", "positive", "s0", "strength", "7.25", "probabilities", "judged")


class FakeJudge:
    """Knows its texts; whatever else it is asked is fear. The last of them is a failed call where `fails`."""

    def __init__(self, name: str = "embedded", knows: bool = True, fails: bool = False) -> None:
        self.name, self.key, self.knows, self.fails, self.calls, self.closed = name, name, knows, fails, [], False  # type: ignore[var-annotated]

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        self.calls.append(list(texts))
        labels = [TEXTS.get(text, "fear") if self.knows else "fear" for text in texts]
        return [Opinion(None, "out of order") if self.fails else Opinion({one: float(one == label) for one in LABELS}) for label in labels]

    def close(self) -> None:
        self.closed = True


class FakeSoundness:
    key = "s1"

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        return [Soundness(text != "the the", (), 0.5) for text in texts]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeJudge:
    judge = FakeJudge()
    monkeypatch.setitem(registry.KINDS, "embedded", registry.JudgeKind("embedded", lambda reference, options: judge))
    monkeypatch.setattr(SoundnessCheck, "load", lambda encoder=None: FakeSoundness())
    return judge


@pytest.fixture
def run(fake: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "f.jsonl", *ROWS)

    def call(*arguments: object, said: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        with pytest.raises(SystemExit) as stop:
            cli.main(["judge", *([] if "--judge" in arguments else ["--judge", "embedded"]), *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells(line: str) -> list[str]:
    """A line of a table, as the words that it prints."""
    return line.split()


def keys(labels: dict[str, str] = TEXTS) -> str:
    """What a reader types who gives these labels, in the order of the texts."""
    return "".join(f"{labels[text][0]}\n" for text in ORDER)


def told(err: str) -> str:
    """The dialogue without the line that lists the keys."""
    return "\n".join(line for line in err.splitlines() if not line.startswith("a anger"))


# ---- labelling by lines ------------------------------------------------------------------------------------------------------------


def test_the_reader_sees_texts_and_nothing_of_their_targets(run: Run, tmp_path: Path, fake: FakeJudge) -> None:
    code, out, err = run("f.jsonl", "--by-hand", said="n\n" * 4)
    assert code == 0 and out == "" and fake.calls == []
    shown = told(err)
    assert [line for line in shown.splitlines() if line in TEXTS] == ORDER
    assert not [word for word in (*HIDDEN, *EMOTIONS, "The bus") if word in shown] and "\x1b" not in err
    assert all(f"{n} of 5\n" in err for n in range(1, 6)) and err.count("a anger") == 1
    assert err.endswith("4 of 5 texts are labelled -> f.labels.jsonl; the same command goes on\n")
    kept = (tmp_path / "f.labels.jsonl").read_text()
    assert not [word for word in (*HIDDEN, *EMOTIONS, "The bus") if word in kept]
    assert [(row["text"], row["label"], row["text_sha256"]) for row in rows_of(tmp_path / "f.labels.jsonl")] == [
        (text, "neutral", sha256_text(text)) for text in ORDER[:4]
    ]


def test_the_prompt_is_shown_where_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    _, _, err = run("f.jsonl", "--by-hand", "--show-prompt", "--out", "new/l.jsonl", said="n\nq\n")
    prompt = next(row["prompt"] for row in ROWS if row["text"] == ORDER[0])
    assert f"prompt: {prompt}\nreply:\n{ORDER[0]}\n" in err and not [word for word in (*HIDDEN, *EMOTIONS) if word in told(err)]
    assert len(rows_of(tmp_path / "new" / "l.jsonl")) == 1 and not (tmp_path / "f.labels.jsonl").exists()


def test_words_unknown_keys_help_and_back(run: Run, tmp_path: Path) -> None:
    code, _, err = run("f.jsonl", "--by-hand", "--reader", "anna", said="b\nafraid\n?\nFear\nnot text\nb\nanger\n")
    assert code == 0 and "there is no text before this one" in err and "unknown key 'afraid'; ? shows the keys" in err
    assert err.count("a anger") == 2 and "2 of 5 (now: not text)\n" in err
    found = [(row["text"], row["label"], row["reader"]) for row in rows_of(tmp_path / "f.labels.jsonl")]
    assert found == [(ORDER[0], "fear", "anna"), (ORDER[1], "not text", "anna"), (ORDER[1], "anger", "anna")]


def test_it_goes_on_where_it_stopped(run: Run, tmp_path: Path) -> None:
    run("f.jsonl", "--by-hand", said="n\nn\nq\n")
    (tmp_path / "f.labels.jsonl").open("a").write('{"id": "to')  # torn by a kill
    _, _, err = run("f.jsonl", "--by-hand", said="n\n")
    assert [line for line in err.splitlines() if line in TEXTS] == ORDER[2:4] and "\n3 of 5\n" in err
    assert [row["text"] for row in rows_of(tmp_path / "f.labels.jsonl")] == ORDER[:3]


def test_whether_it_answers_its_prompt(run: Run, tmp_path: Path) -> None:
    code, _, err = run("f.jsonl", "--by-hand", "--answers", "--count", 2, said="f\nz\ny\nx\n")
    assert code == 0 and "prompt: The bus" in err and err.count("does it answer its prompt? y yes, n no") == 1 and "unknown key 'z'" in err
    assert [(row["label"], row.get("answers")) for row in rows_of(tmp_path / "f.labels.jsonl")] == [("fear", True), ("not text", None)]


def test_nothing_in_a_text_moves_the_cursor(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "f.jsonl", {"text": "a\x1b[2J\r\nb\x9bc\td"}, {"text": ""})
    _, _, err = run("f.jsonl", "--by-hand", said="x\nx\n")
    assert "a\\x1b[2J\nb\\x9bc\td\n" in err and "(the text is empty)" in err and not {"\x1b", "\r", "\x9b"} & set(err)
    assert {row["text"] for row in rows_of(tmp_path / "f.labels.jsonl")} == {"a\x1b[2J\r\nb\x9bc\td", ""}


def test_ctrl_c_keeps_the_labels_and_says_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            if self.tell():
                raise KeyboardInterrupt
            return super().readline()

    monkeypatch.setattr("tests.cli.test_by_hand.io.StringIO", Interrupted)
    code, _, err = run("f.jsonl", "--by-hand", said="f\n")
    assert code == 130 and err.endswith("\nemosteer: interrupted; what was finished is kept, the same command goes on from there\n")
    assert len(rows_of(tmp_path / "f.labels.jsonl")) == 1


# ---- scores ------------------------------------------------------------------------------------------------------------------------

#: The person agrees with the judge on two of the four texts that they read as text, and reads four of the five as their targets.
PERSON = {**TEXTS, "My hands shake.": "happiness", "It was a day.": "fear", "the the": "x"}


def test_scores_follow_the_last_label(run: Run, tmp_path: Path, fake: FakeJudge) -> None:
    code, out, err = run("f.jsonl", "--by-hand", "--json", said=keys(PERSON))
    assert code == 0 and "all 5 are labelled; b goes back to the last one, Enter ends" in err
    found = json.loads(out)
    judge = found["judges"]["embedded"]
    # the judge: anger, sadness, fear (person: happiness), neutral (person: fear)
    assert (judge["n"], judge["agreement"], judge["n_emotional"], judge["six_way"]) == (4, 0.5, 4, 0.5)
    assert found["soundness"] == {"not_text": 1, "unsound_of_not_text": 1, "text": 4, "sound_of_text": 4}
    # targets: anger, sadness, happiness, fear, surprise; the judge reads the first two as such, the person the first four
    everything = found["targets"][-1]
    assert (everything["n"], everything["person"]) == (5, 4 / 5) and len(found["targets"]) == 6
    assert everything["judges"]["embedded"] == {"n": 5, "share": 2 / 5, "difference": pytest.approx(-2 / 5)}
    assert sorted(fake.calls[0]) == sorted(TEXTS) and fake.closed
    # the same again without a key, as everything is labelled; --score is asked for by name
    assert run("f.jsonl", "--by-hand", "--json")[1] == out == run("f.jsonl", "--by-hand", "--score", "--json")[1]


def test_the_tables(run: Run) -> None:
    code, out, _ = run("f.jsonl", "--by-hand", said=keys(PERSON))
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and out.startswith("5 of 5 texts are labelled by hand -> f.labels.jsonl\n") and "\x1b" not in out
    assert "labels: anger 1, sadness 1, happiness 1, fear 1, not text 1" in out
    assert "soundness check: 1 of the 1 that are not text are unsound, 4 of the other 4 are sound" in out
    assert cells("embedded 4 0 50.0 % 50.0 % 4 0.44") in lines  # alpha: 2 of 4 pairs differ; 2 2 1 2 1 of 8: 1 - 7 * 4 / 50 = 0.44
    assert cells("fear embedded 1 1 0.0 % 0.0 %") in lines and cells("neutral embedded 0 1 - 0.0 %") in lines
    assert cells("person \\ embedded anger sadness happiness fear surprise disgust neutral") in lines
    assert cells("happiness 0 0 0 1 0 0 0") in lines and cells("fear 0 0 0 0 0 0 1") in lines
    assert cells("all 5 80.0 % 40.0 % -40.0") in lines and cells("method-2 1 100.0 % 0.0 % -100.0") in lines


def test_several_judges(run: Run, fake: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, Any]] = []
    judges = {"embedded": fake, "hf:b": FakeJudge("hf:b", knows=False), "openai:c": FakeJudge("openai:c", fails=True)}

    def make(spec: str, **options: Any) -> FakeJudge:
        made.append((spec, options["base_url"]))
        return judges[spec]

    monkeypatch.setattr(registry, "make_judge", make)
    run("f.jsonl", "--by-hand", said=keys(PERSON)[:-2])
    command = ("f.jsonl", "--by-hand", "--score", "--judge", "embedded, hf:b,openai:c", "--base-url", "http://x/v1")
    code, out, err = run(*command)
    assert code == 0 and made == [("embedded", None), ("hf:b", None), ("openai:c", "http://x/v1")]
    assert "4 opinions are missing (last problem: out of order)" in err and all(judge.closed for judge in judges.values())
    lines = [line.split() for line in out.splitlines()]
    assert cells("person \\ panel anger sadness happiness fear surprise disgust neutral undecided") in lines
    assert any(line[:2] == ["openai:c", "0"] and line.count("-") == 3 for line in lines) and any(line[:1] == ["panel"] for line in lines)
    found = json.loads(run(*command, "--json")[1])
    assert list(found["judges"]) == list(judges) and found["labelled"] == 4
    code, out, err = run("f.jsonl", "--by-hand", "--score", "--judge", "openai:c", "--base-url", "http://x/v1")
    assert code == 1 and out == "" and err == "emosteer: no text could be judged: out of order\n"


def test_two_readers(run: Run, fake: FakeJudge, tmp_path: Path) -> None:
    run("f.jsonl", "--by-hand", "--out", "a.jsonl", said=keys(PERSON)[:-2])
    run("f.jsonl", "--by-hand", "--out", "b.jsonl", said=keys())
    fake.calls.clear()
    code, out, _ = run("f.jsonl", "--by-hand", "--out", "a.jsonl", "--against", "b.jsonl")
    same = sum(PERSON[text] == TEXTS[text] for text in ORDER[:4])
    assert code == 0 and f"agreement with b.jsonl: {100 * same / 4:.1f} % of 4 texts that both labelled" in out and "here \\ there" in out
    assert "0 labelled here alone, 1 there alone" in out and "judge" not in out and fake.calls == []
    found = json.loads(run("f.jsonl", "--by-hand", "--out", "a.jsonl", "--against", "b.jsonl", "--score", "--json")[1])
    assert found["against"]["n"] == 4 and "embedded" in found["judges"]


# ---- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("f.jsonl", "--by-hand"), 2, "expected a terminal, or one label a line on stdin, found neither; run it in a terminal"),
        (("f.jsonl", "--by-hand", "--score"), 1, "there is no label yet: f.labels.jsonl does not exist; label texts first"),
        (("f.jsonl", "--by-hand", "--against", "x.jsonl"), 1, "there is no label yet: f.labels.jsonl does not exist"),
        (("f.jsonl", "--by-hand", "--field", "no"), 1, "f.jsonl:1: expected the text in a field 'no', found id, emotion"),
        (("empty.jsonl", "--by-hand"), 1, "input file empty.jsonl is empty; expected one JSON object a line"),
        (("g.jsonl", "--by-hand", "--out", "other.jsonl"), 1, "other.jsonl has labels of another file: 1 of its 1 texts are not there"),
        (("g.jsonl", "--by-hand", "--score", "--out", "other.jsonl"), 1, "other.jsonl has labels of another file"),
        (("g.jsonl", "--by-hand", "--answers"), 1, "g.jsonl:1: expected a text in a field 'prompt', found none; --answers needs"),
        (("g.jsonl", "--by-hand", "--show-prompt"), 1, "--show-prompt needs the prompt of every line"),
        (("f.jsonl", "--by-hand", "--out", "f.jsonl"), 2, "--out f.jsonl is the input file"),
        (("f.jsonl", "--by-hand", "--judge", "embedded,embeded"), 2, "unknown judge 'embeded' (did you mean 'embedded'?)"),
        (("f.jsonl", "--by-hand", "--judge", "embedded,embedded"), 2, "expected every judge once"),
        (("f.jsonl", "--by-hand", "--fresh"), 2, "--fresh would throw labels away; name another --out instead"),
        (("-", "--by-hand"), 2, "--by-hand reads keys from stdin; name a FILE.jsonl"),
        (("f.jsonl", "--score"), 2, "--score has a meaning with --by-hand only"),
        (("f.jsonl", "--show-prompt"), 2, "--show-prompt has a meaning with --by-hand only"),
        (("f.jsonl", "--count", "3"), 2, "--count has a meaning with --by-hand only"),
    ],
)
def test_errors_are_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "g.jsonl", {"text": "Hm."})
    write(tmp_path / "other.jsonl", {"id": "1", "text": "Oh.", "text_sha256": sha256_text("Oh."), "label": "fear"})
    found, out, err = run(*arguments)
    assert (found, out) == (code, "") and err.splitlines()[-1].startswith("emosteer: ") and message in err.splitlines()[-1]
    assert not (tmp_path / "f.labels.jsonl").exists() and len(rows_of(tmp_path / "other.jsonl")) == 1


# ---- single keys on a terminal -----------------------------------------------------------------------------------------------------

#: The command with fake judges: the process that types is another one.
PROGRAM = """
import sys
from tests.cli import test_by_hand as fakes
from emosteer.cli import main as cli
fakes.registry.KINDS["embedded"] = fakes.registry.JudgeKind("embedded", lambda reference, options: fakes.FakeJudge())
fakes.SoundnessCheck.load = lambda encoder=None: fakes.FakeSoundness()
cli.main(sys.argv[1:])
"""


class Terminal:
    """The command on a pseudo-terminal. screen: what it has shown so far."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        assert pty is not None
        self.master, slave = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "80"}
        command = [sys.executable, "-c", PROGRAM, "judge", "f.jsonl", "--by-hand", "--judge", "embedded", *arguments]
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=slave, stdout=subprocess.PIPE, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.screen, self.read = "", 0

    def wait_for(self, text: str) -> None:
        """Reads until a text appears after what was waited for before."""
        stop = time.monotonic() + 120
        while text not in self.screen[self.read :]:
            assert time.monotonic() < stop and self._more(1.0), f"expected {text!r}, found {self.screen[self.read :]!r}"
        self.read = self.screen.index(text, self.read) + len(text)

    def _more(self, seconds: float) -> bool:
        """Reads what there is; False at the end."""
        if not select.select([self.master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.master, 4096)
        except OSError:
            return False
        self.screen += data.decode().replace("\r\n", "\n")
        return bool(data)

    def press(self, key: str) -> None:
        """One key, once the command waits for a single one: what comes before is thrown away, so that nobody labels what they never saw."""
        self.wait_for("> ")
        while self.process.poll() is None and termios.tcgetattr(self.master)[3] & termios.ICANON:
            time.sleep(0.002)
        os.write(self.master, key.encode())

    def end(self) -> tuple[int, str]:
        """Exit code and stdout."""
        while self.process.poll() is None and self._more(0.1):
            pass
        out = self.process.communicate(timeout=120)[0].decode()
        while self._more(0) and select.select([self.master], [], [], 0)[0]:
            pass
        return self.process.returncode, out


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    if pty is None:
        pytest.skip("there are no pseudo-terminals here")
    write(tmp_path / "f.jsonl", *ROWS)
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()
        os.close(one.master)


def test_single_keys_without_enter(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    reader = terminal("--json")
    for key in ("z", "f", "x", "b", "a", "n", "h", "u"):
        reader.press(key)
    reader.wait_for("all 5 are labelled")
    assert "\x1b" not in reader.screen
    reader.press("\r")
    code, out = reader.end()
    assert code == 0 and json.loads(out)["labels"] | {"disgust": 0} == {
        **dict.fromkeys([*LABELS, "not text"], 0),
        **dict.fromkeys(["fear", "anger", "neutral", "happiness", "surprise"], 1),
    }
    found = [(row["text"], row["label"]) for row in rows_of(tmp_path / "f.labels.jsonl")]
    expected = ["fear", "not text", "anger", "neutral", "happiness", "surprise"]
    assert found == list(zip([ORDER[0], ORDER[1], *ORDER[1:]], expected, strict=True))
    assert "unknown key 'z'; ? shows the keys" in reader.screen and "2 of 5 (now: not text)" in reader.screen
    assert not [word for word in HIDDEN if word in reader.screen]


def test_killed_and_run_again(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    reader = terminal()
    reader.press("f")
    reader.press("n")
    reader.wait_for("3 of 5")
    reader.process.send_signal(signal.SIGKILL)
    assert reader.end()[0] == -signal.SIGKILL
    again = terminal()
    again.wait_for(f"3 of 5\n{ORDER[2]}\n")
    again.press("a")
    again.press("\x04")  # Ctrl-D stops like q
    code, out = again.end()
    assert code == 0 and out == "" and "3 of 5 texts are labelled -> f.labels.jsonl" in again.screen
    assert [row["label"] for row in rows_of(tmp_path / "f.labels.jsonl")] == ["fear", "neutral", "anger"]


def test_ctrl_c_on_a_terminal(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    reader = terminal()
    reader.press("s")
    reader.press("\x03")
    code, out = reader.end()
    assert code == 130 and out == "" and "Traceback" not in reader.screen
    assert reader.screen.endswith("> \nemosteer: interrupted; what was finished is kept, the same command goes on from there\n")
    assert [row["label"] for row in rows_of(tmp_path / "f.labels.jsonl")] == ["sadness"]
