"""The whole run on a tiny random model, and each of its parts against something computed in another way."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emosteer.base import artifacts
from emosteer.base.errors import ArtifactError
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.methods import CIRCUIT, NONE, RESIDUAL, Part
from emosteer.generation.decoding import Decoding
from emosteer.generation.engines import engine_for
from emosteer.generation.steering import SteeringPlan, plan_for
from emosteer.models.model import Model
from emosteer.side_effects import figures, outcomes
from emosteer.side_effects.battery import EVERYDAY, battery_of, evenly, prompt_of
from emosteer.side_effects.conditions import ALL, Condition, conditions_of, lines_of
from emosteer.side_effects.conversations import REQUESTED, STEERED, UNTOLD, After, after_long_talk, second_chances
from emosteer.side_effects.measure import effects
from emosteer.side_effects.neutral import text_nll
from emosteer.side_effects.settings import QUICK, EffectsSettings
from emosteer.side_effects.side_effects import SideEffects
from emosteer.writing.contest_writer import Cell, ContestWriter
from tests.helpers.dialled import TOP, dialled_circuit
from tests.helpers.effects_setup import read_by_words, small_battery

EMOTIONS = ("anger", "sadness", "fear")
SETTINGS = EffectsSettings(
    methods=(CIRCUIT, RESIDUAL, "prompt-tone", "encouraging"),
    intensities=(50.0, 100.0),
    item_tokens=8,
    reply_tokens=8,
    rounds=2,
    distances=(0, 40, 5000),
    followed=2,
    followed_intensity=100.0,
)


@pytest.fixture(scope="module")
def circuit(tiny: Model) -> Circuit:
    return dialled_circuit(tiny, EMOTIONS)


@pytest.fixture(scope="module")
def whole(tiny: Model, circuit: Circuit, tmp_path_factory: pytest.TempPathFactory) -> tuple[SideEffects, Path]:
    folder = tmp_path_factory.mktemp("partial")
    return effects(tiny, circuit, "c" * 64, small_battery(), SETTINGS, folder, read_by_words, batch_size=8), folder


def row_of(found: SideEffects, method: str, intensity: float | None, emotion: str = ALL) -> Any:
    (row,) = [r for r in found.rows if (r["method"], r["intensity"], r["emotion"]) == (method, intensity, emotion)]
    return row


def test_every_condition_has_its_rows_and_figures_are_paired_with_the_unsteered_model(whole: tuple[SideEffects, Path]) -> None:
    found = whole[0]
    tried = [(c["method"], c["emotion"], c["intensity"], c["strength"]) for c in found.conditions]
    assert tried[:3] == [(NONE, NONE, None, None), (CIRCUIT, "anger", 50.0, TOP / 2), (CIRCUIT, "sadness", 50.0, TOP / 2)]
    assert len(tried) == 1 + 2 * 3 + 3 + 3 + 2 and (RESIDUAL, "fear", None, 0.5) in tried
    right, met = found.outcomes["right"], found.outcomes["tried.items"]
    assert met[0].all() and met[1:4].sum(0).eq(1).all(), "each item meets one of the three emotions"
    row = row_of(found, CIRCUIT, 100.0)
    mine = (right[4:7] * met[4:7]).sum(0) - right[0]
    assert row["figures"]["right"]["change"]["value"] == pytest.approx(float(mine.mean()), abs=1e-6) and row["figures"]["right"]["n"] == 12
    ratio = (found.outcomes["nll"][4:7].sum(0) - found.outcomes["nll"][0]).mean().exp()
    assert row["figures"]["nll"]["change"]["value"] == pytest.approx(float(ratio), rel=1e-5) and abs(ratio - 1) > 0.01
    by_hand = [found.outcomes["unsteered_felt"][next(e for e in range(3) if met_of(found, 4 + e, i)), i] for i in range(6)]
    felt = found.outcomes["felt"][4:7].sum(0).mean() - sum(by_hand) / 6
    assert row["figures"]["felt"]["change"]["value"] == pytest.approx(float(felt), abs=1e-6)
    assert set(row_of(found, "encouraging", None)["figures"]) == {"right"}, "sentences stand behind items alone"
    plain = found.unsteered["figures"]["right"]
    assert plain["value"]["value"] == pytest.approx(float(right[0].mean()), abs=1e-6) and plain["n"] == 12


def met_of(found: SideEffects, condition: int, prompt: int) -> bool:
    return bool(found.outcomes[f"tried.{EVERYDAY}"][condition, prompt])


@pytest.mark.parametrize("per_prompt", [0, 1])
def test_a_steering_of_zero_strength_has_no_effect_at_all(tiny: Model, circuit: Circuit, per_prompt: int, tmp_path: Path) -> None:
    still = replace(SETTINGS, methods=(CIRCUIT,), intensities=(0.0, 100.0), per_prompt=per_prompt, rounds=0, followed=0)
    found = effects(tiny, circuit, "c" * 64, small_battery(), still, tmp_path, read_by_words, batch_size=5)
    for row in (r for r in found.rows if r["intensity"] == 0):
        for measure, told in [*row["figures"].items(), *row["kinds"].items()]:
            nothing = 1.0 if measure == "nll" else 0.0
            assert told["change"] == {"value": nothing, "low": nothing, "high": nothing} and told["p"] == 1.0, (row["emotion"], measure)
    for name in ("nll", "right", "tokens"):
        first = found.outcomes[name][0]
        zero = [i for i, c in enumerate(found.conditions) if c["intensity"] == 0]
        met = found.outcomes[{"nll": "tried.texts", "right": "tried.items", "tokens": "tried.replies"}[name]][zero]
        assert torch.equal(found.outcomes[name][zero][met], first.expand(len(zero), -1)[met]), name
    assert any(r["figures"]["nll"]["change"]["value"] != 1.0 for r in found.rows if r["intensity"] == 100)


@torch.no_grad()
def test_neutral_text_is_read_as_the_engine_would_write_it(tiny: Model, circuit: Circuit) -> None:
    """Token by token through the engine that writes replies, under the same steering, one row at a time."""
    vectors = circuit.added(Part.UNITS, tiny)
    prompts, replies = [[1, 9, 12, 30], [1, 8]], [[20, 33, 7], [41, 18, 25, 9]]
    plan = plan_for(vectors, [0, 2], [1.5, 2.5])
    found = text_nll(tiny, prompts, replies, plan)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        engine = engine_for(tiny, [prompt], plan.rows([i]), None, len(reply))
        costs, tokens = [], None
        for token in reply:
            costs.append(-float(engine.step(tokens).float().log_softmax(-1)[0, token]))
            tokens = torch.tensor([token])
        assert found[i] == pytest.approx(sum(costs) / len(costs), abs=2e-4)
    plain = text_nll(tiny, prompts, replies, None)
    assert plain == text_nll(tiny, prompts, replies, SteeringPlan.none(2)) and abs(plain[0] - found[0]) > 0.01


@pytest.mark.parametrize("each", [1, 2, 3])
def test_prompts_are_dealt_to_conditions_evenly_and_in_turn(circuit: Circuit, each: int) -> None:
    conditions = conditions_of(circuit, replace(SETTINGS, methods=(CIRCUIT,), intensities=(50.0,), per_prompt=each), 2)
    meets = [set(condition.meets(30)) for condition in conditions]
    assert meets[0] == set(range(30)) and all(len(some) == 10 * each for some in meets[1:])
    assert all(sum(i in some for some in meets[1:]) == each for i in range(30))
    passes = outcomes.passes(conditions, 30)
    assert len(passes) == 1 + each and all(index == list(range(30)) for _, index in passes)
    assert {(c, i) for members, index in passes for c, i in zip(members, index, strict=True)} == {
        (c, i) for c, some in enumerate(meets) for i in some
    }


def test_lines_take_emotions_together_and_one_by_one() -> None:
    conditions = [Condition(NONE), Condition(CIRCUIT, "fear", 50.0, 1.0), Condition(CIRCUIT, "anger", 50.0, 2.0), Condition("encouraging")]
    told = [(line.method, line.emotion, line.members) for line in lines_of(conditions)]
    assert told == [(CIRCUIT, ALL, (1, 2)), (CIRCUIT, "fear", (1,)), (CIRCUIT, "anger", (2,)), ("encouraging", ALL, (3,))]


def test_the_paired_test_is_mcnemar_s_where_each_prompt_is_met_once() -> None:
    table = torch.tensor([[1.0]] * 9 + [[0.0]] * 3 + [[1.0]] * 8)
    base = torch.tensor([[0.0]] * 8 + [[1.0]] * 4 + [[1.0]] * 8)  # 8 gained, 3 lost
    assert figures.figure(table, base, False, 0)["p"] == pytest.approx(2 * sum((1, 11, 55, 165)) / 2**11, rel=1e-2)


class _Answers:
    """A writer that answers from a list, and keeps what it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts, self.asked = list(texts), list[list[Cell]]()

    def write(self, cells: Sequence[Cell], what: str) -> list[dict[str, Any]]:
        self.asked.append(list(cells))
        return [{"text": self.texts.pop(0)} for _ in cells]


def test_wrong_answers_are_told_so_and_right_ones_are_left_alone() -> None:
    battery = small_battery(3)
    (right,) = battery.items[0].check.says[:1]
    writer = _Answers(["", battery.items[2].check.says[0], "still wrong"])
    found = second_chances(writer, battery, {0: right, 1: "wrong", 2: "wrong"}, {"arm": ["try", "again"]}, 2)  # type: ignore[arg-type]
    assert found["arm"].tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 1]]
    said = [[(m.role, m.content) for m in cell.group.earlier] + [("user", cell.group.text)] for cell in writer.asked[0]]
    assert said == [[("user", battery.items[i].prompt), ("assistant", "wrong"), ("user", "try")] for i in (1, 2)]
    (last,) = writer.asked[1]
    assert [m.content for m in last.group.earlier] == [battery.items[1].prompt, "wrong", "try", "..."] and last.group.text == "again"


def test_feedback_is_set_against_none_and_against_the_first_arm() -> None:
    first = torch.tensor([[1.0, 0, 0], [1, 0, 1], [1, 1, 1]])
    second = torch.tensor([[1.0, 0, 0], [1, 1, 1], [1, 1, 1]])
    rows = figures.feedback_rows({"first": first, "second": second}, 0)
    told = [(r["arm"], r["round"], *(r[name]["value"] for name in ("accuracy", "gain", "more"))) for r in rows]
    third = pytest.approx(1 / 3, abs=1e-6)
    assert told == [
        ("first", 1, pytest.approx(2 / 3, abs=1e-6), third, 0),
        ("first", 2, 1, pytest.approx(2 / 3, abs=1e-6), 0),
        ("second", 1, 1, pytest.approx(2 / 3, abs=1e-6), third),
        ("second", 2, 1, pytest.approx(2 / 3, abs=1e-6), 0),
    ]
    many = {"first": torch.tensor([[0.0] * 8, [1.0] * 5 + [0.0] * 3]), "second": torch.tensor([[0.0] * 8, [1.0] * 8])}
    assert [row["p"] for row in figures.feedback_rows(many, 0)] == [1.0, 2 * 2**-3], (
        "three more than the first arm, not eight more than none"
    )


STRENGTHS = {"anger": 1.0, "fear": 2.0}


class _Feeling:
    """A writer whose replies are the emotion that they are read as: by how the emotion is had, which one is wanted, and the last turn."""

    says: Mapping[tuple[str, str], Sequence[str]] = {
        (STEERED, "anger"): ("anger", "neutral", "anger"),
        (STEERED, "fear"): ("fear", "fear", "fear"),
        (REQUESTED, "anger"): ("fear", "anger", "fear"),
        (REQUESTED, "fear"): ("anger", "neutral", "neutral"),
        (UNTOLD, ""): ("anger", "neutral", "fear"),
    }
    decoding = Decoding(max_new_tokens=10)

    def __init__(self, context: int) -> None:
        self.model = SimpleNamespace(shape=SimpleNamespace(context=context), text_ids=str.split)

    def request(self, cell: Cell) -> Any:
        """Of 50 tokens, and those of the turns between the opening and the last."""
        return SimpleNamespace(ids=[0] * (50 + sum(len(message.content.split()) for message in cell.group.earlier[2:])))

    def write(self, cells: Sequence[Cell], what: str) -> list[dict[str, Any]]:
        return [{"text": self._answer(cell)} for cell in cells]

    def _answer(self, cell: Cell) -> str:
        asked = re.search("strong ([a-z]+)", cell.group.earlier[0].content)
        if cell.method == CIRCUIT:
            assert not asked and cell.strength == STRENGTHS[cell.emotion]
            how = STEERED, cell.emotion
        else:
            assert (cell.method, cell.emotion, cell.strength) == (NONE, NONE, None)
            how = (REQUESTED, asked[1]) if asked else (UNTOLD, "")
        return self.says[how][int(cell.group.text.split()[-1])]


def test_after_a_long_conversation_an_emotion_is_had_where_it_is_read() -> None:
    battery = replace(small_battery(), asked={EVERYDAY: [prompt_of(f"p{i}", f"we go {i}") for i in range(3)]})
    writer = _Feeling(context=100)
    found, beyond = after_long_talk(writer, battery, STRENGTHS, (0, 36, 45), 0, list)  # type: ignore[arg-type]
    assert beyond == [45], "50 tokens, 45 more of talk and 10 of a reply do not fit 100"
    hits = [
        (STEERED, "anger", (1, 0, 1)),
        (REQUESTED, "anger", (0, 1, 0)),
        (UNTOLD, "anger", (1, 0, 0)),
        (STEERED, "fear", (1, 1, 1)),
        (REQUESTED, "fear", (0, 0, 0)),
        (UNTOLD, "fear", (0, 0, 1)),
    ]
    assert found == [After(how, distance, emotion, told) for distance in (0, 36) for how, emotion, told in hits]
    rows = figures.long_rows([*found[:6], replace(found[6], hits=(0, 0, 0)), *found[7:]], 0)
    assert [(row["how"], row["distance"]) for row in rows] == [(how, d) for d in (0, 36) for how in (STEERED, REQUESTED, UNTOLD)]
    assert [row["felt"]["value"] for row in rows] == pytest.approx([5 / 6, 1 / 6, 2 / 6, 3 / 6, 1 / 6, 2 / 6], abs=1e-6)
    assert [row["n"] for row in rows] == [6] * 6


def test_feedback_and_long_conversations_are_measured_and_what_does_not_fit_is_named(whole: tuple[SideEffects, Path]) -> None:
    found = whole[0]
    assert [(row["arm"], row["round"]) for row in found.feedback] == [
        ("plain", 1), ("plain", 2), ("warm and cross by turns", 1), ("warm and cross by turns", 2)
    ]  # fmt: skip
    right = found.unsteered["figures"]["right"]["value"]["value"]
    assert all(row["accuracy"]["value"] - row["gain"]["value"] == pytest.approx(right, abs=2e-6) for row in found.feedback)
    assert {(row["how"], row["distance"]) for row in found.after} == {(how, d) for how in (STEERED, REQUESTED, UNTOLD) for d in (0, 40)}
    assert all(row["n"] == 6 for row in found.after)
    assert found.notes == ("after 5000 tokens nothing was tried: they do not fit the context of tiny-llama (256 tokens)",)


def test_neutral_talk_lies_between_the_request_and_the_last_turn(
    tiny: Model, circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Cell] = []
    write, texts = ContestWriter.write, list[str]()

    def watched(self: ContestWriter, cells: Sequence[Cell], what: str) -> Any:
        rows = write(self, cells, what)
        asked.extend(cells)
        texts.extend(row["text"] for row in rows)
        return rows

    monkeypatch.setattr(ContestWriter, "write", watched)
    small = replace(SETTINGS, methods=("prompt-tone",), rounds=0, distances=(40,), followed=1)
    found = effects(tiny, circuit, "c" * 64, small_battery(3, 2), small, tmp_path, read_by_words)
    cells = [cell for cell in asked if "+after-40" in str(cell.group.key)]
    assert [cell.method for cell in cells] == [CIRCUIT] * 3 + [NONE] * 4
    for cell in cells:
        wishes, talk = cell.group.earlier[0].content, cell.group.earlier[2:]
        assert ("strong" in wishes) is ("asked-" in str(cell.group.key)) and ("strong" not in wishes or cell.method == NONE)
        assert cell.strength == (TOP if cell.method == CIRCUIT else None)
        assert 40 <= sum(len(tiny.text_ids(message.content)) for message in talk) < 40 + 20
    read = read_by_words(texts[-7:])  # steered and asked for by emotion, then unsteered
    hits = {
        STEERED: [a == e for a, e in zip(read[:3], EMOTIONS, strict=True)],
        REQUESTED: [a == e for a, e in zip(read[3:6], EMOTIONS, strict=True)],
        UNTOLD: [read[6] == e for e in EMOTIONS],
    }
    felt = {row["how"]: row["felt"]["value"] for row in found.after}
    assert felt == pytest.approx({how: sum(told) / 3 for how, told in hits.items()}, abs=1e-6)


def test_a_run_that_was_ended_goes_on_without_writing_again(
    tiny: Model, circuit: Circuit, whole: tuple[SideEffects, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> SideEffects:
        return effects(tiny, circuit, "c" * 64, small_battery(), SETTINGS, tmp_path, read_by_words, batch_size=8)

    from emosteer.writing import best_of

    generate, batches = best_of.generate, list[int]()

    def ended(*arguments: Any) -> Any:
        batches.append(len(arguments[1]))
        if len(batches) == 9:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(best_of, "generate", ended)
    with pytest.raises(KeyboardInterrupt):
        run()
    resumed = run()
    resumed.save(tmp_path / "resumed")
    whole[0].save(tmp_path / "whole")
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    monkeypatch.setattr(best_of, "generate", None)
    monkeypatch.setattr("emosteer.side_effects.neutral.text_nll", None)
    run().save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(TypeError):  # another circuit's replies are not taken for this one's
        effects(tiny, replace(circuit, z_delta=2 * circuit.z_delta), "d" * 64, small_battery(), SETTINGS, tmp_path, read_by_words)


def test_effects_are_read_back_and_nonsense_is_refused(whole: tuple[SideEffects, Path], tmp_path: Path) -> None:
    path = tmp_path / "effects.safetensors"
    whole[0].save(path)
    again = SideEffects.load(path)
    again.save(tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes() and again.rows == whole[0].rows
    found = artifacts.load(path)
    for change, told in (
        (lambda f, t: f["conditions"].pop(), "expected 'tried.texts'"),
        (lambda f, t: f["rows"][0].update(emotion="joy"), "of no condition"),
        (lambda f, t: f["rows"][0].update(intensity=10.0), "of no condition"),
        (lambda f, t: f["rows"][1].update(strength=None), "lacks its place on the dial"),
        (lambda f, t: f["rows"][0]["figures"].update(mood=f["rows"][0]["figures"]["right"]), "found 'mood'"),
        (lambda f, t: f["rows"][0]["figures"]["right"].update(p=2.0), "rows.0.figures.right.p"),
        (lambda f, t: f["unsteered"].pop("kinds"), "lacks 'unsteered.kinds'"),
        (lambda f, t: t.pop("nll"), "lacks 'nll'"),
        (lambda f, t: t.update(right=t["right"][:, 1:].contiguous()), "expected 'right'"),
    ):
        fields, tensors = json.loads(json.dumps(found.fields)), dict(found.tensors)
        change(fields, tensors)  # type: ignore[no-untyped-call]
        artifacts.save(tmp_path / "wrong", "effects", fields, tensors, found.provenance)
        with pytest.raises(ArtifactError, match=told):
            SideEffects.load(tmp_path / "wrong")


def test_a_circuit_without_a_dial_is_refused_before_anything_is_written(tiny: Model, circuit: Circuit, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not calibrated"):
        effects(tiny, replace(circuit, metrics={}), "c" * 64, small_battery(), SETTINGS, tmp_path, read_by_words)
    with pytest.raises(ArtifactError, match="no learned residual vectors"):
        effects(tiny, circuit, "c" * 64, small_battery(), replace(SETTINGS, methods=("learned-residual",)), tmp_path, read_by_words)
    assert not (tmp_path / "replies.jsonl").exists()


def test_without_everyday_prompts_nothing_is_asked_after_long_conversations(tiny: Model, circuit: Circuit, tmp_path: Path) -> None:
    battery = small_battery()
    none = replace(battery, asked={**battery.asked, EVERYDAY: ()})
    found = effects(tiny, circuit, "c" * 64, none, SETTINGS, tmp_path, read_by_words, batch_size=8)
    assert SETTINGS.followed and not found.after and any("there are none" in note for note in found.notes)


def test_the_shipped_battery_is_whole_and_a_part_of_it_is_spread_evenly() -> None:
    full, part = battery_of(EffectsSettings(everyday=8, texts=20)), battery_of(QUICK)
    assert len(full.items) == 300 and [len(full.asked[kind]) for kind in full.asked] == [40, 40, 30, 8] and len(full.texts) == 20
    assert len(part.items) == QUICK.items and {one.kind for one in part.items} == {one.kind for one in full.items}
    assert {"effects/items.jsonl", "effects/phrases.json", "prompts/dev.jsonl"} <= set(full.hashes)
    assert evenly([0, 1, 2, 3, 4, 5, 6], 3) == [0, 2, 4] and evenly([1, 2], 5) == [1, 2] == evenly([1, 2], 0)
