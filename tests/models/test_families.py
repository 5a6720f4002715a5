"""What every family must do, on a random model of each: write and read as transformers does, in batches, packed and steered too."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emosteer.api.support import support
from emosteer.attribution.ablate import ablate
from emosteer.attribution.gradients import importance_and_effects
from emosteer.attribution.settings import AblateSettings, CurveSettings
from emosteer.attribution.verification import verify
from emosteer.base.errors import ModelError, UsageError
from emosteer.circuits.assemble import assemble
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.directions.activations import Sample, read_states, rows_of
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.export.forms import llama_form, read_config
from emosteer.export.llamacpp import vector_hint
from emosteer.generation.engines import engine_for
from emosteer.generation.generate import Decoding, Request, generate
from emosteer.generation.steering import SteeringPlan, compile_units, plan_for
from emosteer.models.hooks import Edit
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, KINDS, MLP_OUT, RESID_MID, RESID_POST, Site
from emosteer.report.sections import _units
from emosteer.scenarios.scenarios import GroupKey
from tests import families
from tests.attribution.test_unit_scores import make_directions, samples
from tests.conftest import small_data
from tests.helpers import reference
from tests.helpers.families import MODELS, random_model
from tests.helpers.precision import forward_bound
from tests.models import test_architecture

EMOTIONS = ("anger", "sadness", "happiness")
PROMPTS = ((1, 7, 9, 12, 30, 41), (1, 8, 20), (1, 50, 33, 21, 17, 60, 44, 13, 3))


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> Model:
    """A random model of each family."""
    return random_model(request.param)


def plain_reply(model: Model, prompt: tuple[int, ...], steps: int) -> list[int]:
    """What transformers writes by itself: one prompt, no batch, no code of ours."""
    ids = torch.tensor([prompt])
    out = model.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=steps, eos_token_id=2, pad_token_id=2)
    written: list[int] = out[0, len(prompt) :].tolist()
    return written[: written.index(2)] if 2 in written else written


def test_greedy_text_is_that_of_transformers(case: Model) -> None:
    """A batch of prompts of different lengths, by whichever engine takes the model."""
    found = generate(case, [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS)], decoding=Decoding(8, repetition_penalty=1.0))
    expected = [plain_reply(case, prompt, 8) for prompt in PROMPTS]
    assert [list(reply.ids) for reply in found] == expected
    assert len({tuple(reply) for reply in expected}) > 1, "the prompt matters"


def test_a_packed_group_reads_what_its_sequences_read_alone(case: Model) -> None:
    group = samples()[:2]
    sites = [Site(layer, kind) for layer in range(2) for kind in KINDS]
    packed, alone = (read_states(case, group, sites, packed=way) for way in (True, False))
    for site in sites:
        torch.testing.assert_close(packed[site], alone[site], rtol=1e-3, atol=1e-4, msg=str(site))
    slow = [first_layer(case, sample) for sample in group]
    torch.testing.assert_close(alone[Site(0, RESID_POST)], torch.stack(slow), rtol=1e-3, atol=1e-4)


def first_layer(model: Model, sample: Sample) -> Tensor:
    """The stream behind the first layer as transformers gives it, averaged over the positions that are read. Shape [emotion, d_model]."""
    states, hf = [], copy.deepcopy(model.hf)  # transformers leaves hooks behind in a model that was asked for its states
    for row in rows_of(sample, packed=False):
        with torch.no_grad():
            hidden = hf(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states[1][0]
        states.append(hidden[list(row.reads[0])].mean(0))
    return torch.stack(states)


def unit_deltas(model: Model) -> tuple[Tensor, Tensor]:
    """What is added to every unit, row by row: z [row, layer, n_heads * d_head] and neurons [row, layer, d_mlp]."""
    draw, shape = torch.Generator().manual_seed(3), model.shape
    widths = (shape.n_heads * shape.d_head, shape.d_mlp)
    z, mlp = (0.3 * torch.randn(len(PROMPTS), shape.n_layers, width, generator=draw) for width in widths)
    return z, mlp


def late(edit: Edit, start: int) -> Edit:
    """An edit of the positions from `start` on."""
    return lambda activation: torch.cat([activation[:, :start], edit(activation[:, start:])], dim=1)


@torch.no_grad()
def test_compiled_steering_is_the_circuit_unit_by_unit(case: Model) -> None:
    """The writing engine, with its cache and a batch of padded rows, against one row at a time with every unit shifted, no cache."""
    z, mlp = unit_deltas(case)
    engine = engine_for(case, PROMPTS, SteeringPlan(compile_units(case, z, mlp), len(PROMPTS)), None, 2)
    first = engine.step(None)
    tokens = first.argmax(-1)
    found = torch.stack([first, engine.step(tokens)], dim=1)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, int(tokens[row])]])
        edits = {site: late(edit, len(prompt) - 1) for site, edit in reference.unit_edits(z[row], mlp[row]).items()}
        expected = case.logits(case.run(ids, edits, bridge=False))[0, -2:]
        assert (found[row] - expected).abs().max() < 4 * forward_bound(expected)
        plain = case.hf(input_ids=ids).logits[0, -2:]
        assert (plain - expected).abs().max() > 1e-2, "steering does something"


@torch.no_grad()
def test_analysis_edits_what_the_plain_model_has(case: Model) -> None:
    """The bridge, where there is one, at every site; elsewhere analysis hooks the plain model, and says so."""
    ids = torch.tensor([PROMPTS[0]])
    for kind in KINDS:
        if kind == RESID_MID and case.family.parallel:
            with pytest.raises(ModelError, match="can be read there, not changed"):
                case.run(ids, {Site(1, kind): lambda x: x * 2})
            continue
        edits = {Site(1, kind): lambda activation: activation + activation.roll(1, -1)}
        found, expected = (case.run(ids, edits, bridge=bridge) for bridge in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        changed = (expected - case.run(ids, bridge=False)).abs().max() > 1e-3
        assert changed or case.width(kind) == 0, kind


@torch.no_grad()
def test_scores_hold_against_real_ablation_as_ablate_checks_it(case: Model) -> None:
    directions = make_directions(case, samples())
    found = verify(case, directions, PROMPTS[:2], 40) if not case.family.post_norms else {}
    assert set(found) >= {"heads"} or case.family.post_norms
    assert ("neurons" in found) == (case.family.has_neurons and not case.family.post_norms)
    assert all(found[kind]["max_error_to_largest"] < 1e-4 for kind in ("heads", "neurons") if kind in found)


def test_importance_is_the_slope_of_a_dose_at_a_sublayers_output(case: Model) -> None:
    """What is injected at the output of W_O or of the MLP reaches the stream times the family's factor, and behind its norm."""
    if case.family.post_norms:
        return  # a dose at the output is scaled by the norm: importance is of a dose in the stream
    directions = make_directions(case, samples())
    v_ref = reference_directions(directions, stable_band(directions))
    group = Sample(GroupKey("s", "neutral"), "t", (PROMPTS[0],) * 3, ((),) * 3)
    importance, _ = importance_and_effects(case, [group], directions, v_ref)
    case.hf.double().set_experts_implementation("eager")  # the fused one has no double precision
    try:
        for layer in range(2):
            for place, (written, site) in enumerate(((ATTN_OUT, RESID_MID), (MLP_OUT, RESID_POST))):
                v = directions.at(site)[:, layer].double() / case.residual_factor
                slope = dose_slope(case, Site(layer, written), v, v_ref.double())
                torch.testing.assert_close(importance[:, layer, place].double(), slope, rtol=2e-2, atol=2e-3)
    finally:
        case.hf.float()


@torch.no_grad()
def dose_slope(model: Model, site: Site, v: Tensor, v_ref: Tensor, dose: float = 1e-3) -> Tensor:
    """How the final score changes per dose of v at a site of the last position, by central differences. v, v_ref: [emotion, d_model]."""
    last, ids = Site(1, RESID_POST), torch.tensor([PROMPTS[0]] * len(v))
    ends = []
    for sign in (1, -1):

        def add(activation: Tensor, sign: int = sign) -> Tensor:
            shifted = activation.clone()
            shifted[:, -1] += sign * dose * v
            return shifted

        ends.append((model.read(ids, [last], edits={site: add}, bridge=False)[last][:, -1] * v_ref).sum(-1))
    return (ends[0] - ends[1]) / (2 * dose)


# ---- the stages ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "cohere", "granite", "gpt2"])
def test_the_stages_run_on_what_is_not_built_as_llama(name: str, tmp_path: Path) -> None:
    """Experts, parallel blocks, factors, learned positions: from scenarios to a steered reply, through the files."""
    model, (groups, bank) = random_model(name), small_data(2, EMOTIONS)
    directions = extract(model, groups, Settings(EMOTIONS, holdout=0, instruction=""), bank=bank)
    directions.save(tmp_path / "directions.safetensors")
    directions = Directions.load(tmp_path / "directions.safetensors")
    curves = CurveSettings(shares=(0.25,), kinds=("zero",), n_random=1, n_prompts=1, max_new_tokens=2)
    scores = ablate(model, directions, groups, AblateSettings(2, 1, 12, 1, 5, 2, curves=curves), bank=bank)
    scores.save(tmp_path / "scores.safetensors")
    assert {row["unit"] for row in scores.curves} == ({"heads", "neurons"} if model.family.has_neurons else {"heads"})
    assert {unit[2] for unit in scores.patches["units"]} <= ({"H", "N"} if model.family.has_neurons else {"H"})
    figures: Any = SimpleNamespace(scores=scores, circuit=None)
    assert ("neurons" in [figure.id for figure in _units(figures).figures]) == model.family.has_neurons
    gains = GainSettings(steps=1, groups=1, dtype="float32")
    circuit = assemble(model, directions, groups, CircuitSettings(n_prompts=1, n_random=1), bank=bank, gain_settings=gains)
    circuit.save(tmp_path / "circuit.safetensors")
    vectors = Circuit.load(tmp_path / "circuit.safetensors", model).steering(model)
    plan = plan_for(vectors, [0, 1], [8.0, 8.0])
    requests = [Request(str(row), prompt) for row, prompt in enumerate(PROMPTS[:2])]
    steered, plain = (generate(model, requests, which, Decoding(4, repetition_penalty=1.0)) for which in (plan, None))
    assert [reply.ids for reply in steered] != [reply.ids for reply in plain]
    if not model.family.has_neurons:
        with pytest.raises(UsageError, match="--preset paper asks for neurons"):
            assemble(model, directions, groups, CircuitSettings(preset="paper"))


# ---- what is said of them --------------------------------------------------------------------------------------------------------


def test_exports_are_possible_or_refused_in_one_line(case: Model, tmp_path: Path) -> None:
    """As a folder's own config.json says, with the class in it and without."""
    said = support(case)
    case.hf.config.save_pretrained(tmp_path)
    for architectures in ([type(case.hf).__name__], None):
        config = read_config(tmp_path)
        config.architectures = architectures
        for stage, make in (("export checkpoint", lambda it: llama_form(it, "float32")), ("export llama.cpp vector", vector_hint)):
            if said[stage].works:
                assert make(config)
                continue
            with pytest.raises(ModelError, match="can be made") as caught:
                make(config)
            assert "\n" not in str(caught.value)
    can = {"llama", "qwen2", "mistral"}
    assert said["export checkpoint"].works == (case.family.name in can) == said["generate, fast"].works


def test_neurons_of_experts_are_refused_with_the_reason(case: Model) -> None:
    if case.family.has_neurons:
        case.refuse_neurons("--neurons")
        assert case.shape.d_mlp > 0
    else:
        assert case.shape.d_mlp == 0
        with pytest.raises(UsageError, match="--neurons asks for neurons of .*, but its MLPs are mixtures of experts"):
            case.refuse_neurons("--neurons")


def test_the_page_of_families_is_up_to_date() -> None:
    assert families.PAGE.read_text("utf-8") == families.page(), "run `make families`"


def test_the_page_names_tests_that_run_on_every_model() -> None:
    names = re.findall(r"`(test_\w+)`", families.PAGE.read_text("utf-8"))
    assert len(names) >= 10
    for name in names:
        assert hasattr(sys.modules[__name__], name) or hasattr(test_architecture, name), name
