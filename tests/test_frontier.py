"""The frontier's program: an interrupted descent ends in the same circuits, sizes are kept to, random circuits match layer by layer."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from bench import frontier as program
from bench.frontier import Frontier
from bench.frontier_replies import places, show
from emosteer.base.errors import UsageError
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.settings import GainSettings
from emosteer.models.model import Model
from tests.circuits.test_gains import BANK, GROUPS
from tests.circuits.test_learned_residual import made_directions

SIZES = (0.5, 0.25)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIZES": SIZES, "TRUNK": 2, "EACH": 2, "PART": 2, "SCORED": 1}.items():
        monkeypatch.setattr(program, name, value)


def opened(model: Model, folder: Path) -> Frontier:
    settings = GainSettings(groups=1, dtype="float32", output_rate=0.3, neuron_rate=0.3)
    return Frontier(model, made_directions(model), GROUPS[:6], GROUPS[6:8], BANK, settings, folder)


def layers_of(circuit: Circuit) -> list[tuple[int, ...]]:
    """Emotion and layer of every unit, heads and neurons."""
    heads = [tuple(place[:2]) for place in circuit.heads.nonzero().tolist()]
    return sorted([(0, *place) for place in heads] + [(1, *place[:2]) for place in circuit.neuron_index.tolist()])


@pytest.mark.usefixtures("brief")
def test_an_interrupted_descent_ends_in_the_same_circuits_and_random_ones_match_it_layer_by_layer(tiny: Model, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for selection in ("gradual", "random-1"):
        list(opened(tiny, whole).descend(selection))
        for stages in (2, 4):  # each process is stopped a stage later than the one before it
            list(islice(opened(tiny, parts).descend(selection), stages))
        list(opened(tiny, parts).descend(selection))
    for size in SIZES:
        mine, other, random = (
            Circuit.load(folder / f"{name}_{size:g}.safetensors", tiny)
            for folder, name in ((whole, "gradual"), (parts, "gradual"), (whole, "random-1"))
        )
        assert torch.equal(mine.z_delta, other.z_delta) and torch.equal(mine.neuron_delta, other.neuron_delta)
        assert mine.heads.flatten(1).sum(1).tolist() == [round(12 * size)] * 3
        assert len(mine.neuron_index) == 3 * round(144 * size)
        assert layers_of(random) == layers_of(mine) and not torch.equal(random.neuron_index, mine.neuron_index)
        assert mine.metrics["gains"]["budget"] == size
    table, whole_half = show(whole), Circuit.load(whole / "gradual_0.5.safetensors", tiny)
    where = places(whole, SIZES).splitlines()
    assert len(where) == 6
    line = next(line for line in where if line.startswith("| gradual_0.5 |"))
    counts = [int(number) for number in line.split("|")[2].split(",")]
    assert sum(counts) == 18 and counts == [
        sum(place[0] == 0 and place[2] == layer for place in layers_of(whole_half)) for layer in range(3)
    ]
    assert "| gradual |" in table and "| random-1 |" in table and (whole / "frontier.json").exists()


@pytest.mark.usefixtures("brief")
def test_fitting_on_keeps_the_units_and_changes_what_they_add(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matched to those of 'gradual'; learn it first"):
        list(opened(tiny, tmp_path).descend("random-0"))
    list(opened(tiny, tmp_path).descend("gradual"))
    list(opened(tiny, tmp_path).fit_on("gradual", 0.25, 2))
    before, after = (Circuit.load(tmp_path / f"{name}_0.25.safetensors", tiny) for name in ("gradual", "gradual+2"))
    assert torch.equal(before.heads, after.heads) and torch.equal(before.neuron_index, after.neuron_index)
    assert not torch.allclose(before.z_delta, after.z_delta) and not torch.allclose(before.neuron_delta, after.neuron_delta)
