"""The tuned strength, the fluency it rests on, and the bank of the model's own replies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.errors import DataError
from emosteer.calibration import default_strength as tuning
from emosteer.calibration.default_strength import strongest, tune_strength
from emosteer.calibration.settings import TuneSettings
from emosteer.circuits.assemble import assemble
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.settings import CircuitSettings
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.generation.fluency import reply_nll
from emosteer.generation.generate import Reply, Request, generate
from emosteer.generation.steering import plan_for
from emosteer.models.model import Model
from emosteer.scenarios.prompts import elicit, plain
from emosteer.scenarios.scenarios import Group
from emosteer.scenarios.splits import stable_share
from emosteer.writing import own_replies
from emosteer.writing.jobs import Job, Work
from emosteer.writing.own_replies import fault, own_bank
from emosteer.writing.writer import Writer
from tests.conftest import small_data

EMOTIONS = ("anger", "sadness")
INSTRUCTION = "keep the reply"
TEXTS = ["never again", "i laugh and sing and dance alone .", "", "cry", "slam the door please stop . no !", "yes", "we waited nine weeks"]


# ---- fluency ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def nll_by_hand(model: Model, text: str, start: int) -> float:
    """Mean negative log-likelihood of one text by the plain model: one row, one token after the other."""
    ids = [start, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(ids) == 1:
        return math.nan
    total = 0.0
    for position in range(1, len(ids)):
        logits = model.hf(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[ids[position]])
    return total / (len(ids) - 1)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_reply_nll_equals_the_plain_model_row_by_row(family: Model, batch_size: int) -> None:
    found = reply_nll(family, TEXTS, batch_size)
    wanted = [nll_by_hand(family, text, family.tokenizer.bos_token_id) for text in TEXTS]
    assert found == pytest.approx(wanted, abs=1e-4, nan_ok=True)
    assert [i for i, cost in enumerate(found) if math.isnan(cost)] == [2]
    assert len({round(cost, 3) for cost in wanted if cost == cost}) == 6, "each text has a cost of its own"


def test_a_model_without_bos_starts_with_padding(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "tokenizer", _without_bos(tiny))
    assert tiny.tokenizer.bos_token_id is None
    assert reply_nll(tiny, TEXTS[:2]) == pytest.approx([nll_by_hand(tiny, text, tiny.pad_id) for text in TEXTS[:2]], abs=1e-4)


def _without_bos(model: Model) -> Any:
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = None
    return tokenizer


def test_no_texts_and_only_empty_texts(tiny: Model) -> None:
    assert reply_nll(tiny, []) == []
    assert all(map(math.isnan, reply_nll(tiny, ["", ""])))


# ---- the largest strength that the text bears ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({0.0: 2.0, 2.0: 2.0, 3.0: 2.05, 4.0: 2.3, 5.0: 2.0}, 3.0),  # past a rise nothing counts
        ({0.0: 2.0, 2.0: 1.5, 3.0: 1.59, 4.0: 1.7}, 3.0),  # against the lowest so far, not the unsteered
        ({0.0: 2.0, 2.0: 1.5, 3.0: 1.55, 4.0: 1.62}, 3.0),  # nor against the strength before
        ({0.0: 2.0, 2.0: 1.9, 3.0: 1.8, 4.0: 1.7}, 4.0),
        ({0.0: 2.0, 2.0: 2.2, 3.0: 1.9}, 0.0),
        ({0.0: 2.0, 2.0: 2.1, 3.0: 2.3}, 2.0),  # exactly the tolerance is borne
        ({0.0: 2.0, 2.0: math.nan, 3.0: 2.0}, 0.0),
        ({0.0: 2.0}, 0.0),
    ],
)
def test_strongest(costs: dict[float, float], best: float) -> None:
    assert strongest(costs, 0.1 + 1e-9) == best


# ---- tuning ----------------------------------------------------------------------------------------------------------

SMALL = TuneSettings(strengths=(1.0, 4.0, 9.0), residual_strengths=(0.5, 2.0), n_prompts=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def circuit(tiny: Model) -> Circuit:
    groups, bank = small_data(3, EMOTIONS)
    directions = extract(tiny, groups, Settings(EMOTIONS, holdout=0, instruction=INSTRUCTION), bank=bank)
    return assemble(tiny, directions, groups, CircuitSettings(n_prompts=2, n_random=0, head_share=0.5))


def costs_by_hand(model: Model, circuit: Circuit, groups: Sequence[Group], method: str, strength: float) -> float:
    """Mean cost over prompts and emotions, every reply written and weighed alone."""
    vectors = {"circuit": circuit.steering(model), "residual": circuit.residual(), "none": {}}[method]
    costs = []
    for group in groups:
        ids = tuple(model.prompt_ids(plain(group.text, INSTRUCTION)))
        for e in range(len(EMOTIONS) if method != "none" else 1):
            plan = plan_for(vectors, [e], [strength]) if vectors else None
            text = generate(model, [Request("x", ids)], plan, Decoding(max_new_tokens=4))[0].text
            cost = nll_by_hand(model, text, model.tokenizer.bos_token_id)
            costs.append(10.0 if math.isnan(cost) else cost)
    return sum(costs) / len(costs)


def test_the_tuned_strength_is_the_strongest_of_the_real_costs(tiny: Model, circuit: Circuit) -> None:
    groups = small_data(4, EMOTIONS, seed=1)[0]
    chosen = sorted(groups, key=lambda group: stable_share(f"tune/{group.key}", 0))[:2]
    grids = {"circuit": SMALL.strengths, "residual": SMALL.residual_strengths}
    tuned = tune_strength(tiny, circuit, groups, SMALL)
    curves: dict[str, dict[float, float]] = {}
    for method, strengths in grids.items():
        curves[method] = {0.0: costs_by_hand(tiny, circuit, chosen, "none", 0.0)}
        curves[method] |= {s: costs_by_hand(tiny, circuit, chosen, method, s) for s in strengths}
        found = tuned.metrics["tuning"][method]
        assert {float(s): cost for s, cost in found.items()} == pytest.approx(curves[method], abs=1e-3)
    assert len({round(c, 3) for curve in curves.values() for c in curve.values()}) > 4, "the strength is really used"
    for tolerance in (0.0, 0.3, 1.0, 50.0):
        again = tune_strength(tiny, circuit, groups, replace(SMALL, tolerance=tolerance))
        assert again.strength.tolist() == [strongest(curves["circuit"], tolerance) or 1.0] * 2
        assert again.residual_strength == (strongest(curves["residual"], tolerance) or 0.5)
    assert again.strength.tolist() == [9.0, 9.0] and again.residual_strength == 2.0, "with patience without end the last"


def test_where_all_is_too_much_the_weakest_is_taken(tiny: Model, circuit: Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, _ = small_data(2, EMOTIONS)
    monkeypatch.setattr(tuning, "_cost", lambda model, circuit, groups, method, strength, settings: 1.0 + strength)
    tuned = tune_strength(tiny, circuit, groups, SMALL)
    assert tuned.strength.tolist() == [1.0, 1.0] and tuned.residual_strength == 0.5
    monkeypatch.setattr(tuning, "_cost", lambda *_: 1.0)
    learned = replace(circuit, metrics={**circuit.metrics, "gains": {}})
    assert tune_strength(tiny, learned, groups, SMALL).strength.tolist() == [1.0, 1.0], "never above what gains are learned at"
    assert tune_strength(tiny, circuit, groups, SMALL).strength.tolist() == [9.0, 9.0]
    outputs = replace(circuit, metrics={**circuit.metrics, "gains": {"learn": "outputs"}}).with_strength([0.6, 0.7])
    tuned = tune_strength(tiny, outputs, groups, SMALL)
    assert torch.equal(tuned.strength, outputs.strength) and "circuit" not in tuned.metrics["tuning"], "outputs keep theirs"
    assert tuned.residual_strength == 2.0


def test_tuning_keeps_the_rest_of_the_circuit(tiny: Model, circuit: Circuit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "_cost", lambda *_: 1.0)
    groups, _ = small_data(2, EMOTIONS)
    tuned = tune_strength(tiny, circuit, groups, SMALL)
    assert {k: v for k, v in tuned.metrics.items() if k != "tuning"} == circuit.metrics and "tuning" not in circuit.metrics
    assert torch.equal(tuned.z_delta, circuit.z_delta)
    tuned.save(tmp_path / "c.safetensors")
    assert Circuit.load(tmp_path / "c.safetensors").metrics == tuned.metrics


def test_an_empty_reply_counts_as_broken(tiny: Model, circuit: Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, _ = small_data(1, EMOTIONS)
    texts = iter(["", "never again"])
    monkeypatch.setattr(Writer, "write", lambda self, jobs: [(job, Reply("", next(texts), (), "stop")) for job in jobs])
    cost = tuning._cost(tiny, circuit, groups[:1], "circuit", 1.0, SMALL)
    assert cost == pytest.approx((10 + reply_nll(tiny, ["never again"])[0]) / 2)


def test_the_prompts_do_not_depend_on_the_groups_order(tiny: Model, circuit: Circuit) -> None:
    groups, _ = small_data(4, EMOTIONS, seed=1)
    few = replace(SMALL, strengths=(2.0,), residual_strengths=(1.0,))
    first, second = (tune_strength(tiny, circuit, some, few).metrics["tuning"] for some in (groups, groups[::-1]))
    assert first == second


def test_nothing_to_tune_on_is_refused(tiny: Model, circuit: Circuit) -> None:
    with pytest.raises(DataError, match="no scenario-event"):
        tune_strength(tiny, circuit, [], SMALL)


# ---- the model's own replies -----------------------------------------------------------------------------------------

GOOD = "we waited nine weeks and the landlord never told us why"


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "stop", None),
        (GOOD, "length", "cut off"),
        ("no never again , please !", "stop", "too short"),
        ("no never again please stop", "stop", None),
        ("my anger is all that is left of the day", "stop", "names the emotion"),
        ("My ANGER is all that is left", "stop", "names the emotion"),
        ("the sadness of it all is with us", "stop", None),  # another emotion's name is no give-away of this one
        ("go away now go away now go away now", "stop", "repeats itself"),
        ("Go away now, GO away now. go Away now", "stop", "repeats itself"),
        ("", "stop", "too short"),
    ],
)
def test_faults(text: str, finish: str, reason: str | None) -> None:
    assert fault(text, "anger", finish) == reason


def test_own_bank_keeps_what_has_no_fault(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = small_data(1, EMOTIONS)[0]  # three groups, two emotions
    replies = {
        (0, "anger"): (GOOD, "stop"),
        (0, "sadness"): (GOOD, "stop"),
        (1, "anger"): (GOOD + " again", "length"),
        (1, "sadness"): ("such sadness in all of this and in me", "stop"),
        (2, "anger"): (GOOD, "stop"),
        (2, "sadness"): ("we went home alone and sat in the dark", "stop"),
    }
    seen: list[Job] = []

    def work(self: Writer, jobs: Sequence[Job]) -> Work:
        def write(batch: list[int]) -> Iterator[list[tuple[int, Reply]]]:
            for i in batch:
                seen.append(jobs[i])
                index = next(place for place, group in enumerate(groups) if group.text == jobs[i].text)
                text, finish = replies[index, jobs[i].emotion]
                yield [(i, Reply(jobs[i].id, text, (1,), finish))]

        return Work([list(reversed(range(len(jobs))))], write)

    monkeypatch.setattr(Writer, "work", work)
    bank, reasons = own_bank(tiny, groups, EMOTIONS, tmp_path / "own.jsonl", INSTRUCTION)
    assert bank == {
        groups[0].key: {"anger": GOOD},
        groups[1].key: {},
        groups[2].key: {"anger": GOOD, "sadness": "we went home alone and sat in the dark"},
    }
    assert reasons == {"same as for another emotion": 1, "cut off": 1, "names the emotion": 1}
    assert {(job.method, job.strength) for job in seen} == {("prompt", None)} and len(seen) == 6
    assert own_bank(tiny, groups, EMOTIONS, tmp_path / "own.jsonl", INSTRUCTION) == (bank, reasons)
    assert len(seen) == 6, "the second time they are read from the file"


def test_own_replies_are_asked_for_by_tone(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_replies, "MIN_WORDS", 1)
    monkeypatch.setattr(own_replies, "fault", lambda text, emotion, finish: None)
    groups, _ = small_data(1, EMOTIONS)
    bank, reasons = own_bank(tiny, groups, EMOTIONS, tmp_path / "own.jsonl", INSTRUCTION, batch_size=2)
    for group in groups:
        for emotion in EMOTIONS:
            ids = tuple(tiny.prompt_ids(elicit("tone", group.text, emotion, INSTRUCTION)))
            wanted = generate(tiny, [Request("x", ids)], decoding=Decoding(max_new_tokens=80))[0].text
            assert bank[group.key].get(emotion, wanted) == wanted
    assert sum(map(len, bank.values())) + sum(reasons.values()) == 6 and sum(map(len, bank.values())) >= 4
