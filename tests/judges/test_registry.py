"""--judge, taken apart once: which judge it is, and what follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emosteer.base.errors import UsageError
from emosteer.base.jsonl import KeyedLog
from emosteer.judges import embedded, registry
from emosteer.judges.answers import AnswerCheck
from emosteer.judges.jury import make_jury
from emosteer.judges.panel import Panel
from emosteer.judges.registry import (
    JUDGE_FORMS,
    KINDS,
    PANEL,
    JudgeKind,
    JudgeOptions,
    JudgeSpec,
    judge_of,
    make_judge,
    make_judges,
    specs_of,
)
from emosteer.judges.soundness import SoundnessCheck
from emosteer.judges.storage import save_judges
from tests.helpers.contest_setup import BagEncoder, WordJudge
from tests.helpers.judge_setup import PROVENANCE, tiny_adapter, tiny_encoder, tiny_heads


@pytest.mark.parametrize(
    ("text", "kind", "reference", "known", "remote"),
    [
        ("embedded", "embedded", None, True, False),
        (" Embedded ", "embedded", None, True, False),
        ("embedded:", "embedded", "", False, False),
        ("public", "public", None, True, False),
        ("linear:x", "linear", "x", False, False),
        ("lm:smollm2-135m", "lm", "smollm2-135m", True, False),
        ("lm", "lm", None, False, False),
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
    assert JUDGE_FORMS == "embedded, public, linear, lm:MODEL, hf:ID_OR_FOLDER or openai:MODEL"
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


@dataclass
class Named:
    """A judge of which only its name matters."""

    name: str

    @property
    def key(self) -> str:
        return f"{self.name}-1"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, JudgeOptions]]:
    """Kinds whose judges are called like their reference: `a`, `b` and `far:NAME`, which is remote."""
    calls: list[tuple[str, JudgeOptions]] = []

    def kind(name: str, form: str, remote: bool = False) -> JudgeKind:
        def make(reference: str, options: JudgeOptions) -> Any:
            calls.append((name, options))
            return Named(reference or name)

        return JudgeKind(form, make, remote)

    monkeypatch.setattr(registry, "KINDS", {"a": kind("a", "a"), "b": kind("b", "b"), "far": kind("far", "far:WHERE", True)})
    return calls


def test_a_panel_is_made_judge_by_judge_in_order(named: list[tuple[str, JudgeOptions]]) -> None:
    judges = make_judges(" b, a ,far:x,", base_url="http://x", cache=Path("c"), device="cpu", parallel=2)
    assert [judge.name for judge in judges] == ["b", "a", "x"]
    local = JudgeOptions(device="cpu", parallel=2)
    assert named == [("b", local), ("a", local), ("far", JudgeOptions("http://x", cache=Path("c"), device="cpu", parallel=2))], (
        "address and file go to the endpoint alone"
    )
    with pytest.raises(UsageError, match="have a meaning with --judge far:WHERE only, found --judge b"):
        make_judges("b,a", base_url="http://x")
    panel = judge_of(judges)
    assert isinstance(panel, Panel) and panel.name == "b, a, x" and judge_of(judges[:1]) is judges[0]


@pytest.mark.parametrize("panel", ["", " , ", "a,a", "a, A", "far:x,b,FAR:x"])
def test_no_judge_and_one_judge_twice_are_refused(named: list[tuple[str, JudgeOptions]], panel: str) -> None:
    with pytest.raises(UsageError, match="expected one judge or several different ones with commas"):
        make_judges(panel)
    assert not named


def test_two_judges_of_one_name_are_refused(named: list[tuple[str, JudgeOptions]]) -> None:
    with pytest.raises(UsageError, match="expected judges of different names, found a, a"):
        make_judges("a,far:a")
    with pytest.raises(UsageError, match="unknown judge 'c'"):
        make_judges("a,c")


def test_the_panel_that_comes_along_is_known() -> None:
    assert specs_of(PANEL) == ["embedded", "public", "linear"] and all(JudgeSpec.parse(spec).known for spec in specs_of(PANEL))


def test_the_judges_that_come_along_share_one_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, file = tiny_encoder(), tmp_path / "judge.safetensors"
    adapters = {name: tiny_adapter(encoder=encoder, seed=seed) for seed, name in enumerate(("embedded", "public"))}
    save_judges(file, tiny_heads(), adapters, {}, PROVENANCE)
    monkeypatch.setattr(embedded, "ASSET", file)
    monkeypatch.setattr(embedded, "shared_encoder", lambda: encoder)
    judges: list[Any] = list(make_judges(PANEL))
    assert [judge.name for judge in judges] == ["embedded", "public", "linear"] and len({judge.key for judge in judges}) == 3
    assert all(judge.encoder is encoder for judge in judges)
    assert [judge.key for judge in judges[:2]] == [f"{name}-{adapters[name].key}" for name in ("embedded", "public")]


@pytest.mark.parametrize(("spec", "paid"), [("here", ()), ("far:x", ("words-1",)), (" FAR:x", ("words-1",))])
def test_a_remote_judge_s_opinions_are_paid_for(
    heard: list[tuple[str, JudgeOptions]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spec: str, paid: tuple[str, ...]
) -> None:
    monkeypatch.setattr(embedded, "shared_encoder", BagEncoder)
    monkeypatch.setattr(SoundnessCheck, "load", lambda encoder: None)
    monkeypatch.setattr(AnswerCheck, "load", lambda encoder: None)
    jury = make_jury(spec)(KeyedLog(tmp_path / "opinions.jsonl"))
    assert jury.paid == frozenset(paid) and len(heard) == 1 and isinstance(jury.encoder, BagEncoder)
