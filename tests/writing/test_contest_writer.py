"""The contest's writers, controls and readers: equal terms for all, nothing written or asked twice, nothing lost when killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.errors import ArtifactError, DataError
from emosteer.circuits.faithfulness import random_units
from emosteer.circuits.methods import CONTEST, NONE, PROMPTS, STEERED
from emosteer.evaluation import controls
from emosteer.evaluation.controls import added_key, random_circuit, random_direction, random_heads, vectors_of
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import SteeringPlan, plan_for
from emosteer.judges import jury as jury_module
from emosteer.judges.panel import UNDECIDED
from emosteer.models.sites import ATTN_OUT, RESID_POST, Head
from emosteer.scenarios.prompts import STIMULI, elicit, plain
from emosteer.scenarios.scenarios import EMOTIONS as SIX
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.words import feeling_pattern, name_pattern
from emosteer.writing import best_of as best_module
from emosteer.writing import contest_writer as contest_module
from emosteer.writing.contest_writer import Cell, cells_of
from tests.circuits.test_assemble import direction_by_hand
from tests.helpers import contest_setup as setup
from tests.helpers.contest_setup import (
    EMOTIONS,
    INSTRUCTION,
    WORD,
    WordAnswers,
    WordCheck,
    WordJudge,
    contest,
    groups,
    jury,
    parts,
    prompts,
)

STRENGTH = 4.0


def all_cells(some: int) -> list[Cell]:
    """Every method's cells."""
    return all_cells_of(groups(some))


def all_cells_of(some: Sequence[Group]) -> list[Cell]:
    """The same for prompts that are given."""
    found = []
    for method in CONTEST:
        value = None if method == NONE or method in PROMPTS else STRENGTH
        found += cells_of(method, some, dict.fromkeys(EMOTIONS, value))
    return found


def asked_by(method: str) -> str:
    """The elicitation of a prompt; the contest's circuit has no examples, so that the prompt that shows them asks for nothing."""
    return "reply" if method == "prompt-examples" else method.removeprefix("prompt-")


# ---- writing -----------------------------------------------------------------------------------------------------------


def test_every_reply_is_what_generate_writes_alone(tmp_path: Path) -> None:
    """Against prompts and vectors put together by hand, one reply at a time."""
    model, circuit, _ = parts()
    found = contest(tmp_path)
    cells = all_cells(2)
    rows = found.write(cells, "test")
    texts = set()
    for cell, row in zip(cells, rows, strict=True):
        text, how = cell.group.text, asked_by(cell.method)
        messages = elicit(how, text, cell.emotion, INSTRUCTION) if cell.method in PROMPTS else plain(text, INSTRUCTION)
        plan = SteeringPlan.none(1)
        if cell.method in STEERED:
            vectors = {"circuit": circuit.steering(model), "residual": circuit.residual(), "learned-residual": circuit.learned_stream()}
            plan = plan_for(vectors[cell.method], [EMOTIONS.index(cell.emotion)], [STRENGTH])
        if not cell.method.startswith("random"):
            alone = generate(model, [Request("x", tuple(model.prompt_ids(messages)))], plan, found.decoding)[0]
            assert (row["text"], row["finish_reason"], row["n_tokens"]) == (alone.text, alone.finish_reason, alone.n_tokens), cell
        assert row["nll"] == pytest.approx(reply_nll(model, [row["text"]])[0], abs=1e-4)
        texts.add((cell.group.key, row["text"]))
    assert len(texts) > 8, "the methods write different replies"
    said = [WORD[cell.emotion] in row["text"] for cell, row in zip(cells, rows, strict=True) if cell.method == "circuit"]
    assert all(said), "the planted circuit works"


def test_a_chat_s_earlier_turns_reach_the_model_with_every_method(tmp_path: Path) -> None:
    """Token for token: what was said before, then the prompt's or the plain last turn; other processes read it from disk."""
    model = parts()[0]
    chat = prompts(1)[0]
    turns = [message._asdict() for message in chat.earlier]
    found = contest(tmp_path)
    for cell in all_cells_of([chat]):
        how = asked_by(cell.method)
        last = elicit(how, chat.text, cell.emotion, INSTRUCTION) if cell.method in PROMPTS else plain(chat.text, INSTRUCTION)
        wanted = [*last[:-1], *turns, last[-1]]  # a system line stands at the head
        ids = list(found.request(cell).ids)
        assert ids == model.prompt_ids(wanted) and len(ids) > len(model.prompt_ids(last))
    cells = all_cells_of(prompts(3))
    contest_module._write_work(tmp_path / "work.json", cells, [[0, 1]])
    assert contest_module._read_work(tmp_path / "work.json") == (cells, [[0, 1]])
    alone = replace(chat, earlier=())
    rows = found.write(cells_of(NONE, [chat], {}) + cells_of(NONE, [replace(alone, key=replace(chat.key, scenario="other"))], {}), "test")
    assert rows[0]["text"] != rows[1]["text"] and len(found.replies.rows) == 2, "what was said before matters"


def test_methods_can_share_a_batch(tmp_path: Path) -> None:
    found = contest(tmp_path)
    cells = all_cells(2)[::-1]
    plan = found.plan(cells)
    assert {site.kind for site in plan.vectors} == {ATTN_OUT, RESID_POST}
    for row, cell in enumerate(cells):
        own = found.vectors[cell.method]
        for site, value in plan.vectors.items():
            wanted = own[site][EMOTIONS.index(cell.emotion)] * STRENGTH if site in own else torch.zeros(value.shape[1])
            torch.testing.assert_close(value[row], wanted)


def test_all_methods_meet_the_same_chances(tmp_path: Path) -> None:
    """Sampling: without any strength the steered replies are the unsteered one, whatever the emotion; another seed gives others."""
    decoding = Decoding(max_new_tokens=6, temperature=1.0)
    found = contest(tmp_path, decoding=decoding)
    some = groups(5)
    base = [row["text"] for row in found.write(cells_of(NONE, some, {}), "test")]
    assert len(set(base)) > 2
    for method in (*STEERED, "random-heads", "random-circuit", "random-direction"):
        rows = found.write(cells_of(method, some, dict.fromkeys(EMOTIONS, 0.0)), "test")
        assert [row["text"] for row in rows] == [text for text in base for _ in EMOTIONS]
    other = contest(tmp_path, decoding=replace(decoding, seed=1))
    assert [row["text"] for row in other.write(cells_of(NONE, some, {}), "test")] != base


def test_the_unsteered_reply_is_written_once() -> None:
    assert len(cells_of(NONE, groups(4), dict.fromkeys(EMOTIONS, None))) == 4
    assert len(cells_of("prompt-tone", groups(4), dict.fromkeys(EMOTIONS, None))) == 4 * len(EMOTIONS)


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets `generate` count the rows that it writes."""
    written: list[int] = []

    def counting(model: Any, requests: Sequence[Request], *rest: Any, **options: Any) -> Any:
        written.append(len(requests))
        return generate(model, requests, *rest, **options)

    monkeypatch.setattr(best_module, "generate", counting)
    return written


def test_nothing_is_written_twice_and_another_method_disturbs_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = count_rows(monkeypatch)
    cells = all_cells(3)
    without = [cell for cell in cells if cell.method != "random-heads"]
    first = contest(tmp_path).write(without, "test")
    assert sum(written) == len(without)
    again = contest(tmp_path)
    assert again.write(without, "test") == first and sum(written) == len(without)
    again.write(cells, "test")
    assert sum(written) == len(cells), "only the new method was written"
    assert len({json.loads(line)["key"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()}) == len(cells)


@pytest.mark.parametrize("killed_after", [1, 3, 9, 20, 21])
def test_a_killed_run_ends_in_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int) -> None:
    """Even if a reply depended on its neighbours in the batch, as its last bits do: the text is made to carry the batch."""

    def neighbourly(model: Any, requests: Sequence[Request], *rest: Any) -> Any:
        batch = setup.chance(" ".join(f"{request.key}{request.ids}" for request in requests))
        return [replace(reply, text=f"{reply.text} {batch:.6f}") for reply in generate(model, requests, *rest)]

    monkeypatch.setattr(best_module, "generate", neighbourly)
    cells = all_cells(3)[:40]
    wanted = contest(tmp_path / "whole").write(cells, "test")
    assert len({row["text"].split()[-1] for row in wanted}) > 4

    with monkeypatch.context() as patched:
        setup.kill_after(patched, killed_after)
        with pytest.raises(KeyboardInterrupt):
            contest(tmp_path / "killed").write(cells, "test")
    log = tmp_path / "killed" / "replies.jsonl"
    assert len(log.read_text().splitlines()) == killed_after
    with log.open("a") as file:
        file.write('{"key": "torn')
    assert contest(tmp_path / "killed").write(cells, "test") == wanted
    assert sorted(log.read_text().splitlines()) == sorted((tmp_path / "whole" / "replies.jsonl").read_text().splitlines())


def test_a_reply_is_kept_under_everything_that_shapes_it(tmp_path: Path) -> None:
    found, (_, circuit, directions) = contest(tmp_path), parts()
    cell = Cell(groups(1)[0], "anger", "circuit", 1.5)
    stronger = replace(circuit, strength=circuit.strength * 2, residual_strength=9.0, metrics={"calibration": 1})
    longer = replace(circuit, z_delta=circuit.z_delta * 1.01)
    others = [
        found.key(replace(cell, emotion="sadness")),
        found.key(replace(cell, strength=1.51)),
        found.key(replace(cell, method="random-circuit")),
        found.key(replace(cell, group=groups(2)[1])),
        replace(found, decoding=Decoding(max_new_tokens=7)).key(cell),
        replace(found, instruction="keep two sentences", _prompts={}).key(cell),
        replace(found, added={"circuit": added_key(longer, directions, "circuit", 0)}).key(cell),
    ]
    assert len({found.key(cell), *others}) == 8
    assert replace(found, batch_size=3).key(cell) == found.key(cell)
    for method in CONTEST:
        key = added_key(circuit, directions, method, 0)
        assert added_key(stronger, directions, method, 0) == key, "default strengths and metrics add nothing"
        assert (added_key(circuit, directions, method, 1) == key) == (not method.startswith("random"))
    keys = [added_key(circuit, directions, m, 0) for m in CONTEST if m not in (NONE, *PROMPTS)]
    assert len(set(keys)) == 6
    assert circuit.learned_residual is not None
    turned = replace(circuit, learned_residual=circuit.learned_residual * 1.01)
    for method in CONTEST:
        same = added_key(turned, directions, method, 0) == added_key(circuit, directions, method, 0)
        assert same == (method != "learned-residual"), "and nothing else is written again"


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_text('{"id": "a", "text": "mine"}\n')
    with pytest.raises(DataError, match="expected every line of .* to have a 'key'"):
        contest(tmp_path)
    assert (tmp_path / "replies.jsonl").read_text() == '{"id": "a", "text": "mine"}\n'


# ---- prompts -------------------------------------------------------------------------------------------------------------


def test_stimuli_name_no_feeling_and_differ() -> None:
    assert set(STIMULI) == set(SIX) and len(set(STIMULI.values())) == len(SIX)
    for emotion, sentence in STIMULI.items():
        assert not feeling_pattern().search(sentence) and not name_pattern(emotion).search(sentence)
        (message,) = elicit("stimulus", "The train was late.", emotion, "Two sentences.")
        assert message["role"] == "user" and message["content"] == f"The train was late.\n{sentence}\nTwo sentences."
    neutral = elicit("stimulus", "The train was late.", None)[0]["content"]
    assert not any(sentence in neutral for sentence in STIMULI.values()) and neutral.startswith("The train was late.\n")
    assert "pride" in elicit("stimulus", "The train was late.", "pride")[0]["content"]


# ---- controls --------------------------------------------------------------------------------------------------------------


def test_random_heads_add_their_own_true_contrast() -> None:
    """Against the sum over the drawn heads, put together by hand; as many per emotion as the circuit has."""
    model, circuit, directions = parts()
    plain_circuit = replace(circuit, provenance=replace(circuit.provenance, params={"spare_names": False}))
    found = random_heads(model, plain_circuit, directions, seed=3)
    total = {site: torch.zeros_like(value) for site, value in found.items()}
    for e, emotion in enumerate(EMOTIONS):
        units = random_units(model, 3, 0, f"random-heads/3/{emotion}")
        assert len(set(units)) == len(units) == len(circuit.units(emotion)) == 3
        for unit in units:
            assert isinstance(unit, Head)
            z = directions.z.mean[e, unit.layer].view(4, -1)[unit.index]
            site = next(site for site in found if site.layer == unit.layer)
            total[site][e] += z @ model.w_o(unit.layer)[unit.index].float()
    for site, value in found.items():
        torch.testing.assert_close(value, total[site])
    spared, lifted = random_heads(model, circuit, directions, seed=3), 0
    assert not circuit.learned_gains and spared.keys() == found.keys()
    for e, emotion in enumerate(EMOTIONS):
        name = direction_by_hand(model, emotion)
        for site, value in found.items():
            before, after = float(value[e] @ name), float(spared[site][e] @ name)
            assert after == pytest.approx(min(before, -before), abs=1e-4), "a circuit of ranked heads turns round what lifts the name"
            lifted += before > 1e-2
    assert lifted


def test_random_heads_are_spared_the_names_one_by_one_where_the_circuit_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As learned heads are: each by the smallest change, whatever the others in its layer write."""
    model, circuit, directions = parts()
    learned = replace(circuit, metrics={**circuit.metrics, "gains": {"learn": "gains"}})
    assert learned.learned_gains
    compiled: list[torch.Tensor] = []
    compile_units = controls.compile_units
    monkeypatch.setattr(controls, "compile_units", lambda model, z, mlp: (compiled.append(z), compile_units(model, z, mlp))[1])
    random_heads(model, learned, directions, seed=3)
    (z,) = compiled
    changed = 0
    for e, emotion in enumerate(EMOTIONS):
        name = direction_by_hand(model, emotion)
        drawn = random_units(model, 3, 0, f"random-heads/3/{emotion}")
        assert {(unit.layer, unit.index) for unit in drawn} == set(map(tuple, z[e].unflatten(-1, (4, -1)).any(-1).nonzero().tolist()))
        for unit in drawn:
            true = directions.z.mean[e, unit.layer].view(4, -1)[unit.index]
            effect = model.w_o(unit.layer)[unit.index].float() @ name / name.norm()  # of each number of the head, on the name
            own = z[e, unit.layer].view(4, -1)[unit.index]
            assert (own @ effect).abs() < 1e-5
            torch.testing.assert_close(own, true - effect * (true @ effect) / effect.square().sum(), atol=1e-5, rtol=1e-4)
            changed += bool((true @ effect).abs() > 1e-3)
    assert changed > 3


def test_random_heads_are_seeded_and_exclude_nothing() -> None:
    model, circuit, directions = parts()
    one, same, other = (random_heads(model, circuit, directions, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[site], same[site]) for site in one)
    assert one.keys() != other.keys() or any(not torch.equal(one[site], other[site]) for site in one)
    drawn = {unit for seed in range(60) for unit in random_units(model, 3, 2, str(seed))}
    assert {unit for unit in drawn if isinstance(unit, Head)} == {Head(layer, head) for layer in range(3) for head in range(4)}


def test_random_heads_without_directions_say_what_to_do() -> None:
    model, circuit, _ = parts()
    with pytest.raises(ArtifactError, match="emosteer extract"):
        vectors_of(model, circuit, None, "random-heads", 0)


def test_the_random_circuit_has_the_circuits_size_in_every_layer_and_not_its_direction() -> None:
    model, circuit, _ = parts()
    true, found = circuit.steering(model), random_circuit(model, circuit, 0)
    assert found.keys() == true.keys() and len(found) == 2
    cosines = []
    for site, value in true.items():
        torch.testing.assert_close(found[site].norm(dim=-1), value.norm(dim=-1))
        cosines += torch.cosine_similarity(found[site], value, dim=-1).tolist()
    assert max(map(abs, cosines)) < 0.7
    assert len({round(c, 4) for c in cosines}) == 6, "each emotion and layer has a draw of its own"
    again, other = random_circuit(model, circuit, 0), random_circuit(model, circuit, 1)
    assert all(torch.equal(found[site], again[site]) and not torch.equal(found[site], other[site]) for site in found)


def test_the_random_circuit_uses_as_many_heads_in_each_layer() -> None:
    """What one head writes lies in the span of its rows of W_O: the layer with one head in the circuit has one here too."""
    model, circuit, _ = parts()
    found = random_circuit(model, circuit, 0)

    def heads_needed(vector: torch.Tensor, layer: int) -> int:
        blocks = model.w_o(layer).float()  # [head, d_head, d_model]
        for size in (1, 2):
            for chosen in torch.combinations(torch.arange(4), size):
                basis = blocks[chosen].flatten(0, 1)
                left = vector - torch.linalg.lstsq(basis.T, vector).solution @ basis
                if left.norm() < 1e-3 * vector.norm():
                    return size
        return 3

    counts = {site.layer: {heads_needed(value[e], site.layer) for e in range(3)} for site, value in found.items()}
    assert counts == {1: {1}, 2: {2}}


def test_random_neurons_stand_in_for_neurons() -> None:
    model, circuit, directions = parts()
    index = torch.tensor([[e, layer, n] for e in range(3) for layer in (0, 2) for n in (1, 5)])
    mixed = replace(circuit, neuron_index=index, neuron_delta=torch.linspace(-1, 2, len(index)))
    true, found = mixed.steering(model), random_circuit(model, mixed, 0)
    assert found.keys() == true.keys() and len(found) == 4
    for site, value in true.items():
        torch.testing.assert_close(found[site].norm(dim=-1), value.norm(dim=-1))
        assert not torch.allclose(found[site], value)
    assert len(random_heads(model, mixed, directions, 0)) > 2


def test_the_random_direction_is_one_rotation_of_the_true_ones() -> None:
    model, circuit, directions = parts()
    vectors = torch.nn.functional.normalize(torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    varied = replace(circuit, vectors=vectors, rms=torch.tensor([1.0, 2.0, 3.0]), residual_layers=(0, 1, 2))
    true, found = varied.residual(), random_direction(varied, 0)
    assert found.keys() == true.keys()
    flat = [torch.cat([source[site] / varied.rms[site.layer] for site in sorted(true, key=str)]) for source in (true, found)]
    torch.testing.assert_close(flat[1].norm(dim=-1), torch.ones(9))
    torch.testing.assert_close(flat[1] @ flat[1].T, flat[0] @ flat[0].T, atol=1e-5, rtol=0)
    assert torch.cosine_similarity(flat[0], flat[1], dim=-1).abs().max() < 0.6
    other = random_direction(varied, 1)
    assert not any(torch.allclose(found[site], other[site]) for site in found)


# ---- reading -----------------------------------------------------------------------------------------------------------------


def test_identical_texts_are_judged_once_and_empty_ones_never(tmp_path: Path) -> None:
    judge, check = WordJudge(), WordCheck()
    bench = jury(tmp_path, judge, check)
    found = bench.readings(["cry", "laugh", "cry", "", "cry"], "test")
    assert judge.asked == ["cry", "laugh"] and found["cry"].label == "sadness" and found["laugh"].label == "happiness"
    assert found[""].probabilities == dict.fromkeys(SIX, 0.0) | {"neutral": 1.0} and found[""].label == "neutral"
    assert bench.verdicts(["cry", "cry cry cry cry", "cry"], "test")["cry cry cry cry"].sound is False
    assert check.asked == ["cry", "cry cry cry cry"]
    again = jury(tmp_path, judge, check)
    assert again.readings(["laugh", "cry"], "test")["cry"] == found["cry"] and len(judge.asked) == 2
    assert again.verdicts(["cry"], "test")["cry"].sound and len(check.asked) == 2
    other = WordJudge(key="words-2")
    jury(tmp_path, other).readings(["laugh", "cry"], "test")
    assert other.asked == ["laugh", "cry"], "another judge has opinions of its own"


def test_a_missing_opinion_is_asked_again_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{word} never {i}" for i, word in enumerate(["cry", "slam", "laugh"] * 3)]
    failing = WordJudge(fails=lambda text: text.endswith(("2", "5")))
    found = jury(tmp_path, failing, paid=True).readings(texts, "test")
    assert [text for text in texts if found[text].probabilities is None] == [texts[2], texts[5]]
    assert found[texts[2]].problem == "HTTP 500"
    assert "2 of 9 opinions of words are missing (HTTP 500)" in capsys.readouterr().err
    mended = WordJudge()
    again = jury(tmp_path, mended, paid=True).readings(texts, "test")
    assert mended.asked == [texts[2], texts[5]] and all(opinion.probabilities for opinion in again.values())
    assert all(again[text] == found[text] for text in texts if found[text].probabilities)


def test_what_was_paid_for_is_kept_when_killed_and_a_chunk_of_a_local_judge_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jury_module, "CHUNK", 4)
    texts = [f"never {i}" for i in range(10)]

    def killed(text: str) -> bool:
        if text == "never 6":
            raise KeyboardInterrupt
        return False

    def run(folder: str, paid: bool, fails: Callable[[str], bool]) -> tuple[WordJudge, dict[str, Any]]:
        judge = WordJudge(fails, neighbours=not paid)
        try:
            return judge, jury(tmp_path / folder, judge, paid=paid).readings(texts, "test")
        except KeyboardInterrupt:
            return judge, {}

    for paid, asked_again in ((True, texts[6:]), (False, texts[4:])):
        _, wanted = run(f"whole{paid}", paid, lambda text: False)
        run(f"killed{paid}", paid, killed)
        judge, found = run(f"killed{paid}", paid, lambda text: False)
        assert judge.asked == asked_again and found == wanted


def test_a_panel_s_readings_are_kept_by_judge_and_a_new_judge_alone_is_asked(tmp_path: Path) -> None:
    texts = ["cry", "laugh", "slam"]
    first, second = WordJudge(), WordJudge(name="others", key="words-2")
    alone = jury(tmp_path, first).readings(texts, "test")
    found = jury(tmp_path, [first, second]).readings(texts, "test")
    assert first.asked == texts == second.asked, "the first judge's opinions were kept"
    assert [*found["cry"].opinions] == ["words", "others"] and found["cry"].opinions["words"] == alone["cry"].opinions["words"]
    bench = jury(tmp_path, [first, second])
    assert (bench.name, bench.key) == ("words, others", "mean of words-1, words-2")
    assert bench.readings(texts, "test") == found and len(first.asked) == len(second.asked) == 3


def test_one_judge_s_failures_leave_the_panel_to_the_others_and_are_asked_again(tmp_path: Path) -> None:
    texts = ["cry", "laugh"]
    failing = WordJudge(fails=lambda text: text == "cry", name="b", key="b")
    panel = [WordJudge(name=name, key=name) for name in "ac"]
    found = jury(tmp_path, [panel[0], failing, panel[1]], paid=True).readings(texts, "test")
    assert found["cry"].votes == {"a": "sadness", "c": "sadness"} and found["cry"].label == "sadness", "two of three"
    assert found["cry"].row()["b"] is None and found["cry"].problem == "HTTP 500"
    pair = jury(tmp_path / "pair", [panel[0], failing], paid=True).readings(texts, "test")
    assert pair["cry"].label == UNDECIDED, "one of two that were asked does not decide"
    mended = WordJudge(name="b", key="b")
    again = jury(tmp_path, [panel[0], mended, panel[1]], paid=True).readings(texts, "test")
    assert mended.asked == ["cry"] and all(again["cry"].row().values())


def test_answers_are_kept_by_prompt_and_reply_and_nothing_answers_nothing(tmp_path: Path) -> None:
    bench = jury(tmp_path)
    check = bench.answers
    assert isinstance(check, WordAnswers)
    pairs = [("why", "laugh"), ("how", "laugh"), ("why", "never again"), ("why", ""), ("why", " "), ("why", "laugh")]
    found = bench.answering(pairs, "test")
    assert found == {pairs[0]: 0.9, pairs[1]: 0.9, pairs[2]: 0.1, pairs[3]: 0.0, pairs[4]: 0.0}
    assert check.asked == pairs[:3], "each once, and no empty reply"
    again = jury(tmp_path)
    assert again.answering(pairs, "test") == found and not again.answers.asked
