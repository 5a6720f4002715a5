"""The report's section on side effects, from an artefact of a tiny run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from emosteer.circuits.places import Places
from emosteer.models.model import Model
from emosteer.report.effect_figures import tables
from emosteer.report.inputs import read_inputs
from emosteer.report.page import build_report
from emosteer.report.sections import sections
from emosteer.side_effects.measure import effects
from emosteer.side_effects.settings import EffectsSettings
from emosteer.side_effects.side_effects import SideEffects
from tests.helpers.dialled import dialled_circuit
from tests.helpers.effects_setup import read_by_words, small_battery
from tests.helpers.report_setup import undefined_colours

SETTINGS = EffectsSettings(
    methods=("circuit", "prompt-tone"),
    intensities=(50.0, 100.0),
    item_tokens=4,
    reply_tokens=4,
    rounds=1,
    distances=(0, 30),
    followed=1,
)


@pytest.fixture(scope="module")
def found(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> SideEffects:
    circuit = dialled_circuit(tiny, ("anger", "fear"))
    made = effects(tiny, circuit, "c" * 64, small_battery(6, 4), SETTINGS, tmp_path_factory.mktemp("kept"), read_by_words)
    return replace(made, provenance=replace(made.provenance, model="toy", command="emosteer effects --quick"))


@pytest.fixture(scope="module")
def places(found: SideEffects, tmp_path_factory: pytest.TempPathFactory) -> Places:
    made = Places.of("toy", tmp_path_factory.mktemp("artefacts"))
    found.save(made.effects)
    return made


def test_the_section_says_what_was_measured(found: SideEffects, places: Places) -> None:
    section = next(section for section in sections(read_inputs(places)) if section.id == "effects")
    assert [figure.id for figure in section.figures] == ["effects-dial", "effects-after"]
    assert "6 items, 4 harmful requests, 4 prompts that seek attachment, 4 neutral texts" in section.intro
    row = next(r for r in found.rows if (r["emotion"], r["intensity"]) == ("all", 100.0))
    dial = section.figures[0]
    shares, perplexity = (panel.alt.replace("\u202f", " ").replace("\N{MINUS SIGN}", "-") for panel in dial.panels)
    change = 100 * row["figures"]["right"]["change"]["value"]
    assert f"items right {'+' if change > 0 else ''}{change:.1f}" in shares
    assert f"unsteered at 100: {row['figures']['nll']['change']['value']:.2f}." in perplexity
    assert [cells[:2] for cells in dial.tables[0].rows] == [["anger", "50"], ["fear", "50"], ["anger", "100"], ["fear", "100"]]
    methods, limits, patterns, feedback = section.tables
    assert [cells[0] for cells in methods.rows] == ["Unsteered", "Circuit at 50", "Circuit at 100", "Prompt: tone"]
    assert len(limits.rows) == 7 and all(len(cells) == 4 for cells in limits.rows)
    assert len(patterns.rows) == 4 and len(feedback.rows) == 2
    assert all(panel.svg.startswith("<svg") and panel.svg.count("<path") > 2 for figure in section.figures for panel in figure.panels)


def test_a_small_p_is_not_rounded_to_nothing(found: SideEffects) -> None:
    ps = (0.0004, 0.0123)
    rows = [{**row, "p": p} for row, p in zip(found.feedback, ps, strict=True)]
    feedback = tables(replace(found, feedback=rows))[-1]
    assert feedback.head[-1] == "p" and [cells[-1] for cells in feedback.rows] == ["< 0.001", "0.012"]


def test_the_page_holds_the_section_and_warns_of_another_circuit(places: Places, tmp_path: Path) -> None:
    text = build_report(places, tmp_path / "report.html", "toy").path.read_text("utf-8")
    assert not undefined_colours(text), "every measure has its colour"
    assert 'id="effects"' in text and "emosteer effects --quick" in text and "Does it hold after a long conversation?" in text
    assert all(section.id != "effects" for section in sections(replace(read_inputs(places), effects=None)))
