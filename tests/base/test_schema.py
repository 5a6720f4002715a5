"""Artefacts whose header and tensors do not say the same, or say nonsense, are refused when they are read, field by field."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.attribution.scores import Scores
from emosteer.base import artifacts
from emosteer.base.artifacts import Artifact
from emosteer.base.errors import ArtifactError
from emosteer.circuits.circuit import Circuit
from emosteer.circuits.heads.heads import HeadStudy
from emosteer.directions.directions import Directions
from emosteer.judges.storage import load_adapter, load_heads
from emosteer.models.model import Model
from tests.helpers import whole_artefacts as whole
from tests.helpers.whole_artefacts import EMOTIONS

Change = Callable[[dict[str, Any], dict[str, Any]], object]
READERS: dict[str, Callable[[Path], object]] = {
    "circuit": Circuit.load,
    "directions": Directions.load,
    "scores": Scores.load,
    "heads": HeadStudy.load,
    "judge": lambda path: (load_heads(path), load_adapter(path, "embedded")),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A whole artefact of every kind."""
    root = tmp_path_factory.mktemp("whole")
    for name, made in (
        ("circuit", whole.circuit()),
        ("directions", whole.directions()),
        ("scores", whole.scores()),
        ("heads", whole.heads()),
    ):
        made.save(root / name)
    whole.write_judges(root / "judge")
    return {name: artifacts.load(root / name, name) for name in READERS}


def refusal(found: Artifact, change: Change, path: Path) -> str:
    """What is said of an artefact after a change of its fields and tensors."""
    fields, tensors = copy.deepcopy(found.fields), dict(found.tensors)
    change(fields, tensors)
    artifacts.save(path, found.kind, fields, tensors, found.provenance)
    with pytest.raises(ArtifactError) as caught:
        READERS[found.kind](path)
    told = str(caught.value)
    assert told.startswith(str(path)) and "\n" not in told and len(told) < 500
    return told.removeprefix(str(path))


def at(*path: str | int, value: Any) -> Change:
    """Sets one field, however deep."""

    def change(fields: dict[str, Any], _: dict[str, Any]) -> None:
        place: Any = fields
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


def tensor(name: str, turned: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes one tensor."""
    return lambda _, tensors: tensors.update({name: turned(tensors[name])})


def put(*index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes one entry of a copy."""

    def change(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        values[index] = value
        return values

    return change


CURVE = ("metrics", "calibration", "emotions", "fear")
CIRCUIT: list[tuple[Change, str]] = [
    (at("emotions", value=["anger"]), r"expected 'heads' to be bool \[1, n_layers, n_heads\], found bool \[3, 3, 4\]"),
    (at("emotions", value=[*EMOTIONS, "joy"]), r"expected 'heads' to be bool \[4, n_layers, n_heads\], found bool \[3, 3, 4\]"),
    (at("emotions", value=["anger", "anger", "fear"]), "expected 'emotions' to be names that differ from each other, found list"),
    (at("emotions", value=[1, 2, 3]), "expected 'emotions.0' to be a valid string, found int 1"),
    (at("emotions", value="../../etc/passwd"), "expected 'emotions' to be a valid list, found str"),
    (at("emotions", value=["../../etc", "sadness", "fear"]), "expected 'emotions' to be names of letters"),
    (at("emotions", value=["anger\x1b[2J", "sadness", "fear"]), "expected 'emotions' to be names of letters"),
    (at("emotions", value=[]), "expected 'emotions' to .*at least 1 item"),
    (at("residual_strength", value="strong"), "expected 'residual_strength' to be a valid number, found str"),
    (at("residual_strength", value=None), "expected 'residual_strength' to be a valid number, found NoneType null"),
    (at("residual_strength", value=True), "expected 'residual_strength' to be a valid number, found bool true"),
    (at("residual_strength", value=1e30), "expected 'residual_strength' to be less than or equal to 1000, found float 1e"),
    (at("residual_layers", value=[99, 2]), "expected 'residual_layers' to be layers from 0 to 2, found 99"),
    (at("residual_layers", value=[-1, 2]), "expected 'residual_layers.0' to be greater than or equal to 0, found int -1"),
    (at("residual_layers", value=[1, 1]), "expected 'residual_layers' to be numbers that differ"),
    (at("residual_layers", value=[1]), r"expected 'learned_residual' to be float \[3, 1, 32\], found float32 \[3, 2, 32\]"),
    (at("d_mlp", value=-48), "expected 'd_mlp' to be greater than or equal to 0, found int -48"),
    (at("d_mlp", value=10**12), "expected 'd_mlp' to be less than or equal to 1048576"),
    (at("d_mlp", value=48.5), "expected 'd_mlp' to be a valid integer, found float 48.5"),
    (at("d_mlp", value=8), r"expected 'neuron_index \(neuron\)' to lie between 0 and 7, found 40"),
    (at("instruction", value=7), "expected 'instruction' to be a valid string, found int 7"),
    (at("instruction", value="\x1b]0;title\x07"), "expected 'instruction' to be a text without control characters"),
    (at("surprise", value=1), "holds a field 'surprise', which has no meaning here"),
    (at("metrics", "gains", value=None), "expected 'metrics.gains' to be"),
    (at("metrics", "band", value=[7]), "expected 'metrics.band' to be layers from 0 to 2, found 7"),
    (at("metrics", "calibration", value={}), "lacks 'metrics.calibration.judge'"),
    (at("metrics", "calibration", "emotions", value={}), "expected a row for 'anger' in 'metrics.calibration.emotions'"),
    (at(*CURVE, "strength", value=[]), "expected 'metrics.calibration.emotions.fear.strength' to .*at least 1 item"),
    (at(*CURVE, "fitted", value=[0.0, 0.5]), "expected the lists of 'metrics.calibration.emotions.fear' to be equally long"),
    (at(*CURVE, "strength", value=[0.0, 1e30, 2e30]), "expected '.*fear.strength.1' to be less than or equal to 1000, found float 1e"),
    (at(*CURVE, "strength", value=[0.0, 2.0, 1.0]), "expected '.*fear.strength' to rise from 0"),
    (at(*CURVE, "strength", value=[0.5, 1.0, 2.0]), "expected '.*fear.strength' to rise from 0"),
    (at(*CURVE, "fitted", value=[0.5, 0.4, 1.0]), "expected '.*fear.fitted' never to fall"),
    (tensor("strength", put(1, value=1e30)), "expected 'strength' to lie between -1000 and 1000, found 1e"),
    (tensor("strength", lambda t: t[:2]), r"expected 'strength' to be float \[3\], found float32 \[2\]"),
    (tensor("heads", lambda t: t.float()), r"expected 'heads' to be bool \[3, n_layers, n_heads\], found float32 \[3, 3, 4\]"),
    (tensor("heads", lambda t: ~t), "expected 'z_delta' to be 0 outside the circuit's heads, found more at L0H0 of anger"),
    (tensor("neuron_index", put(0, 0, value=5)), r"expected 'neuron_index \(emotion\)' to lie between 0 and 2, found 5"),
    (tensor("neuron_index", lambda t: t[:1].repeat(2, 1)), "expected 'neuron_index' to name each neuron once"),
    (tensor("rms", lambda t: -t), "expected 'rms' to lie between 0 and inf, found -1"),
    (tensor("z_delta", lambda t: t[..., :30]), "expected 'z_delta' as wide as 4 heads of one size, found 30"),
    (lambda _, t: t.update(more=torch.ones(1)), "holds a tensor 'more', which has no meaning here"),
    (lambda _, t: t.pop("rms"), "lacks 'rms'"),
]
DIRECTIONS: list[tuple[Change, str]] = [
    (at("emotions", value=["anger", "fear"]), r"expected 'vectors' to be float \[2, 6, d_model\]"),
    (at("sites", value=["L0.resid_mid"] * 6), "expected 'sites' to be resid_mid and resid_post of 3 layers in order"),
    (at("n_groups", value=1), "expected 'n_heldout' up to 'n_groups', found 2 of 1"),
    (at("n_groups", value=-1), "expected 'n_groups' to be greater than or equal to 0"),
    (at("dropped", value={"why": "much"}), "expected 'dropped.why' to be a valid integer, found str"),
    (tensor("vectors", lambda t: 2 * t), "expected 'length of vectors' to lie between 0.99 and 1.01, found 2"),
    (tensor("variance", lambda t: -t), "expected 'variance' to lie between 0 and inf, found -1"),
    (tensor("evidence.accuracy", lambda t: 3 * t), "expected 'evidence.accuracy' to lie between 0 and 1.01, found 3"),
    (lambda _, t: t.pop("evidence.themes"), "lacks 'evidence.themes'"),
]
SCORES: list[tuple[Change, str]] = [
    (at("forms", value=["contrast", "magic"]), "expected 'forms.1' to be 'contrast', 'raw', 'patch' or 'effect', found str"),
    (at("forms", value=["contrast"]), r"holds a tensor 'effect\.heads'"),
    (at("band", value=[3]), "expected 'band' to be layers from 0 to 2, found 3"),
    (at("curves", 0, "score", value="high"), "expected 'curves.0.score' to be a valid number, found str"),
    (at("curves", 0, "emotion", value="joy"), "expected emotions of anger, sadness, fear, found 'joy'"),
    (at("verification", "heads", "units", value=-1), "expected 'verification.heads.units' to be greater than or equal to 0"),
    (at("patches", "truth", value=[]), "expected the lists of 'patches' to be equally long"),
    (tensor("contrast.heads", lambda t: t[..., :2]), r"expected 'effect.heads' to be float \[3, 3, 2\], found float32 \[3, 3, 4\]"),
]
JUDGE: list[tuple[Change, str]] = [
    (at("labels", "emotion", value=["anger", "fear"]), r"expected 'emotion.weight' to be float \[2, 6\], found float16 \[3, 6\]"),
    (at("labels", value=3), "expected 'labels' to be a valid dictionary, found int 3"),
    (tensor("embedded:up.encoder.layer.5.output.dense", lambda t: t[:, :1]), "to be float .*, 2.*found float16"),
]
HEADS: list[tuple[Change, str]] = [
    (at("pages", 0, "layer", value=9), "expected 'pages.layer' to be layers from 0 to 2, found 9"),
    (at("pages", 0, "head", value=4), "expected the page of L0H4 to fit the tensors"),
    (at("pages", 0, "words", "own", value=[0.1]), "expected the page of L0H0 to fit the tensors"),
    (at("pages", 0, "fires", "most", value=[[99, 0.1, [0.5]]]), "expected a page to name texts that are there, found 99"),
    (at("pages", 0, "fires", "most", 0, 2, 0, value=7.0), "expected 'pages.0.fires.most.0.2.0' to be less than or equal to 1"),
    (at("pages", 0, "added", "promoted", value=[["word", "much", False]]), "expected 'pages.0.added.promoted.0.1' to be a valid number"),
    (at("pages", 0, "reads", value=[[9, 0, 0.1, True]]), "expected 'pages.reads' to be layers from 0 to 2, found 9"),
    (at("pages", value=[]), "expected 'pages' to .*at least 1 item"),
    (at("pages", 0, "rank", value=0), "expected 'pages.0.rank' to be greater than or equal to 1"),
    (at("labels", value=["fear", "anger", "sadness", "neutral"]), "expected 'labels' to begin with the emotions"),
    (at("texts", 0, "tokens", value=["\x1b[2J"]), "expected 'texts.0.tokens.0' to be a text without control characters"),
    (tensor("edge_index", put(0, 3, value=5)), "expected 'edge_index' to lie between 0 and 2, found 5"),
    (tensor("edge_weight", lambda t: t[:1]), r"expected 'edge_weight' to be float \[6\]"),
    (tensor("told", lambda t: t + 2), "expected 'told' to lie between"),
]
CASES = [
    pytest.param(kind, change, told, id=f"{kind}-{number}")
    for kind, cases in {"circuit": CIRCUIT, "directions": DIRECTIONS, "scores": SCORES, "judge": JUDGE, "heads": HEADS}.items()
    for number, (change, told) in enumerate(cases)
]


@pytest.mark.parametrize(("kind", "change", "told"), CASES)
def test_nonsense_is_refused_with_field_expected_and_found(
    sound: dict[str, Artifact], tmp_path: Path, kind: str, change: Change, told: str
) -> None:
    found = refusal(sound[kind], change, tmp_path / "a.safetensors")
    assert re.search(told, found), found


@pytest.mark.parametrize("kind", READERS)
def test_what_is_whole_is_taken(sound: dict[str, Artifact], kind: str) -> None:
    READERS[kind](sound[kind].path)


def test_a_circuit_of_other_sizes_than_the_model_s_is_refused_whatever_it_says_of_the_weights(tiny: Model, tmp_path: Path) -> None:
    """The hash of the weights in a header is a claim."""
    made = whole.circuit()
    made = replace(made, provenance=replace(made.provenance, model_sha256=tiny.sha256))
    made.save(tmp_path / "fits")
    assert Circuit.load(tmp_path / "fits", tiny).d_mlp == tiny.shape.d_mlp
    replace(made, d_mlp=64).save(tmp_path / "wide")
    with pytest.raises(ArtifactError, match="expected d_mlp 48 as in tiny-llama, found 64"):
        Circuit.load(tmp_path / "wide", tiny)
