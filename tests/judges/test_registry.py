"""--judge, taken apart once: which judge it is, and what follows from that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import UsageError
from emosteer.base.jsonl import KeyedLog
from emosteer.judges import registry
from emosteer.judges.jury import make_jury
from emosteer.judges.registry import JUDGE_FORMS, KINDS, JudgeKind, JudgeOptions, JudgeSpec, make_judge
from emosteer.judges.soundness import SoundnessCheck
from tests.helpers.contest_setup import BagEncoder, WordJudge


@pytest.mark.parametrize(
    ("text", "kind", "reference", "known", "remote"),
    [
        ("embedded", "embedded", None, True, False),
        (" Embedded ", "embedded", None, True, False),
        ("embedded:", "embedded", "", False, False),
        ("hf:org/model", "hf", "org/model", True, False),
        ("hf:", "hf", "", False, False),
        ("hf", "hf", None, False, False),
        ("OpenAI:org/m:1", "openai", "org/m:1", True, True),
        ("openai", "openai", None, False, True),
        ("openai-like", "openai-like", None, False, False),
        ("", "", None, False, False),
    ],
)
def test_a_specification_is_taken_apart(text: str, kind: str, reference: str | None, known: bool, remote: bool) -> None:
    spec = JudgeSpec.parse(text)
    assert spec == JudgeSpec(kind, reference) and (spec.known, spec.remote) == (known, remote)


def test_the_forms_are_those_of_the_table() -> None:
    assert JUDGE_FORMS == "embedded, hf:ID_OR_FOLDER or openai:MODEL"
    assert all(kind.form.partition(":")[0] == name for name, kind in KINDS.items())


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, JudgeOptions]]:
    """What the judges of two more kinds are made with: `here`, and `far`, which is remote."""
    calls: list[tuple[str, JudgeOptions]] = []

    def make(reference: str, options: JudgeOptions) -> Any:
        calls.append((reference, options))
        return WordJudge()

    more = {"here": JudgeKind("here", make), "far": JudgeKind("far:WHERE", make, remote=True)}
    monkeypatch.setattr(registry, "KINDS", {**KINDS, **more})
    return calls


def test_a_row_makes_its_judge_with_all_options(heard: list[tuple[str, JudgeOptions]]) -> None:
    make_judge("Far:a:b", base_url="http://x", key_env="K", cache=Path("c"), parallel=3, device="cpu")
    make_judge("here", device="cpu")
    assert heard == [("a:b", JudgeOptions("http://x", "K", Path("c"), 3, "cpu")), ("", JudgeOptions(device="cpu"))]
    with pytest.raises(UsageError, match=r"only, found --judge here$"):
        make_judge("here", base_url="http://x")
    with pytest.raises(UsageError, match="unknown judge 'here:x'"):
        make_judge("here:x")


@pytest.mark.parametrize(("spec", "paid"), [("here", False), ("far:x", True), (" FAR:x", True)])
def test_a_remote_judge_s_opinions_are_paid_for(
    heard: list[tuple[str, JudgeOptions]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, paid: bool
) -> None:
    monkeypatch.setattr("emosteer.judges.embedded.SentenceEncoder", BagEncoder)
    monkeypatch.setattr(SoundnessCheck, "load", lambda encoder: None)
    assert make_jury(spec)(KeyedLog(tmp_path / "opinions.jsonl")).paid is paid and len(heard) == 1
