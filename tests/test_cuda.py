"""Every stage on the device against the CPU, in float32. Where there is no GPU, the CPU stands in for it, so that the tests themselves are
tried; `make cuda` runs them on one (`pytest -m gpu`)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bench.cuda import main
from emosteer.attribution.unit_scores import contrast_scores
from emosteer.circuits.assemble import assemble
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.settings import CircuitSettings, GainSettings
from emosteer.directions.directions import Directions
from emosteer.directions.extract import extract
from emosteer.directions.settings import Settings
from emosteer.generation.decoding import Decoding
from emosteer.generation.generate import Request, generate
from emosteer.generation.steering import plan_for
from emosteer.models.model import Model
from emosteer.models.sites import ATTN_OUT, Site
from tests.conftest import build, small_data

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMOTIONS = ("anger", "sadness", "fear")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def pair(request: pytest.FixtureRequest) -> tuple[Model, Model]:
    """The same random model in host memory and on the device."""
    here = build(request.param)
    return here, Model.from_hf(copy.deepcopy(here.hf).to(DEVICE), here.tokenizer, here.name)


def directions_of(model: Model) -> Directions:
    groups, bank = small_data(6, EMOTIONS)
    return extract(model, groups, Settings(EMOTIONS, batch_tokens=200), bank=bank)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> bool:
    return bool((found.cpu() - expected).norm() <= tolerance * expected.norm())


def test_directions(pair: tuple[Model, Model]) -> None:
    expected, found = map(directions_of, pair)
    assert near(found.vectors, expected.vectors) and near(found.z.mean, expected.z.mean) and near(found.mlp.mean, expected.mlp.mean)
    assert near(found.rms, expected.rms) and found.evidence.accuracy.shape == expected.evidence.accuracy.shape


def test_contributions(pair: tuple[Model, Model]) -> None:
    directions = directions_of(pair[0])
    expected, found = (contrast_scores(model, directions) for model in pair)
    assert near(found.heads, expected.heads) and near(found.neurons, expected.neurons)


def test_a_circuit_that_is_learned(pair: tuple[Model, Model]) -> None:
    groups, bank = small_data(6, EMOTIONS)
    made: list[Circuit] = []
    for model in pair:
        settings = CircuitSettings(n_prompts=2, n_random=1)
        gains = GainSettings(steps=2, groups=2, dtype="float32")
        made.append(assemble(model, directions_of(pair[0]), groups, settings, bank=bank, gain_settings=gains))
    vectors = [circuit.steering(model) for circuit, model in zip(made, pair, strict=True)]
    assert vectors[0].keys() == vectors[1].keys()
    assert all(near(vectors[1][site], vectors[0][site].cpu(), 1e-2) for site in vectors[0])


def test_greedy_text(pair: tuple[Model, Model]) -> None:
    """Steered, mixed, guided: the same tokens."""
    draw = torch.Generator().manual_seed(3)
    requests = [Request(str(n), tuple(torch.randint(5, 60, (4 + n,), generator=draw).tolist()), (1, 2)) for n in range(4)]
    vectors = {Site(layer, ATTN_OUT): torch.randn(3, pair[0].shape.d_model, generator=draw) for layer in range(3)}
    plan = plan_for(vectors, [0, 1, 2, 0], [1.0, 0.5, 1.0, 0.0])
    expected, found = (generate(model, requests, plan, Decoding(max_new_tokens=24, guidance=1.5)) for model in pair)
    assert [reply.ids for reply in found] == [reply.ids for reply in expected]


def test_the_table_of_speeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tiny, batch 8" in out and "of the bound of" in out and "extraction, tokens/s" in out
    assert (tmp_path / "RESULTS.md").read_text().count("| tiny") == 3
