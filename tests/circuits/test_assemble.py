"""The circuit: importance and effects are slopes of real injections, budgets add up, what is saved is what was made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emosteer.attribution.gradients import importance_and_effects, prompt_samples
from emosteer.attribution.unit_scores import UnitScores, top_units, unit_mask
from emosteer.base.errors import ArtifactError, DataError, UsageError
from emosteer.circuits import faithfulness as faithfulness_module
from emosteer.circuits.assemble import AUTO_SHARES, allocate, assemble, auto_units, paper_units
from emosteer.circuits.circuit import Circuit, overlap
from emosteer.circuits.faithfulness import NAME_PUSH, faithfulness, injected_effect
from emosteer.circuits.name_sparing import name_direction, name_tokens, spare_names
from emosteer.circuits.settings import CircuitSettings
from emosteer.directions.activations import Sample
from emosteer.directions.directions import Directions, UnitStats, reference_directions, stable_band
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.steering import compile_units
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, MLP_OUT, RESID_MID, RESID_POST, Head, Neuron, Site, Unit
from emosteer.scenarios.prompts import plain
from emosteer.scenarios.scenarios import Group
from tests.attribution.test_unit_scores import all_units, double, entries, place
from tests.conftest import SIZES, build, small_data, tiny_tokenizer
from tests.helpers import reference
from tests.helpers.precision import forward_bound, product_bound

EMOTIONS = ("anger", "sadness", "happiness")


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its directions, and emotion-free prompts."""

    model: Model
    directions: Directions
    groups: list[Group]
    samples: list[Sample]
    v_ref: Tensor


def case_of(model: Model) -> Case:
    groups, bank = small_data(3, EMOTIONS)
    directions = extract(model, groups, Settings(EMOTIONS, holdout=0, instruction="keep the reply"), bank=bank)
    samples = prompt_samples(model, groups, 2, len(EMOTIONS), directions.instruction)
    return Case(model, directions, groups, samples, reference_directions(directions, stable_band(directions)))


@pytest.fixture(scope="module")
def case(tiny: Model) -> Case:
    return case_of(tiny)


@pytest.fixture(scope="module")
def exact() -> Case:
    """The same in float64."""
    return case_of(double("llama"))


def at_t_star(value: Tensor, where: slice = slice(None)) -> Callable[[Tensor], Tensor]:
    """A change that adds a value at the last position."""

    def change(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, -1, where] += value.to(x)
        return new

    return change


def final(case: Case, v_ref: Tensor, changes: reference.Changes | None = None) -> float:
    """The final score by bare hooks, mean over prompts."""
    last = (case.model.shape.n_layers - 1, RESID_POST)
    found = [reference.seen(case.model.hf, s.prompts[0], [last], changes)[last][-1].double() @ v_ref.double() for s in case.samples]
    return float(sum(found)) / len(found)


# ---- importance and effects ------------------------------------------------------------------------------------------


def test_prompt_samples_are_plain_prompts_of_different_groups(tiny: Model) -> None:
    groups, _ = small_data(4)
    by_key = {group.key: group for group in groups}
    found = prompt_samples(tiny, groups, 4, 2, "keep the reply")
    assert len({sample.key for sample in found}) == len(found) == 4
    for sample in found:
        assert sample.prompts == (tuple(tiny.prompt_ids(plain(by_key[sample.key].text, "keep the reply"))),) * 2
        assert sample.replies == ((), ())
    assert len({sample.key.valence for sample in found}) > 1, "not of one valence alone"
    assert len({sample.key for sample in prompt_samples(tiny, groups, 50, 1, "")}) == len(groups)
    with pytest.raises(DataError, match="no scenario-event"):
        prompt_samples(tiny, [], 4, 2, "")


def test_importance_is_the_slope_of_real_doses(exact: Case) -> None:
    """Central differences at three doses: the error falls with the square of the dose, to nothing."""
    importance, _ = importance_and_effects(exact.model, exact.samples, exact.directions, exact.v_ref)
    assert importance.shape == (3, 3, 2)
    errors = dict.fromkeys((0.3, 0.1, 0.003), 0.0)
    for e in range(len(EMOTIONS)):
        for layer in range(3):
            for kind, (out, resid) in enumerate(((ATTN_OUT, RESID_MID), (MLP_OUT, RESID_POST))):
                v = exact.directions.at(resid)[e, layer]
                for dose in errors:
                    up, down = (final(exact, exact.v_ref[e], {(layer, out): at_t_star(sign * dose * v)}) for sign in (1, -1))
                    slope = (up - down) / (2 * dose)
                    errors[dose] = max(errors[dose], abs(slope - importance[e, layer, kind].item()))
    assert errors[0.003] < 1e-4
    assert errors[0.003] < errors[0.1] / 50 and errors[0.1] < errors[0.3] / 4
    assert importance.abs().min() > 1e-3 and importance.std() > 0.1, "nothing of this is equal by being zero"


def test_effects_are_the_slope_of_injecting_a_units_contrast(exact: Case) -> None:
    _, effects = importance_and_effects(exact.model, exact.samples, exact.directions, exact.v_ref)
    units = [unit for i, unit in enumerate(all_units(exact.model)) if isinstance(unit, Head) or i % 11 == 0]
    dose, found, wanted = 1e-3, [], []
    for i, unit in enumerate(units):
        e, where = i % len(EMOTIONS), entries(exact.model, unit)
        stats = exact.directions.z if isinstance(unit, Head) else exact.directions.mlp
        contrast = stats.mean[e, unit.layer, where]
        up, down = (final(exact, exact.v_ref[e], {place(unit): at_t_star(sign * dose * contrast, where)}) for sign in (1, -1))
        found.append(effects.of(e, unit))
        wanted.append((up - down) / (2 * dose))
    assert torch.tensor(found) == pytest.approx(torch.tensor(wanted), abs=2e-5)
    assert max(map(abs, wanted)) > 0.1


def test_injected_effect_equals_injection_by_plain_hooks(family: Model) -> None:
    case = case_of(family) if family.name != "tiny-gemma3" else None
    groups, _ = small_data(3, EMOTIONS)
    samples = case.samples if case else prompt_samples(family, groups, 2, 3, "keep the reply")
    draw = torch.Generator().manual_seed(3)
    v_ref = torch.randn(32, generator=draw)
    vectors = {Site(layer, kind): torch.randn(3, 32, generator=draw) for layer, kind in ((0, ATTN_OUT), (1, MLP_OUT), (2, ATTN_OUT))}
    found = injected_effect(family, samples, vectors, v_ref)
    mine = Case(family, case.directions if case else None, groups, samples, v_ref)  # type: ignore[arg-type]
    base = final(mine, v_ref)
    wanted = [final(mine, v_ref, {(s.layer, s.kind): at_t_star(v[i]) for s, v in vectors.items()}) - base for i in range(3)]
    assert found.tolist() == pytest.approx(wanted, abs=2e-3, rel=1e-4)
    assert min(map(abs, wanted)) > 0.05


def test_nothing_injected_has_no_effect(case: Case) -> None:
    """Two rows of one batch hold the same but for the last bits: on some processors a kernel sums the last row in another order."""
    last = (case.model.shape.n_layers - 1, RESID_POST)
    states = torch.stack([reference.seen(case.model.hf, sample.prompts[0], [last])[last][-1] for sample in case.samples])
    bound = forward_bound(states) * case.v_ref[0].abs().sum().item()
    assert abs(injected_effect(case.model, case.samples, {}, case.v_ref[0]).item()) <= bound < 0.01


def test_importance_of_gemma_is_the_slope_behind_its_post_norms() -> None:
    """There a sublayer's output is what its post-norm gives; float32 bears a wide dose only."""
    model = build("gemma3")
    case = case_of(model)
    importance, _ = importance_and_effects(model, case.samples, case.directions, case.v_ref)
    dose, found, wanted = 0.02, [], []
    for layer, block in enumerate(model.hf.model.layers):
        for kind, (norm, resid) in enumerate(((block.post_attention_layernorm, RESID_MID), (block.post_feedforward_layernorm, RESID_POST))):
            v, scores = case.directions.at(resid)[1, layer], []
            for sign in (1, -1):
                change = at_t_star(sign * dose * v)
                handle = norm.register_forward_hook(lambda _, __, out, change=change: change(out))
                scores.append(final(case, case.v_ref[1]))
                handle.remove()
            found.append(importance[1, layer, kind].item())
            wanted.append((scores[0] - scores[1]) / (2 * dose))
    assert found == pytest.approx(wanted, abs=0.02, rel=0.02)
    assert max(map(abs, wanted)) > 0.3


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_allocation_is_proportional() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert allocate(weights, 100, 0, 1.0, 100) == [10, 20, 30, 40]
    assert allocate(weights, 100, 5, 1.0, 100) == [13, 21, 29, 37], "what the floors leave is proportional"
    assert allocate(weights * 1e-6, 100, 0, 1.0, 100) == [10, 20, 30, 40], "the scale of the importance does not matter"


def test_rounding_moves_no_sublayer_by_more_than_one_unit() -> None:
    draw = torch.Generator().manual_seed(0)
    for n in (2, 6, 28):
        for budget in (1, 7, 9, 50, 392):
            weights = torch.rand(n, generator=draw) ** 3
            share = budget * weights / weights.sum()
            assert (torch.tensor(allocate(weights, budget, 0, 1.0, budget)) - share).abs().max() <= 1 + 1e-4
    assert allocate(torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]), 9, 0, 1.0, 9)[0] in (4, 5)


def test_allocation_respects_cap_and_capacity() -> None:
    assert allocate(torch.tensor([100.0, 1.0, 1.0, 1.0]), 100, 0, 0.4, 100) == [40, 20, 20, 20]
    assert allocate(torch.tensor([100.0, 1.0, 1.0, 1.0]), 100, 0, 0.4, 30) == [30, 24, 23, 23]
    assert allocate(torch.tensor([3.0, 1.0]), 100, 0, 1.0, 20) == [20, 20], "no more than there is"
    assert allocate(torch.tensor([1.0, 1.0, 0.0]), 30, 0, 0.4, 100) == [12, 12, 6], "the unimportant take what no other can"


def test_allocation_without_importance_is_even_and_negative_importance_counts_as_none() -> None:
    assert allocate(torch.zeros(4), 12, 2, 0.4, 9) == [3, 3, 3, 3]
    assert allocate(torch.tensor([-5.0, -1.0]), 6, 0, 1.0, 9) == [3, 3]
    assert allocate(torch.tensor([-5.0, 1.0, 3.0]), 18, 2, 1.0, 20) == [2, 5, 11]


def test_tiny_budgets() -> None:
    weights = torch.tensor([0.1, 0.5, 0.2, 0.3])
    assert allocate(weights, 0, 2, 0.4, 9) == [0, 0, 0, 0]
    assert allocate(weights, 1, 2, 0.4, 9) == [0, 1, 0, 0]
    assert allocate(weights, 2, 2, 0.4, 9) == [0, 1, 0, 1]
    assert allocate(weights, 4, 2, 0.4, 9) == [1, 1, 1, 1], "the floor is lowered where the budget cannot pay it"


def test_every_allocation_adds_up() -> None:
    draw = random.Random(1)
    for _ in range(300):
        n, budget, floor, capacity = draw.randint(1, 30), draw.randint(0, 200), draw.randint(0, 5), draw.randint(1, 40)
        cap = draw.choice((0.1, 0.4, 1.0))
        weights = torch.tensor([draw.choice((0.0, draw.gauss(0, 1), 50 * draw.random())) for _ in range(n)])
        counts = allocate(weights, budget, floor, cap, capacity)
        limit = min(capacity, max(1, int(cap * budget)))
        assert sum(counts) == min(budget, n * limit)
        assert all(min(floor, budget // n, limit) <= count <= limit for count in counts)


def test_the_paper_preset_has_the_papers_figures_at_llama_3_2_3b() -> None:
    """392 neurons and 168 heads of 28 layers with 24 heads and 8192 neurons each; floors 4 and 2; the best of each layer."""
    model: Any = SimpleNamespace(shape=SimpleNamespace(n_layers=28, n_heads=24, d_mlp=8192))
    draw = torch.Generator().manual_seed(0)
    scores = UnitScores(torch.randn(2, 28, 24, generator=draw), torch.randn(2, 28, 8192, generator=draw))
    importance = torch.randn(2, 28, 2, generator=draw)
    importance[1, 5] = 500.0  # would take everything but for the cap
    units = paper_units(model, scores, importance, 1, CircuitSettings(preset="paper"))
    heads = [[u.index for u in units if isinstance(u, Head) and u.layer == layer] for layer in range(28)]
    neurons = [[u.index for u in units if isinstance(u, Neuron) and u.layer == layer] for layer in range(28)]
    assert len(set(units)) == len(units)
    assert sum(map(len, heads)) == 168 and sum(map(len, neurons)) == 392
    assert min(map(len, heads)) >= 2 and min(map(len, neurons)) >= 4
    assert max(map(len, heads)) == len(heads[5]) == 24, "no layer has more heads"
    assert max(map(len, neurons)) == len(neurons[5]) == int(0.4 * 392)
    for table, chosen in ((scores.heads[1], heads), (scores.neurons[1], neurons)):
        for layer, index in enumerate(chosen):
            assert set(index) == set(table[layer].topk(len(index)).indices.tolist())
    by_layer = allocate(importance[1, :, 0], 168, 2, 0.4, 24), allocate(importance[1, :, 1], 392, 4, 0.4, 8192)
    assert ([len(x) for x in heads], [len(x) for x in neurons]) == by_layer, "heads by the attention's importance, neurons by the MLP's"


def test_paper_shares_can_be_given(case: Case) -> None:
    scores = UnitScores(torch.rand(3, 3, 4), torch.rand(3, 3, 48))
    units = paper_units(case.model, scores, torch.rand(3, 3, 2), 0, CircuitSettings(preset="paper", head_share=0.5, neuron_share=0.25))
    assert sum(isinstance(u, Head) for u in units) == 6 and len(units) == 6 + 36


# ---- the smallest circuit --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Linear:
    """One layer of 20 heads without an MLP: what heads are injected adds up exactly, every part positive."""

    case: Case
    scores: UnitScores
    cumulated: Tensor


@pytest.fixture(scope="module")
def linear() -> Linear:
    torch.manual_seed(4)
    sizes = SIZES | dict(hidden_size=40, num_hidden_layers=1, num_attention_heads=20, num_key_value_heads=20)
    hf = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
    hf.model.layers[0].mlp.down_proj.weight.zero_()
    model = Model.from_hf(hf, tiny_tokenizer(), "tiny-linear")
    case = case_of(model)
    written = torch.einsum("hd,hdm,m->h", case.directions.z.mean[0, 0].view(20, 2), model.w_o(0), case.v_ref[0])
    z = case.directions.z.mean.clone()
    z[0, 0] = (z[0, 0].view(20, 2) * written.sign()[:, None]).flatten()
    directions = replace(case.directions, z=UnitStats(z, case.directions.z.variance, case.directions.z.base))
    parts = written.abs()
    scores = UnitScores(parts.expand(3, 1, 20), torch.rand(3, 1, 48))
    return Linear(replace(case, directions=directions), scores, parts.sort(descending=True).values.cumsum(0))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.65, 0.8, 0.97, 1.0])
def test_auto_picks_the_smallest_set_that_keeps_the_share(linear: Linear, share: float) -> None:
    case, total = linear.case, linear.cumulated[-1]
    share = share - 1e-5  # rounding of the sums
    units = auto_units(
        case.model, case.directions, linear.scores, 0, case.samples, case.v_ref[0], CircuitSettings(share=share, spare_names=False)
    )
    sizes = [max(1, round(s * 20)) for s in AUTO_SHARES]
    wanted = next(k for k in sizes if linear.cumulated[k - 1] >= share * total)
    assert units == top_units(linear.scores.heads[0], wanted, Head)


def test_auto_sets_of_different_shares_differ(linear: Linear) -> None:
    """The case above tells a wrong choice from the right one."""
    total = linear.cumulated[-1]
    sizes = [max(1, round(s * 20)) for s in AUTO_SHARES]
    assert len({next(k for k in sizes if linear.cumulated[k - 1] >= share * total) for share in (0.05, 0.3, 0.5, 0.65, 0.8, 0.97)}) >= 4


def test_auto_falls_back_where_the_heads_together_work_against_the_emotion(linear: Linear) -> None:
    case = linear.case
    units = auto_units(case.model, case.directions, linear.scores, 0, case.samples, -case.v_ref[0], CircuitSettings(spare_names=False))
    assert units == top_units(linear.scores.heads[0], 5, Head)


def test_auto_takes_given_shares(linear: Linear) -> None:
    case, settings = linear.case, CircuitSettings(head_share=0.35, neuron_share=0.125)
    units = auto_units(case.model, case.directions, linear.scores, 1, case.samples, case.v_ref[1], settings)
    assert units == top_units(linear.scores.heads[1], 7, Head) + top_units(linear.scores.neurons[1], 6, Neuron)
    without = auto_units(case.model, case.directions, linear.scores, 1, case.samples, case.v_ref[1], CircuitSettings(head_share=0.0))
    assert without == top_units(linear.scores.heads[1], 1, Head)


# ---- faithfulness ----------------------------------------------------------------------------------------------------


def unit_injection(case: Case, e: int, units: Sequence[Unit], spare: bool = False) -> float:
    """The final score's change when the units' contrasts, names spared or not, are injected where the units are, by bare hooks."""
    masks = unit_mask(case.model, units)
    z, mlp = masks[0] * case.directions.z.mean[e], masks[1] * case.directions.mlp.mean[e]
    if spare:
        z, mlp = (delta[0] for delta in spare_names(case.model, [case.directions.emotions[e]], z[None], mlp[None], NAME_PUSH))
    changes = {}
    for layer in range(case.model.shape.n_layers):
        changes[layer, "z"], changes[layer, "mlp_post"] = at_t_star(z[layer]), at_t_star(mlp[layer])
    return final(case, case.v_ref[e], changes) - final(case, case.v_ref[e])


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("kinds", ["heads", "neurons", "both"])
def test_the_full_set_is_faithful_and_leaves_nothing(case: Case, kinds: str, spare: bool) -> None:
    units = [u for u in all_units(case.model) if kinds == "both" or isinstance(u, Head) == (kinds == "heads")]
    found = faithfulness(case.model, case.directions, 1, units, case.samples, case.v_ref[1], CircuitSettings(spare_names=spare))
    assert found["faithfulness"] == pytest.approx(1, abs=1e-5)
    assert found["left"] == pytest.approx(0, abs=1e-5)
    assert found["random_mean"] == pytest.approx(1, abs=1e-5), "a random set of all units is all units"
    assert found["whole_effect"] == pytest.approx(unit_injection(case, 1, units, spare), abs=1e-3)
    assert found["heads"] + found["neurons"] == len(units)


def test_faithfulness_of_a_part_equals_injections_by_hand(case: Case) -> None:
    """Best first: without_weakest leaves out the end of the list. The whole are the heads alone where only heads are used."""
    heads: list[Unit] = [Head(2, 1), Head(0, 3), Head(1, 0), Head(1, 2)]
    for units in (heads, [*heads, Neuron(0, 5), Neuron(2, 40), Neuron(1, 1), Neuron(1, 30)]):
        whole = [u for u in all_units(case.model) if isinstance(u, Head) or len(units) > 4]
        found = faithfulness(case.model, case.directions, 0, units, case.samples, case.v_ref[0], CircuitSettings(spare_names=False))
        total = unit_injection(case, 0, whole)
        assert found["whole_effect"] == pytest.approx(total, abs=1e-3)
        assert found["faithfulness"] == pytest.approx(unit_injection(case, 0, units) / total, abs=1e-3)
        assert found["left"] == pytest.approx(unit_injection(case, 0, [u for u in whole if u not in units]) / total, abs=1e-3)
        kept = units[: len(units) * 3 // 4]
        assert found["without_weakest"] == pytest.approx(unit_injection(case, 0, kept) / total, abs=1e-3)


def test_random_controls_have_the_circuits_size(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Unit]] = []
    monkeypatch.setattr(faithfulness_module, "unit_mask", lambda model, units: seen.append(list(units)) or unit_mask(model, units))
    units: list[Unit] = [Head(0, 0), Head(1, 1), Head(2, 2), *(Neuron(1, i) for i in range(7))]

    def measure(e: int, seed: int) -> tuple[dict[str, Any], list[list[Unit]]]:
        seen.clear()
        settings = CircuitSettings(n_random=4, seed=seed, spare_names=False)
        return faithfulness(case.model, case.directions, e, units, case.samples, case.v_ref[e], settings), seen[2:]

    found, randoms = measure(0, 0)
    assert len(randoms) == 4
    for control in randoms:
        assert len(set(control)) == len(control) == len(units)
        assert sum(isinstance(u, Head) for u in control) == 3
    others = measure(1, 0)[1] + measure(0, 1)[1]
    assert len({tuple(control) for control in [*randoms, *others]}) == 12, "drawn anew for each control, emotion and seed"
    assert measure(0, 0)[0] == found
    shares = [unit_injection(case, 0, control) / found["whole_effect"] for control in randoms]
    assert found["random_mean"] == pytest.approx(sum(shares) / 4, abs=1e-3)
    assert found["random_max"] == pytest.approx(max(shares), abs=1e-3)


# ---- names -----------------------------------------------------------------------------------------------------------


def circuit_deltas(model: Model) -> tuple[Tensor, Tensor]:
    """Contrasts of a few heads and neurons per emotion, zero elsewhere."""
    draw = torch.Generator().manual_seed(2)
    z = torch.randn(3, 3, model.width("z"), generator=draw)
    mlp = torch.randn(3, 3, model.shape.d_mlp, generator=draw)
    z *= (torch.rand(3, 3, model.shape.n_heads, generator=draw) < 0.5).repeat_interleave(model.shape.d_head, -1)
    return z, mlp * (torch.rand(mlp.shape, generator=draw) < 0.3)


def written_by(model: Model, layer: int, delta: Tensor, kind: str) -> Tensor:
    """What a layer's heads or neurons add to the residual stream, up to a positive factor where a norm follows."""
    block = model.hf.model.layers[layer]
    out = delta @ (block.self_attn.o_proj if kind == "z" else block.mlp.down_proj).weight.T
    if not model.family.post_norms:
        return out
    return out * (1 + (block.post_attention_layernorm if kind == "z" else block.post_feedforward_layernorm).weight)


def direction_by_hand(model: Model, emotion: str) -> Tensor:
    weight = model.hf.lm_head.weight
    gain = model.hf.model.norm.weight + float(model.family.post_norms)
    return (weight[model.tokenizer.get_vocab()[emotion]] - weight.mean(0)) * gain


def test_names_are_found_in_the_vocabulary(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_tokens(tiny, "anger") == [tiny.tokenizer.get_vocab()["anger"]]
    assert name_tokens(tiny, "serenity") == []
    read: list[Sequence[int]] = []
    fresh, decode = build("llama"), tiny.tokenizer.decode
    monkeypatch.setattr(fresh.tokenizer, "decode", lambda ids: (read.append(ids), decode(ids))[1])
    names = ("anger", "fear", "anger")
    assert [name_tokens(fresh, name) for name in names] == [name_tokens(tiny, name) for name in names]
    assert len(read) == len(tiny.tokenizer.get_vocab()), "the vocabulary is read once for all names"
    assert name_direction(tiny, "serenity") is None


def test_a_spared_circuit_writes_nothing_along_the_name(family: Model) -> None:
    z, mlp = circuit_deltas(family)
    new_z, new_mlp = spare_names(family, EMOTIONS, z, mlp)
    assert ((z == 0) <= (new_z == 0)).all() and ((mlp == 0) <= (new_mlp == 0)).all()
    before, after = 0.0, 0.0
    for e, emotion in enumerate(EMOTIONS):
        name = direction_by_hand(family, emotion)
        name = name / name.norm()
        for layer in range(3):
            for kind, old, new in (("z", z, new_z), ("mlp_post", mlp, new_mlp)):
                before = max(before, abs(float(written_by(family, layer, old[e, layer], kind) @ name)))
                after = max(after, abs(float(written_by(family, layer, new[e, layer], kind) @ name)))
    assert after < 1e-4 < 0.5 < before


@pytest.mark.parametrize("push", [0.5, 1.0])
def test_a_push_turns_what_lifts_the_name_round_and_nothing_else(family: Model, push: float) -> None:
    z, mlp = circuit_deltas(family)
    new_z, new_mlp = spare_names(family, EMOTIONS, z, mlp, push)
    signs = set()
    for e, emotion in enumerate(EMOTIONS):
        name = direction_by_hand(family, emotion)
        for layer in range(3):
            for kind, old, new in (("z", z, new_z), ("mlp_post", mlp, new_mlp)):
                before, after = (float(written_by(family, layer, delta[e, layer], kind) @ name) for delta in (old, new))
                assert after == pytest.approx(min(before, -push * before), abs=1e-3), "a layer that holds the name down goes on to"
                signs.add(before > 1e-2)
    assert signs == {True, False}


def test_sparing_is_the_smallest_change(tiny: Model) -> None:
    """The change is the minimum-norm solution within the circuit's entries."""
    z, mlp = circuit_deltas(tiny)
    new_z, new_mlp = spare_names(tiny, EMOTIONS, z, mlp)
    name = direction_by_hand(tiny, "sadness")
    for layer in range(3):
        for weight, old, new in (
            (tiny.hf.model.layers[layer].self_attn.o_proj.weight, z, new_z),
            (tiny.hf.model.layers[layer].mlp.down_proj.weight, mlp, new_mlp),
        ):
            mine = old[1, layer] != 0
            row = (name @ weight)[mine][None].double()
            wanted = torch.linalg.pinv(row) @ (row @ old[1, layer][mine].double())
            torch.testing.assert_close((old - new)[1, layer][mine].double(), wanted, atol=1e-5, rtol=1e-4)


def test_the_names_logit_no_longer_rises(tiny: Model) -> None:
    """Injected by hooks into the last MLP, behind which there is only the norm: (name's logit - mean logit) * rms is linear there."""
    z, mlp = circuit_deltas(tiny)
    token = tiny.tokenizer.get_vocab()["happiness"]
    norm = tiny.hf.model.norm

    @torch.no_grad()
    def lift(delta: Tensor, dose: float) -> float:
        vector = compile_units(tiny, torch.zeros_like(z), delta)[Site(2, MLP_OUT)][2]
        with reference.changed(tiny.hf, {(2, "mlp_out"): at_t_star(dose * vector)}):
            out = tiny.hf(torch.tensor([[1, 7, 9, 12]]), use_cache=False)
        hidden = reference.seen(tiny.hf, [1, 7, 9, 12], [(2, "resid_post")], {(2, "mlp_out"): at_t_star(dose * vector)})
        rms = (hidden[2, "resid_post"][-1].square().mean() + norm.variance_epsilon).sqrt()
        return float((out.logits[0, -1, token] - out.logits[0, -1].mean()) * rms)

    spared = spare_names(tiny, EMOTIONS, z, mlp)[1]
    base = lift(mlp, 0.0)
    for dose in (0.5, 2.0):
        assert lift(spared, dose) == pytest.approx(base, abs=1e-3)
        assert abs(lift(mlp, dose) - base) > 0.1 * dose


def test_an_emotion_without_a_name_in_the_vocabulary_is_left_alone(tiny: Model) -> None:
    z, mlp = circuit_deltas(tiny)
    new_z, new_mlp = spare_names(tiny, ("anger", "serenity", "fear"), z, mlp)
    assert torch.equal(new_z[1], z[1]) and torch.equal(new_mlp[1], mlp[1])
    assert not torch.equal(new_z[0], z[0]) and not torch.equal(new_mlp[2], mlp[2])
    assert not torch.equal(z, new_z), "what was given stays as it was"
    assert torch.equal(z, circuit_deltas(tiny)[0])


def test_a_circuit_without_entries_stays_empty(tiny: Model) -> None:
    z, mlp = (torch.zeros_like(t) for t in circuit_deltas(tiny))
    new_z, new_mlp = spare_names(tiny, EMOTIONS, z, mlp)
    assert not new_z.any() and not new_mlp.any()


# ---- the whole stage and the artefact --------------------------------------------------------------------------------

PAPER = CircuitSettings(preset="paper", head_share=0.4, neuron_share=0.1, n_prompts=2, n_random=2)


@pytest.fixture(scope="module")
def made(case: Case) -> Circuit:
    return assemble(case.model, case.directions, case.groups, PAPER, parents={"directions": "abc"})


def test_the_circuit_adds_its_units_contrast_and_nothing_else(case: Case) -> None:
    circuit = assemble(case.model, case.directions, case.groups, replace(PAPER, spare_names=False))
    for e, emotion in enumerate(EMOTIONS):
        z_mask, mlp_mask = unit_mask(case.model, circuit.units(emotion))
        assert torch.equal(circuit.z_delta[e], case.directions.z.mean[e] * z_mask)
        assert torch.equal(circuit.mlp_delta()[e], case.directions.mlp.mean[e] * mlp_mask)
        assert len(circuit.units(emotion)) == round(0.4 * 12) + round(0.1 * 144)
        assert list(circuit.units(emotion)) == sorted(circuit.units(emotion), key=lambda u: (isinstance(u, Neuron), u.layer, u.index))


def test_sparing_names_is_part_of_the_stage(case: Case, made: Circuit) -> None:
    unspared = assemble(case.model, case.directions, case.groups, replace(PAPER, spare_names=False))
    z, mlp = spare_names(case.model, EMOTIONS, unspared.z_delta, unspared.mlp_delta(), NAME_PUSH)
    assert torch.equal(made.z_delta, z) and torch.equal(made.mlp_delta(), mlp)
    assert [made.units(e) for e in EMOTIONS] == [unspared.units(e) for e in EMOTIONS]


def test_steering_of_the_circuit_is_its_compiled_form(case: Case, made: Circuit) -> None:
    wanted = compile_units(case.model, made.z_delta, made.mlp_delta())
    found = made.steering(case.model)
    assert set(found) == set(wanted) and all(torch.equal(found[site], wanted[site]) for site in wanted)
    for site, value in made.residual().items():
        index = case.directions.sites.index(site)
        torch.testing.assert_close(value, case.directions.vectors[:, index] * case.directions.rms[index])


def test_measures_are_of_the_circuit(case: Case, made: Circuit) -> None:
    for e, emotion in enumerate(EMOTIONS):
        found = made.metrics["emotions"][emotion]
        units = list(made.units(emotion))
        total = unit_injection(case, e, all_units(case.model), spare=True)
        assert (found["heads"], found["neurons"]) == (5, 14)
        assert found["faithfulness"] == pytest.approx(unit_injection(case, e, units, spare=True) / total, abs=2e-3, rel=1e-3)


@pytest.mark.parametrize("ranking", ["contrast", "raw", "effect"])
def test_the_ranking_decides_which_heads(case: Case, ranking: str) -> None:
    from emosteer.attribution.unit_scores import contrast_scores, raw_scores

    circuit = assemble(case.model, case.directions, case.groups, CircuitSettings(ranking=ranking, head_share=0.25, n_prompts=2, n_random=0))
    if ranking == "effect":
        table = importance_and_effects(case.model, case.samples, case.directions, case.v_ref)[1].heads
    else:
        table = {"contrast": contrast_scores, "raw": raw_scores}[ranking](case.model, case.directions).heads
    for e, emotion in enumerate(EMOTIONS):
        assert set(circuit.units(emotion)) == set(top_units(table[e], 3, Head))


def test_a_circuit_comes_back_as_it_was_saved(case: Case, made: Circuit, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made.save(path)
    back = Circuit.load(path, case.model)
    for name, value in vars(made).items():
        other = getattr(back, name)
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name
    assert [back.units(e) for e in EMOTIONS] == [made.units(e) for e in EMOTIONS]
    assert back.provenance.parents == {"directions": "abc"}
    steering, again = made.steering(case.model), back.steering(case.model)
    assert steering.keys() == again.keys()
    for site, vector in steering.items():  # the same values at another place in memory may be summed in another order
        delta, weight = (
            (made.z_delta, case.model.w_o(site.layer).flatten(0, 1))
            if site.kind == ATTN_OUT
            else (made.mlp_delta(), case.model.w_down(site.layer))
        )
        assert ((again[site] - vector).abs() <= product_bound(delta[:, site.layer], weight)).all(), str(site)


def test_another_models_circuit_and_directions_are_refused(case: Case, made: Circuit, tmp_path: Path) -> None:
    path, other = tmp_path / "c.safetensors", build("llama", seed=1)
    made.save(path)
    with pytest.raises(ArtifactError, match="was made for tiny-llama"):
        Circuit.load(path, other)
    with pytest.raises(ArtifactError, match="was made for tiny-llama"):
        assemble(other, case.directions, case.groups, PAPER)
    assert Circuit.load(path).emotions == EMOTIONS


def test_directions_are_no_circuit(case: Case, tmp_path: Path) -> None:
    case.directions.save(tmp_path / "d.safetensors")
    with pytest.raises(ArtifactError, match="expected an artefact of kind 'circuit'"):
        Circuit.load(tmp_path / "d.safetensors")


def test_a_circuit_without_neurons_round_trips(case: Case, tmp_path: Path) -> None:
    circuit = assemble(case.model, case.directions, case.groups, CircuitSettings(n_prompts=2, n_random=1))
    circuit.save(tmp_path / "c.safetensors")
    back = Circuit.load(tmp_path / "c.safetensors")
    assert len(back.neuron_index) == 0 and not back.mlp_delta().any() and back.mlp_delta().shape == (3, 3, 48)
    assert all(isinstance(unit, Head) for e in EMOTIONS for unit in back.units(e))


def test_with_strength_changes_the_strengths_alone(made: Circuit) -> None:
    other = made.with_strength([1, 2, 4.5])
    assert other.strength.tolist() == [1, 2, 4.5] and other.residual_strength == made.residual_strength
    assert made.with_strength([1, 1, 1], 0.7).residual_strength == 0.7
    assert made.with_strength([1, 1, 1], 0.0).residual_strength == 0.0
    same = [n for n in vars(made) if n not in ("strength", "residual_strength")]
    assert all(getattr(other, name) is getattr(made, name) for name in same)
    assert made.strength.tolist() == [3.0] * 3


def test_unknown_emotions_and_settings_are_usage_errors(made: Circuit) -> None:
    assert made.index("sadness") == 1
    with pytest.raises(UsageError, match="unknown emotion 'angr'.*anger"):
        made.units("angr")
    for fields, message in (
        ({"preset": "papr"}, "unknown preset"),
        ({"ranking": "x"}, "unknown ranking"),
        ({"share": 1.5}, "--share"),
        ({"head_share": -0.1}, "--heads"),
        ({"neuron_share": 2}, "--neurons"),
    ):
        with pytest.raises(UsageError, match=message):
            CircuitSettings(**fields)


def test_overlap_is_the_share_of_common_units(made: Circuit) -> None:
    heads = torch.zeros(3, 3, 4, dtype=torch.bool)
    heads[0, 0, 1] = heads[0, 1, 2] = heads[1, 1, 2] = True
    neurons = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 2, 7]])  # L0N1 is not L0H1
    circuit = replace(made, heads=heads, neuron_index=neurons, neuron_delta=torch.ones(3))
    assert circuit.units("anger") == (Head(0, 1), Head(1, 2), Neuron(0, 1))
    found = overlap(circuit)
    assert found["anger"] == {"anger": 1.0, "sadness": 2 / 4, "happiness": 0.0}
    assert found["sadness"]["anger"] == 2 / 4
    assert found["happiness"]["happiness"] == 0.0, "no units, no overlap"
