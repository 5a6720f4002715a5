"""A planted circuit must be recovered exactly: through the real `extract`, then scores, then steering with what was found.

In a random Llama with grouped heads every emotion word's embedding holds a marker `r[e]`. Two heads per emotion read it (through
W_V) and write `d[e]` (through their slice of W_O); three neurons per emotion, in later layers, read `d[e]` and write it again. All
other heads and neurons are random, read the same words, and are as emotion-dependent as chance makes them: they are the decoys.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emosteer.attribution.unit_scores import UnitScores, contrast_scores, raw_scores, top_units, unit_mask
from emosteer.directions.directions import Directions, reference_directions, stable_band
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.steering import Injector, compile_units, plan_for
from emosteer.models.model import Model
from emosteer.models.sites import RESID_MID, RESID_POST, Head, Neuron, Site, Unit, residual_sites
from emosteer.scenarios.scenarios import VALENCES, Bank, Group, GroupKey
from tests.conftest import SIZES, WORDS, tiny_tokenizer

EMOTIONS = ("anger", "sadness", "happiness", "fear", "surprise", "disgust")
N_HEADS, N_NEURONS = 2, 3  # per emotion
OTHERS = [word for word in WORDS if word.isalpha() and word not in EMOTIONS]


@dataclass(frozen=True, eq=False)
class Planted:
    """The model and what was planted: emotion -> units; d: [emotion, d_model], what they write; r: [emotion, d_model], what they read."""

    model: Model
    heads: list[set[Unit]]
    neurons: list[set[Unit]]
    d: Tensor
    r: Tensor


def plant(seed: int) -> Planted:
    """A random model with the circuit written into its weights at random places."""
    torch.manual_seed(seed)
    sizes = SIZES | dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, initializer_range=0.07
    )
    hf = LlamaForCausalLM(LlamaConfig(**sizes)).requires_grad_(False)
    tokenizer, n, draw = tiny_tokenizer(), len(EMOTIONS), random.Random(seed)
    basis = torch.linalg.qr(torch.randn(64, 2 * n))[0].T
    r, d = basis[:n], basis[n:]
    words = 0.5 * torch.randn(hf.model.embed_tokens.weight.shape)
    words -= words @ basis.T @ basis  # only the emotions' words hold markers
    for e, emotion in enumerate(EMOTIONS):
        words[tokenizer.get_vocab()[emotion]] += 4 * r[e]
    hf.model.embed_tokens.weight.copy_(words)
    places = [(layer, head) for layer in (0, 1) for head in draw.sample(range(8), n)]  # one in each layer for every emotion
    rows = [(layer, neuron) for layer, count in ((2, n), (3, 2 * n)) for neuron in draw.sample(range(96), count)]
    heads: list[set[Unit]] = [set() for _ in EMOTIONS]
    neurons: list[set[Unit]] = [set() for _ in EMOTIONS]
    for index, (layer, head) in enumerate(places):
        e, attention, u = index % n, hf.model.layers[layer].self_attn, torch.eye(8)[index % n]
        group = head // 2  # heads 2g and 2g + 1 share keys and values
        attention.v_proj.weight[group * 8 : group * 8 + 8] += 2.5 * torch.outer(u, r[e])
        attention.o_proj.weight[:, head * 8 : head * 8 + 8] = 3.0 * torch.outer(d[e], u)
        heads[e].add(Head(layer, head))
    for index, (layer, neuron) in enumerate(rows):
        e, mlp = index % n, hf.model.layers[layer].mlp
        mlp.gate_proj.weight[neuron] = d[e]
        mlp.up_proj.weight[neuron] = d[e]
        mlp.down_proj.weight[:, neuron] = 0.25 * d[e]
        neurons[e].add(Neuron(layer, neuron))
    return Planted(Model.from_hf(hf, tokenizer, f"planted-{seed}"), heads, neurons, d, r)


def data(seed: int) -> tuple[list[Group], Bank]:
    """Scenario-events of shared words; a reply is its emotion's word and words that are the same for all emotions of the group."""
    draw = random.Random(seed)
    groups, bank = [], {}
    for scenario in range(6):
        for valence in VALENCES:
            key = GroupKey(f"s{scenario}", valence)
            groups.append(Group(key, f"t{scenario % 2}", " ".join(draw.choices(OTHERS, k=6))))
            shared = " ".join(draw.choices(OTHERS, k=3))
            bank[key] = {emotion: f"{emotion} {shared}" for emotion in EMOTIONS}
    return groups, bank


@dataclass(frozen=True, eq=False)
class Case:
    planted: Planted
    directions: Directions


@pytest.fixture(scope="module", params=[0, 1, 2])
def case(request: pytest.FixtureRequest) -> Case:
    planted = plant(request.param)
    groups, bank = data(request.param)
    return Case(planted, extract(planted.model, groups, Settings(EMOTIONS, instruction="keep the reply"), bank=bank))


def recovered(scores: UnitScores) -> tuple[list[set[Unit]], list[set[Unit]]]:
    """The best heads and neurons of every emotion, as many as were planted."""
    heads = [set(top_units(scores.heads[e], N_HEADS, Head)) for e in range(len(EMOTIONS))]
    return heads, [set(top_units(scores.neurons[e], N_NEURONS, Neuron)) for e in range(len(EMOTIONS))]


def test_the_planted_heads_and_neurons_are_recovered_exactly(case: Case) -> None:
    heads, neurons = recovered(contrast_scores(case.planted.model, case.directions))
    assert heads == case.planted.heads
    assert neurons == case.planted.neurons


def test_the_planted_directions_are_found_in_the_last_layer(case: Case) -> None:
    """What the circuit writes is the contrast of its emotion and not of the others."""
    last = case.directions.at(RESID_POST)[:, -1]
    cosines = last @ case.planted.d.T
    assert (cosines.diag() > 0.6).all()
    assert torch.equal(cosines.argmax(1), torch.arange(len(EMOTIONS)))


def test_random_directions_do_not_recover_the_planted_set(case: Case) -> None:
    """Emotion-dependent activations alone do not make a unit part of the circuit: it must write the emotion's direction.

    The units of an emotion write the same `d[e]`, so that by luck of the sign a random direction ranks those of one layer first half
    of the time; in all four layers at once that is one time in sixteen.
    """
    draw = torch.Generator().manual_seed(5)
    exact, repeats = 0, 20
    for _ in range(repeats):
        noise = torch.randn(case.directions.vectors.shape, generator=draw)
        other = replace(case.directions, vectors=noise / noise.norm(dim=-1, keepdim=True))
        heads, neurons = recovered(contrast_scores(case.planted.model, other))
        assert heads != case.planted.heads and neurons != case.planted.neurons
        rows = zip(heads, neurons, case.planted.heads, case.planted.neurons, strict=True)
        exact += sum(h == own_h and n == own_n for h, n, own_h, own_n in rows)
    assert exact / (repeats * len(EMOTIONS)) < 1 / 8


def final_scores(case: Case, vectors: dict[Site, Tensor], strength: float) -> Tensor:
    """Final score of every emotion [emotion], its own vectors injected at t* of emotion-free prompts, mean over prompts."""
    model, directions = case.planted.model, case.directions
    v_ref = reference_directions(directions, stable_band(directions))
    n, last = len(EMOTIONS), Site(model.shape.n_layers - 1, RESID_POST)
    total = torch.zeros(n)
    prompts = [group.text for group in data(99)[0][:4]]
    for text in prompts:
        ids = torch.tensor([model.prompt_ids([{"role": "user", "content": text}])]).expand(n, -1)
        edits = Injector(plan_for(vectors, range(n), [strength] * n), model.device, model.dtype).edits()
        out = model.read(ids, [last], edits=edits, bridge=False)[last][:, -1]
        total += (out * v_ref).sum(-1)
    return total / len(prompts)


@torch.no_grad()
def circuit_vectors(case: Case, units: list[list[Unit]]) -> dict[Site, Tensor]:
    """The compiled modulation of one circuit per emotion."""
    model, directions = case.planted.model, case.directions
    masks = [unit_mask(model, chosen) for chosen in units]
    return compile_units(
        model, directions.z.mean * torch.stack([z for z, _ in masks]), directions.mlp.mean * torch.stack([m for _, m in masks])
    )


@torch.no_grad()
def test_the_recovered_circuit_steers_and_a_random_one_of_equal_size_does_not(case: Case) -> None:
    model = case.planted.model
    heads, neurons = recovered(contrast_scores(model, case.directions))
    found = circuit_vectors(case, [sorted(h) + sorted(n) for h, n in zip(heads, neurons, strict=True)])
    base = final_scores(case, found, 0.0)
    gain = final_scores(case, found, 1.0) - base
    assert (gain > 0.5).all()
    assert (final_scores(case, found, 2.0) - base > gain).all(), "twice the strength, more of it"
    assert (final_scores(case, found, -1.0) < base).all(), "a negative strength takes it away"

    draw = random.Random(7)
    gains = []
    for _ in range(5):
        units = []
        for _ in EMOTIONS:
            some: list[Unit] = [Head(i // 8, i % 8) for i in draw.sample(range(32), N_HEADS)]
            units.append([*some, *(Neuron(i // 96, i % 96) for i in draw.sample(range(4 * 96), N_NEURONS))])
        gains.append(final_scores(case, circuit_vectors(case, units), 1.0) - base)
    assert (torch.stack(gains).mean(0) < gain / 3).all()


def test_the_paper_form_scores_what_all_emotions_share_too(case: Case) -> None:
    """raw = contrast + what the mean activation contributes: they differ by the same activation for every emotion."""
    model, directions = case.planted.model, case.directions
    contrast, raw = contrast_scores(model, directions), raw_scores(model, directions)
    mid = [i for i, site in enumerate(residual_sites(4)) if site.kind == RESID_MID]
    for head in (Head(0, 1), Head(2, 5)):
        part = slice(head.index * 8, head.index * 8 + 8)
        written = model.hf.model.layers[head.layer].self_attn.o_proj.weight[:, part] @ directions.z.base[head.layer, part]
        for e in range(len(EMOTIONS)):
            shared = float(written @ directions.vectors[e, mid[head.layer]])
            assert raw.of(e, head) - contrast.of(e, head) == pytest.approx(shared, abs=1e-4)
