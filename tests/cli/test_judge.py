"""`emosteer judge` as a user meets it, with fakes for the embedded judge and the soundness check, and a real server for the other."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import UsageError
from emosteer.cli import judge as cli_judge
from emosteer.cli import main as cli
from emosteer.judges import registry
from emosteer.judges.openai import OpenAIJudge
from emosteer.judges.protocol import LABELS, Opinion, Soundness
from emosteer.judges.registry import JudgeKind, make_judge
from emosteer.judges.soundness import SoundnessCheck
from emosteer.scenarios.scenarios import EMOTIONS
from tests.judges.test_huggingface import EKMAN, classifier
from tests.judges.test_openai import Server, right, truth

TOLD = [*LABELS, "broken"]


class FakeJudge:
    """Finds an emotion by name in the text; "broken" is a call that failed. Neutral texts lean to surprise."""

    name = "embedded"

    def __init__(self, key: str = "k1") -> None:
        self.key, self.calls = key, []  # type: ignore[var-annotated]
        self.sees: dict[str, str] = {}  # text -> what it takes it for

    def opinions(self, texts: Sequence[str], done: Callable[[int, Opinion], None] | None = None) -> list[Opinion]:
        self.calls.append(list(texts))
        found = []
        for index, text in enumerate(texts):
            label = next(name for name in TOLD if name in self.sees.get(text, text))
            shares = {one: 0.64 if one == label else 0.16 if one == "surprise" else 0.04 for one in LABELS}
            shares["neutral"] += 1 - sum(shares.values())
            found.append(Opinion(None, "out of order") if label == "broken" else Opinion(shares))
            if done is not None:
                done(index, found[-1])
        return found


class FakeSoundness:
    key = "s1"

    def check(self, texts: Sequence[str]) -> list[Soundness]:
        found = []
        for text in texts:
            reasons = ("repetition",) if "again again" in text else ()
            found.append(Soundness(not reasons, reasons + (("unfinished",) if not text.endswith(".") else ()), 0.5))
        return found


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeJudge:
    judge = FakeJudge()
    monkeypatch.setitem(registry.KINDS, "embedded", JudgeKind("embedded", lambda reference, options: judge))
    monkeypatch.setattr(SoundnessCheck, "load", lambda encoder=None: FakeSoundness())
    return judge


@pytest.fixture
def run(fake: FakeJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMOSTEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        one = [] if "--judge" in arguments else ["--judge", "embedded"]
        with pytest.raises(SystemExit) as stop:
            cli.main(["judge", *map(str, arguments), *one])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


INPUT = (
    {"id": "a", "text": "fear.", "emotion": "fear"},
    {"text": "neutral again again.", "emotion": "disgust"},
    {"id": 3, "text": "broken.", "emotion": "fear"},
    {"id": "a", "text": "fear.", "emotion": "anger"},
    {"id": "b", "text": "anger", "emotion": "zeal"},
)

# ---- rows ----------------------------------------------------------------------------------------------------------


def test_one_object_a_line_in_the_order_of_the_input(run: Run, tmp_path: Path, fake: FakeJudge) -> None:
    code, out, err = run(write(tmp_path / "f.jsonl", *INPUT), "--json")
    found = lines(out)
    assert code == 0 and [row["id"] for row in found] == ["a", "line-2", "3", "a", "b"]
    assert [row["emotion"] for row in found] == ["fear", "neutral", None, "fear", "anger"]
    assert [row["six"] for row in found] == ["fear", "surprise", None, "fear", "anger"]
    assert [row["sound"] for row in found] == [True, False, True, True, True]
    assert [row["reasons"] for row in found] == [[], ["repetition"], [], [], ["unfinished"]]
    assert [row["problem"] for row in found] == ["", "", "out of order", "", ""]
    assert found[2]["probabilities"] is None and list(found[0]["probabilities"]) == list(LABELS)
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1) and found[0]["probabilities"]["fear"] == 0.64
    assert "1 of 5 opinions are missing or lack a judge (last problem: out of order)" in err
    # blind: the judge has seen each text once and nothing else
    assert fake.calls == [["fear.", "neutral again again.", "broken.", "anger"]]


def test_stdin_and_field(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('\n{"reply": "fear", "text": "anger"}\n'))
    code, out, _ = run("-", "--field", "reply", "--json")
    [row] = lines(out)
    assert code == 0 and row["emotion"] == "fear" and row["id"] == "line-2"


def test_empty_texts_and_half_characters_are_judged(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli.test_judge.TOLD", [*TOLD, ""])
    write(tmp_path / "f.jsonl", {"text": "fear \ud83d"}, {"text": "anger"})
    code, _, _ = run("f.jsonl", "--json", "--out", "o.jsonl")
    assert code == 0 and [row["emotion"] for row in lines((tmp_path / "o.jsonl").read_text())] == ["fear", "anger"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1, "reply": "x"}', "f.jsonl:1: expected the text in a field 'text', found id, reply; name its field with --field reply"),
        ('{"text": "fear"}\n{"text": 3, "said": "x"}', "f.jsonl:2: expected the text in a field 'text', found 'text' as int; "),
        ("{}", "found no field at all"),
        ("[1]", "f.jsonl:1: expected a JSON object, found a list"),
        ('{"text": ', "f.jsonl:1: expected a JSON object, found malformed JSON"),
        ("", "input file f.jsonl is empty"),
    ],
)
def test_malformed_input_names_its_line(run: Run, tmp_path: Path, fake: FakeJudge, content: str, message: str) -> None:
    (tmp_path / "f.jsonl").write_text(content)
    code, out, err = run("f.jsonl")
    assert code == 1 and out == "" and message in err and fake.calls == []


def test_malformed_stdin(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "fear"}\nno\n'))
    assert run("-")[2].startswith("emosteer: stdin:2: expected a JSON object, found malformed JSON")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "stdin is empty" in run("-")[2]


def test_all_missing_is_a_failure(run: Run, tmp_path: Path) -> None:
    code, out, err = run(write(tmp_path / "f.jsonl", {"text": "broken"}), "--json")
    assert code == 1 and lines(out)[0]["emotion"] is None and "no text could be judged: out of order" in err


# ---- the summary ---------------------------------------------------------------------------------------------------


def table_of(out: str, first: str) -> dict[str, list[str]]:
    """The table whose heading starts with `first`, by the first cell of its rows."""
    rows = [line.split() for line in out.splitlines()]
    start = next(index for index, row in enumerate(rows) if row and row[0] == first)
    found = {}
    for row in rows[start + 1 :]:
        if not row:
            break
        found[row[0]] = row[1:]
    return found


def test_summary_counts_and_compares(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(write(tmp_path / "f.jsonl", *INPUT, {"text": "neutral.", "emotion": "Neutral"}))
    assert code == 0 and out.startswith("6 texts judged by embedded\n")
    table = table_of(out, "judged")
    assert table["fear"] == ["2", "33.3", "%", "0"] and table["neutral"] == ["2", "33.3", "%", "1"]
    assert table["missing"] == ["1", "16.7", "%", "0"] and table["all"] == ["6", "100.0", "%", "1"]
    assert "reasons and remarks: repetition 1, unfinished 1" in out and "1 missing: out of order" in out
    # fear/fear right, disgust taken for neutral (six-way: surprise), anger taken for fear; fear missing; zeal is no label of ours
    assert "33.3 % of 3 six-way, 50.0 % of 4 with neutral; 1 missing; 1 with labels that are none of ours" in out
    confusion = table_of(out, "given")
    assert confusion["fear"] == confusion["anger"] == ["0", "0", "0", "1", "0", "0", "0", "0"]
    assert confusion["disgust"][-2] == "1" and confusion["neutral"][-2] == "1" and "sadness" not in confusion


def test_summary_without_labels_compares_nothing(run: Run, tmp_path: Path) -> None:
    _, out, _ = run(write(tmp_path / "f.jsonl", {"text": "fear"}))
    assert "agreement" not in out and out.startswith("1 text judged")


def test_summary_of_the_real_numbers(run: Run, tmp_path: Path) -> None:
    """Against counts taken by hand over many rows, with `label` instead of `emotion`."""
    rows = [{"text": f"{LABELS[n % 5]} {n}.", "label": LABELS[n % 7]} for n in range(70)]
    _, out, _ = run(write(tmp_path / "f.jsonl", *rows))
    six = [row for row in rows if row["label"] != "neutral"]
    share = sum(row["text"].startswith(row["label"]) for row in six) / len(six)
    assert f"{100 * share:.1f} % of 60 six-way" in out
    counted = Counter((row["label"], row["text"].split()[0]) for row in rows)
    confusion = table_of(out, "given")
    assert all(confusion[given] == [str(counted[given, judged]) for judged in (*LABELS, "undecided")] for given in LABELS)


# ---- going on ------------------------------------------------------------------------------------------------------


def test_a_rerun_judges_only_what_is_missing(run: Run, tmp_path: Path, fake: FakeJudge) -> None:
    write(tmp_path / "f.jsonl", *INPUT)
    assert run("f.jsonl", "--out", "o.jsonl")[0] == 0
    whole = (tmp_path / "o.jsonl").read_bytes()
    assert [row["id"] for row in lines(whole.decode())] == ["a", "line-2", "3", "a", "b"]
    fake.calls.clear()
    assert run("f.jsonl", "--out", "o.jsonl")[0] == 0
    assert fake.calls == [["broken."]] and (tmp_path / "o.jsonl").read_bytes() == whole
    write(tmp_path / "f.jsonl", *INPUT[1:2], {"text": "joyless sadness."}, *INPUT[:1])
    fake.calls.clear()
    code, out, err = run("f.jsonl", "--out", "o.jsonl", "--json")
    assert fake.calls == [["joyless sadness."]] and "going on: 2 of 3 texts are judged" in err
    assert lines(out) == lines((tmp_path / "o.jsonl").read_text()) and [row["id"] for row in lines(out)] == ["line-1", "line-2", "a"]


def test_a_judge_of_several_that_failed_is_asked_again(run: Run, tmp_path: Path, fake: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other said is in the row, and does not pass for the panel's opinion."""
    other = FakeJudge("k2")
    other.name = "public"
    monkeypatch.setitem(registry.KINDS, "public", JudgeKind("public", lambda reference, options: other))
    write(tmp_path / "f.jsonl", {"text": "fear."}, {"text": "anger."})
    other.sees = {"fear.": "broken"}
    code, out, err = run("f.jsonl", "--out", "o.jsonl", "--judge", "embedded,public")
    assert code == 0 and "1 without one of the judges: out of order" in out
    rows = lines((tmp_path / "o.jsonl").read_text())
    assert [row["problem"] for row in rows] == ["out of order", ""] and rows[0]["emotion"] == "undecided"
    other.sees = {}
    other.calls.clear()
    assert run("f.jsonl", "--out", "o.jsonl", "--judge", "embedded,public")[0] == 0
    rows = lines((tmp_path / "o.jsonl").read_text())
    assert other.calls == [["fear."]] and [(row["emotion"], row["problem"]) for row in rows] == [("fear", ""), ("anger", "")]


@pytest.mark.parametrize(("options", "message"), [(("--fresh",), "--fresh replaces --out"), (("--seed", "3"), "--seed has a meaning")])
def test_options_that_would_do_nothing_are_refused(run: Run, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    write(tmp_path / "f.jsonl", {"text": "fear."})
    code, out, err = run("f.jsonl", *options)
    assert code == 2 and message in err and not out


def test_an_interruption_keeps_the_chunks_before_it(run: Run, tmp_path: Path, fake: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_judge, "CHUNK", 16)
    rows = [{"text": f"{EMOTIONS[n % 6]} {n}."} for n in range(40)]
    write(tmp_path / "f.jsonl", *rows)
    run("f.jsonl", "--out", "whole.jsonl", "--parallel", 1)
    opinions = fake.opinions
    fake.calls.clear()

    def interrupted(texts: Sequence[str], done: Any = None) -> list[Opinion]:
        if len(fake.calls) == 2:
            raise KeyboardInterrupt
        return opinions(texts, done)

    monkeypatch.setattr(fake, "opinions", interrupted)
    code, _, err = run("f.jsonl", "--out", "o.jsonl", "--parallel", 1)
    assert code == 130 and err.endswith("emosteer: interrupted; what was finished is kept, the same command goes on from there\n")
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 32
    with (tmp_path / "o.jsonl").open("a") as file:
        file.write('{"id": "line-33", "emo')  # torn by a kill
    monkeypatch.setattr(fake, "opinions", opinions)
    fake.calls.clear()
    assert run("f.jsonl", "--out", "o.jsonl", "--parallel", 1)[0] == 0
    assert [len(call) for call in fake.calls] == [8]
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_verdicts_of_another_judge_are_not_mixed_in(run: Run, tmp_path: Path, fake: FakeJudge) -> None:
    write(tmp_path / "f.jsonl", *INPUT)
    run("f.jsonl", "--out", "o.jsonl")
    before = (tmp_path / "o.jsonl").read_bytes()
    fake.key = "k2"
    code, _, err = run("f.jsonl", "--out", "o.jsonl")
    assert code == 2 and "something else than verdicts of this judge" in err and (tmp_path / "o.jsonl").read_bytes() == before
    assert run("f.jsonl", "--out", "o.jsonl", "--fresh")[0] == 0 and (tmp_path / "o.jsonl").read_bytes() != before
    code, _, err = run("f.jsonl", "--out", "f.jsonl")
    assert code == 2 and "is the input file" in err


def test_a_failed_run_leaves_no_empty_file(run: Run, tmp_path: Path, fake: FakeJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(texts: Sequence[str], done: Any = None) -> list[Opinion]:
        raise UsageError("out of order")

    monkeypatch.setattr(fake, "opinions", fail)
    assert run(write(tmp_path / "f.jsonl", *INPUT), "--out", "o.jsonl")[0] == 2
    assert not (tmp_path / "o.jsonl").exists()


# ---- which judge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "embeded"], "unknown judge 'embeded' (did you mean 'embedded'?); expected embedded, public, linear, lm:MODEL, "),
        (["--judge", "embedded,Embedded"], "expected one judge or several different ones with commas, found 'embedded,Embedded'"),
        (["--judge", "org/model"], "(did you mean 'hf:org/model'?)"),
        (["--judge", "hf:"], "unknown judge 'hf:'"),
        (["--judge", "opnai:gpt"], "(did you mean 'openai'?)"),
        (["--judge", "openai:m"], "--judge openai:m needs --base-url"),
        (["--judge", "openai:m", "--base-url", "ftp://x"], "expected --base-url to be like"),
        (["--judge", "openai:m", "--base-url", "http://127.0.0.1:1/v1", "--key-env", "NOT_SET"], "NOT_SET that --key-env names is not set"),
        (["--base-url", "http://127.0.0.1:1/v1"], "--base-url and --cache have a meaning with --judge openai:MODEL only"),
        (["--cache", "c.jsonl"], "--base-url and --cache have a meaning with --judge openai:MODEL only"),
    ],
)
def test_judges_that_do_not_exist(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    code, out, err = run(write(tmp_path / "f.jsonl", *INPUT), *options)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_the_panel_that_comes_along_is_asked_unless_told_otherwise(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mean decides, also where every judge gives another label; where most of them failed, the text is undecided."""
    judges = {name: FakeJudge(f"k-{name}") for name in ("embedded", "public", "linear")}
    for name, judge in judges.items():
        judge.name = name
        monkeypatch.setitem(registry.KINDS, name, JudgeKind(name, lambda reference, options, judge=judge: judge))
    judges["public"].sees = {"fear.": "surprise.", "sadness.": "broken."}
    judges["linear"].sees = {"fear.": "disgust.", "anger": "neutral.", "sadness.": "broken."}
    file = write(tmp_path / "f.jsonl", {"text": "fear.", "emotion": "fear"}, {"text": "anger"}, {"text": "broken."}, {"text": "sadness."})
    with pytest.raises(SystemExit):
        cli.main(["judge", str(file), "--json"])
    rows = lines(capsys.readouterr().out)
    assert [row["emotion"] for row in rows] == ["surprise", "anger", None, "undecided"] and rows[2]["problem"] == "out of order"
    assert rows[1]["probabilities"]["anger"] == pytest.approx((0.64 + 0.64 + 0.04) / 3, abs=1e-6)
    with pytest.raises(SystemExit):
        cli.main(["judge", str(file)])
    out = capsys.readouterr().out
    assert out.startswith("4 texts judged by embedded, public, linear\n") and table_of(out, "judged")["undecided"][0] == "1"
    assert "0.0 % of 1 with neutral" in out and table_of(out, "given")["fear"][LABELS.index("surprise")] == "1"


def test_a_hugging_face_judge(run: Run, tmp_path: Path) -> None:
    classifier(tmp_path / "c", EKMAN)
    code, out, _ = run(write(tmp_path / "f.jsonl", *INPUT), "--judge", "hf:c", "--device", "cpu", "--json")
    assert code == 0 and all(row["emotion"] in LABELS for row in lines(out))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    found = Server(right)
    yield found
    found.stop()


def test_an_endpoint_is_asked_once_whatever_the_output(run: Run, tmp_path: Path, server: Server) -> None:
    write(tmp_path / "f.jsonl", *({"text": f"reply {n}", "label": truth(f"{n}")} for n in range(14)))
    command = ("f.jsonl", "--judge", "openai:org/m:1", "--base-url", server.url, "--parallel", 4)
    _, out, _ = run(*command)
    assert "100.0 % of 12 six-way, 100.0 % of 14 with neutral; 0 missing" in out
    assert set(server.asked.values()) == {1} and len(server.asked) == 14
    code, out, _ = run(*command, "--json", "--out", "o.jsonl")
    assert [row["emotion"] for row in lines(out)] == [truth(f"{n}") for n in range(14)] and len(server.bodies) == 14
    assert [path.name for path in (tmp_path / "cache/judges").iterdir()] == ["org--m-1.jsonl"]
    run(*command, "--cache", "mine.jsonl")
    assert len(server.bodies) == 28 and len((tmp_path / "mine.jsonl").read_text().splitlines()) == 14
    assert isinstance(make_judge("openai:m", base_url=server.url), OpenAIJudge)


PROGRAM = """
import sys
from types import SimpleNamespace
from emosteer.judges.protocol import Soundness
class SoundnessCheck:
    load = staticmethod(lambda encoder=None: SimpleNamespace(key="s1", check=lambda texts: [Soundness(True, (), 0.0) for _ in texts]))
sys.modules["emosteer.judges.soundness"] = SimpleNamespace(SoundnessCheck=SoundnessCheck)
from emosteer.cli import judge as cli_judge, main as cli
cli_judge.CHUNK = 1
cli.main(sys.argv[1:])
"""


def test_killed_and_run_again_is_the_same_and_pays_nothing_twice(tmp_path: Path, server: Server) -> None:
    """SIGKILL in the middle of the second chunk, with requests on their way."""
    write(tmp_path / "f.jsonl", *({"text": f"reply {n}"} for n in range(60)))

    def slow(text: str, turn: int, body: dict[str, Any]) -> Any:
        time.sleep(0.02)
        return right(text, turn, body)

    server.brain = slow
    command = [sys.executable, "-c", PROGRAM, "judge", "f.jsonl", "--judge", "openai:m", "--base-url", server.url, "--parallel", "2"]
    environment = {**os.environ, "EMOSTEER_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--out", "o.jsonl"], **settings) as process:
        stop = time.monotonic() + 60
        while len(server.bodies) < 45 and process.poll() is None and time.monotonic() < stop:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 32
    done = subprocess.run([*command, "--out", "o.jsonl"], **settings)
    assert done.returncode == 0, done.stderr
    found = lines((tmp_path / "o.jsonl").read_text())
    assert [row["id"] for row in found] == [f"line-{n + 1}" for n in range(60)]
    assert [row["emotion"] for row in found] == [truth(f"{n}") for n in range(60)]
    assert len(server.asked) == 60 and sum(count - 1 for count in server.asked.values()) <= 2 + 1  # those on their way at the kill


def test_help_loads_nothing_heavy() -> None:
    heavy = "torch transformers httpx emosteer.judges.soundness"
    check = f"import sys, emosteer.cli.judge; print([n for n in '{heavy}'.split() if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout == "[]\n"
