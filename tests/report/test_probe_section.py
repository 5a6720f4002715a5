"""The report's section on probes, from an artefact with invented values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emosteer.base.artifacts import Provenance
from emosteer.circuits.places import Places
from emosteer.probing.probes import LINEAR, NONLINEAR, Probes
from emosteer.report.inputs import read_inputs
from emosteer.report.page import build_report
from emosteer.report.probe_figures import _confusion
from emosteer.report.sections import sections

LABELS = ("anger", "fear")
LAYERS, HEADS = 3, 2


def around(value: float) -> dict[str, float]:
    return {"value": value, "low": max(-1.0, value - 0.1), "high": min(1.0, value + 0.1)}


def point(kind: str, layer: int, unit: int, form: str, accuracy: float) -> dict[str, Any]:
    row = {"kind": kind, "layer": layer, "unit": unit, "form": form, "decay": 0.01, "held_out_loss": 1 - accuracy, "f1": accuracy - 0.01}
    return {**row, "accuracy": around(accuracy), "calibration": 0.07, "loss": 0.6, "shuffled": 0.5, "selectivity": accuracy - 0.5}


def probes() -> Probes:
    points = [point("resid_post", layer, 0, form, 0.6 + 0.1 * (layer == 1) - 0.02 * (form == NONLINEAR)) for form in (LINEAR, NONLINEAR) for layer in range(LAYERS)]  # fmt: skip # noqa: E501
    points += [point("heads", layer, unit, LINEAR, 0.55 + 0.1 * (layer == unit == 1)) for layer in range(LAYERS) for unit in range(HEADS)]
    moved = {"label": "fear", "before": 0.2, "rise_shuffled": 0.01, "read_before": 0.1, "read_after": 0.4}
    return Probes(
        labels=LABELS,
        weights={"resid_post": torch.zeros(LAYERS, 1, 2, 4), "heads": torch.zeros(LAYERS, HEADS, 2, 2)},
        biases={"resid_post": torch.zeros(LAYERS, 1, 2), "heads": torch.zeros(LAYERS, HEADS, 2)},
        read="mean",
        texts={"train": 30, "test": 10},
        left_out={},
        points=points,
        best={"resid_post": {"layer": 1, "unit": 0}, "heads": {"layer": 1, "unit": 1}},
        chosen="resid_post",
        confusion=torch.tensor([[4, 1], [2, 3]]),
        lexical=around(0.57),
        prompting={
            "texts": 8,
            "shots": 0,
            "probe": around(0.7),
            "asked": {"zero-shot": {"accuracy": around(0.4), "f1": 0.31, "calibration": 0.2, "loss": 1.0, "probe_less": around(0.3)}},
        },
        persistence={
            "texts": 10,
            "window": 8,
            "site": "L1.resid_post",
            "longest": 99,
            "points": [
                {"distance": d, "fitted": around(f), "transferred": around(0.6), "shuffled": around(0.5), "lexical": around(0.52)}
                for d, f in ((0, 0.7), (64, 0.66))
            ],
        },
        malleability={
            "texts": 6,
            "site": "L1.resid_post",
            "rows": [
                {"how": "system line", "dose": None, "after": 0.25, "rise": around(0.05), **moved},
                *(
                    {"how": how, "dose": dose, "after": 0.2 + dose * rise, "rise": around(dose * rise), **moved}
                    for how, rise in (("circuit", 0.4), ("random vectors", 0.02))
                    for dose in (0.5, 1.0)
                ),
            ],
        },
        notes=("a note of the run",),
        provenance=Provenance("toy", "a" * 64, "b" * 64, "test", command="emosteer probe texts.jsonl"),
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """A folder with nothing but probes."""
    made = Places.of("toy", tmp_path_factory.mktemp("artefacts"))
    probes().save(made.probes)
    return made


def test_probes_alone_make_a_page_and_their_figures_say_what_was_measured(places: Places) -> None:
    section = next(section for section in sections(read_inputs(places)) if section.id == "probes")
    found = {figure.id: figure for figure in section.figures}
    assert list(found) == ["probe-layers", "probe-heads", "probe-confusion", "probe-lasting", "probe-moved"]
    assert section.notes == ["a note of the run"] and "30 labelled texts" in section.intro
    alt = {name: figure.panels[0].alt.replace("\u202f", " ") for name, figure in found.items()}
    assert "60.0 % at layer 0, 70.0 % at layer 1" in alt["probe-layers"] and "shuffled labels 50.0 %" in alt["probe-layers"]
    assert "L1H1: 65.0 %" in alt["probe-heads"] and "fear read as anger, 40.0 %" in alt["probe-confusion"]
    assert "After 64 neutral tokens: probe fitted there 66.0 %" in alt["probe-lasting"]
    assert "system line +5.0, circuit +40.0, random vectors +2.0" in alt["probe-moved"], "at the highest dose"
    assert found["probe-confusion"].tables[0].rows == [["anger", 4, 1], ["fear", 2, 3]]
    assert [row[0] for row in found["probe-layers"].tables[0].rows] == [0, 1, 2] and len(found["probe-moved"].tables[0].rows) == 5
    assert [row[0] for row in section.tables[0].rows] == ["Probe", "Zero-shot"]
    assert all(panel.svg.startswith("<svg") and panel.svg.count("<path") > 2 for figure in section.figures for panel in figure.panels)


def test_labels_that_begin_alike_keep_their_own_columns() -> None:
    labels = ("disappointment", "disapproval")
    drawn = _confusion(replace(probes(), labels=labels)).panels[0].svg
    assert ">disappo.</text>" in drawn and ">disappr.</text>" in drawn


def test_the_page_holds_the_section_and_where_it_came_from(places: Places, tmp_path: Path) -> None:
    text = build_report(places, tmp_path / "report.html", "toy").path.read_text("utf-8")
    assert 'id="probes"' in text and "emosteer probe texts.jsonl" in text and "How long can it be read?" in text


def test_a_page_without_probes_says_nothing_of_them(places: Places) -> None:
    assert all(section.id != "probes" for section in sections(replace(read_inputs(places), probes=None)))
